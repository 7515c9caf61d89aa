"""Timesteps kept on the CPU: the same latents, no wait for the device, and the way back.

The `meta` device stands in for a GPU: what asks it for a value (a wait, on a GPU) raises, and so does what mixes it
with the CPU, numbers of no dimension aside, as on a GPU.
"""

import copy
import gc
import inspect
import pickle

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from scheduler_params import KINDS, NAMES, kinds
from tiny_model import one_thread, tiny_pipeline  # noqa: F401

import diffopt
from diffopt.engine.requests import GenerationRequest
from diffopt.engine.worker import Engine
from diffopt.models.catalogue import generic_config
from diffopt.models.schedulers import make_scheduler
from diffopt.unet import fused, graphs, schedules
from diffopt.unet.arguments import with_timestep_beside
from diffopt.unet.capturers import CudaCapturer
from diffopt.unet.parts import Parts

FAR = torch.device("meta")


def scheduler_of(kind: type, **config):
    options = {"skip_prk_steps": True} if kind is diffusers.PNDMScheduler else {}
    options |= {"lower_order_final": True} if kind is diffusers.DPMSolverSinglestepScheduler else {}
    known = inspect.signature(kind).parameters
    config = {name: value for name, value in config.items() if name in known}
    return kind(beta_schedule="scaled_linear", **options, **config)


def fed(kind: type, **config):
    scheduler = scheduler_of(kind, **config)
    assert not schedules.put_on(scheduler, None)
    return scheduler


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Handles take the CPU for a GPU, as far as schedulers go."""
    monkeypatch.setattr(schedules, "device_reasons", lambda device: [])


# --- no wait, no mixing of devices ----------------------------------------------------------------------------------


def run(scheduler, begin: int | None = None) -> None:
    """A denoising loop on the far device, as the pipelines have it; `begin`: where inpainting begins."""
    scheduler.set_timesteps(6, device=FAR)
    latents = torch.empty(2, 4, 8, 8, dtype=torch.float16, device=FAR)
    timesteps = scheduler.timesteps[(begin or 0) * scheduler.order :]
    if begin is not None:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        latents = scheduler.add_noise(latents, torch.empty_like(latents), timesteps[:1].repeat(2))
    for i, t in enumerate(timesteps):
        scheduler.scale_model_input(torch.cat([latents] * 2), t)
        latents = scheduler.step(torch.empty_like(latents), t, latents, return_dict=False)[0]
        if begin is not None and i + 1 < len(timesteps):  # as it is written in diffusers
            scheduler.add_noise(latents, latents, torch.tensor([timesteps[i + 1]]))
    assert latents.device == FAR


@pytest.mark.parametrize("begin", [None, 0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_asks_the_device_for_a_value(kind, begin):
    run(fed(kind), begin)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_settings(kind, spacing, prediction):
    run(fed(kind, timestep_spacing=spacing, prediction_type=prediction))


@pytest.mark.parametrize("kind", kinds(schedules.BY_TIMESTEP))
def test_stock_asks_at_a_step(kind):
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        run(scheduler_of(kind))


@pytest.mark.parametrize(
    "kind", [diffusers.DEISMultistepScheduler, diffusers.UniPCMultistepScheduler], ids=lambda kind: kind.__name__
)
def test_stock_asks_for_the_first_timestep(kind):
    with pytest.raises(NotImplementedError, match="nonzero"):
        run(scheduler_of(kind))


# --- the same values ------------------------------------------------------------------------------------------------


def loop(scheduler, told=lambda i, t: t) -> torch.Tensor:
    """Latents of a loop with a made-up model; `told` is what the scheduler gets for a timestep."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(8, device="cpu")
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, t)
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = scheduler.step(scaled.sin(), told(i, t), latents, return_dict=False, **options)[0]
    return latents


@pytest.mark.parametrize("kind", kinds(schedules.BY_COUNT))
def test_after_the_first_step_the_timestep_plays_no_role(kind):
    """So its device plays none either: an object without any number in it does."""
    expected = loop(scheduler_of(kind))
    assert torch.equal(loop(scheduler_of(kind), lambda i, t: object() if i else t), expected)


@pytest.mark.parametrize("kind", kinds(schedules.BY_TIMESTEP))
def test_the_timestep_is_an_index_only(kind):
    assert torch.equal(loop(scheduler_of(kind), lambda i, t: int(t)), loop(scheduler_of(kind)))


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_make_the_same_latents(name, on_a_gpu):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(name, pipe.scheduler)

    def latents() -> torch.Tensor:
        seen = []

        def after(pipe, i, t, tensors):
            seen.append(float(t))
            return tensors

        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "generator": generator, "output_type": "latent"}
        out = pipe("a cat", callback_on_step_end=after, **options).images
        assert seen == pipe.scheduler.timesteps.tolist()
        return out

    expected = latents()
    handle = diffopt.optimize(pipe, attention="sdpa")
    assert schedules.is_on(pipe.scheduler) == (name != "lcm")
    assert torch.equal(latents(), expected)
    handle.restore()
    assert "set_timesteps" not in pipe.scheduler.__dict__


def test_custom_timesteps_and_sigmas_are_taken_where_the_class_takes_them(on_a_gpu):
    pipe = tiny_pipeline()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    options = {"output_type": "latent", "guidance_scale": 1.0}
    wanted = [{"timesteps": [900, 500, 100]}, {"sigmas": [9.0, 3.0, 1.0]}]

    def latents(extra) -> torch.Tensor:
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **options, **extra).images

    expected = [latents(extra) for extra in wanted]
    diffopt.optimize(pipe, attention="sdpa")
    assert schedules.is_on(pipe.scheduler)
    assert all(torch.equal(latents(extra), x) for extra, x in zip(wanted, expected, strict=True))
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    diffopt.optimize(pipe, attention="sdpa")
    with pytest.raises(ValueError, match="does not support custom"):
        latents(wanted[0])


def test_the_engines_schedulers_are_fed_too(on_a_gpu):
    """It makes a fresh one for each picture."""
    pipe = tiny_pipeline()
    config = generic_config("tiny", "tiny", 64)
    engine = Engine(pipe, config, diffopt.optimize(pipe))
    seen = []
    request = GenerationRequest.create(config, prompt="a cat", steps=2, seed=7, scheduler="ddim")
    list(engine.generate(request, on_step=lambda _: seen.append((pipe.scheduler, schedules.is_on(pipe.scheduler)))))
    assert [on for _, on in seen] == [True, True]
    assert seen[0][0] is not pipe.scheduler
    engine.handle.restore()
    assert not schedules.is_on(pipe.scheduler)


# --- diffusers' pipelines, run on the far device --------------------------------------------------------------------


def far(pipe):
    """The pipeline on the device that tells no values, its scheduler fed from the CPU."""
    pipe.scheduler = scheduler_of(diffusers.PNDMScheduler)
    pipe.set_progress_bar_config(disable=True)
    assert not schedules.put_on(pipe.scheduler, pipe)
    return pipe.to(FAR)


def prompt(width: int = 16) -> dict:
    return {
        "prompt_embeds": torch.empty(1, 77, width, device=FAR),
        "negative_prompt_embeds": torch.empty(1, 77, width, device=FAR),
        "output_type": "latent",
        "num_inference_steps": 4,
    }


class TestPipelines:
    def test_text_to_image(self):
        pipe = far(tiny_pipeline())
        assert pipe(**prompt()).images.device == FAR

    def test_without_us_it_waits(self):
        pipe = far(tiny_pipeline())
        schedules.take_off(pipe.scheduler)
        with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
            pipe(**prompt())

    def test_image_to_image(self):
        pipe = far(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny_pipeline()))
        image = torch.zeros(1, 3, 64, 64)
        assert pipe(**prompt(), image=image, strength=0.6).images.device == FAR

    def test_inpainting(self):
        pipe = far(diffusers.StableDiffusionInpaintPipeline.from_pipe(tiny_pipeline()))
        latents = torch.empty(1, 4, 32, 32, device=FAR)
        images = {"image": torch.zeros(1, 3, 64, 64), "mask_image": torch.ones(1, 1, 64, 64)}
        assert pipe(**prompt(), **images, latents=latents, height=64, width=64).images.device == FAR

    def test_controlnet(self):
        stock = tiny_pipeline()
        controlnet = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(8, 8))
        pipe = diffusers.StableDiffusionControlNetPipeline.from_pipe(stock, controlnet=controlnet)
        pipe = far(pipe)
        assert pipe(**prompt(), image=torch.zeros(1, 3, 64, 64)).images.device == FAR

    def test_sdxl_and_its_refiner(self):
        stock = tiny_pipeline(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 16
        )
        parts = {"vae": stock.vae, "unet": stock.unet, "scheduler": stock.scheduler}
        parts |= dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pooled = torch.empty(1, 16, device=FAR)
        options = {**prompt(), "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
        pipe = far(StableDiffusionXLPipeline(**parts, add_watermarker=False))
        latents = pipe(**options, denoising_end=0.5).images
        assert latents.device == FAR
        parts["scheduler"] = pipe.scheduler
        refiner = far(StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False))
        assert refiner(**options, image=latents, denoising_start=0.5).images.device == FAR


@pytest.mark.parametrize("by_name", [True, False])
def test_uncaptured_calls_get_the_timestep_on_their_device(by_name, monkeypatch):
    """A copy, which the model would make, waits."""
    unet = tiny_pipeline().unet.requires_grad_(False).to(FAR)
    graphs.put_on(unet, graphs.CapturedCalls(CudaCapturer(), fused.OURS))
    told = []
    stock = type(unet).get_time_embed
    monkeypatch.setattr(type(unet), "get_time_embed", lambda *a, **k: told.append(k["timestep"]) or stock(*a, **k))
    sample, context = torch.empty(1, 4, 8, 8, device=FAR), torch.empty(1, 77, 16, device=FAR)
    t = torch.tensor(7.5)
    with torch.no_grad():
        unet(sample, timestep=t, encoder_hidden_states=context) if by_name else unet(sample, t, context)
    assert [(x.device, x.dtype, x.shape) for x in told] == [(FAR, torch.float32, ())]


@pytest.mark.parametrize("batched", [lambda t: t[None], lambda t: t.repeat(2), lambda t: t.expand(2)])
def test_uncaptured_calls_get_a_timestep_of_each_picture_on_their_device(batched):
    """A loop of the user's own makes one of a scheduler's, which stock would have on the GPU."""
    unet = tiny_pipeline().unet.requires_grad_(False).to(FAR)
    graphs.put_on(unet, graphs.CapturedCalls(CudaCapturer(), fused.OURS))
    scheduler = fed(diffusers.DDIMScheduler)
    scheduler.set_timesteps(5, device=FAR)
    sample, context = torch.empty(2, 4, 8, 8, device=FAR), torch.empty(2, 77, 16, device=FAR)
    with torch.no_grad():
        assert unet(sample, batched(scheduler.timesteps[0]), context).sample.device == FAR


def test_other_timesteps_are_left_alone():
    sample, t = torch.zeros(1), torch.tensor(981)
    assert with_timestep_beside((sample, t, "context"), {}, ("sample", "timestep"))[0][1] is t, "already beside it"
    arguments, keywords = with_timestep_beside((sample.to(FAR), 7.0), {"timestep_cond": t}, ("sample", "timestep"))
    assert arguments[1] == 7.0
    assert keywords == {"timestep_cond": t}


# --- what is left alone, and the way back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (diffusers.LCMScheduler(), "computes with the timestep"),
        (diffusers.DDPMScheduler(), "fails between two devices"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "last bit depends on the device"),
        (diffusers.KDPM2DiscreteScheduler(), "doesn't know this class"),
        (type("Mine", (diffusers.DDIMScheduler,), {})(), "doesn't know this class"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_not_safe_is_left_alone(scheduler, words):
    (reason,) = schedules.put_on(scheduler, None)
    assert words in reason
    assert "set_timesteps" not in scheduler.__dict__


def test_a_method_of_the_users_own_is_kept():
    scheduler = diffusers.DDIMScheduler()
    mine = scheduler.set_timesteps
    scheduler.set_timesteps = mine
    assert schedules.put_on(scheduler, None) == ["it has a set_timesteps of its own, which is kept"]
    schedules.take_off(scheduler)
    assert scheduler.__dict__["set_timesteps"] is mine


def test_a_controlnet_that_is_not_captured_keeps_schedulers_that_hardly_wait(on_a_gpu):
    stock = tiny_pipeline()
    stock.scheduler = diffusers.EulerDiscreteScheduler.from_config(stock.scheduler.config)
    controlnet = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(8, 8))
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pipe(stock, controlnet=controlnet)
    controlnet.forward = controlnet.forward  # as if a hook were on it
    handle = diffopt.optimize(pipe)
    assert not schedules.is_on(pipe.scheduler)
    assert "note: EulerDiscreteScheduler has its timesteps on the GPU and may wait for it" in handle.report()
    assert "note: controlnet: calls are not captured: ControlNetModel has a forward of its own" in handle.report()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    diffopt.optimize(pipe)
    assert schedules.is_on(pipe.scheduler)


def test_a_captured_controlnet_takes_a_timestep_on_the_cpu(on_a_gpu):
    stock = tiny_pipeline()
    stock.scheduler = diffusers.EulerDiscreteScheduler.from_config(stock.scheduler.config)
    controlnet = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(8, 8))
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pipe(stock, controlnet=[controlnet, controlnet])
    diffopt.optimize(pipe)
    assert schedules.is_on(pipe.scheduler)


def test_a_deep_copy_is_its_own():
    scheduler = fed(diffusers.DDIMScheduler)
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(5, device=FAR)
    assert len(twin.timesteps) == 5
    assert len(scheduler.timesteps) == 1000
    schedules.take_off(twin)
    assert schedules.is_on(scheduler)
    twin.set_timesteps(5, device=FAR)
    assert twin.timesteps.device == FAR


def test_pickling_gives_the_classs_own():
    again = pickle.loads(pickle.dumps(fed(diffusers.DDIMScheduler)))
    again.set_timesteps(5, device="cpu")
    assert len(again.timesteps) == 5


def test_the_class_and_its_configuration_stay():
    before = diffusers.DDIMScheduler.set_timesteps
    scheduler = fed(diffusers.DDIMScheduler)
    assert diffusers.DDIMScheduler.set_timesteps is before
    assert inspect.signature(scheduler.set_timesteps) == inspect.signature(diffusers.DDIMScheduler().set_timesteps)
    again = diffusers.DDIMScheduler.from_config(scheduler.config)
    assert "set_timesteps" not in again.__dict__


def test_on_a_cpu_or_without_graphs_nothing_is_touched(monkeypatch):
    pipe = tiny_pipeline()
    diffopt.optimize(pipe).restore()
    monkeypatch.setattr(schedules, "device_reasons", lambda device: [])
    handle = diffopt.optimize(pipe, capture=False)
    assert "set_timesteps" not in pipe.scheduler.__dict__
    assert "timesteps on the GPU" not in handle.report()


def test_a_new_scheduler_is_named_until_optimized_again(on_a_gpu):
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    former = pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(former.config)
    assert "DDIMScheduler has its timesteps on the GPU and may wait for it: it is new here" in handle.report()
    diffopt.optimize(pipe)
    assert "timesteps on the GPU" not in handle.report()
    handle.restore()
    assert not schedules.is_on(pipe.scheduler)
    assert not schedules.is_on(former)


def test_pipelines_of_one_unet_and_scheduler_count(on_a_gpu):
    first = tiny_pipeline()
    second = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(first)
    assert second.scheduler is first.scheduler
    handle = diffopt.optimize(first)
    assert diffopt.optimize(second) is handle
    handle.restore()
    assert schedules.is_on(first.scheduler)
    handle.restore()
    assert not schedules.is_on(first.scheduler)


@pytest.mark.parametrize("first_leaves", [True, False])
def test_pipelines_that_share_only_the_scheduler_count(on_a_gpu, first_leaves):
    pipes = [tiny_pipeline(), tiny_pipeline()]
    pipes[1].scheduler = pipes[0].scheduler
    handles = [diffopt.optimize(pipe) for pipe in pipes]
    if not first_leaves:
        handles.reverse()
    handles[0].restore()
    assert schedules.is_on(pipes[0].scheduler)
    handles[1].restore()
    assert not schedules.is_on(pipes[0].scheduler)


class _Thing:
    """A part or a pipeline, which may be collected."""


def test_a_part_is_given_back_once_none_of_its_pipelines_is_left():
    taken = []
    parts, others = Parts(taken.append), Parts(taken.append)
    part, first, second, third = (_Thing() for _ in range(4))
    for pipe in (first, second, second):
        parts.note(part, pipe)
    others.note(part, third)
    assert parts.pairs() == [(part, first), (part, second)]
    parts.keep_only([second], [parts, others])
    assert (parts.pairs(), taken) == ([(part, second)], [])
    parts.keep_only([], [parts, others])
    assert taken == [], "a pipeline of another handle still uses it"
    others.keep_only([], [parts, others])
    assert taken == [part]


def test_a_pipeline_that_was_collected_keeps_no_part():
    taken = []
    mine, others = Parts(taken.append), Parts(taken.append)
    part, gone, lost, pipe = (_Thing() for _ in range(4))
    mine.note(part, pipe)
    others.note(part, gone)
    mine.note(lost, pipe)
    del gone, lost
    gc.collect()
    assert others.pairs() == [(part, None)]
    assert mine.pairs() == [(part, pipe)]
    mine.keep_only([], [mine, others])
    assert taken == [part]


def test_a_copied_pipeline_is_independent(on_a_gpu):
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    twin = copy.deepcopy(pipe)
    diffopt.optimize(twin).restore()
    assert not schedules.is_on(twin.scheduler)
    assert schedules.is_on(pipe.scheduler)
    handle.restore()
    assert not schedules.is_on(pipe.scheduler)
