"""A whole pipeline in one .safetensors file, in the layout of the original Stable Diffusion releases."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants

from diffopt.errors import InputError, ModelError, one_line
from diffopt.models.catalogue import PICKLED, read_json
from diffopt.models.hub import no_connection
from diffopt.models.weights import read_header, refuse_pickle

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

_PARTS = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
_NOT_USED = re.compile(r"position_ids$|logit_scale$|\.loss\.|text_projection")


def load_single_file(
    path: Path, dtype: torch.dtype, config: Path | str | None, allow_pickle: bool
) -> "DiffusionPipeline":
    """Load a pipeline from one file; its weights must be those that the configuration asks for.

    Args:
        path: the file.
        config: folder with the configuration in diffusers' layout; None asks the model hub (or its local cache).

    Raises:
        InputError: `config` is no such folder.
        ModelError: damaged or pickled files, weights that do not fit, or a configuration that can't be fetched.
    """
    import diffusers

    header: dict[str, tuple[int, ...]] | None = None
    if path.suffix in PICKLED:
        if not allow_pickle:
            raise ModelError(refuse_pickle(path))
    else:
        header = read_header(path)
        if not any(name.startswith(_PARTS["unet"]) for name in header):
            raise ModelError(f"model {path}: no whole Stable Diffusion model: it has no {_PARTS['unet'][0]}* weights")
    cls = _pipeline_class(diffusers, config, header or {})
    options: dict[str, Any] = {"torch_dtype": dtype}
    if config is not None:
        options |= {"config": str(config), "local_files_only": True}
    try:
        pipe = cls.from_single_file(str(path), **options)
    except Exception as error:  # diffusers lets anything through: KeyError, ValueError, errors of the hub's client
        raise ModelError(_why_not(path, config, error)) from error
    _check_complete(path, pipe, header)
    return pipe


def _pipeline_class(diffusers: Any, config: Path | str | None, header: dict[str, tuple[int, ...]]) -> Any:
    if config is None:
        xl = any(name.startswith("conditioner.") for name in header)
        return diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    folder = Path(config)
    if not (folder / "model_index.json").is_file():
        raise InputError("config", str(config), "a folder in diffusers' layout is needed, with a model_index.json")
    name = read_json(folder / "model_index.json").get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not hasattr(cls, "from_single_file"):
        raise InputError("config", str(config), f"its pipeline {name!r} can't be loaded from a single file")
    return cls


def _check_complete(path: Path, pipe: "DiffusionPipeline", header: dict[str, tuple[int, ...]] | None) -> None:
    """Refuse a file with missing weights (they are still on the meta device) or with more than was used.

    diffusers drops what it doesn't know while it renames; the number of values in the file shows it.
    """
    for name, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        missing = [key for key, tensor in module.state_dict().items() if tensor.is_meta]
        if missing:
            raise ModelError(
                f"model {path}: the weights are not those of its {type(module).__name__}: {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} missing"
            )
        if header is None or name not in _PARTS:
            continue
        found = {
            key: math.prod(shape)
            for key, shape in header.items()
            if key.startswith(_PARTS[name]) and not _NOT_USED.search(key)
        }
        wanted = sum(tensor.numel() for key, tensor in module.state_dict().items() if not _NOT_USED.search(key))
        if found and sum(found.values()) > wanted:
            raise ModelError(
                f"model {path}: the weights are not those of its {type(module).__name__}: "
                f"{sum(found.values()) - wanted} values too many under {_PARTS[name][0]}*"
            )


def _why_not(path: Path, config: Path | str | None, error: Exception) -> str:
    if config is None and (constants.HF_HUB_OFFLINE or no_connection(error)):
        return (
            f"model {path}: its configuration is not in the file, and the model hub can't be reached; "
            "give a folder that has it with --config (config=)"
        )
    return f"model {path}: can't be loaded{'' if config is None else f' with {config}'}: {one_line(error)}"
