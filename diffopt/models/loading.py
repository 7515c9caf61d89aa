"""`diffopt.load`: a model by name, folder, file or hub id, as a diffusers pipeline whose weights are all its own."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffopt.errors import InputError, ModelError, one_line
from diffopt.models.catalogue import components, find_model, read_json
from diffopt.models.digest import Stamp, remember_source
from diffopt.models.hub import fetch_folder
from diffopt.models.schedulers import check_scheduler, make_scheduler
from diffopt.models.weights import find_weights, load_component

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def load(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    scheduler: str | None = None,
    config: Path | str | None = None,
    allow_pickle: bool = False,
    allow_custom_code: bool = False,
) -> "DiffusionPipeline":
    """Load a Stable Diffusion pipeline. Local models and the bundled one need no network.

    Args:
        model: a name (`emoji` is bundled; `diffopt doctor` lists them), a local folder in diffusers' layout, a single
            .safetensors file, or a hub id "owner/name".
        device: "cpu", "cuda" or "cuda:N". Default: the first CUDA GPU, or the CPU without one.
        dtype: of the weights. Default: float16 on a GPU, float32 on a CPU (where half precision is very slow).
        scheduler: one of `diffopt.models.SCHEDULERS`; default: the model's own.
        config: for a single file: a folder with the configuration of its kind of model, in diffusers' layout.
        allow_pickle: read pickled weights (.bin, .ckpt, .pt), which can run any code.
        allow_custom_code: run pipeline code that comes with the model.

    Raises:
        InputError: an unknown name, device, dtype or scheduler.
        ModelError: missing, damaged or unsafe files; weights that are missing, too many or of other shapes.
    """
    target = resolve_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError("dtype", dtype, "a torch.dtype of floating-point numbers is needed, such as torch.float16")
    dtype = dtype or (torch.float16 if target.type == "cuda" else torch.float32)
    if scheduler is not None:
        check_scheduler(scheduler)
    source = find_model(model)
    if config is not None and source.kind != "file":
        raise InputError("config", str(config), f"it goes with a single .safetensors file, and {source.name} isn't one")
    if source.kind == "file" and source.path is not None:
        from diffopt.models.single_file import load_single_file

        weights = [Stamp.of(source.path)]
        pipe = load_single_file(source.path, dtype, config, allow_pickle)
    else:
        folder = source.path or fetch_folder(
            source.hub_id, variant=source.variant, allow_pickle=allow_pickle, allow_custom_code=allow_custom_code
        )
        pipe, weights = _load_folder(folder, source.variant, dtype, allow_pickle, allow_custom_code)
    if scheduler is not None:
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    pipe = pipe.to(target)
    remember_source(pipe, weights)
    return pipe


def resolve_device(name: str | torch.device | None) -> torch.device:
    """A device that exists here. None is the first CUDA GPU, or the CPU without one.

    Raises:
        InputError: not a device, or one this machine lacks.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError("device", name, "allowed: cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError("device", str(name), "allowed: cpu, cuda, cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            build = "" if torch.version.cuda else "; this PyTorch is built without CUDA"
            raise InputError("device", str(name), f"usable CUDA GPUs here: {count}{build}; allowed: cpu")
    return device


def _load_folder(
    folder: Path, variant: str | None, dtype: torch.dtype, allow_pickle: bool, allow_custom_code: bool
) -> tuple["DiffusionPipeline", list[Stamp]]:
    """Load every model of a pipeline strictly, then let diffusers put the pipeline together around them."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    index = read_json(folder / "model_index.json")
    if not allow_custom_code:
        _refuse_custom_code(folder, index)
    loaded: dict[str, Any] = {}
    files: list[Stamp] = []
    for name, entry in components(index).items():
        _check_present(folder / name)
        cls = _component_class(*entry)
        if cls is None or not issubclass(cls, torch.nn.Module):
            continue
        weights = find_weights(folder / name, variant=variant, allow_pickle=allow_pickle)
        files += [Stamp.of(path) for path in weights.files]
        loaded[name] = load_component(cls, folder / name, weights, dtype)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder, **loaded, dtype=dtype, local_files_only=True, trust_remote_code=allow_custom_code
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"model {folder}: the pipeline can't be put together: {one_line(error)}") from error
    for name, tokenizer in pipe.components.items():
        if type(tokenizer).__name__.startswith("CLIPTokenizer") and tokenizer.model_max_length > _LONGEST:
            raise ModelError(f"model {folder / name}: tokenizer_config.json doesn't say model_max_length; CLIP's is 77")
    return pipe, files


_LONGEST = 10**6
"""Tokens. Of a tokenizer that doesn't know, transformers says 10**30, and prompts are filled up to that."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def _check_present(component: Path) -> None:
    """Refuse a component without its files. transformers makes an empty tokenizer of a missing one, silently.

    Raises:
        ModelError: the folder is missing, or it is a tokenizer's and has no vocabulary.
    """
    if not component.is_dir():
        raise ModelError(f"model {component.parent}: the folder {component.name} is missing")
    if component.name.startswith("tokenizer") and not any((component / name).is_file() for name in _VOCABULARIES):
        raise ModelError(f"model {component}: a vocabulary is missing; one of {', '.join(_VOCABULARIES)} is needed")


def _component_class(library: str, name: str) -> Any | None:
    """The class of a component as model_index.json names it; None when it isn't one of diffusers or transformers."""
    import diffusers.pipelines

    if library in ("diffusers", "transformers"):
        home = importlib.import_module(library)
    else:
        home = getattr(diffusers.pipelines, library, None)
    found = getattr(home, name, None)
    return found if isinstance(found, type) else None


def _refuse_custom_code(folder: Path, index: dict[str, Any]) -> None:
    """Refuse a pipeline that wants to run code of its own.

    Raises:
        ModelError: its class or a component's class is not one of diffusers or transformers.
    """
    import diffusers

    wanted = index.get("_class_name")
    known = isinstance(wanted, str) and isinstance(getattr(diffusers, wanted, None), type)
    strange = [] if known else [str(wanted)]
    for name, entry in components(index).items():
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry) or _component_class(*entry) is None:
            strange.append(f"{name} ({' '.join(map(str, entry))})")
        elif "auto_map" in _component_config(folder / name):
            strange.append(f"{name} (auto_map in its config.json)")
    if strange:
        raise ModelError(
            f"model {folder}: {strange[0]} is neither diffusers' nor transformers', so code that comes with the model "
            "would run; allow it with --allow-custom-code (allow_custom_code=True) if you trust where it comes from"
        )


def _component_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}
