"""Attention alone as grids, per machine: every shape and contender with inputs hot, and cold, and the rates reached."""

import re
from collections.abc import Mapping
from typing import Any

from diffopt.bench.attention.tables import (
    RATIO,
    RATIO_COLUMN,
    SIZES,
    SPREAD,
    attention_notes,
    ratios_block,
    times_block,
)
from diffopt.bench.report.grids import Grid


def attention_entries(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The attention of each machine that has measured it, machines by name.

    Args:
        data: `data.report_data`.
    """
    found = {name: gpu["attention"] for name, gpu in sorted(data["gpus"].items())}
    return {name: entry for name, entry in found.items() if entry is not None and entry["shapes"]}


def attention_grids(machine: str, entry: dict[str, Any]) -> tuple[Grid, Grid, Grid]:
    """Every shape of one machine (`attention_entries`): inputs hot with the ratio, inputs cold, sizes and rates."""
    title, name = f"Attention on {machine}", re.sub("[^a-z0-9]+", "-", f"attention-{machine}".lower())
    words = f"{SPREAD}. {RATIO[0].upper()}{RATIO[1:]}; * a headline shape, of run {entry['run'][:8]}."
    ratios = ratios_block(entry)
    hot = ratios.only("shape", "best peer", RATIO_COLUMN).beside(times_block(entry, "hot_us"))
    cold = ratios.only("shape", "cold").beside(times_block(entry, "cold_us"))
    rates = ratios.only("shape", SIZES, "TFLOP/s", "of ceiling", "bf16/fp16", "memory")
    about, about_cold = (f"µs a call, inputs {heat}: {words}" for heat in ("hot", "cold"))
    reached = "diffopt in float16, inputs hot; bf16/fp16: of times; memory: at the peak of a call, beyond the output."
    return (
        Grid(name, title, about, hot.headings, hot.rows, list(attention_notes(entry))),
        Grid(f"{name}-cold", f"{title}, inputs cold", about_cold, ("shape", "ratio", *cold.headings[2:]), cold.rows),
        Grid(f"{name}-rates", f"{title}, sizes and rates", reached, rates.headings, rates.rows),
    )
