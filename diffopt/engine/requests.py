"""What can be asked of the engine, checked once at the edge. Imports neither torch nor diffusers."""

import dataclasses
import math
import random
from typing import Any

from diffopt.errors import InputError
from diffopt.models.catalogue import ModelConfig
from diffopt.models.schedulers import SCHEDULERS, check_scheduler

MAX_SEED = 2**32 - 1
"""PyTorch's CPU generator uses 32 bits of a seed: a larger one would give the picture of another seed."""
MAX_GUIDANCE = 100.0
MAX_PROMPT = 10_000


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """Pictures to make. Build it with `create`, which fills in the model's defaults and checks everything.

    Attributes:
        prompt, negative_prompt: what the pictures show, and what not.
        steps: denoising steps.
        guidance: guidance scale; 1 or less means no guidance, one UNet row instead of two.
        seed: of the first picture; picture i of the request has seed + i and can be made alone with it.
        width, height: in pixels.
        count: pictures.
        scheduler: one of `diffopt.models.SCHEDULERS`, or None for the model's own.
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    width: int
    height: int
    count: int
    scheduler: str | None

    @classmethod
    def create(
        cls,
        model: ModelConfig,
        *,
        prompt: Any,
        negative_prompt: Any = "",
        steps: Any = None,
        guidance: Any = None,
        seed: Any = None,
        width: Any = None,
        height: Any = None,
        count: Any = None,
        scheduler: Any = None,
    ) -> "GenerationRequest":
        """Check values from outside; None takes the model's default, and for the seed a random one.

        Whole numbers may come as int, as a float without a fraction, or as text, whatever a form or a command line has.

        Raises:
            InputError: names the field, the value and what is allowed.
        """
        limits, defaults = model.limits, model.defaults
        count = _whole("count", 1 if count is None else count, 1, limits.max_count)
        scheduler = defaults.scheduler if scheduler is None else check_scheduler(scheduler)
        most_steps = SCHEDULERS[scheduler].max_steps if scheduler else None
        most_steps = limits.max_steps if most_steps is None else min(most_steps, limits.max_steps)
        last_seed = MAX_SEED - count + 1
        request = cls(
            prompt=_text("prompt", prompt),
            negative_prompt=_text("negative_prompt", negative_prompt),
            steps=_whole("steps", defaults.steps if steps is None else steps, 1, most_steps),
            guidance=_number("guidance", defaults.guidance if guidance is None else guidance, 0.0, MAX_GUIDANCE),
            seed=_whole("seed", random.SystemRandom().randint(0, last_seed) if seed is None else seed, 0, last_seed),
            width=_side("width", defaults.width if width is None else width, model),
            height=_side("height", defaults.height if height is None else height, model),
            count=count,
            scheduler=scheduler,
        )
        _check_size_and_work(request, model)
        return request

    @property
    def seeds(self) -> range:
        """One seed per picture."""
        return range(self.seed, self.seed + self.count)


def _check_size_and_work(request: GenerationRequest, model: ModelConfig) -> None:
    limits, pixels = model.limits, request.width * request.height
    if pixels > limits.max_pixels:
        side = math.isqrt(limits.max_pixels) // limits.multiple * limits.multiple
        raise InputError(
            "size",
            f"{request.width}x{request.height}",
            f"{model.name} makes at most {limits.max_pixels} pixels, such as {side}x{side}",
        )
    work = pixels * request.steps * request.count
    if work > limits.max_work:
        raise InputError(
            "width × height × steps × count",
            work,
            f"one request to {model.name} may come to {limits.max_work}; ask for fewer pictures, steps or pixels",
        )


def _side(field: str, value: Any, model: ModelConfig) -> int:
    limits = model.limits
    longest = limits.max_pixels // limits.min_side // limits.multiple * limits.multiple
    side = _whole(field, value, limits.min_side, longest)
    if side % limits.multiple:
        near = round(side / limits.multiple) * limits.multiple
        raise InputError(
            field, side, f"a multiple of {limits.multiple} is needed, such as {max(near, limits.min_side)}"
        )
    return side


def _whole(field: str, value: Any, low: int, high: int) -> int:
    allowed = f"a whole number from {low} to {high} is needed"
    number = value
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            raise InputError(field, value, allowed) from None
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise InputError(field, value, allowed)
    return number


def _number(field: str, value: Any, low: float, high: float) -> float:
    allowed = f"a number from {low:g} to {high:g} is needed"
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:  # NaN is neither
        raise InputError(field, value, allowed)
    return number


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(field, value, "text is needed")
    if len(value) > MAX_PROMPT:
        raise InputError(field, value[:40] + "…", f"at most {MAX_PROMPT} characters are possible, it has {len(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(field, value[:40], "text in valid UTF-8 is needed") from None
    if "\0" in value:
        raise InputError(field, value[:40], "text without NUL characters is needed")
    return value
