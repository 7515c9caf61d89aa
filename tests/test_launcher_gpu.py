"""On a GPU: launches past Triton's launcher give the bits of Triton's own, wherever and however they are made."""

import threading

import pytest
import torch

from diffopt_kernels import attention, attention_launch, launch_attention
from diffopt_kernels.attention_cases import AttentionCase, Layout, make_inputs
from diffopt_kernels.attention_prepared import prepared_attention
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import AttentionLaunch, LaunchKey
from diffopt_kernels.launcher import PreparedLaunch

pytestmark = pytest.mark.gpu


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
    with torch.cuda.device(q.device):  # which Triton launches on
        prepared.launch_publicly(q, k, v, public)
    prepared(q, k, v, direct)  # compiles
    assert_direct(prepared)
    direct.fill_(torch.nan)
    prepared(q, k, v, direct)
    return public, direct


def assert_direct(prepared: PreparedLaunch) -> None:
    assert prepared.refusal is None
    assert prepared.is_direct


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
        prepared.launch_publicly(*fresh, wanted)
        for x, y in zip(static, fresh, strict=True):
            x.copy_(y)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, wanted)


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
    outs = [attention(*gpu_inputs(device=device)) for device in ("cuda:0", "cuda:1") * 2]
    assert [out.device.index for out in outs] == [0, 1, 0, 1]
    assert all(torch.equal(out.cpu(), outs[0].cpu()) for out in outs)


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
