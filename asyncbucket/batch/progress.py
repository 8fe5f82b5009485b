"""How fast a batch goes, how long it will take, and what binds: in words, and as a bar."""

import contextlib
import io
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from datetime import timedelta
from typing import Any, Final

import anyio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from asyncbucket.core.limiter import Limiter
from asyncbucket.core.pool import Pool
from asyncbucket.core.wording import named, rounded

#: Seconds between two updates, and how many of them the rate is computed from: half a minute.
_REFRESH_INTERVAL: Final = 0.2
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
            # Of a pool, no member's limit holds for all calls.
            limits = () if isinstance(self.limiter, Pool) else self.limiter.statistics().limits
            for use in limits:
                more = left.get(use.limit.resource, 0.0) - max(0, use.available)
                seconds = max(seconds, more * use.limit.per / use.limit.units)
            words += [f"{_clock_time(seconds)} left"] if seconds else []
        return words

    def bound_by(self) -> str | None:
        """Return what holds up the first call in line, for people; None if nobody waits."""
        binds = self.limiter.statistics().bound_by
        return "a pause" if binds == "paused" else binds and named(binds)


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
        started = anyio.current_time()
        bar = Progress(
            TextColumn("[bold]{task.fields[count]}"),
            *([] if self._total is None else [BarColumn(bar_width=28)]),
            TextColumn("{task.description}", markup=False),
            console=standard_error(),
            auto_refresh=False,  # a thread of rich's would compete with the calls
            # What is printed meanwhile appears above the bar, unless it goes somewhere else.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        bar.add_task("", total=self._total, count="")
        with bar:
            async with anyio.create_task_group() as group:
                group.start_soon(self._refresh, bar)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
                    self._show(bar, f"in {_clock_time(anyio.current_time() - started)}")

    async def _refresh(self, bar: Progress) -> None:
        outlook = Outlook(self._limiter, clock=anyio.current_time)
        while True:
            left = {} if self._total is None else {"requests": self._total - self._done}
            binds = outlook.bound_by()
            waiting = [] if binds is None else [f"waiting for {binds}"]
            self._show(bar, *outlook.words(self._done - self._restored, left), *waiting)
            await anyio.sleep(_REFRESH_INTERVAL)

    def _show(self, bar: Progress, *words: str) -> None:
        of = "" if self._total is None else f"/{self._total:,}"
        parts = [f"{self._restored:,} restored"] if self._restored else []
        parts += [f"{self._failed:,} failed"] if self._failed else []
        text, count = "  ".join([*words, *parts]), f"{self._done:,}{of}"
        bar.update(bar.task_ids[0], completed=self._done, count=count, description=text)
        bar.refresh()


def _clock_time(seconds: float) -> str:
    """Return a time as rich and tqdm show it: "0:12:30"."""
    return str(timedelta(seconds=round(seconds)))
