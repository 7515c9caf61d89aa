"""Kernel launches with little host work: what one call shares with the next is prepared once.

A launch through Triton binds arguments by name, builds a key from them, looks the kernel up, calls hooks and encodes
tensor descriptors: 26 to 120 µs on a slow CPU (reports/notes/attention.md), where attention at the sizes of Stable
Diffusion takes a GPU 4 to 170. A `PreparedLaunch` fixes everything but the tensors' addresses and the stream. Its
first call goes through Triton, which compiles; later ones hand the C entry of the compiled kernel its arguments
directly (triton_entry.py), with descriptors taken from a cache. Whatever that needs and is not found, a profiler's
hooks and the interpreter take Triton's public way instead, with the same result.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from diffopt_kernels.support import interpreted

DirectLaunch = Callable[[Sequence[int], int], None]
"""(addresses of the call's tensors, raw stream) -> None."""

_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

compiles_beside: ContextVar[Callable[[Any, Mapping[str, Any]], bool] | None]
compiles_beside = ContextVar("compiles_beside", default=None)
"""In a rehearsal (rehearsal.py): (kernel, arguments) -> whether it is being compiled, so that a launch is left out."""


@dataclass(frozen=True)
class Pointer:
    """A kernel argument: the address of one of the call's tensors, with its dtype.

    Attributes:
        tensor: which tensor of the call.
    """

    tensor: int


@dataclass(frozen=True)
class Tiles:
    """A kernel argument: a tensor descriptor (TMA) over one of the call's tensors.

    Attributes:
        tensor: which tensor of the call; its address must be a multiple of 16 bytes.
        shape: sizes as the kernel sees them, which need not be the tensor's own.
        strides: in elements; the last is 1, the others multiples of 16 bytes.
        block_shape: sizes of one tile.
        layout: the tile's layout in shared memory (NVMMASharedLayout) for a Gluon kernel, None for a Triton kernel.
    """

    tensor: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any = None

    def descriptor(self, tensor: torch.Tensor) -> Any:
        """Triton's or Gluon's own descriptor object, validated by it."""
        sizes = list(self.shape), list(self.strides), list(self.block_shape)
        if self.layout is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(tensor, *sizes)
        from triton.experimental.gluon.nvidia import hopper

        return hopper.TensorDescriptor(tensor, *sizes, self.layout)


class PreparedLaunch:
    """One kernel, grid and set of arguments, ready to be launched on tensors of one device, dtype and layout.

    Whoever prepares one answers for using it only with tensors that every argument fits: same device, dtypes, shapes
    and strides. Addresses are free; each pattern of 16-byte alignment compiles a kernel of its own, as Triton does it.
    Holds no tensor. Threads may share it.

    Attributes:
        kernel: the `triton.jit` or `gluon.jit` function.
        arguments: what it is launched with, by name; not to be changed.
        refusal: why calls take Triton's public way although they could be direct; None while nothing speaks against it.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Mapping[str, Any],
        *,
        device: torch.device,
    ) -> None:
        """Prepare; nothing is compiled before the first call.

        Args:
            kernel: a `triton.jit` or `gluon.jit` function.
            grid: programs along one to three axes.
            arguments: the kernel's parameters and compile options (num_warps, num_stages, ...) by name. A `Pointer` or
                `Tiles` stands for one of the call's tensors; numbers, constants and None are fixed.
            device: of all tensors; "cpu" in the interpreter.
        """
        self.refusal: str | None = None if device.type == "cuda" and not interpreted() else "interpreted on the CPU"
        self._index = -1
        self._knobs: Any = None
        if self.refusal is None:
            from triton import knobs  # here, so that importing the package needs no triton

            self._index = torch.cuda.current_device() if device.index is None else device.index
            self._knobs = knobs
        self.kernel = kernel
        self._grid = grid
        self.arguments = dict(arguments)
        self._direct: dict[Hashable, DirectLaunch] = {}

    @property
    def is_direct(self) -> bool:
        """Whether a call has already made the way past Triton's launcher."""
        return bool(self._direct)

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream of the tensors' device, whatever the current device is."""
        if self._index < 0 or _current_device() == self._index:
            self._launch(tensors)
        else:
            with torch.cuda.device(self._index):
                self._launch(tensors)

    def _launch(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.refusal is not None or self._is_watched():
            self.launch_publicly(*tensors)
            return
        addresses = [x.data_ptr() for x in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        alignment = None if bits % 16 == 0 else tuple(address % 16 == 0 for address in addresses)
        direct = self._direct.get(alignment)
        if direct is not None:
            direct(addresses, _current_stream(self._index))  # pyright: ignore[reportOptionalCall]  (checked when made)
            return
        beside = compiles_beside.get()
        if beside is not None and beside(self.kernel, self._values(tensors)):
            return
        compiled = self.launch_publicly(*tensors)
        made = self._make_direct(compiled, tensors)
        if isinstance(made, str):
            self.refusal = made
        else:
            self._direct[alignment] = made

    def _is_watched(self) -> bool:
        """Whether someone wants to see launches: Triton's launch hooks (profilers set them) or the kernel's own."""
        runtime = self._knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # A chain of hooks holds them in `calls`; a version without chains has the hook itself, or None.
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or self.kernel.pre_run_hooks)

    def _values(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The arguments as Triton takes them."""
        values = {}
        for name, argument in self.arguments.items():
            if isinstance(argument, Pointer):
                argument = tensors[argument.tensor]
            elif isinstance(argument, Tiles):
                argument = argument.descriptor(tensors[argument.tensor])
            values[name] = argument
        return values

    def launch_publicly(self, *tensors: torch.Tensor) -> Any:
        """Launch through Triton, whatever could be done directly; returns the compiled kernel. The current device's."""
        return self.kernel[self._grid](**self._values(tensors))

    def _make_direct(self, compiled: Any, tensors: Sequence[torch.Tensor]) -> DirectLaunch | str:
        from diffopt_kernels.triton_entry import direct_launch

        if _current_stream is None:
            return "this PyTorch does not hand out raw streams"
        return direct_launch(compiled, self._grid, self.arguments, self._values(tensors))


class Recent:
    """A map that forgets what has not been looked up for long; it holds at most twice `size` entries.

    Two generations: a full young one becomes the old one, and what is found in the old one is young again. That needs
    neither a lock nor bookkeeping on a hit; threads that meet in between lose an entry at worst, never get a wrong one.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._young: dict[Hashable, Any] = {}
        self._old: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: Hashable) -> Any:
        """The value, or None."""
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value (not None) under a key."""
        young = self._young
        if len(young) >= self.size:
            self._old, young = young, {}
            self._young = young
        young[key] = value

    def clear(self) -> None:
        """Forget everything."""
        self._young, self._old = {}, {}
