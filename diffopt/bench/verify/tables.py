"""A certificate for a terminal, and as JSON."""

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from diffopt.bench.step.free_running_record import FreeRunning
from diffopt.bench.step.free_running_words import ORDER, difference_rows
from diffopt.bench.verify.record import LayerErrors, Verification

DASH = "—"


def verification_json(found: Verification) -> str:
    """The certificate with its verdict in front; infinities as strings."""
    verdict = {name: getattr(found, name) for name in ("passed", "void", "bitwise_stock", "nonfinite")}
    whole = {**verdict, "verdict": found.verdict(), **json.loads(found.model_dump_json())}
    return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)


def verification_parts(found: Verification) -> list[RenderableType]:
    """What a terminal shows, from top to bottom; the verdict is last."""
    machine, work = found.environment.machine, found
    head = (
        f"{work.model.name} (hash {work.model.hash[:10]}), {work.width}×{work.height}, {work.steps} steps of "
        f"{work.scheduler}, guidance {work.guidance:g}, {work.dtype}, attention {work.attention}\non {machine.name}"
    )
    bitwise = "yes, at every step and in every picture" if found.bitwise_stock else _not_bitwise(found)
    tail = [f"bitwise stock: {bitwise}", f"NaN or infinite values: {found.nonfinite}", *found.notes]
    return [
        Text(head),
        _layers(found.layers),
        _steps(found),
        _pictures(found.free_running),
        Text("\n".join([*tail, f"{found.seconds:.0f} s; certificate {found.id}", found.verdict()])),
    ]


def _not_bitwise(found: Verification) -> str:
    pictures = found.free_running
    steps = "yes" if found.exactness.bitwise_stock else "no"
    return f"steps {steps}, pictures {pictures.ours.identical} of {pictures.prompts}"


def _table(title: str, *headings: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right", no_wrap=True)
    return table


def _layers(layers: Sequence[LayerErrors]) -> Table:
    numbers = ("layers", "ours", "PyTorch math", "PyTorch fused", "allowed", "scale × 1.01", "of limit")
    title = "Layer shapes: relative L2 error against float64, for flat and for peaked scores"
    table = _table(title, "shape", "ran", *numbers, left=2)
    for layer in layers:
        rules = layer.rules
        fault = next((rule.fault for rule in rules if rule.fault), None)
        table.add_row(
            layer.shape,
            layer.backend,
            str(layer.layers),
            _pair(layer.errors[rule.content].relative_l2 for rule in rules),
            _pair(rule.math.relative_l2 for rule in rules),
            _pair(rule.fused.relative_l2 if rule.fused else None for rule in rules),
            _pair(rule.limit.relative_l2 for rule in rules),
            "void" if layer.void else f"{_number(fault.relative_l2)} caught" if fault else DASH,
            f"{layer.share:.2f} {'ok' if layer.right else 'FAILED'}",
        )
    return table


def _steps(found: Verification) -> Table:
    certificate = found.exactness
    backends = sorted({name for step in certificate.steps for name in step.stock})
    title = f"Steps: distance of the UNet's output to {certificate.reference_dtype}, on stock's own latents"
    stock_names = (f"stock {name}" for name in backends)
    table = _table(title, "step", "timestep", "ours", *stock_names, "allowed", "scale × 1.01")
    for step in certificate.steps:
        stock = (_number(step.stock.get(name)) for name in backends)
        fault = f"{_number(step.fault)}{' caught' if step.fault_caught else ' not caught'}"
        table.add_row(str(step.step), f"{step.timestep:g}", _number(step.ours), *stock, _number(step.allowed), fault)
    return table


def _pictures(found: FreeRunning) -> Table:
    table = _table(
        f"{found.prompts} pictures of {found.steps} steps, each {ORDER}",
        *("compared", "PSNR dB", "SSIM", "largest difference of 255", "the same, bit for bit"),
    )
    for name, *numbers in difference_rows(found):
        table.add_row(name, *numbers)
    return table


def _pair(values: Any) -> str:
    return ", ".join(_number(value) for value in values)


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.1e}"
