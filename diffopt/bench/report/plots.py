"""The plots of a report: what is drawn from which records. A plot without data isn't made."""

import functools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from diffopt.bench.record import AnyRecord
from diffopt.bench.report.data import report_data, steps_case_by_case
from diffopt.bench.report.figures import Plot, Theme
from diffopt.bench.report.rows import Row, rows_of
from diffopt.bench.report.scaling import Series, scaling
from diffopt.bench.step.record import StepRecord
from diffopt.bench.workloads import scaling_cases

Content = TypeVar("Content")

_WIDTH = 8.6
_ROW = 0.42
_TITLE = 28
"""Letters in a line above a panel."""
_FAR_APART = 15
"""From this ratio on, rates are drawn on a logarithmic axis: beside those of a GPU all of a CPU were a dot."""
_MARKERS = ("o", "s", "^", "D", "v")
_RATIOS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
_UNITS = {"pixels": "megapixels", "batch": "pictures per call", "steps": "denoising steps"}


def plots_of(records: Iterable[AnyRecord]) -> list[Plot]:
    """Every plot that these records hold data for."""
    records = list(records)
    headline = _headline(records)
    rows = rows_of(headline)
    makers: list[Plot | None] = [
        _speed([row for row in rows if row.optimized_its is not None]),
        _gain([row for row in rows if row.gain is not None]),
        _exactness(steps_case_by_case(headline)),
        _stages(headline),
        _scaling(scaling(records)),
        _attention(records),
    ]
    return [plot for plot in makers if plot is not None]


def _headline(records: Sequence[AnyRecord]) -> Sequence[AnyRecord]:
    """Without the cases of `bench full` that only the plot of scaling needs, unless there are no others."""
    left_out = {("full", case) for case in scaling_cases()}
    steps = [record for record in records if isinstance(record, StepRecord)]
    return [record for record in steps if (record.workload.name, record.workload.case) not in left_out] or records


def _label(row: Row) -> str:
    return f"{row.case}\n{row.machine}, {row.dtype}"


def _height(rows: int, row: float = _ROW, least: float = 1.2) -> float:
    return least + row * rows


def _labelled(axes: Any, labels: Sequence[str]) -> None:
    """One line per label, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _speed(rows: Sequence[Row]) -> Plot | None:
    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        for number, row in enumerate(rows):
            axes.plot([row.stock_its, row.optimized_its], [number] * 2, color=theme.grid, linewidth=4, zorder=1)
            words = f"{row.stock_its:.1f} → {row.optimized_its:.1f}"
            right = max(row.stock_its or 0, row.optimized_its or 0)
            place = {"textcoords": "offset points", "xytext": (12, 0), "va": "center"}
            axes.annotate(words, (right, number), fontsize=9, color=theme.ink, **place)
        lines = range(len(rows))
        stock, ours = [row.stock_its for row in rows], [row.optimized_its for row in rows]
        axes.scatter(stock, lines, s=64, color=theme.stock, marker="D", label="stock", zorder=2)
        axes.scatter(ours, lines, s=80, color=theme.ours, marker="o", label="diffopt", zorder=3)
        _labelled(axes, [_label(row) for row in rows])
        rates = [rate for row in rows for rate in (row.stock_its, row.optimized_its) if rate]
        far_apart = max(rates) > _FAR_APART * min(rates)
        if far_apart:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(*((0.6 * min(rates), 6 * max(rates)) if far_apart else (0, 1.4 * max(rates))))
        scale = ", logarithmic" if far_apart else ""
        axes.set_xlabel(f"denoising iterations per second, more is better{scale}")
        figure.legend(loc="outside upper right", ncols=2)

    caption = (
        "Median of whole denoising loops, stock and diffopt measured in turn. Only what passed its exactness check."
    )
    return Plot("speed", "Iterations per second", caption, (_WIDTH, _height(len(rows))), draw) if rows else None


def _gain(rows: Sequence[Row]) -> Plot | None:
    labels = [_label(row) for row in rows]
    values = [(row.gain or 0.0, row.gain_low or 0.0, row.gain_high or 0.0, row.claimed) for row in rows]
    caption = (
        "Stock's time over diffopt's with its 95% interval, over interleaved pairs of loops. A filled dot is a claim: "
        "exact, and the whole interval above 1. A hollow dot is none."
    )
    draw = functools.partial(_forest, labels=labels, values=values, axis="times as fast as stock, more is better")
    return Plot("gain", "Gain and what is certain of it", caption, (_WIDTH, _height(len(rows))), draw) if rows else None


def _forest(
    figure: Any,
    theme: Theme,
    *,
    labels: Sequence[str],
    values: Sequence[tuple[float, float, float, bool]],
    axis: str,
) -> None:
    """A ratio with its interval per line, and a line at 1."""
    axes = figure.subplots()
    axes.axvline(1.0, color=theme.muted, linewidth=1.2, linestyle="--")
    for number, (ratio, low, high, filled) in enumerate(values):
        colour = theme.worse if high < 1 else theme.ours if filled else theme.muted
        axes.plot([low, high], [number] * 2, color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.scatter(
            [ratio], [number], s=64, zorder=3, facecolor=colour if filled else theme.background, edgecolor=colour
        )
        place = {"textcoords": "offset points", "xytext": (8, 0), "va": "center"}
        axes.annotate(f"{ratio:.3f}", (high, number), fontsize=9, color=theme.ink, **place)
    _labelled(axes, labels)
    least, most = min(1.0, *(low for _, low, _, _ in values)), max(1.0, *(high for _, _, high, _ in values))
    margin = max(0.02, most - least)
    axes.set_xlim(least - 0.08 * margin, most + 0.18 * margin)
    axes.set_xlabel(axis)


def _exactness(records: Sequence[StepRecord]) -> Plot | None:
    records = [record for record in records if record.exactness.steps]
    columns = min(3 if len(records) > 4 else 2, len(records))

    def draw(figure: Any, theme: Theme) -> None:
        for record, axes in _panels(figure, records, columns):
            certificate = record.exactness
            steps = [step.step for step in certificate.steps]
            stock = [max(step.stock.values()) for step in certificate.steps]
            look = {"markersize": 4.5, "linestyle": "none"}
            fault = [step.fault for step in certificate.steps]
            axes.plot(steps, fault, color=theme.worse, marker="x", label="planted fault", **look)
            allowed = [step.allowed for step in certificate.steps]
            axes.plot(steps, allowed, color=theme.muted, linestyle="--", label="allowed")
            hollow = {"markersize": 8, "markerfacecolor": "none", "linestyle": "none"}  # to be seen around ours
            axes.plot(steps, stock, color=theme.stock, marker="D", label="stock, largest", **hollow)
            ours = [step.ours for step in certificate.steps]
            axes.plot(steps, ours, color=theme.ours, marker="o", markersize=4.5, label="diffopt")
            axes.set_yscale("log")
            machine = record.environment.machine.name
            _title(axes, record.workload.case, f"{machine}, {record.workload.dtype}")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("UNet call")
            axes.set_ylabel(f"distance to {certificate.reference_dtype}", fontsize=9)

    caption = (
        "Relative L2 distance of the UNet's output to a reference of higher precision, on stock's own latents at every "
        "step that was checked. diffopt must stay below the dashed line, and the planted fault (a softmax scale wrong "
        "by 1%) must be above it at one step or more, or the check is void."
    )
    size = (_WIDTH, 0.7 + 2.9 * -(-len(records) // max(1, columns)))
    return Plot("exactness", "Exactness, step by step", caption, size, draw) if records else None


def _stages(records: Sequence[AnyRecord]) -> Plot | None:
    bars: list[tuple[str, dict[str, float], float]] = []
    machines = report_data(records)["gpus"]
    for record in steps_case_by_case(records):
        machine, case = record.environment.machine.name, record.workload.case
        stages = machines[machine]["step"][case]["stages"]
        for side, name in ((stages["stock"], "stock"), (stages["optimized"], "diffopt")):
            if stages["stock"] and side:
                bars.append((f"{case}, {name}\n{machine}", side, stages["stock"]["whole"]))

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        left = [0.0] * len(bars)
        colours = {"text encoder": theme.fourth, "unet": theme.ours, "vae": theme.third, "other": theme.stock}
        for stage, colour in colours.items():
            widths = [(side[stage.replace(" ", "_")] or 0.0) / whole for _, side, whole in bars]
            axes.barh(range(len(bars)), widths, left=left, height=0.62, color=colour, label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for number, (end, (_, side, _)) in enumerate(zip(left, bars, strict=True)):
            place = {"textcoords": "offset points", "xytext": (6, 0), "va": "center"}
            axes.annotate(f"{side['whole']:.2f} s", (end, number), fontsize=9, color=theme.ink, **place)
        _labelled(axes, [label for label, _, _ in bars])
        axes.set_xlim(0, 1.12 * max(1.0, *left))
        axes.set_xlabel("of stock's time, less is better")
        figure.legend(loc="outside upper right", ncols=4)

    caption = "Median time of one call from prompt to pixels in host memory, by stage. PNG encoding is not part of it."
    return Plot("stages", "Where the time goes", caption, (_WIDTH, _height(len(bars))), draw) if bars else None


def _scaling(found: Sequence[Series]) -> Plot | None:
    columns = min(3, len(found))
    lines = -(-len(found) // 3)

    def draw(figure: Any, theme: Theme) -> None:
        for series, axes in _panels(figure, found, columns):
            values, stock, ours = zip(*series.points, strict=True)
            where = [value / 1e6 for value in values] if series.axis == "pixels" else list(values)
            axes.plot(where, stock, color=theme.stock, linestyle="--", marker="D", markersize=5, label="stock")
            axes.plot(where, ours, color=theme.ours, marker="o", markersize=6, label="diffopt")
            _title(axes, series.model, series.fixed, series.machine)
            axes.set_xlabel(_UNITS[series.axis])
            axes.set_ylabel(f"seconds per picture\n({series.what})", fontsize=9)
            if series.axis != "pixels":
                axes.set_xticks(where)
            axes.set_ylim(0, 1.1 * max(*stock, *ours))
            axes.set_xlim(0, 1.1 * where[-1])

    caption = "Median time per picture as one thing grows and all else stays equal; only series of two points or more."
    size = (max(5.4, _WIDTH * columns / 3 + 0.4), 0.6 + 3.1 * lines)
    return Plot("scaling", "Cost of scaling", caption, size, draw) if found else None


def _title(axes: Any, *lines: str) -> None:
    """Over a panel, no wider than one of three: names of long cases ran into the next panel's."""
    axes.set_title("\n".join(textwrap.fill(line, _TITLE) for line in lines), fontsize=8.5)


def _panels(figure: Any, contents: Sequence[Content], columns: int) -> Iterator[tuple[Content, Any]]:
    """Each content with axes of its own, row by row; their legend, which they share, above all of them."""
    grid = figure.subplots(-(-len(contents) // columns), columns, squeeze=False).flat
    for axes in grid[len(contents) :]:
        axes.set_visible(False)
    yield from zip(contents, grid, strict=False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)


def _attention(records: Sequence[AnyRecord]) -> Plot | None:
    """A line per shape, with a mark for each machine."""
    ratios: dict[str, dict[str, tuple[float, float, float]]] = {}
    for machine, gpu in report_data(records)["gpus"].items():
        for name, shape in (gpu["attention"] or {"shapes": {}})["shapes"].items():
            if shape["ratio"] is not None:
                ratios.setdefault(name, {})[machine] = (shape["ratio"], *shape["ratio_interval"])
    machines = list(dict.fromkeys(machine for found in ratios.values() for machine in found))

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        axes.axvline(1.0, color=theme.muted, linewidth=1.2, linestyle="--")
        beside = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right", "fontsize": 9}
        for i, machine in enumerate(machines):
            marker, column = _MARKERS[i % len(_MARKERS)], 1.0 + 0.085 * (i + 1)
            axes.scatter([], [], s=48, marker=marker, color=theme.ours, label=machine)
            for number, found in enumerate(ratios.values()):
                if machine not in found:
                    continue
                ratio, low, high = found[machine]
                line = number + (list(found).index(machine) - (len(found) - 1) / 2) * 0.34
                colour = theme.worse if low > 1 else theme.ours if high < 1 else theme.muted
                axes.plot([low, high], [line] * 2, color=colour, linewidth=2.2, solid_capstyle="butt")
                face = colour if high < 1 else theme.background
                axes.scatter([ratio], [line], s=42, marker=marker, zorder=3, facecolor=face, edgecolor=colour)
                axes.text(column, number, f"{ratio:.2f}", color=theme.worse if low > 1 else theme.ink, **beside)
        _labelled(axes, list(ratios))
        axes.set_xscale("log")
        axes.set_xticks(_RATIOS, [f"{ratio:g}" for ratio in _RATIOS])
        axes.set_xticks([], minor=True)
        every = [1.0, *(value for found in ratios.values() for values in found.values() for value in values)]
        axes.set_xlim(0.93 * min(every), 1.08 * max(every))
        axes.set_xlabel("time over the best peer's, less is better, logarithmic")
        figure.legend(loc="outside upper right", ncols=len(machines))

    caption = (
        "diffopt's kernel against the best exact peer of each shape: its time over the peer's, with a 95% interval, "
        "inputs hot; the numbers are in the legend's order. Below 1 diffopt is faster; a filled mark is wholly below 1."
    )
    size = (_WIDTH, _height(len(ratios), row=0.2 + 0.1 * len(machines)))
    return Plot("attention", "Attention alone", caption, size, draw) if ratios else None
