"""How fast it goes, how long it will take, and what binds: for people who watch."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import rounded

#: Seconds over which a rate is computed, and between two samples of it.
_RATE_SPAN: Final = 30.0
_SAMPLE_INTERVAL: Final = 0.5


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What can be said at one instant.

    Attributes:
        rate: items a second, recently; 0 before the first.
        left: seconds until all is done; None if unknown.
        bound_by: what calls waited for recently; None if they did not wait.
        waiting: calls that wait.
    """

    rate: float = 0.0
    left: float | None = None
    bound_by: str | None = None
    waiting: int = 0

    def words(self) -> list[str]:
        """Return how fast it goes, and how long it will take, in words."""
        words = [f"{rounded(self.rate)}/s"] if self.rate else []
        return [*words, f"{duration(self.left)} left"] if self.left else words


class Outlook:
    """Observe a limiter at work, from now on.

    Args:
        limiter: the limiter to observe.
        clock: seconds.
    """

    def __init__(self, limiter: Limiter, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = limiter
        self._clock = clock
        self._samples = deque([(clock(), 0)])
        self._waits: dict[str, float] = {}
        self._bound_by: str | None = None

    def snapshot(self, done: int, *, left: Mapping[str, float] | None) -> Snapshot:
        """Judge by what is done, and by what is left: items, requests, tokens.

        ``left["items"]`` is counted like ``done``. From the amounts of resources follows how long
        the limits will take at least, even before anything is done.
        """
        statistics = self._limiter.statistics()
        waits = {name: wait.seconds for name, wait in statistics.waits.items()}
        new_waits = {name: seconds - self._waits.get(name, 0.0) for name, seconds in waits.items()}
        if any(new_waits.values()):
            self._bound_by = max(new_waits, key=new_waits.__getitem__)
            self._waits = waits
        elif not statistics.waiting:
            self._bound_by = None
        rate = self._rate(done)
        return Snapshot(
            rate,
            None if left is None else self._seconds_left(rate, left),
            "a pause" if statistics.paused else self._bound_by,
            statistics.waiting,
        )

    def _rate(self, done: int) -> float:
        now, samples = self._clock(), self._samples
        while len(samples) > 1 and samples[1][0] <= now - _RATE_SPAN:
            samples.popleft()
        since, before = samples[0]
        if now - samples[-1][0] >= _SAMPLE_INTERVAL:
            samples.append((now, done))
        return (done - before) / (now - since) if now > since else 0.0

    def _seconds_left(self, rate: float, left: Mapping[str, float]) -> float | None:
        """Return the longer of the estimates from experience and from the limits."""
        items = left.get("items", 0.0)
        seconds = 0.0
        for use in self._limiter.statistics().limits:
            more = left.get(use.limit.resource, 0.0) - max(0, use.available)
            seconds = max(seconds, more * use.limit.per / use.limit.amount)
        if rate > 0:
            return max(seconds, items / rate)
        return seconds or None if items else 0.0


def duration(seconds: float) -> str:
    """Return a time in words: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 100:  # noqa: PLR2004 - below, seconds matter
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:  # noqa: PLR2004 - as above
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"
