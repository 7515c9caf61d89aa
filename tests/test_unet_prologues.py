"""Keys and values of the prompt once per run: the same bits, and computed anew whenever they may be others.

`Tape` stands in for CUDA graphs: the products' buffers change only when the prologue is played back, so a prologue
that is left out wrongly shows in the pictures. The reference runs uncaptured, with the same shared products.
"""

import copy
import weakref

import pytest
import torch
from adapters import random_image_embeds, random_ip_adapter, random_lora
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from pipelines import picture
from recorders import Recorder
from tiny_model import one_thread, tiny_pipeline  # noqa: F401
from twins import SIDE, Twins, at_step, call, optimized, prompt

import diffopt
from diffopt.unet import graphs


@pytest.fixture
def twins(monkeypatch):
    return Twins(monkeypatch)


def cross(pipe):
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2


def products_of_the_prompt(monkeypatch, unet) -> list[int]:
    """Grows with each product of all layers' keys and values from now on."""
    rows = sum(len(linear.weight) for linear in unet.diffopt_together[0].linears)
    found: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x, weight, *rest):
        found.extend([rows] * (len(weight) == rows))
        return linear(x, weight, *rest)

    monkeypatch.setattr("torch.nn.functional.linear", counted)
    return found


# --- once per run ---------------------------------------------------------------------------------------------------


def test_once_per_run_and_the_same_bits(monkeypatch):
    twins = Twins(monkeypatch, recorder=Recorder())
    twins.same_picture()
    assert twins.prologues == 1
    twins.same_picture()
    assert twins.prologues == 2, "another picture has prompt embeddings of its own"
    found = products_of_the_prompt(monkeypatch, twins.captured.unet)
    picture(twins.captured, "bundled", steps=6, **SIDE)
    assert len(found) == 1
    assert "captured apart: keys and values of the prompt, 3 replays" in twins.handle.report()


SCHEDULERS = [(DDIMScheduler, 1), (PNDMScheduler, 2), (HeunDiscreteScheduler, 4)]


@pytest.mark.parametrize(("scheduler", "times"), SCHEDULERS)
def test_a_timestep_that_comes_twice_may_be_another_run(twins, scheduler, times):
    for pipe in (twins.captured, twins.reference):
        pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, "skip_prk_steps": True})
    twins.same_picture()
    assert twins.prologues == times


def test_without_guidance(twins):
    twins.same(lambda pipe: pipe("x", guidance_scale=1.0, num_inference_steps=3, output_type="latent", **SIDE,
                                 generator=torch.Generator().manual_seed(0)).images)  # fmt: skip
    assert twins.prologues == 1


def test_where_nothing_is_shared_nothing_is_computed_apart(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("diffopt.handle.CudaCapturer", lambda: recorder)
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    call(pipe, prompt())
    assert recorder.captures == 1
    assert "captured apart" not in handle.report()


# --- another prompt -------------------------------------------------------------------------------------------------


def test_embeddings_changed_in_place_between_steps(twins):
    plain = twins.same_picture()
    change = at_step(1, lambda pipe, kwargs: kwargs["prompt_embeds"].mul_(-1))
    assert not torch.equal(twins.same_picture(**change), plain)
    assert twins.prologues == 1 + 2


def test_a_view_of_the_embeddings_changed_in_place(twins):
    change = at_step(1, lambda pipe, kwargs: kwargs["prompt_embeds"][1, 3:5].zero_())
    twins.same_picture(**change)
    assert twins.prologues == 2


@pytest.mark.parametrize("how", ["equal", "other", "memory"])
def test_embeddings_replaced_between_steps(twins, how):
    def change(pipe, kwargs):
        if how == "memory":
            kwargs["prompt_embeds"].data = -kwargs["prompt_embeds"]
        else:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].clone() * (1 if how == "equal" else -1)

    twins.same_picture(**at_step(1, change))
    assert twins.prologues == 2


def test_prompts_take_turns(twins):
    a, b = prompt(1), prompt(2)
    for timestep in (900, 700, 500):
        outputs = [twins.same(lambda pipe, x=x, t=timestep: call(pipe, x, t)) for x in (a, b)]
        assert not torch.equal(*outputs)
    assert twins.prologues == 6
    assert twins.handle.summary()["step"]["captures"] == 1


def test_another_prompt_at_the_address_of_the_last_one(twins):
    for seed in range(4):
        twins.same(lambda pipe, seed=seed: call(pipe, prompt(seed), 900 - seed))
    assert twins.prologues == 4


def test_guidance_switched_off_in_mid_run(twins):
    def change(pipe, kwargs):
        pipe._guidance_scale = 0.0
        kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]

    for _ in range(2):
        twins.same_picture(steps=5, **at_step(2, change))
    assert twins.prologues == 4
    assert len({bucket.prologue for bucket in getattr(twins.captured.unet, graphs.ATTRIBUTE).buckets}) == 2


def test_inference_mode_counts_no_changes(twins):
    def run(pipe):
        with torch.inference_mode():
            context, outputs = prompt(), []
            for timestep in (900, 800, 700):
                context.add_(0.1)
                outputs.append(call(pipe, context, timestep))
            return torch.stack(outputs)

    twins.same(run)
    assert twins.prologues == 3


# --- another run ----------------------------------------------------------------------------------------------------


def untold(pipe, context) -> None:
    """Changes that leave objects, addresses and version counters as they were."""
    cross(pipe).to_k.weight.data.mul_(-1)
    context.data.mul_(0.5)


@pytest.mark.parametrize(("first", "second"), [((900, 500), (900, 500)), ((5,), (5,)), ((9.5,), (10,))])
def test_a_new_run_with_the_very_same_embeddings(twins, first, second):
    context = {pipe: prompt() for pipe in (twins.captured, twins.reference)}
    for timesteps in (first, second):
        for timestep in timesteps:
            twins.same(lambda pipe, t=timestep: call(pipe, context[pipe], t))
        for pipe, x in context.items():
            untold(pipe, x)
    assert twins.prologues == 2


@pytest.mark.parametrize("timestep", [torch.tensor([7, 7]), torch.tensor([[7]])[0].expand(2)])
def test_timesteps_that_are_no_number_tell_nothing(twins, timestep):
    context = prompt()
    for step in range(3):
        twins.same(lambda pipe, step=step: call(pipe, context, timestep - step))
        for pipe in (twins.captured, twins.reference):
            cross(pipe).to_k.weight.data.mul_(-1)
    assert twins.prologues == 3


def test_what_nothing_tells_of_shows_from_the_next_run_on(twins):
    """The limit: within a run, writes that PyTorch doesn't count are seen when it is over, or after `expire`."""
    context = prompt()
    call(twins.captured, context, 900)
    cross(twins.captured).to_v.weight.data.mul_(-1)
    call(twins.captured, context, 800)
    assert twins.prologues == 1
    getattr(twins.captured.unet, graphs.ATTRIBUTE).expire()
    cross(twins.reference).to_v.weight.data.mul_(-1)
    twins.same(lambda pipe: call(pipe, context, 700))
    for pipe in (twins.captured, twins.reference):
        cross(pipe).to_v.weight.data.mul_(-1)
    twins.same(lambda pipe: call(pipe, context, 900))


# --- other weights --------------------------------------------------------------------------------------------------


def in_place(pipe, kwargs):
    cross(pipe).to_k.weight.mul_(-1)


def in_place_in_inference_mode(pipe, kwargs):
    with torch.inference_mode():
        cross(pipe).to_v.weight.mul_(-1)


def loaded(pipe, kwargs):
    pipe.unet.load_state_dict({name: -value for name, value in pipe.unet.state_dict().items()})


def assigned(pipe, kwargs):
    pipe.unet.load_state_dict({name: -value for name, value in pipe.unet.state_dict().items()}, assign=True)


def other_memory(pipe, kwargs):
    cross(pipe).to_k.weight.data = -cross(pipe).to_k.weight


def other_parameter(pipe, kwargs):
    cross(pipe).to_k.weight = torch.nn.Parameter(-cross(pipe).to_k.weight, requires_grad=False)


def other_parameter_of_the_same_memory(pipe, kwargs):
    for _ in range(2):  # the second may be the first one's object again
        cross(pipe).to_k.weight = torch.nn.Parameter(cross(pipe).to_k.weight.data, requires_grad=False)
    weight = cross(pipe).to_k.weight
    while weight._version < 1:
        weight.mul_(-1)


def other_layer(pipe, kwargs):
    layer = copy.deepcopy(cross(pipe).to_k)
    layer.weight.mul_(-1)
    cross(pipe).to_k = layer


def a_hook(pipe, kwargs):
    cross(pipe).to_k.register_forward_hook(lambda module, inputs, output: -output)


def moved(pipe, kwargs):
    pipe.unet.to(torch.float64).to(torch.float32)
    in_place(pipe, kwargs)


CHANGES = [
    *(in_place, in_place_in_inference_mode, loaded, assigned, other_memory, other_parameter),
    *(other_parameter_of_the_same_memory, other_layer, a_hook, moved),
]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_in_mid_run_show_at_once(twins, change):
    plain = twins.same_picture()
    assert not torch.equal(twins.same_picture(**at_step(1, change)), plain)
    twins.same_picture()


def lora(pipe, name="one"):
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name=name)


def fused_for_good(pipe, kwargs):
    """Leaves every object where it was, addresses and version counters too."""
    cross_weights = [(id(x), x._version, x.data_ptr()) for x in cross(pipe).parameters()]
    lora(pipe)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert [(id(x), x._version, x.data_ptr()) for x in cross(pipe).parameters()] == cross_weights


def test_an_adapter_fused_for_good_between_two_steps(twins):
    plain = twins.same_picture()
    for _ in range(2):
        changed = twins.same_picture(**at_step(1, fused_for_good))
        assert not torch.equal(changed, plain)
        plain = twins.same_picture()


@pytest.mark.parametrize("what", ["load", "scale", "fuse", "unload", "fuse and unload"])
def test_adapters_changed_in_mid_run(twins, what):
    def change(pipe, kwargs):
        if what == "load":
            lora(pipe)
        if what == "scale":
            pipe.set_adapters(["one"], [0.3])
        if "fuse" in what:
            pipe.fuse_lora(components=["unet"])
        if "unload" in what:
            pipe.unload_lora_weights()

    plain = twins.same_picture()
    if what != "load":
        for pipe in (twins.captured, twins.reference):
            lora(pipe)
    assert not torch.equal(twins.same_picture(**at_step(1, change)), plain)
    twins.same_picture()


def test_a_state_that_was_there_before_may_have_other_values(twins):
    """The look after unloading equals the first one, whose graphs are used again; the weights are fused ones."""
    context = prompt()
    for pipe in (twins.captured, twins.reference):
        lora(pipe)
        pipe.unload_lora_weights()
    plain = twins.same(lambda pipe: call(pipe, context, 900))
    for pipe in (twins.captured, twins.reference):
        lora(pipe)
    twins.same(lambda pipe: call(pipe, context, 800))
    for pipe in (twins.captured, twins.reference):
        for module in pipe.unet.modules():
            if hasattr(module, "lora_A"):
                module.merge()  # not by way of `fuse_lora`
        pipe.unload_lora_weights()
    assert not torch.equal(twins.same(lambda pipe: call(pipe, context, 700)), plain)
    assert twins.handle.summary()["step"]["captures"] == 2


@pytest.mark.parametrize("when", ["before the call", "after the call"])
def test_learning_with_a_fused_optimizer_between_steps(twins, when):
    """PyTorch counts no change of weights that it makes."""
    context = prompt()

    def calls(pipe):
        weight = cross(pipe).to_k.weight.requires_grad_(True)
        optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
        version = weight._version
        found = [call(pipe, context, 900)]
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        pipe.unet(sample, 900, context).sample.square().mean().backward()
        if when == "after the call":
            found.append(call(pipe, context, 850))
        optimizer.step()
        optimizer.zero_grad()
        assert weight._version == version
        found.append(call(pipe, context, 800))
        weight.requires_grad_(False)
        return torch.stack(found)

    before, *_, after = twins.same(calls)
    assert not torch.equal(before, after)


def test_embeddings_that_a_fused_optimizer_changes(twins):
    def calls(pipe):
        context = prompt().requires_grad_(True)
        optimizer = torch.optim.SGD([context], lr=0.5, fused=True)
        found = []
        for timestep in (900, 800):
            found.append(call(pipe, context, timestep))
            context.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert context._version == 0
        return torch.stack([*found, call(pipe, context, 700)])

    first, second, _ = twins.same(calls)
    assert not torch.equal(first, second)


# --- other kinds of calls -------------------------------------------------------------------------------------------


def test_image_adapters_come_and_go(twins):
    plain = twins.same_picture()
    for pipe in (twins.captured, twins.reference):
        pipe.load_ip_adapter(random_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    image = {"ip_adapter_image_embeds": random_image_embeds(twins.captured.unet)}
    before = twins.prologues
    assert not torch.equal(twins.same_picture(**image), plain)
    assert twins.prologues == before, "their layers compute keys and values on their own"
    change = at_step(1, lambda pipe, kwargs: pipe.set_ip_adapter_scale(0.2))
    twins.same_picture(**image, **change)
    for pipe in (twins.captured, twins.reference):
        pipe.unload_ip_adapter()
    assert torch.equal(twins.same_picture(), plain)


def test_some_layers_with_processors_of_others(twins):
    from diffusers.models import attention_processor as stock

    for pipe in (twins.captured, twins.reference):
        cross(pipe).set_processor(stock.AttnProcessor2_0())
    twins.same_picture()
    assert twins.prologues == 1
    twins.same_picture(**at_step(1, lambda pipe, kwargs: kwargs["prompt_embeds"].mul_(-1)))


def test_residuals_and_masks_are_inputs_of_every_step(twins):
    shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
    context = prompt()
    for step in range(3):
        keywords = {
            "down_block_additional_residuals": [torch.full(shape, 0.1 * step) for shape in shapes],
            "mid_block_additional_residual": torch.full((2, 32, 4, 4), -0.1 * step),
            "encoder_attention_mask": (torch.arange(77) < 70 - step).float().expand(2, 77),
        }
        twins.same(lambda pipe, step=step, keywords=keywords: call(pipe, context, 900 - step, **keywords))
    assert twins.prologues == 1


def test_a_projected_prompt_is_not_computed_apart(monkeypatch):
    """A model that makes something else of its prompt first feeds its layers another tensor than it was given."""
    options = {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}
    twins = Twins(monkeypatch, **options)
    twins.same_picture()
    twins.same_picture(**at_step(1, lambda pipe, kwargs: kwargs["prompt_embeds"].mul_(-1)))
    assert twins.prologues == 0


def test_sizes_share_the_products(twins):
    context = prompt()
    for timestep, side in ((900, 8), (800, 4), (700, 8), (600, 16)):
        twins.same(lambda pipe, t=timestep, side=side: call(pipe, context, t, side))
    assert twins.prologues == 1
    other = prompt(1)
    for timestep, side in ((500, 4), (400, 8)):
        twins.same(lambda pipe, t=timestep, side=side: call(pipe, other, t, side))
    assert twins.prologues == 2
    assert twins.recorder.captures == 3 + 1 + 1, "sizes, products of the prompt, time embeddings"


def test_products_go_with_the_last_graph_that_reads_them(twins):
    calls = getattr(twins.captured.unet, graphs.ATTRIBUTE)
    calls._limit = 2
    made = []
    for round_ in range(2):
        for tokens in (70, 71, 72):
            context = prompt()[:, :tokens]
            for timestep in (900, 800):
                twins.same(lambda pipe, x=context, t=timestep: call(pipe, x, t))
            made.append(weakref.ref(calls.buckets[-1].prologue))
        assert twins.prologues == 3 * (round_ + 1)
    assert [reference() is not None for reference in made] == [False] * 4 + [True] * 2
    assert len(calls._apart._prologues) == 2


def test_threads_take_turns(twins):
    twins.take_turns(range(900, 880, -1))


# --- the way there and back -----------------------------------------------------------------------------------------


def test_a_deep_copy_computes_its_own(twins):
    plain = twins.same_picture()
    twin = copy.deepcopy(twins.captured)
    assert twin.unet.fuse_lora.__self__ is twin.unet
    cross(twin).to_k.weight.data.zero_()
    assert torch.equal(twins.same_picture(), plain)
    assert not torch.equal(picture(twin, "bundled", steps=4, **SIDE), plain)


def test_restoring_leaves_nothing_behind(twins):
    twins.same_picture()
    (bucket,) = getattr(twins.captured.unet, graphs.ATTRIBUTE).buckets
    alive = weakref.ref(bucket.prologue)
    del bucket
    twins.handle.restore()
    assert alive() is None
    assert not {"forward", "fuse_lora", graphs.ATTRIBUTE} & set(twins.captured.unet.__dict__)
    lora(twins.captured)
    twins.captured.fuse_lora(components=["unet"])


def test_a_fuse_lora_of_its_own_is_kept(monkeypatch):
    pipe = tiny_pipeline()
    mine = pipe.unet.fuse_lora = lambda *_, **__: None
    handle = optimized(monkeypatch, pipe, Recorder())
    assert pipe.unet.fuse_lora is mine
    handle.restore()
    assert pipe.unet.fuse_lora is mine


def test_a_failed_capture_runs_as_it_comes(twins):
    twins.recorder.refuses = RuntimeError("no")
    twins.same_picture()
    twins.recorder.refuses = None
    assert twins.prologues == 0
    twins.captured.unet.conv_in.weight.data = twins.captured.unet.conv_in.weight.data.clone()
    twins.same_picture()
    assert twins.prologues == 1


def test_a_playback_that_fails_is_not_taken_for_done(twins, monkeypatch):
    a, b = prompt(1), prompt(2)
    call(twins.captured, a, 900)
    (bucket,) = getattr(twins.captured.unet, graphs.ATTRIBUTE).buckets
    with monkeypatch.context() as patched:
        patched.setattr(bucket.prologue, "_play_back", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bucket.prologue.bring(b, 800)
    assert bucket.prologue.bring(a, 700)
