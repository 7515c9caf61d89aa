"""The attention report as tables in words: for a terminal, for the report's documents and for the README."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from diffopt.bench.attention.peers import OURS, OURS_BF16
from diffopt.bench.attention.report import Heat

_DASH = "—"
_TIMES: dict[Heat, tuple[str, str]] = {
    "hot_us": ("microseconds", "range"),
    "cold_us": ("cold_microseconds", "cold_range"),
}
RATIO_COLUMN = "ratio (95%)"
SIZES = "B, N_q, N_k, H, D"
SPREAD = "median ± half the range of all rounds, in percent of it, rounded up"
RATIO = "ratio: our time over the best exact peer's in the same dtype, below 1 is faster"


@dataclasses.dataclass(frozen=True)
class Block:
    """One table of one machine's shapes, in words: a row a shape, the shape's name first."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def only(self, *headings: str) -> "Block":
        """These columns of it."""
        chosen = [self.headings.index(heading) for heading in headings]
        return Block(self.title, headings, [tuple(row[column] for column in chosen) for row in self.rows])

    def beside(self, other: "Block") -> "Block":
        """Its columns, then the other's, of the same shapes."""
        rows = [(*row, *more) for row, (_, *more) in zip(self.rows, other.rows, strict=True)]
        return Block(self.title, (*self.headings, *other.headings[1:]), rows)

    def terminal(self) -> Table:
        """For a terminal; narrow gaps, because a row holds every contender."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=heading in (RATIO_COLUMN, SIZES))
        for row in self.rows:
            table.add_row(*row)
        return table


def attention_tables(entry: dict[str, Any]) -> list[RenderableType]:
    """Three tables and some lines of one machine's attention (`report.attention_entry`)."""
    if not entry["shapes"]:
        return []
    blocks = [times_block(entry, "hot_us"), times_block(entry, "cold_us"), ratios_block(entry)]
    notes = [f"* headline; {RATIO}", f"times: {SPREAD}; memory: beyond the output", *attention_notes(entry)]
    return [*(block.terminal() for block in blocks), Text("\n".join(notes))]


def times_block(entry: dict[str, Any], heat: Heat) -> Block:
    """Every contender's median with its spread, or why it has none."""
    names = list(dict.fromkeys(name for shape in entry["shapes"].values() for name in shape["contenders"]))
    rows = [
        (_starred(entry, name), *(_time_or_state(shape["contenders"].get(contender), heat) for contender in names))
        for name, shape in entry["shapes"].items()
    ]
    title = f"attention, µs per call, inputs {heat.removesuffix('_us')}"
    return Block(title, ("shape", *(name.removeprefix("sdpa-") for name in names)), rows)


def ratios_block(entry: dict[str, Any]) -> Block:
    """Every shape against its best exact peer, and against what the machine reaches."""
    headings = ("shape", "best peer", RATIO_COLUMN, "cold", "TFLOP/s", "of ceiling", "bf16/fp16", "memory", SIZES)
    rows = [
        (
            _starred(entry, name),
            shape["best_peer"] or "void",
            _ratio(shape),
            _number(shape["ratio_cold"], "{:.3f}"),
            _number(shape["tflops"], "{:.0f}"),
            _number(shape["share_of_ceiling"], "{:.0%}"),
            _number(shape["bf16_ratio"], "{:.3f}"),
            _number(shape["memory_beyond_output"], "{:+d} B"),
            ", ".join(map(str, shape["sizes"])),
        )
        for name, shape in entry["shapes"].items()
    ]
    return Block("ours against the best exact peer", headings, rows)


def headline_markdown(entries: Mapping[str, dict[str, Any]]) -> list[str]:
    """The headline shapes as the lines of a Markdown table, the machines side by side; made from records, never typed.

    Args:
        entries: by machine, `report.attention_entry`.
    """
    shapes: dict[str, str] = {}
    for entry in entries.values():
        for name in entry["headline"]:
            sizes = f" `{', '.join(map(str, entry['shapes'][name]['sizes']))}`" if name in entry["shapes"] else ""
            shapes[name] = shapes.get(name) or sizes
    headings = [f"shape `{SIZES}`"]
    for machine in entries:
        headings += [f"{machine}: diffopt, µs", "best exact peer, µs", RATIO_COLUMN]
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    for name, sizes in shapes.items():
        cells = [cell for entry in entries.values() for cell in _headline_cells(entry["shapes"].get(name))]
        lines.append(f"| {' | '.join([f'{name}{sizes}', *cells])} |")
    return lines


def _headline_cells(shape: dict[str, Any] | None) -> tuple[str, str, str]:
    if shape is None:
        return _DASH, "not measured", _DASH
    peer = shape["contenders"].get(shape["best_peer"])
    ours = _us(_ours_against(shape, peer)["microseconds"])
    if peer is None:
        return ours, f"void: {shape['void']}", _DASH
    bf16 = " (bf16)" if peer["dtype"] == "bfloat16" else ""
    return f"{ours}{bf16}", f"{shape['best_peer']}{bf16} {_us(peer['microseconds'])}", _ratio(shape)


def _ours_against(shape: dict[str, Any], peer: dict[str, Any] | None) -> dict[str, Any]:
    """Ours in the best peer's dtype; in float16 where there is no best peer."""
    dtype = peer["dtype"] if peer else "float16"
    return next(c for name, c in shape["contenders"].items() if name in (OURS, OURS_BF16) and c["dtype"] == dtype)


def attention_notes(entry: dict[str, Any]) -> Iterable[str]:
    """What stands below the tables: the mean, the ceilings, who is absent, who failed at what."""
    yield summary(entry)
    if entry["ceilings"]:
        ceilings = entry["ceilings"]
        yield f"measured ceilings: {ceilings['fp16_tflops']:.0f} TFLOP/s fp16, {ceilings['copy_tb_s']:.2f} TB/s copied"
    for name, peer in entry["peers"].items():
        if peer["absent"]:
            required = ", and required" if peer["required"] else ""
            yield f"{name} is absent{required} ({peer['absent']}); to install it: {peer['install']}"
    for name, shape in entry["shapes"].items():
        for contender, figure in shape["contenders"].items():
            if figure["state"] not in ("timed", "absent"):
                yield f"{name}: {contender}: {figure['state']}: {figure['why']}"


def summary(entry: dict[str, Any]) -> str:
    """The mean over the headline shapes and the worst of them in one line, or why there is none."""
    if entry["geomean_ratio"] is None:
        return f"geometric mean: void: {entry['void_ratio']}"
    low, high = entry["worst_ratio_interval"]
    return (
        f"geometric mean of {len(entry['headline'])} shapes: {entry['geomean_ratio']:.3f} "
        f"(inputs cold: {entry['geomean_ratio_cold']:.3f}); "
        f"worst: {entry['worst_ratio']:.3f} ({low:.3f} to {high:.3f}), {entry['worst_shape']}"
    )


def _starred(entry: dict[str, Any], name: str) -> str:
    return f"{name} *" if name in entry["headline"] else name


def _time_or_state(figure: dict[str, Any] | None, heat: Heat) -> str:
    """`110.1 ±1%` (`SPREAD`)."""
    if figure is None:
        return _DASH
    if figure["state"] != "timed":
        return figure["state"]
    median, (low, high) = (figure[key] for key in _TIMES[heat])
    percent = math.ceil(round(50 * (high - low) / median, 6))
    return f"{_us(median)} ±{percent}%"


def _ratio(shape: dict[str, Any]) -> str:
    if shape["ratio"] is None:
        return _DASH
    low, high = shape["ratio_interval"]
    return f"{shape['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _us(microseconds: float | None) -> str:
    if microseconds is None:
        return _DASH
    return f"{microseconds:.1f}" if microseconds < 1000 else f"{microseconds:.0f}"


def _number(value: float | None, form: str) -> str:
    return _DASH if value is None else form.format(value)
