"""`asyncbucket demo`: the same agents under the same limits, without asyncbucket and with it.

Here is what is run, and what is shown of it; `demo_load` runs it, and needs LlamaIndex.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.text import Text

from asyncbucket.cli import INTERRUPTED, interrupts_blocked, options
from asyncbucket.cli.ui import Bar, Panel, Screen, plot, silenced, table
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.core.wording import counted, named, one_line
from asyncbucket.plan.result import percent

if TYPE_CHECKING:
    from asyncbucket.testing import Arrival

#: The bundled provider's limits hold over windows of this length, unless the demo is too short.
_WINDOW: Final = 6.0
#: The fewest windows that the paced run takes; with fewer, only the start would be visible.
_MIN_WINDOWS: Final = 4
_SECONDS: Final = 36.0
_QUICK_SECONDS: Final = 6.0
MODEL: Final = "gpt-4o-mini"
_RPM: Final = 1_200
#: One call in this many is a batch of embeddings; an agent makes two calls, around its tool.
_CALLS_PER_BATCH: Final = 12
CALLS_PER_AGENT: Final = 2
#: What a call takes on average; and the least that a window must hold, or none would ever pass.
TOKENS_PER_CALL: Final = 150
_MIN_WINDOW_TOKENS: Final = 250


def demo(  # noqa: PLR0913 - one for each option
    *,
    agents: Annotated[int | None, options.count("Agents at once.", maximum=10_000)] = None,
    rpm: options.Rpm = None,
    tpm: options.Tpm = None,
    concurrency: Annotated[int | None, options.count("Calls in flight, when paced.")] = None,
    model: Annotated[str | None, options.name("A chat model of a real provider.")] = None,
    api_base: Annotated[
        str | None, options.text("Its URL, if not OpenAI's.", metavar="URL")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=2, max=3600, metavar="S", help="How long the paced run should take."),
    ] = None,
    quick: Annotated[bool, options.flag("The same as --seconds 6.", "--quick")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Run LlamaIndex agents under a provider's limits, without asyncbucket and with it.

    The provider is bundled: it runs on this machine, costs nothing, and answers 429 above its limits.
    Use --model or --api-base to call a real one, with the key in OPENAI_API_KEY; that costs money.
    Say with --rpm or --tpm what the key allows. A real provider is called with asyncbucket alone.
    """
    seconds = _QUICK_SECONDS if quick and seconds is None else seconds
    with options.errors_in_one_line("the demo"):
        if not (model or api_base):
            scenario = bundled(agents, rpm=rpm, tpm=tpm, seconds=seconds, concurrency=concurrency)
        elif seconds is not None:
            raise ValueError(
                "--seconds and --quick are for the bundled provider; use --agents to say how many "
                "agents ask a real one"
            )
        else:
            scenario = real(
                agents or 20,
                rpm=rpm,
                tpm=tpm,
                concurrency=concurrency or 20,
                model=model or MODEL,
                api_base=api_base or options.OPENAI,
            )
        raise typer.Exit(_run(scenario, as_json=as_json))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is run.

    Attributes:
        agents: how many run at once.
        batches: how many batches of embeddings run beside them.
        limits: what the provider allows; asyncbucket is told the same.
        concurrency: the most calls in flight, with asyncbucket.
        model: the chat model.
        api_base: a real provider's URL, or None for the bundled one.
        api_key: the key; never shown.
    """

    agents: int
    batches: int = 0
    limits: tuple[Limit, ...]
    concurrency: int
    model: str = MODEL
    api_base: str | None = None
    api_key: str = field(default="bundled", repr=False)

    def amount(self, resource: str) -> int | None:
        """Return the limit of a resource, if there is one."""
        return next((limit.amount for limit in self.limits if limit.resource == resource), None)

    @property
    def window(self) -> float:
        """The seconds over which the limits hold, the same for all of them."""
        return self.limits[0].per

    @property
    def headline(self) -> str:
        """What will be run, in a few lines."""
        work = f"{counted(self.agents, 'LlamaIndex agents')} with a tool"
        if self.batches:
            work += (
                f", {self.batches:,} {'batch' if self.batches == 1 else 'batches'} of embeddings"
            )
        where = "a bundled provider" if self.api_base is None else options.shown_url(self.api_base)
        return f"{work}, all at once;\n{where} allows {', '.join(map(str, self.limits))}\n"


def bundled(
    agents: int | None = None,
    *,
    rpm: int | None = None,
    tpm: int | None = None,
    seconds: float | None = None,
    concurrency: int | None = None,
) -> Scenario:
    """Return what runs against the bundled provider: as many calls as it lets pass in ``seconds``.

    Raises:
        ValueError: no call would ever pass.
    """
    rpm, seconds = rpm or _RPM, seconds or _SECONDS
    tpm = tpm or max(rpm, _RPM) * _MIN_WINDOW_TOKENS  # enough for all requests
    window = round(min(_WINDOW, seconds / _MIN_WINDOWS), 3)
    requests, tokens = (max(1, round(amount * window / 60)) for amount in (rpm, tpm))
    if tokens < _MIN_WINDOW_TOKENS:
        raise ValueError(
            f"{tpm:,} tokens a minute are {tokens:,} in the demo's {window:g} s, and a call takes up to "
            f"{_MIN_WINDOW_TOKENS}: give --tpm {math.ceil(_MIN_WINDOW_TOKENS * 60 / window)} or more"
        )
    calls = agents * CALLS_PER_AGENT if agents else min(rpm, tpm / TOKENS_PER_CALL) * seconds / 60
    batches = round(calls / _CALLS_PER_BATCH)
    return Scenario(
        agents=agents or max(1, round((calls - batches) / CALLS_PER_AGENT)),
        batches=max(1, batches),
        limits=(Limit("requests", requests, per=window), Limit("tokens", tokens, per=window)),
        concurrency=concurrency or 60,
    )


def real(agents: int, *, rpm: int | None, tpm: int | None, **others: Any) -> Scenario:
    """Return what runs against a real provider.

    Raises:
        ValueError: a key or a limit is missing, or the URL is none.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise ValueError(
            "OPENAI_API_KEY is not set: a real provider needs a key (for a local server any word "
            "will do); `asyncbucket demo` alone runs against the bundled provider and needs none"
        )
    given = (("requests", rpm), ("tokens", tpm))
    limits = tuple(Limit(resource, amount, per=60) for resource, amount in given if amount)
    if not limits:
        raise ValueError(
            "give the limits of your key with --rpm and --tpm, e.g. --rpm 500 --tpm 200000"
        )
    options.check_url(others["api_base"])
    return Scenario(agents=agents, limits=limits, api_key=key, **others)


@dataclass(slots=True, kw_only=True)
class Run:
    """What one run has done so far."""

    scenario: Scenario
    #: None without asyncbucket.
    limiter: Limiter | None = None
    agents_finished: int = 0
    #: HTTP requests, those answered with 429, those answered well, and those under way.
    requests: int = 0
    refused: int = 0
    answered: int = 0
    in_flight: int = 0
    arrivals: "list[Arrival]" = field(default_factory=list)
    #: How often each kind of error ended an agent or a batch; the first failed call ends one.
    failures: Counter[str] = field(default_factory=Counter[str])
    #: Seconds and binding limit of every admission.
    waits: list[tuple[float, str | None]] = field(default_factory=list[tuple[float, str | None]])
    started_ns: int = 0
    ended_ns: int = 0
    interrupted: bool = False

    @property
    def name(self) -> str:
        """Its name on the screen and in the report."""
        return "without asyncbucket" if self.limiter is None else "with asyncbucket"

    @property
    def failed(self) -> int:
        """Calls that failed for good, after the client's own retries."""
        return self.failures.total()

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran; 0 before it starts."""
        if not self.started_ns:
            return 0.0
        return ((self.ended_ns or time.monotonic_ns()) - self.started_ns) * 1e-9

    def counts(self, *, admitted: bool) -> list[int]:
        """Return how many requests were admitted, or refused, in parts of about a second."""
        counts = [0] * max(1, round(self.seconds))
        for arrival in self.arrivals:
            part = int((arrival.time_ns - self.started_ns) * 1e-9 / self.seconds * len(counts))
            counts[min(max(part, 0), len(counts) - 1)] += arrival.admitted is admitted
        return counts

    def wait(self, quantile: float) -> float | None:
        """Return a quantile of the waits (nearest rank), or None if none is known."""
        ranked = sorted(seconds for seconds, _ in self.waits)
        return ranked[max(0, math.ceil(quantile * len(ranked)) - 1)] if ranked else None

    def bound_by(self) -> dict[str, int]:
        """Return how many calls waited for what."""
        return dict(Counter(name for _, name in self.waits if name).most_common())

    def share(self, limit: Limit) -> float | None:
        """Return the fraction of a limit that was used, from 0 to 1; None if it is unknown.

        The time is cut into windows of the limit; the last one is shorter, and allows less in
        proportion. Usage in a window counts up to the limit: a provider whose bucket is full at the
        start admits more then, and that must not make up for a time in which it was idle.
        """
        if limit.resource == "tokens" and self.scenario.api_base is not None:
            return None
        if not self.seconds:
            return 0.0
        used: Counter[int] = Counter()
        for arrival in self.arrivals:
            if arrival.admitted:
                window = int((arrival.time_ns - self.started_ns) * 1e-9 / limit.per)
                used[window] += 1 if limit.resource == "requests" else arrival.tokens
        allowed = [
            limit.amount * min(1.0, self.seconds / limit.per - window)
            for window in range(math.ceil(self.seconds / limit.per))
        ]
        counted_up = sum(min(used[window], amount) for window, amount in enumerate(allowed))
        return counted_up / sum(allowed)

    def panel(self) -> Panel:
        """Return what is shown while it runs."""
        agents = self.scenario.agents
        finished = f"{self.agents_finished:,} of {agents:,} agents"
        bars = [Bar(finished, self.agents_finished / agents)]
        facts = [f"{self.answered:,} calls answered", f"{self.refused:,} 429s"]
        facts += [f"{self.failed:,} failed", f"{self.in_flight:,} in flight"]
        if self.limiter is not None:
            now = self.limiter.statistics()
            facts.append(f"{now.waiting:,} waiting")
            for use in now.limits:
                label = f"{use.used:,} of {use.limit}"
                bars.append(Bar(label, min(1.0, use.used / use.limit.amount), style="yellow"))
        return Panel(f"{self.name}, {self.seconds:.0f} s", tuple(bars), tuple(facts))

    def as_dict(self) -> dict[str, Any]:
        """Return the figures in values that JSON can hold; times are seconds."""
        names = ("name", "agents_finished", "answered", "failed", "requests", "refused", "seconds")
        return {name: getattr(self, name) for name in names} | {
            "shares": {limit.resource: self.share(limit) for limit in self.scenario.limits},
            "waits": {"p50": self.wait(0.5), "p95": self.wait(0.95)},
        }


def _run(scenario: Scenario, *, as_json: bool) -> int:
    """Run the demo and return its exit status: 0, 1 if a paced call failed, 130 after Ctrl-C or SIGTERM."""
    console = Console(highlight=False)
    runs: list[Run] = []
    try:
        with silenced():
            status = _run_all(scenario, console, runs, quiet=as_json)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if as_json:
        ran = {"agents": scenario.agents, "batches": scenario.batches}
        limits, done = [*map(str, scenario.limits)], [run.as_dict() for run in runs]
        typer.echo(json.dumps({**ran, "limits": limits, "runs": done}, indent=2))
    elif runs:
        _show(console, scenario, runs)
    return status


def _run_all(scenario: Scenario, console: Console, runs: list[Run], *, quiet: bool) -> int:
    """Append each run to ``runs``, so that it is there however this ends."""
    if not quiet:
        console.print(scenario.headline, markup=False)
        console.print("loading LlamaIndex ...", style="dim")
    with interrupts_blocked():
        from asyncbucket.cli.demo_load import Fatal, run_once

    for paced in (False, True) if scenario.api_base is None else (True,):
        limiter = Limiter(*scenario.limits, concurrency=scenario.concurrency) if paced else None
        run = Run(scenario=scenario, limiter=limiter)
        try:
            with Screen(console, quiet=quiet) as screen:
                run_once(run, screen)
        except Fatal as error:
            typer.echo(f"error: {one_line(str(error))}", err=True)
            return options.FAILED
        if run.requests or not run.interrupted:
            runs.append(run)
        if run.interrupted:
            return INTERRUPTED
        if not quiet:
            console.print(f"{run.panel()}", markup=False, soft_wrap=True)
    return options.FAILED if runs[-1].failed else options.DONE


def _show(console: Console, scenario: Scenario, runs: Sequence[Run]) -> None:
    """Print the table, what went wrong, and a plot of each run against the limit."""
    columns = [_column(run) for run in runs]
    console.print(table([(name, *(each[name] for each in columns)) for name in columns[0]]))
    for run in runs:
        for what, count in run.failures.most_common():
            line = f"{run.name}, {count:,} failed: {one_line(what)}"
            console.print(line, markup=False, highlight=False)
    requests = scenario.amount("requests") or 0
    longest = max(run.seconds for run in runs)
    for run in runs if requests and longest else ():
        admitted, refused = (run.counts(admitted=admitted) for admitted in (True, False))
        title = f"{run.name}: admitted over time; ____ is the limit"
        limit, share = requests / scenario.window, run.seconds / longest
        console.print(plot(console, title, admitted, limit, seconds=run.seconds, share=share))
        if any(refused):
            most = max(refused) * len(refused) / run.seconds
            console.print(f"{'':8}up to {most:,.0f} refused a second (429)", style="red")
        console.print()


def _column(run: Run) -> dict[str, str | Text]:
    """Return a run's figures by their names in the table."""
    agents = run.scenario.agents
    p50, p95 = (run.wait(quantile) for quantile in (0.5, 0.95))
    bound_by = ", ".join(f"{named(name)} {count:,}" for name, count in run.bound_by().items())
    return {
        "": run.name + ("\n(so far)" if run.interrupted else ""),
        "agents finished": _good(
            run.agents_finished == agents, f"{run.agents_finished:,} of {agents:,}"
        ),
        "calls": f"{run.answered + run.failed:,}",
        "HTTP requests": f"{run.requests:,}",
        "429s": _good(not run.refused, f"{run.refused:,}"),
        "failed": _good(not run.failed, f"{run.failed:,}"),
        "wall time": f"{run.seconds:.1f} s",
        **{
            f"share of limit used: {limit.resource}": "-" if share is None else percent(share)
            for limit in run.scenario.limits
            for share in (run.share(limit),)
        },
        "wait for admission, p50": "-" if p50 is None else f"{p50:.2f} s",
        "wait for admission, p95": "-" if p95 is None else f"{p95:.2f} s",
        "calls that waited for": "-" if run.limiter is None else bound_by or "nothing",
    }


def _good(good: bool, text: str) -> Text:  # noqa: FBT001 - whether the text is good news
    return Text(text, "bold green" if good else "bold red")
