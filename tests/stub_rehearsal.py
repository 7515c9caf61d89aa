"""Rehearsals on the driver that only takes notes (stub_cuda.py): prints what was compiled and launched, as JSON.

`python stub_rehearsal.py [again]`: all cases, or with "again" only that of kernels which the disk has.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parent))
import stub_cuda
from launcher_cases import cases, scaled_copy

from diffopt_kernels import launcher, rehearsal
from diffopt_kernels.launcher import Pointer, PreparedLaunch
from diffopt_kernels.rehearsal import rehearsed

DEVICE = torch.device("cuda", 0)


@triton.jit
def broken(out_ptr, N: tl.constexpr):
    """Can't be compiled."""
    tl.static_assert(N < 0, "broken on purpose")
    tl.store(out_ptr, N)


class Notes:
    """What happened since the last `taken`."""

    def __init__(self) -> None:
        self.stub = stub_cuda.use()
        self.devices: list[int] = []
        self.compiled: list[tuple[str, str, bool]] = []
        self.passes: list[int] = []
        self.taken()
        knobs.compilation.listener = self._listen
        self._thread = threading.local()
        active: Any = driver.active
        active.get_current_device = launcher._current_device = torch.cuda.current_device = self._current
        torch.cuda.device = self._entered  # pyright: ignore[reportAttributeAccessIssue]

    def _current(self) -> int:
        return getattr(self._thread, "device", 0)

    @contextlib.contextmanager
    def _entered(self, index: int) -> Iterator[None]:
        self.devices.append(index)
        before, self._thread.device = self._current(), index
        try:
            yield
        finally:
            self._thread.device = before

    def _listen(self, *, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        self.compiled.append((metadata["hash"], threading.current_thread().name, cache_hit))

    def counting(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The same work, but that launches are noted each time it is done."""

        def noted() -> Any:
            before = self.stub.launches
            try:
                return work()
            finally:
                self.passes.append(self.stub.launches - before)

        return noted

    def taken(self) -> dict[str, Any]:
        """
        Returns:
            "passes": launches of each time that work was done; "kernels": of different kernels so many were compiled;
            "compiled" and "read": so often one was, or was read from the disk; "beside": how often in threads;
            "devices": those that threads chose.
        """
        hashes = [kernel for kernel, _, read in self.compiled if not read]
        found = {
            "passes": self.passes,
            "kernels": len(set(hashes)),
            "compiled": len(hashes),
            "read": sum(read for *_, read in self.compiled),
            "beside": sum(thread.startswith("diffopt-compiler") for _, thread, _ in self.compiled),
            "devices": sorted(set(self.devices)),
        }
        self.devices, self.compiled, self.passes = [], [], []
        return found


def scaled_launch(number: int, device: torch.device = DEVICE, **changed: Any) -> PreparedLaunch:
    """Of a kernel that differs by `number`."""
    arguments = {"out_ptr": Pointer(0), "x_ptr": Pointer(1), "scale": 0.5, "n": 1000, "stride": 3, "absent": None}
    return PreparedLaunch(scaled_copy, (1,), {**arguments, "BLOCK": number, **changed}, device=device)


def scaled(number: int, tensors: list[torch.Tensor], **changed: Any) -> Callable[[], None]:
    """The same, launched on tensors."""
    prepared = scaled_launch(number, **changed)
    return lambda: prepared(*tensors)


def outcome(work: Callable[[], Any]) -> str:
    """Its error in words, or what it returns."""
    try:
        return str(work())
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).splitlines()[-1:])}"


def main() -> None:
    notes, results = Notes(), {}
    prepared = [(PreparedLaunch(kernel, grid, x, device=DEVICE), t) for kernel, grid, x, t in cases().values()]

    def launch_all() -> str:
        for launch, tensors in prepared:
            launch(*tensors)
        return "done"

    if sys.argv[1:] == ["again"]:
        rehearsal._READING_S = 60.0
        rehearsed(notes.counting(launch_all))
        print(json.dumps({"again": notes.taken()}))
        return

    rehearsal._READING_S = 0.0
    returned = rehearsed(notes.counting(launch_all))
    results["first"] = {"returned": returned, "direct": all(x.is_direct for x, _ in prepared), **notes.taken()}
    rehearsed(notes.counting(launch_all))
    results["second"] = notes.taken()

    tensors = [torch.zeros(64), torch.zeros(64)]
    alike = [scaled(32, tensors, n=n) for n in (1001, 1003, 1005)]
    rehearsed(notes.counting(lambda: [launch() for launch in alike]))
    results["alike"] = notes.taken()

    fault = PreparedLaunch(broken, (1,), {"out_ptr": Pointer(0), "N": 1}, device=DEVICE)
    good = scaled(64, tensors)
    said = outcome(lambda: rehearsed(notes.counting(lambda: (good(), fault(tensors[0])))))
    results["fault"] = {"said": said, "alone": outcome(lambda: fault(tensors[0])), **notes.taken()}
    good()
    results["after the fault"] = notes.taken()

    def interrupted() -> None:
        interrupted_launch()
        raise KeyboardInterrupt

    interrupted_launch = scaled(128, tensors)
    said = outcome(lambda: rehearsed(notes.counting(interrupted)))
    notes.taken()
    notes.counting(interrupted_launch)()
    results["after an interrupt"] = {"said": said, **notes.taken()}

    def with_a_thread() -> None:
        mine()
        thread = threading.Thread(target=notes.counting(others))
        thread.start()
        thread.join()

    mine, others = scaled(16, tensors), scaled(256, tensors)
    rehearsed(with_a_thread)
    results["another thread"] = notes.taken()

    arguments: dict[str, Any] = {"out_ptr": tensors[0], "x_ptr": tensors[1], "scale": 0.5, "n": 1000, "stride": 3}
    arguments |= {"absent": None, "BLOCK": 512}
    rehearsed(notes.counting(lambda: (mine(), scaled_copy[(1,)](**arguments))))
    results["another's launch"] = notes.taken()

    both = [scaled_launch(2048, torch.device("cuda", index)) for index in (0, 1)]
    rehearsed(notes.counting(lambda: [launch(*tensors) for launch in both]))
    results["two GPUs"] = notes.taken()
    metadata = []  # each compiled kernel has an object of its own
    for index, launch in enumerate(both):
        with torch.cuda.device(index):
            metadata.append(launch.launch_publicly(*tensors).metadata)
    results["two GPUs"]["shared"] = metadata[0] is metadata[1]
    notes.taken()

    del triton.AsyncCompileMode
    rehearsed(notes.counting(scaled(1024, tensors)))
    results["no such mode"] = notes.taken()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
