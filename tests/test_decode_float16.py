"""`decode="float16"`: bounds that hold, a scaled decoder that is the same decoder, and stock's way for all the rest."""

import copy
import dataclasses
import functools
import gc
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from pipelines import make_pipeline
from tiny_model import one_thread, tiny_pipeline  # noqa: F401
from torch import nn

import diffopt
from diffopt.bench.random_models import random_pipeline, random_prompt
from diffopt.bench.verify.decode_check import check_decode
from diffopt.errors import InputError, OptimizeError
from diffopt.measure.exactness import relative_l2
from diffopt.unet import decode_bounds, float16_decode, scaled_decoder
from diffopt.unet.float16_decode import ATTRIBUTE, CHANGED, NOT_FINITE
from diffopt.unet.scaled_decoder import LARGEST

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LIMIT = 246.0
OVERFLOWS = 3e4
"""What convolutions are multiplied by: a stream of about a hundred thousand."""

pytestmark = pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")


@functools.cache
def _random() -> Any:
    return random_pipeline("tiny-xl", device=DEVICE, dtype=torch.float16)


def tiny(gain: float = OVERFLOWS) -> Any:
    """A small SDXL whose UNet predicts zeros; every convolution of the decoder's resnets is `gain` times as large."""
    pipe = copy.deepcopy(_random())
    pipe.set_progress_bar_config(disable=True)
    for name, layer in pipe.vae.decoder.named_modules():
        if name.endswith(("conv1", "conv2")):
            layer.weight *= gain
    pipe.unet.forward = lambda sample, *_, **__: (torch.zeros_like(sample),)
    return pipe


@pytest.fixture
def pipe():
    return tiny()


def optimize(pipe: Any, decode: str | None = "float16") -> Any:
    return diffopt.optimize(pipe, attention="sdpa", capture=False, decode=decode)


def picture(pipe: Any, side: int = 64, **options: Any) -> torch.Tensor:
    prompt = random_prompt("tiny-xl", device=DEVICE, dtype=torch.float16)
    options = {"num_inference_steps": 1, "output_type": "pt", "guidance_scale": 1.0, **options}
    size = {} if "image" in options else {"width": side, "height": side}
    return pipe(**prompt, **size, **options, generator=torch.Generator().manual_seed(0)).images


def latents(height: int = 8, width: int = 8, batch: int = 1, size: float = 7.7) -> torch.Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1)).to(DEVICE) * size


def upcast(pipe: Any) -> Any:
    """Its VAE as the pipeline decodes with it."""
    return nn.Module.to(pipe.vae, torch.float32)


def decoded(vae: Any, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(z, return_dict=False)[0]


def row(handle: Any) -> dict[str, Any]:
    (found,) = handle.summary()["vae"]
    return found["decode"]


def state(module: nn.Module) -> dict[str, Any]:
    parameters = {name: (id(p), p.dtype, p.stride()) for name, p in module.named_parameters()}
    attributes = {name: sorted(m.__dict__) for name, m in module.named_modules()}
    return {"parameters": parameters, "attributes": attributes}


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_bits(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --- pictures -------------------------------------------------------------------------------------------------------


def test_a_decoder_that_overflows_in_float16_decodes_near_float32(pipe):
    assert not decoded(pipe.vae, latents().half()).isfinite().all(), "it does not overflow"
    expected = picture(pipe)
    handle = optimize(pipe)
    ours = picture(pipe)
    assert pipe.vae.dtype == torch.float16
    assert 0 < relative_l2(ours, expected) < 0.004
    assert ours.dtype == expected.dtype
    found = row(handle)
    assert (found["decodes"], found["stock"], found["reasons"]) == (1, {}, [])
    assert found["exponent"] > 8
    assert found["bound"] <= LARGEST
    assert f"VAE: decodes in float16: values scaled by down to 2^-{found['exponent']}, below 65504" in handle.report()


def test_scaled_by_powers_of_two_it_is_the_same_decoder_bit_for_bit(pipe):
    for parameter in pipe.vae.decoder.parameters():
        parameter.copy_((parameter.float() * 256).round() / 256)  # so that subnormal numbers lose no digit
    standing: Any = scaled_decoder.prove(pipe.vae, LIMIT)
    scaled = nn.Module.to(standing.decoder, torch.float32)
    assert any(norm.eps < 1e-6 for norm in scaled.modules() if isinstance(norm, nn.GroupNorm))
    with torch.no_grad():
        assert torch.equal(scaled(latents()), nn.Module.to(pipe.vae.decoder, torch.float32)(latents()))


def test_where_nothing_is_needed_nothing_is_scaled():
    pipe = tiny(gain=0.01)
    for name, layer in pipe.vae.decoder.named_modules():
        if name.endswith(("conv_in", "to_out.0")):
            layer.weight *= 0.01
    handle = optimize(pipe)
    assert row(handle)["exponent"] == 0
    copied = getattr(pipe.vae, ATTRIBUTE).proven.decoder
    assert same_bits(copied, bits(pipe.vae.decoder))
    assert all(norm.eps == 1e-6 for norm in copied.modules() if isinstance(norm, nn.GroupNorm))


def test_by_default_stock_decodes(pipe):
    expected = picture(pipe)
    handle = optimize(pipe, None)
    assert torch.equal(picture(pipe), expected)
    assert handle.decode == "stock"
    assert "decode" not in handle.summary()["vae"][0]
    assert not float16_decode.is_on(pipe.vae)


@pytest.mark.parametrize("enable", ["enable_tiling", "enable_slicing"])
def test_tiles_and_slices(pipe, enable):
    handle = optimize(pipe)
    vae = upcast(pipe)
    whole = decoded(vae, latents(12, 10, batch=2))
    getattr(vae, enable)()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 64
    z = latents(12, 10, batch=2)
    ours = decoded(vae, z)
    assert (relative_l2(ours, whole) > 0.01) == (enable == "enable_tiling")
    assert row(handle)["decodes"] == 2
    handle.restore()
    assert relative_l2(ours, decoded(vae, z)) < 0.004


def test_on_fused_blocks(pipe, monkeypatch):
    """In Triton's interpreter where there is no GPU."""
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])
    expected = picture(pipe, side=16)
    handle = optimize(pipe)
    assert handle.summary()["vae"][0]["fused"]
    assert "forward" in getattr(pipe.vae, ATTRIBUTE).proven.decoder.conv_norm_out.__dict__
    assert relative_l2(picture(pipe, side=16), expected) < 0.004
    assert row(handle)["decodes"] == 1
    handle.restore()
    assert torch.equal(picture(pipe, side=16), expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_true_size_decoder_on_fused_kernels():
    pipe = make_pipeline("sdxl")
    handle = optimize(pipe)
    found = check_decode(pipe, torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    assert found.passed, found.verdict()
    assert handle.summary()["vae"][0]["fused"]


# --- bounds ---------------------------------------------------------------------------------------------------------


def measured(decoder: nn.Module, z: torch.Tensor) -> dict[str, float]:
    """The largest absolute value that each layer writes."""
    seen: dict[str, float] = {}

    def hook_for(name: str) -> Any:
        return lambda module, _, output: seen.__setitem__(name, output.abs().max().item())

    kinds = (nn.Conv2d, nn.GroupNorm, nn.Linear)
    named = [(name, module) for name, module in decoder.named_modules() if isinstance(module, kinds)]
    named += [(name, module) for name, module in decoder.named_modules() if name.split(".")[-2:-1] == ["resnets"]]
    hooks = [module.register_forward_hook(hook_for(name)) for name, module in named]
    try:
        with torch.no_grad():
            decoder(z)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def assert_bounded(decoder: Any, z: torch.Tensor) -> float:
    """Nothing exceeds its bound; the largest share of one that was reached."""
    found = decode_bounds.bounds(decoder, None, latent_pixels=z.shape[-2] * z.shape[-1], latent_limit=LIMIT)
    limits = {**found.streams, **found.others}
    seen = {name.removesuffix(".to_out.0") + ".to_out" if name.endswith("to_out.0") else name: value
            for name, value in measured(decoder, z).items()}  # fmt: skip
    assert set(seen) <= set(limits)
    shares = {name: value / limits[name] for name, value in seen.items()}
    assert max(shares.values()) <= 1, max(shares.items(), key=lambda item: item[1])
    return max(shares.values())


def trained_like(seed: int) -> Any:
    """A decoder in float32 with weights of many sizes, biases that matter and channels that agree."""
    decoder = tiny(1.0).vae.decoder.float()
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape, generator=generator).to(DEVICE)
        else:
            parameter += parameter.std() * torch.randn(parameter.shape[1:], generator=generator).to(DEVICE)
            parameter *= torch.rand(1, generator=generator).to(DEVICE) * 5
    return decoder


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3), (9, 9)], ids=str)
def test_no_value_exceeds_its_bound(seed, size):
    decoder = trained_like(seed)
    spike = torch.zeros(1, 4, *size, device=DEVICE)
    spike[..., 0, 0] = LIMIT
    for z in (latents(*size), latents(*size).sign() * LIMIT, spike, torch.full_like(spike, LIMIT), spike * 0):
        assert_bounded(decoder, z)


@pytest.mark.parametrize("seed", range(2))
def test_no_latents_that_are_searched_for_exceed_a_bound(seed):
    decoder = trained_like(seed)
    block: Any = decoder.up_blocks[-1].resnets[-1]
    z = latents(4, 4)
    written: list[torch.Tensor] = []
    hook = block.register_forward_hook(lambda module, _, output: written.append(output))
    for _ in range(30):
        z.requires_grad_(True)
        decoder(z)
        (slope,) = torch.autograd.grad(written.pop().abs().max(), z)
        z = (z.detach() + slope.sign() * LIMIT / 10).clamp(-LIMIT, LIMIT)
    hook.remove()
    assert_bounded(decoder, z)


def test_a_spike_comes_near_the_bound_of_what_follows_a_norm():
    """The bound is not just a large number: one pixel with all that a norm can give reaches a good part of it."""
    block: Any = copy.deepcopy(tiny(1.0).vae.decoder.float().up_blocks[-1].resnets[0])
    block.norm1.weight.fill_(1.0)
    block.norm1.bias.zero_()
    pixels = 64
    normed = decode_bounds._Walk(pixels)._normed("norm1", block.norm1, 9)
    bound = decode_bounds._width(decode_bounds._of_normed(block.conv1, normed))
    most = 0.0
    for channel in range(block.conv1.out_channels):
        patch = block.conv1.weight[channel]
        image = torch.zeros(1, patch.shape[0], 8, 8, device=DEVICE)
        image[0, :, 3:6, 3:6] = patch.clamp(min=0) * 1e6
        with torch.no_grad():
            most = max(most, block.conv1(block.nonlinearity(block.norm1(image)))[0, channel, 4, 4].item())
    assert 0.4 * bound < most <= bound


def test_upsampled_pixels_are_read_as_convolutions_read_them():
    """`_halves` against the image at twice its size."""
    kernel, row = torch.randn(3).double(), torch.randn(6).double()
    large = nn.functional.conv1d(row.repeat_interleave(2)[None, None], kernel[None, None], padding=1)[0, 0]
    for place in range(1, 11):
        found = [kernel[slice(*taps)].sum() * row[where] for where, taps in decode_bounds._halves(place, 6)]
        assert torch.allclose(found[0] + found[1], large[place])


def test_larger_pictures_have_larger_bounds_and_scaled_weights_smaller_ones(pipe):
    def largest(side: int) -> float:
        decoder = pipe.vae.decoder
        return decode_bounds.bounds(decoder, None, latent_pixels=side**2, latent_limit=LIMIT).largest

    assert largest(8) < largest(16) < largest(256)
    streams = decode_bounds.bounds(pipe.vae.decoder, None, latent_pixels=256**2, latent_limit=LIMIT).streams
    exponents = scaled_decoder.exponents_for(streams, LARGEST)
    scaled = scaled_decoder.scaled(pipe.vae.decoder, exponents)
    again = decode_bounds.bounds(scaled, None, latent_pixels=256**2, latent_limit=LIMIT).streams
    for name, bound in streams.items():
        ours = bound * 2.0 ** -exponents.of_output(name if not name.endswith("to_out") else f"{name}.0")
        assert again[name] == pytest.approx(ours, rel=1e-3)


def test_what_nothing_can_be_proven_for_is_refused():
    pipe = tiny(1.0)
    pipe.vae.decoder.conv_norm_out.weight.fill_(1e4)  # a norm's outputs can't be scaled
    expected = picture(pipe)
    handle = optimize(pipe)
    (reason,) = row(handle)["reasons"]
    assert "nothing proves that conv_out stays below 65504" in reason
    assert "VAE: decodes as stock, decode='float16' has no effect: nothing proves" in handle.report()
    assert torch.equal(picture(pipe), expected)
    handle.restore()
    assert ATTRIBUTE not in pipe.vae.__dict__


def test_weights_that_would_lose_digits_are_refused():
    pipe = tiny(1.0)
    pipe.vae.decoder.conv_in.weight *= 1e-3  # the first norm reads what it writes, and in a range with all that follows
    pipe.vae.decoder.mid_block.resnets[0].conv2.weight *= 3e4
    (reason,) = row(optimize(pipe))["reasons"]
    assert "where weights of conv_in lose digits" in reason


def test_weights_that_are_not_finite_are_refused(pipe):
    pipe.vae.decoder.conv_in.weight[0] = torch.nan
    assert row(optimize(pipe))["reasons"] == ["its weights are not finite"]


# --- the certificate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.0, OVERFLOWS])
def test_the_certificate(gain):
    pipe = tiny(gain)
    before = bits(pipe.vae)
    optimize(pipe)
    found = check_decode(pipe, latents(batch=2, size=1.0))
    assert found.passed, found.verdict()
    assert found.verdict().startswith("passed")
    assert (found.float16 == float("inf")) == (gain == OVERFLOWS)
    assert found.fault > found.allowed
    assert same_bits(pipe.vae, before)


def test_a_scale_that_was_forgotten_fails_the_certificate(pipe):
    optimize(pipe)
    standing = getattr(pipe.vae, ATTRIBUTE)
    for norm in (m for m in standing.proven.decoder.modules() if isinstance(m, nn.GroupNorm)):
        norm.eps = 1e4  # nothing is scaled as if eps had been left alone
    assert not check_decode(pipe, latents(size=1.0)).passed
    pipe = tiny(10.0)
    optimize(pipe)
    getattr(pipe.vae, ATTRIBUTE).proven.decoder.up_blocks[0].resnets[0].conv2.weight.mul_(8)
    found = check_decode(pipe, latents(size=1.0))
    assert not found.passed
    assert not found.void
    assert found.verdict().startswith("FAILED")


def test_no_certificate_of_what_decodes_as_stock(pipe):
    with pytest.raises(OptimizeError, match="decodes as stock does"):
        check_decode(pipe, latents(size=1.0))
    optimize(pipe)
    with pytest.raises(OptimizeError, match="its latents exceed 246"):
        check_decode(pipe, latents(size=100.0))


# --- stock's way ----------------------------------------------------------------------------------------------------


def goes_stocks_way(pipe: Any, z: torch.Tensor, reason: str) -> None:
    handle = optimize(pipe)
    ours = decoded(upcast(pipe), z)
    assert row(handle)["stock"] == {reason: 1}
    assert row(handle)["decodes"] == 0
    assert f"VAE: decoded as stock: 1 times: {reason}" in handle.report()
    handle.restore()
    assert torch.equal(ours, decoded(pipe.vae, z))


def test_latents_beyond_the_limit(pipe):
    goes_stocks_way(pipe, latents(size=100.0), "its latents exceed 246")


def test_pictures_beyond_the_limit(pipe):
    optimize(pipe)
    standing = getattr(pipe.vae, ATTRIBUTE)
    standing.proven = dataclasses.replace(standing.proven, side=63)
    goes_stocks_way(pipe, latents(), "the picture has more than 63×63 pixels")


def test_what_is_not_finite_all_the_same(pipe):
    optimize(pipe)
    getattr(pipe.vae, ATTRIBUTE).proven.decoder.up_blocks[0].resnets[0].conv1.weight.fill_(6e4)
    goes_stocks_way(pipe, latents(), NOT_FINITE)


def test_an_infinity_in_any_stream_reaches_the_picture(pipe):
    """So a finite picture had none."""
    optimize(pipe)
    decoder = getattr(pipe.vae, ATTRIBUTE).proven.decoder
    streams = [name for name, module in decoder.named_modules() if name.endswith(("conv_in", "conv1", "conv2", "conv"))]
    for name in (*streams, "mid_block.attentions.0.to_out.0"):
        layer = decoder.get_submodule(name)

        def overflow(module: Any, _: Any, output: torch.Tensor) -> None:
            output.view(-1)[7] = torch.inf

        hook = layer.register_forward_hook(overflow)
        with torch.no_grad():
            assert not decoder(latents().half()).isfinite().all(), name
        hook.remove()


def test_weights_that_changed_in_any_way(pipe):
    def write(vae: Any) -> None:
        vae.decoder.conv_in.weight.data[0, 0, 0, 0] += 1  # no version is counted

    def load(vae: Any) -> None:
        vae.load_state_dict({name: value * 2 for name, value in vae.state_dict().items()})

    def hook(vae: Any) -> None:
        vae.decoder.conv_in.register_forward_hook(lambda *_: None)

    def wrap(vae: Any) -> None:
        vae.decoder.conv_in.padding_mode = "circular"

    for change in (write, load, hook, wrap):
        pipe = tiny(10.0)
        handle = optimize(pipe)
        change(pipe.vae)
        decoded(upcast(pipe), latents())
        assert row(handle)["stock"] == {CHANGED: 1}


def test_a_decode_in_float16_itself_is_stocks(pipe):
    handle = optimize(pipe)
    assert not decoded(pipe.vae, latents().half()).isfinite().all()
    assert row(handle)["stock"] == {"stock decodes it in float16, too": 1}


def test_gradients_are_stocks(pipe):
    handle = optimize(pipe)
    z = latents().requires_grad_(True)
    upcast(pipe).decode(z).sample.sum().backward()
    assert z.grad is not None
    assert row(handle)["stock"] == {"gradients or autocast are on": 1}


def test_pipelines_without_a_use_for_it():
    pipe = random_pipeline("tiny-xl", device=DEVICE, dtype=torch.float32)
    handle = optimize(pipe)
    assert row(handle)["reasons"] == ["stock decodes it in float32, its own dtype"]
    assert "decode='float16' has no effect: stock decodes it in float32" in handle.report()
    for kind in ("tiny", "fp16-fix"):
        pipe = random_pipeline("tiny-xl" if kind == "fp16-fix" else kind, device=DEVICE, dtype=torch.float16)
        if kind == "fp16-fix":
            pipe.vae.register_to_config(force_upcast=False)
        assert row(optimize(pipe))["reasons"] == ["stock decodes it in float16, too"]
        assert "decode" not in pipe.vae.__dict__


def test_an_offloaded_vae_is_stocks(pipe):
    pipe.vae._hf_hook = object()
    assert row(optimize(pipe))["reasons"] == ["it is offloaded"]


# --- encoding -------------------------------------------------------------------------------------------------------


def test_encoding_is_stocks_bit_for_bit(pipe):
    to_image = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, dtype=torch.float16)
    to_image.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    options = {"image": image, "strength": 1.0, "num_inference_steps": 2}
    expected, whole = picture(to_image, output_type="latent", **options), picture(to_image, **options)
    before = bits(pipe.vae)
    handle = optimize(to_image)
    assert torch.equal(picture(to_image, output_type="latent", **options), expected)
    assert same_bits(pipe.vae, before)
    assert 0 < relative_l2(picture(to_image, **options), whole) < 0.004
    assert row(handle)["decodes"] == 1


# --- the way there and back -----------------------------------------------------------------------------------------


def test_restoring_gives_everything_back(pipe):
    before, values, expected = state(pipe.vae), bits(pipe.vae), picture(pipe)
    handle = optimize(pipe)
    assert state(pipe.vae)["parameters"] == before["parameters"]
    assert same_bits(pipe.vae, values)
    picture(pipe)
    handle.restore()
    assert state(pipe.vae) == before
    assert same_bits(pipe.vae, values)
    assert torch.equal(picture(pipe), expected)
    with diffopt.optimized(pipe, attention="sdpa", decode="float16") as handle:
        picture(pipe)
        assert row(handle)["decodes"] == 1
    assert state(pipe.vae) == before


def test_optimizing_again(pipe):
    handle = optimize(pipe)
    standing = getattr(pipe.vae, ATTRIBUTE)
    assert optimize(pipe) is handle
    assert optimize(pipe, None) is handle
    assert getattr(pipe.vae, ATTRIBUTE) is standing
    with pytest.raises(OptimizeError, match="already optimized with decode='float16'; call restore"):
        optimize(pipe, "stock")
    pipe.vae.decoder.conv_in.weight.mul_(2)
    assert optimize(pipe) is handle
    assert getattr(pipe.vae, ATTRIBUTE) is not standing
    picture(pipe)
    assert row(handle)["decodes"] == 1


def test_a_new_vae_is_named_and_served_by_optimizing_again(pipe):
    handle = optimize(pipe)
    old, pipe.vae = pipe.vae, tiny().vae
    assert row(handle)["reasons"] == ["it is new here; optimize() again changes that"]
    optimize(pipe)
    assert row(handle)["reasons"] == []
    handle.restore()
    assert ATTRIBUTE not in old.__dict__
    assert ATTRIBUTE not in pipe.vae.__dict__


def test_an_unknown_value_is_refused(pipe):
    with pytest.raises(InputError, match="decode: 'float8' is not possible; known: stock, float16"):
        optimize(pipe, "float8")
    assert ATTRIBUTE not in pipe.vae.__dict__


def test_pipelines_that_share_a_vae(pipe):
    other = tiny()
    other.vae = pipe.vae
    first = optimize(pipe)
    with pytest.raises(OptimizeError, match="its VAE is already optimized for another pipeline with decode='float16'"):
        optimize(other, "stock")
    second = optimize(other)
    assert first is not second
    first.restore()
    picture(other)
    assert row(second)["decodes"] == 1
    second.restore()
    assert not float16_decode.is_on(pipe.vae)
    optimize(pipe, "stock")
    with pytest.raises(OptimizeError, match="with decode='stock'"):
        optimize(other)


def test_pipelines_that_share_all_are_counted(pipe):
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, dtype=torch.float16)
    handle = optimize(pipe)
    assert optimize(other) is handle
    assert len(handle.summary()["vae"]) == 1
    handle.restore()
    assert float16_decode.is_on(pipe.vae)
    handle.restore()
    assert not float16_decode.is_on(pipe.vae)


def test_a_deep_copy_is_independent(pipe):
    optimize(pipe)
    copied = copy.deepcopy(pipe)
    getattr(copied.vae, ATTRIBUTE).proven.decoder.conv_out.weight.zero_()
    ours = picture(pipe)
    assert relative_l2(picture(copied), ours) > 0.1
    assert getattr(copied.vae, ATTRIBUTE).decodes == 1
    optimize(copied).restore()
    assert ATTRIBUTE not in copied.vae.__dict__
    assert torch.equal(picture(pipe), ours)


def test_a_decode_put_around_ours_stays(pipe):
    expected = picture(pipe)
    handle = optimize(pipe)
    inner, calls = pipe.vae.decode, []
    pipe.vae.decode = lambda *arguments, **keywords: calls.append(1) or inner(*arguments, **keywords)
    assert not torch.equal(picture(pipe), expected)
    handle.restore()
    assert torch.equal(picture(pipe), expected)
    assert len(calls) == 2


def test_compiled_on_top(pipe):
    handle = optimize(pipe)
    ours = picture(pipe)
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    try:
        assert torch.equal(picture(pipe), ours)
    finally:
        torch._dynamo.reset()
    assert row(handle)["decodes"] == 2


def test_saving(pipe, tmp_path):
    before = bits(pipe.vae)
    optimize(pipe)
    pipe.vae.save_pretrained(tmp_path)
    again = type(pipe.vae).from_pretrained(tmp_path, dtype=torch.float16)
    assert same_bits(again, before)


def test_what_is_collected_no_longer_counts(pipe):
    vae, other = pipe.vae, tiny()
    other.vae = vae
    handle, _ = optimize(pipe), optimize(other)
    del other, _
    gc.collect()
    handle.restore()
    assert not float16_decode.is_on(vae)
