"""A trace as a picture: how full each limit's window was, who waited, and when it was paused."""

import bisect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncbucket.cli.canvas import LIMIT, LINE, OURS, PAUSE, canvas
from asyncbucket.cli.trace.history import History
from asyncbucket.core.wording import counted, named, written_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(history: History, path: Path, *, dark: bool) -> None:
    """Draw a story into a file; see `canvas` for the errors."""
    rows = len(history.limits) + 1
    with canvas(path, what="a trace", size=(8, 1.2 + 1.7 * rows), dark=dark) as figure:
        paused = "; paused where it is red" if history.pauses else ""
        title = f"{history.limiter}: {counted(len(history.admitted), 'admissions')}{paused}"
        figure.suptitle(title, fontsize=11)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axis, limit in zip(axes, history.limits, strict=False):
            _window(axis, history, limit)
        _queue(axes[-1], history)
        for axis in axes:
            _style_axis(axis, history)
        axes[-1].set_xlabel("seconds")


def _window(axis: "Axes", history: History, limit: Mapping[str, Any]) -> None:
    """Draw how many units are in the window that ends at each instant."""
    resource, amount, per = limit["resource"], limit["amount"], limit["per"]
    instants = [at for at, cost in history.admitted if cost.get(resource)]
    units = [cost[resource] for _, cost in history.admitted if cost.get(resource)]
    sums = [0, *itertools.accumulate(units)]
    marks = sorted({*instants, *(at + per for at in instants if at + per <= history.seconds)})
    held = [
        sums[bisect.bisect_right(instants, at)] - sums[bisect.bisect_right(instants, at - per)]
        for at in marks
    ]
    curve = [*marks, history.seconds], [*held, held[-1] if held else 0]
    axis.step(*curve, where="post", color=OURS)
    axis.fill_between(*curve, step="post", color=OURS, alpha=0.25)
    axis.axhline(amount, color=LIMIT, linestyle="--", linewidth=1)
    axis.set_ylim(0, amount * 1.12)
    axis.set_ylabel(named(resource))
    name = f"in the last {written_out(per)} s; limit {amount:,}"
    axis.set_title(name, loc="left", fontsize=9)


def _queue(axis: "Axes", history: History) -> None:
    """Draw how many waited."""
    axis.step(*zip(*history.waiting, strict=True), where="post", color=LINE)
    axis.set_ylim(0, 1.12 * max(1, *(waiting for _, waiting in history.waiting)))
    axis.set_ylabel("calls")
    axis.set_title("waiting", loc="left", fontsize=9)


def _style_axis(axis: "Axes", history: History) -> None:
    axis.set_xlim(0, history.seconds)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)
    axis.locator_params(axis="y", integer=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for begin, end in history.pauses:
        axis.axvspan(begin, end, color=PAUSE, alpha=0.18, linewidth=0)
