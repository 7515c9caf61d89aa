"""A report's tables for a terminal, and as Markdown."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from diffopt.bench.attention.tables import attention_tables
from diffopt.bench.report.attention_grids import attention_entries, attention_grids
from diffopt.bench.report.rows import Row, change, row_notes, rows_markdown, rows_table


def report_tables(data: dict[str, Any], rows: Sequence[Row]) -> list[RenderableType]:
    """What a terminal shows of each machine. No speed stands beside a check that did not pass.

    Args:
        data: `data.report_data` of the records. rows: `rows.rows_of` of the same.
    """
    return [
        part
        for name, gpu in data["gpus"].items()
        for part in _machine(name, gpu, [row for row in rows if row.machine == name])
    ]


def report_markdown(data: dict[str, Any], rows: Sequence[Row]) -> str:
    """Per machine its table of denoising steps and those of attention, where it has measured them."""
    parts: list[str] = []
    attention = attention_entries(data)
    for name in data["gpus"]:
        mine = [row for row in rows if row.machine == name]
        if mine or name in attention:
            parts += [f"**{name}**", ""]
        if mine:
            parts += [rows_markdown(mine), "", *(f"- {note}" for note in row_notes(mine)), ""]
        if name in attention:
            parts += [line for grid in attention_grids(name, attention[name]) for line in grid.markdown()]
    return "\n".join(parts).rstrip()


def _machine(name: str, gpu: dict[str, Any], rows: Sequence[Row]) -> list[RenderableType]:
    notes = []
    for case, entry in gpu["step"].items():
        rounds = f"{entry['repetitions']} interleaved rounds{' (interrupted)' if entry['interrupted'] else ''}"
        unet = f"UNet alone {change(entry['unet_its_eager'], entry['unet_its'], '{:.2f}')} it/s"
        notes += [f"{case}: {entry['exactness']}", f"  {rounds}{_recorded(entry)}; {unet}"]
        if entry["profile"]:
            notes.append(f"  {entry['profile']['words']}")
        pictures = entry["pictures_compared"]
        notes += [f"  {line}" for line in (*entry["audit"]["words"], *(pictures["words"] if pictures else ()))]
    notes += row_notes(rows)
    attention = gpu["attention"]
    if attention is not None and attention["launches"] is not None:
        notes.append(attention_note(attention))
    steps = [rows_table(rows, name), Text("\n".join(notes))] if rows else [Text("\n".join([name, *notes]))]
    return [*steps, *(attention_tables(attention) if attention is not None else [])]


def _recorded(entry: dict[str, Any]) -> str:
    """The ratio that the record itself holds, which needs no further library."""
    if entry["ratio_vs_eager"] is None:
        return ""
    low, high = entry["ratio_interval"]
    return f"; ratio of medians {entry['ratio_vs_eager']:.3f}, bootstrap {low:.3f} to {high:.3f}"


def attention_note(entry: dict[str, Any]) -> str:
    """The launches' self-check in one line."""
    wrong = f"; WRONG: {', '.join(entry['wrong'])}" if entry["wrong"] else ""
    return f"attention kernel: {entry['right']} of {entry['launches']} launches right, {entry['checks']} checks{wrong}"
