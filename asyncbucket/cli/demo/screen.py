"""Progress of the demo: moving bars on a terminal, plain lines everywhere else."""

import time
from collections.abc import Sequence
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncbucket.cli.demo.gauge import Use
from asyncbucket.cli.demo.scenario import Scenario
from asyncbucket.cli.demo.tally import Tally

#: Seconds between two plain lines.
_LINE_INTERVAL: Final = 2.0
_BAR: Final = 30


class Screen(Protocol):
    """Show the progress of one run after the other."""

    def begin(self, name: str) -> None:
        """Start to show a run."""
        ...

    def show(self, tally: Tally, uses: Sequence[Use]) -> None:
        """Show how far it has come."""
        ...

    def end(self) -> None:
        """Stop showing it. Idempotent."""
        ...


def screen_for(console: Console, scenario: Scenario, *, silent: bool) -> Screen:
    """Return the screen that suits a terminal, a dumb one, a pipe, or nobody."""
    if silent:
        return _NoScreen()
    if console.is_terminal and not console.is_dumb_terminal:
        return _LiveScreen(console, scenario)
    return _LineScreen(console, scenario)


class _NoScreen:
    def begin(self, name: str) -> None: ...
    def show(self, tally: Tally, uses: Sequence[Use]) -> None: ...
    def end(self) -> None: ...


class _LineScreen:
    def __init__(self, console: Console, scenario: Scenario) -> None:
        self._console = console
        self._scenario = scenario
        self._next = 0.0

    def begin(self, name: str) -> None:
        self._console.print(f"{name}:")
        self._next = time.monotonic() + _LINE_INTERVAL

    def show(self, tally: Tally, uses: Sequence[Use]) -> None:
        del uses
        if time.monotonic() >= self._next:
            self._next += _LINE_INTERVAL
            done = f"{tally.agents_finished:,}/{self._scenario.agents:,} agents"
            line = f"{tally.seconds:3.0f} s {done}; {_counts(tally)}"
            self._console.print(line, soft_wrap=True)

    def end(self) -> None: ...


class _LiveScreen:
    def __init__(self, console: Console, scenario: Scenario) -> None:
        self._console = console
        self._scenario = scenario
        self._live: Live | None = None
        self._name = ""

    def begin(self, name: str) -> None:
        self._name = name
        # Refreshed only by `show`: a thread of rich's would compete with the agents.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def show(self, tally: Tally, uses: Sequence[Use]) -> None:
        if self._live is not None:
            self._live.update(self._view(tally, uses), refresh=True)

    def end(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _view(self, tally: Tally, uses: Sequence[Use]) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for use in uses:
            numbers = f"{use.used:,} of {use.limit.amount:,} in {use.limit.per:g} s"
            grid.add_row(use.limit.resource, _bar(use.used, use.limit.amount), numbers)
        agents = self._scenario.agents
        finished = f"{tally.agents_finished:,} of {agents:,} finished"
        grid.add_row("agents", _bar(tally.agents_finished, agents), finished)
        head = Text.assemble((self._name, "bold"), f"  {tally.seconds:.0f} s")
        traffic_line = f"{_counts(tally)}, {tally.traffic.in_flight:,} in flight"
        return Group(Text(), head, grid, Text(traffic_line))


def _bar(used: int, amount: int) -> ProgressBar:
    return ProgressBar(total=amount, completed=max(0, min(used, amount)), width=_BAR)


def _counts(tally: Tally) -> str:
    """Return what fits into 80 columns after the time and the agents."""
    traffic = tally.traffic
    return (
        f"{traffic.answered:,} calls answered, {traffic.refused:,} 429s, "
        f"{tally.failed:,} failed, {tally.waiting:,} waiting"
    )
