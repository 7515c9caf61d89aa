"""Reads the TOML files under configs/ into frozen dataclasses; an unknown or missing key is an error."""

import dataclasses
import difflib
import functools
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from diffopt.errors import DiffoptError, InputError

T = TypeVar("T")


class ConfigError(DiffoptError):
    """A configuration file that isn't what its reader expects."""


@functools.cache
def config_folder() -> Path:
    """The folder configs/: inside the installed package (wheel) or at the repository's root (editable install)."""
    for folder in (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError("the folder configs/ is missing: install diffopt again")


def config_names(kind: str) -> list[str]:
    """Names that `read_config(kind, name, ...)` knows, sorted. `kind` is a folder of configs/."""
    return sorted(path.stem for path in (config_folder() / kind).glob("*.toml"))


def read_config(kind: str, name: str, cls: type[T]) -> T:
    """Read configs/<kind>/<name>.toml into the frozen dataclass `cls`.

    Raises:
        InputError: no such name; the message lists the known ones, nearest first.
        ConfigError: an unknown or missing key, or a value of another type.
    """
    known = config_names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=len(known), cutoff=0.4)
        names = ", ".join(near + [other for other in known if other not in near])
        raise InputError(kind.removesuffix("s"), name, f"known: {names or 'none'}")
    return read_file(config_folder() / kind / f"{name}.toml", cls)


def read_file(path: Path, cls: type[T]) -> T:
    """Read one TOML file into the frozen dataclass `cls`.

    Raises:
        ConfigError: it can't be read, isn't TOML, has an unknown or missing key, or a value of another type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path.name}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: not valid TOML: {error}") from error
    return build(cls, table, where=path.name)


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested more deeply than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def build(cls: type[T], table: dict[str, Any], *, where: str) -> T:
    """Build the dataclass `cls` from a TOML table, nested dataclasses and tuples of them included."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], where=f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing")
    return cls(**values)


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where}: {value!r}; allowed: {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:  # JSON has null, TOML doesn't
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        return _convert(inner[0], value, where=where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(typing.cast(type, hint), value, where=where)
    if origin is tuple and isinstance(value, list):
        items = arguments[:1] * len(value) if arguments[1:] == (Ellipsis,) else arguments
        if len(items) == len(value):
            return tuple(_convert(item, entry, where=where) for item, entry in zip(items, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], entry, where=f"{where}.{key}") for key, entry in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{where}: {value!r} is a {type(value).__name__}, expected {getattr(hint, '__name__', hint)}")
