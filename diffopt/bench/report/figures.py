"""Drawing with matplotlib: one figure as PNG in a light and a dark theme, and as SVG whose colours are the page's own.

matplotlib is imported when a figure is drawn (the extra "report"), without its global state.
"""

import dataclasses
import html
import io
import re
from collections.abc import Callable
from typing import Any

from PIL import Image

from diffopt.bench.report.extras import require

_DPI = 160
_PURPOSE = "a plot"


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a figure: `ours` and `stock` are told apart in grey too, `worse` is for what lost or failed."""

    background: str
    ink: str
    muted: str
    grid: str
    stock: str
    ours: str
    worse: str
    third: str
    fourth: str


LIGHT = Theme("#ffffff", "#1b1f24", "#59636e", "#d8dee4", "#8c959f", "#0b5cad", "#b3400f", "#2f8f5b", "#8250b5")
DARK = Theme("#12161c", "#e6edf3", "#9aa4af", "#2f3842", "#8b949e", "#6cb6ff", "#f0883e", "#57c98a", "#c09bf0")
_NAMES = tuple(field.name for field in dataclasses.fields(Theme))
_PAGE = Theme(*(f"#0{number}a{number}c{number}" for number in range(1, len(_NAMES) + 1)))
"""Colours that stand for the page's custom properties in an SVG."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: of its files. title, caption: in words, for the page; the title is also what a screen reader says.
        size: width and height in inches.
        draw: onto a matplotlib figure with a theme.
    """

    name: str
    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Any, Theme], None]


def png(plot: Plot, theme: Theme) -> bytes:
    """The figure as a PNG file.

    Raises:
        MissingExtraError: no matplotlib.
    """
    return _saved(plot, theme, "png")


def svg(plot: Plot) -> str:
    """The figure as an <svg> element whose text is text, and whose colours are the custom properties `--plot-...`.

    Raises:
        MissingExtraError: no matplotlib.
    """
    text = _saved(plot, _PAGE, "svg").decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name, colour in zip(_NAMES, dataclasses.astuple(_PAGE), strict=True):
        text = text.replace(colour, f"var(--plot-{name})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(plot.title)}"', 1).strip()


def _saved(plot: Plot, theme: Theme, form: str) -> bytes:
    matplotlib = require("matplotlib", _PURPOSE)
    figures = require("matplotlib.figure", _PURPOSE)
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.name,
        "font.size": 10,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.background,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
    }
    target = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = figures.Figure(figsize=plot.size, facecolor=theme.background, layout="constrained")
        plot.draw(figure, theme)
        metadata = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
        figure.savefig(target, format=form, dpi=_DPI, metadata=metadata)
    return target.getvalue() if form != "png" else _with_palette(target)


def _with_palette(png: io.BytesIO) -> bytes:
    """The picture in 256 colours, which is more than a plot has: a third of the bytes."""
    small = io.BytesIO()
    Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()
