"""What attention refuses and in which words, and which launches can be selected."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffopt_kernels import (
    HEAD_DIMS,
    attention,
    attention_bytes,
    attention_flops,
    attention_launch,
    attention_launches,
    device_reasons,
    unsupported_reasons,
)
from diffopt_kernels.attention import is_aligned
from diffopt_kernels.attention_gluon import hopper_programs, prepared_gluon_attention
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.chips import AMD
from diffopt_kernels.launch import MODEL_HEAD_DIMS, AttentionLaunch, LaunchKey, use_tuned_launches


def zeros(*shape: int, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = (2, 16, 3, 40)

BAD_INPUTS = {
    "three dimensions": ((zeros(16, 3, 40), zeros(*GOOD), zeros(*GOOD)), ["q has 3 dimensions", "[B, N, H, D]"]),
    "five dimensions": ((zeros(*GOOD), zeros(*GOOD), zeros(1, *GOOD)), ["v has 5 dimensions", "[B, N, H, D]"]),
    "batch": ((zeros(*GOOD), zeros(3, 16, 3, 40), zeros(*GOOD)), ["k.shape[0] is 3", "allowed: 2, B of q"]),
    "heads": ((zeros(*GOOD), zeros(*GOOD), zeros(2, 16, 4, 40)), ["v.shape[2] is 4", "allowed: 3, H of q"]),
    "head dim of k": ((zeros(*GOOD), zeros(2, 16, 3, 64), zeros(*GOOD)), ["k.shape[3] is 64", "allowed: 40, D of q"]),
    "keys against values": ((zeros(*GOOD), zeros(*GOOD), zeros(2, 17, 3, 40)), ["v.shape[1] is 17", "allowed: 16"]),
    "unsupported head dim": ((zeros(2, 16, 3, 44),) * 3, ["q.shape[3] is 44", "multiples of 8 from 8 to 256"]),
    "head dim too large": ((zeros(2, 16, 3, 264),) * 3, ["q.shape[3] is 264", "multiples of 8 from 8 to 256"]),
    "no keys": ((zeros(*GOOD), zeros(2, 0, 3, 40), zeros(2, 0, 3, 40)), ["k.shape[1] is 0", "at least 1 token"]),
    "no queries": ((zeros(2, 0, 3, 40), zeros(*GOOD), zeros(*GOOD)), ["q.shape[1] is 0", "at least 1 token"]),
    "float64": ((zeros(*GOOD, dtype=torch.float64),) * 3, ["q.dtype is torch.float64", "torch.bfloat16"]),
    "integers": ((zeros(*GOOD, dtype=torch.int32),) * 3, ["q.dtype is torch.int32", "torch.float16"]),
    "mixed dtypes": (
        (zeros(*GOOD), zeros(*GOOD), zeros(*GOOD, dtype=torch.float32)),
        ["v.dtype is torch.float32", "allowed: torch.float16"],
    ),
    "mixed devices": ((zeros(*GOOD), zeros(*GOOD, device="meta"), zeros(*GOOD)), ["k.device is meta", "allowed: cpu"]),
    "last stride": (
        (zeros(*GOOD), zeros(2, 16, 40, 3).transpose(2, 3), zeros(*GOOD)),
        ["k.stride(3) is 3", "allowed: 1"],
    ),
}


@pytest.mark.parametrize(("inputs", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_a_bad_input_is_named_with_its_value_and_what_is_allowed(inputs, words: list[str]) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        attention(*inputs)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert any(words[0] in reason for reason in unsupported_reasons(*inputs))


BAD_MASKS = {
    "keys": (zeros(2, 1, 16, 17), ["mask.shape is [2, 1, 16, 17]", "allowed: what broadcasts to [2, 3, 16, 16]"]),
    "heads before batch": (zeros(3, 2, 1, 16), ["mask.shape is [3, 2, 1, 16]", "[B, H, N_q, N_k]"]),
    "five dimensions": (zeros(1, 2, 3, 16, 16), ["mask.shape is [1, 2, 3, 16, 16]", "[B, H, N_q, N_k]"]),
    "integers": (zeros(16, 16, dtype=torch.int64), ["mask.dtype is torch.int64", "torch.bool, torch.float32 or q's"]),
    "another half": (zeros(16, 16, dtype=torch.bfloat16), ["mask.dtype is torch.bfloat16", "torch.float32 or q's"]),
    "device": (zeros(16, 16, device="meta"), ["mask.device is meta", "allowed: cpu, as q's"]),
    "gradients": (zeros(16, 16).requires_grad_(), ["mask.requires_grad is True", "allowed: False"]),
}


@pytest.mark.parametrize(("mask", "words"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_a_bad_mask_is_named_with_its_value_and_what_is_allowed(mask: torch.Tensor, words: list[str]) -> None:
    q = zeros(*GOOD)
    with pytest.raises(ValueError, match="allowed") as caught:
        attention(q, q, q, mask=mask)
    assert all(word in str(caught.value) for word in words)
    assert len(unsupported_reasons(q, q, q, mask)) == 1 + len(device_reasons(q.device))


@pytest.mark.parametrize("shape", [(), (16,), (16, 16), (3, 1, 16), (2, 1, 1, 16), (2, 3, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32], ids=str)
def test_a_mask_that_broadcasts_is_taken(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q = zeros(*GOOD)
    assert unsupported_reasons(q, q, q, zeros(*shape, dtype=dtype)) == device_reasons(q.device)


def test_every_reason_is_listed_at_once() -> None:
    reasons = unsupported_reasons(zeros(2, 16, 3, 44), zeros(1, 16, 3, 44), zeros(2, 16, 3, 44, dtype=torch.float32))
    assert {reason.split(" is ")[0] for reason in reasons} >= {"k.shape[0]", "v.dtype", "q.shape[3]"}


def test_gradients_are_refused_only_where_they_would_be_recorded() -> None:
    q = zeros(*GOOD).requires_grad_()
    with pytest.raises(ValueError, match=r"q.requires_grad is True; allowed: False"):
        attention(q, q, q)
    with torch.no_grad():
        assert unsupported_reasons(q, q, q) == device_reasons(q.device)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_makes_no_softmax_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale is {scale}; allowed: a finite number above zero"):
        attention(zeros(*GOOD), zeros(*GOOD), zeros(*GOOD), scale=scale)


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, without TRITON_INTERPRET unless given."""
    import os

    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_triton_the_package_imports_and_says_so() -> None:
    code = """
import sys
from dataclasses import replace
from functools import partial
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTriton())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch, diffopt_kernels as kernels
print(kernels.device_reasons("cpu"))
try:
    kernels.attention(*[torch.zeros(1, 1, 1, 40)] * 3)
except ValueError as error:
    print(error)
"""
    lines = run_python(code).splitlines()
    assert len(lines) == 2
    assert all("triton is not installed" in line for line in lines)


def test_importing_the_package_loads_no_triton_and_touches_no_gpu() -> None:
    code = "import sys, torch, diffopt_kernels; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert run_python(code) == "False False"


def test_a_cpu_without_the_interpreter_is_refused_in_words() -> None:
    code = "import torch, diffopt_kernels as kernels; q = torch.zeros(1, 1, 1, 40)\n"
    code += "try: kernels.attention(q, q, q)\nexcept ValueError as error: print(error)"
    assert run_python(code).startswith("q.device is cpu; allowed: a CUDA device")


CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), AMD]


class TestLaunch:
    @pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
    def test_at_most_forty_need_checking(self, capability: tuple[int, int]) -> None:
        launches = attention_launches(capability)
        assert 10 <= len(launches) <= 40
        assert len({launch.label for launch in launches}) == len(launches), "a label names two launches"

    @given(
        head_dim=st.sampled_from(HEAD_DIMS),
        n_k=st.integers(1, 2**20),
        float32=st.booleans(),
        aligned=st.booleans(),
        capability=st.sampled_from(CAPABILITIES),
    )
    def test_every_selected_launch_is_listed_and_fits(self, head_dim, n_k, float32, aligned, capability) -> None:
        launch = attention_launch(
            LaunchKey(2, n_k, n_k, 8, head_dim), float32=float32, aligned=aligned, capability=capability
        )
        assert launch.family in {checked.family for checked in attention_launches(capability)}
        assert launch.head_dim == head_dim
        assert launch.float32 == float32
        if not aligned or capability[0] != 9:
            assert launch.kernel == "pointers"

    def test_a_tuned_shape_wins_on_its_gpu_alone_and_serves_its_neighbours(self) -> None:
        choice = {"float32": False, "aligned": True, "capability": (9, 0)}
        here, small = LaunchKey(2, 4096, 4096, 8, 40), LaunchKey(2, 512, 512, 8, 40)
        tuned = [AttentionLaunch(40, (64, 0), "pointers", 128, 64, 4, stages) for stages in (2, 3)]
        use_tuned_launches("some GPU", dict(zip((here, small), tuned, strict=True)))
        try:
            pick = partial(attention_launch, **choice, device_name="some GPU")
            assert pick(here) == pick(replace(here, batch=16, n_q=9216, n_k=9216)) == tuned[0]
            assert pick(replace(small, n_q=600)) == tuned[1]
            untuned = [pick(replace(here, n_k=77)), pick(replace(here, head_dim=80))]
            assert not {*untuned, attention_launch(here, **choice)} & set(tuned)
        finally:
            use_tuned_launches("some GPU", {})
        assert attention_launch(here, **choice, device_name="some GPU") == attention_launch(here, **choice)

    @pytest.mark.parametrize("launch", [*attention_launches(), *attention_candidates()], ids=lambda x: x.label)
    def test_parts_cover_the_head_dim_in_shapes_the_matrix_unit_takes(self, launch: AttentionLaunch) -> None:
        first, second = launch.parts
        assert first + second >= launch.head_dim
        assert first < launch.head_dim or second == 0
        keys = launch.key_blocks if launch.kernel == "short" else (launch.block_n,)
        warps = launch.num_warps - launch.has_loader if launch.kernel == "hopper" else launch.num_warps
        sizes = [size for size in (launch.block_m, *keys, warps, first, second) if size]
        for size in sizes:
            assert size & (size - 1) == 0, f"{size} is no power of two"
        assert min(size for size in (*keys, first, second) if size) >= 16

    @pytest.mark.parametrize(
        "launch", [x for x in attention_candidates() if x.kernel in ("hopper", "short")], ids=lambda x: x.label
    )
    def test_gluon_launches_fit_the_register_file_and_the_shared_memory(self, launch: AttentionLaunch) -> None:
        at_launch, working = launch.registers
        loader = 128 * (launch.kernel == "hopper" and launch.has_loader)
        warpgroups = 128 * (launch.block_m // 64)
        assert at_launch * (warpgroups + loader) * launch.programs <= 1 << 16
        assert working * warpgroups + 24 * loader <= at_launch * (warpgroups + loader)
        tiles = 3 * 64 + 2 * launch.block_n
        if launch.kernel == "hopper":
            tiles = launch.block_m + 2 * launch.num_stages * launch.block_n
        assert 2 * sum(launch.parts) * tiles * launch.programs <= 227 << 10

    def test_registers_are_those_that_were_measured(self) -> None:
        """By computing threads, programs and whether there is a loader; the products' are in test_step_products."""
        expected = {
            (128, 1, False): (255, 240),
            (128, 2, False): (255, 240),
            (128, 3, False): (168, 168),
            (128, 4, False): (128, 128),
            (256, 2, False): (128, 128),
            (512, 1, False): (128, 128),
            (128, 1, True): (255, 240),
            (128, 2, True): (128, 232),
            (256, 1, True): (168, 240),
            (512, 1, True): (96, 112),
        }
        found = {}
        for launch in (x for x in attention_candidates() if x.kernel in ("hopper", "short")):
            found[2 * launch.block_m, launch.programs, launch.has_loader] = launch.registers
        assert found == expected

    def test_a_launch_for_few_keys_is_never_given_more(self) -> None:
        tuned = AttentionLaunch(40, (64, 0), "short", 64, 80, 4, 1, programs=4)
        use_tuned_launches("some GPU", {LaunchKey(2, 4096, 77, 8, 40): tuned})
        try:
            pick = partial(attention_launch, float32=False, aligned=True, capability=(9, 0), device_name="some GPU")
            assert pick(LaunchKey(2, 4096, 80, 8, 40)) == tuned
            assert pick(LaunchKey(2, 4096, 81, 8, 40)).takes(81)
        finally:
            use_tuned_launches("some GPU", {})

    def test_candidates_include_what_ships(self) -> None:
        shipped = {launch for launch in attention_launches() if launch.head_dim in MODEL_HEAD_DIMS}
        missing = shipped - set(attention_candidates())
        assert not missing, f"shipped but not searched: {[launch.label for launch in missing]}"


@pytest.mark.parametrize(
    ("view", "aligned"),
    [
        (lambda x: x, True),
        (lambda x: x[:, 1:], True),
        (lambda x: x.transpose(1, 2), True),
        (lambda x: x[:1].expand(2, -1, -1, -1), False),
        (lambda x: x.flatten()[4 : 4 + 2 * 9 * 3 * 40].view(2, 9, 3, 40), False),
        (lambda x: x.flatten()[: 2 * 9 * 3 * 41].view(2, 9, 3, 41)[..., :40], False),
    ],
    ids=["contiguous", "later rows", "heads first", "broadcast", "address", "odd stride"],
)
def test_alignment_of_views(view, aligned: bool) -> None:
    assert is_aligned(view(zeros(4, 10, 3, 40))) is aligned


def test_a_dimension_of_size_one_may_carry_any_stride() -> None:
    assert is_aligned(zeros(64).as_strided((1, 1, 1, 40), (3, 5, 7, 1)))


def test_cost_counts_two_products_and_each_byte_once() -> None:
    assert attention_flops(2, 4096, 77, 8, 40) == 2 * 8 * (2 * 4096 * 77 * 40) * 2
    q, k = zeros(2, 4096, 8, 40), zeros(2, 77, 8, 40)
    moved = 2 * q.nbytes + 2 * k.nbytes
    assert attention_bytes(2, 4096, 77, 8, 40, 2) == moved


class TestHopperPrograms:
    WIDE = AttentionLaunch(64, (64, 0), "hopper", 256, 64, 17, 4)
    TAILED = replace(WIDE, tail=2)

    @given(n_q=st.integers(1, 20000), n_heads=st.integers(1, 64), tailed=st.booleans())
    def test_every_tile_of_queries_has_exactly_one_program(self, n_q, n_heads, tailed) -> None:
        full, rest = hopper_programs(n_q, n_heads, self.TAILED if tailed else self.WIDE, 132)
        tiles = -(-n_q // 64)
        assert full >= 1
        assert 4 * full + 2 * rest >= tiles, "queries without a program"
        assert rest == 0 or 4 * full + 2 * (rest - 1) < tiles, "a program without queries"
        assert rest > 0 or 4 * (full - 1) < tiles, "a program without queries"

    def test_the_last_wave_is_spread_over_the_gpu(self) -> None:
        full, rest = hopper_programs(4096, 20, self.TAILED, 132)
        assert 20 * full <= 2 * 132, "full programs take two waves"
        assert 132 * 0.8 < 20 * rest <= 132, "the others one that is half as long"
        assert hopper_programs(4096, 20, self.WIDE, 132) == (16, 0), "320 programs, 2.4 waves"


@pytest.mark.parametrize("kernel", ["hopper", "short"])
def test_gluon_outputs_are_contiguous_however_the_queries_lie(kernel: str) -> None:
    launch = next(x for x in attention_candidates([40]) if x.kernel == kernel and x.takes(64))
    q = torch.empty(2, 3, 64, 40, dtype=torch.float16, device="meta").transpose(1, 2)  # heads before tokens in memory
    arguments = prepared_gluon_attention(q, q, q, 1.0, launch).arguments
    # As [B, H, N, D] over [B, N, H, D]: stride of the batch, of a head, of a token, of a column.
    assert arguments["o0_desc"].strides == (64 * 3 * 40, 40, 3 * 40, 1)
    assert arguments["q0_desc"].strides == (64 * 3 * 40, 64 * 40, 40, 1)
