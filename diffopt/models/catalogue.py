"""Which models there are: names from configs/models, local folders and files, hub ids.

Imports neither torch nor diffusers.
"""

import dataclasses
import difflib
import functools
import re
from pathlib import Path
from typing import Any, Literal

from diffopt.config import config_names, parse_json, read_config
from diffopt.errors import InputError, ModelError

BUNDLED = "bundled:"
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is used when nothing else is asked for. Sizes in pixels; scheduler None is the model's own."""

    steps: int
    guidance: float
    width: int
    height: int
    scheduler: str | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_pixels: of one picture, width × height.
        max_steps: denoising steps.
        max_count: pictures in one request.
        max_work: of a request, width × height × steps × count.
        min_side: smallest width and height in pixels.
        multiple: width and height are multiples of this; diffusers' SD pipelines need 8.
    """

    max_pixels: int
    max_steps: int
    max_count: int
    max_work: int
    min_side: int = 64
    multiple: int = 8


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model: where it comes from, its defaults and its limits. Read from configs/models/<name>.toml.

    Attributes:
        source: `bundled:<folder in diffopt/assets>`, a hub id, or a local path.
        variant: of the weight files on the hub, such as "fp16".
        name: how records and pictures call it: the TOML file's name, a folder's or file's name, or the hub id.
    """

    source: str
    defaults: Defaults
    limits: Limits
    about: str = ""
    variant: str | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model's files are. `path` is the folder or file, or None for a hub model that `hub_id` names."""

    name: str
    kind: Literal["folder", "file", "hub"]
    path: Path | None = None
    hub_id: str = ""
    variant: str | None = None


@functools.cache
def known_models() -> dict[str, ModelConfig]:
    """The models in configs/models by name, the bundled ones first."""
    configs = {
        name: dataclasses.replace(read_config("models", name, ModelConfig), name=name)
        for name in config_names("models")
    }
    return dict(sorted(configs.items(), key=lambda item: (not item[1].source.startswith(BUNDLED), item[0])))


def find_model(model: str | Path) -> Source:
    """Where the model is. Names come first, then what exists on disk, then what looks like a hub id.

    Raises:
        InputError: not a known name, nor a path, nor a hub id; lists the known names, nearest first.
        ModelError: a folder or file that does not exist or is no model.
    """
    text = str(model)
    config = known_models().get(text)
    if config is not None and config.source.startswith(BUNDLED):
        folder = Path(__file__).parent.parent / "assets" / config.source.removeprefix(BUNDLED)
        return _folder(folder, text)
    if config is not None:
        return Source(text, "hub", hub_id=config.source, variant=config.variant)
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of a user that doesn't exist
        raise ModelError(f"model {text}: can't be read: {getattr(error, 'strerror', error)}") from error
    if is_folder:
        return _folder(path, path.resolve().name)
    if is_file:
        return _file(path)
    if isinstance(model, Path) or _looks_like_path(text):
        raise ModelError(f"model {text}: there is no such file or folder; known names: {', '.join(known_models())}")
    if _HUB_ID.fullmatch(text):
        return Source(text, "hub", hub_id=text)
    near = difflib.get_close_matches(text, known_models(), n=3, cutoff=0.4)
    names = near + [name for name in known_models() if name not in near]
    raise InputError(
        "model",
        text,
        f"known: {', '.join(names)}; or give a local folder, a .safetensors file, or a hub id (owner/name)",
    )


def model_config_for(model: str | Path, *, config: Path | str | None = None) -> ModelConfig:
    """Defaults and limits of a model: from configs/models, or generic ones from its size for any other.

    Args:
        model: as `load` takes it. A hub id is fetched, unless it is in the local cache.
        config: the folder with the configuration of a single file, as `load` takes it.

    Raises:
        InputError, ModelError: as `find_model`; also a folder without a readable UNet configuration.
    """
    if str(model) in known_models():
        return known_models()[str(model)]
    source = find_model(model)
    folder = source.path
    if source.kind == "hub":
        from diffopt.models.hub import fetch_folder

        folder = fetch_folder(source.hub_id, variant=source.variant)
    elif source.kind == "file":
        folder = None if config is None else Path(config)
    side = 512 if folder is None else _native_side(folder)
    return generic_config(str(model), source.name, side)


def generic_config(source: str, name: str, side: int) -> ModelConfig:
    """Defaults and limits for a model that makes pictures of `side` × `side` pixels."""
    limits = Limits(
        max_pixels=4 * side * side, max_steps=1000, max_count=100, max_work=side * side * 20_000, min_side=min(64, side)
    )
    return ModelConfig(source, Defaults(steps=30, guidance=7.5, width=side, height=side), limits, name=name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder.

    Raises:
        ModelError: missing, unreadable or not an object.
    """
    try:
        table = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model {path.parent}: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path.parent}: {path.name} can't be read: {error}") from error
    if not isinstance(table, dict):
        raise ModelError(f"model {path.parent}: {path.name} is not a JSON object")
    return table


def components(index: dict[str, Any]) -> dict[str, list[Any]]:
    """The components that a pipeline's model_index.json lists, by name, as it has them: library and class."""
    return {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and entry[:1] != [None]
    }


def _looks_like_path(text: str) -> bool:
    starts, ends = ("/", "./", "../", "~"), (".safetensors", *PICKLED, "/")
    return text.startswith(starts) or text.endswith(ends) or text.count("/") > 1 or "\\" in text


def _native_side(folder: Path) -> int:
    """Pixels per side that a model was made for: the UNet's sample size times the VAE's factor."""
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    size, blocks = unet.get("sample_size"), vae.get("block_out_channels")
    if isinstance(size, list) and size and all(isinstance(side, int) for side in size):
        size = max(size)
    if not isinstance(size, int) or not isinstance(blocks, list):
        return 512
    return max(8, size * 2 ** (len(blocks) - 1) // 8 * 8)


def _folder(path: Path, name: str) -> Source:
    if not (path / "model_index.json").is_file():
        raise ModelError(f"model {path}: model_index.json is missing; a folder in diffusers' layout is needed")
    return Source(name, "folder", path)


def _file(path: Path) -> Source:
    if path.suffix not in (".safetensors", *PICKLED):
        raise ModelError(f"model {path}: not a model file; allowed: .safetensors, or a folder in diffusers' layout")
    return Source(path.stem, "file", path)
