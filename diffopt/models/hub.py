"""Models on the hub: fetched into the local cache, as a folder in diffusers' layout."""

import socket
from pathlib import Path

from diffopt.errors import ModelError, one_line


def fetch_folder(
    hub_id: str, *, variant: str | None = None, allow_pickle: bool = False, allow_custom_code: bool = False
) -> Path:
    """Fetch a model from the hub, or find it in the local cache.

    Args:
        hub_id: owner/name.
        variant: wanted weight files, such as "fp16"; a model without them is fetched as it is.

    Raises:
        ModelError: no such model, no connection and not in the cache, or it needs what was not allowed.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from huggingface_hub import constants

    options = {"use_safetensors": None if allow_pickle else True, "trust_remote_code": allow_custom_code}
    try:
        for wanted in dict.fromkeys((variant, None)):
            try:
                return Path(DiffusionPipeline.download(hub_id, variant=wanted, **options))
            except ValueError:  # it has no such variant
                if wanted is None:
                    raise
    except Exception as error:  # a dozen kinds: offline, not found, gated, without safetensors, broken connection
        reason = one_line(error)
        if constants.HF_HUB_OFFLINE:
            reason = "the environment says to stay offline, and the local cache doesn't have it"
        elif no_connection(error):
            reason = "there is no connection to it, and the local cache doesn't have it"
        raise ModelError(
            f"model {hub_id}: no local folder, and it can't be fetched from the model hub: {reason}; "
            "give a folder or a .safetensors file, or use the bundled one: emoji"
        ) from error
    raise AssertionError("unreachable")


def no_connection(error: BaseException | None) -> bool:
    """Whether an error of the hub's client comes from a missing connection."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False
