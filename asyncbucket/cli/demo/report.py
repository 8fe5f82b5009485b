"""What is shown when the runs are over: one table, and a plot of each run against the limit."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncbucket.cli.demo.outcome import Outcome
from asyncbucket.cli.demo.scenario import Scenario
from asyncbucket.cli.plot import Canvas, against_limit, shows_blocks, sparkline
from asyncbucket.cli.provider import shown_url
from asyncbucket.core.wording import counted, named, one_line
from asyncbucket.plan.result import percent

_UNKNOWN: Final = "-"


def headline(scenario: Scenario) -> str:
    """Say in a few lines what will be run."""
    work = f"{counted(scenario.agents, 'LlamaIndex agents')} with a tool"
    if scenario.batches:
        batches = "batch" if scenario.batches == 1 else "batches"
        work += f" and {scenario.batches:,} {batches} of embeddings"
    limits = " and ".join(counted(limit.amount, limit.resource) for limit in scenario.limits)
    where = "a bundled provider" if scenario.api_base is None else shown_url(scenario.api_base)
    buckets = "" if scenario.api_base else "\n(token buckets, full at the start)"
    return f"{work}, all at once,\nagainst {where}: {limits} every {scenario.window:g} s{buckets}\n"


def summary(outcome: Outcome) -> str:
    """Say in a line how a run ended."""
    ended = "interrupted after" if outcome.interrupted else "done in"
    return (
        f"{outcome.name}: {ended} {outcome.seconds:.1f} s, {outcome.requests:,} HTTP requests, "
        f"{outcome.refused:,} 429s, {outcome.failed:,} failed"
    )


def show(console: Console, scenario: Scenario, outcomes: Sequence[Outcome]) -> None:
    """Print the table, the plots and what went wrong."""
    if not outcomes:
        return
    console.print(_table(console, scenario, outcomes))
    for outcome in outcomes:
        _show_failures(console, outcome)
    requests = scenario.amount("requests")
    if requests:
        _show_plots(console, requests / scenario.window, outcomes)


def as_dict(scenario: Scenario, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything in values that JSON can hold; times are seconds."""
    runs: list[dict[str, Any]] = []
    for outcome in outcomes:
        waits = {"p50": outcome.wait(0.5), "p95": outcome.wait(0.95)}
        run = asdict(outcome) | {"waits": waits}
        run["admitted_at"], run["refused_at"] = (
            [round(time, 4) for time in times]
            for times in (outcome.admitted_at, outcome.refused_at)
        )
        runs.append(run)
    return {
        "provider": "bundled" if scenario.api_base is None else shown_url(scenario.api_base),
        "model": scenario.model,
        "limits": [
            {"resource": limit.resource, "amount": limit.amount, "per": limit.per}
            for limit in scenario.limits
        ],
        "concurrency": scenario.concurrency,
        "agents": scenario.agents,
        "batches": scenario.batches,
        "runs": runs,
    }


def _table(console: Console, scenario: Scenario, outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD if shows_blocks(console) else box.ASCII2, pad_edge=False)
    table.add_column()
    for outcome in outcomes:
        so_far = "\n(so far)" if outcome.interrupted else ""
        table.add_column(outcome.name + so_far, justify="right")
    table.add_row("agents finished", *(_finished(outcome) for outcome in outcomes))
    table.add_row("calls", *(f"{outcome.calls:,}" for outcome in outcomes))
    table.add_row("HTTP requests", *(f"{outcome.requests:,}" for outcome in outcomes))
    table.add_row("429s", *(_error_count(outcome.refused) for outcome in outcomes))
    table.add_row("failed", *(_error_count(outcome.failed) for outcome in outcomes))
    table.add_row("wall time", *(f"{outcome.seconds:.1f} s" for outcome in outcomes))
    for limit in scenario.limits:
        label = f"share of limit used: {limit.resource}"
        table.add_row(label, *(_share(outcome, limit.resource) for outcome in outcomes))
    table.add_row("wait for admission, p50", *(_seconds(outcome.wait(0.5)) for outcome in outcomes))
    table.add_row(
        "wait for admission, p95", *(_seconds(outcome.wait(0.95)) for outcome in outcomes)
    )
    table.add_row("calls that waited for", *(_bound_by(outcome) for outcome in outcomes))
    return table


def _finished(outcome: Outcome) -> Text:
    style = "green" if outcome.agents_finished == outcome.agents else "red"
    return Text(f"{outcome.agents_finished:,} of {outcome.agents:,}", style)


def _error_count(count: int) -> Text:
    return Text(f"{count:,}", "bold red" if count else "bold green")


def _share(outcome: Outcome, resource: str) -> Text:
    share = outcome.shares.get(resource)
    if share is None:
        return Text(_UNKNOWN)
    binds = outcome.binding is not None and outcome.binding[0] == resource
    return Text(percent(share), "bold" if binds else "")


def _seconds(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2f} s"


def _bound_by(outcome: Outcome) -> str:
    if not outcome.paced:
        return _UNKNOWN
    return _counts_text(outcome.bound_by) or "nothing"


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{named(name)} {count:,}" for name, count in counts.items())


def _show_failures(console: Console, outcome: Outcome) -> None:
    for what, count in outcome.failures.items():
        line = f"{outcome.name}, {count:,} failed: {one_line(what)}"
        console.print(line, markup=False, highlight=False)


def _show_plots(console: Console, limit: float, outcomes: Sequence[Outcome]) -> None:
    longest = max(outcome.seconds for outcome in outcomes)
    canvas = Canvas.on(console, longest)
    for outcome in outcomes:
        _show_plot(console, canvas, limit, outcome)


def _show_plot(console: Console, canvas: Canvas, limit: float, outcome: Outcome) -> None:
    until = outcome.seconds
    admitted, refused = (
        canvas.rates(times, until=until) for times in (outcome.admitted_at, outcome.refused_at)
    )
    title = f"{outcome.name}: admitted a second; ____ is the limit"
    if max(admitted) > 2 * limit:
        title += f", {max(admitted):,.0f} the peak"
    style = "green" if outcome.paced else "cyan"
    console.print(Text(title, "bold"))
    columns = canvas.spread(admitted, until=until)
    console.print(against_limit(canvas, columns, limit, style=style))
    if any(refused):
        columns = canvas.spread(refused, until=until)
        console.print(sparkline(canvas, columns, "429s", style="red"))
        console.print(Text(f"{'':8}up to {max(refused):,.0f} refused a second", "red"))
    console.print()
