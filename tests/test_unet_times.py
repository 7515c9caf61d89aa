"""Time embeddings of many timesteps at once: the same bits, and made anew whenever they may be others.

As in the tests of prologues, `Tape` stands in for CUDA graphs and the reference runs uncaptured; where calls in Python
are counted, `Recorder` does. Schedulers are told to models as on a GPU.
"""

import copy
import gc
import weakref

import diffusers
import pytest
import torch
from adapters import random_lora
from pipeline_kinds import latents, xl_pipeline
from pipelines import distance, picture
from recorders import Recorder, norms_without_kernels, products_row_by_row
from scheduler_params import KINDS
from tiny_model import one_thread, tiny_pipeline  # noqa: F401
from twins import SIDE, Twins, at_step, call, optimized, prompt

import diffopt
from diffopt.unet import apart, fused, graphs, provenance, schedules, times

XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 16,
}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Handles take the CPU for a GPU, as far as schedulers go."""
    monkeypatch.setattr(schedules, "device_reasons", lambda device: [])


STAGES = (fused.NORMS, fused.SHARED)  # only fused resnets read the shifts


@pytest.fixture
def twins(monkeypatch):
    return scheduled(monkeypatch)


def scheduled(monkeypatch, kind: type = diffusers.DDIMScheduler, **unet_options) -> Twins:
    """With fused resnets and schedulers of a class, told to the UNets."""
    norms_without_kernels(monkeypatch)
    twins = Twins(monkeypatch, STAGES, **unet_options)
    schedule(twins, kind)
    return twins


def schedule(twins: Twins, kind: type) -> None:
    for pipe in twins.both:
        pipe.scheduler = kind.from_config({**pipe.scheduler.config, "skip_prk_steps": True})
        diffopt.optimize(pipe).keep_timesteps(pipe)


def calls_of(model) -> graphs.CapturedCalls:
    return getattr(model, graphs.ATTRIBUTE)


def table_of(model) -> times.TimeTable:
    (table,) = {bucket.table for bucket in calls_of(model).buckets}
    assert table is not None
    return table


def embedded(monkeypatch, kind: type = times.TimestepEmbedding) -> list[int]:
    """Grows by the number of timesteps with each time embedding from now on."""
    found: list[int] = []
    stock = kind.forward

    def counted(self, sample, *rest):
        found.append(len(sample))
        return stock(self, sample, *rest)

    monkeypatch.setattr(kind, "forward", counted)
    return found


def shifts_made(monkeypatch, unet) -> list[int]:
    """Grows by the number of rows with each product for resnets, of one or of all of them, from now on."""
    linears = [module.time_emb_proj for module in unet.modules() if getattr(module, "time_emb_proj", None) is not None]
    addresses = {linear.weight.data_ptr() for linear in linears}
    found: list[int] = []
    stock = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        if weight.data_ptr() in addresses:
            found.append(x[..., 0].numel())
        return stock(x, weight, bias)

    monkeypatch.setattr("torch.nn.functional.linear", counted)
    return found


# --- once per run ---------------------------------------------------------------------------------------------------


def test_once_per_run_and_the_same_bits(monkeypatch):
    twins = scheduled(monkeypatch, recorder=Recorder())
    twins.same_picture()
    assert twins.tables == 1
    twins.same_picture()
    assert twins.tables == 2, "a new run may have other weights"
    found, shifts = embedded(monkeypatch), shifts_made(monkeypatch, twins.captured.unet)
    waves = embedded(monkeypatch, times.Timesteps)
    picture(twins.captured, "bundled", steps=6, **SIDE)
    assert found == shifts == waves == [times.AT_ONCE], "no step makes its own"
    assert twins.tables == 3
    assert "captured apart: time embeddings, 3 replays" in twins.handle.report()


def test_in_steps_they_are_made_at_each(monkeypatch):
    """What the count above would be otherwise."""
    twins = scheduled(monkeypatch, recorder=Recorder())
    monkeypatch.setattr(apart, "replaced", lambda *_: ())
    picture(twins.captured, "bundled", steps=2, **SIDE)
    found, shifts = embedded(monkeypatch), shifts_made(monkeypatch, twins.captured.unet)
    picture(twins.captured, "bundled", steps=6, **SIDE)
    assert found == shifts == [2] * 6
    assert "time embeddings, " not in twins.handle.report()
    assert twins.tables == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_scheduler_whose_timesteps_stay_on_the_cpu(monkeypatch, kind):
    """A timestep that comes twice may begin a run: once for PNDM, at every other step for Heun."""
    twins = scheduled(monkeypatch, kind)
    twins.same_picture()
    assert twins.tables == {diffusers.PNDMScheduler: 2, diffusers.HeunDiscreteScheduler: 4}.get(kind, 1)


def test_more_steps_than_rows(twins):
    twins.same_picture(steps=times.AT_ONCE + 3)
    assert twins.tables == 2


def test_the_tail_of_a_schedule(twins):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def drawn(pipe):
        pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        return latents(pipe, image=image, strength=0.6, steps=8)

    twins.same(drawn)
    assert twins.tables == 1


def test_another_number_of_steps(twins):
    for runs, steps in enumerate((3, 7, 4), 1):
        twins.same_picture(steps=steps)
        assert twins.tables == runs


def test_pictures_of_one_kind_share_rows_and_others_have_their_own(twins):
    contexts = [prompt(0, batch) for batch in (2, 3)]
    for timestep in (900, 800):
        for side in (8, 4):
            for context in contexts:
                twins.same(lambda pipe, t=timestep, s=side, x=context: call(pipe, x, t - s, s))
    tables = {bucket.table for bucket in calls_of(twins.captured.unet).buckets}
    assert len(tables) == 2
    assert all(len(table._rows[0]) == 1 for table in tables), "one row for all pictures of a call"


def test_without_guidance(twins):
    twins.same(lambda pipe: latents(pipe, guidance_scale=1.0, **SIDE))
    assert twins.tables == 1


# --- timesteps that no schedule has ---------------------------------------------------------------------------------

LOOP = (900, 899.5, 731, 300.25, 300, 2, 0)


def test_a_loop_of_the_users_own(twins):
    context = prompt()
    for timestep in LOOP:
        twins.same(lambda pipe, t=timestep: call(pipe, context, t))
    assert twins.tables == len(LOOP)


@pytest.mark.parametrize("kind", [lambda t: torch.tensor(t), lambda t: torch.tensor([t]), float, int])
def test_timesteps_of_any_type(twins, kind):
    context = prompt()
    twins.captured.scheduler.set_timesteps(10)
    for timestep in twins.captured.scheduler.timesteps.tolist():
        twins.same(lambda pipe, t=timestep: call(pipe, context, kind(t)))
    assert twins.tables == 1


def test_a_scheduler_that_nobody_told_of(twins):
    for pipe in twins.both:
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    twins.same_picture()
    assert twins.tables == 4


def test_timesteps_that_cannot_be_seen(twins, monkeypatch):
    """They are on a GPU."""
    for module in (provenance, times):
        monkeypatch.setattr(module, "number_of", lambda timestep: None)
    context = prompt()
    for timestep in (900, 700, 500):
        twins.same(lambda pipe, t=timestep: call(pipe, context, torch.tensor(t)))
    assert twins.tables == 3


def test_one_timestep_for_each_picture_is_embedded_in_the_step(twins):
    context = prompt()
    for step in range(3):
        twins.same(lambda pipe, t=step: call(pipe, context, torch.tensor([90, 7]) - t))
    assert twins.tables == 0
    assert not twins.handle.summary()["step"]["uncaptured"]


def test_bits_do_not_depend_on_what_came_before(twins):
    """Rows of a list and rows of a timestep alone come of products of one size."""
    context = prompt()
    listed = twins.captured.scheduler
    listed.set_timesteps(10)
    timesteps = listed.timesteps.tolist()
    first = [call(twins.captured, context, t) for t in timesteps]
    backwards = [call(twins.captured, context, t) for t in reversed(timesteps)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(backwards), strict=True))
    assert twins.tables == 1 + 10


def test_rows_are_always_as_many(twins, monkeypatch):
    seen = embedded(monkeypatch)
    twins.captured.scheduler.set_timesteps(times.AT_ONCE + 8)
    for timestep in (*twins.captured.scheduler.timesteps.tolist(), 3.5):
        call(twins.captured, prompt(), timestep)
    assert set(seen) == {times.AT_ONCE}


def test_pipelines_with_other_schedules_share_a_unet(twins):
    others = []
    for pipe in twins.both:
        scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        others.append(type(pipe)(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False))
        others[-1].set_progress_bar_config(disable=True)
        assert diffopt.optimize(others[-1]) is diffopt.optimize(pipe)
    twins.same_picture(steps=5)
    assert twins.tables == 1, "the other one, told last, has not been used: its list is that of all timesteps"
    for steps in (5, 6):
        ours, expected = (picture(pipe, "bundled", steps=steps, **SIDE) for pipe in others)
        assert torch.equal(ours, expected)
        twins.same_picture(steps=steps)
    assert twins.tables <= 1 + 2 * (2 + 2)
    calls = calls_of(twins.captured.unet)
    gc.collect()
    assert len(calls._apart.schedulers) == 2
    del others, pipe, scheduler
    gc.collect()
    assert len(calls._apart.schedulers) == 1, "schedulers are not kept alive"


def test_prompts_take_turns(twins):
    a, b = prompt(1), prompt(2)
    for timestep in (900, 700, 500):
        outputs = [twins.same(lambda pipe, x=x, t=timestep: call(pipe, x, t)) for x in (a, b)]
        assert not torch.equal(*outputs)


def test_threads_take_turns(twins):
    twins.captured.scheduler.set_timesteps(20)
    twins.take_turns(twins.captured.scheduler.timesteps.tolist())


# --- other weights --------------------------------------------------------------------------------------------------


def resnet(pipe):
    return pipe.unet.mid_block.resnets[0]


def first_layer(pipe, kwargs):
    pipe.unet.time_embedding.linear_1.weight.mul_(-1)


def last_bias(pipe, kwargs):
    pipe.unet.time_embedding.linear_2.bias.add_(3)


def projection(pipe, kwargs):
    resnet(pipe).time_emb_proj.weight.mul_(-1)


def in_inference_mode(pipe, kwargs):
    with torch.inference_mode():
        first_layer(pipe, kwargs)


def loaded(pipe, kwargs):
    pipe.unet.load_state_dict({name: -value for name, value in pipe.unet.state_dict().items()})


def other_memory(pipe, kwargs):
    pipe.unet.time_embedding.linear_1.weight.data = -pipe.unet.time_embedding.linear_1.weight


def other_parameter(pipe, kwargs):
    weight = torch.nn.Parameter(-resnet(pipe).time_emb_proj.weight, requires_grad=False)
    resnet(pipe).time_emb_proj.weight = weight


def other_layer(pipe, kwargs):
    pipe.unet.time_embedding = copy.deepcopy(pipe.unet.time_embedding)
    first_layer(pipe, kwargs)


def a_hook(pipe, kwargs):
    pipe.unet.time_embedding.register_forward_hook(lambda module, inputs, output: -output)


def a_setting(pipe, kwargs):
    pipe.unet.time_proj = diffusers.models.embeddings.Timesteps(16, False, 0)


def a_method(pipe, kwargs):
    stock = pipe.unet.get_time_embed
    pipe.unet.get_time_embed = lambda **keywords: -stock(**keywords)


def moved(pipe, kwargs):
    pipe.unet.to(torch.float64).to(torch.float32)
    projection(pipe, kwargs)


IN_PLACE = [first_layer, last_bias, projection, in_inference_mode, loaded]
CHANGES = [*IN_PLACE, other_memory, other_parameter, other_layer, a_hook, moved]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_in_mid_run_show_at_once(twins, change):
    plain = twins.same_picture()
    assert not torch.equal(twins.same_picture(**at_step(1, change)), plain)
    twins.same_picture()


@pytest.mark.parametrize("change", [*CHANGES, a_setting, a_method])
def test_weights_changed_between_runs(twins, change):
    plain = twins.same_picture()
    for pipe in twins.both:
        with torch.no_grad():
            change(pipe, {})
    assert not torch.equal(twins.same_picture(), plain)


@pytest.mark.parametrize("change", IN_PLACE)
def test_changes_in_place_need_no_other_graph(twins, change):
    twins.same_picture()
    twins.same_picture(**at_step(1, change))
    assert twins.tables == 1 + 2
    assert twins.recorder.captures == 3


@pytest.mark.parametrize(("first", "second"), [((900, 500), (900, 500)), ((5,), (5,)), ((9.5,), (10,))])
def test_a_new_run_with_weights_that_nothing_tells_of(twins, first, second):
    context = prompt()
    for timesteps in (first, second):
        for timestep in timesteps:
            twins.same(lambda pipe, t=timestep: call(pipe, context, t))
        for pipe in twins.both:
            pipe.unet.time_embedding.linear_1.weight.data.mul_(-1)


def test_what_nothing_tells_of_shows_from_the_next_run_on(twins):
    """The limit, as for the prompt's keys and values: within a run it shows after `expire`."""
    context = prompt()
    twins.captured.scheduler.set_timesteps(5)
    first, second, third, *_ = twins.captured.scheduler.timesteps.tolist()
    twins.same(lambda pipe: call(pipe, context, first))
    for pipe in twins.both:
        pipe.unet.time_embedding.linear_1.weight.data.mul_(-1)
    assert not torch.equal(*(call(pipe, context, second) for pipe in twins.both))
    assert twins.tables == 1
    calls_of(twins.captured.unet).expire()
    twins.same(lambda pipe: call(pipe, context, third))
    assert twins.tables == 2


LORA = {"time_embedding.linear_1": "time_embedding", "mid_block.resnets.0.time_emb_proj": "a projection"}


def time_lora(unet, name: str) -> dict[str, torch.Tensor]:
    linear = unet.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    return {
        f"unet.{name}.lora_A.weight": torch.randn(2, linear.in_features, generator=generator),
        f"unet.{name}.lora_B.weight": torch.randn(linear.out_features, 2, generator=generator) * 0.3,
    }


@pytest.mark.parametrize("name", LORA, ids=LORA.get)
def test_an_adapter_is_computed_in_the_step(twins, name):
    plain = twins.same_picture()
    for pipe in twins.both:
        pipe.load_lora_weights(time_lora(pipe.unet, name), adapter_name="one")
    assert not torch.equal(twins.same_picture(), plain)
    assert twins.tables == 1
    twins.same_picture(**at_step(1, lambda pipe, kwargs: pipe.set_adapters(["one"], [0.3])))
    for pipe in twins.both:
        pipe.unload_lora_weights()
    assert torch.equal(twins.same_picture(), plain)
    assert twins.tables == 2


def test_an_adapter_of_other_layers_leaves_them_apart(twins):
    for pipe in twins.both:
        pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one")
    twins.same_picture()
    assert twins.tables == 1


@pytest.mark.parametrize("name", LORA, ids=LORA.get)
def test_an_adapter_fused_for_good_between_two_steps(twins, name):
    def change(pipe, kwargs):
        weight = pipe.unet.get_submodule(name).weight
        before = id(weight), weight._version, weight.data_ptr()
        pipe.load_lora_weights(time_lora(pipe.unet, name), adapter_name="one")
        pipe.fuse_lora(components=["unet"])
        pipe.unload_lora_weights()
        weight = pipe.unet.get_submodule(name).weight
        assert (id(weight), weight._version, weight.data_ptr()) == before, "it would leave a trace"

    plain = twins.same_picture()
    assert not torch.equal(twins.same_picture(**at_step(1, change)), plain)


# --- added conditions -----------------------------------------------------------------------------------------------


class XLTwins(Twins):
    """SDXL's UNet: what its conditions are and how a step is called."""

    def __init__(self, monkeypatch, recorder: Recorder | None = None):
        norms_without_kernels(monkeypatch)
        super().__init__(monkeypatch, STAGES, recorder, **XL)
        schedule(self, diffusers.DDIMScheduler)
        generator = torch.Generator().manual_seed(5)
        text, ids = torch.randn(2, 16, generator=generator), torch.randint(1, 99, (2, 6), generator=generator).float()
        self.added = {pipe: {"text_embeds": text.clone(), "time_ids": ids.clone()} for pipe in self.both}
        self.context = prompt()
        self.captured.scheduler.set_timesteps(6)
        self.timesteps = self.captured.scheduler.timesteps.tolist()

    def step(self, number: int) -> torch.Tensor:
        def work(pipe):
            return call(pipe, self.context, self.timesteps[number], added_cond_kwargs=dict(self.added[pipe]))

        return self.same(work)

    def change(self, how) -> None:
        for pipe in self.both:
            how(self.added[pipe])


@pytest.fixture
def xl(monkeypatch):
    return XLTwins(monkeypatch)


def test_added_conditions_are_part_of_it(monkeypatch):
    xl = XLTwins(monkeypatch, Recorder())
    xl.step(0)
    found = embedded(monkeypatch)
    outputs = [call(xl.captured, xl.context, t, added_cond_kwargs=xl.added[xl.captured]) for t in xl.timesteps]
    assert found == [times.AT_ONCE, 2], "timesteps and pictures, each once"
    assert not torch.equal(outputs[0], outputs[1])
    assert xl.tables == 2


def negated(added):
    added["text_embeds"].mul_(-1)


def a_view(added):
    added["time_ids"][1, 2:4].add_(7)


def replaced_by_others(added):
    added["time_ids"] = added["time_ids"] + 3


def replaced_by_equals(added):
    added["text_embeds"] = added["text_embeds"].clone()


def other_memory_of_conditions(added):
    added["text_embeds"].data = -added["text_embeds"]


@pytest.mark.parametrize("how", [negated, a_view, replaced_by_others, replaced_by_equals, other_memory_of_conditions])
def test_added_conditions_changed_in_mid_run(xl, how):
    for step in range(2):
        xl.step(step)
    before = xl.step(2)
    xl.change(how)
    xl.step(3)
    xl.step(4)
    assert xl.tables == 2
    again = xl.step(2)
    assert torch.equal(again, before) == (how is replaced_by_equals)


def test_conditions_that_nothing_tells_of_show_in_the_next_run(xl):
    xl.step(0)
    xl.step(1)
    xl.change(lambda added: added["text_embeds"].data.mul_(-1))
    xl.step(0)


def test_weights_of_the_added_embedding(xl):
    xl.step(0)
    with torch.no_grad():
        for pipe in xl.both:
            pipe.unet.add_embedding.linear_1.weight.mul_(-1)
    xl.step(1)
    assert xl.tables == 2


def test_conditions_of_inference_mode_are_made_anew_at_each_step(xl):
    with torch.inference_mode():
        xl.added = {pipe: {name: x.clone() for name, x in added.items()} for pipe, added in xl.added.items()}
        for step in range(3):
            xl.step(step)
            xl.change(negated)
    assert xl.tables == 3


def test_sdxl_and_its_controlnet(monkeypatch):
    """Whole pictures, each model with rows of its own."""
    products_row_by_row(monkeypatch)
    norms_without_kernels(monkeypatch)
    monkeypatch.setattr("diffopt.handle.CudaCapturer", Recorder)
    pipe, options = xl_pipeline(torch.device("cpu"))
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    models = pipe.unet, pipe.controlnet

    def shared():
        for model in models:
            fused.put_on(model, frozenset(STAGES))

    shared()
    expected = latents(pipe, **options)
    handle = diffopt.optimize(pipe)
    shared()
    assert torch.equal(latents(pipe, **options), expected)
    found = embedded(monkeypatch)
    assert torch.equal(latents(pipe, **options), expected)
    assert found == 2 * [times.AT_ONCE, 2]
    assert [calls_of(model).tables for model in models] == [2, 2]
    assert "controlnet: captured apart: time embeddings, 2 replays" in handle.report()


# --- models that are left alone -------------------------------------------------------------------------------------

OTHERS = [
    ({"time_embedding_act_fn": "silu"}, {}),
    ({"class_embed_type": "timestep"}, {"class_labels": torch.tensor([3, 4])}),
    ({"time_cond_proj_dim": 8}, {"timestep_cond": torch.ones(2, 8)}),
    ({"time_embedding_type": "fourier"}, {}),
    ({"timestep_post_act": "silu", "act_fn": "gelu"}, {}),
    ({"addition_embed_type": "text", "encoder_hid_dim": 16, "addition_embed_type_num_heads": 2}, {}),
]


@pytest.mark.parametrize(("options", "keywords"), OTHERS, ids=lambda x: next(iter(x), ""))
def test_models_with_more_in_their_embeddings_make_them_in_the_step(monkeypatch, options, keywords):
    twins = scheduled(monkeypatch, **options)
    context = prompt()
    for timestep in (900, 800, 700):
        twins.same(lambda pipe, t=timestep: call(pipe, context, t, **keywords))
    assert twins.tables == 0
    assert not twins.handle.summary()["step"]["uncaptured"]


def test_resnets_of_another_kind_read_the_embedding_itself(monkeypatch):
    """They have no share in the product of the others."""
    twins = scheduled(monkeypatch)
    for pipe in twins.both:
        resnet(pipe).skip_time_act = True
        fused.sharing.take_off(pipe.unet)
        fused.put_on(pipe.unet, frozenset((fused.SHARED,)))
    twins.same_picture()
    assert twins.tables == 1


def test_where_nothing_is_shared_nothing_is_computed_apart(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("diffopt.handle.CudaCapturer", lambda: recorder)
    pipe = tiny_pipeline()
    diffopt.optimize(pipe)
    call(pipe, prompt())
    assert recorder.captures == 1
    assert calls_of(pipe.unet).tables == 0


# --- what is captured -----------------------------------------------------------------------------------------------


def test_the_model_itself_is_left_alone(twins, monkeypatch):
    """Another thread may run it, uncaptured, in the middle of a capture."""
    context = prompt()
    expected = call(twins.reference, context, 500)
    before = dict(twins.captured.unet._modules)
    seen = []

    def capture(work, device):
        def more():
            assert twins.captured.unet._modules == before
            seen.append(type(twins.captured.unet).forward(twins.captured.unet, *sample, return_dict=False)[0])
            return work()

        return Recorder().capture(more, device)

    sample = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), 500, context)
    monkeypatch.setattr(twins.recorder, "capture", capture)
    assert torch.equal(call(twins.captured, context, 700), call(twins.reference, context, 700))
    assert not twins.handle.summary()["step"]["uncaptured"]
    assert twins.captured.unet._modules == before
    assert all(torch.equal(x, expected) for x in seen)


def test_the_first_run_has_values_that_make_sense(monkeypatch):
    """What is recorded does not run before it is played back."""

    class Unrun(Recorder):
        def capture(self, work, device):
            play_back, output = super().capture(work, device)
            if isinstance(output, torch.Tensor):
                output.fill_(torch.nan)
            return play_back, output

    stock = torch.nn.Conv2d.forward

    def checked(self, x):
        assert x.isfinite().all()
        return stock(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", checked)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    pipe = tiny_pipeline()
    pipe.unet.requires_grad_(False)
    handle = optimized(monkeypatch, pipe, Unrun())
    call(pipe, prompt(), 900)
    step = handle.summary()["step"]
    assert (step["captures"], step["uncaptured"]) == (1, [])


def test_blocks_on_the_step_kernels(monkeypatch):
    """The shifts are rows of another layout there; kernels are interpreted, which no tape can play back."""
    twins = Twins(monkeypatch, recorder=Recorder(), norm_num_groups=2)
    for pipe in twins.both:
        fused.put_on(pipe.unet)
    context = prompt()
    ours, expected = (call(pipe, context, 40, 4) for pipe in twins.both)
    assert distance(ours, expected) < 1e-6
    assert twins.tables == 1


# --- the way there and back -----------------------------------------------------------------------------------------


def test_a_deep_copy_computes_its_own(twins):
    plain = twins.same_picture()
    twin = copy.deepcopy(twins.captured)
    twin.unet.time_embedding.linear_1.weight.data.zero_()
    assert torch.equal(twins.same_picture(), plain)
    assert not torch.equal(picture(twin, "bundled", steps=4, **SIDE), plain)


def test_restoring_leaves_nothing_behind(twins):
    names = set(twins.captured.unet.__dict__)
    before = dict(twins.captured.unet._modules)
    twins.same_picture()
    alive = weakref.ref(table_of(twins.captured.unet))
    twins.handle.restore()
    assert alive() is None
    assert twins.captured.unet._modules == before
    assert set(twins.captured.unet.__dict__) < names


def test_rows_go_with_the_last_graph_that_reads_them(twins):
    calls = calls_of(twins.captured.unet)
    calls._limit = 2
    made = []
    for batch in (1, 2, 3):
        for timestep in (900, 800):
            twins.same(lambda pipe, t=timestep, b=batch: call(pipe, prompt(0, b), t))
        made.append(weakref.ref(calls.buckets[-1].table))
    assert [reference() is not None for reference in made] == [False, True, True]


def test_a_failed_capture_runs_as_it_comes(twins):
    twins.recorder.refuses = RuntimeError("no")
    twins.same_picture()
    assert twins.tables == 0


def test_a_playback_that_fails_is_not_taken_for_done(twins, monkeypatch):
    context = prompt()
    twins.captured.scheduler.set_timesteps(5)
    first, second, third, *_ = twins.captured.scheduler.timesteps.tolist()
    call(twins.captured, context, second)
    table = table_of(twins.captured.unet)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(table, "_play_back", lambda: 1 / 0)
        call(twins.captured, context, first)
    twins.same(lambda pipe: call(pipe, context, third))
    assert twins.tables == 2


def test_a_lists_rows_are_in_the_order_of_a_run():
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(50)
    timesteps = list(dict.fromkeys(scheduler.timesteps.tolist()))
    assert times._upcoming(timesteps[0], [scheduler]) == timesteps[: times.AT_ONCE]
    assert times._upcoming(timesteps[30], [scheduler]) == timesteps[30:]
    assert times._upcoming(0.5, [scheduler]) == [0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_all_timesteps_tells_nothing(kind):
    """Schedulers have it until they are told a number of steps."""
    scheduler = kind()
    assert times._upcoming(900, [scheduler]) == [900]
    scheduler.set_timesteps(20)
    known = list(dict.fromkeys(scheduler.timesteps.tolist()))
    assert times._upcoming(known[3], [kind(), scheduler]) == known[3:]
