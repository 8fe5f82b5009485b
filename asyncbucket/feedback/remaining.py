"""What the provider says is left of a limit, and what other programs on the same key take of it.

Only the provider knows what others spend. `Remaining` keeps what its replies say between them: our
own bookings lower it, time raises it, the next reply corrects it.

*The level.* A reply arrives late: what we sent after the call that it answers may be in its number
or not. And the number may be rounded down. So a reply names an interval; what we expected is moved
into it, no further. While we are alone, the expectation lies inside, and nothing happens. If less
came back than the limit would bring (`_missing`, a low-pass filter over a quarter of the window),
less is expected. This is the integral part of a controller whose proportional part is the level.

*The reserve.* A bucket refills steadily. So if it is known to be one, two of the largest bursts of
others stay untouched, and all else is ours. But in a log of the last minute, or a minute of the
clock, nothing comes back for a long time, and whoever takes all that is left leaves nothing to
others until then. So `Others` estimates what they take of a whole window, and in every window we
take the rest, evenly. Whichever way it is counted, others have taken at least (1) what is used
beyond what we booked in the last window, and (2) if nothing came back, the amount by which less is
left than at some earlier moment, beyond our bookings since. The larger of these is exact for a log
and for minutes of the clock. On top there is a margin for chance: the number of calls that come
independently has a variance equal to its mean.

Others take no more than what is missing: a provider's bucket may be smaller than the limit that it
announces, and what nobody took never comes back.

If no reply comes for two windows, everything is forgotten. So no header holds a call up for longer.
The constants were found by simulating buckets, logs and minutes of the clock, with others at 0 to 60 %.
"""

from dataclasses import replace
from math import isqrt
from typing import Final

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Window

#: Less than this fraction (1/32) of the limit is noise: calls may arrive in another order.
_NOISE: Final = 32
#: What is missing is smoothed over this fraction (1/4) of the window; others' rate is computed over
#: at least half as much.
_SMOOTHING: Final = 4
#: If no more than this fraction (1/5) of the limit was ever left, the level says all: what does not
#: come back may never have been there. A bucket that is proven may be as small as the noise.
_SMALL: Final = 5
#: A report counts for this many windows, and what others take is a mean over as many.
_MEMORY: Final = 2
#: A little always passes, because its replies tell more: 1/20 of the limit per window.
_LEAST: Final = 20
#: By how much (ns) a provider may count a call later than we do.
_LATE: Final = 100_000_000
#: Where calls are to come evenly, this fraction (1/10) of a window's worth may pass at once.
_AT_ONCE: Final = 10


class Remaining:
    """Say when what is left suffices for a call. Levels are in units times window, hence exact.

    Args:
        limit: the limit, ours.
        with_reserve: whether to estimate what others take: a short observation does not tell how
            much they take in a day.
    """

    def __init__(self, limit: Limit, *, with_reserve: bool) -> None:
        self.amount, self.window = limit.units, limit.window
        #: How the provider counts, as far as that is proven: see `ProviderMeter.kind`.
        self.kind: str | None = None
        #: What was left at ``_level_at``, as far as is known; None before the first report.
        self._level: int | None = None
        self._level_at = self._last_report = 0
        self._proven = 0
        #: By how much less than the limit comes back per window, and what is expected to come back.
        self._missing = 0
        self._growth = limit.units
        #: What the latest report said was left, at least, and the most that was ever left.
        self._reported_left = self._most_left = 0
        #: Units that we booked, in the last window and ever.
        self._ours = Window(replace(limit, burst=limit.amount, resets=None))
        self._booked = 0
        #: What others take of the limit.
        self.others = Others(limit.units, limit.window) if with_reserve else None
        #: Until when our bookings reach if spread evenly, and when we last booked.
        self._spread_until = self._last_booking = 0

    def hear(
        self,
        left: int,
        now: int,
        amount: int,
        since: int,
        *,
        proven: int = 0,
        ours: int = 0,
        rounding: int = 0,
    ) -> None:
        """Correct the expectation by what a reply says.

        Args:
            left: units left, as the provider says.
            now: the instant.
            amount: the limit, the provider's or ours, whichever is lower.
            since: when the call was sent that the reply answers.
            proven: the size of the provider's bucket, or 0.
            ours: what it lacks because of us.
            rounding: by how many units ``left`` may have been rounded down.
        """
        if amount != self.amount:  # what was expected under the old one no longer counts
            self.amount = amount
            self._ours.reshape(replace(self._ours.limit, amount=amount, burst=amount), now)
            self._level, self._missing = None, 0
        before = self._last_report if self._level is not None else now
        booked_since = sum(units for date, units in self._ours.entries() if date > since)
        back = -(-self.amount * max(0, now - since) // self.window)
        low, high = left - booked_since, min(left + rounding + back, proven or left + self.amount)
        expected = self._expected_level(now)
        if expected is None or proven != self._proven:
            most = (
                min(proven - ours, left + back - booked_since) - self.amount * _LATE // self.window
            )
            expected = self.window * max(low, most if proven else low)
        self._proven = proven
        self._most_left = proven or min(amount, max(self._most_left, high))
        self._correct(expected, low, high, now, _NOISE if proven else _SMALL)
        if self.others is not None:
            ours = amount - self._ours.available(now)
            taken = max(amount - ours, left) - high  # its limit may be far above ours
            used, uncertainty = -high - self._booked, booked_since + rounding
            self.others.update(used, now, before, taken, uncertainty, at_most=self._missing)

    def _correct(self, expected: int, low: int, high: int, now: int, small: int) -> None:
        """Move the level into the interval that a reply names, and update what is missing."""
        self._reported_left = low
        self._level = min(max(expected, low * self.window), high * self.window)
        since_report = now - self._last_report + self.window // _SMOOTHING
        shortfall = (expected - self._level) // since_report
        self._missing = min(self.amount, max(0, self._missing + shortfall))
        if self._most_left * small < self.amount:
            self._missing = 0
        self._level_at = self._last_report = now
        self._growth = max(self.amount - self._missing, self.amount // _LEAST, 1)

    def earliest(self, amount: int, now: int) -> int:
        """Return when ``amount`` may pass, if nothing else is booked or heard."""
        needed = self._needed_level(amount)
        level = self._expected_level(now, needed)
        if level is None:
            return now
        when = now
        if needed > level and self.kind != "window":  # nothing flows in to those
            when = max(now, self._level_at) - -(needed - level) // self._growth
        reserve = self._reserve(amount)
        if reserve:
            when = max(when, self._earliest_evenly(amount, now, reserve))
        return min(when, self._last_report + _MEMORY * self.window)

    def _earliest_evenly(self, amount: int, now: int, reserve: int) -> int:
        """Return when ``amount`` may pass so that we take evenly what others leave."""
        amount = min(amount, self.amount)
        cost = amount * self.window // (self.amount - reserve)
        even = self._spread_until - max(0, self.window // _AT_ONCE - cost)
        when = max(even, self._ours.earliest(amount + reserve, now))
        return min(when, self._last_booking + self.window // _LEAST)

    def book(self, amount: int, when: int) -> None:
        """Take ``amount`` at ``when``, whether or not it may pass."""
        level = self._expected_level(when, self._needed_level(amount))
        if level is not None:
            self._level = level - amount * self.window
            self._level_at = max(self._level_at, when)
        self._booked += amount
        self._ours.book(amount, when)
        # What is spread evenly reaches no further than a window.
        until = max(self._spread_until, when) + self._spacing(amount)
        self._spread_until = min(until, when + self.window)
        self._last_booking = when

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """Give back what was booked at ``when``; what was before the latest report is counted in it."""
        if self._level is not None and when >= self._last_report:
            self._level += amount * self.window
        self._booked -= amount
        self._ours.unbook(amount, when, left=left)
        self._spread_until -= self._spacing(amount)

    def available(self, now: int) -> int:
        """Return what is left, including any reserve for others."""
        level = self._expected_level(now)
        if level is None:
            return self.amount
        return (level - self._needed_level(0)) // self.window

    def _expected_level(self, now: int, needed: int = 0) -> int | None:
        """Return the level at ``now``; None if no report counts any more.

        It grows to the most that was ever left, or to what a larger call needs, so every call can
        pass.
        """
        level, at = self._level, self._level_at
        if level is None or now >= self._last_report + _MEMORY * self.window:
            return None
        if now <= at:
            return level
        return min(
            level + (now - at) * self._growth, max(level, self._most_left * self.window, needed)
        )

    def _needed_level(self, amount: int) -> int:
        """Return the level at which ``amount`` may pass."""
        if self.kind == "bucket" and self.others is not None and self.others.estimate:
            amount += min(2 * (self.others.at_once + amount), self._most_left // 2)
        return amount * self.window

    def _reserve(self, amount: int) -> int:
        """Return what is left to others in a window, if calls cost about ``amount``."""
        if self.others is None or not self.others.estimate or self.kind == "bucket":
            return 0
        others = self.others.estimate
        reserve = others + isqrt(3 * others * max(amount, self.others.at_once // 4, 1))
        if self._reported_left >= reserve + self.amount:  # there is enough for all
            return 0
        return max(0, min(reserve, self.amount - max(amount, self.amount // _LEAST)))

    def _spacing(self, amount: int) -> int:
        """Return the time (ns) between calls of ``amount`` in an even flow."""
        return amount * self.window // max(1, self.amount - self._reserve(amount))


class Others:
    """Estimate what others take in a window: what they must have taken, however it is counted."""

    def __init__(self, amount: int, window: int) -> None:
        self._window = window
        self._noise = amount // _NOISE
        #: The lowest usage beyond our bookings so far; None before any report.
        self._lowest: int | None = None
        self._lowest_at = 0
        self._mean = 0
        #: How much they take at once, at most; and what was used when we heard last.
        self.at_once = 0
        self._used: int | None = None
        #: Units per window.
        self.estimate = 0

    def update(
        self, used: int, now: int, since: int, in_window: int, uncertainty: int, *, at_most: int
    ) -> None:
        """Take in that ``used`` units or up to ``uncertainty`` more were used beyond our bookings.

        Args:
            used: counted from any zero; only differences matter.
            now: the instant.
            since: when the report before this one came.
            in_window: how much of it lies in the last window, at least.
            uncertainty: what we booked recently, which those numbers may or may not include.
            at_most: what comes back in a window less than the limit would bring.
        """
        jump = 0 if self._used is None else used - self._used - uncertainty
        faded = self.at_once * (now - since) // self._window
        self._used, self.at_once = used, max(jump, self.at_once - faded, 0)
        if self._lowest is None or used + uncertainty <= self._lowest:  # that much has come back
            self._lowest, self._lowest_at = used + uncertainty, now
        latest = 0 if in_window <= self._noise else in_window + uncertainty // 2
        taken = used - self._lowest
        if taken > self._noise:
            elapsed = max(now - self._lowest_at, self._window // _SMOOTHING // 2)
            latest = max(latest, (taken + uncertainty // 2) * self._window // elapsed)
        latest = min(latest, at_most)
        # The estimate rises faster than it falls.
        memory = self._window // 2 if latest > self._mean else _MEMORY * self._window
        self._mean += (latest - self._mean) * (now - since) // (memory + now - since)
        self.estimate = max(latest, self._mean)
