"""What others spend from the same limit, as far as replies tell; see `asyncbucket.feedback.headroom`."""

import math
from typing import Final

#: A rate is reckoned over at least this part of the window.
_SMOOTHING: Final = 8
#: Less than this part of the limit is noise: a call that was admitted first may arrive last.
_NOISE: Final = 32
#: What is known is a mean over so many windows.
_MEMORY: Final = 2


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


def with_room(others: int, amount: int) -> int:
    """Return what others take and room for chance, where a call costs about ``amount``."""
    return others + math.isqrt(3 * others * max(amount, 1)) if others > 0 else 0
