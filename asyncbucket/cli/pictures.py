"""Pictures for people: a plan (`asyncbucket plan --out`), and a trace (`asyncbucket plot`)."""

import bisect
import itertools
import json
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from asyncbucket.cli import options
from asyncbucket.core.wording import counted, named, written_out
from asyncbucket.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ADMITTED: Final = "#1f9d55"
_WAITING: Final = "#3b7dd8"
_LIMIT: Final = "#d98c00"
_PAUSE: Final = "#d9534f"
_PAPER: Final = {False: "#ffffff", True: "#17191c"}
_INK: Final = {False: "#202124", True: "#e8eaed"}
_INK_SETTINGS: Final = (
    *("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"),
    *("xtick.color", "ytick.color"),
)
#: What an event of a trace must have to be drawn.
_MEMBERS: Final = {"admitted": "cost", "paused": "seconds"}
#: Units of the time axis: from how many seconds on, the unit's name, and its seconds.
_UNITS: Final = (
    *((172_800, "days", 86_400), (7_200, "hours", 3_600)),
    *((120, "minutes", 60), (0, "seconds", 1)),
)


def plot(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="What limiter.trace().save(...) wrote.")
    ],
    *,
    out: Annotated[Path, options.file("A .png, .svg or .pdf.", "-o", "--out")],
    dark: options.Dark = False,
) -> None:
    """Draw what limiter.trace() recorded.

    Admissions against each limit, the calls that waited, and pauses.

    Examples:
        asyncbucket plot trace.jsonl -o out.png
        asyncbucket plot trace.jsonl -o out.svg --dark
    """
    draw_trace(read_trace(trace), out, dark=dark)
    typer.echo(f"drawn: {out}")


@contextmanager
def _figure(path: Path, size: tuple[float, float], *, dark: bool) -> Generator["Figure"]:
    """Provide a figure of ``size`` inches that is written to ``path`` at the end of the block.

    The same picture gives the same file, byte for byte, if that is a PNG or an SVG.

    Raises:
        ValueError: the suffix of the path is of no kind that matplotlib draws.
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            f'a picture needs {error.name}: pip install "asyncbucket[plot]"'
        ) from error
    if not path.suffix:
        raise ValueError(f"{str(path)!r} shows no kind of picture: end it in .png, .svg or .pdf")
    style: dict[Any, Any] = {
        **dict.fromkeys(_INK_SETTINGS, _INK[dark]),
        "axes.facecolor": "none",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 9,
        "axes.labelsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.facecolor": _PAPER[dark],
        "svg.hashsalt": "asyncbucket",
        "text.parse_math": False,  # names may hold dollars
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, dpi=150, facecolor=_PAPER[dark], layout="constrained")
        yield figure
        with warnings.catch_warnings():  # a glyph that no font has appears as a box
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def draw_plan(plan: Plan, path: Path, *, dark: bool) -> None:
    """Draw admissions over time.

    Raises:
        ValueError, ImportError, OSError: it cannot be drawn, or not there; the message says why.
    """
    unit, seconds = _unit(plan.duration)
    part = plan.duration / len(plan.timeline)
    rates = [count / (part or 1.0) for count in plan.timeline]
    edges = [number * part / seconds for number in range(len(rates) + 1)]
    with _figure(path, (8, 4.2), dark=dark) as figure:
        axes = figure.subplots()
        axes.stairs(rates, edges, fill=True, color=_ADMITTED, alpha=0.85, linewidth=0)
        axes.set(title=plan.summary, xlabel=unit, ylabel="admitted a second")
        axes.set_xlim(0, edges[-1] or 1)
        limit = plan.binding
        if limit is not None and limit.rate is not None:
            label = f"{limit.limit}: {limit.rate:,.3g}/s in the long run"
            axes.axhline(limit.rate, color=_LIMIT, linewidth=1.5, label=label)
            axes.legend(loc="upper right", fontsize=8, framealpha=0.85, edgecolor="none")
            # Waves are shown completely; a burst at the start is cut off, and the axis says so.
            usual, peak = sorted(rates)[len(rates) * 98 // 100], max(rates)
            top = 1.3 * max(limit.rate, min(usual, 4 * limit.rate))
            axes.set_ylim(0, top)
            if peak > top:
                axes.set_ylabel(f"admitted a second, {peak:,.3g} the peak")


def _unit(duration: float) -> tuple[str, int]:
    return next((name, seconds) for least, name, seconds in _UNITS if duration >= least)


@dataclass(frozen=True, slots=True)
class TraceFile:
    """What a trace tells: of which limiter, its limits, and the events in order of time."""

    limiter: str
    limits: list[Mapping[str, Any]]
    events: list[dict[str, Any]]

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the events of one kind."""
        return [each for each in self.events if each["event"] == event]

    @property
    def seconds(self) -> float:
        """The instant of the last event; the first one is at 0."""
        return max(float(self.events[-1]["at"]), 1e-3)


def read_trace(path: Path) -> TraceFile:
    """Read a trace back.

    Raises:
        ValueError: it is not a trace, or nothing happened in it.
        OSError: it cannot be read.
    """
    lines = path.read_bytes().splitlines()
    if len(lines) < 2:  # noqa: PLR2004 - the head and an event
        raise ValueError(f"{path}: nothing happened in this trace")
    try:
        head, *events = map(json.loads, lines)
        events.sort(key=lambda event: event["at"])
        start = events[0]["at"]
        for event in events:
            event["at"] -= start
            _ = event[_MEMBERS.get(event["event"], "at")]
        return TraceFile(f"{head['limiter']}", list(head["limits"]), events)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a trace, or somebody changed it ({error!r}); write one with "
            f"limiter.trace().save()"
        ) from error


def draw_trace(trace: TraceFile, path: Path, *, dark: bool) -> None:
    """Draw how full each limit's window was, who waited, and when it was paused.

    Raises:
        ValueError, ImportError, OSError: it cannot be drawn, or not there; the message says why.
    """
    pauses, rows = trace.of("paused"), len(trace.limits) + 1
    with _figure(path, (8, 1.2 + 1.7 * rows), dark=dark) as figure:
        paused = "; paused where it is red" if pauses else ""
        admissions = counted(len(trace.of("admitted")), "admissions")
        figure.suptitle(f"{trace.limiter}: {admissions}{paused}", fontsize=11)
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axes, limit in zip(panels, trace.limits, strict=False):
            _draw_window(axes, trace, limit)
        _draw_waiting(panels[-1], trace)
        for axes in panels:
            axes.set_xlim(0, trace.seconds)
            axes.grid(alpha=0.2)
            axes.locator_params(axis="y", integer=True)
            axes.yaxis.set_major_formatter("{x:,.0f}")
            for pause in pauses:
                end = pause["at"] + pause["seconds"]
                axes.axvspan(pause["at"], end, color=_PAUSE, alpha=0.18, linewidth=0)


def _draw_window(axes: "Axes", trace: TraceFile, limit: Mapping[str, Any]) -> None:
    """Draw how many units are in the window that ends at each instant."""
    resource, amount, per = limit["resource"], limit["amount"], limit["per"]
    admitted = [event for event in trace.of("admitted") if event["cost"].get(resource)]
    instants = [event["at"] for event in admitted]
    sums = [0, *itertools.accumulate(event["cost"][resource] for event in admitted)]
    marks = sorted({*instants, *(at + per for at in instants if at + per <= trace.seconds)})
    held = [
        sums[bisect.bisect_right(instants, at)] - sums[bisect.bisect_right(instants, at - per)]
        for at in marks
    ]
    curve = [*marks, trace.seconds], [*held, held[-1] if held else 0]
    axes.step(*curve, where="post", color=_ADMITTED)
    axes.fill_between(*curve, step="post", color=_ADMITTED, alpha=0.25)
    axes.axhline(amount, color=_LIMIT, linestyle="--", linewidth=1)
    title = f"in the last {written_out(per)} s; limit {amount:,}"
    axes.set(title=title, ylabel=named(resource), ylim=(0, amount * 1.12))


def _draw_waiting(axes: "Axes", trace: TraceFile) -> None:
    """Draw how many waited, over all limiters of the trace, each of which reports its own line."""
    waiting: dict[str, int] = {}
    steps = [(0.0, 0)]  # a refusal or a pause says nothing of the line
    for event in trace.events:
        if "waiting" in event:
            waiting[event.get("limiter", "")] = event["waiting"]
            steps.append((event["at"], sum(waiting.values())))
    axes.step(*zip(*steps, strict=True), where="post", color=_WAITING)
    most = max(1, *(count for _, count in steps))
    axes.set(title="waiting", ylabel="calls", xlabel="seconds", ylim=(0, 1.12 * most))
