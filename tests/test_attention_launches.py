"""What attention prepares once and launches many times: never for other inputs, and with the bits of Triton's way."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt_kernels import attention, attention_launch, launch_attention
from diffopt_kernels.attention_cases import AttentionCase, Layout, make_inputs
from diffopt_kernels.attention_prepared import prepared_attention
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import AttentionLaunch, LaunchKey, use_tuned_launches
from diffopt_kernels.launcher import PreparedLaunch


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# --- what is remembered, and for what -------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What was prepared, in order; launches do nothing. The map of prepared launches begins and ends empty."""
    import sys

    module = sys.modules["diffopt_kernels.attention"]
    made = []

    def prepare(q, k, v, scale, launch, mask):
        made.append(SimpleNamespace(scale=scale, launch=launch, mask=mask))
        return lambda *tensors: None

    monkeypatch.setattr(module, "prepared_attention", prepare)
    monkeypatch.setattr(module, "_gpu", lambda device: ("", (9, 0)))
    module._PREPARED.clear()
    yield made
    module._PREPARED.clear()


Q = (2, 16, 3, 40)


def arguments(**changes) -> tuple[tuple[torch.Tensor, ...], dict]:
    given = {"q": zeros(*Q), "k": zeros(2, 33, 3, 40), "v": zeros(2, 33, 3, 40)} | changes
    return (given.pop("q"), given.pop("k"), given.pop("v")), given


VARIATIONS = {
    "more queries": {"q": zeros(2, 17, 3, 40)},
    "more keys": {"k": zeros(2, 34, 3, 40), "v": zeros(2, 34, 3, 40)},
    "smaller batch": {"q": zeros(1, 16, 3, 40), "k": zeros(1, 33, 3, 40), "v": zeros(1, 33, 3, 40)},
    "heads first in q": {"q": zeros(2, 3, 16, 40).transpose(1, 2)},
    "heads first in k": {"k": zeros(2, 3, 33, 40).transpose(1, 2)},
    "heads first in v": {"v": zeros(2, 3, 33, 40).transpose(1, 2)},
    "one query row for all": {"q": zeros(2, 1, 3, 40).expand(2, 16, 3, 40)},
    "an odd address of q": {"q": zeros(2 * 16 * 3 * 40 + 1)[1:].view(2, 16, 3, 40)},
    "an odd address of v": {"v": zeros(2 * 33 * 3 * 40 + 1)[1:].view(2, 33, 3, 40)},
    "bfloat16": {name: zeros(2, n, 3, 40, dtype=torch.bfloat16) for name, n in (("q", 16), ("k", 33), ("v", 33))},
    "float32": {name: zeros(2, n, 3, 40, dtype=torch.float32) for name, n in (("q", 16), ("k", 33), ("v", 33))},
    "another scale": {"scale": 0.5},
    "a mask": {"mask": zeros(33)},
    "a boolean mask": {"mask": zeros(33, dtype=torch.bool)},
    "a mask per query": {"mask": zeros(16, 33)},
    "a mask by columns": {"mask": zeros(33, 16).transpose(0, 1)},
}


def test_calls_of_one_layout_share_a_launch(prepared: list) -> None:
    for _ in range(3):
        tensors, rest = arguments()  # new tensors each time
        attention(*tensors, **rest)
    assert len(prepared) == 1


@pytest.mark.parametrize("name", VARIATIONS)
def test_whatever_differs_is_prepared_for_itself(name: str, prepared: list) -> None:
    """Whichever comes first: neither is served by the other's launch, and both are remembered."""
    plain, varied = arguments(), arguments(**VARIATIONS[name])
    for tensors, rest in (plain, varied, plain, varied):
        attention(*tensors, **rest)
    assert len(prepared) == 2


def test_every_variation_is_another(prepared: list) -> None:
    for changes in VARIATIONS.values():
        tensors, rest = arguments(**changes)
        attention(*tensors, **rest)
    same = 1  # an odd address is an odd address, whosever it is: pointer loads for all
    assert len(prepared) == len(VARIATIONS) - same


def test_a_given_launch_is_not_taken_for_the_chosen_one(prepared: list) -> None:
    (q, k, v), _ = arguments()
    attention(q, k, v, scale=0.25)
    for launch in attention_candidates([40])[:2] * 2:
        launch_attention(q, k, v, torch.empty_like(q), 0.25, launch)
    attention(q, k, v, scale=0.25)
    assert [x.launch for x in prepared[1:]] == attention_candidates([40])[:2]
    assert len(prepared) == 3


def test_new_tuned_launches_are_used_at_once(prepared: list) -> None:
    (q, k, v), _ = arguments()
    attention(q, k, v)
    use_tuned_launches("some other GPU", {})
    attention(q, k, v)
    assert len(prepared) == 2


def test_the_scale_is_that_of_the_head_dim_unless_given(prepared: list) -> None:
    for changes in ({}, {"scale": 0.5}):
        tensors, rest = arguments(**changes)
        attention(*tensors, **rest)
    assert [x.scale for x in prepared] == [40**-0.5, 0.5]


# --- a remembered layout changes no refusal -------------------------------------------------------------------------


def test_a_refusal_comes_each_time_and_is_not_remembered_as_right(prepared: list) -> None:
    (q, k, v), _ = arguments()
    attention(q, k, v)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"v.shape\[1\] is 20; allowed: 33, N_k of k"):
            attention(q, k, v[:, :20])
        with pytest.raises(ValueError, match=r"scale is -1\.0"):
            attention(q, k, v, scale=-1.0)
    assert len(prepared) == 1


def test_gradients_are_refused_for_a_known_layout_too(prepared: list) -> None:
    (q, k, v), _ = arguments()
    attention(q, k, v)
    for i, name in enumerate("qkv"):
        tensors = [q, k, v]
        tensors[i] = tensors[i].detach().requires_grad_()
        with pytest.raises(ValueError, match=f"{name}.requires_grad is True"):
            attention(*tensors)
        with torch.no_grad():
            attention(*tensors)
    mask = zeros(33).requires_grad_()
    with pytest.raises(ValueError, match=r"mask.requires_grad is True"):
        attention(q, k, v, mask=mask)
    with pytest.raises(ValueError, match=r"q.requires_grad is True"):
        torch.func.grad(lambda q: attention(q, k, v).sum())(q)


def test_tensors_without_data_are_checked_as_well() -> None:
    q, k, v = (zeros(*Q).to("meta") for _ in range(3))
    assert attention(q, k, v).shape == Q
    with pytest.raises(ValueError, match=r"v.shape\[1\] is 3; allowed: 16"):
        attention(q, k, v[:, :3])
    with pytest.raises(ValueError, match="device is"):
        attention(zeros(*Q), k, v)


# --- nothing bypasses the dispatcher --------------------------------------------------------------------------------


def small_inputs(device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(2, n, 2, 16, device=device) for n in (17, 33, 33)]


def test_a_dispatch_mode_sees_the_op(kernel_device: torch.device) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = small_inputs(kernel_device)
    attention(*inputs)
    with Watch():
        attention(*inputs)
    assert seen[0] == "diffopt_kernels.attention.default"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_maps_over_it(kernel_device: torch.device) -> None:
    q, k, v = small_inputs(kernel_device)
    attention(q, k, v)
    mapped = torch.vmap(lambda q: attention(q, k, v))(torch.stack([q, 2 * q]))
    assert torch.equal(mapped, torch.stack([attention(q, k, v), attention(2 * q, k, v)]))


def test_lazily_negated_inputs_are_resolved(kernel_device: torch.device) -> None:
    q, k, v = small_inputs(kernel_device)
    lazy = torch._neg_view(q)  # pyright: ignore[reportPrivateImportUsage]  (public calls give it other strides)
    assert lazy.is_neg()
    assert torch.equal(attention(lazy, k, v), attention(-q, k, v))


def test_a_parameter_is_taken_as_a_tensor(kernel_device: torch.device) -> None:
    q, k, v = small_inputs(kernel_device)
    assert torch.equal(attention(torch.nn.Parameter(q, requires_grad=False), k, v), attention(q, k, v))


# --- on a GPU: past Triton's launcher, the same bits ----------------------------------------------------------------


def kernels_here() -> list[AttentionLaunch]:
    """A 16-bit launch at d40 of each of our kernels that runs on this GPU."""
    capability = torch.cuda.get_device_capability()
    chosen: dict[str, AttentionLaunch] = {}
    shipped = attention_launch(LaunchKey(2, 64, 64, 8, 40), float32=False, aligned=False, capability=capability)
    for launch in (shipped, *attention_candidates([40])):
        if not launch.float32 and launch.takes(64) and (launch.kernel == "pointers" or capability[0] == 9):
            chosen.setdefault(launch.kernel, launch)
    return list(chosen.values())


KERNELS = ("pointers", "descriptors", "hopper", "short")


def launch_of(kernel: str) -> AttentionLaunch:
    launches = {launch.kernel: launch for launch in kernels_here()}
    if kernel not in launches:
        pytest.skip(f"the {kernel} kernel needs compute capability 9.x")
    return launches[kernel]


def gpu_inputs(
    n_q=300, n_k=64, layout: Layout = "contiguous", dtype=torch.float16, seed=0, device="cuda"
) -> list[torch.Tensor]:
    case = AttentionCase("launches", 2, n_q, n_k, 3, "spread 3", layout)
    return list(make_inputs(case, 40, dtype, torch.device(device), seed))


def in_both_ways(launch: AttentionLaunch, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output by Triton's public launch, and by the direct one, which is asserted to have been taken."""
    q, k, v = tensors
    prepared = prepared_attention(q, k, v, 0.2, launch, None)
    public, direct = torch.full_like(q, torch.nan).contiguous(), torch.full_like(q, torch.nan).contiguous()
    prepared._launch_publicly((q, k, v, public))
    prepared(q, k, v, direct)  # compiles
    assert_direct(prepared)
    direct.fill_(torch.nan)
    prepared(q, k, v, direct)
    return public, direct


def assert_direct(prepared: PreparedLaunch) -> None:
    assert prepared.refusal is None
    assert prepared.is_direct


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "heads first", "surrounded", "unaligned"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_both_ways_give_the_same_bits(kernel: str, layout, dtype: torch.dtype) -> None:
    launch = launch_of(kernel)
    if layout == "unaligned" and kernel != "pointers":
        pytest.skip("descriptors want 16-byte steps")
    for n_q, n_k in ((64, 64), (300, 64), (77, 33), (1, 1)):
        public, direct = in_both_ways(launch, gpu_inputs(n_q, n_k, layout, dtype))
        assert not public.isnan().any()
        assert torch.equal(public, direct), (n_q, n_k)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_reused_by_another_shape_is_read_as_that_shape(kernel: str) -> None:
    launch = launch_of(kernel)
    buffer = torch.randn(3, 2 * 320 * 3 * 40, device="cuda", dtype=torch.float16)
    for shape in ((2, 320, 3, 40), (2, 160, 6, 40), (2, 320, 3, 40), (4, 160, 3, 40)):
        q, k, v = (x[: torch.Size(shape).numel()].view(shape) for x in buffer)
        k, v = k[:, :64], v[:, :64]
        public, direct = in_both_ways(launch, [q, k, v])
        assert torch.equal(public, direct), shape
        out = launch_attention(q, k, v, torch.empty_like(q), 0.2, launch)
        assert torch.equal(out, public), shape


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_direct_launch_goes_to_the_current_stream(kernel: str) -> None:
    launch, ready = launch_of(kernel), gpu_inputs()
    q, k, v = ready
    prepared = prepared_attention(q, k, v, 0.2, launch, None)
    wanted, out = torch.empty_like(q), torch.empty_like(q)
    for _ in range(2):
        prepared(q, k, v, wanted)
    assert_direct(prepared)
    late = [torch.zeros_like(x) for x in ready]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on any other stream the zeros would be read
        for x, y in zip(late, ready, strict=True):
            x.copy_(y)
        prepared(*late, out)
    stream.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_direct_launch_is_captured_with_new_addresses(kernel: str) -> None:
    """Addresses first seen during the capture: their descriptors are encoded there."""
    launch, (q, k, v) = launch_of(kernel), gpu_inputs(seed=1)
    prepared = prepared_attention(q, k, v, 0.2, launch, None)
    for _ in range(2):
        prepared(q, k, v, torch.empty_like(q))
    assert_direct(prepared)
    static = gpu_inputs(seed=2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.empty_like(static[0])
        prepared(*static, out)
    for seed in (3, 4):
        fresh, wanted = gpu_inputs(seed=seed), torch.empty_like(static[0])
        prepared._launch_publicly((*fresh, wanted))
        for x, y in zip(static, fresh, strict=True):
            x.copy_(y)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.gpu
def test_threads_share_launches() -> None:
    """Two threads, a stream each, four layouts in turn: every result is that of the same call alone."""
    calls = [
        gpu_inputs(n_q, n_k, seed=seed) for seed, (n_q, n_k) in enumerate(((64, 64), (300, 64), (77, 33), (9, 300)))
    ]
    wanted = [attention(*call) for call in calls]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(offset: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(400):
                j = (i + offset) % len(calls)
                if not torch.equal(attention(*calls[j]), wanted[j]):
                    wrong.append(j)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_tensors_of_another_than_the_current_gpu(kernel: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    launch = launch_of(kernel)
    public, direct = in_both_ways(launch, gpu_inputs(device="cuda:1"))
    here, _ = in_both_ways(launch, gpu_inputs(device="cuda:0"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(public, direct)
    assert torch.equal(public.cpu(), here.cpu())


@pytest.mark.gpu
def test_a_profiler_that_comes_later_sees_every_launch() -> None:
    from triton import knobs

    seen, tensors = [], gpu_inputs()
    attention(*tensors)
    wanted = attention(*tensors)
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        outs = [attention(*tensors) for _ in range(3)]
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 3
    assert all(torch.equal(out, wanted) for out in outs)
    attention(*tensors)
    assert len(seen) == 3
