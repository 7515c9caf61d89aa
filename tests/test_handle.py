"""optimize, optimized and the handle: what is replaced, counted, restored, and refused."""

import copy
import functools
import gc
import importlib
import io
import pickle
import re
import types
import weakref

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models import attention_processor as stock
from pipeline_kinds import KINDS as KINDS_OF_PIPELINES
from pipelines import KINDS, ROUNDING, distance, make_pipeline, picture, same_picture
from tiny_model import tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

import diffopt
from diffopt.attention import backends
from diffopt.attention.layers import attention_modules
from diffopt.attention.plan import AttentionShape
from diffopt.attention.processors import DiffoptAttnProcessor, DiffoptFusedAttnProcessor, is_ours
from diffopt.attention.tuning import Tuning
from diffopt.errors import BackendError, InputError, OptimizeError
from diffopt.gpus import find_gpu
from diffopt.measure.profile import FORWARDS, profile_forward
from diffopt.measure.teacher_forced import record_unet_calls, using_stock


@pytest.fixture
def pipe():
    return make_pipeline("bundled")


def processors(pipe) -> list[object]:
    return [attn.processor for attn in attention_modules(pipe.unet).values()]


def first_backend(shape: AttentionShape, device: torch.device) -> str:
    """What `auto` tries first for a shape: the fastest where it was measured, else diffopt's kernel where it is on."""
    measured = None if shape.masked else backends.measured_order(device, shape.key, shape.dtype)
    order = backends.guesses(backends.auto_order(device), getattr(torch, shape.dtype))
    return measured.names[0] if measured else order[0].name


@pytest.mark.parametrize("kind", KINDS)
def test_optimized_is_the_same_picture_and_every_layer_is_counted(kind):
    pipe = make_pipeline(kind)
    before = picture(pipe, kind)
    handle = diffopt.optimize(pipe)
    after = picture(pipe, kind)
    assert same_picture(after, before, kind)
    summary = handle.summary()
    rows = summary["layers"]
    assert len(rows) == len(attention_modules(pipe.unet))
    assert all(row["optimized"] for row in rows)
    calls = {sum(run["calls"] for run in row["runs"]) for row in rows}
    assert calls == ({2} if kind == "bundled" else {1})  # one per step and layer
    ran = {(run["shape"], run["backend"]) for row in rows for run in row["runs"]}
    assert ran == {(str(shape), choice.backend) for shape, choice in handle.plan.choices.items()}
    assert ran == {(str(shape), first_backend(shape, pipe.unet.device)) for shape in handle.plan.choices}
    assert not summary["fallbacks"]
    assert ("diffopt" in {backend for _, backend in ran}) == torch.cuda.is_available()


def test_planted_scale_fault_changes_the_picture(pipe):
    """The comparison above can fail: one percent more scale is another picture."""
    before = picture(pipe, "bundled")
    fault = backends.with_scale_fault(backends.BACKENDS["sdpa-math"], 1.5)
    with diffopt.optimized(pipe, attention=fault):
        assert not same_picture(picture(pipe, "bundled"), before)


def test_restore_puts_the_exact_objects_back(pipe):
    former = processors(pipe)
    handle = diffopt.optimize(pipe)
    assert all(is_ours(processor) for processor in processors(pipe))
    handle.restore()
    assert all(now is then for now, then in zip(processors(pipe), former, strict=True))
    assert not any(hasattr(attn, "diffopt_layer") for attn in attention_modules(pipe.unet).values())
    assert not handle.active
    handle.restore()  # once more does nothing
    assert all(now is then for now, then in zip(processors(pipe), former, strict=True))


def test_the_context_restores_after_an_exception(pipe):
    former = processors(pipe)
    with pytest.raises(ZeroDivisionError), diffopt.optimized(pipe):
        assert all(is_ours(processor) for processor in processors(pipe))
        raise ZeroDivisionError
    assert all(now is then for now, then in zip(processors(pipe), former, strict=True))


def everything(pipe) -> dict:
    """What restoring gives back: processors, attributes, and where parameters lie."""
    found = {}
    for part in ("unet", "vae", "controlnet"):
        for name, module in getattr(pipe, part, torch.nn.Module()).named_modules():
            found[part, name] = (sorted(module.__dict__), id(getattr(module, "processor", None)))
            for key, x in module.named_parameters(recurse=False):
                alone = x.untyped_storage().nbytes() == x.numel() * x.element_size()
                found[part, name, key] = (id(x), x.stride(), alone)
    return found


def failing(monkeypatch, target: str) -> types.SimpleNamespace:
    """Counts the calls of a function; it runs out of memory in the one numbered `at`."""
    module, _, name = target.rpartition(".")
    module = importlib.import_module(module)
    original, count = getattr(module, name), types.SimpleNamespace(calls=0, at=0)

    def stand_in(*arguments, **keywords):
        count.calls += 1
        if count.calls == count.at:
            raise torch.OutOfMemoryError("planted")
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, stand_in)
    return count


@pytest.mark.parametrize("how", ["optimize", "optimized"])
@pytest.mark.parametrize(
    "target",
    [
        "diffopt.attention.attached.AttentionLayer",
        "diffopt.attention.shared._buffer",
        "diffopt.unet.fused._lay_out",
        "diffopt.unet.sharing.put_on",
        "diffopt.unet.graphs.put_on",
        "diffopt.unet.schedules.device_reasons",
    ],
)
def test_optimizing_that_fails_leaves_nothing_behind(monkeypatch, target, how):
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])
    pipe = KINDS_OF_PIPELINES["ControlNet"].make(tiny_pipeline())
    before = everything(pipe)
    count = failing(monkeypatch, target)
    handle = diffopt.optimize(pipe)
    total = count.calls
    handle.restore()
    assert everything(pipe) == before
    for at in sorted({1, 2, total // 2, total} & set(range(1, total + 1))):
        count.calls, count.at = 0, at
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            if how == "optimize":
                diffopt.optimize(pipe)
            else:
                with diffopt.optimized(pipe):
                    pytest.fail("it was not optimized")
        assert everything(pipe) == before
        assert pipe.unet not in diffopt.handle._handles
    count.at = 0
    with diffopt.optimized(pipe):
        assert everything(pipe) != before


def test_optimizing_that_fails_keeps_what_was_optimized_before(monkeypatch):
    """Another pipeline's part, which the first has not, is given back; a second `optimize` takes nothing off."""
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])
    pipe = tiny_pipeline()
    other = KINDS_OF_PIPELINES["ControlNet"].make(pipe)
    nothing = everything(other)
    count = failing(monkeypatch, "diffopt.unet.sharing.put_on")
    handle = diffopt.optimize(pipe)
    before = everything(other)
    for user in (other, pipe):
        count.calls, count.at = 0, 2 if user is other else 1  # the UNet's comes first, then the ControlNet's
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            diffopt.optimize(user)
        assert everything(other) == before
        assert handle.active
    handle.restore()
    assert everything(other) == nothing


def test_the_context_leaves_an_optimized_pipeline_optimized(pipe):
    handle = diffopt.optimize(pipe)
    with diffopt.optimized(pipe) as inner:
        assert inner is handle
    assert handle.active
    assert all(is_ours(processor) for processor in processors(pipe))


def test_the_same_arguments_give_the_same_handle_and_others_are_refused(pipe):
    handle = diffopt.optimize(pipe)
    assert diffopt.optimize(pipe) is handle
    with pytest.raises(OptimizeError, match=r"already optimized with attention='auto'; call restore\(\)"):
        diffopt.optimize(pipe, attention="sdpa-math")
    handle.restore()
    assert diffopt.optimize(pipe, attention="sdpa-math") is not handle


def test_pipelines_that_share_a_unet_share_one_counted_handle(pipe):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    handle = diffopt.optimize(pipe)
    assert diffopt.optimize(other) is handle
    assert "shared by 2 pipelines" in handle.report()
    handle.restore()
    assert handle.active
    assert all(is_ours(processor) for processor in processors(pipe))
    handle.restore()
    assert not handle.active
    assert not any(is_ours(processor) for processor in processors(pipe))


def test_a_collected_pipeline_no_longer_counts(pipe):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    handle = diffopt.optimize(pipe)
    diffopt.optimize(other)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    handle.restore()
    assert not handle.active


def test_leaving_the_context_of_a_shared_unet_keeps_the_others_optimized(pipe):
    handle = diffopt.optimize(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with diffopt.optimized(other):
        pass
    assert handle.active


def test_an_optimized_unet_refuses_to_be_pickled(pipe):
    """In words that say what to do; restored it is stock's own again, which can be."""
    handle = diffopt.optimize(pipe)
    picture(pipe, "bundled")
    with pytest.raises(pickle.PicklingError, match=r"handle\.restore\(\) first, or save_pretrained or state_dict"):
        torch.save(pipe.unet, io.BytesIO())
    handle.restore()
    file = io.BytesIO()
    torch.save(pipe.unet, file)
    file.seek(0)
    before, pipe.unet = picture(pipe, "bundled"), torch.load(file, weights_only=False)
    assert same_picture(picture(pipe, "bundled"), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_independent(kind):
    pipe = make_pipeline(kind)
    before = picture(pipe, kind)
    handle = diffopt.optimize(pipe)
    picture(pipe, kind)
    calls = sum(run["calls"] for row in handle.summary()["layers"] for run in row["runs"])
    twin = copy.deepcopy(pipe)
    assert same_picture(picture(twin, kind), before, kind)
    assert sum(run["calls"] for row in handle.summary()["layers"] for run in row["runs"]) == calls

    handle.restore()
    assert not any(is_ours(processor) for processor in processors(pipe))
    assert all(is_ours(processor) for processor in processors(twin))
    twin_handle = diffopt.optimize(twin)
    assert twin_handle is not handle
    assert twin_handle.plan is not handle.plan
    twin_handle.restore()
    assert all(type(processor) is stock.AttnProcessor2_0 for processor in processors(twin))
    assert same_picture(picture(twin, kind), before, kind)


def test_custom_processors_are_kept_and_named(pipe):
    class MyProcessor(stock.AttnProcessor2_0):
        pass

    name, attn = next(iter(attention_modules(pipe.unet).items()))
    mine = MyProcessor()
    attn.set_processor(mine)
    handle = diffopt.optimize(pipe)
    assert attn.processor is mine
    row = next(row for row in handle.summary()["layers"] if row["name"] == name)
    assert not row["optimized"]
    assert "MyProcessor" in row["reasons"][0]
    assert "kept MyProcessor" in handle.report()
    handle.restore()
    assert attn.processor is mine


def test_the_callers_dict_is_not_emptied(pipe):
    mine = dict(pipe.unet.attn_processors)
    diffopt.optimize(pipe)
    assert len(mine) == len(attention_modules(pipe.unet))


def test_a_layer_with_another_scale_is_kept(pipe):
    attn = next(iter(attention_modules(pipe.unet).values()))
    attn.scale = 1.0
    attn.set_processor(stock.AttnProcessor())
    handle = diffopt.optimize(pipe)
    assert type(attn.processor) is stock.AttnProcessor
    assert "its scale is 1" in handle.report()


@pytest.mark.parametrize("processor", [stock.AttnProcessor(), stock.SlicedAttnProcessor(1), stock.AttnProcessor2_0()])
def test_a_scale_that_is_set_later_counts_where_stock_reads_it(pipe, processor):
    """As for larger pictures than a model was trained on. PyTorch's SDPA, diffusers' default, is not told of it."""
    pipe.unet.set_attn_processor(processor)
    plain = picture(pipe, "bundled")
    diffopt.optimize(pipe)
    attns = attention_modules(pipe.unet).values()
    for attn in attns:
        attn.scale *= 1.5
    ours = picture(pipe, "bundled")
    assert all(is_ours(attn.processor) for attn in attns)
    diffopt.optimize(pipe).restore()
    assert distance(ours, picture(pipe, "bundled")) < ROUNDING["bundled"]
    assert (distance(ours, plain) > ROUNDING["bundled"]) == (type(processor) is not stock.AttnProcessor2_0)


@pytest.mark.parametrize(
    "replace",
    [
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
        lambda pipe: pipe.unet.set_attn_processor(stock.AttnProcessor()),
    ],
    ids=["slicing", "fused projections", "set_attn_processor"],
)
def test_what_diffusers_replaced_is_reported_and_put_back(pipe, replace):
    before = picture(pipe, "bundled")
    handle = diffopt.optimize(pipe)
    replace(pipe)
    assert not any(is_ours(processor) for processor in processors(pipe))
    assert "diffusers replaced diffopt's processor" in handle.report()
    replaced = processors(pipe)
    assert diffopt.optimize(pipe) is handle
    assert all(is_ours(processor) for processor in processors(pipe))
    assert distance(picture(pipe, "bundled"), before) < (1e-3 if pipe.device.type == "cpu" else ROUNDING["bundled"])
    handle.restore()
    assert all(now is then for now, then in zip(processors(pipe), replaced, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_our_processors_set_by_hand_are_told_and_taken_in(pipe, fused):
    """Kept in a variable while optimized, and set again on a UNet that no longer is."""
    if fused:
        pipe.unet.fuse_qkv_projections()
    before = picture(pipe, "bundled")
    former = [type(processor) for processor in processors(pipe)]
    handle = diffopt.optimize(pipe)
    ours = pipe.unet.attn_processors
    handle.restore()
    pipe.unet.set_attn_processor(ours)
    assert "set by hand and runs PyTorch's SDPA; optimize() again takes it in" in handle.report()
    handle = diffopt.optimize(pipe)
    assert distance(picture(pipe, "bundled"), before) < (1e-3 if pipe.device.type == "cpu" else ROUNDING["bundled"])
    assert all(row["optimized"] and row["runs"] for row in handle.summary()["layers"])
    handle.restore()
    assert [type(processor) for processor in processors(pipe)] == former


def test_a_users_own_subclass_of_our_processor_is_kept(pipe):
    class Louder(DiffoptAttnProcessor):
        pass

    pipe.unet.set_attn_processor(Louder())
    diffopt.optimize(pipe)
    assert all(type(processor) is Louder for processor in processors(pipe))


def test_fused_projections_are_used_and_left_when_unfused(pipe):
    before = picture(pipe, "bundled")
    former = processors(pipe)
    handle = diffopt.optimize(pipe)
    pipe.unet.fuse_qkv_projections()
    diffopt.optimize(pipe)
    assert all(type(processor) is DiffoptFusedAttnProcessor for processor in processors(pipe))
    for attn in attention_modules(pipe.unet).values():  # proves that the fused weights are what is used
        for name in ("to_k", "to_v"):
            getattr(attn, name).weight.data.zero_()
    assert distance(picture(pipe, "bundled"), before) < (1e-3 if pipe.device.type == "cpu" else ROUNDING["bundled"])
    pipe.unet.unfuse_qkv_projections()
    assert all(type(processor) is DiffoptAttnProcessor for processor in processors(pipe))
    assert distance(picture(pipe, "bundled"), before) > 0.1
    handle.restore()
    assert all(now is then for now, then in zip(processors(pipe), former, strict=True))


def test_unknown_backend_lists_the_known_ones(pipe):
    with pytest.raises(InputError, match="attention: 'flash' is not possible; known: auto, diffopt, sdpa, sdpa-flash"):
        diffopt.optimize(pipe, attention="flash")
    assert not any(is_ours(processor) for processor in processors(pipe))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("attention", None, "known: auto, diffopt, sdpa, "),
        ("attention", 3, "known: auto, diffopt, sdpa, "),
        ("plan", 3, "allowed: a Plan, the path of a saved one, or None"),
        ("plan", {}, "allowed: a Plan, the path of a saved one, or None"),
        ("capture", "yes", "allowed: True, False or None"),
        ("capture", 0, "allowed: True, False or None"),
        ("decode", 16, "known: stock, float16"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused_in_one_line(pipe, field, value, allowed):
    for optimize in (diffopt.optimize, lambda pipe, **options: diffopt.optimized(pipe, **options).__enter__()):
        with pytest.raises(InputError, match=re.escape(f"{field}: {value!r} is not possible; {allowed}")) as caught:
            optimize(pipe, **{field: value})
        assert "\n" not in str(caught.value)
    assert not any(is_ours(processor) for processor in processors(pipe))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize("name", ["sdpa-cudnn", "sdpa-efficient", "xformers"])
def test_a_forced_backend_that_cannot_serve_lists_every_reason(pipe, name):
    with pytest.raises(BackendError) as caught:
        diffopt.optimize(pipe, attention=name)
    assert f"{name} can't serve: " in str(caught.value)
    assert "needs a CUDA GPU, the pipeline is on cpu" in str(caught.value)
    assert "these can: " in str(caught.value)
    if name == "xformers":
        assert "xFormers isn't installed" in str(caught.value)
    assert not any(is_ours(processor) for processor in processors(pipe))


@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_each_backend_that_works_here_makes_the_same_picture(pipe, name):
    reasons = backends.BACKENDS[name].device_reasons(pipe.device)
    if reasons or (name == "diffopt" and pipe.device.type == "cpu"):
        pytest.skip(f"{name}: {', '.join(reasons) or 'the interpreter takes minutes'}")
    before = picture(pipe, "bundled")
    with diffopt.optimized(pipe, attention=name) as handle:
        after = picture(pipe, "bundled")
        used = {run["backend"] for row in handle.summary()["layers"] for run in row["runs"]}
    assert used == {name}
    assert distance(after, before) < (1e-4 if pipe.device.type == "cpu" else 0.03)


@pytest.mark.gpu
def test_a_forced_backend_never_falls_back_in_a_call(pipe):
    handle = diffopt.optimize(pipe, attention="diffopt")
    with torch.enable_grad(), pytest.raises(BackendError, match="requires_grad is True"):
        pipe.unet(
            torch.randn(2, 4, 32, 32, device=pipe.device, dtype=pipe.dtype, requires_grad=True),
            1,
            torch.randn(2, 77, 256, device=pipe.device, dtype=pipe.dtype),
        )
    handle.restore()


def test_auto_counts_masked_calls_and_honours_the_mask(pipe):
    handle = diffopt.optimize(pipe)
    unet = pipe.unet
    parameter = next(unet.parameters())
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 32, 32, generator=generator).to(parameter)
    context = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator).to(parameter)
    mask = torch.ones(2, 77, device=parameter.device)
    mask[:, 40:] = 0
    with torch.no_grad():
        out = unet(sample, 1, context, encoder_attention_mask=mask).sample
    cross = [row for row in handle.summary()["layers"] if row["kind"] == "cross"]
    assert {run["backend"] for row in cross for run in row["runs"]} == {backends.auto_order(pipe.device)[0].name}
    assert all("masked" in run["shape"] for row in cross for run in row["runs"])
    handle.restore()
    with torch.no_grad():
        stock_out = unet(sample, 1, context, encoder_attention_mask=mask).sample
        unmasked = unet(sample, 1, context).sample
    assert distance(out, stock_out) < 1e-2
    assert distance(out, unmasked) > 1e-3


def test_the_report_says_that_diffusers_attention_backend_has_no_effect(pipe):
    handle = diffopt.optimize(pipe)
    assert "has no effect" not in handle.report()
    pipe.unet.set_attention_backend("_native_math")
    try:
        assert "'_native_math', which has no effect on this UNet" in handle.report()
    finally:
        pipe.unet.set_attention_backend("native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_on_a_cpu_the_report_says_why_sdpa_runs(pipe):
    assert "needs a CUDA GPU, the pipeline is on cpu; PyTorch's SDPA runs" in diffopt.optimize(pipe).report()


def test_a_pipeline_without_a_unet_is_refused():
    with pytest.raises(OptimizeError, match="object has no UNet"):
        diffopt.optimize(object())
    with pytest.raises(OptimizeError, match="object has no UNet"), diffopt.optimized(object()):
        pass


def test_saving_is_unaffected(pipe, tmp_path):
    diffopt.optimize(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, dtype=pipe.dtype, local_files_only=True)
    for (name, mine), theirs in zip(pipe.unet.state_dict().items(), again.unet.state_dict().values(), strict=True):
        assert torch.equal(mine.cpu(), theirs), name


def test_a_compiled_unet_stays_the_same_and_does_not_recompile(pipe):
    before = picture(pipe, "bundled")
    handle = diffopt.optimize(pipe)
    compiled = []

    def count(graph, inputs):
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend=count)
    try:
        first = picture(pipe, "bundled", steps=2)
        graphs = len(compiled)
        picture(pipe, "bundled", steps=12)
        assert len(compiled) == graphs
    finally:
        torch._dynamo.reset()
    assert distance(first, before) < (1e-4 if first.device.type == "cpu" else 0.03)
    assert sum(run["calls"] for row in handle.summary()["layers"] for run in row["runs"]) == 0


def test_a_unet_that_was_compiled_before_is_optimized_inside():
    """What was compiled traces the UNet in it, so that one gets all we put on, and is left without it."""
    pipe, small = tiny_pipeline(), {"width": 16, "height": 16}
    before, inside = picture(pipe, "bundled", **small), pipe.unet
    names = {name: set(module.__dict__) for name, module in inside.named_modules()}
    torch._dynamo.reset()
    pipe.unet = compiled = torch.compile(inside, backend="eager")
    try:
        handle = diffopt.optimize(pipe)
        with diffopt.optimized(pipe) as again:
            assert again is handle
        assert pipe.unet is compiled
        assert all(is_ours(attn.processor) for attn in attention_modules(inside).values())
        assert "_orig_mod" not in handle.report()
        assert "not captured" not in handle.report()
        assert distance(picture(pipe, "bundled", **small), before) < 1e-4
        handle.restore()
        found = {name: set(module.__dict__) for name, module in inside.named_modules()}
        assert not {name: more for name in names if (more := found[name] - names[name] - {"_is_torch_compile"})}
    finally:
        torch._dynamo.reset()


def test_another_unet_put_into_the_pipeline_is_told(pipe):
    handle = diffopt.optimize(pipe)
    note = "StableDiffusionPipeline has another UNet now; optimize() again optimizes that one"
    assert note not in handle.report()
    former, pipe.unet = pipe.unet, copy.deepcopy(pipe.unet)
    assert note in handle.report()
    other = diffopt.optimize(pipe)
    assert other is not handle
    assert note not in other.report()
    other.restore()
    assert not any(is_ours(processor) for processor in processors(pipe))
    handle.restore()
    assert not any(is_ours(attn.processor) for attn in attention_modules(former).values())


def test_optimizing_again_follows_a_pipeline_that_was_moved(pipe, monkeypatch):
    handle = diffopt.optimize(pipe)
    picture(pipe, "bundled")
    assert handle.plan.choices
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("meta"))
    assert diffopt.optimize(pipe) is handle
    report = handle.report()
    assert "attention: auto on meta" in report
    assert "blocks are not fused: needs a CUDA GPU, the pipeline is on meta" in report
    assert not handle.plan.choices, "they were made for another device"


def test_where_offloaded_weights_will_run_decides(pipe, monkeypatch):
    """With offloading the weights wait on the CPU; diffusers knows where they will run."""
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("meta"))
    with pytest.raises(BackendError, match="needs a CUDA GPU, the pipeline is on meta"):
        diffopt.optimize(pipe, attention="sdpa-cudnn")


@pytest.mark.gpu
def test_model_offload_keeps_working(pipe):
    before = picture(pipe, "bundled")
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    handle = diffopt.optimize(pipe)
    assert same_picture(picture(pipe, "bundled"), before)
    served = {run["backend"] for row in handle.summary()["layers"] for run in row["runs"]}
    assert served <= {"diffopt", "sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient"}
    assert served


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Tuning(), "tuned: no: launches are guessed and auto is not measured (run: diffopt tune)"),
        (
            Tuning(refused=("x.toml is not used: it is for another GPU",)),
            "(run: diffopt tune); x.toml is not used: it is for another GPU",
        ),
    ],
)
def test_the_report_says_whether_the_gpu_is_tuned(pipe, monkeypatch, found, words):
    handle = diffopt.optimize(pipe)
    if pipe.device.type == "cpu":
        assert "tuned" not in handle.report()
    monkeypatch.setattr("diffopt.handle.use_tuned", lambda device: found)
    monkeypatch.setattr(handle, "_device", torch.device("cuda", 0))
    assert words in handle.report()


def test_a_profile_of_a_unet_call_is_in_the_report_beside_the_floor(pipe, monkeypatch):
    def kernels(run, device):
        run()
        return [("nvjet_hsh", 600.0), ("attention_hopper_kernel", 300.0)] * FORWARDS

    stock = make_pipeline("bundled")
    (call, *_), _ = record_unet_calls(stock.unet, lambda: picture(stock, "bundled"))
    with FlopCounterMode(display=False) as counter, using_stock("sdpa-math"):  # a CPU's flash attention isn't counted
        call.run(stock.unet)

    handle = diffopt.optimize(pipe)
    monkeypatch.setattr(diffopt.handle, "profile_forward", functools.partial(profile_forward, kernels=kernels))
    monkeypatch.setattr(diffopt.measure.profile, "find_gpu", lambda _: find_gpu("NVIDIA H200"))
    assert handle.summary()["profile"] is None
    found = handle.profile(lambda: picture(pipe, "bundled"))
    assert found is not None
    assert found == handle.summary()["profile"]
    assert (found["microseconds"]["matmul"], found["total_us"], found["launches"], found["why"]) == (600, 900, 2, "")
    assert found["flops"] == counter.get_total_flops() > 0
    peak = 989.0 if pipe.unet.dtype == torch.float16 else 67.0  # TFLOP/s
    assert found["floor_us"] == pytest.approx(found["flops"] / peak / 1e6)
    spent = "a UNet forward's 900 µs of GPU time: attention 300 (33%), matmul 600 (67%); 2 launches; floor"
    assert spent in handle.report()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels to sort")
def test_a_profile_wants_a_gpu_and_a_call_of_the_unet(pipe):
    handle = diffopt.optimize(pipe)
    with pytest.raises(OptimizeError, match="makes no call of the UNet"):
        handle.profile(lambda: None)
    assert handle.profile(lambda: picture(pipe, "bundled")) is None
    handle.restore()
    with pytest.raises(OptimizeError, match="restored"):
        handle.profile(lambda: picture(pipe, "bundled"))


@pytest.mark.gpu
def test_a_profile_sees_kernels_of_attention_and_convolutions(pipe):
    handle = diffopt.optimize(pipe)
    found = handle.profile(lambda: picture(pipe, "bundled"))
    assert found is not None
    assert found["why"] == ""
    assert min(found["microseconds"][kind] for kind in ("attention", "convolution", "matmul", "norm")) > 0
    assert handle.report().count("a UNet forward's") == 1
