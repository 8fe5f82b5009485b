"""What others spend from the same limit, judged by replies; see `asyncbucket.feedback.headroom`."""

import math
from typing import Final

#: A rate is computed over at least this fraction (1/8) of the window.
_SMOOTHING: Final = 8
#: Less than this fraction (1/32) of the limit is noise: calls may arrive in another order.
_NOISE: Final = 32
#: The long-term estimate is a mean over this many windows.
_MEMORY: Final = 2


class Others:
    """Estimate what others take in a window: what they must have taken, however it is counted."""

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
        #: The lowest usage beyond our bookings so far; None before any report.
        self._least: int | None = None
        self._since = 0
        self._heard = 0
        #: For how long we have listened, as far as it still matters, and the mean over that time.
        self._listened = 0
        self._known = 0
        #: Units per window.
        self.estimate = 0

    def hear(self, used: int, now: int, held: int, unsure: int) -> None:
        """Take in that ``used`` units or up to ``unsure`` more were used beyond our bookings.

        Args:
            used: counted from any zero; only differences matter.
            now: the instant.
            held: how much of it lies in the last window, at least.
            unsure: what we booked recently, which those numbers may or may not include.
        """
        if self._least is None:
            self._heard = now
        if self._least is None or used + unsure <= self._least:  # that much has come back
            self._least, self._since = used + unsure, now
        found = 0 if held <= self._noise else held + unsure // 2
        took = used - self._least
        if took > self._noise:
            elapsed = max(now - self._since, self._window // _SMOOTHING)
            found = max(found, (took + unsure // 2) * self._window // elapsed)
        gone, self._heard = now - self._heard, now
        self._listened = min(self._listened + gone, _MEMORY * self._window)
        # The estimate rises faster than it falls.
        memory = self._listened // (4 if found > self._known else 1)
        self._known += (found - self._known) * gone // max(1, memory + gone)
        self.estimate = max(found, self._known)


def with_room(others: int, amount: int) -> int:
    """Return what others take, plus a margin for chance if a call costs about ``amount``."""
    return others + math.isqrt(3 * others * max(amount, 1)) if others > 0 else 0
