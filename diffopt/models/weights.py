"""Weight files, read strictly: diffusers fills missing weights with random values, drops extra ones and goes on.

Nothing here imports diffusers before it has to: the checks on files cost milliseconds.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffopt.errors import ModelError, one_line
from diffopt.models.catalogue import PICKLED, read_json

_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)"
    r"(\.(?P<variant>\w+))?(?P<shard>-\d{5}-of-\d{5})?(\.(?P<variant_after_shard>\w+))?"
)


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The weight files of one component (its folder in a pipeline's folder).

    Attributes:
        files: in the order of their names.
        variant: as in `diffusion_pytorch_model.fp16.safetensors`, or None.
        pickled: they are pickles, which can run code when read.
    """

    files: tuple[Path, ...]
    variant: str | None = None
    pickled: bool = False


def find_weights(component: Path, *, variant: str | None = None, allow_pickle: bool = False) -> WeightFiles:
    """The weight files that a component's folder offers: safetensors, of the wanted variant if it has them.

    Raises:
        ModelError: no weights, or only pickled ones and `allow_pickle` is false.
    """
    by_variant = _by_variant(component, (".safetensors",))
    pickles = [] if by_variant else sorted(path for path in component.iterdir() if path.suffix in PICKLED)
    if pickles and not allow_pickle:
        raise ModelError(refuse_pickle(pickles[0]))
    if not by_variant and pickles:
        by_variant = _by_variant(component, PICKLED)
    if not by_variant:
        raise ModelError(f"model {component.parent}: {component.name} has no weights; a .safetensors file is needed")
    chosen = variant if variant in by_variant else None if None in by_variant else sorted(by_variant, key=str)[0]
    return WeightFiles(tuple(by_variant[chosen]), chosen, bool(pickles))


def refuse_pickle(path: Path) -> str:
    """The line that refuses a pickled file."""
    return (
        f"model {path}: pickled weights can run any code when they are read; convert them to .safetensors, "
        "or allow them with --allow-pickle (allow_pickle=True) if you trust where they come from"
    )


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; its length is checked, its data is not read.

    Raises:
        ModelError: missing, unreadable, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"model {path}: damaged or incomplete ({one_line(error)}); fetch it again") from error
    except OSError as error:
        raise ModelError(f"model {path}: can't be read: {error.strerror or error}") from error


def load_component(cls: Any, folder: Path, weights: WeightFiles, dtype: Any) -> Any:
    """Load a model of diffusers or transformers whose weights are exactly those its configuration asks for.

    Args:
        cls: its class.
        folder: holds config.json and the weights.
        dtype: torch dtype of the result.

    Raises:
        ModelError: damaged files; weights that are missing, too many or of other shapes (the first three are named).
    """
    read_json(folder / "config.json")
    _check_shards(folder)
    for path in () if weights.pickled else weights.files:
        read_header(path)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": not weights.pickled, "local_files_only": True}
    if weights.variant is not None:
        options["variant"] = weights.variant
    if _is_transformers(cls):
        options["ignore_mismatched_sizes"] = True  # they are then listed, and refused below
    try:
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(_why_not(cls, folder, weights, error)) from error
    check_keys(folder, cls.__name__, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model


def check_keys(
    where: Path,
    name: str,
    missing: Iterable[str],
    extra: Iterable[str],
    other_shape: Iterable[tuple[str, Iterable[int], Iterable[int]]],
) -> None:
    """Refuse weights that do not fit.

    Args:
        where: the folder or file they come from.
        name: the model's class.
        missing, extra: parameter names.
        other_shape: (name, shape in the file, shape in the model).

    Raises:
        ModelError: any of the three is not empty.
    """
    extra = [key for key in extra if not key.endswith("position_ids")]  # constants that older versions saved
    missing, extra, other_shape = sorted(missing), sorted(extra), sorted(other_shape, key=lambda entry: entry[0])
    faults = []
    if missing:
        faults.append(f"{_some(missing)} missing")
    if extra:
        faults.append(f"{_some(extra)} too many")
    if other_shape:
        faults.append(
            _some([f"{key} is {_shape(found)} and should be {_shape(wanted)}" for key, found, wanted in other_shape])
        )
    if faults:
        raise ModelError(f"model {where}: the weights are not those of its {name}: {'; '.join(faults)}")


def _why_not(cls: Any, folder: Path, weights: WeightFiles, error: Exception) -> str:
    """Say why a component can't be loaded; other shapes are found by comparing the files with an empty model."""
    if not weights.pickled and hasattr(cls, "from_config") and hasattr(cls, "load_config"):
        from accelerate import init_empty_weights

        found = {key: shape for path in weights.files for key, shape in read_header(path).items()}
        try:
            with init_empty_weights():
                wanted = cls.from_config(cls.load_config(folder)).state_dict()
        except Exception as broken:  # the configuration itself is wrong, in any of many ways
            return f"model {folder}: config.json doesn't describe a {cls.__name__}: {one_line(broken)}"
        other = [(key, shape, wanted[key].shape) for key, shape in found.items() if key in wanted]
        other = [entry for entry in other if tuple(entry[1]) != tuple(entry[2])]
        try:
            check_keys(folder, cls.__name__, set(wanted) - set(found), set(found) - set(wanted), other)
        except ModelError as reason:
            return str(reason)
    return f"model {folder}: {cls.__name__} can't be loaded: {one_line(error)}"


def _is_transformers(cls: Any) -> bool:
    return any(parent.__module__.startswith("transformers.") for parent in cls.__mro__)


def _by_variant(component: Path, suffixes: tuple[str, ...]) -> dict[str | None, list[Path]]:
    """Weight files by variant; LoRA weights and the like beside them are left out, and shards where a whole file is."""
    groups: dict[str | None, list[tuple[bool, Path]]] = {}
    for path in sorted(component.iterdir()):
        match = _WEIGHTS.fullmatch(path.stem) if path.suffix in suffixes else None
        if match:
            variant = match["variant"] or match["variant_after_shard"]
            groups.setdefault(variant, []).append((bool(match["shard"]), path))
    return {
        variant: [path for sharded, path in found if sharded == all(shard for shard, _ in found)]
        for variant, found in groups.items()
    }


def _check_shards(folder: Path) -> None:
    """Refuse a folder that lacks a shard which its index names."""
    for index in sorted(folder.glob("*.index*.json")):
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                raise ModelError(f"model {folder}: {name} is missing, and {index.name} names it")


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
