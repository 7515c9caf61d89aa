"""Requests: defaults, limits alone and together, and the words of each refusal."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffopt.engine.requests import MAX_PROMPT, MAX_SEED, GenerationRequest
from diffopt.errors import InputError
from diffopt.models import Defaults, Limits, ModelConfig, known_models

MODEL = ModelConfig(
    source="bundled:test",
    defaults=Defaults(steps=20, guidance=3.0, width=128, height=128),
    limits=Limits(max_pixels=65536, max_steps=100, max_count=10, max_work=128 * 128 * 20 * 20, min_side=32),
    name="test",
)


def create(**fields) -> GenerationRequest:
    return GenerationRequest.create(MODEL, **{"prompt": "a cat", **fields})


def refusal(**fields) -> InputError:
    with pytest.raises(InputError) as caught:
        create(**fields)
    assert "\n" not in str(caught.value)
    return caught.value


def test_defaults_are_the_models():
    request = create()
    assert (request.steps, request.guidance, request.width, request.height) == (20, 3.0, 128, 128)
    assert (request.count, request.scheduler, request.negative_prompt) == (1, None, "")


def test_the_seed_is_drawn_and_recorded():
    seeds = {create().seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_a_drawn_seed_leaves_room_for_the_count():
    assert all(create(count=10).seeds[-1] <= MAX_SEED for _ in range(50))


def test_seeds_count_up():
    assert list(create(seed=7, count=3).seeds) == [7, 8, 9]


def test_text_and_whole_floats_are_read_as_numbers():
    request = create(seed="7", steps=12.0, guidance="2.5", width="64", height=96.0, count="2")
    assert (request.seed, request.steps, request.guidance, request.width, request.height, request.count) == (
        *(7, 12, 2.5, 64, 96, 2),
    )
    assert all(type(value) is int for value in (request.seed, request.steps, request.width, request.count))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seed", "1.5", "whole number from 0 to 4294967295"),
        ("seed", 1.5, "whole number"),
        ("seed", -1, "whole number"),
        ("seed", MAX_SEED + 1, "whole number"),
        ("seed", "seven", "whole number"),
        ("seed", True, "whole number"),
        ("seed", math.inf, "whole number"),
        ("steps", 0, "from 1 to 100"),
        ("steps", 101, "from 1 to 100"),
        ("steps", [20], "from 1 to 100"),
        ("count", 0, "from 1 to 10"),
        ("count", 11, "from 1 to 10"),
        ("guidance", math.nan, "a number from 0 to 100"),
        ("guidance", "nan", "a number from 0 to 100"),
        ("guidance", math.inf, "a number from 0 to 100"),
        ("guidance", -1, "a number from 0 to 100"),
        ("guidance", 10**400, "a number from 0 to 100"),
        ("guidance", "strong", "a number from 0 to 100"),
        ("guidance", True, "a number from 0 to 100"),
        ("width", 130, "a multiple of 8 is needed, such as 128"),
        ("width", 24, "from 32 to 2048"),
        ("height", 10**9, "from 32 to 2048"),
        ("height", "tall", "from 32 to 2048"),
        ("scheduler", "eular", "known: euler"),
        ("prompt", None, "text is needed"),
        ("prompt", 7, "text is needed"),
        ("prompt", "x" * (MAX_PROMPT + 1), "at most 10000 characters"),
        ("prompt", "a \udcff cat", "valid UTF-8"),
        ("prompt", "a \0 cat", "NUL"),
        ("negative_prompt", 7, "text is needed"),
    ],
)
def test_each_field_is_checked_and_named(field, value, words):
    error = refusal(**{field: value})
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
    assert words in str(error)


def test_limits_on_combinations():
    assert "at most 65536 pixels, such as 256x256" in str(refusal(width=512, height=256))
    assert create(width=512, height=128).width == 512
    assert create(count=10, steps=40).count == 10
    error = refusal(count=10, steps=41)
    assert error.field == "width × height × steps × count"
    assert error.value == 128 * 128 * 41 * 10
    assert refusal(seed=MAX_SEED, count=2).field == "seed"


def test_a_scheduler_with_a_limit_of_its_own():
    model = dataclasses.replace(MODEL, limits=dataclasses.replace(MODEL.limits, max_work=10**12))
    assert GenerationRequest.create(model, prompt="", scheduler="lcm", steps=50).steps == 50
    with pytest.raises(InputError, match="from 1 to 50"):
        GenerationRequest.create(model, prompt="", scheduler="lcm", steps=51)


anything = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.booleans(), st.integers(1, 512))


@settings(deadline=None)
@given(steps=anything, width=anything, height=anything, count=anything, seed=anything, guidance=anything)
def test_whatever_is_given_a_request_is_within_all_limits_or_refused(**fields):
    for model in known_models().values():
        try:
            request = GenerationRequest.create(model, prompt="a cat", **fields)
        except InputError:
            continue
        limits = model.limits
        pixels = request.width * request.height
        assert pixels <= limits.max_pixels
        assert pixels * request.steps * request.count <= limits.max_work
        assert 1 <= request.steps <= limits.max_steps
        assert 1 <= request.count <= limits.max_count
        assert request.width % 8 == request.height % 8 == 0
        assert 0 <= request.seeds[0] <= request.seeds[-1] <= MAX_SEED
        assert math.isfinite(request.guidance)


def test_a_seed_beyond_32_bits_would_be_another_seed():
    """Why `MAX_SEED` is what it is."""
    import torch

    def noise(seed):
        return torch.randn(8, generator=torch.Generator("cpu").manual_seed(seed))

    assert torch.equal(noise(7), noise(7 + MAX_SEED + 1))
    assert not torch.equal(noise(7), noise(8))
