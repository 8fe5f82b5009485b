"""Nobody passes for a while, and then few at first: a meter of instants, not of units."""

import math
from typing import ClassVar, Final

from asyncbucket.engine.interfaces import PauseMeter
from asyncbucket.engine.meters import NEVER

#: A slow start proceeds in steps, each a 16th of the pause, at most a quarter of a second,
_STEPS: Final = 16
_LONGEST_STEP: Final = 250_000_000
#: and is over after this many calls.
SLOW_CALLS: Final = 256


class Pause(PauseMeter):
    """Let nobody pass before ``until``; a slow start after it lets calls in gradually.

    The n-th call of a slow start may pass log2(n) steps after the end of the pause: one call at
    first, and twice as many in each step. During a slow start, ``until`` is the next call's
    instant.
    """

    bound_by: ClassVar[str | None] = "paused"
    kept = ("until", "_start", "step", "_calls")

    def __init__(self) -> None:
        self.until = 0
        #: Why, for people.
        self.reason = ""
        self._start = 0
        #: The length of a step (ns); 0 while there is no slow start.
        self.step = 0
        self._calls = 1

    def begin(self, until: int, now: int, *, gradually: bool, reason: str = "") -> None:
        """Pause until ``until``; an earlier pause that ends later stays, with its slow start."""
        if until > max(now, self.until):
            self.until = self._start = until
            self.reason = reason
            self.step = min((until - now) // _STEPS, _LONGEST_STEP) if gradually else 0
            self._calls = 1

    def end(self, now: int) -> None:
        """End it at ``now``, with its slow start."""
        self.until, self.step = min(self.until, now), 0

    def earliest(self, amount: int, since: int, *, back: int = 0) -> int:  # noqa: ARG002 - all calls are alike
        """See `asyncbucket.engine.meters.Meter.earliest`."""
        return max(since, self.until)

    def book(self, amount: int, when: int) -> None:  # noqa: ARG002 - all calls are alike
        """See `asyncbucket.engine.meters.Meter.book`: the next call of a slow start has its own instant."""
        if self.step:
            self._advance(1)

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - all calls are alike
        """See `asyncbucket.engine.meters.Meter.unbook`."""
        if self.step:
            self._advance(-1)

    def owe(self, amount: int, when: int) -> None:
        """See `asyncbucket.engine.meters.Meter.owe`: nothing is owed to a pause."""

    def redate(self, amount: int, when: int, now: int) -> None:
        """See `asyncbucket.engine.meters.Meter.redate`: a step of a slow start is not moved."""

    def available(self, now: int) -> int:
        """See `asyncbucket.engine.meters.Meter.available`."""
        return 0 if self.until > now else NEVER

    def _advance(self, calls: int) -> None:
        if self._calls >= SLOW_CALLS:
            self.step = 0
            return
        self._calls = max(1, self._calls + calls)
        self.until = self._start + int(self.step * math.log2(self._calls))
