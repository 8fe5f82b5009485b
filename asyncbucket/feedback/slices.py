"""A limit that is counted in slices of its window: 60,000 a minute as 1,000 a second.

No header says when slices begin, or whether they slide. So no more than a share passes in any time
as long as a slice, evenly and half of a share at once: that fits slices of either kind.

*What others take.* Of what is used, others took at least what we didn't book in a slice's length.
Of slices that begin by the clock this is too little at first, and exact at their end; so the most
that was seen in a slice's length counts, averaged over the latest ones. It can't be more than what
comes back too little (`at_most`): a provider's bucket may just be smaller than a slice. This part,
and a margin for chance, is left to others, and our calls come evenly. One call passes in every
slice all the same, because its reply may tell more.

To find out when slices begin, by the jumps in what is left, was tried: with others at 40 % of small
slices, 5 % were refused instead of 6 %, and 93 % used instead of 88 %. It was not worth its size.
"""

import math
from typing import Final

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Window

#: For network jitter our slices are longer by 1/64. (`Window` adds up to half as much.)
_ROOM: Final = 64
#: What others take is a mean over this many slices.
_MEMORY: Final = 4
#: Others are active if they take at least this fraction (1/16) of a slice.
_BUSY: Final = 16


class Slices:
    """Admit no more than its share in any slice of a window, or one call that is larger.

    Args:
        share: units in a slice.
        length: how long a slice is (ns).
    """

    def __init__(self, share: int, length: int) -> None:
        self.share = share
        self._length = length
        per = (length + length // _ROOM) / 1_000_000_000
        self._window = Window(Limit("units", share, per=per, burst=share))
        #: Until when our bookings reach if spread evenly.
        self._spread_until = 0
        #: The most that others took in a slice's length, since when; and what they take on average.
        self._most_taken = self._since = 0
        self._others = 0.0

    def taken_by_others(self, left: int, now: int) -> int:
        """Return what others have taken of a slice, at least, if ``left`` is left of it."""
        return self._window.available(now) - left

    def update(self, left: int, now: int, *, at_most: int) -> None:
        """Take in a report of what is left, and that others take ``at_most`` so much of a slice."""
        if now - self._since >= self._length:
            self._others += (self._most_taken - self._others) / _MEMORY
            self._since, self._most_taken = now, 0
        taken = min(self.taken_by_others(left, now), at_most)
        self._most_taken = max(self._most_taken, taken)

    def earliest(self, amount: int, now: int) -> int:
        """See `asyncbucket.core.meters.Meter.earliest`."""
        reserve, spacing = self._reserve(amount), self._spacing(amount)
        at_once = spacing if reserve else max(spacing, self._window.window // 2 - spacing)
        if amount > self.share:
            amount, at_once = self.share, 0
        return self._window.earliest(amount + reserve, max(now, self._spread_until - at_once))

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.book`."""
        self._spread_until = max(when, self._spread_until) + self._spacing(amount)
        self._window.book(amount, when)

    def unbook(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.unbook`."""
        self._spread_until -= self._spacing(amount)
        self._window.unbook(amount, when)

    def _reserve(self, amount: int) -> int:
        """Return what is left to others in a slice, if calls cost about ``amount``."""
        if self._others * _BUSY < self.share:
            return 0
        reserve = int(self._others + math.sqrt(self._others * amount))
        return max(0, min(reserve, self.share - amount))

    def _spacing(self, amount: int) -> int:
        """Return the time (ns) between calls of ``amount`` in an even flow."""
        reserve = self._reserve(amount)
        if amount > self.share:  # it takes whole slices
            amount = -(-amount // self.share) * self.share
        return amount * self._window.window // (self.share - reserve)
