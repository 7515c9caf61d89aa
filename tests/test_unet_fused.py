"""Blocks on the step kernels: the same output as diffusers', what is kept, and the way back. Kernels interpreted."""

import copy
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from adapters import random_lora
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig
from pipelines import distance
from quantized import quantized
from recorders import norms_without_kernels
from tiny_model import one_thread, tiny_pipeline  # noqa: F401
from torch import nn

import diffopt
from diffopt.attention.processors import DiffoptAttnProcessor, DiffoptFusedAttnProcessor
from diffopt.attention.shared import one_run
from diffopt.unet import decoders, forwards, fused, graphs, sharing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW_GROUPS = {"norm_num_groups": 2}  # each is a program, and programs are interpreted
BOTH_KINDS = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
SKIPS = [(32, 32), (32, 16), (32, 16), (16, 16)]  # channels of the up blocks' states, and of what is concatenated


def tiny_unet(**options) -> nn.Module:
    unet = tiny_pipeline(**{**FEW_GROUPS, **options}).unet.eval().requires_grad_(False).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():  # biases that are forgotten must show, and norms that are no norms
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape, generator=generator).to(DEVICE) * 0.2
    return unet


def inputs(side: int = 4, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(batch, 4, side, side, generator=generator)
    return sample.to(DEVICE), torch.tensor(7, device=DEVICE), torch.randn(batch, 77, 16, generator=generator).to(DEVICE)


def output(unet, *arguments, **keywords) -> torch.Tensor:
    with torch.no_grad():
        return unet(*(arguments or inputs()), return_dict=False, **keywords)[0]


@pytest.mark.parametrize("stages", [(fused.NORMS,), (fused.ROWS,), (fused.NORMS, fused.ROWS)], ids="+".join)
@pytest.mark.parametrize("options", [{"norm_num_groups": 8}, {"use_linear_projection": True}], ids=str)
def test_the_output_is_that_of_stock(stages, options):
    unet = tiny_unet(**options)
    expected = output(unet)
    fused.put_on(unet, frozenset(stages))
    ours = output(unet)
    assert distance(ours, expected) < 1e-5
    assert not torch.equal(ours, expected), "the kernels did not run"


def test_a_planted_fault_shows():
    unet = tiny_unet()
    expected = output(unet)
    fused.put_on(unet)
    unet.mid_block.resnets[0].norm2.weight.mul_(1.01)
    assert distance(output(unet), expected) > 1e-4


def test_odd_sizes_and_masks():
    unet = tiny_unet()
    sample, timestep, context = inputs(side=6, batch=1)
    mask = torch.ones(1, 77, device=DEVICE)
    mask[:, 40:] = 0
    arguments = (sample[..., :4], timestep, context)
    expected = output(unet, *arguments, encoder_attention_mask=mask)
    fused.put_on(unet)
    assert distance(output(unet, *arguments, encoder_attention_mask=mask), expected) < 1e-5


def test_every_kind_is_fused_and_restored_exactly():
    unet = tiny_unet(**BOTH_KINDS)
    expected = output(unet)
    parameters = {name: (id(p), p.data.clone(), p.stride()) for name, p in unet.named_parameters()}
    fused.put_on(unet)
    counts = fused.summary(unet)
    blocks = (ResnetBlock2D, UpBlock2D, CrossAttnUpBlock2D)
    for kind in (*blocks, Transformer2DModel, BasicTransformerBlock, GEGLU, nn.GroupNorm):
        there = sum(type(module) is kind for module in unet.modules())
        assert counts["fused"][kind.__name__] == there > 0
    assert not counts["kept"]
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    fused.put_on(unet)  # once more changes nothing
    fused.take_off(unet)
    assert not any("forward" in module.__dict__ for module in unet.modules())
    assert fused.LAYOUT not in unet.__dict__
    for name, parameter in unet.named_parameters():
        identity, values, strides = parameters[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, values)
        assert parameter.stride() == strides
    assert torch.equal(output(unet), expected)


def test_weights_that_were_channels_last_stay_so():
    unet = tiny_unet().to(memory_format=torch.channels_last)
    fused.put_on(unet)
    fused.take_off(unet)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not unet.conv_in.weight.is_contiguous()


def test_a_deep_copy_is_independent():
    unet = tiny_unet()
    expected = output(unet)
    fused.put_on(unet)
    twin = copy.deepcopy(unet)
    twin.mid_block.resnets[0].conv1.weight.zero_()
    assert distance(output(unet), expected) < 1e-5
    assert distance(output(twin), expected) > 1e-3
    fused.take_off(twin)
    assert twin.conv_in.weight.is_contiguous()
    assert fused.summary(unet)["fused"]


def test_adapters_that_wrap_layers_are_called():
    pipe = tiny_pipeline(**FEW_GROUPS)
    pipe.unet.to(DEVICE)
    weights = random_lora(pipe.unet)
    generator = torch.Generator().manual_seed(3)
    inside = [f"mid_block.resnets.0.{name}" for name in ("conv1", "conv2", "time_emb_proj")]
    for name in (*inside, "up_blocks.0.resnets.0.conv_shortcut"):
        weight = pipe.unet.get_submodule(name).weight
        weights[f"unet.{name}.lora_A.weight"] = torch.randn(4, *weight.shape[1:], generator=generator) * 0.3
        ones = (1,) * (weight.dim() - 2)
        weights[f"unet.{name}.lora_B.weight"] = torch.randn(weight.shape[0], 4, *ones, generator=generator) * 0.3
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    for name, linear in (("ff.net.0.proj", block.ff.net[0].proj), ("ff.net.2", block.ff.net[2])):
        path = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.{name}"
        weights[f"{path}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=generator)
        weights[f"{path}.lora_B.weight"] = torch.randn(linear.out_features, 4, generator=generator)
    plain = output(pipe.unet)
    fused.put_on(pipe.unet)
    pipe.load_lora_weights(weights, adapter_name="test")
    ours = output(pipe.unet)
    fused.take_off(pipe.unet)
    expected = output(pipe.unet)
    assert distance(expected, plain) > 0.05
    assert distance(ours, expected) < 1e-5


def test_hooks_are_called():
    unet = tiny_unet()
    fused.put_on(unet)
    called = []
    for module in (unet.mid_block.resnets[0].conv1, unet.mid_block.resnets[0].norm2, unet.conv_norm_out):
        module.register_forward_hook(lambda module, *_: called.append(module))
    norm = unet.mid_block.attentions[0].transformer_blocks[0].norm2
    norm.register_forward_hook(lambda module, *_: called.append(module))
    output(unet)
    assert len(called) == 4


def test_quantized_weights_are_left_to_the_layers_that_have_them():
    pipe = tiny_pipeline(**FEW_GROUPS)
    unet = pipe.unet.eval().requires_grad_(False).to(DEVICE)
    for module in unet.modules():
        if type(module) is nn.Linear:
            module.weight = quantized(module)
    expected = output(unet)
    handle = diffopt.optimize(pipe, attention="sdpa")
    fused.put_on(unet)
    assert not shared(unet)
    assert distance(output(unet), expected) < 1e-5
    handle.restore()
    assert torch.equal(output(unet), expected)


def test_convolutions_with_another_way_around_the_edges_keep_it():
    """Pictures that can be tiled: a `_conv_forward` of the instance's own pads with what lies on the other side."""

    def around(conv, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 0, 0), mode="circular"), weight, bias, padding=(1, 0))

    unet = tiny_unet()
    stock = output(unet)
    for module in unet.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3) and module.stride == (1, 1):
            module._conv_forward = types.MethodType(around, module)
    expected = output(unet)
    assert distance(expected, stock) > 1e-2
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5


def test_weights_that_come_piece_by_piece_are_waited_for():
    """With sequential offloading each layer's weights come when its forward, which accelerate wraps, is called."""
    unet = tiny_unet()
    expected = output(unet)
    fused.put_on(unet)
    cpu_offload(unet, execution_device=torch.device(DEVICE))
    assert unet.mid_block.resnets[0].conv1.weight.is_meta
    assert distance(output(unet), expected) < 1e-5


def test_what_lies_below_an_offloading_hook_is_taken_off_too():
    unet = tiny_unet()
    expected = output(unet)
    fused.put_on(unet)
    cpu_offload(unet, execution_device=torch.device(DEVICE))
    fused.take_off(unet)
    assert distance(output(unet), expected) < 1e-5
    remove_hook_from_submodules(unet)
    ours = [name for name, module in unet.named_modules() if fused.is_ours(module)]
    assert not ours


def test_gradients_use_the_stock_computation():
    unet = tiny_unet()
    fused.put_on(unet)
    sample, timestep, context = inputs()
    sample.requires_grad_(True)
    unet(sample, timestep, context).sample.sum().backward()
    assert sample.grad is not None


def test_what_is_not_known_is_kept_and_named():
    unet = tiny_unet(resnet_time_scale_shift="scale_shift")
    mine = unet.mid_block.attentions[0].forward
    unet.mid_block.attentions[0].forward = mine
    expected = output(unet)
    fused.put_on(unet)
    assert unet.mid_block.attentions[0].forward is mine
    kept = {row["name"]: row["reasons"] for row in fused.summary(unet)["kept"]}
    assert kept["mid_block.attentions.0"] == ["it has a forward of its own"]
    assert kept["mid_block.resnets.0"] == ["its time embedding is 'scale_shift'"]
    assert distance(output(unet), expected) < 1e-5
    fused.take_off(unet)
    assert unet.mid_block.attentions[0].forward is mine


@pytest.fixture
def half(monkeypatch):
    """A pipeline with a float16 UNet, optimized where kernels run."""
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])
    pipe = tiny_pipeline(**FEW_GROUPS, **BOTH_KINDS)
    pipe.unet.to(DEVICE, torch.float16).requires_grad_(False)
    diffopt.optimize(pipe, attention="sdpa")
    return pipe


def not_fused(unet: nn.Module) -> dict[str, tuple[int, str]]:
    """Kinds of modules that are kept: how many of each, and why."""
    kept = fused.summary(unet)["kept"]
    reasons = {row["kind"]: "; ".join(row["reasons"]) for row in kept}
    return {kind: (sum(row["kind"] == kind for row in kept), why) for kind, why in reasons.items()}


def test_a_dtype_that_no_kernel_takes_is_not_called_fused(half):
    unet, handle = half.unet, diffopt.optimize(half, attention="sdpa")
    there = fused.summary(unet)["fused"]
    assert there["GroupNorm"] > 0
    assert not not_fused(unet)
    unet.double()
    assert not fused.summary(unet)["fused"]
    assert not_fused(unet) == {kind: (count, "no kernel takes float64") for kind, count in there.items()}
    report = handle.report()
    assert f"not fused: {there['GEGLU']} GEGLU: no kernel takes float64" in report
    assert not any(line.startswith("fused: ") for line in report.splitlines())


def test_norms_of_another_dtype_are_not_called_fused(half):
    """Nor are blocks that hand these norms to kernels; others are."""
    unet, handle = half.unet, diffopt.optimize(half, attention="sdpa")
    there = fused.summary(unet)["fused"]
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.float()
    kept = ("GroupNorm", "ResnetBlock2D", "Transformer2DModel", "UpBlock2D", "CrossAttnUpBlock2D")
    reason = "it has parameters of float32 in a model of float16"
    assert not_fused(unet) == {kind: (there[kind], reason) for kind in kept}
    assert fused.summary(unet)["fused"] == {kind: count for kind, count in there.items() if kind not in kept}
    assert f"not fused: {there['GroupNorm']} GroupNorm: {reason}" in handle.report()


def test_adapters_and_casting_hooks_have_dtypes_of_their_own(half):
    """Neither is what a kernel reads: adapters wrap a layer, hooked layers compute by themselves."""
    unet, there = half.unet, fused.summary(half.unet)["fused"]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_in", "conv1"]))
    for name, x in unet.named_parameters():
        x.data = x.data.float() if "lora_" in name else x.data
    conv = unet.mid_block.resnets[0].conv2.float()
    conv.forward = types.MethodType(nn.Conv2d.forward, conv)  # as casting hooks put over it
    assert not not_fused(unet)
    there["Conv2d"] = fused.summary(unet)["fused"]["Conv2d"]  # on a Hopper GPU that one was ours
    assert fused.summary(unet)["fused"] == there


def test_saving_and_loading(tmp_path):
    unet = tiny_unet()
    expected = {name: value.clone() for name, value in unet.state_dict().items()}
    fused.put_on(unet)
    unet.save_pretrained(tmp_path)
    again = type(unet).from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name].cpu()), name


def test_freeu():
    unet = tiny_unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    expected = output(unet)
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_on_a_cpu_nothing_is_touched():
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    assert not any(fused.is_ours(module) for module in pipe.unet.modules())
    assert pipe.unet.conv_in.weight.is_contiguous()
    assert not handle.summary()["modules"]["fused"]
    report = diffopt.optimize(tiny_pipeline(resnet_time_scale_shift="scale_shift")).report()
    assert "\nnot fused: " not in report, "it is no news where no kernel runs"


def test_where_kernels_run_optimizing_fuses_and_restoring_undoes(monkeypatch):
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])
    pipe = tiny_pipeline(**FEW_GROUPS)
    pipe.unet.to(DEVICE).requires_grad_(False)
    expected = output(pipe.unet)
    handle = diffopt.optimize(pipe, attention="sdpa")
    assert distance(output(pipe.unet), expected) < 1e-5
    report = handle.report()
    assert "fused: " in report
    assert "8 ResnetBlock2D" in report
    assert "one product: 14 layers (keys and values of the prompt)" in report
    handle.restore()
    assert torch.equal(output(pipe.unet), expected)
    assert not any(fused.is_ours(module) for module in pipe.unet.modules())


def test_where_step_kernels_are_wrong_blocks_stay_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: ["geglu float16 WRONG"])
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    assert not any(fused.is_ours(module) for module in pipe.unet.modules())
    assert "note: blocks are not fused: geglu float16 WRONG; diffusers' own run" in handle.report()
    assert graphs.is_on(pipe.unet), "graphs need no step kernel"
    assert all(layer["optimized"] for layer in handle.summary()["layers"])


def test_where_attention_is_wrong_blocks_are_fused_all_the_same(monkeypatch):
    monkeypatch.setattr("diffopt.attention.backends.own_kernel_reasons", lambda device: ["d40 is WRONG"])
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])
    pipe = tiny_pipeline(**FEW_GROUPS)
    handle = diffopt.optimize(pipe)
    assert fused.summary(pipe.unet)["fused"]
    assert "d40 is WRONG" in handle.report()
    assert "not fused: " not in handle.report()


def test_a_pointwise_convolution_is_a_product():
    conv = nn.Conv2d(24, 8, 1).to(DEVICE).to(memory_format=torch.channels_last)
    x = torch.randn(2, 24, 5, 3, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.no_grad():
        out = forwards._pointwise(conv, x)
        assert forwards.is_image(out)
        assert distance(out, conv(x)) < 1e-5


# --- skips, concatenated by the norm ----------------------------------------------------------------------------------


@pytest.fixture
def pairs(monkeypatch) -> list[tuple[int, int]]:
    """Channels of both inputs of each norm that had two; a list that fills."""
    seen = []
    group_norm_joined = forwards.kernels.group_norm_joined

    def spy(x, second, *arguments, **keywords):
        seen.append((x.shape[1], second.shape[1]))
        return group_norm_joined(x, second, *arguments, **keywords)

    monkeypatch.setattr(forwards.kernels, "group_norm_joined", spy)
    return seen


def count_cats(monkeypatch) -> list[tuple[int, ...]]:
    """Channels of the images that are concatenated; a list that fills."""
    seen = []
    cat = torch.cat

    def spy(tensors, *arguments, **keywords):
        if tensors[0].dim() == 4:
            seen.append(tuple(x.shape[1] for x in tensors))
        return cat(tensors, *arguments, **keywords)

    monkeypatch.setattr("torch.cat", spy)
    return seen


@pytest.mark.parametrize("groups", [2, 16], ids="{} groups".format)  # of 16, some lie on both sides: 3 channels each
def test_skips_are_not_concatenated(groups, pairs, monkeypatch):
    unet = tiny_unet(**BOTH_KINDS, norm_num_groups=groups)
    expected = output(unet)
    fused.put_on(unet)
    cats = count_cats(monkeypatch)
    assert distance(output(unet), expected) < 1e-5
    assert pairs == SKIPS
    assert not cats
    fused.take_off(unet)
    assert torch.equal(output(unet), expected)
    assert len(pairs) == len(cats) == 4


@pytest.mark.parametrize("name", ["norm1", "conv_shortcut", ""], ids=["norm1", "conv_shortcut", "the resnet"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_who_looks_at_a_resnets_input_sees_the_concatenation(name, register, pairs):
    unet = tiny_unet(**BOTH_KINDS)
    widths = []
    module = unet.up_blocks[1].resnets[0].get_submodule(name)
    getattr(module, register)(lambda module, inputs, *_: widths.append(inputs[0].shape[1]))
    expected = output(unet)
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5
    # What a norm stores is there for the shortcut, whoever looks at that.
    assert pairs == [pair for i, pair in enumerate(SKIPS) if i != 2 or name == "conv_shortcut"]
    assert widths == [48, 48]


def test_resnets_with_a_forward_of_their_own_get_the_concatenation(pairs):
    unet = tiny_unet(**BOTH_KINDS)
    block = unet.up_blocks[0].resnets[1]
    block.forward = types.MethodType(lambda self, x, temb: ResnetBlock2D.forward(self, x * 2, temb), block)
    expected = output(unet)
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5
    assert pairs == [pair for i, pair in enumerate(SKIPS) if i != 1]


def test_skips_that_freeu_changes_are_concatenated(pairs):
    unet = tiny_unet(**BOTH_KINDS)
    stock = output(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    expected = output(unet)
    fused.put_on(unet)
    assert distance(output(unet), expected) < 1e-5
    assert not pairs
    unet.disable_freeu()
    assert distance(output(unet), stock) < 1e-5
    assert pairs == SKIPS


def test_skips_of_another_layout_are_concatenated(pairs):
    unet = tiny_unet(**BOTH_KINDS)
    fused.put_on(unet)
    block = unet.up_blocks[1]
    generator = torch.Generator().manual_seed(4)
    states, *skips = (torch.randn(2, width, 8, 8, generator=generator).to(DEVICE) for width in (32, 16, 16))
    temb = torch.randn(2, 64, generator=generator).to(DEVICE)
    skips = [skip.contiguous(memory_format=torch.channels_last) for skip in skips]
    states = states.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = UpBlock2D.forward(block, states, tuple(skips), temb)
        assert distance(block(states, tuple(skips), temb), expected) < 1e-5
        assert pairs == [(32, 16), (16, 16)]
        skips[0] = skips[0].contiguous()  # the last that is popped
        assert distance(block(states, tuple(skips), temb), expected) < 1e-5
        assert pairs == [(32, 16), (16, 16), (32, 16)]
        assert distance(block(states, tuple(skips), temb, None, 1.0), expected) < 1e-5  # diffusers warns of a scale
        with pytest.raises(IndexError):
            block(states, tuple(skips[1:]), temb)


def test_autocast():
    unet = tiny_unet(**BOTH_KINDS)
    with torch.autocast(DEVICE, torch.float16):
        expected = output(unet)
        fused.put_on(unet)
        assert distance(output(unet), expected) < 1e-2


def test_gradient_checkpointing_is_diffusers_own():
    unet = tiny_unet(**BOTH_KINDS)
    unet.enable_gradient_checkpointing()
    fused.put_on(unet)
    sample, timestep, context = inputs()
    unet(sample.requires_grad_(True), timestep, context).sample.sum().backward()
    assert sample.grad is not None


# --- weights that share buffers -------------------------------------------------------------------------------------


def shared_pipe():
    """A tiny pipeline with our processors and forwards, its UNet's forward ours, uncaptured (no GPU is needed)."""
    pipe = tiny_pipeline(**FEW_GROUPS)
    pipe.unet.to(DEVICE).requires_grad_(False)
    handle = diffopt.optimize(pipe)
    return pipe, handle


def shared(unet) -> dict[str, int]:
    return {row["what"]: row["layers"] for row in sharing.summary(unet)}


def test_layers_that_share_an_input_share_a_product(monkeypatch):
    pipe, _ = shared_pipe()
    expected = output(pipe.unet)
    fused.put_on(pipe.unet)
    assert shared(pipe.unet) == {
        "queries, keys and values, layer by layer": 3 * 7,
        "keys and values of the prompt": 2 * 7,
        "time embeddings": 8,
    }
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda *a, **k: products.append(a[1].shape) or linear(*a, **k))
    assert distance(output(pipe.unet), expected) < 1e-5
    rows = [shape[0] for shape in products]
    assert rows.count(2 * (3 * 16 + 4 * 32)) == 1  # every layer's keys and values
    assert rows.count(3 * 16 + 5 * 32) == 1  # every block's time embedding
    assert rows.count(3 * 16) + rows.count(3 * 32) == 7  # each layer's queries, keys and values


def test_changes_in_place_show_in_shared_weights():
    pipe, _ = shared_pipe()
    fused.put_on(pipe.unet)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    layers = (block.attn1.to_k, block.attn2.to_v, pipe.unet.mid_block.resnets[0].time_emb_proj)
    for layer in layers:
        before = output(pipe.unet)
        layer.weight.mul_(1.5)
        assert distance(output(pipe.unet), before) > 1e-5
    ours = output(pipe.unet)
    fused.take_off(pipe.unet)
    assert distance(ours, output(pipe.unet)) < 1e-5


def test_prompts_changed_in_place_show():
    pipe, _ = shared_pipe()
    fused.put_on(pipe.unet)
    sample, timestep, context = inputs()
    before = output(pipe.unet, sample, timestep, context)
    context.mul_(2)
    ours = output(pipe.unet, sample, timestep, context)
    assert distance(ours, before) > 1e-4
    fused.take_off(pipe.unet)
    assert distance(ours, output(pipe.unet, sample, timestep, context)) < 1e-5


def test_prompts_that_a_hook_changes_in_place_show():
    """In the middle of a call: layers after the hook get what it made of the prompt."""
    pipe, _ = shared_pipe()
    cross = [module for module in pipe.unet.modules() if isinstance(module, Attention) and module.is_cross_attention]

    def doubles(module, arguments, keywords):
        keywords["encoder_hidden_states"].mul_(2)

    cross[1].register_forward_pre_hook(doubles, with_kwargs=True)
    sample, timestep, context = inputs()
    expected = output(pipe.unet, sample, timestep, context.clone())
    fused.put_on(pipe.unet)
    assert distance(output(pipe.unet, sample, timestep, context), expected) < 1e-5


def test_adapters_end_the_sharing_by_themselves():
    pipe, _ = shared_pipe()
    plain = output(pipe.unet)
    fused.put_on(pipe.unet)
    weights = random_lora(pipe.unet)
    pipe.load_lora_weights(weights, adapter_name="test")
    assert set(shared(pipe.unet)) == {"time embeddings"}
    ours = output(pipe.unet)
    pipe.fuse_lora(components=["unet"])
    merged = output(pipe.unet)
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert len(shared(pipe.unet)) == 3, "unloaded, the layers lie together as before"
    assert distance(output(pipe.unet), plain) < 1e-4
    fused.take_off(pipe.unet)
    pipe.load_lora_weights(weights, adapter_name="test")
    expected = output(pipe.unet)
    assert distance(expected, plain) > 0.05
    assert distance(ours, expected) < 1e-5
    assert distance(merged, expected) < 1e-4


def test_moved_weights_end_the_sharing_until_the_next_run():
    pipe, _ = shared_pipe()
    expected = output(pipe.unet)
    fused.put_on(pipe.unet)
    pipe.unet.to(torch.float64).to(torch.float32)
    assert not shared(pipe.unet)
    assert distance(output(pipe.unet), expected) < 1e-5
    sharing.renew(pipe.unet)
    assert len(shared(pipe.unet)) == 3
    assert distance(output(pipe.unet), expected) < 1e-5


def test_a_deep_copy_shares_nothing_with_the_original():
    pipe, _ = shared_pipe()
    expected = output(pipe.unet)
    fused.put_on(pipe.unet)
    twin = copy.deepcopy(pipe.unet)
    for parameter in pipe.unet.parameters():
        parameter.zero_()
    assert distance(output(twin), expected) < 1e-5
    fused.put_on(twin)
    assert len(shared(twin)) == 3
    assert distance(output(twin), expected) < 1e-5


def test_shared_weights_are_restored_and_saved(tmp_path):
    pipe, _ = shared_pipe()
    values = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    fused.put_on(pipe.unet)
    pipe.unet.save_pretrained(tmp_path)
    again = type(pipe.unet).from_pretrained(tmp_path)
    fused.take_off(pipe.unet)
    assert not shared(pipe.unet)
    assert not any(
        hasattr(module, "diffopt_together") or hasattr(module, "diffopt_joined") for module in pipe.unet.modules()
    )
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, values[name])
        assert torch.equal(again.state_dict()[name], values[name].cpu())
    storages = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    assert len(storages) == len(list(pipe.unet.parameters()))


def test_two_prompts_in_one_run_are_not_mixed_up():
    pipe, _ = shared_pipe()
    fused.put_on(pipe.unet)
    (_, group, *_) = (None, *pipe.unet.diffopt_together)
    a, b = torch.randn(2, 1, 77, 16, device=DEVICE)
    with torch.no_grad(), one_run(pipe.unet):
        for x in (a, b):
            expected = [linear(x) for linear in group.linears]
            assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(group.outputs(x), expected, strict=True))
        assert group.outputs(a) is None  # a third change of input: layer by layer from now on
    assert group.outputs(b) is None, "the run is over"


def test_threads_do_not_mix_their_prompts_up():
    """Calls that are not captured don't take turns: a group must not hand one thread what it made for another."""
    pipe, _ = shared_pipe()
    fused.put_on(pipe.unet)
    group = pipe.unet.diffopt_together[0]
    a, b = torch.randn(2, 1, 77, 16, device=DEVICE)

    def other() -> None:
        with torch.no_grad(), one_run(pipe.unet):
            group.outputs(b)

    with torch.no_grad(), one_run(pipe.unet):
        first = group.outputs(a)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert group.holds(a)
        assert group.outputs(a) is first
        assert group.outputs(b) is not None, "the other thread's input was none of ours"


@pytest.mark.parametrize("trained", ["all", "one layer"])
def test_gradients_reach_weights_that_share_a_buffer(trained):
    """A product with views of all of them would leave each layer's own weight without any, and say nothing."""
    pipe, _ = shared_pipe()
    stock = copy.deepcopy(pipe.unet)
    fused.put_on(pipe.unet)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    gradients = []
    for unet in (pipe.unet, stock):
        for other, parameter in unet.named_parameters():
            parameter.requires_grad_(trained == "all" or other == name)
        unet(*inputs()).sample.square().sum().backward()
        gradients.append({key: p.grad for key, p in unet.named_parameters() if p.requires_grad})
    ours, expected = gradients
    assert len(expected) == (len(list(stock.parameters())) if trained == "all" else 1)
    for key, gradient in expected.items():
        assert ours[key] is not None, key
        assert distance(ours[key], gradient) < 1e-4, key


def test_weights_moved_in_inference_mode_can_still_be_trained():
    """Servers hold it for all they do; a tensor made in it has no count of changes and no gradient, ever."""
    unet = tiny_unet()
    weights = {name: p for name, p in unet.named_parameters() if p.dim() > 1}

    def none_is_of_inference_mode() -> bool:
        return not any(p.is_inference() for p in weights.values())

    with torch.inference_mode():
        unet.set_attn_processor(DiffoptAttnProcessor())
        fused.put_on(unet)
        assert shared(unet)
        assert none_is_of_inference_mode()
    unet.to(torch.float64).to(torch.float32)
    with torch.inference_mode():
        sharing.renew(unet)
        assert none_is_of_inference_mode()
        fused.take_off(unet)
    assert none_is_of_inference_mode()
    unet.requires_grad_(True)
    unet(*inputs()).sample.sum().backward()
    assert weights["conv_in.weight"].grad is not None


def test_a_block_whose_class_was_exchanged_computes_what_that_says():
    """So do those who merge tokens."""

    class Merging(BasicTransformerBlock):
        def forward(self, hidden_states, *arguments, **keywords):
            return super().forward(hidden_states, *arguments, **keywords) * 0.5

    unet = tiny_unet()
    stock = copy.deepcopy(unet)
    fused.put_on(unet)
    block, theirs = (model.mid_block.attentions[0].transformer_blocks[0] for model in (unet, stock))
    x, context = torch.randn(2, 4, 32, device=DEVICE), torch.randn(2, 7, 16, device=DEVICE)
    with torch.no_grad():
        before = block(x, encoder_hidden_states=context)
        for changed in (block, theirs):
            changed.__class__ = Merging
        ours, expected = (one(x, encoder_hidden_states=context) for one in (block, theirs))
    assert distance(ours, before) > 1e-3
    assert distance(ours, expected) < 1e-5


@pytest.mark.parametrize(
    "kind", [ResnetBlock2D, Transformer2DModel, CrossAttnUpBlock2D, UpBlock2D, Upsample2D, nn.GroupNorm, nn.Conv2d]
)
def test_other_modules_whose_class_was_exchanged(kind, monkeypatch):
    norms_without_kernels(monkeypatch)
    ours = tiny_pipeline(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).unet.requires_grad_(False)
    stock = copy.deepcopy(ours)
    fused.put_on(ours, frozenset((fused.NORMS, fused.PRODUCTS)))
    opposite = type("Opposite", (kind,), {"forward": lambda self, *a, **k: negated(kind.forward(self, *a, **k))})
    arguments = [x.cpu() for x in inputs()]
    before = output(stock, *arguments)
    for model in (ours, stock):
        next(module for module in model.modules() if type(module) is kind).__class__ = opposite
    expected = output(stock, *arguments)
    assert distance(expected, before) > 1e-3
    assert distance(output(ours, *arguments), expected) < 1e-5


def test_a_decoder_whose_class_was_exchanged(monkeypatch):
    norms_without_kernels(monkeypatch)
    decoder = tiny_pipeline().vae.decoder.requires_grad_(False)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = -decoder(z)
    fused.put_on(decoder, decoders.STAGES)
    decoder.__class__ = type("Opposite", (Decoder,), {"forward": lambda self, *a: -Decoder.forward(self, *a)})
    with torch.no_grad():
        assert distance(decoder(z), expected) < 1e-5


def negated(value):
    """Of a module's output, a tensor or a tuple of them."""
    return -value if isinstance(value, torch.Tensor) else tuple(negated(x) for x in value)


def test_a_feed_forward_whose_class_was_exchanged():
    class Weaker(GEGLU):
        def forward(self, *arguments):
            return super().forward(*arguments) * 0.5

    module = next(module for module in tiny_unet().modules() if type(module) is GEGLU)
    x = torch.randn(2, 4, module.proj.in_features, device=DEVICE)
    with torch.no_grad():
        expected = module(x) * 0.5
        fused.put_on(module, frozenset((fused.ROWS,)))
        module.__class__ = Weaker
        assert distance(module(x), expected) < 1e-5


def test_autocast_chooses_dtypes_as_in_stock() -> None:
    unet = tiny_unet()
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = output(unet)
        fused.put_on(unet)
        ours = output(unet)
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert distance(ours.float(), expected.float()) < 0.02


@pytest.mark.parametrize("processor", [DiffoptAttnProcessor, DiffoptFusedAttnProcessor])
@pytest.mark.parametrize("name", ["attn1", "attn2"])
def test_biases_of_attention_outputs_are_added_after_them(processor, name: str) -> None:
    unet = tiny_unet()
    stock = copy.deepcopy(unet)
    if processor is DiffoptFusedAttnProcessor:
        unet.fuse_qkv_projections()
    unet.set_attn_processor(processor())
    fused.put_on(unet)
    before = output(unet)
    assert distance(before, output(stock)) < 1e-5
    blocks = [model.mid_block.attentions[0].transformer_blocks[0] for model in (unet, stock)]
    layer = getattr(blocks[0], name)
    tokens, context = torch.randn(2, 4, 32, device=DEVICE), torch.randn(2, 77, 16, device=DEVICE)
    with torch.no_grad():
        left, bias = forwards._attended(layer, tokens, encoder_hidden_states=context if name == "attn2" else None)
        assert bias is layer.to_out[0].bias
        whole = layer(tokens, encoder_hidden_states=context if name == "attn2" else None)
        assert distance(left + bias, whole) < 1e-5
    for block in blocks:
        getattr(block, name).to_out[0].bias.add_(0.5)
    changed = output(unet)
    assert distance(changed, before) > 1e-4
    assert distance(changed, output(stock)) < 1e-5


@pytest.mark.parametrize("why", ["hook", "residual", "dropout", "rescaled", "subclass"])
def test_attention_that_does_more_adds_its_bias_itself(why: str) -> None:
    class Other(DiffoptAttnProcessor):
        """One that may not know how to leave a bias."""

    unet = tiny_unet()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.set_processor(Other() if why == "subclass" else DiffoptAttnProcessor())
    if why == "hook":
        layer.to_out[0].register_forward_hook(lambda *_: None)
    elif why == "dropout":
        layer.to_out[1].p = 0.5
        layer.to_out[1].train()
    layer.residual_connection = why == "residual"
    layer.rescale_output_factor = 2.0 if why == "rescaled" else 1
    with torch.no_grad():
        assert forwards._attended(layer, torch.randn(2, 4, 32, device=DEVICE))[1] is None
