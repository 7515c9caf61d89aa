"""VAE decoders on the step kernels: as exact as stock, counted per pipeline, and the way back. Kernels interpreted."""

import copy
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from pipelines import distance, make_pipeline
from tiny_model import one_thread, tiny_pipeline  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffopt
from diffopt.attention.layers import attention_modules
from diffopt.bench.random_models import random_pipeline, random_prompt
from diffopt.bench.step.contenders import twin
from diffopt.measure.exactness import relative_l2
from diffopt.measure.teacher_forced import FACTOR, floor, reference_dtype
from diffopt.unet import decoders, forwards, fused

KINDS = (Decoder, ResnetBlock2D, nn.GroupNorm)
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CLOSE = 1e-5 if DEVICE.type == "cpu" else 5e-3  # on a GPU PyTorch's convolutions of float32 may use TF32


@pytest.fixture(autouse=True)
def step_kernels_run(monkeypatch):
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])


@pytest.fixture
def pipe():
    return tiny()


def tiny(**options) -> Any:
    pipe = tiny_pipeline(norm_num_groups=2, **options).to(DEVICE)
    for part in (pipe.unet, pipe.vae):
        part.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in pipe.vae.parameters():  # biases that are forgotten must show, and norms that are no norms
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape, generator=generator).to(DEVICE) * 0.2
    pipe.set_progress_bar_config(disable=True)
    return pipe


def optimize(pipe: Any) -> Any:
    return diffopt.optimize(pipe, attention="sdpa", capture=False)


def latents(vae: Any, height: int = 4, width: int = 4, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 4, height, width, generator=generator).to(DEVICE, vae.dtype)


def decoded(vae: Any, z: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(latents(vae) if z is None else z, return_dict=False)[0]


def attention_that_runs(vae: Any) -> str:
    """The kernel of PyTorch's SDPA that a decode calls, as `diffopt.attention.backends` names it."""
    with OperatorNames() as seen:
        decoded(vae)
    (found,) = {name for name in seen.names if name.startswith("_scaled_dot_product")}
    return next(f"sdpa-{kind}" for kind in ("flash", "efficient", "cudnn", "math") if kind in found.split("_"))


class OperatorNames(TorchDispatchMode):
    """Notes which of PyTorch's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def is_fused(vae: Any) -> bool:
    return fused.is_ours(vae.decoder)


# --- exactness ------------------------------------------------------------------------------------------------------


def exact(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """What a stock VAE decodes in higher precision, without TF32."""
    dtype = reference_dtype(vae.dtype)
    precise = copy.deepcopy(vae)
    nn.Module.to(precise, dtype)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return decoded(precise, z.to(dtype))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def assert_as_exact_as_stock(pipe: Any, z: torch.Tensor, run: Callable[[Any], Any] = lambda vae: vae) -> None:
    """The step rule for pictures: at most 1.5 times stock's distance to the exact one, and a fault must be found."""
    vae = pipe.vae
    reference, stock = exact(vae, z), decoded(vae, z)
    limit = FACTOR * relative_l2(stock, reference) + floor(vae.dtype)
    handle = optimize(pipe)
    ours = decoded(vae, z)
    assert ours.stride() == stock.stride()
    assert not torch.equal(ours, stock), "the kernels did not run"
    assert relative_l2(ours, reference) <= limit
    for module in vae.decoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.mul_(1.03)
    assert relative_l2(decoded(vae, z), reference) > limit, "the check is void"
    handle.restore()


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 1)], ids=str)
def test_a_decoded_picture_is_as_exact_as_stocks(pipe, size):
    assert_as_exact_as_stock(pipe, latents(pipe.vae, *size, batch=2))


def test_every_kind_is_fused(pipe):
    handle = optimize(pipe)
    (row,) = handle.summary()["vae"]
    counts = {kind: sum(type(m) is kind for m in pipe.vae.decoder.modules()) for kind in (*KINDS, Upsample2D)}
    convolutions = row["fused"].pop("Conv2d")  # 3×3 ones with few channels, on a Hopper GPU all
    assert row["fused"] == {kind.__name__: count for kind, count in counts.items()}
    assert convolutions >= 2
    assert row["kind"] == "AutoencoderKL"
    assert not row["kept"]
    assert not row["reasons"]
    assert f"VAE: fused: 1 Decoder, {convolutions} Conv2d, 6 ResnetBlock2D, 14 GroupNorm" in handle.report()


def test_the_attention_of_a_decoder_is_named(pipe):
    handle = optimize(pipe)
    (row,) = handle.summary()["vae"]
    (attn,) = attention_modules(pipe.vae.decoder).values()
    assert row["attention"] == [
        {
            "name": "mid_block.attentions.0",
            "heads": attn.heads,
            "head_dim": attn.to_q.out_features // attn.heads,
            "processor": "AttnProcessor2_0",
            "sdpa": attention_that_runs(pipe.vae),
        }
    ]
    dim, sdpa = (row["attention"][0][key] for key in ("head_dim", "sdpa"))
    assert f"VAE: attention of head dim {dim}: as stock has it, AttnProcessor2_0 ({sdpa} of PyTorch)" in handle.report()


def test_a_decoders_attention_that_is_not_pytorchs_has_no_kernel_of_its(pipe):
    (attn,) = attention_modules(pipe.vae.decoder).values()
    attn.set_processor(AttnProcessor())
    handle = optimize(pipe)
    assert [row["sdpa"] for row in handle.summary()["vae"][0]["attention"]] == [""]
    assert "as stock has it, AttnProcessor\n" in handle.report() + "\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_true_decoders_attention_never_holds_its_scores(dtype):
    """Of 16,384 pixels (SDXL at 1024×1024) they would take 0.5 or 1 GiB; outputs alone are 16 or 32 MiB."""
    pipe = make_pipeline("sd15")
    nn.Module.to(pipe.vae, dtype)
    (attn,) = attention_modules(pipe.vae.decoder).values()
    row = optimize(pipe).summary()["vae"][0]["attention"][0]
    assert (row["head_dim"], row["sdpa"], attention_that_runs(pipe.vae)) == (512, "sdpa-efficient", "sdpa-efficient")
    image = torch.randn(1, 512, 128, 128, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        attn(image)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attn(image)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16_384**2 * dtype.itemsize / 2


def test_the_attentions_norm_runs_on_the_kernel_too():
    norm = nn.GroupNorm(2, 16).to(DEVICE)
    tokens = torch.randn(2, 12, 16, device=DEVICE).transpose(1, 2)  # as diffusers' processors hand it over
    with torch.no_grad():
        out = forwards.group_norm(norm, tokens)
        expected = norm(tokens)
    assert out.shape == expected.shape
    assert out.stride() == tokens.stride(), "the kernel did not run"
    assert distance(out, expected) < 1e-6


def test_the_bundled_models_pictures_are_as_exact_as_stocks():
    pipe = make_pipeline("bundled")
    pipe.vae.requires_grad_(False)
    assert_as_exact_as_stock(pipe, latents(pipe.vae, 2, 2))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "side"),
    [
        ("sd15", torch.float16, 64),
        ("sd15", torch.float16, 57),  # no power of two
        ("sd15", torch.bfloat16, 64),
        ("sdxl", torch.float32, 128),  # as its pipeline decodes
        ("sdxl", torch.float16, 64),
    ],
)
def test_true_sizes_are_as_exact_as_stock(kind, dtype, side):
    pipe = make_pipeline(kind)
    nn.Module.to(pipe.vae, dtype)
    assert_as_exact_as_stock(pipe, latents(pipe.vae, side, side))


# --- what diffusers does with a VAE ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enable", "size", "batch"),
    [("enable_tiling", (5, 4), 1), ("enable_slicing", (3, 3), 2)],  # tiles of 4, every 3
)
def test_tiles_and_slices(pipe, enable, size, batch):
    getattr(pipe.vae, enable)()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8
    z = latents(pipe.vae, *size, batch=batch)
    expected = decoded(pipe.vae, z)
    handle = optimize(pipe)
    ours = decoded(pipe.vae, z)
    assert distance(ours, expected) < CLOSE
    assert not torch.equal(ours, expected), "the kernels did not run"
    handle.restore()
    assert torch.equal(decoded(pipe.vae, z), expected)


@pytest.mark.parametrize("kernels", [True, False], ids=["fused", "stock"])
def test_tiles_are_said_to_be_inexact(pipe, kernels, monkeypatch):
    """They are diffusers' own, asked for by the user; whoever compares pictures must know."""
    if not kernels:
        monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: ["planted"])
    handle = optimize(pipe)
    optimize(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    note = "AutoencoderKL decodes in tiles, as asked for: by design, pictures larger than one tile are not exact"
    assert note not in handle.summary()["notes"]
    pipe.vae.enable_tiling()
    assert handle.summary()["notes"].count(note) == 1
    assert f"note: {note}" in handle.report()
    pipe.vae.disable_tiling()
    assert note not in handle.report()


def test_a_pipeline_that_upcasts_its_vae_for_each_picture():
    """SDXL's: the VAE goes to float32 and back, its Parameters stay, and so does their layout."""
    pipe = random_pipeline("tiny-xl", device=DEVICE, dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    prompt = random_prompt("tiny-xl", device=DEVICE, dtype=torch.float16)
    pipe.unet.forward = lambda sample, *_, **__: (torch.zeros_like(sample),)  # what it predicts is no matter here

    def picture() -> torch.Tensor:
        options = {"num_inference_steps": 1, "width": 8, "height": 8, "output_type": "pt", "guidance_scale": 1.0}
        with pytest.warns(FutureWarning, match="upcast_vae"):
            return pipe(**prompt, **options, generator=torch.Generator().manual_seed(0)).images

    expected = picture()
    before = state(pipe.vae)
    handle = optimize(pipe)
    for _ in range(2):
        ours = picture()
        assert pipe.vae.dtype == torch.float16
        assert 0 < distance(ours, expected) < CLOSE
        assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert handle.summary()["vae"][0]["fused"]
    handle.restore()
    assert state(pipe.vae) == before
    assert torch.equal(picture(), expected)


def test_encoding_is_untouched(pipe):
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    with torch.no_grad():
        expected = pipe.vae.encode(image).latent_dist.mean
        optimize(pipe)
        assert torch.equal(pipe.vae.encode(image).latent_dist.mean, expected)
    assert not any("forward" in module.__dict__ for module in pipe.vae.encoder.modules())


def test_gradients_use_the_stock_computation(pipe):
    optimize(pipe)
    z = latents(pipe.vae).requires_grad_(True)
    pipe.vae.decode(z).sample.sum().backward()
    assert z.grad is not None


def test_hooks_are_called(pipe):
    expected = decoded(pipe.vae)
    optimize(pipe)
    decoder, called = pipe.vae.decoder, []
    for module in (decoder, decoder.conv_in, decoder.mid_block.resnets[0].conv1, decoder.conv_norm_out):
        module.register_forward_hook(lambda module, *_: called.append(module))
    assert distance(decoded(pipe.vae), expected) < CLOSE
    assert len(called) == 4
    decoder.conv_act.register_forward_hook(lambda module, *_: called.append(module))
    assert distance(decoded(pipe.vae), expected) < CLOSE
    assert len(called) == 9


def test_compiled_on_top(pipe):
    expected = decoded(pipe.vae)
    optimize(pipe)
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    try:
        assert distance(decoded(pipe.vae), expected) < CLOSE
    finally:
        torch._dynamo.reset()


def test_saving(pipe, tmp_path):
    expected = {name: value.cpu().clone() for name, value in pipe.vae.state_dict().items()}
    optimize(pipe)
    pipe.vae.save_pretrained(tmp_path)
    again = type(pipe.vae).from_pretrained(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_pictures_too_large_for_the_kernel_use_stocks_norm(pipe, monkeypatch):
    for size, fits in (((1024, 1024), True), ((2048, 2048), True), ((4096, 4096), False)):
        assert forwards._is_launchable((1, 128, *size), 32) == fits
    assert not forwards._is_launchable((1, 1024, 1536, 1536), 32)
    monkeypatch.setattr(forwards, "_is_launchable", lambda shape, groups: False)
    expected = decoded(pipe.vae)
    optimize(pipe)
    assert distance(decoded(pipe.vae), expected) < CLOSE


# --- the way back ---------------------------------------------------------------------------------------------------


def state(module: nn.Module) -> dict[str, Any]:
    """What restoring gives back: objects, strides, forwards and plain attributes."""
    parameters = {name: (id(p), p.dtype, p.stride()) for name, p in module.named_parameters()}
    attributes = {name: sorted(m.__dict__) for name, m in module.named_modules()}
    return {"parameters": parameters, "attributes": attributes}


def test_restoring_gives_everything_back(pipe):
    before, expected = state(pipe.vae), decoded(pipe.vae)
    handle = optimize(pipe)
    assert diffopt.optimize(pipe, attention="sdpa") is handle
    assert state(pipe.vae) != before
    ours = decoded(pipe.vae)
    assert torch.equal(decoded(pipe.vae), ours)
    handle.restore()
    assert state(pipe.vae) == before
    assert torch.equal(decoded(pipe.vae), expected)
    assert handle.summary()["vae"] == []
    with diffopt.optimized(pipe, attention="sdpa"):
        assert torch.equal(decoded(pipe.vae), ours)
    assert state(pipe.vae) == before


def test_a_vae_that_was_channels_last_stays_so(pipe):
    pipe.vae.to(memory_format=torch.channels_last)
    before = state(pipe.vae)
    optimize(pipe).restore()
    assert state(pipe.vae) == before


def with_vae(vae: Any) -> Any:
    pipe = tiny()
    pipe.vae = vae
    return pipe


def test_a_vae_of_two_unets_stays_until_the_last_is_restored(pipe):
    before, expected = state(pipe.vae), decoded(pipe.vae)
    other = with_vae(pipe.vae)
    first, second = optimize(pipe), optimize(other)
    assert first is not second
    first.restore()
    assert not first.active
    assert is_fused(pipe.vae)
    assert second.summary()["vae"][0]["fused"]
    second.restore()
    assert state(pipe.vae) == before
    assert torch.equal(decoded(pipe.vae), expected)


def test_pipelines_that_share_all_are_counted(pipe):
    before = state(pipe.vae)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    handle = optimize(pipe)
    assert optimize(other) is handle
    assert len(handle.summary()["vae"]) == 1
    handle.restore()
    assert is_fused(pipe.vae)
    handle.restore()
    assert state(pipe.vae) == before


def test_a_benchmarks_stock_pipeline_keeps_a_stock_decoder(pipe):
    before, other = state(pipe.vae), twin(pipe)
    optimize(other)
    assert is_fused(other.vae)
    assert state(pipe.vae) == before


def test_pipelines_of_one_unet_with_vaes_of_their_own(pipe):
    other = StableDiffusionPipeline(**{**pipe.components, "vae": tiny().vae}, requires_safety_checker=False)
    handle = optimize(pipe)
    assert not is_fused(other.vae)
    assert optimize(other) is handle
    assert len(handle.summary()["vae"]) == 2
    handle.restore()  # the last one that came
    assert is_fused(pipe.vae)
    assert not is_fused(other.vae)
    handle.restore()
    assert not is_fused(pipe.vae)


def test_a_collected_pipeline_no_longer_counts(pipe):
    vae, other = pipe.vae, with_vae(pipe.vae)
    handle, _ = optimize(pipe), optimize(other)
    del other, _
    gc.collect()
    handle.restore()
    assert not is_fused(vae)


def test_a_unet_that_is_gone_keeps_no_vae(pipe):
    handle = optimize(pipe)
    pipe.unet = tiny().unet
    gc.collect()
    assert not handle.active
    handle.restore()
    assert not is_fused(pipe.vae)


def test_a_new_vae_is_named_and_fused_by_optimizing_again(pipe):
    old, new = pipe.vae, tiny().vae
    handle = optimize(pipe)
    pipe.vae = new
    assert "the decoder of AutoencoderKL is not fused: it is new here; optimize() again changes that" in handle.report()
    assert optimize(pipe) is handle
    assert is_fused(new)
    assert "it is new here" not in handle.report()
    handle.restore()
    assert not is_fused(old)
    assert not is_fused(new)


def test_a_deep_copy_is_independent(pipe):
    expected = decoded(pipe.vae)
    handle = optimize(pipe)
    ours = decoded(pipe.vae)
    copied = copy.deepcopy(pipe)
    copied.vae.decoder.conv_out.weight.zero_()
    assert torch.equal(decoded(pipe.vae), ours)
    assert distance(decoded(copied.vae), expected) > 0.1
    handle.restore()
    assert torch.equal(decoded(pipe.vae), expected)
    assert is_fused(copied.vae)
    optimize(copied).restore()
    assert not is_fused(copied.vae)
    assert copied.vae.decoder.conv_in.weight.is_contiguous()


# --- what is kept ---------------------------------------------------------------------------------------------------


class Wrapper:
    """An engine of another library in a VAE's place."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        lambda: AsymmetricAutoencoderKL(down_block_out_channels=(32,), up_block_out_channels=(32,)),
        Wrapper,
    ],
    ids=["tiny", "asymmetric", "no module"],
)
def test_other_vaes_are_kept_and_named(make):
    vae = make()
    before = state(vae) if isinstance(vae, nn.Module) else None
    pipe = with_vae(vae)
    handle = optimize(pipe)
    name = type(vae).__name__
    assert handle.summary()["vae"][0]["reasons"] == ["diffopt does not know this decoder"]
    assert f"note: the decoder of {name} is not fused: diffopt does not know this decoder" in handle.report()
    assert (state(vae) if isinstance(vae, nn.Module) else None) == before


def test_a_pipeline_without_a_vae():
    pipe = with_vae(None)
    handle = optimize(pipe)
    assert handle.summary()["vae"] == []
    handle.restore()


def test_a_decoder_elsewhere_is_kept(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "_execution_device", DEVICE)  # else that of whichever model comes first
    pipe.vae.to("meta")
    handle = optimize(pipe)
    assert not is_fused(pipe.vae)
    assert f"is not fused: it runs on meta, the UNet on {DEVICE}" in handle.report()


def test_of_an_offloaded_vae_the_hook_says_where_it_runs(pipe):
    cpu, first, second = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    pipe.vae.to(cpu)
    assert not decoders.reasons(pipe.vae, cpu)
    assert decoders.reasons(pipe.vae, first)
    pipe.vae._hf_hook = SimpleNamespace(execution_device=0 if torch.cuda.is_available() else first)
    assert not decoders.reasons(pipe.vae, first)
    assert not decoders.reasons(pipe.vae, torch.device("cuda"))
    assert decoders.reasons(pipe.vae, second) == ["it runs on cuda:0, the UNet on cuda:1"]


def test_where_step_kernels_do_not_run_nothing_is_touched(pipe, monkeypatch):
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: ["no GPU"])
    before = state(pipe.vae)
    handle = optimize(pipe)
    assert state(pipe.vae) == before
    assert handle.summary()["vae"][0]["reasons"] == ["no GPU"]
    assert "the decoder of" not in handle.report(), "one note about all blocks is enough"


def test_weights_that_come_piece_by_piece_are_waited_for(pipe):
    expected = decoded(pipe.vae)
    optimize(pipe)
    cpu_offload(pipe.vae.decoder, execution_device=DEVICE)
    assert pipe.vae.decoder.conv_in.weight.is_meta
    assert distance(decoded(pipe.vae), expected) < CLOSE


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("first", [True, False], ids=["optimized first", "offloaded first"])
def test_offloading_keeps_working(offload, first):
    pipe = make_pipeline("bundled")
    z = latents(pipe.vae, 16, 16)
    expected = decoded(pipe.vae, z)
    if first:
        diffopt.optimize(pipe)
    pipe.to("cpu")
    getattr(pipe, offload)()
    handle = diffopt.optimize(pipe)
    assert distance(decoded(pipe.vae, z), expected) < 0.01
    assert handle.report()
