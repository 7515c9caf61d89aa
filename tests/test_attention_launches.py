"""What attention prepares once and launches many times: never for other inputs, never past the dispatcher."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt_kernels import attention, launch_attention
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import use_tuned_launches


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# --- what is remembered, and for what -------------------------------------------------------------------------------


def module():
    """attention.py; its name in the package is the function's."""
    return sys.modules["diffopt_kernels.attention"]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What was prepared, in order; launches do nothing. The map of prepared launches begins and ends empty."""
    made = []

    def prepare(q, k, v, scale, launch, mask):
        made.append(SimpleNamespace(scale=scale, launch=launch, mask=mask))
        return lambda *tensors: None

    monkeypatch.setattr(module(), "prepared_attention", prepare)
    monkeypatch.setattr(module(), "_gpu", lambda device: ("", (9, 0)))
    module()._PREPARED.clear()
    yield made
    module()._PREPARED.clear()


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


@pytest.mark.parametrize("i", range(3), ids="qkv")
def test_tensors_of_two_gpus_have_two_keys(i: int) -> None:
    def on(*indices: int) -> list[SimpleNamespace]:
        layout = {"shape": Q, "stride": lambda: (1920, 120, 40, 1), "dtype": torch.float16, "data_ptr": lambda: 64}
        return [SimpleNamespace(device=torch.device("cuda", index), **layout) for index in indices]

    other = [0, 0, 0]
    other[i] = 1
    keys = [module()._key(*on(*indices), None, None, None) for indices in ((0, 0, 0), (0, 0, 0), other)]
    assert keys[0] == keys[1] != keys[2]


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


@pytest.mark.parametrize("i", range(3), ids="qkv")
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:1],
        lambda x: x[:, :, :2],
        lambda x: x[..., :32],
        lambda x: x.view(torch.bfloat16),
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"),
    ],
    ids=["batch", "heads", "head dim", "dtype", "device"],
)
def test_one_tensor_that_no_longer_fits_is_refused(change, i: int, prepared: list) -> None:
    """Views with the known strides and addresses: only what changed tells them apart."""
    tensors = list(arguments()[0])
    attention(*tensors)
    tensors[i] = change(tensors[i])
    with pytest.raises(ValueError, match="allowed"):
        attention(*tensors)


@pytest.mark.parametrize("i", [1, 2], ids="kv")
def test_keys_and_values_that_no_longer_match_are_refused(i: int, prepared: list) -> None:
    tensors = list(arguments()[0])
    attention(*tensors)
    tensors[i] = tensors[i][:, :20]
    with pytest.raises(ValueError, match=r"v.shape\[1\] is"):
        attention(*tensors)


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
