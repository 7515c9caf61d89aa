"""The C entry of a compiled Triton kernel, called directly: all that is known here of Triton's private interfaces.

Two calling conventions are known, that of Triton 3.6 and that of 3.7, told apart by the parameters of its launcher and
checked piece by piece; `direct_launch` answers anything else with the reason, and the caller takes Triton's public way.
The conventions were read from backends/nvidia/driver.py and driver.c of triton 3.6.0 and 3.7.1.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from diffopt_kernels.launcher import DirectLaunch, Pointer, Tiles

_PARAMETERS_3_6 = ("self", "gridX", "gridY", "gridZ", "stream", "function", "args")
_PARAMETERS_3_7 = (
    *("self", "gridX", "gridY", "gridZ", "stream", "function"),
    *("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"),
)
_BASE_ARGUMENTS_3_6 = "iiiKKppOOOOOO"
_SCALARS = {"i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64", "fp16", "bf16", "fp32", "f32", "fp64"}
_STREAM = 3  # position of the stream in both conventions
DESCRIPTORS_KEPT = 4096  # 128 bytes each; a UNet's forward makes 32 calls of at most 12


class _Unknown(Exception):
    """Something is not as these conventions have it; the text says what."""


class Tiling:
    """How descriptors of one argument of one kernel are encoded; equal only to itself, so it can key a cache."""

    def __init__(self, descriptor: Any, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self.pattern = copy.copy(descriptor)
        self.pattern.base = None  # a pattern keeps no tensor alive

    def at(self, address: int) -> Any:
        """The descriptor object with its base at an address."""
        placed = copy.copy(self.pattern)
        placed.base = _Address(address)
        return placed


class _Address:
    """Stands for a tensor where only its address is asked for."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


@lru_cache(maxsize=DESCRIPTORS_KEPT)
def encoded(address: int, tiling: Tiling) -> Any:
    """The hardware's descriptor (an immutable CUtensorMap of 128 bytes) of one address.

    It holds numbers, not memory: if the memory is freed and used again by a tensor of the same tiling it is right
    again, and a tensor of another shape has another tiling.
    """
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg(tiling.at(address), tiling.metadata)[0]


def direct_launch(
    compiled: Any, grid: Sequence[int], arguments: Mapping[str, Any], values: Mapping[str, Any]
) -> DirectLaunch | str:
    """A function that launches a compiled kernel without Triton's Python, or why there is none.

    Args:
        compiled: what Triton's public launch returned.
        grid: programs along one to three axes.
        arguments: as a `PreparedLaunch` takes them.
        values: the same as they were handed to Triton.
    """
    try:
        return _direct_launch(compiled, (*grid, 1, 1)[:3], arguments, values)
    except (_Unknown, AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        return f"Triton's launcher is not one of the known ones: {error}"


def _direct_launch(
    compiled: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], values: Mapping[str, Any]
) -> DirectLaunch:
    from triton.backends.nvidia import driver

    launcher = compiled.run
    _require(type(launcher) is driver.CudaLauncher, f"it is a {type(launcher).__name__}")
    _require(launcher.global_scratch_size == 0 and launcher.profile_scratch_size == 0, "it wants scratch memory")
    _require(isinstance(compiled.function, int), "the kernel has no handle")
    metadata = compiled.packed_metadata
    _require(len(metadata) == 3 and all(isinstance(x, int) for x in metadata), "the kernel's metadata are others")
    row, pointers, tilings = _kernel_arguments(compiled, arguments, values)
    entry = _c_entry(launcher.launch)
    head = [*grid, 0, compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl]

    parameters = tuple(inspect.signature(driver.CudaLauncher.__call__).parameters)
    if parameters == _PARAMETERS_3_6:
        base_arguments = driver._BASE_ARGS_FORMAT  # pyright: ignore[reportAttributeAccessIssue]  (not in 3.7)
        _require(base_arguments == _BASE_ARGUMENTS_3_6, "its base arguments are others")
        # scratch, scratch, metadata, launch metadata, enter hook, exit hook
        return _flat(entry, [*head, None, None, metadata, None, None, None], row, pointers, tilings)
    _require(parameters == _PARAMETERS_3_7, f"it takes {', '.join(parameters[1:])}")
    _require(len(launcher.arg_annotations) == len(row), "it counts the kernel's arguments differently")
    # metadata, launch metadata, enter hook, exit hook, scratch, scratch
    tail = [metadata, None, None, None, None, None, launcher.arg_annotations, launcher.kernel_signature]
    return _nested(entry, [*head, *tail], row, pointers, tilings)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Unknown(otherwise)


def _c_entry(launch: Any) -> Callable[..., None]:
    """The C function behind a launcher's `launch`, which is wrapped where the kernel takes descriptors."""
    if inspect.isfunction(launch):
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
    _require(inspect.isbuiltin(launch) and launch.__name__ == "launch", "its entry is no C function")
    return launch


def _kernel_arguments(
    compiled: Any, arguments: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[list[Any], list[tuple[int, int]], list[tuple[int, int, Tiling]]]:
    """The row of C arguments, with (position, tensor) of pointers and (position, tensor, tiling) of descriptors."""
    tile_metadata = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    parameters = compiled.src.fn.signature.parameters
    row: list[Any] = []
    pointers, tilings = [], []
    for name, kind in compiled.src.signature.items():
        argument = arguments.get(name)
        if kind == "constexpr":
            row.append(None)  # compiled in; the C side skips it
        elif isinstance(argument, Pointer) and kind.startswith("*"):
            pointers.append((len(row), argument.tensor))
            row.append(0)
        elif isinstance(argument, Tiles) and kind.startswith("tensordesc"):
            metadata = next(tile_metadata, {"fp4_padded": True})
            _require(not metadata["fp4_padded"], f"{name} is no plain descriptor")
            tilings.append((len(row), argument.tensor, Tiling(values[name], metadata)))
            row += [None, *argument.shape, *argument.strides]
        else:
            value = values[name] if name in values else parameters[name].default
            _require(kind in _SCALARS and isinstance(value, (int, float)), f"{name} is a {kind}")
            row.append(value)
    _require(next(tile_metadata, None) is None, "it counts descriptors differently")
    return row, pointers, tilings


def _flat(entry, head: list[Any], row: list[Any], pointers, tilings) -> DirectLaunch:
    """Triton 3.6: one flat argument list."""
    template = [*head, *row]
    pointers = [(len(head) + position, tensor) for position, tensor in pointers]
    tilings = [(len(head) + position, tensor, tiling) for position, tensor, tiling in tilings]

    def launch(addresses: Sequence[int], stream: int) -> None:
        filled = template.copy()
        filled[_STREAM] = stream
        for position, tensor in pointers:
            filled[position] = addresses[tensor]
        for position, tensor, tiling in tilings:
            filled[position] = encoded(addresses[tensor], tiling)
        entry(*filled)

    return launch


def _nested(entry, head: list[Any], row: list[Any], pointers, tilings) -> DirectLaunch:
    """Triton 3.7: the kernel's arguments are one list at the end."""
    before, after = head[:_STREAM], head[_STREAM + 1 :]

    def launch(addresses: Sequence[int], stream: int) -> None:
        filled = row.copy()
        for position, tensor in pointers:
            filled[position] = addresses[tensor]
        for position, tensor, tiling in tilings:
            filled[position] = encoded(addresses[tensor], tiling)
        entry(*before, stream, *after, filled)

    return launch
