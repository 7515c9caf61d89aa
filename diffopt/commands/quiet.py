"""Keeps libraries from writing to the terminal while a command runs. Only commands use this, never the library."""

import logging
import os
import warnings

LIBRARIES = ("transformers", "diffusers", "huggingface_hub", "accelerate", "peft", "torch")


def quiet_libraries() -> None:
    """Before the libraries are imported: no log lines below errors, no Python warnings, no progress bars of theirs.

    Their warnings are about their own defaults (a missing torchvision, deprecated arguments). What a user must know is
    checked by diffopt and said in its own words. Values that the user set in the environment stay.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_progress_bars() -> None:
    """After the libraries are imported: their loading bars off."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
