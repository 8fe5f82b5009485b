"""How fast it goes, how long it will take, and what binds: for whoever watches."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from asyncbucket.limiter import Limiter
from asyncbucket.wording import rounded

#: Seconds over which a rate is taken, and between two samples of it.
_SPAN: Final = 30.0
_APART: Final = 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """What can be said at one instant.

    Attributes:
        rate: items a second, lately; 0 before the first.
        left: seconds until all is done; None where nobody knows.
        bound_by: what calls waited for lately; None if they did not wait.
        waiting: calls that wait.
    """

    rate: float = 0.0
    left: float | None = None
    bound_by: str | None = None
    waiting: int = 0

    def words(self) -> list[str]:
        """Say how fast it goes, and how long it will take."""
        words = [f"{rounded(self.rate)}/s"] if self.rate else []
        return [*words, f"{duration(self.left)} left"] if self.left else words


class Outlook:
    """Watch a limiter at work, from now on.

    Args:
        limiter: what is watched.
        clock: seconds.
    """

    def __init__(self, limiter: Limiter, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = limiter
        self._clock = clock
        self._seen = deque([(clock(), 0)])
        self._waits: dict[str, float] = {}
        self._bound_by: str | None = None

    def look(self, done: int, *, left: Mapping[str, float] | None) -> Look:
        """Judge by how much is done, and how much is left: items, requests, tokens.

        ``left["items"]`` are counted as ``done`` is. Amounts of resources tell how long the limits
        will need at least, before there is any experience.
        """
        statistics = self._limiter.statistics()
        waits = {name: each.seconds for name, each in statistics.waits.items()}
        grown = {name: seconds - self._waits.get(name, 0.0) for name, seconds in waits.items()}
        if any(grown.values()):
            self._bound_by = max(grown, key=grown.__getitem__)
            self._waits = waits
        elif not statistics.waiting:
            self._bound_by = None
        rate = self._rate(done)
        return Look(
            rate,
            None if left is None else self._left(rate, left),
            "a pause" if statistics.paused else self._bound_by,
            statistics.waiting,
        )

    def _rate(self, done: int) -> float:
        now, seen = self._clock(), self._seen
        while len(seen) > 1 and seen[1][0] <= now - _SPAN:
            seen.popleft()
        since, before = seen[0]
        if now - seen[-1][0] >= _APART:
            seen.append((now, done))
        return (done - before) / (now - since) if now > since else 0.0

    def _left(self, rate: float, left: Mapping[str, float]) -> float | None:
        """Return the longer of what experience and the limits say."""
        items = left.get("items", 0.0)
        seconds = 0.0
        for use in self._limiter.statistics().limits:
            more = left.get(use.limit.resource, 0.0) - max(0, use.available)
            seconds = max(seconds, more * use.limit.per / use.limit.amount)
        if rate > 0:
            return max(seconds, items / rate)
        return seconds or None if items else 0.0


def duration(seconds: float) -> str:
    """Return a time as people say it: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 100:  # noqa: PLR2004 - below, seconds say more
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:  # noqa: PLR2004 - likewise
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"
