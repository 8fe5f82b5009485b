"""What the provider says is left: the one meter that learns of calls that we did not make.

Other programs spend from the same key, and only the provider knows how much. Its replies say what
is left of a limit. `Headroom` keeps that number between replies: our own bookings lower it, time
raises it, the next reply corrects it. It stands beside a limit's `Window`, and can only hold calls
back: the window enforces what the user allows.

*The level.* A reply arrives late: what we sent after the call that it answers may be in its number
or not. And the number may be rounded down. So a reply names an interval; what we expected is moved
into it, no further. While we are alone, the expectation lies inside, and nothing happens. If less
came back than the limit would bring (`_missing`, a low-pass filter over a quarter of the window),
the expected growth is reduced. This is the integral part of a controller whose proportional part is
the level. While something is missing, a margin of the level stays untouched: near zero, every call
that others make between two replies would cost a refusal.

*The reserve.* The level is enough for a bucket, which refills steadily. But if the provider counts
a log of the last minute, or a minute of the clock, nothing comes back for a long time, and whoever
takes all that is left leaves nothing to others until then. So `Others` estimates what they will
take of a whole window, and in every window we take the rest, evenly. Nobody says how a provider
counts. But whichever way it is, others have taken at least (1) what is used beyond what we booked
in the last window, and (2) if nothing came back, the amount by which less is left than at some
earlier moment, beyond our bookings since. The larger of these is exact for a log and for minutes of
the clock, and too low for a bucket, for which the level is enough. On top there is a margin for
chance: the number of calls that come independently has a variance equal to its mean.

Both take for granted that a window's worth is left when nobody calls. A provider's bucket may be
smaller than the limit that it announces: then little is left although nobody else is there, and
what nobody took never comes back. So others take no more than what is missing: as long as all
comes back at the limit's rate, or all that was ever left is left, nobody else is there.

*Slices.* Providers may count in shorter slices than they say, 60,000 a minute as 1,000 a second,
and report what is left of a slice. Reports are taken to be of a slice as long as they never exceed
what a slice holds. Then no more than that passes in any time as long as a slice, whenever slices
begin, less what others take of one (`Slices`): half at first, then a mean of the most that was ever
missing within a slice's length, and a margin. (To find out when slices begin, from where the numbers
jump, would use two to four percent more of a limit, and refuse as much.)

In the first window, and whenever others are active, calls come evenly, at most a tenth of the limit
at once: otherwise everything would be spent before anything was heard.

If no reply comes for two windows, everything is forgotten: what others took before no longer
counts. The constants below were found by simulating buckets, logs, minutes of the clock and slices,
with others at 0, 10, 40 and 60 %.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Meter, Window

#: Less than this fraction (1/32) of the limit is noise: calls may arrive in another order.
_NOISE: Final = 32
#: What is missing is smoothed over this fraction (1/4) of the window; others' rate is computed over
#: at least half as much.
_SMOOTHING: Final = 4
#: The margin covers what is missing in this fraction (1/60) of the window...
_MARGIN: Final = 60
#: ...and this many calls like the one that asks,
_MARGIN_CALLS: Final = 2
#: ...but at most this fraction (1/4) of the most that was ever left.
_MAX_MARGIN: Final = 4
#: For a window longer than this (ns) only the level counts: a short observation does not tell how
#: much others take in a day.
_LONG: Final = 120_000_000_000
#: A report counts for this many windows, and what others take is a mean over as many.
_MEMORY: Final = 2
#: A little always passes, because its replies tell more: 1/20 of the limit per window.
_LEAST: Final = 20
#: Where calls are to come evenly, this fraction (1/10) of a window's worth may pass at once.
_AT_ONCE: Final = 10
#: A limit may be counted in this many slices of its window: seconds of a minute, or ten seconds.
_SLICE_COUNTS: Final[tuple[int, ...]] = (60, 6)
#: Windows as long as these (ns) may be.
_SLICED: Final = range(1_000_000_000, _LONG + 1)
#: For network jitter our slices are longer by 1/64. (`Window` adds up to half as much.)
_ROOM: Final = 64
#: What others take of a slice is a mean over so many of each kind, and nothing below this fraction
#: (1/16).
_SLICES: Final[dict[int, int]] = {60: 8, 6: 2}
_BUSY: Final = 16
#: Units come back if, in this fraction (1/4) of a slice, at least the same fraction of what we
#: booked does.
_QUARTER: Final = 4


def share_of(amount: int, slices: int = _SLICE_COUNTS[0]) -> int:
    """Return the units in one slice of ``amount``, by default in one of the shortest slices."""
    return -(-amount // slices)


class Headroom(Meter):
    """Admit what the provider says is left of a limit. Levels are in units times window, hence exact.

    Args:
        limit: the limit, ours.
        ours: what we booked before the first report and no open call can give back: (date, units).
    """

    def __init__(self, limit: Limit, ours: Iterable[tuple[int, int]] = ()) -> None:
        self.key = limit.key
        self.amount = limit.units
        self.window = limit.window
        #: What was left at ``_level_at``, as far as is known; None before the first report.
        self._level: int | None = None
        self._level_at = 0
        #: When the latest report was heard, and the first.
        self._last_report = self._first_report = 0
        #: By how much less than the limit comes back per window, and what is expected to come back.
        self._missing = 0
        self._growth = limit.units
        #: What is left untouched while something is missing.
        self._margin = 0
        #: What the latest report said was left, at least, and the most that was ever left.
        self._reported_left = 0
        self._most_left = 0
        #: Units that we booked, in the last window and ever.
        self._ours = Window(replace(limit, burst=limit.amount, resets=None))
        for when, units in ours:
            self._ours.book(units, when)
        self._booked = 0
        #: What others take of the limit.
        self.others = Others(limit.units, limit.window)
        #: Until when our bookings reach if spread evenly, and when we last booked.
        self._spread_until = self._last_booking = 0
        self._is_long = limit.window > _LONG
        #: The provider's limit, if it is higher than ours.
        self._provider_limit = limit.units
        #: In how many slices the provider may count, and the shortest of these slices, if any.
        self._slice_counts = _SLICE_COUNTS if limit.window in _SLICED else ()
        self._slices: Slices | None = None

    def update(
        self,
        remaining: int,
        now: int,
        *,
        amount: int,
        limit: int | None = None,
        booked_since: int = 0,
        lent: int = 0,
        rounding: int = 0,
    ) -> None:
        """Correct the expectation by what a reply says.

        Args:
            remaining: units left, as the provider says.
            now: the instant.
            amount: the limit, the provider's or ours, whichever is lower.
            limit: the provider's limit, if it says so; a slice holds a fraction of it.
            booked_since: units that we booked after the call that the reply answers.
            lent: units that calls in flight may still give back.
            rounding: by how many units ``remaining`` may have been rounded down.
        """
        if self._level is None:
            self._first_report = self._last_report = now
        since = self._last_report
        self._adopt_limit(amount, limit, now)
        low, high = remaining - booked_since, remaining + rounding
        self._update_slices(low, remaining, high, now)
        self._correct(low, high, now)
        if not (self._is_long or self._slices):
            ours = amount - self._ours.available(now)
            in_window = max(amount - ours, remaining) - high  # its limit may be far above ours
            uncertainty = max(booked_since, lent) + rounding
            used = -high - self._booked
            self.others.update(used, now, since, in_window, uncertainty, at_most=self._missing)

    def _adopt_limit(self, amount: int, limit: int | None, now: int) -> None:
        """Adopt another limit; what was expected under the old one no longer counts."""
        if amount != self.amount:
            self.amount = amount
            self._ours.reshape(replace(self._ours.limit, amount=amount, burst=amount), now)
            self._level = None
            self.others = Others(amount, self.window)
        provider_limit = max(limit or self._provider_limit, amount)
        if provider_limit != self._provider_limit:
            self._provider_limit = provider_limit
            self._slices = None  # of another size, if there are any

    def _update_slices(self, low: int, remaining: int, high: int, now: int) -> None:
        """Tell the slices; rule out those that are too short for the report."""
        if self._slices is not None:
            self._slices.update(low, remaining, high, now)
            if self._slices.spare_refills < 0:
                self._slice_counts = ()
        limit, before = self._provider_limit, self._slice_counts
        self._slice_counts = tuple(n for n in before if remaining <= share_of(limit, n))
        if self._slice_counts != before or not before:
            self._slices = None
        if self._slice_counts and self._slices is None:
            count = self._slice_counts[0]
            self._slices = Slices(share_of(limit, count), self.window // count, _SLICES[count], now)
            self._slices.update(low, remaining, high, now)

    def _correct(self, low: int, high: int, now: int) -> None:
        """Move the level into the interval that a reply names, and update what is missing."""
        self._reported_left = low
        self._most_left = min(self.amount, max(self._most_left, high))
        expected = self._expected_level(now)
        if expected is None:
            self._level, self._missing = low * self.window, 0
        else:
            self._level = min(max(expected, low * self.window), high * self.window)
            # What we took of a slice ourselves comes back at once, later.
            is_ours = self._slices is not None and self._slices.taken_by_others(high, now) <= 0
            if not (is_ours and expected > self._level):
                since_report = now - self._last_report + self.window // _SMOOTHING
                shortfall = (expected - self._level) // since_report
                self._missing = min(self.amount, max(0, self._missing + shortfall))
        self._growth = max(self.amount - self._missing, self.amount // _LEAST, 1)
        is_missing = self._missing * _NOISE >= self.amount
        self._margin = max(1, self._missing // _MARGIN) if is_missing else 0
        self._level_at = self._last_report = now

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:
        """See `asyncbucket.engine.meters.Meter.earliest`; with ``back``, now: a reply may bring good news."""
        needed = self._needed_level(amount)
        level = self._expected_level(now, needed)
        if level is None or back:
            return now
        when = now
        if needed > level:
            when = max(now, self._level_at) - -(needed - level) // self._growth
        reserve = self._reserve(amount)
        if reserve or (now < self._first_report + self.window and not self._is_long):
            when = max(when, self._earliest_evenly(amount, now, reserve))
        if self._slices:
            when = max(when, self._slices.earliest(amount, now))
        return min(when, self._last_report + _MEMORY * self.window)

    def _earliest_evenly(self, amount: int, now: int, reserve: int) -> int:
        """Return when ``amount`` may pass so that we take evenly what others leave."""
        amount = min(amount, self.amount)
        cost = amount * self.window // (self.amount - reserve)
        even = self._spread_until - max(0, self.window // _AT_ONCE - cost)
        when = max(even, self._ours.earliest(amount + reserve, now))
        return min(when, self._last_booking + self.window // _LEAST)

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.engine.meters.Meter.book`."""
        level = self._expected_level(when, self._needed_level(amount))
        if level is not None:
            self._level = level - self._share(amount) * self.window
            self._level_at = max(self._level_at, when)
        self._booked += amount
        self._ours.book(amount, when)
        self._spread_until = max(self._spread_until, when) + self._spacing(amount)
        self._last_booking = when
        if self._slices:
            self._slices.book(amount, when)

    owe = book

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """See `asyncbucket.engine.meters.Meter.unbook`; bookings before the latest report are counted in it."""
        if self._level is not None and when >= self._last_report:
            self._level += self._share(amount) * self.window
        self._booked -= amount
        self._ours.unbook(amount, when, left=left)
        self._spread_until -= self._spacing(amount)
        if self._slices:
            self._slices.unbook(amount, when, left)

    def available(self, now: int) -> int:
        """See `asyncbucket.engine.meters.Meter.available`: what is left, including any reserve for others."""
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
        amount = self._share(amount)
        if self._margin:
            amount += min(self._margin + _MARGIN_CALLS * amount, self._most_left // _MAX_MARGIN)
        return amount * self.window

    def _share(self, amount: int) -> int:
        """Return what ``amount`` takes of the level: at most what a slice holds."""
        return min(amount, self._slices.share) if self._slices else amount

    def _reserve(self, amount: int) -> int:
        """Return what is left to others in a window, if calls cost about ``amount``."""
        others = self.others.estimate
        if not others or self._slices:
            return 0
        reserve = others + math.isqrt(3 * others * max(amount, 1))
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


class Slices:
    """Admit no more than its share in any slice of a window, less what others take of it.

    Args:
        share: units in a slice.
        length: how long a slice is (ns).
        memory: over how many slices to take the mean of what others take.
        now: the instant.
    """

    def __init__(self, share: int, length: int, memory: int, now: int) -> None:
        self.share = share
        self._length, self._memory = length, memory
        per = (length + length // _ROOM) / 1_000_000_000
        self._window = Window(Limit("units", share, per=per, burst=share))
        #: Until when a call that is larger than a slice takes all of it.
        self._full_until = 0
        #: What others take of a slice, as a mean over so many; the most that was ever left.
        self._others = share / 2
        self._most_left = 0
        #: When the latest slice's length began, and the most that others had taken in it.
        self._began, self._most = now, 0
        #: When a quarter of it began, what was left then, and what we booked since.
        self._quarter_began, self._left_then, self._booked = now, 0, 0
        #: How many more quarters may bring units back than slices have begun; if fewer than none,
        #: there are no such slices.
        self.spare_refills = 2  # by chance

    def taken_by_others(self, left: int, now: int) -> int:
        """Return what others have taken of a slice, at least, if ``left`` is left of it."""
        return min(self._window.available(now), self._most_left) - left

    def update(self, low: int, remaining: int, high: int, now: int) -> None:
        """Take in a report that ``remaining`` is left of a slice, from ``low`` to ``high`` in truth."""
        self._most_left = max(self._most_left, remaining)
        if now - self._began >= self._length:
            self._others += (self._most - self._others) / self._memory
            self._began, self._most = now, 0
            self.spare_refills += 1
        self._most = max(self._most, self.taken_by_others(remaining, now))
        if now - self._quarter_began >= self._length // _QUARTER:
            back = low + self._booked - self._left_then
            self.spare_refills -= back * _QUARTER >= self._booked > 0
            self._quarter_began, self._left_then, self._booked = now, high, 0

    def earliest(self, amount: int, now: int) -> int:
        """See `Headroom.earliest`; one call passes in every slice, whatever others take."""
        reserve, others = 0, min(self._others, self._most_left)
        if others * _BUSY >= self.share:
            reserve = int(others + math.sqrt(others * amount))
        due = self._window.earliest(min(amount + reserve, self.share), now)
        return max(due, self._full_until)

    def book(self, amount: int, when: int) -> None:
        """See `Headroom.book`; a call that is larger than a slice takes the next ones, too."""
        self._window.book(amount, when)
        self._booked += amount
        if amount > self.share:
            self._full_until = when - -amount // self.share * self._length

    def unbook(self, amount: int, when: int, left: int) -> None:
        """See `Headroom.unbook`."""
        self._window.unbook(amount, when)
        self._booked -= amount
        if amount + left > self.share:
            slices = -(-(amount + left) // self.share) + -left // self.share
            self._full_until -= slices * self._length
