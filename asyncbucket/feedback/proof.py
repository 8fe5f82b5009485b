"""How the provider counts, proven by its replies.

If replies say how much remains (R) and in how long all will be back (T), a bucket of size B satisfies
R + rate * T = B in every reply, whoever took what is missing. A window (a log of the last minute, or
minutes of the clock) gives back later, and exceeds its limit by this. Four replies in a row that agree,
though they came at different levels or times, are a proof. Four that contradict it end it.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

#: So many replies in a row prove how the provider counts, or disprove it.
_PROOF: Final = 4
#: Replies agree if they differ by no more than this fraction (1/1,000) of the limit, or is rounded.
_NOISE: Final = 1_000


class _Run(NamedTuple):
    """Replies in a row that agree on the size of a bucket (times the window)."""

    #: Between what it is.
    least: int
    most: int
    #: The lowest and the highest R; since when they agree, and how many they are.
    lowest: int
    highest: int
    since: int
    replies: int


@dataclass(slots=True)
class Proof:
    """What replies show of how the provider counts."""

    window: int
    #: "bucket" or "window", if that is proven.
    kind: str | None = None
    #: How many units its bucket holds, or 0; and between what bounds (times the window) that lies.
    size: int = 0
    bounds: tuple[int, int] = 0, 0
    #: How many replies said something of it, the latest that agree, and how many in a row contradict a
    #: bucket: the proven one, or any.
    heard: int = 0
    run: _Run | None = None
    against: int = 0

    def changes(
        self, left: int, full_in: tuple[int, int], now: int, rate: int, rounding: int
    ) -> bool:
        """Take in a reply; return whether it changes what is known."""
        span, off = full_in
        low = (left - rounding // 2) * self.window + rate * max(0, span - off)
        high = (left + 1 + rounding) * self.window + rate * (span + off)
        whole = rate * self.window
        noise = max(self.window, whole // _NOISE)
        self.heard += 1
        least, most = self.bounds if self.size else (0, whole + whole // 10)
        is_against = low > most + noise or high + noise < least
        self.against = self.against + 1 if is_against else 0
        run = self.run
        if run is None or max(run.least, low) > min(run.most, high) + noise:
            run = _Run(low, high, left, left, now, 0)
        self.run = run = _Run(
            max(run.least, low),
            min(run.most, high),
            min(run.lowest, left),
            max(run.highest, left),
            # A log that is full agrees at all times: all of it is back after a window.
            run.since if span < self.window // 2 else now,
            run.replies + 1,
        )
        before = self.kind, self.size
        apart = max((run.highest - run.lowest) * self.window, (now - run.since) * rate)
        self._judge(run, whole, noise, is_apart=apart > high - low + noise)
        return before != (self.kind, self.size)

    def _judge(self, run: _Run, whole: int, noise: int, *, is_apart: bool) -> None:
        if self.against >= _PROOF and self.size:
            self.kind, self.size, self.against = None, 0, 0
        if run.replies < _PROOF:
            self.kind = "window" if self.against >= _PROOF else self.kind
        elif is_apart and not self.size and run.least <= whole + noise:
            self.kind, self.bounds = "bucket", (run.least, run.most)
            self.size = max(1, -(-run.least // self.window))
