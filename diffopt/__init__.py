"""diffopt makes Stable Diffusion pipelines faster without changing the pictures, and proves it.

    handle = diffopt.optimize(pipe)
    image = pipe("a lighthouse at dusk").images[0]
    print(handle.report())
    handle.restore()

Importing this package is cheap: torch and diffusers are imported when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from diffopt.errors import DiffoptError

if TYPE_CHECKING:
    from diffopt.handle import optimize, optimized
    from diffopt.models import load

__version__ = "0.1.0"
__all__ = ["DiffoptError", "load", "optimize", "optimized"]

_HOMES = {"optimize": "diffopt.handle", "optimized": "diffopt.handle", "load": "diffopt.models"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """What `help` and completion show: also the names that nobody has used yet."""
    return sorted({*globals(), *_HOMES})
