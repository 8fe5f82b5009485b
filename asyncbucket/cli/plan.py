"""`asyncbucket plan` and `asyncbucket plot`: how long calls will take, and what a limiter did.

A plan is told in words or as JSON; a trace is drawn.
"""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from asyncbucket.cli import options
from asyncbucket.engine.wording import counted, in_given_unit, named, written_out
from asyncbucket.plan import Poisson
from asyncbucket.plan import plan as make_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ADMITTED: Final = "#1f9d55"
_WAITING: Final = "#3b7dd8"
_LIMIT: Final = "#d98c00"
_PAUSE: Final = "#d9534f"


def _samples_option(text: str) -> Any:
    return options.text(text, metavar="N|FILE")


def plan(  # noqa: PLR0913 - one for each option
    source: Annotated[
        str | None, typer.Argument(metavar="FILE", help="The same as --tokens FILE.")
    ] = None,
    *,
    # What is asked.
    calls: Annotated[int | None, options.count("How many calls; default: all samples.")] = None,
    tokens: Annotated[
        str | None, _samples_option("Tokens per call, or a JSONL file of prompts.")
    ] = None,
    latency: Annotated[str, _samples_option("Seconds per call, or a JSONL file of them.")] = "0",
    poisson: Annotated[
        float | None, options.text("Random arrivals, so many a second on average.", metavar="N")
    ] = None,
    # What is allowed.
    rpm: options.Rpm = None,
    tpm: options.Tpm = None,
    limits: options.Also = None,
    concurrency: Annotated[int | None, options.count("The most calls in flight.")] = None,
    profile: Annotated[str, options.name("The provider whose charging rules apply.")] = "openai",
    model: Annotated[str | None, options.name("The model, to estimate the price.")] = None,
    prices: options.PriceFile = None,
    # How it is told.
    as_json: options.AsJson = False,
) -> None:
    """Say how long calls take under limits, and what binds.

    The calls run through the real limits on virtual time: nothing is sent, nothing waits.

    Examples:
        asyncbucket plan --calls 10000 --tokens 800 --rpm 500 --tpm 200000
        asyncbucket plan prompts.jsonl --rpm 500 --also '10k RPD'
        asyncbucket plan --calls 900 --poisson 8 --rpm 400 --latency 2
    """
    if source is not None and tokens is not None:
        raise ValueError(f"{source!r} and --tokens both say what calls cost: give one of them")
    planned = make_plan(
        *(limits or ()),
        calls=calls,
        tokens=_samples(tokens or source),
        latency=_samples(latency),
        concurrency=concurrency,
        arrivals=None if poisson is None else Poisson(poisson),
        profile=profile,
        model=model,
        prices=prices,
        rpm=rpm,
        tpm=tpm,
    )
    typer.echo(json.dumps(planned.as_dict(), indent=2) if as_json else planned)


def _samples(text: str | None) -> Any:
    """Return a number, amounts or samples as JSON, or the path of a file of samples.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return None
    for read in (float, options.read_count, json.loads):
        with contextlib.suppress(ValueError):
            return read(text)
    if not Path(text).exists():
        raise ValueError(f"{text!r} is neither a number, JSON, nor an existing file")
    return Path(text)


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
    draw_trace(trace, out, dark=dark)
    typer.echo(f"drawn: {out}")


@contextlib.contextmanager
def _figure(path: Path, size: tuple[float, float], *, dark: bool) -> Generator["Figure"]:
    """Provide a figure of ``size`` inches that is written to ``path`` at the end of the block.

    Raises:
        ValueError: the suffix of the path is of no kind that matplotlib draws.
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            f'a picture needs {error.name}: pip install "asyncbucket[plot]"'
        ) from error
    if not path.suffix:
        raise ValueError(f"{str(path)!r} has no picture format: end the name in .png, .svg or .pdf")
    look: dict[Any, Any] = {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 9,
        "font.size": 8,
        "text.parse_math": False,  # names may hold dollars
    }
    with style.context(["dark_background" if dark else "default", look]):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        yield figure
        figure.savefig(path)


def draw_trace(trace: Path, out: Path, *, dark: bool) -> None:
    """Draw how full each limit's window was, who waited, and when it was paused.

    Raises:
        ValueError: this is not a trace, or nothing happened in it; or ``out`` is of no known kind.
        ImportError, OSError: matplotlib is missing; a file cannot be read or written.
    """
    head, events = _read_trace(trace)
    admitted = [event for event in events if event["event"] == "admitted"]
    pauses = [event for event in events if event["event"] == "paused"]
    rows, end = len(head["limits"]) + 1, max(events[-1]["at"], 1e-3)
    with _figure(out, (8, 1.2 + 1.7 * rows), dark=dark) as figure:
        paused = "; paused where it is red" if pauses else ""
        figure.suptitle(f"{head['limiter']}: {counted(len(admitted), 'admissions')}{paused}")
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axes, limit in zip(panels, head["limits"], strict=False):
            _draw_window(axes, admitted, limit, end)
        _draw_waiting(panels[-1], events)
        for axes in panels:
            axes.set_xlim(0, end)
            axes.grid(alpha=0.2)
            axes.yaxis.set_major_formatter("{x:,.10g}")
            for pause in pauses:
                over = pause["at"] + pause["seconds"]
                axes.axvspan(pause["at"], over, color=_PAUSE, alpha=0.18, linewidth=0)


def _read_trace(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the head of a trace, and its events in order, the first one at 0."""
    try:
        head, *events = map(json.loads, path.read_bytes().splitlines())
        events.sort(key=lambda event: event["at"])
        _ = head["limiter"], head["limits"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a trace ({error!r}); write one with limiter.trace().save()"
        ) from error
    if not events:
        raise ValueError(f"{path}: nothing happened in this trace")
    start = events[0]["at"]
    return head, [event | {"at": event["at"] - start} for event in events]


def _draw_window(
    axes: "Axes", admitted: Sequence[Mapping[str, Any]], limit: Mapping[str, Any], end: float
) -> None:
    """Draw how many units are in the window that ends at each instant."""
    resource, amount, per = limit["resource"], limit["amount"], limit["per"]
    taken = [(event["at"], event["cost"].get(resource, 0)) for event in admitted]
    steps = Counter[float]()
    for at, units in taken:
        steps[at] += units
        steps[at + per] -= units
    instants = [at for at in sorted(steps) if at <= end]
    sums = itertools.accumulate(steps[at] for at in instants)
    held = [in_given_unit(units, resource) for units in sums]
    curve = [*instants, end], [*held, held[-1] if held else 0]
    axes.step(*curve, where="post", color=_ADMITTED)
    axes.fill_between(*curve, step="post", color=_ADMITTED, alpha=0.25)
    axes.axhline(amount, color=_LIMIT, linestyle="--", linewidth=1)
    title = f"in the last {written_out(per)} s; limit {amount:,}"
    axes.set(title=title, ylabel=named(resource), ylim=(0, amount * 1.12))


def _draw_waiting(axes: "Axes", events: Sequence[Mapping[str, Any]]) -> None:
    """Draw how many waited, over all limiters of the trace, each of which reports its own line."""
    waiting: dict[str, int] = {}
    steps = [(0.0, 0)]  # a refusal or a pause says nothing of the line
    for event in events:
        if "waiting" in event:
            waiting[event["limiter"]] = event["waiting"]
            steps.append((event["at"], sum(waiting.values())))
    axes.step(*zip(*steps, strict=True), where="post", color=_WAITING)
    most = max(1, *(count for _, count in steps))
    axes.set(title="waiting", ylabel="calls", xlabel="seconds", ylim=(0, 1.12 * most))
