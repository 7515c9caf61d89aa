"""Where blocks hand their convolutions and feed-forwards to the products of Hopper GPUs: stand-ins on a CPU.

What stands in computes as the references do and counts, so that these tests see which calls were handed over with what;
the kernels themselves are checked in test_step_products.py.
"""

import collections

import pytest
import torch
import upsampling
from diffusers import AutoencoderKL
from diffusers.models.activations import GEGLU
from peft import LoraConfig
from pipelines import distance
from test_unet_fused import DEVICE, output, tiny_unet
from tiny_model import one_thread  # noqa: F401
from torch import nn

from diffopt.unet import decoders, forwards, fused
from diffopt_kernels.step import check, products, reference
from diffopt_kernels.step.upsampled_convolution import upsampled_convolution_reasons

WIDE = {"block_out_channels": (64, 128), "attention_head_dim": 2}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="stand-ins for a machine without a GPU")


@pytest.fixture(name="calls")
def _calls(monkeypatch) -> collections.Counter[str]:
    """A CPU that has products, in float32: how often which ran, convolutions with a residual apart."""
    counter: collections.Counter[str] = collections.Counter()

    def convolution(x, weight, bias, residual=None, stride=1):
        assert not products.convolution_reasons(x, weight, bias, residual, stride)
        counter["convolution" if residual is None else "convolution with residual"] += 1
        out = reference.convolution_reference(x, weight, bias, residual, stride=stride, dtype=torch.float32)
        return out.contiguous(memory_format=torch.channels_last)

    def geglu_product(x, weight, bias):
        assert not products.geglu_product_reasons(x, weight, bias)
        counter["geglu"] += 1
        return reference.geglu_product_reference(x, weight, bias, dtype=torch.float32)

    def upsampled_convolution(x, sums, bias):
        assert not upsampled_convolution_reasons(x, sums, bias)
        counter["upsampled convolution"] += 1
        return upsampling.upsampled_convolution(x, sums, bias)

    monkeypatch.setattr(forwards.kernels, "upsampled_convolution", upsampled_convolution)
    monkeypatch.setattr(forwards, "has_products", lambda device: True)
    monkeypatch.setattr(fused, "product_device_reasons", lambda device: [])
    monkeypatch.setattr(products, "has_products", lambda device: True)
    monkeypatch.setattr(products, "DTYPES", (torch.float32,))
    monkeypatch.setattr(products, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(forwards.kernels, "convolution", convolution)
    monkeypatch.setattr(forwards.kernels, "geglu_product", geglu_product)
    return counter


def three_by_three(unet: nn.Module) -> list[nn.Conv2d]:
    found = [x for x in unet.modules() if type(x) is nn.Conv2d and x.kernel_size == (3, 3)]
    return [x for x in found if x.in_channels % 64 == 0 and x.out_channels % 64 == 0]


def test_every_fitting_layer_is_handed_over_and_the_output_is_that_of_stock(calls) -> None:
    unet = tiny_unet(**WIDE)
    expected = output(unet)
    resnets = sum("resnets" in name and name.endswith("conv2") for name, _ in unet.named_modules())
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5
    assert calls["convolution with residual"] == resnets > 0
    assert calls["upsampled convolution"] == 1
    assert calls["convolution"] == len(three_by_three(unet)) - resnets - 1 > resnets
    assert calls["geglu"] == sum(type(module) is GEGLU for module in unet.modules()) > 0
    assert fused.summary(unet)["fused"]["Conv2d"] >= len(three_by_three(unet))
    assert not fused.summary(unet)["kept"]
    fused.take_off(unet)
    assert not any("forward" in module.__dict__ for module in unet.modules())
    assert torch.equal(output(unet), expected)


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_a_changed_weight_shows(calls, name: str) -> None:
    unet = tiny_unet(**WIDE)
    expected = output(unet)
    fused.put_on(unet)
    getattr(unet.mid_block.resnets[0], name).weight.mul_(1.01)
    assert distance(output(unet), expected) > 1e-5


def test_a_bias_of_the_feed_forward_shows(calls) -> None:
    """It is added before the last product, which adds itself to the sum."""
    unet = tiny_unet(**WIDE)
    fused.put_on(unet)
    expected = output(unet)
    unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].bias.add_(0.5)
    changed = output(unet)
    assert distance(changed, expected) > 1e-4
    fused.take_off(unet)
    assert distance(changed, output(unet)) < 1e-5


def test_what_is_not_plain_is_not_handed_over(calls) -> None:
    """A hook, other padding, an adapter on a convolution and one on the feed-forward: stock's computation there."""
    unet = tiny_unet(**WIDE)
    fused.put_on(unet)
    output(unet)
    before = collections.Counter(calls)
    resnet = unet.mid_block.resnets[0]
    resnet.conv1.register_forward_hook(lambda *_: None)
    resnet.conv2.padding_mode = "circular"
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.ff.net[0].proj.register_forward_hook(lambda *_: None)
    calls.clear()
    ours = output(unet)
    assert calls["convolution"] == before["convolution"] - 1
    assert calls["convolution with residual"] == before["convolution with residual"] - 1
    assert calls["geglu"] == before["geglu"] - 1
    fused.take_off(unet)
    resnet.conv2.padding_mode = "zeros"
    assert distance(ours, output(unet)) > 1e-5, "circular padding was forgotten"


def test_adapters_on_convolutions_and_feed_forwards_count(calls) -> None:
    unet = tiny_unet(**WIDE)
    fused.put_on(unet)
    expected = output(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1", "conv2", "net.0.proj", "net.2"], init_lora_weights=False))
    with_adapter = output(unet)
    assert distance(with_adapter, expected) > 1e-3
    fused.take_off(unet)
    assert distance(with_adapter, output(unet)) < 1e-5


def test_dropout_in_training_and_odd_widths_run_as_they_came(calls) -> None:
    unet = tiny_unet()  # channels 16 and 32
    expected = output(unet)
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5
    assert not calls["convolution"] + calls["convolution with residual"]
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    assert forwards._last_linear(block.ff) is block.ff.net[2]
    block.ff.net[1].p = 0.5
    assert forwards._last_linear(block.ff) is block.ff.net[2], "in inference dropout does nothing"
    block.ff.net[1].train()
    assert forwards._last_linear(block.ff) is None


@pytest.mark.parametrize(
    ("shape", "columns", "residual", "ours"),
    [
        ((2, 320, 64, 64), 320, False, True),
        ((2, 320, 128, 128), 320, True, True),
        ((2, 320, 128, 128), 320, False, False),
        ((1, 512, 512, 512), 256, False, False),
    ],
)
def test_cudnn_keeps_what_it_is_faster_at(monkeypatch, shape, columns: int, residual: bool, ours: bool) -> None:
    monkeypatch.setattr(products, "_multiprocessors", lambda device: 132)
    x = torch.empty(shape, device="meta", dtype=torch.float16)
    assert products.favours_convolution(x, columns, residual=residual) is ours


def tiny_vae(channels: tuple[int, int]) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    return vae.eval().requires_grad_(False)


def test_a_decoder_hands_its_convolutions_over_too(calls) -> None:
    vae = tiny_vae((64, 128))
    latents = torch.randn(2, 4, 3, 5)
    expected = vae.decode(latents).sample.detach()
    fused.put_on(vae.decoder, decoders.STAGES)
    with torch.no_grad():
        assert distance(vae.decode(latents).sample, expected) < 1e-5
        resnets = sum(name.endswith("conv2") for name, _ in vae.decoder.named_modules())
        assert calls["convolution with residual"] == resnets > 0
        assert calls["upsampled convolution"] == 1
        assert calls["convolution"] == len(three_by_three(vae.decoder)) - resnets - 1 >= resnets
        fused.take_off(vae.decoder)
        assert not any("forward" in module.__dict__ for module in vae.modules())
        assert torch.equal(vae.decode(latents).sample, expected)


def test_with_a_triton_that_cannot_compile_them_blocks_are_fused_without_products(calls, monkeypatch) -> None:
    """Nor does the step kernels' check look at them, whose one verdict would turn the norms off, too."""
    assert check.runs("convolution", torch.float32, torch.device("cpu"))
    hopper = torch.device("cuda", 0)
    monkeypatch.setattr(products, "device_reasons", lambda device: [])
    monkeypatch.setattr(products, "interpreted", lambda: False)
    monkeypatch.setattr(products, "compute_capability", lambda device: (9, 0))
    assert not products.product_device_reasons(hopper)
    monkeypatch.setattr("triton.__version__", "3.5.1+git")
    assert products.product_device_reasons(hopper) == ["Triton is 3.5.1+git; allowed: 3.6 or newer"]
    for module in (products, forwards):
        monkeypatch.setattr(module, "has_products", lambda device: not products.product_device_reasons(hopper))
    monkeypatch.setattr(fused, "product_device_reasons", lambda device: products.product_device_reasons(hopper))
    assert not any(check.runs(op, torch.float32, torch.device("cpu")) for op in check.PRODUCTS)
    assert check.runs("group_norm", torch.float32, torch.device("cpu"))
    unet = tiny_unet(**WIDE)
    expected = output(unet)
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5
    assert not calls
    counts = fused.summary(unet)["fused"]
    assert counts["Conv2d"] == 2, "the first and the last, which run everywhere"
    assert counts["ResnetBlock2D"]


def test_without_such_a_gpu_only_thin_convolutions_become_ours() -> None:
    unet = tiny_unet(**WIDE)
    fused.put_on(unet)
    assert [name for name, x in unet.named_modules() if type(x) is nn.Conv2d and fused.is_ours(x)] == [
        "conv_in",
        "conv_out",
    ]


def test_where_our_kernels_do_not_run_no_convolution_becomes_ours(monkeypatch) -> None:
    for name in ("device_reasons", "product_device_reasons"):
        monkeypatch.setattr(fused, name, lambda device: ["a GPU too old"])
    unet = tiny_unet(**WIDE)
    fused.put_on(unet)
    assert "Conv2d" not in fused.summary(unet)["fused"]


@pytest.fixture(name="thin")
def _thin(monkeypatch) -> list[tuple[int, int]]:
    """Channels in and out of what `thin_convolution` is called for."""
    seen = []
    ours = forwards.kernels.thin_convolution

    def thin_convolution(x, weight, bias):
        seen.append((x.shape[1], weight.shape[0]))
        return ours(x, weight, bias)

    monkeypatch.setattr(forwards.kernels, "thin_convolution", thin_convolution)
    return seen


def test_the_first_and_the_last_convolution_of_a_unet(thin) -> None:
    """Latents are read as they come, in one dtype; what is not plain is not handed over."""
    unet = tiny_unet(block_out_channels=(32, 64))
    expected = output(unet)
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5
    assert thin == [(4, 32), (32, 4)]
    unet.conv_in.register_forward_hook(lambda *_: None)
    unet.conv_out.padding_mode = "circular"
    assert distance(output(unet), expected) > 1e-5, "circular padding was forgotten"
    assert len(thin) == 2
    with torch.enable_grad():
        unet.conv_out(torch.randn(1, 32, 4, 4))
    assert len(thin) == 2


@pytest.mark.parametrize("name", ["conv_in", "conv_out"])
def test_a_changed_weight_of_theirs_shows(thin, name: str) -> None:
    unet = tiny_unet(block_out_channels=(32, 64))
    fused.put_on(unet)
    expected = output(unet)
    getattr(unet, name).weight.mul_(1.01)
    assert distance(output(unet), expected) > 1e-5


def test_the_first_and_the_last_convolution_of_a_decoder(thin) -> None:
    vae = tiny_vae((32, 64))
    latents = torch.randn(2, 4, 3, 5)
    expected = vae.decode(latents).sample.detach()
    fused.put_on(vae.decoder, decoders.STAGES)
    with torch.no_grad():
        assert distance(vae.decode(latents).sample, expected) < 1e-5
    assert thin == [(4, 64), (32, 3)]


def test_other_convolutions_are_not_thin(thin) -> None:
    for conv in (nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Conv2d(4, 8, 3)):
        with torch.no_grad():
            x = torch.randn(1, 4, 6, 6)
            assert torch.equal(forwards.convolution(conv, x), conv(x))
    assert not thin
