"""What a terminal shows: panels that move.

A terminal that cannot draw, a pipe and a log get the same as plain lines.
"""

import logging
import sys
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BAR: Final = 30
#: Seconds between two pictures of a moving panel.
_REFRESH_INTERVAL: Final = 0.2


@contextmanager
def silenced() -> Generator[None]:
    """Keep logs and warnings of libraries off the screen."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@dataclass(frozen=True, slots=True)
class Bar:
    """A label, a part from 0 to 1, and a note behind it; the style is rich's."""

    label: str
    part: float
    note: str = ""
    style: str = "green"


@dataclass(frozen=True, slots=True)
class Panel:
    """What is shown of one limiter or run: bars, and facts in words, the most pressing first."""

    title: str
    bars: tuple[Bar, ...] = ()
    facts: tuple[str, ...] = ()

    def __str__(self) -> str:
        bars = [f"{bar.label} ({bar.note})" if bar.note else bar.label for bar in self.bars]
        return f"{self.title}: {', '.join([*bars, *self.facts])}"


class Screen:
    """Show panels: drawn in place on a terminal that can, else a line for each of them.

    Args:
        console: where to.
        stays: whether the last picture stays when the block ends.
    """

    def __init__(self, console: Console, *, stays: bool = False) -> None:
        self._console = console
        self._live: Live | None = None
        # One that is quiet would swallow what others write to standard error.
        if console.is_terminal and not (console.is_dumb_terminal or console.quiet):
            # Refreshed only by `show`: a thread of rich's would compete with the calls.
            redirected = sys.stdout is not None and sys.stdout.isatty()
            self._live = Live(
                console=console,
                auto_refresh=False,
                transient=not stays,
                redirect_stdout=redirected,
            )

    def interval(self, seconds: float) -> float:
        """Return the seconds between two updates: less than ``seconds`` where it is drawn in place."""
        return seconds if self._live is None else _REFRESH_INTERVAL

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, panels: Sequence[Panel]) -> None:
        """Show ``panels`` instead of those before."""
        if self._live is not None:
            self._live.update(draw(panels), refresh=True)
        else:
            for panel in panels:
                self.say(str(panel))

    def say(self, text: str) -> None:
        """Print a text that stays."""
        self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)


def draw(panels: Iterable[Panel]) -> RenderableType:
    """Return the picture of ``panels``."""
    return Group(*(line for panel in panels for line in _lines(panel)))


def _lines(panel: Panel) -> Iterable[RenderableType]:
    yield Text(panel.title, "bold")
    bars = Table.grid(padding=(0, 2, 0, 0))
    for width in (None, _BAR, None, None):
        bars.add_column(max_width=width, no_wrap=width is None)
    for bar in panel.bars:
        drawn = ProgressBar(1.0, bar.part, complete_style=bar.style, finished_style=bar.style)
        note = Text(f"< {bar.note}" if bar.note else "", f"bold {bar.style}")
        bars.add_row(bar.label, drawn, f"{bar.part:4.0%}", note)
    facts = Text(", ".join(panel.facts), "dim", overflow="fold")
    for part in (bars, facts):
        yield Padding(part, (0, 0, 0, 2), expand=False)
    yield Text("")
