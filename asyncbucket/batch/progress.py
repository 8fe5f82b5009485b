"""How fast a batch goes, how long it will take, and what binds: in words, and as a bar."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, Self, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.wording import named, rounded
from asyncbucket.pools import Pool

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

    def words(self, done: int, left: int) -> list[str]:
        """Return the rate and the time left in words, as far as they are known.

        Args:
            done: the calls that are done.
            left: how many are left; 0 if that is not known. From it follows how long limits on
                requests take at least, even before anything is done.
        """
        now, (since, before) = self._clock(), self._samples[0]
        self._samples.append((now, done))
        rate = (done - before) / (now - since) if now > since else 0.0
        seconds = left / rate if rate else 0.0
        # Of a pool, no member's limit holds for all calls.
        limits = () if isinstance(self.limiter, Pool) else self.limiter.statistics().limits
        for use in limits:
            if use.limit.resource == "requests":
                more = left - max(0, use.available)
                seconds = max(seconds, more * use.limit.per / use.limit.units)
        words = [f"{rounded(rate)}/s"] if rate else []
        return words + ([f"{_clock_time(seconds)} left"] if left and seconds else [])

    def bound_by(self) -> str | None:
        """Return what holds up the first call in line, for people; None if nobody waits."""
        binds = self.limiter.statistics().bound_by
        return "a pause" if binds == "paused" else binds and named(binds)


class _StandardError:
    """Standard error for what may be missed: if nobody reads it any more, the batch goes on."""

    def __init__(self) -> None:
        self._file = sys.stderr  # rich puts something else there while it shows a bar
        #: By which rich knows whether more than ASCII can be shown.
        self.encoding = getattr(self._file, "encoding", None)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, AttributeError):  # gone, or never there
            self._file.write(text)
            self._file.flush()

    def flush(self) -> None:
        """Do nothing: what is written is flushed."""

    def isatty(self) -> bool:
        return self._file is not None and self._file.isatty()


def standard_error() -> Console:
    """Return a console that writes to standard error as long as somebody reads it."""
    return Console(file=cast("Any", _StandardError()), highlight=False, emoji=False)


class ProgressBar:
    """Show a batch on standard error, in a ``with`` block, as its items are done."""

    def __init__(self, limiter: Limiter, total: int | None) -> None:
        self._outlook = Outlook(limiter, clock=limiter.now)
        self._total = total
        self._done = self._failed = self._restored = 0
        self._started = self._shown = 0.0
        self._bar = Progress(
            TextColumn("[bold]{task.fields[count]}"),
            *([] if total is None else [BarColumn(bar_width=28)]),
            TextColumn("{task.description}", markup=False),
            console=standard_error(),
            auto_refresh=False,  # a thread of rich's would compete with the calls
            # What is printed meanwhile appears above the bar, unless it goes somewhere else.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._bar.add_task("", total=total, count="")

    def count(self, *, failed: bool, restored: bool) -> None:
        """Count an item that is done; show it a few times a second."""
        self._done += 1
        self._failed += failed
        self._restored += restored
        now = self._outlook.limiter.now()
        if now >= self._shown + _REFRESH_INTERVAL:
            self._shown = now
            binds = self._outlook.bound_by()
            left = 0 if self._total is None else self._total - self._done
            words = self._outlook.words(self._done - self._restored, left)
            self._show(*words, *([] if binds is None else [f"waiting for {binds}"]))

    def __enter__(self) -> Self:
        self._started = self._outlook.limiter.now()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show(f"in {_clock_time(self._outlook.limiter.now() - self._started)}")
        self._bar.stop()

    def _show(self, *words: str) -> None:
        of = "" if self._total is None else f"/{self._total:,}"
        parts = [f"{self._restored:,} restored"] if self._restored else []
        parts += [f"{self._failed:,} failed"] if self._failed else []
        text, count = "  ".join([*words, *parts]), f"{self._done:,}{of}"
        self._bar.update(self._bar.task_ids[0], completed=self._done, count=count, description=text)
        self._bar.refresh()


def _clock_time(seconds: float) -> str:
    """Return a time as rich and tqdm show it: "0:12:30"."""
    return str(timedelta(seconds=round(seconds)))
