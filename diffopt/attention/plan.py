"""Which backend serves which attention shape, and why; saved, loaded, and refused where it does not fit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from diffopt.attention.backends import AUTO, BACKENDS
from diffopt.attention.machine import machine
from diffopt.config import ConfigError, build, parse_json
from diffopt.errors import OptimizeError
from diffopt.whole_file import write_whole
from diffopt_kernels.launch import LaunchKey

SCHEMA = 3
"""Of the file. 2 did not say which choices are fallbacks; it is read too."""

READABLE = (2, 3)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What a choice depends on: everything about a call but its values. `batch` counts rows, guidance included."""

    batch: int
    query_tokens: int
    key_tokens: int
    heads: int
    head_dim: int
    dtype: str
    masked: bool = False

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> "AttentionShape":
        """Shape of a call with q [B, N_q, H, D] and k [B, N_k, H, D]."""
        dtype = str(q.dtype).removeprefix("torch.")
        batch, query_tokens, heads, head_dim = q.shape
        return cls(batch, query_tokens, k.shape[1], heads, head_dim, dtype, mask is not None)

    @property
    def key(self) -> LaunchKey:
        """As the kernels and the tuned tables look it up."""
        return LaunchKey(self.batch, self.query_tokens, self.key_tokens, self.heads, self.head_dim)

    def __str__(self) -> str:
        masked = " masked" if self.masked else ""
        return f"{self.batch}×{self.query_tokens}×{self.key_tokens} {self.heads}h d{self.head_dim} {self.dtype}{masked}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend's name and the evidence for it, in words; `fallback`: one that came before it could not serve."""

    backend: str
    reason: str
    fallback: bool = False


@dataclasses.dataclass
class Plan:
    """Choices per shape, filled in as shapes are met.

    Attributes:
        attention: what was asked for: `auto` or a backend's name.
        made_for: device name and versions (see `machine`).
        choices: shape to choice.
    """

    attention: str
    made_for: dict[str, str | None]
    choices: dict[AttentionShape, Choice] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `load` reads it back."""
        rows = [
            {**dataclasses.asdict(shape), **dataclasses.asdict(choice)}
            for shape, choice in sorted(self.choices.items(), key=lambda item: str(item[0]))
        ]
        return {"schema": SCHEMA, "attention": self.attention, "made_for": self.made_for, "choices": rows}

    def follows(self, other: "Plan") -> bool:
        """Whether this is the other plan, to which choices for more shapes may have been added."""
        same = (self.attention, self.made_for) == (other.attention, other.made_for)
        return same and other.choices.items() <= self.choices.items()

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            OSError: it can't be written.
        """
        write_whole(Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> "Plan":
        """Read a saved plan.

        Raises:
            OptimizeError: unreadable, damaged, of another schema, or made for another device or other versions.
        """
        try:
            plan = cls._from_dict(parse_json(Path(path).read_text(encoding="utf-8")), where=f"plan {path}")
        except (OSError, ValueError) as error:
            raise OptimizeError(f"plan {path}: can't be read: {error}") from error
        here = machine(device)
        for key, value in here.items():
            if plan.made_for.get(key) != value:
                was = plan.made_for.get(key)
                raise OptimizeError(f"plan {path}: made for {key} {was}, here it is {value}; make a new one")
        return plan

    @classmethod
    def _from_dict(cls, table: Any, *, where: str) -> "Plan":
        if not isinstance(table, dict) or table.get("schema") not in READABLE:
            schema = table.get("schema") if isinstance(table, dict) else None
            raise OptimizeError(
                f"{where}: schema {schema!r} is not known; this version reads schema {READABLE[0]} and {SCHEMA}"
            )
        try:
            file = build(_PlanFile, table, where=f"{where}: damaged")
            choices = dict(_choice(row, f"{where}: damaged: choices[{i}]") for i, row in enumerate(file.choices))
        except ConfigError as error:
            raise OptimizeError(str(error)) from error
        plan = cls(file.attention, file.made_for, choices)
        names = {choice.backend for choice in plan.choices.values()} | {plan.attention}
        unknown = sorted(names - {AUTO, *BACKENDS})
        if unknown:
            raise OptimizeError(f"{where}: unknown backend {unknown[0]!r}; known: {', '.join(BACKENDS)}")
        return plan


@dataclasses.dataclass(frozen=True)
class _PlanFile:
    """A plan as it is saved; a row of `choices` has the fields of a shape and of its choice."""

    schema: int
    attention: str
    made_for: dict[str, str | None]
    choices: tuple[dict[str, Any], ...]


def _choice(row: dict[str, Any], where: str) -> tuple[AttentionShape, Choice]:
    ours = {field.name for field in dataclasses.fields(Choice)}
    shape = {key: value for key, value in row.items() if key not in ours}
    choice = {key: value for key, value in row.items() if key in ours}
    return build(AttentionShape, shape, where=where), build(Choice, choice, where=where)
