"""A trace as a picture: how full each limit's window was, who waited, and when it was paused."""

import bisect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.cli.trace.story import Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS: Final = (".png", ".svg", ".pdf")
_OURS: Final = "#1f9d55"
_LINE: Final = "#3b7dd8"
_LIMIT: Final = "#d98c00"
_PAUSE: Final = "#d9534f"
_PAPER: Final = {False: "#ffffff", True: "#17191c"}
_INK: Final = {False: "#202124", True: "#e8eaed"}
_COLOURED: Final = (
    "text.color",
    "axes.labelcolor",
    "axes.edgecolor",
    "axes.titlecolor",
    "xtick.color",
    "ytick.color",
)


def draw(story: Story, path: Path, *, dark: bool) -> None:
    """Draw a story into a file, whose name says of which kind it is.

    Raises:
        ValueError: it is of no such kind.
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in _KINDS:
        raise ValueError(f"a picture is one of {', '.join(_KINDS)}, not {path.name!r}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            f'drawing a trace needs {error.name}: pip install "asyncbucket[plot]"'
        ) from error
    style: dict[Any, Any] = {
        **dict.fromkeys(_COLOURED, _INK[dark]),
        "legend.facecolor": _PAPER[dark],
        "svg.hashsalt": "asyncbucket",
    }
    with mpl.rc_context(style):
        rows = len(story.limits) + 1
        figure = Figure(figsize=(8, 1.2 + 1.7 * rows), dpi=150)
        figure.set_layout_engine("constrained")
        figure.set_facecolor(_PAPER[dark])
        paused = "; paused where it is red" if story.pauses else ""
        title = f"{story.limiter}: {len(story.admitted):,} admissions{paused}"
        figure.suptitle(title, fontsize=11)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axis, limit in zip(axes, story.limits, strict=False):
            _window(axis, story, limit)
        _queue(axes[-1], story)
        for axis in axes:
            _dress(axis, story, paper=_PAPER[dark])
        axes[-1].set_xlabel("seconds")
        figure.savefig(path, facecolor=_PAPER[dark])


def _window(axis: "Axes", story: Story, limit: Mapping[str, Any]) -> None:
    """Draw how many units the window that ends at each instant holds."""
    resource, amount, per = limit["resource"], limit["amount"], limit["per"]
    instants = [at for at, cost in story.admitted if cost.get(resource)]
    units = [cost[resource] for _, cost in story.admitted if cost.get(resource)]
    sums = [0, *itertools.accumulate(units)]
    marks = sorted({*instants, *(at + per for at in instants if at + per <= story.seconds)})
    held = [
        sums[bisect.bisect_right(instants, at)] - sums[bisect.bisect_right(instants, at - per)]
        for at in marks
    ]
    axis.step([*marks, story.seconds], [*held, held[-1] if held else 0], where="post", color=_OURS)
    axis.fill_between(
        [*marks, story.seconds],
        [*held, held[-1] if held else 0],
        step="post",
        color=_OURS,
        alpha=0.25,
    )
    axis.axhline(amount, color=_LIMIT, linestyle="--", linewidth=1)
    axis.set_ylim(0, amount * 1.12)
    axis.set_ylabel(resource.replace("_", " "))
    name = f"in the last {per:g} s; limit {amount:,}"
    axis.set_title(name, loc="left", fontsize=9)


def _queue(axis: "Axes", story: Story) -> None:
    """Draw how many waited."""
    axis.step(*zip(*story.waiting, strict=True), where="post", color=_LINE)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("calls")
    axis.set_title("waiting", loc="left", fontsize=9)


def _dress(axis: "Axes", story: Story, *, paper: str) -> None:
    axis.set_facecolor(paper)
    axis.set_xlim(0, story.seconds)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for begin, end in story.pauses:
        axis.axvspan(begin, end, color=_PAUSE, alpha=0.18, linewidth=0)
