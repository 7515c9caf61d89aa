"""Timesteps that stay on the CPU: a scheduler that indexes tables with them need not wait for the GPU at every step.

diffusers' pipelines ask `set_timesteps` for timesteps on the GPU. PNDM and DDIM then index a table on the CPU with one
at every step, which waits until the GPU has done all that was queued before; the others look their first timestep up
in the same way, once in a run. An instance-level `set_timesteps` leaves them on the CPU, and all else to the class.
What is computed stays bitwise the same: the timestep of the classes below only ever is an index. diffusers' models
take a timestep on either device, captured UNet calls as a number.

Classes were read in diffusers 0.42.1; subclasses are other classes.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffopt.unet import controlnets, graphs
from diffopt.unet.parts import Parts


def _classes(*names: str) -> tuple[type, ...]:
    return tuple(getattr(diffusers, name) for name in names)


BY_TIMESTEP = _classes("PNDMScheduler", "DDIMScheduler")
"""What indexes tables with the timestep, at every step."""

BY_COUNT = _classes(
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    "UniPCMultistepScheduler",
)
"""What looks a run's first timestep up and counts from there. (UniPC copies sigmas to the GPU at every step, and waits
for that on its own.)"""

_LEFT_OUT = {
    # On a GPU, coefficients made of a timestep on it are rounded to the latents' dtype; those on the CPU are not.
    "LCMScheduler": "it computes with the timestep, whose device changes the rounding",
    # A loop of the user's own may move a timestep to the GPU, and the classes above take it there.
    "DDPMScheduler": "it compares the timestep with its own, which fails between two devices",
}
"""Of classes that seem to belong here."""


def device_reasons(device: torch.device) -> list[str]:
    """Why timesteps need not be kept from a device; empty for a GPU."""
    return [] if device.type == "cuda" else [f"no step waits for a {device.type}"]


def reasons(scheduler: Any, pipe: Any) -> list[str]:
    """Why a scheduler's timesteps stay where its pipeline asks for them; empty if they may stay on the CPU."""
    kind = type(scheduler)
    if kind not in _METHODS:
        return [_LEFT_OUT.get(kind.__name__, "diffopt doesn't know this class")]
    if "set_timesteps" in scheduler.__dict__ and not is_on(scheduler):
        return ["it has a set_timesteps of its own, which is kept"]
    if scheduler.config.get("timestep_type") == "continuous":  # Euler's
        return ["its continuous timesteps are logarithms, whose last bit depends on the device"]
    if kind in BY_COUNT and not all(map(graphs.is_on, controlnets.of(pipe).values())):
        # Stock copies it to the GPU and waits for that: more than the one wait in a run that is saved.
        return ["it waits once in a run, a ControlNet would at every step"]
    return []


def put_on(scheduler: Any, pipe: Any) -> list[str]:
    """Keep a scheduler's timesteps on the CPU from its next `set_timesteps` on; or the reasons why not.

    The method is bound to the instance, so that a deep copy has its own. Done again, it changes nothing.
    """
    found = reasons(scheduler, pipe)
    if not found and not is_on(scheduler):
        scheduler.set_timesteps = types.MethodType(_METHODS[type(scheduler)], scheduler)
    return found


def is_on(scheduler: Any) -> bool:
    """Whether a scheduler's `set_timesteps` is ours."""
    method = getattr(scheduler, "__dict__", {}).get("set_timesteps")
    return method is not None and getattr(method, "__func__", None) is _METHODS.get(type(scheduler))


def take_off(scheduler: Any) -> None:
    """The class's own `set_timesteps` again, where ours is still in place."""
    if is_on(scheduler):
        del scheduler.set_timesteps


class Fed(Parts):
    """Schedulers whose timesteps stay on the CPU, each with the pipeline that it is for."""

    def __init__(self) -> None:
        super().__init__(take_off)

    def add(self, pipe: Any) -> None:
        """Feed a pipeline's scheduler, if it has one that can be fed. Done again, it changes nothing."""
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is not None and not put_on(scheduler, pipe):
            self.note(scheduler, pipe)


def notes(pipelines: Iterable[Any]) -> Iterator[str]:
    """Schedulers of pipelines whose timesteps go to the GPU, and why, in words for a report; once each."""
    found = [(pipe.scheduler, pipe) for pipe in pipelines if getattr(pipe, "scheduler", None) is not None]
    for scheduler, pipe in {id(scheduler): (scheduler, pipe) for scheduler, pipe in found}.values():
        if not is_on(scheduler):
            why = reasons(scheduler, pipe) or ["it is new here; optimize() again changes that"]
            yield f"{type(scheduler).__name__} has its timesteps on the GPU and may wait for it: {'; '.join(why)}"


def _on_cpu(kind: Any) -> Callable[..., None]:
    """A class's `set_timesteps`, with its signature (pipelines look at that), whatever device it is asked for."""
    stock = kind.set_timesteps
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def set_timesteps(self: Any, *arguments: Any, **keywords: Any) -> None:
        bound = signature.bind(self, *arguments, **keywords)
        bound.arguments["device"] = "cpu"
        stock(*bound.args, **bound.kwargs)

    return set_timesteps


# Where scipy is missing, diffusers has a stand-in for LMS that can't be used.
_METHODS = {kind: _on_cpu(kind) for kind in (*BY_TIMESTEP, *BY_COUNT) if issubclass(kind, SchedulerMixin)}
