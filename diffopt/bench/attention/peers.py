"""The contenders of the attention suite: ours and every exact peer, one small adapter each.

An adapter says what it is called, where it comes from, why it can't run here, and runs one call on q [B, N_q, H, D] and
k, v [B, N_k, H, D] to an output [B, N_q, H, D].
"""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator

import torch

import diffopt_kernels
from diffopt.attention.backends import BACKENDS
from diffopt.attention.tuning import use_tuned
from diffopt.errors import one_line
from diffopt.measure.environment import installed_version
from diffopt_kernels import support

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OURS, OURS_BF16 = "diffopt", "diffopt-bf16"


@dataclasses.dataclass(frozen=True)
class Peer:
    """One contender, ours included.

    Attributes:
        name: as the record calls it.
        run: (q, k, v) -> out; also captured in a CUDA graph.
        absent_reasons: why it can't run on a device at all; empty when it can.
        refusals: why it can't take this call (q, k, v); empty when it can.
        dtype: "float16" or "bfloat16".
        package: the distribution it comes from, for its version.
        install: the line that installs it.
        required: without its time there is no ratio.
        warms_up: whether to call it once on every shape before anything is measured, so that it compiles then.
        prepare: called once on the device, where it can run, before the first call.
    """

    name: str
    run: Run
    absent_reasons: Callable[[torch.device], list[str]]
    refusals: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[str]]
    package: str
    install: str
    dtype: str = "float16"
    required: bool = False
    warms_up: bool = True
    prepare: Callable[[torch.device], object] = lambda _: None

    def version(self) -> str | None:
        """Of the package, or None where it isn't installed as one."""
        return installed_version(self.package)


def _imports(module: str, name: str) -> Callable[[torch.device], list[str]]:
    """Absent when not on CUDA, or when `module.name` can't be imported."""

    def reasons(device: torch.device) -> list[str]:
        if device.type != "cuda":
            return [f"needs a CUDA GPU, not {device.type}"]
        try:
            getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            return [f"{error.name} isn't installed"]
        except Exception as error:  # a wheel built for another CUDA or torch fails at import in many ways
            return [f"{module} can't be imported: {one_line(error)}"]
        return []

    return reasons


def _no_refusals(*_: object) -> list[str]:
    return []


def _output(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The output, where a version also returns the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def _run_flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    return _output(flash_attn_func(q, k, v))


def _run_fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from fa3_fwd_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    return _output(flash_attn_func(q, k, v))


def _ours(name: str, dtype: str) -> Peer:
    return Peer(
        name,
        diffopt_kernels.attention,
        support.device_reasons,
        support.unsupported_reasons,
        package="triton",
        install="pip install triton",
        dtype=dtype,
        required=True,
        prepare=lambda device: use_tuned(device) if device.type == "cuda" else None,
    )


def _pytorch(name: str, *, required: bool = False, warms_up: bool = True) -> Peer:
    """One of PyTorch's variants, by its own operator."""
    backend = BACKENDS[name]
    return Peer(
        name,
        lambda q, k, v: backend.run(q, k, v, None, None),
        backend.device_reasons,
        lambda q, k, v: backend.call_reasons(q, k, v, None),
        package="torch",
        install="pip install torch",
        required=required,
        warms_up=warms_up,
    )


_XFORMERS = BACKENDS["xformers"]


@contextlib.contextmanager
def flash_attn_hidden() -> Iterator[None]:
    """Imports find no flash-attn-4: xFormers, which diffusers imports, takes it for FlashAttention 2 and fails."""
    hidden = "flash_attn" not in sys.modules
    if hidden:
        sys.modules["flash_attn"] = None  # pyright: ignore[reportArgumentType]  (what an import of it then fails on)
    try:
        yield
    finally:
        if hidden:
            del sys.modules["flash_attn"]


def _xformers_absent(device: torch.device) -> list[str]:
    """As the backend says it."""
    with flash_attn_hidden():
        return _XFORMERS.device_reasons(device)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        _ours(OURS, "float16"),
        _ours(OURS_BF16, "bfloat16"),
        _pytorch("sdpa-cudnn", required=True),
        _pytorch("sdpa-flash", required=True),
        _pytorch("sdpa-efficient", required=True),
        Peer(
            "flash-attn-4",
            _run_flash_attn_4,
            _imports("flash_attn.cute", "flash_attn_func"),
            _no_refusals,
            package="flash-attn-4",
            install="pip install --pre 'flash-attn-4[cu13]'",
            required=True,
        ),
        Peer(
            "fa3-fwd",
            _run_fa3,
            _imports("fa3_fwd_interface", "flash_attn_func"),
            _no_refusals,
            package="fa3-fwd",
            install="pip install fa3-fwd",
            dtype="bfloat16",  # its wheel holds no float16 kernels
            required=True,
        ),
        _pytorch("sdpa-math", warms_up=False),  # nothing to compile, and its scores may fill the memory
        Peer(
            "xformers",
            lambda q, k, v: _XFORMERS.run(q, k, v, None, None),
            _xformers_absent,
            lambda q, k, v: _XFORMERS.call_reasons(q, k, v, None),
            package="xformers",
            install="pip install 'diffopt[xformers]'",
        ),
    )
}
"""Every contender by name, in the order of tables: ours first."""
