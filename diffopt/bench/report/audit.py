"""What really ran, from a handle's summary: per kind of layer, captured calls, fused modules, and silent no-ops."""

import dataclasses
from typing import Any

KINDS = {"self": "self-attention", "cross": "cross-attention"}
_REASONS = 2
"""How many reasons a line gives; the rest are counted."""


@dataclasses.dataclass
class BackendUse:
    """What one backend did for one kind of layer.

    Attributes:
        kind: "self", "cross", or "" in records that don't say.
        layers, calls: how many. fallbacks: calls that a backend before it could not serve.
        reasons: in words, to the number of calls.
    """

    kind: str
    backend: str
    layers: int = 0
    calls: int = 0
    fallbacks: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)

    def words(self) -> str:
        """One line."""
        kind = KINDS.get(self.kind, "attention")
        ranked = sorted(self.reasons, key=lambda reason: -self.reasons[reason])
        reasons = "; ".join(ranked[:_REASONS])
        more = f"; and {len(ranked) - _REASONS} more reasons" if len(ranked) > _REASONS else ""
        fallen = f", fallbacks: {self.fallbacks}" if self.fallbacks else ""
        layers = f"{self.layers} layer{'' if self.layers == 1 else 's'}"
        return f"{kind}: {self.backend} in {layers}, {self.calls} calls{fallen} ({reasons}{more})"


def audit(plan: dict[str, Any]) -> list[BackendUse]:
    """By kind and backend, the most frequent first."""
    found: dict[tuple[str, str], BackendUse] = {}
    for layer in plan.get("layers", []):
        kind, served = layer.get("kind", ""), set()
        for run in layer.get("runs", []):
            use = found.setdefault((kind, run["backend"]), BackendUse(kind, run["backend"]))
            reason = run.get("reason", "no reason recorded")
            use.calls += run["calls"]
            use.fallbacks += run["calls"] if run.get("fallback") else 0
            use.reasons[reason] = use.reasons.get(reason, 0) + run["calls"]
            if run["backend"] not in served:
                use.layers += 1
                served.add(run["backend"])
    order = list(KINDS)
    return sorted(found.values(), key=lambda use: (order.index(use.kind) if use.kind in order else 2, -use.calls))


def kept(plan: dict[str, Any]) -> dict[str, int]:
    """Layers that kept their own processor, by reason."""
    counts: dict[str, int] = {}
    for layer in plan.get("layers", []):
        if not layer.get("optimized", True):
            reason = "; ".join(layer.get("reasons", [])) or "no reason recorded"
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def step_lines(plan: dict[str, Any]) -> list[str]:
    """Captured and uncaptured UNet calls; nothing in records of before they were captured."""
    step = plan.get("step") or {}
    lines, buckets = [], step.get("buckets", [])
    if buckets:
        replays = sum(bucket["replays"] for bucket in buckets)
        kinds = "; ".join(f"{bucket['inputs']}: {bucket['replays']}" for bucket in buckets[:_REASONS])
        more = f"; and {len(buckets) - _REASONS} more graphs" if len(buckets) > _REASONS else ""
        graphs = f"{len(buckets)} graph{'' if len(buckets) == 1 else 's'}"
        lines.append(f"UNet calls captured: {graphs}, {replays} replays ({kinds}{more})")
    apart = {"prologues": "keys and values of the prompt", "tables": "time embeddings", "sums": "summed weights"}
    lines += [f"{what}: computed apart for these, {step[key]} replays" for key, what in apart.items() if step.get(key)]
    uncaptured = sorted(step.get("uncaptured", []), key=lambda row: -row["calls"])
    return lines + [f"UNet calls not captured: {row['calls']} ({row['reason']})" for row in uncaptured]


def module_lines(modules: dict[str, Any]) -> list[str]:
    """Fused modules, layers that share a product, and modules that stayed as they were, by reason."""
    counts = ", ".join(f"{count} {kind}" for kind, count in modules.get("fused", {}).items())
    lines = [f"fused: {counts}"] if counts else []
    if modules.get("shared"):
        products = "; ".join(f"{row['layers']} layers ({row['what']})" for row in modules["shared"])
        lines.append(f"shared products: {products}")
    return lines + [f"not fused: {what}: {number}" for what, number in kept_modules(modules).items()]


def kept_modules(modules: dict[str, Any]) -> dict[str, int]:
    """Modules that could have been fused and were not: how many, by their kind with the reason in brackets."""
    counts: dict[str, int] = {}
    for row in modules.get("kept", []):
        what = f"{row['kind']} ({'; '.join(row['reasons'])})"
        counts[what] = counts.get(what, 0) + 1
    return counts


def decode_lines(decode: dict[str, Any] | None) -> list[str]:
    """How often a VAE that was asked to decode in float16 did so, and how often and why it went stock's way."""
    if decode is None:
        return []
    if decode["reasons"]:
        return [f"decodes as stock does ({'; '.join(decode['reasons'])})"]
    stock = [f"decoded as stock does: {calls} calls ({reason})" for reason, calls in decode["stock"].items()]
    return [f"decoded in float16: {decode['decodes']} calls", *stock]


def audit_lines(plan: dict[str, Any]) -> list[str]:
    """The audit in words, a line each; the handle's notes, which name silent no-ops, are last."""
    lines = [ran.words() for ran in audit(plan)]
    lines += [f"kept as they were: {layers} layers ({reason})" for reason, layers in kept(plan).items()]
    lines += step_lines(plan) + module_lines(plan.get("modules") or {})
    for row in plan.get("vae", []):
        lines += [f"VAE: {line}" for line in module_lines(row) + decode_lines(row.get("decode"))]
    return lines + [f"note: {note}" for note in plan.get("notes", [])]


def audit_data(plan: dict[str, Any]) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "ran": [dataclasses.asdict(ran) for ran in audit(plan)],
        "fallbacks": sum(ran.fallbacks for ran in audit(plan)),
        "kept": kept(plan),
        "step": plan.get("step"),
        "modules": {**modules, "kept": kept_modules(modules)} if (modules := plan.get("modules")) else None,
        "vae": [{**row, "kept": kept_modules(row)} for row in plan.get("vae", [])],
        "notes": list(plan.get("notes", [])),
    }
