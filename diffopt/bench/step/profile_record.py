"""The record of where the time of a UNet forward goes on a GPU."""

import pydantic

from diffopt.bench.schema import Model
from diffopt.measure.profile import ForwardProfile


class StepProfile(Model):
    """The optimized UNet's forward with the guidance batch, as the profiler sees it after the timing.

    Attributes: as of `ForwardProfile`.
    """

    forwards: int = 0
    microseconds: dict[str, float] = pydantic.Field(default_factory=dict)
    launches: float | None = None
    flops: int | None = None
    why: str = ""

    @property
    def found(self) -> ForwardProfile:
        """What the profiler saw."""
        return ForwardProfile(**self.model_dump())
