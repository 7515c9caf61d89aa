"""What a report says of a set of records: the latest record of each machine and case, as plain data."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from diffopt.bench.attention.record import AttentionRecord
from diffopt.bench.attention.report import NOT_MEASURED, attention_entry
from diffopt.bench.attention.selfcheck_record import SelfcheckRecord
from diffopt.bench.record import AnyRecord
from diffopt.bench.report.audit import audit_data, audit_lines
from diffopt.bench.report.claims import claims_of
from diffopt.bench.report.cost import cost_per_1000, known_price
from diffopt.bench.step.free_running_words import free_running_data
from diffopt.bench.step.record import Contender, StepRecord
from diffopt.bench.step.words import peers_data, profile_data, profile_words, warm_start_words
from diffopt.gpus import Price


def by_machine(records: Iterable[AnyRecord]) -> dict[str, list[AnyRecord]]:
    """Records of each machine (a GPU by name, or a CPU by name and threads), oldest first."""
    machines: dict[str, list[AnyRecord]] = {}
    for record in sorted(records, key=lambda record: record.environment.time_utc):
        machines.setdefault(record.environment.machine.name, []).append(record)
    return machines


def latest_steps(records: Iterable[AnyRecord]) -> dict[str, StepRecord]:
    """The last record of each case, of records that are sorted by time; small models and pictures before large ones.

    By size and not by time, so that measuring one case anew leaves the order of the others alone.
    """
    steps = {record.workload.case: record for record in records if isinstance(record, StepRecord)}
    return dict(sorted(steps.items(), key=lambda item: _size(item[1])))


def steps_case_by_case(records: Iterable[AnyRecord]) -> list[StepRecord]:
    """The latest record of each machine and case: cases by size, those that a CPU can do last, machines by name."""
    machines = {machine: latest_steps(group) for machine, group in by_machine(records).items()}
    found = [(case, record) for steps in machines.values() for case, record in steps.items()]
    on_cpus = {case for case, record in found if record.environment.machine.gpu is None}
    found.sort(key=lambda item: (item[0] in on_cpus, *_size(item[1])))
    cases = dict.fromkeys(case for case, _ in found)
    return [machines[name][case] for case in cases for name in sorted(machines) if case in machines[name]]


def _size(record: StepRecord) -> tuple[int, int]:
    work = record.workload
    return work.model.parameters, work.width * work.height * work.batch


def report_data(records: Iterable[AnyRecord], prices: Mapping[str, Price] | None = None) -> dict[str, Any]:
    """The report as JSON-able data: `{"gpus": {<machine>: {"step": {<case>: ...}, "attention": ..., ...}}}`.

    Of several records of one case the latest counts. A case whose exactness check failed or is void has null speeds.
    "attention" holds the launches' self-check and the attention suite, each null where there is no record of it.
    "claims" holds per case what may be claimed of loop, unet and pictures, or why not (`claims.Claim`);
    "images_per_second", "cost_per_1000" (US dollars) and "energy_per_image_j" hold our value of each case, null where
    whole pictures were not timed, no price is known or the driver gives no energy; "warm_start_s" each case's seconds
    from a process's start to its first picture (`WarmStart`), null where that was not timed or failed.

    Args:
        prices: by machine; they go before those of the records, which go before those of configs/gpus.
    """
    machines = by_machine(records)
    return {"gpus": {name: _machine_data(group, (prices or {}).get(name)) for name, group in machines.items()}}


def _machine_data(records: list[AnyRecord], price: Price | None) -> dict[str, Any]:
    """One machine's records, oldest first."""
    latest = latest_steps(records)
    steps = {case: step_entry(record) for case, record in latest.items()}
    pictures = {case: record.optimized and record.optimized.pictures for case, record in latest.items()}
    images_per_s = {case: found.images_per_s if found else None for case, found in pictures.items()}
    return {
        "step": steps,
        "attention": _attention_data(records),
        "claims": {case: _claims_data(record) for case, record in latest.items()},
        "images_per_second": images_per_s,
        "warm_start_s": {case: warm_start_s(record) for case, record in latest.items()},
        "cost_per_1000": {case: cost_of(record, images_per_s[case], price) for case, record in latest.items()},
        "energy_per_image_j": {case: found.energy_per_image_j if found else None for case, found in pictures.items()},
        "price": {case: _price_data(price_of(record, price)) for case, record in latest.items()},
    }


def price_of(record: StepRecord, given: Price | None) -> Price | None:
    """The price that counts for a record: the one given, else its own, else that of configs/gpus."""
    return given or record.price or known_price(record.environment.machine.gpu)


def cost_of(record: StepRecord, images_per_s: float | None, given: Price | None) -> float | None:
    """US dollars for 1000 images at this rate; None without a rate or a price."""
    price = price_of(record, given)
    return cost_per_1000(price.usd_per_hour, images_per_s) if price and images_per_s else None


def warm_start_s(record: StepRecord) -> float | None:
    """Seconds from a process's start to its first picture, imports and weights apart; None where there are none."""
    return record.warm_start.warm_start_s if record.warm_start else None


def _warm_start_data(record: StepRecord) -> dict[str, Any] | None:
    return {**record.warm_start.model_dump(), "words": warm_start_words(record)} if record.warm_start else None


def _price_data(price: Price | None) -> dict[str, Any] | None:
    return dataclasses.asdict(price) if price else None


def _claims_data(record: StepRecord) -> dict[str, Any]:
    return {what: dataclasses.asdict(claim) for what, claim in claims_of(record).items()}


def _attention_data(records: list[AnyRecord]) -> dict[str, Any] | None:
    selfchecks = [record for record in records if isinstance(record, SelfcheckRecord)]
    suite = [record for record in records if isinstance(record, AttentionRecord)]
    if not selfchecks and not suite:
        return None
    checked = _selfcheck_entry(selfchecks[-1]) if selfchecks else _NOT_CHECKED
    measured = attention_entry(suite) if suite else NOT_MEASURED
    return {**checked, **measured}


def step_entry(record: StepRecord) -> dict[str, Any]:
    """One case: loop_its and unet_its of both, their ratios (above 1 is faster) with intervals, memory, exactness.

    Peers and ours over the best `torch.compile` mode are as in `step.words.peers_data`.
    """
    stock, optimized, comparison = record.stock, record.optimized, record.comparison
    return {
        "loop_its": optimized.loop_its if optimized else None,
        "loop_its_eager": stock.loop_its if stock else None,
        "ratio_vs_eager": comparison.loop.ratio if comparison else None,
        "ratio_interval": [comparison.loop.low, comparison.loop.high] if comparison else None,
        "unet_its": optimized.unet_its if optimized else None,
        "unet_its_eager": stock.unet_its if stock else None,
        "unet_ratio_vs_eager": comparison.unet.ratio if comparison else None,
        **peers_data(record),
        "profile": {**found, "words": profile_words(record)} if (found := profile_data(record)) else None,
        "warm_start": _warm_start_data(record),
        "peak_memory_ratio": comparison.peak_memory if comparison else None,
        "peak_memory": optimized.memory.headline if optimized else None,
        "images_per_s": _images_per_s(optimized),
        "images_per_s_eager": _images_per_s(stock),
        "stages": {"stock": _stages(stock), "optimized": _stages(optimized)},
        "flags": list(record.method.flags) if record.method else [],
        "exact": record.exact,
        "exactness": record.verdict(),
        "pictures_compared": free_running_data(record.free_running),
        "attention": record.attention,
        "backends": backend_calls(record.plan),
        "audit": {**audit_data(record.plan), "words": audit_lines(record.plan)},
        "repetitions": len(optimized.loop_s) if optimized else 0,
        "interrupted": record.interrupted,
        "time_utc": record.environment.time_utc,
        "commit": record.environment.software.commit,
        "record": record.id,
    }


def _images_per_s(side: Contender | None) -> float | None:
    return side.pictures.images_per_s if side and side.pictures else None


def _stages(side: Contender | None) -> dict[str, float | None] | None:
    """Median seconds of a batch of pictures by stage; `other` is what the call spends outside the three stages."""
    if side is None or side.pictures is None:
        return None
    found = side.pictures
    text, unet, vae = (
        statistics.median(samples) if samples else None for samples in (found.text_encoder_s, found.unet_s, found.vae_s)
    )
    whole = statistics.median(found.whole_s)
    other = max(0.0, whole - (text or 0.0) - (unet or 0.0) - (vae or 0.0))
    return {"text_encoder": text, "unet": unet, "vae": vae, "other": other, "whole": whole}


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
