"""Schedulers for `parametrize`: what needs a package that isn't installed is skipped, and says so."""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import pytest

from diffopt.models.schedulers import SCHEDULERS, make_scheduler
from diffopt.unet import schedules

NEEDS = {choice.class_name: choice.needs for choice in SCHEDULERS.values() if choice.needs}
"""Packages that classes of diffusers can't do without, by name of the class."""


def _param(value: Any, name: str, class_name: str) -> Any:
    needs = NEEDS.get(class_name, "")
    missing = bool(needs) and importlib.util.find_spec(needs) is None
    why = f"diffusers' {class_name} needs {needs}, which isn't installed"
    return pytest.param(value, id=name, marks=[pytest.mark.skipif(missing, reason=why)] if needs else [])


def kinds(classes: Iterable[type]) -> list[Any]:
    """Classes of schedulers."""
    return [_param(kind, kind.__name__, kind.__name__) for kind in classes]


KINDS = kinds((*schedules.BY_TIMESTEP, *schedules.BY_COUNT))
"""The classes whose timesteps stay on the CPU."""

NAMES = [_param(name, name, choice.class_name) for name, choice in SCHEDULERS.items()]
"""What `--scheduler` takes."""

_UNNAMED: dict[str, Callable[[Any], Any]] = {
    "DPMSolverSinglestepScheduler": lambda own: diffusers.DPMSolverSinglestepScheduler.from_config(
        own.config, lower_order_final=True
    ),
    "DDPMScheduler": lambda own: diffusers.DDPMScheduler.from_config(own.config),
}
"""Classes that diffopt knows beside those with a name of their own."""

ALL = [*NAMES, *(_param(name, name, name) for name in _UNNAMED)]
"""Every scheduler that diffopt knows, by name or class; for `scheduler_of`."""


def scheduler_of(name: str, own: Any) -> Any:
    """A fresh scheduler of `ALL` with the settings of a model's own."""
    return _UNNAMED[name](own) if name in _UNNAMED else make_scheduler(name, own)
