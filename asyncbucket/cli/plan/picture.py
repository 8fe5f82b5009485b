"""A plan as a picture: admissions over time, and how long it would take under other limits."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from asyncbucket.cli.canvas import LIMIT, OTHER, OURS, canvas
from asyncbucket.plan.result import Plan, duration_in_words, limit_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Units of the time axis: from how many seconds on, the unit's name, and its seconds.
_UNITS: Final = ((172_800, "days", 86_400), (7_200, "hours", 3_600), (120, "minutes", 60))


def draw(plan: Plan, path: Path, *, dark: bool) -> None:
    """Draw a plan into a file; see `canvas` for the errors."""
    changes = [limit for limit in plan.limits if limit.if_doubled is not None]
    size = (8, 3.6 + 0.35 * bool(changes) * (len(changes) + 2))
    with canvas(path, what="a plan", size=size, dark=dark) as figure:
        heights = [3.0, 0.35 * (len(changes) + 2)] if changes else [1.0]
        grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _admissions(grid[0], plan)
        if changes:
            _alternatives(grid[1], plan)


def _admissions(axes: "Axes", plan: Plan) -> None:
    unit, seconds = _unit(plan.duration)
    slice_seconds = plan.duration / len(plan.timeline)
    edges = [number * slice_seconds / seconds for number in range(len(plan.timeline) + 1)]
    rates = [count / (slice_seconds or 1.0) for count in plan.timeline]
    axes.stairs(rates, edges, fill=True, color=OURS, alpha=0.85, linewidth=0)
    y_label = "admitted a second"
    binding = plan.binding
    if binding is not None and binding.rate is not None:
        label = f"{limit_in_words(binding)}: {binding.rate:,.3g}/s in the long run"
        axes.axhline(binding.rate, color=LIMIT, linewidth=1.5, label=label)
        top, peak = _top(rates, binding.rate), max(rates)
        axes.set_ylim(0, top)
        y_label += f", {peak:,.3g} the peak" if peak > top else ""
        axes.legend(loc="upper right", fontsize=8, framealpha=0.85, edgecolor="none")
    axes.set_xlim(0, edges[-1] or 1)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    _style_axes(axes, plan.summary)


def _top(rates: list[float], limit: float) -> float:
    """Return the end of the scale: waves are shown completely, a burst at the start is cut off."""
    usual = sorted(rates)[len(rates) * 98 // 100]
    return 1.3 * max(limit, min(usual, 4 * limit))


def _alternatives(axes: "Axes", plan: Plan) -> None:
    rows = [("as planned", plan.duration)]
    rows += [
        (f"twice {limit_in_words(each)}", each.if_doubled)
        for each in plan.limits
        if each.if_doubled is not None
    ]
    names, durations = zip(*reversed(rows), strict=True)
    unit, seconds = _unit(plan.duration)
    colours = [OTHER] * (len(rows) - 1) + [OURS]
    bars = axes.barh(names, [each / seconds for each in durations], color=colours, height=0.7)
    axes.bar_label(bars, [duration_in_words(each) for each in durations], padding=4, fontsize=8)
    axes.set_xlim(0, 1.2 * max(durations) / seconds or 1)
    axes.set_xlabel(unit, fontsize=8)
    _style_axes(axes, "how long it takes")


def _style_axes(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(duration: float) -> tuple[str, int]:
    return next(
        ((name, seconds) for least, name, seconds in _UNITS if duration >= least), ("seconds", 1)
    )
