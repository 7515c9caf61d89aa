"""Models: what is known, where it is, and loading it so that its weights are certainly its own.

`load` needs torch and diffusers; everything else here is cheap to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from diffopt.models.catalogue import Defaults, Limits, ModelConfig, find_model, known_models, model_config_for
from diffopt.models.digest import model_hash
from diffopt.models.schedulers import SCHEDULERS, make_scheduler

if TYPE_CHECKING:
    from diffopt.models.loading import load, resolve_device

__all__ = [
    "SCHEDULERS",
    "Defaults",
    "Limits",
    "ModelConfig",
    "find_model",
    "known_models",
    "load",
    "make_scheduler",
    "model_config_for",
    "model_hash",
    "resolve_device",
]


def __getattr__(name: str) -> Any:
    if name not in ("load", "resolve_device"):
        raise AttributeError(f"module 'diffopt.models' has no attribute {name!r}")
    return getattr(importlib.import_module("diffopt.models.loading"), name)
