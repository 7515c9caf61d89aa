"""Free-running pictures in words and as plain data, for the certificate and for reports."""

import math
from typing import Any

from diffopt.bench.step.free_running_record import Distribution, FreeRunning, PictureDifferences

ORDER = "median / worst 5% / worst"
"""Of the three numbers of a distribution."""


def difference_rows(found: FreeRunning) -> list[tuple[str, str, str, str, str]]:
    """Of ours and, where there is one, of stock against another stock backend: what, PSNR, SSIM, maximum, identical."""
    rows = []
    for pair in filter(None, (found.ours, found.stock)):
        each = pair.distributions()
        ssim = "not measured" if each["ssim"] is None else _three(each["ssim"], "{:.4f}")
        psnr, largest = _three(each["psnr_db"], "{:.1f}"), _three(each["max_difference"], "{:.0f}")
        rows.append((f"{pair.right} against {pair.left}", psnr, ssim, largest, f"{pair.identical} of {found.prompts}"))
    return rows


def free_running_lines(found: FreeRunning | None) -> list[str]:
    """A line for ours and one for stock's; none where no pictures were compared."""
    if found is None:
        return []
    lines = [
        f"{name}: PSNR {psnr} dB, SSIM {ssim}, largest difference {largest} of 255, {identical} bit for bit the same"
        for name, psnr, ssim, largest, identical in difference_rows(found)
    ]
    return [f"{found.prompts} pictures of {found.steps} steps, {ORDER}", *lines]


def free_running_data(found: FreeRunning | None) -> dict[str, Any] | None:
    """As JSON-able data; an infinite PSNR (the same picture) is None."""
    if found is None:
        return None
    return {
        "prompts": found.prompts,
        "steps": found.steps,
        "ours": _pair(found.ours),
        "stock": found.stock and _pair(found.stock),
        "nonfinite_ours": found.nonfinite_ours,
        "nonfinite_stock": found.nonfinite_stock,
        "words": free_running_lines(found),
    }


def _pair(pair: PictureDifferences) -> dict[str, Any]:
    return {"identical": pair.identical, **_finite(pair.distributions())}


def _finite(distributions: dict[str, Distribution | None]) -> dict[str, dict[str, float | None] | None]:
    return {
        what: values and {name: None if math.isinf(x) else x for name, x in values._asdict().items()}
        for what, values in distributions.items()
    }


def _three(values: Distribution | None, form: str) -> str:
    return "" if values is None else " / ".join("∞" if math.isinf(x) else form.format(x) for x in values)
