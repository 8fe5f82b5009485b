"""Progress on standard error: live lines on a terminal, occasional ones in a pipe."""

from typing import Final, Protocol

import anyio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncbucket.batch.outlook import Outlook, Snapshot, duration
from asyncbucket.cli.run.tally import Tally
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import counted, with_verb

#: Seconds between two updates on a terminal, and between two lines in a pipe.
_REFRESH_INTERVAL: Final = 0.2
_LINE_INTERVAL: Final = 10.0
_BAR: Final = 28


class Screen(Protocol):
    """Show the progress of a run."""

    async def show_until_cancelled(self, tally: Tally, limiter: Limiter) -> None:
        """Show it until cancelled."""
        ...

    def print_line(self, text: str) -> None:
        """Show a line that stays."""
        ...


def screen_for(console: Console, *, quiet: bool, shared: bool = False) -> Screen:
    """Return the screen that suits a terminal, a pipe, or ``quiet``.

    On a terminal that is ``shared`` with the answers nothing moves, because it would wipe them out.
    """
    if quiet:
        return _NoScreen()
    if console.is_terminal and not (console.is_dumb_terminal or shared):
        return _LiveScreen(console)
    return _LineScreen(console)


class _NoScreen:
    async def show_until_cancelled(self, tally: Tally, limiter: Limiter) -> None: ...
    def print_line(self, text: str) -> None: ...


class _LineScreen:
    def __init__(self, console: Console) -> None:
        self._console = console

    async def show_until_cancelled(self, tally: Tally, limiter: Limiter) -> None:
        outlook = Outlook(limiter)
        while True:
            await anyio.sleep(_LINE_INTERVAL)
            snapshot = take_snapshot(tally, outlook)
            of = "" if tally.total is None else f" of {tally.total:,}"
            parts = [f"{tally.done:,}{of} done", *_pace(snapshot, tally), *_counts(tally, limiter)]
            self.print_line(f"{duration(tally.seconds):>6}  {', '.join(parts)}")

    def print_line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)


class _LiveScreen:
    def __init__(self, console: Console) -> None:
        self._console = console

    async def show_until_cancelled(self, tally: Tally, limiter: Limiter) -> None:
        outlook = Outlook(limiter)
        # Refreshed by this task only: a thread of rich's would compete with the calls.
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self._view(tally, limiter, take_snapshot(tally, outlook)), refresh=True)
                await anyio.sleep(_REFRESH_INTERVAL)

    def _view(self, tally: Tally, limiter: Limiter, snapshot: Snapshot) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0))
        if tally.total is None:
            done = Text(counted(tally.done, "lines"), "bold")
            grid.add_row(done, "  ".join(_pace(snapshot, tally)))
        else:
            done = Text(f"{tally.done:,} of {tally.total:,}", "bold")
            bar = ProgressBar(max(1, tally.total), tally.done, width=_BAR)
            grid.add_row(done, bar, "  ".join(_pace(snapshot, tally)))
        return Group(grid, Text("  ".join(_counts(tally, limiter)), "dim"))

    def print_line(self, text: str) -> None:
        self._console.print(text, markup=False)


def take_snapshot(tally: Tally, outlook: Outlook) -> Snapshot:
    """Estimate how long it will take, from what was done and from what the limits allow."""
    left = None
    if tally.total is not None:
        items = max(0, tally.total - tally.done)
        calls = max(1, tally.admitted["requests"])
        left = {name: items * units / calls for name, units in tally.admitted.items()}
        left |= {"items": float(items), "requests": float(items)}
    return outlook.snapshot(tally.answered + tally.failed, left=left)


def _pace(snapshot: Snapshot, tally: Tally) -> list[str]:
    if tally.stopping:  # the rest is left for the next run
        return ["stopping"]
    words = snapshot.words()
    if snapshot.bound_by is not None:
        words.append(with_verb(snapshot.bound_by, "bind"))
    return words


def _counts(tally: Tally, limiter: Limiter) -> list[str]:
    words = [f"{limiter.statistics().in_flight:,} in flight", f"{tally.refused:,} 429s"]
    words += [f"{tally.failed:,} failed"] if tally.failed else []
    words += [f"{tally.bad:,} bad"] if tally.bad else []
    words.append(f"{tally.input_tokens:,} + {tally.output_tokens:,} tokens")
    if tally.cost is not None:
        words.append(dollars(tally.cost))
    return words


def dollars(amount: float) -> str:
    """Return an amount of money, with as many digits as matter."""
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.4f}"
