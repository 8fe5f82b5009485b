"""How fast a batch goes, how long it will take, and what binds: in words, and as a bar."""

import contextlib
import io
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any, Final

import anyio
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import named, rounded

#: Seconds between two updates, and how many of them the rate is computed from: half a minute.
REFRESH_INTERVAL: Final = 0.2
_SAMPLES: Final = 150


class Outlook:
    """Estimate from now on how fast calls go, and how long they will take.

    Args:
        limiter: the limiter with the limits.
        clock: seconds.
    """

    def __init__(self, limiter: Limiter, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limiter = limiter
        self._clock = clock
        self._samples = deque([(clock(), 0)], maxlen=_SAMPLES)

    def words(self, done: int, left: Mapping[str, float] | None = None) -> list[str]:
        """Return the rate and the time left in words, as far as they are known.

        Args:
            done: the calls that are done.
            left: amounts that are left, by resource. From them follows how long the limits will
                take at least, even before anything is done.
        """
        now, (since, before) = self._clock(), self._samples[0]
        self._samples.append((now, done))
        rate = (done - before) / (now - since) if now > since else 0.0
        words = [f"{rounded(rate)}/s"] if rate else []
        if left:
            seconds = left.get("requests", 0.0) / rate if rate else 0.0
            for use in self.limiter.statistics().limits:
                more = left.get(use.limit.resource, 0.0) - max(0, use.available)
                seconds = max(seconds, more * use.limit.per / use.limit.amount)
            words += [f"{duration(seconds)} left"] if seconds else []
        return words

    def bound_by(self) -> str | None:
        """Return what holds up the first call in line, for people; None if nobody waits."""
        binds = self.limiter.statistics().bound_by
        return "a pause" if binds == "paused" else binds and named(binds)


def duration(seconds: float) -> str:
    """Return a time in words: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 100:  # noqa: PLR2004 - below, seconds matter
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:  # noqa: PLR2004 - as above
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"


class _StandardError(io.TextIOBase):
    """Standard error for what may be missed: if nobody reads it any more, the batch goes on."""

    def __init__(self) -> None:
        self._file = sys.stderr  # rich puts something else there while it shows a bar

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, AttributeError):  # gone, or never there
            self._file.write(text)
            self._file.flush()
        return len(text)

    def isatty(self) -> bool:
        return self._file is not None and self._file.isatty()


def standard_error() -> Console:
    """Return a console that writes to standard error as long as somebody reads it."""
    file: Any = _StandardError()
    return Console(file=file, highlight=False, emoji=False)


class Lines(Progress):
    """A bar with words behind it, and a line below; refreshed only by `show`."""

    def __init__(self, console: Console, total: int | None, *, transient: bool = False) -> None:
        # A thread of rich's would compete with the calls.
        self.below = ""
        super().__init__(
            TextColumn("[bold]{task.fields[count]}"),
            *([] if total is None else [BarColumn(bar_width=28)]),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=transient,
            # What is printed meanwhile appears above the bar, unless it goes somewhere else.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._task = self.add_task("", total=total, count="")

    def show(self, done: int, count: str, words: Iterable[str]) -> None:
        """Draw it anew."""
        self.update(
            self._task, completed=done, count=count, description="  ".join(words), refresh=True
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """See rich's `Progress`."""
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, "dim")


class Bar:
    """Show a batch on standard error, a few times a second; counting costs next to nothing."""

    def __init__(self, limiter: Limiter, total: int | None) -> None:
        self._limiter = limiter
        self._total = total
        self._done = self._failed = self._restored = 0

    def count(self, *, failed: bool, restored: bool) -> None:
        """Count an item that is done."""
        self._done += 1
        self._failed += failed
        self._restored += restored

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncGenerator[None]:
        """Show the bar during an ``async with`` block."""
        outlook = Outlook(self._limiter, clock=anyio.current_time)
        started = anyio.current_time()
        with Lines(standard_error(), self._total) as lines:
            async with anyio.create_task_group() as group:
                group.start_soon(self._refresh, lines, outlook)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
                    self._show(lines, f"in {duration(anyio.current_time() - started)}")

    async def _refresh(self, lines: Lines, outlook: Outlook) -> None:
        while True:
            left = {} if self._total is None else {"requests": self._total - self._done}
            binds = outlook.bound_by()
            waiting = [] if binds is None else [f"waiting for {binds}"]
            self._show(lines, *outlook.words(self._done - self._restored, left), *waiting)
            await anyio.sleep(REFRESH_INTERVAL)

    def _show(self, lines: Lines, *words: str) -> None:
        of = "" if self._total is None else f"/{self._total:,}"
        parts = [f"{self._restored:,} restored"] if self._restored else []
        parts += [f"{self._failed:,} failed"] if self._failed else []
        lines.show(self._done, f"{self._done:,}{of}", [*words, *parts])
