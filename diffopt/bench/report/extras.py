"""Libraries that only reports need, imported when they are needed: the extra "report".

scipy stays out of the default environment because diffusers imports it where it is installed, which makes every start
of diffopt more than a second slower.
"""

import importlib
from typing import Any

from diffopt.errors import DiffoptError

INSTALL = 'pip install "diffopt[report]"'


class MissingExtraError(DiffoptError):
    """A library of the extra "report" is not installed."""


def require(module: str, purpose: str) -> Any:
    """The module, imported now.

    Args:
        module: such as "scipy.stats".
        purpose: what it is needed for, in words.

    Raises:
        MissingExtraError: it isn't installed; says how to get it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError(f"{purpose} needs {package}, which is not installed: {INSTALL}") from error
