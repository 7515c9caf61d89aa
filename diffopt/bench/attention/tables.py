"""The attention report as tables: for a terminal, and for the README."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from diffopt.bench.attention.peers import OURS, OURS_BF16

_DASH = "—"


def attention_tables(entry: dict[str, Any]) -> list[RenderableType]:
    """Two tables and some lines of one machine's attention (`attention_report.attention_entry`)."""
    if not entry["shapes"]:
        return []
    return [_times(entry), _ratios(entry), Text("\n".join(_notes(entry)))]


def attention_markdown(entry: dict[str, Any]) -> list[str]:
    """The headline shapes as the lines of a Markdown table, the mean below it; made from records, never typed."""
    lines = [
        "| shape `B, N_q, N_k, H, D` | best exact peer | its µs | ours, µs | ratio (95% interval) | TFLOP/s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in entry["headline"]:
        shape = entry["shapes"].get(name)
        if shape is None:
            lines.append(f"| {name} | not measured | {_DASH} | {_DASH} | {_DASH} | {_DASH} |")
            continue
        peer = shape["contenders"].get(shape["best_peer"])
        ours = _ours_against(shape, peer)
        cells = [
            f"{name} `{', '.join(map(str, shape['sizes']))}`",
            f"{shape['best_peer']}{' (bf16)' if peer['dtype'] == 'bfloat16' else ''}" if peer else shape["void"],
            _us(peer["microseconds"] if peer else None),
            _us(ours["microseconds"]),
            _ratio(shape),
            _number(ours["tflops"], "{:.0f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _summary(entry)]


def _ours_against(shape: dict[str, Any], peer: dict[str, Any] | None) -> dict[str, Any]:
    """Ours in the best peer's dtype; in float16 where there is no best peer."""
    dtype = peer["dtype"] if peer else "float16"
    return next(c for name, c in shape["contenders"].items() if name in (OURS, OURS_BF16) and c["dtype"] == dtype)


def _times(entry: dict[str, Any]) -> Table:
    table = Table(title="attention, µs per call, inputs hot", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("shape")
    names = list(dict.fromkeys(name for shape in entry["shapes"].values() for name in shape["contenders"]))
    for name in names:
        table.add_column(name.removeprefix("sdpa-"), justify="right")
    for name, shape in entry["shapes"].items():
        table.add_row(_starred(entry, name), *(_time_or_state(shape["contenders"].get(peer)) for peer in names))
    return table


def _ratios(entry: dict[str, Any]) -> Table:
    table = Table(title="ours against the best exact peer", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("shape")
    for heading in ("best peer", "ratio (95%)", "cold", "TFLOP/s", "of ceiling", "bf16/fp16", "memory"):
        table.add_column(heading, justify="right", no_wrap=heading != "best peer")
    for name, shape in entry["shapes"].items():
        table.add_row(
            _starred(entry, name),
            shape["best_peer"] or "void",
            _ratio(shape),
            _number(shape["ratio_cold"], "{:.3f}"),
            _number(shape["tflops"], "{:.0f}"),
            _number(shape["share_of_ceiling"], "{:.0%}"),
            _number(shape["bf16_ratio"], "{:.3f}"),
            _number(shape["memory_beyond_output"], "{:+d} B"),
        )
    return table


def _notes(entry: dict[str, Any]) -> Iterable[str]:
    yield "* headline; ratio: our time over the peer's in the same dtype, below 1 is faster; memory: beyond the output"
    yield _summary(entry)
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


def _summary(entry: dict[str, Any]) -> str:
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


def _time_or_state(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return _DASH
    return _us(figure["microseconds"]) if figure["state"] == "timed" else figure["state"]


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
