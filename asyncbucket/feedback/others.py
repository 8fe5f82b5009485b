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
        "_last_report",
        "_lowest",
        "_lowest_at",
        "_mean",
        "_noise",
        "_observed",
        "_window",
        "estimate",
    )

    def __init__(self, *, amount: int, window: int) -> None:
        self._window = window
        self._noise = amount // _NOISE
        #: The lowest usage beyond our bookings so far; None before any report.
        self._lowest: int | None = None
        self._lowest_at = 0
        self._last_report = 0
        #: For how long we have listened, as far as it still matters, and the mean over that time.
        self._observed = 0
        self._mean = 0
        #: Units per window.
        self.estimate = 0

    def update(self, used: int, now: int, in_window: int, uncertainty: int) -> None:
        """Take in that ``used`` units or up to ``uncertainty`` more were used beyond our bookings.

        Args:
            used: counted from any zero; only differences matter.
            now: the instant.
            in_window: how much of it lies in the last window, at least.
            uncertainty: what we booked recently, which those numbers may or may not include.
        """
        if self._lowest is None:
            self._last_report = now
        if self._lowest is None or used + uncertainty <= self._lowest:  # that much has come back
            self._lowest, self._lowest_at = used + uncertainty, now
        latest = 0 if in_window <= self._noise else in_window + uncertainty // 2
        taken = used - self._lowest
        if taken > self._noise:
            elapsed = max(now - self._lowest_at, self._window // _SMOOTHING)
            latest = max(latest, (taken + uncertainty // 2) * self._window // elapsed)
        since_report, self._last_report = now - self._last_report, now
        self._observed = min(self._observed + since_report, _MEMORY * self._window)
        # The estimate rises faster than it falls.
        memory = self._observed // (4 if latest > self._mean else 1)
        self._mean += (latest - self._mean) * since_report // max(1, memory + since_report)
        self.estimate = max(latest, self._mean)


def with_margin(others: int, amount: int) -> int:
    """Return what others take, plus a margin for chance if a call costs about ``amount``."""
    return others + math.isqrt(3 * others * max(amount, 1)) if others > 0 else 0
