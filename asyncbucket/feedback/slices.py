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
slices (`new`): others are unknown then, and if they take less than the other half, nobody is
refused. If no slice is found, what others take is seen as usage beyond ours in a slice's length.
Most reports show too little of it, so a high quantile is left to others.

The constants below were found by simulation: limits of 30 to 6,000, slices of a 6th of a second to
ten seconds, replies up to 80 ms on the way, others that come evenly or at random and take 10 to 60
%.
"""

import math
from typing import Final

from asyncbucket.feedback.others import with_room
from asyncbucket.meters import Window

#: A limit may be counted in this many slices of its window: seconds of a minute, or ten seconds.
NUMBERS: Final = (60, 6)
#: For network jitter our slices are longer by 1/64. (`Window` adds up to half as much.)
_ROOM: Final = 64
#: What we send within this fraction (1/8) of a slice before its end may arrive in the next one, and
#: a report that comes as soon after its beginning may be about the last one.
_WAY: Final = 8
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


def share_of(amount: int, number: int = NUMBERS[0]) -> int:
    """Return the units in one slice of ``amount``, by default in one of the shortest slices."""
    return -(-amount // number)


def cut(*, amount: int, window: int) -> tuple["Slices", ...]:
    """Return all the ways in which a limit may be cut into slices, the shortest first."""
    return tuple(Slices(amount=amount, window=window, number=number) for number in NUMBERS)


class Beat:
    """Find out when slices begin, from reports of what is left of them."""

    __slots__ = ("_early", "_fits", "_heard", "_jitter", "_late", "_left", "_length", "_share")

    def __init__(self, *, share: int, length: int) -> None:
        self._share = share
        self._length = length
        self._jitter = length // _JITTER
        #: A slice began between these, as far as is known; and how many reports fit.
        self._early = self._late = 0
        self._fits = 0
        #: What was left by the latest report, and when it came.
        self._left: int | None = None
        self._heard = 0

    @property
    def found(self) -> bool:
        """Whether a beat was heard, perhaps by chance."""
        return self._fits > 0

    @property
    def sure(self) -> bool:
        """Whether it was heard again where it was expected."""
        return self._fits >= _FITS

    @property
    def blur(self) -> int:
        """For how many ns it is uncertain whether the next slice has begun."""
        return self._late - self._early

    def nearest(self, when: int) -> int:
        """Return when the slice that begins nearest to ``when`` has certainly begun."""
        return self._late + self._turns(when - self._late) * self._length

    def hear(self, remaining: int, now: int) -> None:
        """Take in a report of what is left of a slice."""
        left, heard = self._left, self._heard
        self._left, self._heard = remaining, now
        if left is None or now - heard >= self._length // 2:
            return
        flowed = (now - heard) * self._share // self._length
        least = max(self._share // _JUMP, min(2, self._share))  # replies may overtake each other
        if remaining - left - flowed >= least:
            self._narrow(heard - self._jitter, now + self._jitter)

    def _narrow(self, early: int, late: int) -> None:
        turns = self._turns((early + late - self._early - self._late) // 2)
        moved, drift = turns * self._length, turns * self._length // _DRIFT
        common = max(early, self._early + moved - drift), min(late, self._late + moved + drift)
        if self._fits and common[1] - common[0] >= 2 * self._jitter:
            self._early, self._late = common
            self._fits = min(self._fits + 1, _MOST_FITS)
            return
        self._fits -= 2
        if self._fits <= 0:
            self._early, self._late, self._fits = early, late, 1

    def _turns(self, span: int) -> int:
        return (span + self._length // 2) // self._length


class Slices:
    """Admit no more than its share in any slice of the window, or one call that is larger."""

    __slots__ = (
        "_amount",
        "_beat",
        "_closed",
        "_end",
        "_even",
        "_full",
        "_heard",
        "_length",
        "_listened",
        "_next",
        "_others",
        "_ours",
        "_passed",
        "_seen",
        "_taken",
        "_way",
        "_whole",
        "_window",
        "_word",
        "share",
    )

    def __init__(self, *, amount: int, window: int, number: int) -> None:
        self._amount = amount
        self._whole = window
        #: Units in a slice.
        self.share = share_of(amount, number)
        self._length = window // number
        self._way = self._length // _WAY
        self._window = Window(amount=self.share, window=self._length + self._length // _ROOM)
        #: Until when larger calls have closed it.
        self._closed = 0
        #: Until when our bookings reach if spread evenly.
        self._even = 0
        #: When the latest report came, and for how long we have listened.
        self._heard = 0
        self._listened = 0
        #: What others take of a slice's length, if the beginning is not known.
        self._others = 0.0
        self._beat = Beat(share=self.share, length=self._length)
        #: When this slice ends; 0 as long as no beat was heard.
        self._end = 0
        #: Units that we booked in it, and those that may count in the next one as well.
        self._ours = self._next = 0
        #: Units that others took of it, when that was reported, and whether nothing was left then.
        self._taken = 0
        self._word = 0
        self._full = False
        #: Units that others took of the latest slices, and how much of them we saw, in slices.
        self._seen = self._passed = 0.0

    @property
    def known(self) -> bool:
        """Whether it is known when slices begin, and what others take of them."""
        if not self._beat.sure or self._passed < _ENOUGH:
            return False
        return self.share >= _FEW or not self._busy

    @property
    def new(self) -> bool:
        """Whether that may still be found out."""
        return 0 < self._listened < _PATIENCE * self._length

    @property
    def explain(self) -> bool:
        """Whether slices, and not others, may be why less is left than expected."""
        return self.new or self.known

    @property
    def _rate(self) -> float:
        """Units that others take of a slice, once that is known."""
        return self._seen / self._passed

    @property
    def _busy(self) -> bool:
        """Whether others are active."""
        return self._seen * _BUSY >= self.share * self._passed

    def hear(self, remaining: int, now: int) -> None:
        """Take in a report of what is left of a slice."""
        gone = min(now - self._heard, self._length) if self._heard else 0
        self._listened += gone
        self._heard = now
        ours = self.share - self._window.available(now)
        step = _QUANTILE if self.share - remaining - ours > self._others else _QUANTILE - 1
        self._others = max(0.0, self._others + step * self.share * gone / (_FOLLOW * self._length))
        self._beat.hear(remaining, now)
        self._turn(now)
        begun = self._end - self._length
        if self._end and now >= begun + self._way and not self._full:
            self._taken = max(self._taken, self.share - remaining - self._ours)
            self._word = now
            self._full = not remaining  # later reports say nothing about what others take

    def earliest(self, amount: int, now: int) -> int:
        """See `Headroom.earliest`; one call passes in every slice, whatever others take."""
        amount = min(amount, self.share)
        cost = self._apart(amount)
        shared = self.known and self._busy
        at_once = cost if shared else max(cost, self._window.window // 2 - cost)
        when = max(now, self._closed, self._even - at_once)
        if not self.known:
            return self._window.earliest(min(amount + self._reserve(amount), self.share), when)
        return when if when >= self._end else self._once_left(amount, when)

    def book(self, amount: int, when: int) -> None:
        """See `Headroom.book`; what exceeds the share closes the following slices."""
        self._turn(when)
        self._ours += amount
        if self._end - when < self._beat.blur + self._way:
            self._next += amount
        self._even = max(when, self._even) + self._apart(amount)
        more = self._more(amount)
        if more:
            self._closed = max(when, self._closed) + more * self._length
        self._window.book(amount - more * self.share, max(when, self._closed))

    def unbook(self, amount: int, when: int, left: int) -> None:
        """See `Headroom.unbook`."""
        if when >= self._end - self._length:
            self._ours -= amount
        more, fewer = self._more(amount + left), self._more(left)
        self._closed -= (more - fewer) * self._length
        back = amount - (more - fewer) * self.share
        if back > 0:
            self._window.unbook(back, when)
        self._even -= self._apart(amount)

    def _turn(self, now: int) -> None:
        """Begin the next slice if it is time."""
        if not self._beat.found:
            return
        ours = self.share - self._window.available(now)
        if self._end:
            self._end = self._beat.nearest(self._end)  # known better by now, perhaps
            if now < self._end:
                return
            begun = self._end - self._length
            self._seen += self._taken - self._seen / _MEMORY
            self._passed += (self._word - begun) / self._length - self._passed / _MEMORY
            ours = self._next
        self._ours, self._next, self._taken, self._full = ours, 0, 0, False
        self._end = self._beat.nearest(now + self._length // 2)
        self._word = self._end - self._length

    def _once_left(self, amount: int, when: int) -> int:
        """Return from when on this slice has room for ``amount`` and for what others will take."""
        free = self.share - self._ours - amount
        if not self._busy:
            return when if free >= 0 else self._end
        free -= self._taken
        others = self._rate * (self._end - self._word) / self._length
        if free >= with_little_room(others, amount) or (free >= 0 and not self._ours):
            return when
        if free >= with_little_room(others, amount, least=True):
            return min(self._end, max(when, self._word + self._length // _SILENCE))
        return self._end

    def _more(self, amount: int) -> int:
        """Return how many further slices ``amount`` fills after its own."""
        return max(0, -(-amount // self.share) - 1)

    def _reserve(self, amount: int) -> int:
        """Return what is left to others in a slice's length, if the beginning is not known."""
        others = int(self._others)
        reserve = with_room(others, amount) if others * _BUSY_UNSEEN >= self.share else 0
        return max(reserve, self.share // 2) if self.new else reserve

    def _apart(self, amount: int) -> int:
        """Return the time (ns) between calls of ``amount`` in an even flow."""
        if not self.known:
            ours = max(min(amount, self.share), self.share - self._reserve(amount))
            return amount * self._window.window // ours
        if not self._busy:
            return amount * self._whole // self._amount
        return int(amount * self._length / max(self.share - self._rate, self.share / _LEAST))


def with_little_room(others: float, amount: int, *, least: bool = False) -> int:
    """Return what others take until a slice ends, in whole calls of ``amount``, plus a margin.

    Early in a slice most of it is still to come, and what is left to others in vain is noticed in
    time; late in it little is to come, and what is left in vain is lost. So the margin shrinks, and
    a fraction of a call does not count. ``least`` is for a limiter that has heard nothing for long.
    """
    calls = others / amount
    sigma = math.sqrt(calls)
    room = sigma if least else min(3 * sigma, max(calls, 1.25 * sigma))
    return int(calls + room) * amount
