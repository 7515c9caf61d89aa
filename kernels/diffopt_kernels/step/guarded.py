"""Step ops on guarded memory: what they allocate is full of NaN and lies between bands of a known value."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt_kernels.attention_cases import GUARD, poisoned_output

_ALLOCATIONS = frozenset(
    (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)
)
NAMESPACE = "diffopt_kernels"


class AllocationsMode(TorchDispatchMode):
    """Sees the allocations that diffopt's ops make, outputs and intermediate results alike.

    Attributes:
        within_op: whether an op's own code is running, not what calls it.
    """

    within_op = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:  # straight to the op's code, with this mode on for what that calls
            key = torch._C.DispatchKey.CUDA if args[0].is_cuda else torch._C.DispatchKey.CPU
            before, self.within_op = self.within_op, True
            try:
                with self:
                    return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
            finally:
                self.within_op = before
        out = func(*args, **kwargs)
        # The interpreter makes empty tensors to set storages into; these stay what they are.
        return self.replaced(out) if func in _ALLOCATIONS and out.numel() else out

    def replaced(self, out: torch.Tensor) -> torch.Tensor:
        """What the op gets for an allocation."""
        raise NotImplementedError


class Guarded(AllocationsMode):
    """Inside it a step op writes between guard bands; what it leaves unwritten is NaN.

    Attributes:
        allocations: so many were guarded; 0 means that nothing was looked at.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bands: list[torch.Tensor] = []

    @property
    def allocations(self) -> int:
        return len(self._bands) // 2

    @property
    def overrun(self) -> bool:
        """Whether a band was written to."""
        return any(bool((band != GUARD).any()) for band in self._bands)

    def replaced(self, out: torch.Tensor) -> torch.Tensor:
        flat, before, after = poisoned_output(torch.Size((out.numel(),)), out.dtype, out.device)
        self._bands += (before, after)
        return flat.as_strided(out.shape, out.stride())


class Poisoned(AllocationsMode):
    """Allocations full of NaN without bands around: for the sanitizer, which sees overruns itself."""

    def replaced(self, out: torch.Tensor) -> torch.Tensor:
        return out.fill_(torch.nan)


class OneRowShort(AllocationsMode):
    """A planted fault for the sanitizer: allocations of two dimensions or more lack a row, and the op doesn't know.

    An output that is handed to an op keeps its shape, which the op looks at; only the memory behind it lacks the row.
    """

    def replaced(self, out: torch.Tensor) -> torch.Tensor:
        if out.dim() < 2:
            return out
        if self.within_op:
            return out.new_empty((*out.shape[:-2], out.shape[-2] - 1, out.shape[-1]))
        storage = out.untyped_storage()
        storage.resize_(storage.nbytes() - out.shape[-1] * out.element_size())
        return out
