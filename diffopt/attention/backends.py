"""The attention backends by name, and why each can't serve here or for a given call.

Every backend computes softmax(q·kᵀ·scale + mask)·v on [B, N, H, D] tensors. PyTorch's variants are called through
their aten operators, because `torch.nn.attention.sdpa_kernel` is a setting of the whole process.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.backends import cuda as cuda_backends
from torch.nn.attention import SDPBackend

import diffopt_kernels
from diffopt.attention import trust
from diffopt.attention.tuning import use_tuned
from diffopt.errors import BackendError, InputError
from diffopt.gpus import OWN
from diffopt_kernels import support
from diffopt_kernels.launch import LaunchKey

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None], torch.Tensor]
CallReasons = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], list[str]]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: how users and reports call it.
        run: (q, k, v, mask, scale) -> out. q [B, N_q, H, D], k and v [B, N_k, H, D], out [B, N_q, H, D]; mask is None
            or additive or boolean, broadcastable to [B, H, N_q, N_k]; scale None means D ** -0.5.
        device_reasons: why it can't serve on a device; empty when it can.
        call_reasons: why it can't serve this call (q, k, v, mask) on a device where it works; empty when it can.
    """

    name: str
    run: Attend
    device_reasons: Callable[[torch.device], list[str]]
    call_reasons: CallReasons


def _no_reasons(*_: object) -> list[str]:
    return []


# --- diffopt's own kernel -------------------------------------------------------------------------------------------


def _own_device_reasons(device: torch.device) -> list[str]:
    return support.device_reasons(device) or (list(trust.untrusted_reasons(device)) if device.type == "cuda" else [])


def _run_diffopt(q, k, v, mask, scale):
    return diffopt_kernels.attention(q, k, v, mask=mask, scale=scale)


def _diffopt_call_reasons(q, k, v, mask) -> list[str]:
    # Compiled code asks nothing else of the device: a model moved there meanwhile must not reach the kernel.
    elsewhere = [] if q.device.type == "cuda" or support.interpreted() else [f"the call is on {q.device.type}"]
    return elsewhere + support.input_reasons(q, k, v, mask)


# --- PyTorch's variants, heads before tokens ------------------------------------------------------------------------


def _heads_first(attend: Attend) -> Attend:
    """Wrap an operator that wants [B, H, N, D]: views in, a view out."""

    def run(q, k, v, mask, scale):
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale).transpose(1, 2)

    return run


def _sdpa(q, k, v, mask, scale):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _flash(q, k, v, mask, scale):
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


def _efficient(q, k, v, mask, scale):
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, False, scale=scale)[0]


def _cudnn(q, k, v, mask, scale):
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False, scale=scale)[0]


def _math(q, k, v, mask, scale):
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, scale=scale)[0]


def _cuda_reasons(device: torch.device) -> list[str]:
    if device.type == "cuda" and torch.cuda.is_available():
        return []
    return [f"needs a CUDA GPU, the pipeline is on {device.type}"]


def _flash_device_reasons(device: torch.device) -> list[str]:
    return [] if device.type == "cpu" else _cuda_reasons(device)


def _asks_pytorch(can_use: Callable[..., bool]) -> CallReasons:
    """Reasons from PyTorch's own check; its debug warnings are the words."""

    def reasons(q, k, v, mask) -> list[str]:
        if q.device.type == "cpu":
            return []
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        parameters = cuda_backends.SDPAParams(query, key, value, mask, 0.0, False, False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if can_use(parameters, True):
                return []
        words = [str(warning.message).split(" (Triggered internally")[0] for warning in caught]
        return [text for text in words if "not used because" not in text] or ["PyTorch refuses these inputs"]

    return reasons


# --- xFormers -------------------------------------------------------------------------------------------------------


def _run_xformers(q, k, v, mask, scale):
    from xformers import ops  # pyright: ignore[reportMissingImports]  (an optional extra)

    bias = None
    if mask is not None:
        bias = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


def _xformers_device_reasons(device: torch.device) -> list[str]:
    if importlib.util.find_spec("xformers") is None:
        return ["xFormers isn't installed (pip install 'diffopt[xformers]')", *_cuda_reasons(device)]
    reasons = _cuda_reasons(device)
    if not reasons:
        try:
            from xformers import ops  # noqa: F401  # pyright: ignore[reportMissingImports]
        except Exception as error:  # a wheel built for another CUDA fails at import in many ways
            reasons.append(f"xFormers {importlib.metadata.version('xformers')} can't be imported: {error}")
    return reasons


def _xformers_call_reasons(q, k, v, mask) -> list[str]:
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {q.dtype} is not supported")
    if mask is not None and mask.dtype == torch.bool:
        reasons.append("a boolean mask is not supported")
    return reasons


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(OWN, _run_diffopt, _own_device_reasons, _diffopt_call_reasons),
        Backend("sdpa", _heads_first(_sdpa), _no_reasons, _no_reasons),
        Backend(
            "sdpa-flash",
            _heads_first(_flash),
            _flash_device_reasons,
            _asks_pytorch(cuda_backends.can_use_flash_attention),
        ),
        Backend(
            "sdpa-efficient",
            _heads_first(_efficient),
            _cuda_reasons,
            _asks_pytorch(cuda_backends.can_use_efficient_attention),
        ),
        Backend(
            "sdpa-cudnn", _heads_first(_cudnn), _cuda_reasons, _asks_pytorch(cuda_backends.can_use_cudnn_attention)
        ),
        Backend("sdpa-math", _heads_first(_math), _no_reasons, _no_reasons),
        Backend("xformers", _run_xformers, _xformers_device_reasons, _xformers_call_reasons),
    )
}
"""Every backend by name. `sdpa` is PyTorch's own choice among its variants, the same call as stock diffusers."""

_PYTORCH = {
    SDPBackend.MATH: "sdpa-math",
    SDPBackend.FLASH_ATTENTION: "sdpa-flash",
    SDPBackend.EFFICIENT_ATTENTION: "sdpa-efficient",
    SDPBackend.CUDNN_ATTENTION: "sdpa-cudnn",
}


def pytorch_choice(heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Which of its variants PyTorch's SDPA takes for self-attention without a mask, by its name among `BACKENDS`."""
    probe = torch.empty((1, heads, 64, head_dim), dtype=dtype, device=device)
    choice = SDPBackend(torch.ops.aten._fused_sdp_choice(probe, probe, probe))
    return _PYTORCH.get(choice, choice.name.lower())


AUTO = "auto"


def names() -> list[str]:
    """What `attention=` takes."""
    return [AUTO, *BACKENDS]


def auto_order(device: torch.device) -> tuple[Backend, ...]:
    """Backends `auto` tries for calls that nobody measured, in order, on a device. The last one serves every call.

    Of float32 it tries the `guesses` among them.
    """
    use_tuned(device)
    own = BACKENDS[OWN]
    return (BACKENDS["sdpa"],) if own_kernel_reasons(device) else (own, BACKENDS["sdpa"])


def guesses(order: Sequence[Backend], dtype: torch.dtype) -> tuple[Backend, ...]:
    """What of `auto`'s order is tried for calls of a dtype that nobody measured: for float32 not diffopt's kernel.

    Its float32 products are IEEE, on the ordinary cores: made for checking, never timed.
    """
    return tuple(backend for backend in order if backend.name != OWN or dtype != torch.float32)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Names of backends by measured time, fastest first, and the evidence; `sdpa`, which serves all calls, is one."""

    names: tuple[str, ...]
    evidence: str


@functools.lru_cache(maxsize=4096)
def measured_order(device: torch.device, key: LaunchKey, dtype: str) -> Measured | None:
    """What `auto` tries for unmasked calls of a shape that was tuned, or is near one that was; else None.

    A backend that was not exact at that shape, or could not serve it, is not among them. The times are of captured
    calls: in eager mode what the host needs for a call comes on top, and nothing is known of that here.

    Args:
        dtype: "float16", "bfloat16" or "float32".
    """
    row = use_tuned(device).nearest(key, dtype)
    if row is None:
        return None
    able = [name for name in row.shape.ranking if name in BACKENDS and not _reasons_of_auto(name, device)]
    near = "" if row.shape.key == key else f" at {row.shape.case}, the nearest tuned shape"
    return Measured(tuple(dict.fromkeys((*able, "sdpa"))), f"{row.evidence}{near}")


def _reasons_of_auto(name: str, device: torch.device) -> list[str]:
    return own_kernel_reasons(device) if name == OWN else BACKENDS[name].device_reasons(device)


def own_kernel_reasons(device: torch.device) -> list[str]:
    """Why `auto` leaves diffopt's kernel out on a device. Triton's interpreter can run it on a CPU, for tests only."""
    return _cuda_reasons(device) or BACKENDS[OWN].device_reasons(device)


def step_kernel_reasons(device: torch.device) -> list[str]:
    """Why the step's kernels (norms, activations, sums, products) stay off on a device; attention's may be on all the
    same.
    """
    reasons = _cuda_reasons(device) or support.device_reasons(device)
    return reasons or list(trust.untrusted_step_reasons(device))


def forced(attention: "str | Backend", device: torch.device) -> Backend:
    """The backend asked for by name.

    Raises:
        InputError: no such name.
        BackendError: it can't serve on this device; lists every reason, and which backends can.
    """
    if isinstance(attention, Backend):
        backend = attention
    elif attention in BACKENDS:
        backend = BACKENDS[attention]
    else:
        raise InputError("attention", attention, f"known: {', '.join(names())}")
    reasons = backend.device_reasons(device)
    if reasons:
        working = [name for name, other in BACKENDS.items() if not other.device_reasons(device)]
        raise BackendError({backend.name: reasons}, allowed=f"on {device.type} these can: {', '.join(working)}")
    use_tuned(device)
    return backend


def with_scale_fault(backend: Backend, factor: float = 1.01) -> Backend:
    """The same backend with its softmax scale multiplied by `factor`: a planted fault that checks must find."""

    def run(q, k, v, mask, scale):
        return backend.run(q, k, v, mask, (q.shape[-1] ** -0.5 if scale is None else scale) * factor)

    return dataclasses.replace(backend, name=f"{backend.name} with scale × {factor:g}", run=run)
