"""Schedulers by the names people use, and the diffusers classes behind them."""

import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffopt.errors import InputError


@dataclasses.dataclass(frozen=True)
class SchedulerChoice:
    """A scheduler of diffusers.

    Attributes:
        class_name: the class in `diffusers`.
        max_steps: the most it takes, if it has a limit of its own.
        needs: a package that diffusers' class can't do without and diffopt doesn't install.
        options: settings that differ from the model's own scheduler configuration.
        label: how AUTOMATIC1111 and its successors call it in a picture's `parameters`.
    """

    class_name: str
    label: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: str = ""
    max_steps: int | None = None


SCHEDULERS: Mapping[str, SchedulerChoice] = MappingProxyType(
    {
        "ddim": SchedulerChoice("DDIMScheduler", "DDIM"),
        "pndm": SchedulerChoice("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
        "euler": SchedulerChoice("EulerDiscreteScheduler", "Euler"),
        "euler-a": SchedulerChoice("EulerAncestralDiscreteScheduler", "Euler a"),
        "heun": SchedulerChoice("HeunDiscreteScheduler", "Heun"),
        "lms": SchedulerChoice("LMSDiscreteScheduler", "LMS", needs="scipy"),
        "deis": SchedulerChoice("DEISMultistepScheduler", "DEIS", {"algorithm_type": "deis", "solver_type": "logrho"}),
        "dpmpp-2m": SchedulerChoice(
            "DPMSolverMultistepScheduler",
            "DPM++ 2M",
            {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "use_karras_sigmas": False},
        ),
        "dpmpp-2m-karras": SchedulerChoice(
            "DPMSolverMultistepScheduler",
            "DPM++ 2M Karras",
            {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "use_karras_sigmas": True},
        ),
        "unipc": SchedulerChoice("UniPCMultistepScheduler", "UniPC", {"solver_type": "bh2"}),
        "lcm": SchedulerChoice("LCMScheduler", "LCM", max_steps=50),
    }
)
"""What `scheduler=` and `--scheduler` take; None keeps the model's own."""


def check_scheduler(name: str) -> str:
    """`name`, if it is one of `SCHEDULERS` and can run here.

    Raises:
        InputError: it isn't; lists the known ones, nearest first. Or a package it needs is not installed.
    """
    if not isinstance(name, str) or name not in SCHEDULERS:
        near = difflib.get_close_matches(str(name), SCHEDULERS, n=3)
        names = near + [known for known in SCHEDULERS if known not in near]
        raise InputError("scheduler", name, f"known: {', '.join(names)}")
    needs = SCHEDULERS[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        others = ", ".join(known for known, choice in SCHEDULERS.items() if not choice.needs)
        raise InputError("scheduler", name, f"it needs the package {needs}, which isn't installed; others: {others}")
    return name


def make_scheduler(name: str | None, own: Any) -> Any:
    """A fresh scheduler for one picture: schedulers keep state between steps.

    Args:
        name: one of `SCHEDULERS`, or None for another instance of the model's own.
        own: the scheduler the model came with; its noise schedule and prediction type are taken over.
    """
    if name is None:
        return type(own).from_config(own.config)
    import diffusers

    choice = SCHEDULERS[check_scheduler(name)]
    return getattr(diffusers, choice.class_name).from_config(own.config, **choice.options)


def scheduler_label(name: str | None, class_name: str) -> str:
    """What image tools show as the sampler, e.g. "DPM++ 2M"; a class without such a name shows as itself."""
    if name is not None:
        return SCHEDULERS[name].label
    return next((choice.label for choice in SCHEDULERS.values() if choice.class_name == class_name), class_name)
