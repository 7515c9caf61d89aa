"""The launcher: what reaches the driver is what Triton sends, and whatever is unknown takes Triton's way."""

import functools
import gc
import inspect
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from diffopt_kernels import launcher, triton_entry
from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent, Tiles

triton = pytest.importorskip("triton")

CASE_NAMES = (
    *("pointers", "integers by value", "64-bit integers", "unaligned", "descriptors", "gluon"),
    *("attention pointers", "attention descriptors", "attention hopper", "attention short", "attention with a mask"),
)


# --- Triton's real launch path on a driver that takes notes ---------------------------------------------------------


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Per case what the driver was handed by Triton and by the launcher; see stub_cuda.py."""
    import stub_cuda

    return stub_cuda.output_of("stub_cuda.py", tmp_path_factory.mktemp("stub"))


@pytest.mark.parametrize("name", CASE_NAMES)
def test_the_driver_is_handed_the_bytes_that_triton_hands_it(name: str, notes: dict[str, dict]) -> None:
    """Grid, block, shared memory, stream, function and every parameter, descriptors included, byte for byte."""
    case = notes[name]
    assert case["refusal"] is None
    assert case["is_direct"]
    assert len(case["public"]["bytes"]) > 2 * 40, "no parameters were noted"
    assert case["direct"]["bytes"] == case["again"]["bytes"] == case["public"]["bytes"] == case["first"]["bytes"]


@pytest.mark.parametrize("name", CASE_NAMES)
def test_tensors_elsewhere_get_their_own_addresses(name: str, notes: dict[str, dict]) -> None:
    case = notes[name]
    assert case["moved"]["bytes"] == case["public moved"]["bytes"] != case["public"]["bytes"]


@pytest.mark.parametrize(("name", "descriptors"), [("pointers", 0), ("descriptors", 1), ("gluon", 2)])
def test_a_descriptor_is_encoded_once_per_address(name: str, descriptors: int, notes: dict[str, dict]) -> None:
    encodes = [notes[name][what]["encodes"] for what in ("public", "direct", "again", "moved")]
    assert encodes == [descriptors, descriptors, 0, descriptors]


# --- what is not as it should be takes Triton's way -----------------------------------------------------------------


class FakeKernel:
    """A kernel that notes its public launches; `compiled` is what each returns."""

    def __init__(self, compiled: object = None) -> None:
        self.compiled = compiled
        self.launches: list[dict] = []
        self.pre_run_hooks: list = []

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(**values):
            self.launches.append(values)
            return self.compiled

        return launch


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """(addresses, stream) of direct launches; the machine has two GPUs, 0 is current, streams are 100 + device."""
    calls = []
    monkeypatch.setattr(launcher, "_current_device", lambda: 0)
    monkeypatch.setattr(launcher, "_current_stream", lambda index: 100 + index)
    monkeypatch.setattr(launcher, "interpreted", lambda: False)
    entry = lambda compiled, *_: compiled or (lambda addresses, stream: calls.append((addresses, stream)))  # noqa: E731
    monkeypatch.setattr(triton_entry, "direct_launch", entry)
    return calls


def prepare(kernel, device: str = "cuda:0") -> PreparedLaunch:
    return PreparedLaunch(kernel, (1,), {"x": Pointer(0), "n": 3}, device=torch.device(device))


def test_the_first_call_is_public_and_the_next_are_direct(direct_calls: list) -> None:
    kernel, x, y = FakeKernel(), torch.zeros(8), torch.zeros(8)
    prepared = prepare(kernel)
    for tensor in (x, x, y):
        prepared(tensor)
    assert kernel.launches == [{"x": x, "n": 3}]
    assert direct_calls == [([x.data_ptr()], 100), ([y.data_ptr()], 100)]


def test_each_pattern_of_alignment_compiles_for_itself(direct_calls: list) -> None:
    kernel, x = FakeKernel(), torch.zeros(8)
    prepared = prepare(kernel)
    for tensor in (x, x[1:], x, x[1:]):
        prepared(tensor)
    assert len(kernel.launches) == 2
    assert [addresses[0] - x.data_ptr() for addresses, _ in direct_calls] == [0, 4]


def test_a_refusal_is_kept_and_every_call_goes_through_triton(direct_calls: list) -> None:
    kernel = FakeKernel("it is a stranger")
    prepared = prepare(kernel)
    for _ in range(3):
        prepared(torch.zeros(8))
    assert prepared.refusal == "it is a stranger"
    assert (len(kernel.launches), direct_calls, prepared.is_direct) == (3, [], False)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_sees_every_launch(hook: str, direct_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    kernel, x = FakeKernel(), torch.zeros(8)
    prepared = prepare(kernel)
    chain = getattr(knobs.runtime, hook)
    seen = lambda metadata: None  # noqa: E731
    prepared(x)
    prepared(x)
    chain.add(seen)
    try:
        prepared(x)
    finally:
        chain.remove(seen)
    prepared(x)
    assert (len(kernel.launches), len(direct_calls)) == (2, 2)
    monkeypatch.setattr(knobs.runtime, hook, seen)  # a version without chains
    prepared(x)
    assert (len(kernel.launches), len(direct_calls)) == (3, 2)


def test_a_hook_of_the_kernel_itself_is_called(direct_calls: list) -> None:
    kernel, x = FakeKernel(), torch.zeros(8)
    prepared = prepare(kernel)
    prepared(x)
    kernel.pre_run_hooks.append(print)
    prepared(x)
    assert (len(kernel.launches), direct_calls) == (2, [])


def test_another_current_device_is_set_aside_for_the_launch(
    direct_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *_: object) -> None:
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    x = torch.zeros(8)
    prepared = prepare(FakeKernel(), "cuda:1")
    prepared(x)
    prepared(x)
    assert entered == [1, "left"] * 2
    assert direct_calls == [([x.data_ptr()], 101)]
    prepare(FakeKernel(), "cuda:0")(x)
    assert len(entered) == 4


def test_the_interpreter_is_never_bypassed(direct_calls: list) -> None:
    kernel = FakeKernel()
    prepared = prepare(kernel, "cpu")
    prepared(torch.zeros(8))
    prepared(torch.zeros(8))
    assert (prepared.refusal, len(kernel.launches), direct_calls) == ("interpreted on the CPU", 2, [])


# --- which launchers are known --------------------------------------------------------------------------------------


class Launcher37:
    """As Triton 3.7's CudaLauncher, as far as the entry looks at it."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False
    arg_annotations = ("a", "b", "c", "d")
    kernel_signature = b"signature"
    launch = None

    def __call__(
        self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook,
        launch_exit_hook, *args,
    ):  # fmt: skip
        raise AssertionError("bypassed")


class Launcher36(Launcher37):
    def __call__(self, gridX, gridY, gridZ, stream, function, *args):
        raise AssertionError("bypassed")


def compiled_kernel(launcher_object, **changes) -> SimpleNamespace:
    def kernel(x_ptr, n, scale, BLOCK):
        raise AssertionError("never run")

    fields = {
        "run": launcher_object,
        "function": 1234,
        "packed_metadata": (4, 1, 0),
        "metadata": SimpleNamespace(tensordesc_meta=None),
        "src": SimpleNamespace(
            signature={"x_ptr": "*fp16", "n": "i32", "scale": "fp32", "BLOCK": "constexpr"},
            fn=SimpleNamespace(signature=inspect.signature(kernel)),
        ),
    }
    return SimpleNamespace(**(fields | changes))


@pytest.fixture
def entry_calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """What a recording C entry was called with."""
    calls = []
    monkeypatch.setattr(triton_entry, "_c_entry", lambda launch: lambda *arguments: calls.append(arguments))
    return calls


ARGUMENTS = {"x_ptr": Pointer(0), "n": 7, "scale": 0.5, "BLOCK": 64}


def direct(compiled, monkeypatch: pytest.MonkeyPatch, known: type, arguments=ARGUMENTS):
    from triton.backends.nvidia import driver

    monkeypatch.setattr(driver, "CudaLauncher", known)
    return triton_entry.direct_launch(compiled, (5,), arguments, arguments)


def test_the_convention_of_3_7(entry_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = direct(compiled_kernel(Launcher37()), monkeypatch, Launcher37)
    assert callable(launch)
    launch([4096], 9)
    head = (5, 1, 1, 9, 1234, False, False)
    nothing = (None,) * 5  # launch metadata, two hooks, two kinds of scratch
    last = (("a", "b", "c", "d"), b"signature", [4096, 7, 0.5, None])
    assert entry_calls == [(*head, (4, 1, 0), *nothing, *last)]


def test_the_convention_of_3_6(entry_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver

    monkeypatch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKKppOOOOOO", raising=False)
    launch = direct(compiled_kernel(Launcher36()), monkeypatch, Launcher36)
    assert callable(launch)
    launch([4096], 9)
    head = (5, 1, 1, 9, 1234, False, False)
    assert entry_calls == [(*head, None, None, (4, 1, 0), None, None, None, 4096, 7, 0.5, None)]
    monkeypatch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKKppOOOOOOO")
    assert "base arguments" in str(direct(compiled_kernel(Launcher36()), monkeypatch, Launcher36))


class _Scratch(Launcher37):
    global_scratch_size = 128


class _Profiled(Launcher37):
    profile_scratch_size = 8


class _OtherCall(Launcher37):
    def __call__(self, grid, stream, function, *args):
        raise AssertionError("bypassed")


class _OtherCount(Launcher37):
    arg_annotations = ("a", "b")


class _NoPdl(Launcher37):
    @property
    def launch_pdl(self):
        raise AttributeError("launch_pdl")


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (_Scratch, "scratch"),
        (_Profiled, "scratch"),
        (_OtherCall, "grid, stream, function, args"),
        (_OtherCount, "counts"),
        (_NoPdl, "launch_pdl"),
    ],
)
def test_a_launcher_that_differs_is_refused(
    known: type, words: str, entry_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = direct(compiled_kernel(known()), monkeypatch, known)
    assert isinstance(reason, str)
    assert words in reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"function": None}, "no handle"),
        ({"packed_metadata": (4, 1, 0, 2)}, "metadata"),
        ({"run": SimpleNamespace()}, "it is a SimpleNamespace"),
        ({"metadata": SimpleNamespace(tensordesc_meta=[{"fp4_padded": False}])}, "descriptors"),
        ({"src": SimpleNamespace(signature={"x_ptr": ("*fp16", "i32")}, fn=compiled_kernel(None).src.fn)}, "tuple"),
        ({"src": SimpleNamespace(signature={"y": "nvTmaDesc"}, fn=compiled_kernel(None).src.fn)}, "y"),
    ],
)
def test_a_kernel_that_differs_is_refused(
    changes: dict, words: str, entry_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = direct(compiled_kernel(Launcher37(), **changes), monkeypatch, Launcher37)
    assert isinstance(reason, str)
    assert words in reason


def test_an_entry_written_in_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launcher37, "launch", functools.partial(print))
    assert "no C function" in str(direct(compiled_kernel(Launcher37()), monkeypatch, Launcher37))


# --- descriptors and other memories ---------------------------------------------------------------------------------


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list:
    """(address, shape, block) of every encoding, in a cache of eight."""
    from triton.backends.nvidia import driver

    made = []

    def encode(descriptor, metadata):
        made.append((descriptor.base.data_ptr(), tuple(descriptor.shape), metadata["block_size"]))
        return [object(), *descriptor.shape]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(triton_entry, "encoded", functools.lru_cache(8)(triton_entry.encoded.__wrapped__))
    return made


def tiling(x: torch.Tensor, block: tuple[int, ...] = (16, 16)) -> triton_entry.Tiling:
    descriptor = Tiles(0, tuple(x.shape), x.stride(), block).descriptor(x)
    return triton_entry.Tiling(descriptor, {"block_size": block})


def test_descriptors_are_kept_by_address_and_tiling(encodings: list) -> None:
    x = torch.zeros(64, 32, dtype=torch.float16)
    wide, narrow, other = tiling(x), tiling(x, (16, 8)), tiling(x[:32])
    first = triton_entry.encoded(x.data_ptr(), wide)
    assert triton_entry.encoded(x.data_ptr(), wide) is first
    different = [triton_entry.encoded(x.data_ptr() + 64, wide)]
    different += [triton_entry.encoded(x.data_ptr(), tiles) for tiles in (narrow, other)]
    assert len({first, *different}) == 4
    assert encodings == [
        (x.data_ptr(), (64, 32), (16, 16)),
        (x.data_ptr() + 64, (64, 32), (16, 16)),
        (x.data_ptr(), (64, 32), (16, 8)),
        (x.data_ptr(), (32, 32), (16, 16)),
    ]


def test_descriptors_not_used_for_long_are_dropped(encodings: list) -> None:
    tiles = tiling(torch.zeros(64, 32, dtype=torch.float16))
    for address in (0, *range(16, 16 * 8, 16), 0, 16 * 8, 0, 16):  # eight, 0 again, a ninth, 0 again, the dropped one
        triton_entry.encoded(address, tiles)
    assert [address for address, *_ in encodings].count(0) == 1
    assert [address for address, *_ in encodings].count(16) == 2
    assert 500 < triton_entry.DESCRIPTORS_KEPT < 100_000


def test_a_tiling_keeps_no_tensor_alive() -> None:
    x = torch.zeros(64, 32, dtype=torch.float16)
    alive = weakref.ref(x)
    tiles = tiling(x)
    del x
    gc.collect()
    assert alive() is None
    assert tiles.at(64).base.data_ptr() == 64


def test_recent_forgets_what_is_not_looked_up() -> None:
    recent = Recent(4)
    recent.put("kept", -1)
    for i in range(100):
        recent.put(i, i)
        assert recent.get("kept") == -1
        assert recent.get(i) == i
        assert len(recent) <= 8
    assert recent.get(0) is None
    assert recent.get("never") is None
    recent.clear()
    assert recent.get("kept") is None


def test_recent_never_mixes_entries_up_between_threads() -> None:
    recent, wrong = Recent(8), []

    def work(offset: int) -> None:
        for i in range(20_000):
            key = (i * 7 + offset) % 40
            value = recent.get(key)
            if value is None:
                recent.put(key, f"value {key}")
            elif value != f"value {key}":
                wrong.append((key, value))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(recent) <= 16 + 4
