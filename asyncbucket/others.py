"""What others spend from the same limit, as far as replies tell; see `asyncbucket.headroom`."""

import math
from typing import Final

from asyncbucket.meters import Window

#: A rate is reckoned over at least this part of the window.
_SMOOTHING: Final = 8
#: Less than this part of the limit is noise: a call that was admitted first may arrive last.
_NOISE: Final = 32
#: What is known is a mean over so many windows.
_MEMORY: Final = 2
#: Others are at work in slices when they take at least this part of one.
_BUSY: Final = 8
#: A limit may be counted in so many slices of its window;
SLICES: Final = 60
#: for the network's jitter, ours are longer by this part. (`Window` adds as much as half of it.)
_ROOM: Final = 64
#: What others take of a slice is this quantile of what replies say, over so many slices.
_QUANTILE: Final = 0.8
_FOLLOW: Final = 2


class Others:
    """Reckon what others take in a window: what they must have taken, however it is counted."""

    __slots__ = (
        "_heard",
        "_known",
        "_least",
        "_listened",
        "_noise",
        "_since",
        "_window",
        "estimate",
    )

    def __init__(self, *, amount: int, window: int) -> None:
        self._window = window
        self._noise = amount // _NOISE
        #: The least of what was used beyond our bookings, at any time; None before any word.
        self._least: int | None = None
        self._since = 0
        self._heard = 0
        #: How long we have listened, as far as it still matters, and the mean over that time.
        self._listened = 0
        self._known = 0
        #: Units in a window.
        self.estimate = 0

    def hear(self, used: int, now: int, held: int, unsure: int) -> None:
        """Take in what is used beyond all that we booked, at least, and ``unsure`` units more.

        Args:
            used: from any zero, for only differences count.
            now: the instant.
            held: what of it lies in the last window, at least.
            unsure: what we booked of late, which is in those numbers or not.
        """
        if self._least is None:
            self._heard = now
        if self._least is None or used + unsure <= self._least:  # so much has come back
            self._least, self._since = used + unsure, now
        found = 0 if held <= self._noise else held + unsure // 2
        took = used - self._least
        if took > self._noise:
            elapsed = max(now - self._since, self._window // _SMOOTHING)
            found = max(found, (took + unsure // 2) * self._window // elapsed)
        gone, self._heard = now - self._heard, now
        self._listened = min(self._listened + gone, _MEMORY * self._window)
        # More of them are believed in sooner than fewer.
        memory = self._listened // (4 if found > self._known else 1)
        self._known += (found - self._known) * gone // max(1, memory + gone)
        self.estimate = max(found, self._known)


class Slices:
    """Admit in any slice of the window no more than its share, or one call that is larger.

    Half of a share may pass at once, the rest comes evenly. What others take of a slice is seen near
    its end, in what is used beyond ours: less is seen before, so a high quantile is followed.
    """

    __slots__ = ("_closed", "_even", "_heard", "_length", "_others", "_window", "share")

    def __init__(self, *, amount: int, window: int) -> None:
        #: Units in a slice.
        self.share = -(-amount // SLICES)
        self._length = window // SLICES
        self._window = Window(amount=self.share, window=self._length + self._length // _ROOM)
        #: Until when larger calls have closed it.
        self._closed = 0
        #: When what was booked would have passed, had it come evenly.
        self._even = 0
        #: What others take of a slice, and when we last heard.
        self._others = 0.0
        self._heard = 0

    def hear(self, remaining: int, now: int) -> None:
        """Take in what is left of a slice; others took what is used beyond ours, at least."""
        ours = self.share - self._window.available(now)
        taken = self.share - remaining - ours
        step = _QUANTILE if taken > self._others else _QUANTILE - 1
        gone, self._heard = min(now - self._heard, self._length), now
        self._others = max(0.0, self._others + step * self.share * gone / (_FOLLOW * self._length))

    def earliest(self, amount: int, now: int) -> int:
        """See `Headroom.earliest`."""
        amount = min(amount, self.share)
        cost = self._apart(amount)
        when = max(now, self._closed, self._even - max(0, self._window.window // 2 - cost))
        return self._window.earliest(min(amount + self._reserve(amount), self.share), when)

    def book(self, amount: int, when: int) -> None:
        """See `Headroom.book`; what is above the share closes the slices after."""
        self._even = max(when, self._even) + self._apart(amount)
        more = self._more(amount)
        if more:
            self._closed = max(when, self._closed) + more * self._length
        self._window.book(amount - more * self.share, max(when, self._closed))

    def unbook(self, amount: int, when: int, left: int) -> None:
        """See `Headroom.unbook`."""
        more, fewer = self._more(amount + left), self._more(left)
        self._closed -= (more - fewer) * self._length
        back = amount - (more - fewer) * self.share
        if back > 0:
            self._window.unbook(back, when)
        self._even -= self._apart(amount)

    def _more(self, amount: int) -> int:
        """Return how many slices after its own ``amount`` fills."""
        return max(0, -(-amount // self.share) - 1)

    def _reserve(self, amount: int) -> int:
        others = int(self._others)
        return with_room(others, amount) if others * _BUSY >= self.share else 0

    def _apart(self, amount: int) -> int:
        """Return the ns after which an even flow brings the next call."""
        ours = max(min(amount, self.share), self.share - self._reserve(amount))
        return amount * self._window.window // ours


def with_room(others: int, amount: int) -> int:
    """Return what others take and room for chance, where a call costs about ``amount``."""
    return others + math.isqrt(3 * others * max(amount, 1)) if others > 0 else 0
