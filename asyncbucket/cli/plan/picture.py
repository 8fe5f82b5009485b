"""A plan as a picture: admissions over time, and how long it would take under other limits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.plan.result import Plan, spoken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS: Final = (".png", ".svg", ".pdf")
_OURS: Final = "#1f9d55"
_OTHER: Final = "#9aa0a6"
_LIMIT: Final = "#d98c00"
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
#: Units of the axis of time: from so many seconds on, what it is called, and its seconds.
_UNITS: Final = ((172_800, "days", 86_400), (7_200, "hours", 3_600), (120, "minutes", 60))


def draw(plan: Plan, path: Path, *, dark: bool) -> None:
    """Draw a plan into a file, whose name says of which kind it is.

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
            f'drawing a plan needs {error.name}: pip install "asyncbucket[plot]"'
        ) from error
    style: dict[Any, Any] = {
        **dict.fromkeys(_COLOURED, _INK[dark]),
        "legend.facecolor": _PAPER[dark],
        "svg.hashsalt": "asyncbucket",
    }
    changes = [each for each in plan.limits if each.if_doubled is not None]
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 3.6 + 0.35 * bool(changes) * (len(changes) + 2)), dpi=150)
        figure.set_layout_engine("constrained")
        figure.set_facecolor(_PAPER[dark])
        heights = [3.0, 0.35 * (len(changes) + 2)] if changes else [1.0]
        grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _admissions(grid[0], plan)
        if changes:
            _others(grid[1], plan)
        figure.savefig(path, metadata=None if path.suffix.lower() == ".pdf" else {"Date": None})


def _admissions(axes: "Axes", plan: Plan) -> None:
    unit, seconds = _unit(plan.duration)
    part = plan.duration / len(plan.timeline)
    edges = [number * part / seconds for number in range(len(plan.timeline) + 1)]
    rates = [count / (part or 1.0) for count in plan.timeline]
    axes.stairs(rates, edges, fill=True, color=_OURS, alpha=0.85, linewidth=0)
    binding = plan.binding
    if binding is not None and binding.rate is not None:
        said = f"{binding.limit}: {binding.rate:,.3g}/s in the long run"
        axes.axhline(binding.rate, color=_LIMIT, linewidth=1.5, label=said)
        axes.set_ylim(0, _top(rates, binding.rate))
        axes.legend(loc="upper right", fontsize=8, framealpha=0.85, edgecolor="none")
    axes.set_xlim(0, edges[-1] or 1)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_ylabel("admitted a second", fontsize=8)
    _plain(axes, plan.summary)


def _top(rates: list[float], limit: float) -> float:
    """Return the end of the scale: waves are seen whole, a burst at the start is cut."""
    usual = sorted(rates)[len(rates) * 98 // 100]
    return 1.3 * max(limit, min(usual, 4 * limit))


def _others(axes: "Axes", plan: Plan) -> None:
    rows = [("as planned", plan.duration)]
    rows += [
        (f"twice {each.limit}", each.if_doubled)
        for each in plan.limits
        if each.if_doubled is not None
    ]
    names, lengths = zip(*reversed(rows), strict=True)
    unit, seconds = _unit(plan.duration)
    colours = [_OTHER] * (len(rows) - 1) + [_OURS]
    bars = axes.barh(names, [each / seconds for each in lengths], color=colours, height=0.7)
    axes.bar_label(bars, [spoken(each) for each in lengths], padding=4, fontsize=8)
    axes.set_xlim(0, 1.2 * max(lengths) / seconds or 1)
    axes.set_xlabel(unit, fontsize=8)
    _plain(axes, "how long it takes")


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")


def _unit(duration: float) -> tuple[str, int]:
    return next(
        ((name, seconds) for least, name, seconds in _UNITS if duration >= least), ("seconds", 1)
    )
