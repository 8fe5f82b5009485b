"""Draw figures, once for a light page and once for a dark one; those of the comparison as bars."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from benchmarks.harness import Figure

OURS: Final = "#1f77b4"
THEIRS: Final = "#9aa0a6"
_COLOURED: Final = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_INK: Final = {"light": "#202124", "dark": "#e8eaed"}
_STYLE: Final = {
    "svg.hashsalt": "asyncbucket",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def pages(path: Path, width: float, height: float) -> Iterator[tuple[Canvas, str]]:
    """Yield a canvas and its ink for each page; what was drawn is ``path-light.svg``, ``path-dark.svg``."""
    for theme, ink in _INK.items():
        style: dict[Any, Any] = dict.fromkeys(_COLOURED, ink) | _STYLE
        with mpl.rc_context(style):
            canvas = Canvas(figsize=(width, height), layout="constrained")
            yield canvas, ink
            file = path.with_name(f"{path.name}-{theme}.svg")
            canvas.savefig(file, transparent=True, metadata={"Date": None})


def plot(figures: Sequence[Figure], folder: Path) -> None:
    """Write ``results-light.svg`` and ``results-dark.svg``; whiskers span all rounds."""
    heights = [len(figure.rows) + 1.5 for figure in figures]
    for canvas, ink in pages(folder / "results", 8, 0.32 * sum(heights)):
        grid = canvas.subplots(len(figures), 1, squeeze=False, height_ratios=heights)
        for axes, figure in zip(grid[:, 0], figures, strict=True):
            _bars(axes, figure, ink)


def _bars(axes: Axes, figure: Figure, ink: str) -> None:
    rows = figure.rows[::-1]
    names = [row.name for row in rows]
    medians = [row.median for row in rows]
    spread = [[row.median - row.low for row in rows], [row.high - row.median for row in rows]]
    colours = [OURS if name.startswith("asyncbucket") else THEIRS for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, ecolor=ink, error_kw={"lw": 0.8})
    title = f"{figure.title} ({figure.unit})"
    if max(medians) > 20 * min(medians):
        axes.set_xscale("log")
        title += "; the axis is logarithmic"
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
