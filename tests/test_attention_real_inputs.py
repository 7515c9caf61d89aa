"""Attention on what a trained UNet hands it, not on random numbers: the bundled model's layers, in mid-picture."""

import dataclasses

import pytest
import torch
from attention_exactness import assert_exact

import diffopt
from diffopt.attention.backends import BACKENDS
from diffopt_kernels import attention
from diffopt_kernels.attention import launch_attention
from diffopt_kernels.candidates import attention_candidates

PROMPT, STEPS = "a red apple", 4
KINDS = ("self 1024 d40", "cross 1024 d40", "self 256 d80", "cross 256 d80", "self 64 d160", "cross 64 d160")


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k and v in float32 of the last call of each kind, by kind, in the last of a few steps."""
    found = {}

    def run(q, k, v, mask, scale):
        kind = "self" if q.shape[1] == k.shape[1] else "cross"
        found[f"{kind} {q.shape[1]} d{q.shape[3]}"] = tuple(x.detach().clone() for x in (q, k, v))
        return BACKENDS["sdpa"].run(q, k, v, mask, scale)

    pipe = diffopt.load("emoji", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    with diffopt.optimized(pipe, attention=dataclasses.replace(BACKENDS["sdpa"], run=run)):
        pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent")
    return found


def test_these_are_the_layers_of_the_model(calls):
    assert set(KINDS) <= set(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_the_selected_launch_is_exact(kind, calls, kernel_device):
    on_gpu = kernel_device.type == "cuda"
    for dtype in (torch.float16, torch.bfloat16) if on_gpu else (torch.float16,):
        q, k, v = (x.to(kernel_device, dtype) for x in calls[kind])
        assert_exact(q, k, v, attention(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gluon_candidates_are_exact(kind, calls, kernel_device):
    """Peaked scores are where the kernel with a fixed maximum has to start over."""
    if torch.cuda.get_device_capability(kernel_device)[0] != 9:
        pytest.skip("for Hopper")
    q, k, v = (x.to(kernel_device, torch.float16) for x in calls[kind])
    candidates = [x for x in attention_candidates([q.shape[3]]) if x.kernel in ("hopper", "short")]
    tried = [x for x in candidates if x.takes(k.shape[1])][::4]
    assert tried
    for launch in tried:
        out = torch.full_like(q, torch.nan)
        for factor in (1, 8):
            assert_exact(q * factor, k, v, launch_attention(q * factor, k, v, out, q.shape[3] ** -0.5, launch))
