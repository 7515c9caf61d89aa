"""What a report says of a set of records: the latest record of each machine and case, as plain data and as tables."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from diffopt.bench.attention_report import NOT_MEASURED, attention_entry
from diffopt.bench.attention_tables import attention_markdown, attention_tables
from diffopt.bench.record import AnyRecord, AttentionRecord, SelfcheckRecord, StepRecord

_DASH = "—"


def report_data(records: Iterable[AnyRecord]) -> dict[str, Any]:
    """The report as JSON-able data: `{"gpus": {<machine>: {"step": {<case>: ...}, "attention": ...}}}`.

    A machine is a GPU by name, or a CPU by name and threads. Of several records of one case the latest counts. A case
    whose exactness check failed or is void has null speeds. "attention" holds the launches' self-check and the
    attention suite, each null where there is no record of it.
    """
    machines: dict[str, list[AnyRecord]] = {}
    for record in sorted(records, key=lambda record: record.environment.time_utc):
        machines.setdefault(record.environment.machine.name, []).append(record)
    return {"gpus": {name: _machine_data(of_machine) for name, of_machine in machines.items()}}


def _machine_data(records: list[AnyRecord]) -> dict[str, Any]:
    """One machine's records, oldest first."""
    steps = {record.workload.case: step_entry(record) for record in records if isinstance(record, StepRecord)}
    selfchecks = [record for record in records if isinstance(record, SelfcheckRecord)]
    suite = [record for record in records if isinstance(record, AttentionRecord)]
    if not selfchecks and not suite:
        return {"step": steps, "attention": None}
    checked = _selfcheck_entry(selfchecks[-1]) if selfchecks else _NOT_CHECKED
    measured = attention_entry(suite) if suite else NOT_MEASURED
    return {"step": steps, "attention": {**checked, **measured}}


def step_entry(record: StepRecord) -> dict[str, Any]:
    """One case: loop_its and unet_its of both, their ratios (above 1 is faster) with intervals, memory, exactness."""
    stock, optimized, comparison = record.stock, record.optimized, record.comparison
    return {
        "loop_its": optimized.loop_its if optimized else None,
        "loop_its_eager": stock.loop_its if stock else None,
        "ratio_vs_eager": comparison.loop.ratio if comparison else None,
        "ratio_interval": [comparison.loop.low, comparison.loop.high] if comparison else None,
        "unet_its": optimized.unet_its if optimized else None,
        "unet_its_eager": stock.unet_its if stock else None,
        "unet_ratio_vs_eager": comparison.unet.ratio if comparison else None,
        "peak_memory_ratio": comparison.peak_memory if comparison else None,
        "peak_memory": optimized.memory.headline if optimized else None,
        "exact": record.exactness.passed,
        "exactness": record.exactness.verdict(),
        "attention": record.attention,
        "backends": backend_calls(record.plan),
        "repetitions": len(optimized.loop_s) if optimized else 0,
        "interrupted": record.interrupted,
        "time_utc": record.environment.time_utc,
        "commit": record.environment.software.commit,
        "record": record.id,
    }


def backend_calls(plan: dict[str, Any]) -> dict[str, int]:
    """Attention calls by backend that a handle's summary counted; layers that kept their processor are `kept`."""
    counted: dict[str, int] = {}
    for layer in plan.get("layers", []):
        for run in layer.get("runs", []):
            counted[run["backend"]] = counted.get(run["backend"], 0) + run["calls"]
        if not layer.get("optimized", True):
            counted["kept"] = counted.get("kept", 0) + 1
    return counted


_NOT_CHECKED: dict[str, Any] = dict.fromkeys(
    ("exact", "launches", "right", "wrong", "void", "checks", "time_utc", "commit", "record")
)


def _selfcheck_entry(record: SelfcheckRecord) -> dict[str, Any]:
    wrong = [launch.label for launch in record.launches if not launch.right]
    return {
        "exact": bool(record.launches) and not wrong,
        "launches": len(record.launches),
        "right": len(record.launches) - len(wrong),
        "wrong": wrong,
        "void": [launch.label for launch in record.launches if launch.void],
        "checks": sum(len(launch.cases) for launch in record.launches),
        "time_utc": record.environment.time_utc,
        "commit": record.environment.software.commit,
        "record": record.id,
    }


def report_tables(data: dict[str, Any]) -> list[RenderableType]:
    """What a terminal shows of each machine. No speed stands beside a check that did not pass."""
    return [part for name, gpu in data["gpus"].items() for part in _machine(name, gpu)]


def report_markdown(data: dict[str, Any]) -> str:
    """The README's table of attention, one per machine that has measured it."""
    parts = []
    for name, gpu in data["gpus"].items():
        if gpu["attention"] is not None and gpu["attention"]["shapes"]:
            parts += [f"**{name}**", "", *attention_markdown(gpu["attention"]), ""]
    return "\n".join(parts).rstrip()


def _machine(name: str, gpu: dict[str, Any]) -> list[RenderableType]:
    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("workload", no_wrap=True)
    for heading in ("it/s stock → ours", "faster (95%)", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("exact", no_wrap=True)
    notes = []
    for case, entry in gpu["step"].items():
        table.add_row(
            case,
            _change(entry["loop_its_eager"], entry["loop_its"]),
            _ratio(entry),
            _DASH if entry["peak_memory_ratio"] is None else f"× {entry['peak_memory_ratio']:.3f}",
            entry["exactness"].partition(":")[0],
        )
        rounds = f"{entry['repetitions']} interleaved rounds{' (interrupted)' if entry['interrupted'] else ''}"
        ran = ", ".join(f"{name} {calls}" for name, calls in entry["backends"].items())
        unet = f"UNet alone {_change(entry['unet_its_eager'], entry['unet_its'])} it/s"
        notes.append(f"{case}: {entry['exactness']}; {rounds}; {unet}; attention calls: {ran}")
    attention = gpu["attention"]
    if attention is not None and attention["launches"] is not None:
        notes.append(_attention_note(attention))
    steps = [table, Text("\n".join(notes))] if gpu["step"] else [Text("\n".join([name, *notes]))]
    return [*steps, *(attention_tables(attention) if attention is not None else [])]


def _change(before: float | None, after: float | None) -> str:
    return _DASH if before is None or after is None else f"{before:.2f} → {after:.2f}"


def _ratio(entry: dict[str, Any]) -> str:
    if entry["ratio_vs_eager"] is None:
        return _DASH
    low, high = entry["ratio_interval"]
    ratio = "not clear" if low <= 1 <= high else f"× {entry['ratio_vs_eager']:.3f}"
    return f"{ratio} ({low:.3f} to {high:.3f})"


def _attention_note(entry: dict[str, Any]) -> str:
    wrong = f"; WRONG: {', '.join(entry['wrong'])}" if entry["wrong"] else ""
    return f"attention kernel: {entry['right']} of {entry['launches']} launches right, {entry['checks']} checks{wrong}"
