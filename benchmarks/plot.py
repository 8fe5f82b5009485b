"""Draw the figures as bars, once for a light page and once for a dark one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from benchmarks.harness import Figure

_OURS = "#1f77b4"
_THEIRS = "#9aa0a6"
_COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_INK = {"light": "#202124", "dark": "#e8eaed"}


def plot(figures: Sequence[Figure], folder: Path) -> None:
    """Write ``results-light.svg`` and ``results-dark.svg``; whiskers span all rounds."""
    for theme, ink in _INK.items():
        style: dict[Any, Any] = dict.fromkeys(_COLOURED, ink) | {"svg.hashsalt": "asyncbucket"}
        with mpl.rc_context(style):
            heights = [len(figure.rows) + 1.5 for figure in figures]
            canvas = Canvas(figsize=(8, 0.32 * sum(heights)), layout="constrained")
            grid = canvas.subplots(len(figures), 1, squeeze=False, height_ratios=heights)
            for axes, figure in zip(grid[:, 0], figures, strict=True):
                _bars(axes, figure, ink)
            canvas.savefig(
                folder / f"results-{theme}.svg", transparent=True, metadata={"Date": None}
            )


def _bars(axes: Axes, figure: Figure, ink: str) -> None:
    rows = figure.rows[::-1]
    names = [row.name for row in rows]
    medians = [row.median for row in rows]
    spread = [[row.median - row.low for row in rows], [row.high - row.median for row in rows]]
    colours = [_OURS if name.startswith("asyncbucket") else _THEIRS for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, ecolor=ink, error_kw={"lw": 0.8})
    if max(medians) > 20 * min(medians):
        axes.set_xscale("log")
    axes.set_title(f"{figure.title} ({figure.unit})", loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")
