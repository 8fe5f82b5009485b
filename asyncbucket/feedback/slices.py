"""A limit that is counted in slices of its window: 60,000 a minute as 1,000 a second.

What is left of a slice is lost when it ends, and the next one is full again. So a report of what is
left says a lot if it is known when slices begin, and nothing once the next slice has begun.

*When they begin.* If a limit is saturated, reports of what is left fall and fall; then, between two
reports, they jump up by more than could have flowed in: a slice began in between. `Beat`
superimposes such intervals, a slice's length apart. What they have in common soon is narrow, and
later ones fit, or there are no such slices. (A sliding second shows no beat, nor does a bucket of a
second's worth.)

*What others take.* In a slice they have taken at least what is used beyond our bookings in it. This
amount over the latest slices, divided by how much of them had passed, is their rate. It predicts
what they take from the latest report until the end of the slice. That is left to them, plus a
margin for chance, and the rest is ours. Later in a slice less is unknown, so some of our calls go
only then, and what others did not use is not lost. Every call of ours brings a report, so our calls
come evenly, and after a long silence one goes even if little is left.

*Until that is known*, for as long as it takes to find the slices (`are_searched`), half of a share
passes in any slice's length, evenly: others are unknown then, and if they take less than the other
half, nobody is refused. If no slice is found, the whole share passes, half of it at once.

*When there are none.* What is booked in a slice stays missing until it ends. So units may come back
once in a slice's length, when the next one begins. If they come back more often, the provider keeps
a small bucket that refills all the time (`are_refuted`).

The constants below were found by simulation: limits of 30 to 6,000, slices of a 6th of a second to
ten seconds, replies up to 80 ms on the way, others that come evenly or at random and take 10 to 60
%. An estimate of what others take of slices whose beginning is unknown, a larger margin for others
with more of a slice to come, and wider spacing while others are active made no difference in them.
"""

import math
from typing import Final

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Window

#: For network jitter our slices are longer by 1/64. (`Window` adds up to half as much.)
_ROOM: Final = 64
#: What we send within this fraction (1/8) of a slice before its end may arrive in the next one, and
#: a report that comes as soon after its beginning may be about the last one.
_TRANSIT: Final = 8
#: Reports are early or late by this fraction (1/32) of a slice; clocks drift apart by the other.
_JITTER: Final = 32
_DRIFT: Final = 1_024
#: A jump is at least this fraction (1/4) of a slice's share.
_JUMP: Final = 4
#: The beat is sure when this many jumps fit; the count stops at the other number.
_FITS: Final = 2
_MOST_FITS: Final = 8
#: After listening for this many slices without a beat, there are taken to be none.
_PATIENCE: Final = 8
#: Units come back if, in this fraction (1/4) of a slice, at least the same fraction of what we
#: booked does.
_QUARTER: Final = 4
#: Others' rate is a mean over this many slices, and is known after this much of one.
_MEMORY: Final = 24
_ENOUGH: Final = 0.8
#: Others are active if they take at least this fraction (1/16) of a slice.
_BUSY: Final = 16


class Beat:
    """Find out when slices begin, from reports of what is left of them."""

    def __init__(self, share: int, length: int) -> None:
        self._share = share
        self._length = length
        self._jitter = length // _JITTER
        #: A slice began between these, as far as is known; and how many jumps fit.
        self._early = self._late = 0
        self.fits = 0
        #: What was left by the latest report, and when it came.
        self.left: int | None = None
        self._last_report = 0

    @property
    def is_sure(self) -> bool:
        """Whether it was heard again where it was expected."""
        return self.fits >= _FITS

    @property
    def uncertainty(self) -> int:
        """For how many ns it is uncertain whether the next slice has begun."""
        return self._late - self._early

    def nearest(self, when: int) -> int:
        """Return when the slice that begins nearest to ``when`` has certainly begun."""
        return self._late + self._slices_in(when - self._late) * self._length

    def update(self, remaining: int, now: int) -> None:
        """Take in a report of what is left of a slice."""
        left, last_report = self.left, self._last_report
        self.left, self._last_report = remaining, now
        if left is None or now - last_report >= self._length // 2:
            return
        refilled = (now - last_report) * self._share // self._length
        min_jump = max(self._share // _JUMP, min(2, self._share))  # replies may overtake each other
        if remaining - left - refilled >= min_jump:
            self._narrow(last_report - self._jitter, now + self._jitter)

    def _narrow(self, early: int, late: int) -> None:
        slices = self._slices_in((early + late - self._early - self._late) // 2)
        moved, drift = slices * self._length, slices * self._length // _DRIFT
        overlap = max(early, self._early + moved - drift), min(late, self._late + moved + drift)
        if self.fits and overlap[1] - overlap[0] >= 2 * self._jitter:
            self._early, self._late = overlap
            self.fits = min(self.fits + 1, _MOST_FITS)
            return
        self.fits -= 2
        if self.fits <= 0:
            self._early, self._late, self.fits = early, late, 1

    def _slices_in(self, span: int) -> int:
        return (span + self._length // 2) // self._length


class Slices:
    """Admit no more than its share in any slice of a window, or one call that is larger.

    Args:
        share: units in a slice.
        length: how long a slice is (ns).
        last_report: when the report before the first came; then, if there was none.
    """

    def __init__(self, share: int, length: int, last_report: int) -> None:
        self.share = share
        self._length = length
        per = (length + length // _ROOM) / 1_000_000_000
        self._window = Window(Limit("units", share, per=per, burst=share))
        #: Until when our bookings reach if spread evenly.
        self._spread_until = 0
        #: When the latest report came, and for how long we have listened.
        self._last_report = last_report
        self._observed = 0
        #: When a quarter of a slice began, what was left then, and what we booked in it.
        self._quarter_began = self._left_then = 0
        self._booked = 0
        #: In how many of them units came back.
        self._refills = 0
        self._beat = Beat(share, length)
        #: When this slice ends; 0 as long as no beat was heard.
        self._slice_end = 0
        #: Units that we booked in it, and those that may count in the next one as well.
        self._ours = self._ours_next = 0
        #: Units that others took of it, and when that was reported.
        self._others_taken = self._reported_at = 0
        #: Units that others took of the latest slices, and how much of them we saw, in slices.
        self._others_seen = self._slices_seen = 0.0

    @property
    def are_known(self) -> bool:
        """Whether it is known when slices begin, and what others take of them."""
        return self._beat.is_sure and self._slices_seen >= _ENOUGH

    @property
    def are_searched(self) -> bool:
        """Whether that may still be found out."""
        return 0 < self._observed < _PATIENCE * self._length

    @property
    def are_refuted(self) -> bool:
        """Whether units came back more often than slices can have begun."""
        return self._refills > self._observed // self._length + 2

    @property
    def _reserve(self) -> int:
        """What is left to others in a slice's length as long as that is being found out."""
        return self.share // 2 if self.are_searched and not self.are_known else 0

    @property
    def _others_are_active(self) -> bool:
        """Whether others are active."""
        return self._others_seen * _BUSY >= self.share * self._slices_seen

    def taken_by_others(self, left: int, now: int) -> int:
        """Return what others have taken of a slice, at least, if ``left`` is left of it."""
        return self._window.available(now) - left

    def update(self, low: int, remaining: int, high: int, now: int) -> None:
        """Take in a report that ``remaining`` is left of a slice, from ``low`` to ``high`` in truth."""
        self._observed += min(now - self._last_report, self._length)
        self._last_report = now
        if now - self._quarter_began >= self._length // _QUARTER:
            back = low + self._booked - self._left_then
            self._refills += back * _QUARTER >= self._booked > 0
            self._quarter_began, self._left_then, self._booked = now, high, 0
        says_more = remaining or self._beat.left  # once nothing is left, others get no more
        self._beat.update(remaining, now)
        self._begin_slice(now)
        begun = self._slice_end - self._length + self._length // _TRANSIT
        if self._slice_end and now >= begun and says_more:
            self._others_taken = max(self._others_taken, self.share - remaining - self._ours)
            self._reported_at = now

    def earliest(self, amount: int, now: int) -> int:
        """See `Headroom.earliest`; one call passes in every slice, whatever others take."""
        cost = self._spacing(amount)
        is_even = self.are_searched or (self.are_known and self._others_are_active)
        at_once = cost if is_even else max(cost, self._window.window // 2 - cost)
        if amount > self.share:
            amount, at_once = self.share, 0
        when = max(now, self._spread_until - at_once)
        if not self.are_known:
            return self._window.earliest(min(amount + self._reserve, self.share), when)
        return when if when >= self._slice_end else self._earliest_in_slice(amount, when)

    def book(self, amount: int, when: int) -> None:
        """See `Headroom.book`."""
        self._begin_slice(when)
        self._booked += amount
        self._ours += amount
        if self._slice_end - when < self._beat.uncertainty + self._length // _TRANSIT:
            self._ours_next += amount
        self._spread_until = max(when, self._spread_until) + self._spacing(amount)
        self._window.book(amount, when)

    def unbook(self, amount: int, when: int) -> None:
        """See `Headroom.unbook`."""
        self._booked -= amount
        if when >= self._slice_end - self._length:
            self._ours -= amount
        self._spread_until -= self._spacing(amount)
        self._window.unbook(amount, when)

    def _begin_slice(self, now: int) -> None:
        """Begin the next slice if it is time."""
        if not self._beat.fits:
            return
        ours = self.share - self._window.available(now)
        if self._slice_end:
            self._slice_end = self._beat.nearest(self._slice_end)  # known better by now, perhaps
            if now < self._slice_end:
                return
            slice_start = self._slice_end - self._length
            self._others_seen += self._others_taken - self._others_seen / _MEMORY
            seen = (self._reported_at - slice_start) / self._length
            self._slices_seen += seen - self._slices_seen / _MEMORY
            ours = self._ours_next
        self._ours, self._ours_next, self._others_taken = ours, 0, 0
        self._slice_end = self._beat.nearest(now + self._length // 2)
        self._reported_at = self._slice_end - self._length

    def _earliest_in_slice(self, amount: int, when: int) -> int:
        """Return from when on this slice has room for ``amount`` and for what others will take."""
        free = self.share - self._ours - amount
        if not self._others_are_active:
            return when if free >= 0 else self._slice_end
        free -= self._others_taken
        others = self._others_seen / self._slices_seen
        others *= (self._slice_end - self._reported_at) / self._length
        if free >= with_small_margin(others, amount) or (free >= 0 and not self._ours):
            return when
        if free >= with_small_margin(others, amount, minimal=True):
            # After half a slice without a report, a call is due that brings one.
            return min(self._slice_end, max(when, self._reported_at + self._length // 2))
        return self._slice_end

    def _spacing(self, amount: int) -> int:
        """Return the time (ns) between calls of ``amount`` in an even flow."""
        if amount > self.share:  # it takes whole slices
            amount = -(-amount // self.share) * self.share
        return amount * self._window.window // (self.share - self._reserve)


def with_small_margin(others: float, amount: int, *, minimal: bool = False) -> int:
    """Return what others take until a slice ends, in whole calls of ``amount``, plus a margin.

    Early in a slice most of it is still to come, and what is left to others in vain is noticed in
    time; late in it little is to come, and what is left in vain is lost. So the margin shrinks, and
    a fraction of a call does not count. ``minimal`` is for a limiter that has heard nothing for long.
    """
    calls = others / amount
    sigma = math.sqrt(calls)
    margin = sigma if minimal else min(3 * sigma, max(calls, 1.25 * sigma))
    return int(calls + margin) * amount
