"""Draw figures, once for a light page and once for a dark one; those of the comparison as bars."""

from collections.abc import Iterator, Mapping, Sequence
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


#: What the picture shows, and what each part of it is called; the tables have the rest.
SHOWN: Final = {
    "idle": "one acquire, nobody waits (µs)",
    "contended_10000": "10,000 calls at once (µs each)",
    "admission": "requests, tokens and a slot (µs)",
    "giving_up_10000": "10,000 waiting calls cancelled (ms)",
}
#: Rows that are no limiter, or that show asyncbucket a second time.
LEFT_OUT: Final = {"a bare coroutine", "bare futures", "asyncbucket, not full"}
_SCALES: Final = {"ns": 1e-3, "s CPU": 1e3}


def plot(figures: Sequence[Figure], folder: Path) -> None:
    """Write ``results-light.svg`` and ``results-dark.svg``: bars of medians, the shortest first."""
    shown = [figure for figure in figures if figure.key in SHOWN]
    for canvas, ink in pages(folder / "results", 8, 4.2):
        grid = canvas.subplots(2, 2, squeeze=False)
        for axes, figure in zip(grid.flat, shown, strict=False):
            _bars(axes, figure, ink)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        canvas.suptitle("What a call costs: the shorter, the better", fontsize=10)


def _bars(axes: Axes, figure: Figure, ink: str) -> None:
    rows = sorted(figure.rows, key=lambda row: row.median, reverse=True)
    scale = _SCALES.get(figure.unit, 1)
    medians = {row.name: row.median * scale for row in rows if row.name not in LEFT_OUT}
    labelled_bars(axes, medians, ink, "{:,.3g}")
    axes.set_title(SHOWN[figure.key], loc="left", fontsize=9)


def labelled_bars(axes: Axes, lengths: Mapping[str, float], ink: str, form: str) -> None:
    """Draw a bar for each name, from below, with its figure beside it instead of an axis."""
    colours = [OURS if name.startswith("asyncbucket") else THEIRS for name in lengths]
    bars = axes.barh(list(lengths), list(lengths.values()), color=colours)
    labels = [form.format(length) for length in lengths.values()]
    axes.bar_label(bars, labels, padding=3, fontsize=8, color=ink)
    axes.margins(x=0.2)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(labelsize=8, length=0)
