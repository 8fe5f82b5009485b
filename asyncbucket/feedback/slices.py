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

*Until that is known*, no more than a slice's share passes in any slice's length: half of it at
once, the rest evenly. After the first reply it is half of that, for as long as it takes to find the
slices (`is_searching`): others are unknown then, and if they take less than the other half, nobody is
refused. If no slice is found, what others take is seen as usage beyond ours in a slice's length.
Most reports show too little of it, so a high quantile is left to others.

The constants below were found by simulation: limits of 30 to 6,000, slices of a 6th of a second to
ten seconds, replies up to 80 ms on the way, others that come evenly or at random and take 10 to 60
%.
"""

import math
from typing import Final

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Window
from asyncbucket.feedback.others import with_margin

#: A limit may be counted in this many slices of its window: seconds of a minute, or ten seconds.
SLICE_COUNTS: Final = (60, 6)
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
#: Others' rate is a mean over this many slices, and is known after this much of one.
_MEMORY: Final = 24
_ENOUGH: Final = 0.8
#: Others are active if they take at least this fraction (1/16) of a slice,
_BUSY: Final = 16
#: or this one (1/8) of a slice's length, if the beginning is not known.
_BUSY_UNSEEN: Final = 8
#: A share of fewer units is too small to leave a part to others.
_FEW: Final = 4
#: After half a slice without a report, a call is due that brings one, if there is room.
_SILENCE: Final = 2
#: Our calls come no slower than at this fraction (1/4) of a share per slice.
_LEAST: Final = 4
#: If no beginning is known, others take this quantile of what reports say, over this many slices.
_QUANTILE: Final = 0.8
_FOLLOW: Final = 2


def share_of(amount: int, number: int = SLICE_COUNTS[0]) -> int:
    """Return the units in one slice of ``amount``, by default in one of the shortest slices."""
    return -(-amount // number)


def possible_slices(*, amount: int, window: int) -> tuple["Slices", ...]:
    """Return all the ways in which a limit may be cut into slices, the shortest first."""
    return tuple(Slices(amount=amount, window=window, number=number) for number in SLICE_COUNTS)


class Beat:
    """Find out when slices begin, from reports of what is left of them."""

    __slots__ = (
        "_early",
        "_fits",
        "_jitter",
        "_last_report",
        "_late",
        "_left",
        "_length",
        "_share",
    )

    def __init__(self, *, share: int, length: int) -> None:
        self._share = share
        self._length = length
        self._jitter = length // _JITTER
        #: A slice began between these, as far as is known; and how many reports fit.
        self._early = self._late = 0
        self._fits = 0
        #: What was left by the latest report, and when it came.
        self._left: int | None = None
        self._last_report = 0

    @property
    def is_found(self) -> bool:
        """Whether a beat was heard, perhaps by chance."""
        return self._fits > 0

    @property
    def is_sure(self) -> bool:
        """Whether it was heard again where it was expected."""
        return self._fits >= _FITS

    @property
    def uncertainty(self) -> int:
        """For how many ns it is uncertain whether the next slice has begun."""
        return self._late - self._early

    def nearest(self, when: int) -> int:
        """Return when the slice that begins nearest to ``when`` has certainly begun."""
        return self._late + self._slices_in(when - self._late) * self._length

    def update(self, remaining: int, now: int) -> None:
        """Take in a report of what is left of a slice."""
        left, last_report = self._left, self._last_report
        self._left, self._last_report = remaining, now
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
        if self._fits and overlap[1] - overlap[0] >= 2 * self._jitter:
            self._early, self._late = overlap
            self._fits = min(self._fits + 1, _MOST_FITS)
            return
        self._fits -= 2
        if self._fits <= 0:
            self._early, self._late, self._fits = early, late, 1

    def _slices_in(self, span: int) -> int:
        return (span + self._length // 2) // self._length


class Slices:
    """Admit no more than its share in any slice of the window, or one call that is larger."""

    __slots__ = (
        "_amount",
        "_beat",
        "_closed_until",
        "_full_window",
        "_is_exhausted",
        "_last_report",
        "_length",
        "_observed",
        "_others",
        "_others_seen",
        "_others_taken",
        "_ours",
        "_ours_next",
        "_reported_at",
        "_slice_end",
        "_slices_seen",
        "_spread_until",
        "_transit",
        "_window",
        "share",
    )

    def __init__(self, *, amount: int, window: int, number: int) -> None:
        self._amount = amount
        self._full_window = window
        #: Units in a slice.
        self.share = share_of(amount, number)
        self._length = window // number
        self._transit = self._length // _TRANSIT
        per = (self._length + self._length // _ROOM) / 1_000_000_000
        self._window = Window(Limit("units", self.share, per=per, burst=self.share))
        #: Until when larger calls have closed it.
        self._closed_until = 0
        #: Until when our bookings reach if spread evenly.
        self._spread_until = 0
        #: When the latest report came, and for how long we have listened.
        self._last_report = 0
        self._observed = 0
        #: What others take of a slice's length, if the beginning is not known.
        self._others = 0.0
        self._beat = Beat(share=self.share, length=self._length)
        #: When this slice ends; 0 as long as no beat was heard.
        self._slice_end = 0
        #: Units that we booked in it, and those that may count in the next one as well.
        self._ours = self._ours_next = 0
        #: Units that others took of it, when that was reported, and whether nothing was left then.
        self._others_taken = 0
        self._reported_at = 0
        self._is_exhausted = False
        #: Units that others took of the latest slices, and how much of them we saw, in slices.
        self._others_seen = self._slices_seen = 0.0

    @property
    def is_known(self) -> bool:
        """Whether it is known when slices begin, and what others take of them."""
        if not self._beat.is_sure or self._slices_seen < _ENOUGH:
            return False
        return self.share >= _FEW or not self._others_are_active

    @property
    def is_searching(self) -> bool:
        """Whether that may still be found out."""
        return 0 < self._observed < _PATIENCE * self._length

    @property
    def explains_shortfall(self) -> bool:
        """Whether slices, and not others, may be why less is left than expected."""
        return self.is_searching or self.is_known

    @property
    def _others_rate(self) -> float:
        """Units that others take of a slice, once that is known."""
        return self._others_seen / self._slices_seen

    @property
    def _others_are_active(self) -> bool:
        """Whether others are active."""
        return self._others_seen * _BUSY >= self.share * self._slices_seen

    def update(self, remaining: int, now: int) -> None:
        """Take in a report of what is left of a slice."""
        elapsed = min(now - self._last_report, self._length) if self._last_report else 0
        self._observed += elapsed
        self._last_report = now
        ours = self.share - self._window.available(now)
        step = _QUANTILE if self.share - remaining - ours > self._others else _QUANTILE - 1
        self._others = max(
            0.0, self._others + step * self.share * elapsed / (_FOLLOW * self._length)
        )
        self._beat.update(remaining, now)
        self._begin_slice(now)
        slice_start = self._slice_end - self._length
        if self._slice_end and now >= slice_start + self._transit and not self._is_exhausted:
            self._others_taken = max(self._others_taken, self.share - remaining - self._ours)
            self._reported_at = now
            self._is_exhausted = not remaining  # later reports say nothing about what others take

    def earliest(self, amount: int, now: int) -> int:
        """See `Headroom.earliest`; one call passes in every slice, whatever others take."""
        amount = min(amount, self.share)
        cost = self._spacing(amount)
        is_shared = self.is_known and self._others_are_active
        at_once = cost if is_shared else max(cost, self._window.window // 2 - cost)
        when = max(now, self._closed_until, self._spread_until - at_once)
        if not self.is_known:
            return self._window.earliest(min(amount + self._reserve(amount), self.share), when)
        return when if when >= self._slice_end else self._earliest_in_slice(amount, when)

    def book(self, amount: int, when: int) -> None:
        """See `Headroom.book`; what exceeds the share closes the following slices."""
        self._begin_slice(when)
        self._ours += amount
        if self._slice_end - when < self._beat.uncertainty + self._transit:
            self._ours_next += amount
        self._spread_until = max(when, self._spread_until) + self._spacing(amount)
        further = self._further_slices(amount)
        if further:
            self._closed_until = max(when, self._closed_until) + further * self._length
        self._window.book(amount - further * self.share, max(when, self._closed_until))

    def unbook(self, amount: int, when: int, left: int) -> None:
        """See `Headroom.unbook`."""
        if when >= self._slice_end - self._length:
            self._ours -= amount
        before, after = self._further_slices(amount + left), self._further_slices(left)
        self._closed_until -= (before - after) * self._length
        back = amount - (before - after) * self.share
        if back > 0:
            self._window.unbook(back, when)
        self._spread_until -= self._spacing(amount)

    def _begin_slice(self, now: int) -> None:
        """Begin the next slice if it is time."""
        if not self._beat.is_found:
            return
        ours = self.share - self._window.available(now)
        if self._slice_end:
            self._slice_end = self._beat.nearest(self._slice_end)  # known better by now, perhaps
            if now < self._slice_end:
                return
            slice_start = self._slice_end - self._length
            self._others_seen += self._others_taken - self._others_seen / _MEMORY
            self._slices_seen += (
                self._reported_at - slice_start
            ) / self._length - self._slices_seen / _MEMORY
            ours = self._ours_next
        self._ours, self._ours_next, self._others_taken, self._is_exhausted = ours, 0, 0, False
        self._slice_end = self._beat.nearest(now + self._length // 2)
        self._reported_at = self._slice_end - self._length

    def _earliest_in_slice(self, amount: int, when: int) -> int:
        """Return from when on this slice has room for ``amount`` and for what others will take."""
        free = self.share - self._ours - amount
        if not self._others_are_active:
            return when if free >= 0 else self._slice_end
        free -= self._others_taken
        others = self._others_rate * (self._slice_end - self._reported_at) / self._length
        if free >= with_small_margin(others, amount) or (free >= 0 and not self._ours):
            return when
        if free >= with_small_margin(others, amount, minimal=True):
            return min(self._slice_end, max(when, self._reported_at + self._length // _SILENCE))
        return self._slice_end

    def _further_slices(self, amount: int) -> int:
        """Return how many further slices ``amount`` fills after its own."""
        return max(0, -(-amount // self.share) - 1)

    def _reserve(self, amount: int) -> int:
        """Return what is left to others in a slice's length, if the beginning is not known."""
        others = int(self._others)
        reserve = with_margin(others, amount) if others * _BUSY_UNSEEN >= self.share else 0
        return max(reserve, self.share // 2) if self.is_searching else reserve

    def _spacing(self, amount: int) -> int:
        """Return the time (ns) between calls of ``amount`` in an even flow."""
        if not self.is_known:
            ours = max(min(amount, self.share), self.share - self._reserve(amount))
            return amount * self._window.window // ours
        if not self._others_are_active:
            return amount * self._full_window // self._amount
        return int(amount * self._length / max(self.share - self._others_rate, self.share / _LEAST))


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
