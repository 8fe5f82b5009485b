"""What the provider says is left: the one meter that hears of calls that we did not make.

Other programs spend from the same key, and only the provider knows how much. Its replies say what
is left of a limit. `Headroom` keeps that number between replies: our own bookings lower it, time
raises it, the next reply corrects it. It stands beside a limit's `Window` and can only hold calls
back; what the user allows at most is the window's business.

How it is corrected. A reply is late: what we sent after the call that it answers may be in its
number or not. And it may be rounded down. So it names an interval, and what we expected is moved
into it, no further. While we are alone, what we expect lies inside, and nothing happens. If it
was too high, others took the difference; if too low, they took less than expected. A low-pass
filter over an eighth of the window (`_others`) makes a rate of these differences, and the headroom
is expected to grow by the limit less that rate. This is the integral part of a controller whose
proportional part is the level itself.

At the edge every call of others between two replies would cost a refusal, so while others are at
work a margin stays untouched: what they take in a 60th of the window, and two calls of the size
asked for, and what is on its way; yet at most a quarter of the most that was ever said to be left.

Providers count by a bucket, as a rule, and there the expectation is exact. One that counts in
short slices (60,000 a minute as 1,000 a second) says that little is left whenever it is asked;
growth up to the most that was ever left, at the limit's rate, is right there too. Where a log or a
fixed window counts, the numbers are right and the growth a guess that each reply mends. When no
reply comes for two windows, all is forgotten: what others took before counts no more.
The numbers above were found by simulation of all of these, with others at 0, 10, 40 and 60 %.
"""

from typing import Final

#: Others are at work when they take at least this part of the limit.
_BUSY: Final = 8
#: The filter's time constant is this part of the window.
_SMOOTHING: Final = 8
#: The margin covers what others take in this part of the window...
_MARGIN: Final = 60
#: ...and so many calls like the one that asks,
_CALLS: Final = 2
#: ...and is at most this part of what was ever left.
_MOST: Final = 4
#: So many windows after the last word, it counts no more.
_MEMORY: Final = 2
#: Growth is never expected to be less than this part of the limit a window, so that some call
#: passes, whose reply tells more.
_LEAST: Final = 20


class Headroom:
    """Admit what the provider says is left. Levels are kept in units times window, hence exact."""

    __slots__ = ("_at", "_heard", "_level", "_most", "_others", "_under_way", "amount", "window")

    def __init__(self, *, amount: int, window: int) -> None:
        self.amount = amount
        self.window = window
        #: What was left at ``_at``, as far as is known; None before any word from the provider.
        self._level: int | None = None
        self._at = 0
        self._heard = 0
        #: What others take in a window.
        self._others = 0
        self._most = 0
        self._under_way = 0

    @property
    def others(self) -> int:
        """Units that others take of the limit in each window, estimated."""
        return self._others

    def hear(
        self, remaining: int, now: int, *, amount: int, under_way: int = 0, rounding: int = 0
    ) -> None:
        """Correct what is expected by what a reply says.

        Args:
            remaining: units left, in the provider's words.
            now: the instant.
            amount: the limit, the provider's or ours, whichever is lower.
            under_way: units that we booked after the call that the reply answers.
            rounding: by how many units it may have been rounded down.
        """
        self.amount = amount
        self._under_way = under_way
        self._most = min(amount, max(self._most, remaining + rounding + 1))
        low = (remaining - under_way) * self.window
        high = (remaining + rounding) * self.window
        expected = self._expect(now)
        if expected is None:
            self._level, self._others = low, 0
        else:
            self._level = min(max(expected, low), high)
            taken = (expected - self._level) // (
                now - self._heard + _MEMORY * self.window // _SMOOTHING
            )
            self._others = min(amount, max(0, self._others + taken))
        self._at = self._heard = now

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:
        """See `asyncbucket.meters.Meter.earliest`; whatever comes ``back`` may bring better news."""
        needed = self._needed(amount)
        level = self._expect(now, needed)
        if level is None or back:
            return now
        missing = needed - level
        if missing <= 0:
            return now
        return min(
            max(now, self._at) - -missing // self._growth, self._heard + _MEMORY * self.window
        )

    def take(self, amount: int, now: int) -> bool:
        """See `asyncbucket.meters.Meter.take`."""
        if self.earliest(amount, now) > now:
            return False
        self.book(amount, now)
        return True

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.meters.Meter.book`."""
        level = self._expect(when)
        if level is not None:
            self._level = level - amount * self.window
            self._at = max(when, self._at)

    def owe(self, amount: int, now: int) -> None:
        """See `asyncbucket.meters.Meter.owe`."""
        self.book(amount, now)

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - units are alike
        """See `asyncbucket.meters.Meter.unbook`; the last word counts what was booked before."""
        if self._level is not None and when >= self._heard:
            self._level += amount * self.window

    def available(self, now: int) -> int:
        """See `asyncbucket.meters.Meter.available`."""
        level = self._expect(now)
        if level is None:
            return self.amount
        return (level - self._needed(0)) // self.window

    @property
    def _growth(self) -> int:
        """Units that are expected to come back in each window; a ns brings so many levels."""
        return max(self.amount - self._others, self.amount // _LEAST, 1)

    def _expect(self, now: int, needed: int = 0) -> int | None:
        """Return the level at ``now``; None if nothing that was heard counts any more.

        It grows to the most that was ever left, or to what a larger call needs: none is impossible.
        """
        if self._level is None or now >= self._heard + _MEMORY * self.window:
            return None
        grown = self._level + max(0, now - self._at) * self._growth
        return min(grown, max(self._level, self._most * self.window, needed))

    def _needed(self, amount: int) -> int:
        """Return the level at which ``amount`` may pass."""
        margin = 0
        if self._others * _BUSY >= self.amount:
            margin = self._others // _MARGIN + _CALLS * amount + self._under_way
        return (amount + min(margin, self._most // _MOST)) * self.window
