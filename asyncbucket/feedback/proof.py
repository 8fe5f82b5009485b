"""How the provider counts, proven by its replies.

If replies say how much remains (R) and in how long all will be back (T), a bucket of size B satisfies
R + rate * T = B in every reply, whoever took what is missing. A window (a log of the last minute, or
minutes of the clock) gives back later, and exceeds its limit by this. Four replies in a row that agree,
though they came at different levels or times, are a proof. Four that contradict it end it.

If no reply says when, what is missing is at least what we sent and did not get back yet. Then replies
count that leave more than a log could have, and they must agree while enough of ours comes back.
"""

from dataclasses import dataclass, field
from typing import Final

#: So many replies in a row prove how the provider counts, or disprove it; so many are compared.
_PROOF: Final = 4
_COMPARED: Final = 24
#: Replies agree if they differ by no more than this fraction (1/1,000) of the limit, or is rounded.
_NOISE: Final = 1_000


@dataclass(slots=True)
class Proof:
    """What replies show of how the provider counts."""

    window: int
    #: "bucket" or "window", if that is proven.
    kind: str | None = None
    #: How many units its bucket holds, or 0; and between what bounds (times the window) that lies.
    size: int = 0
    bounds: tuple[int, int] = 0, 0
    #: How many replies said something of it, and how many in a row contradict a bucket: the proven
    #: one, or any.
    heard: int = 0
    against: int = 0
    #: The latest replies that agree: the bounds of a bucket's size, R, and what a bucket has given back
    #: ever; all but R times the window.
    agreed: list[tuple[int, int, int, int]] = field(default_factory=list)

    def changes(
        self,
        left: int,
        missing: tuple[int, int],
        back: int,
        rate: int,
        rounding: int,
        *,
        is_told: bool,
    ) -> bool:
        """Take in a reply; return whether it changes what is known.

        Args:
            left: units left (R).
            missing: what a bucket lacks, at least and at most (times the window).
            back: what a bucket that is not full has given back ever (times the window).
            rate: what it gives back in a window.
            rounding: by how many units ``left`` may have been rounded down.
            is_told: whether the reply says what is missing; else it is what we sent.
        """
        low = (left - rounding // 2) * self.window + missing[0]
        high = (left + 1 + rounding) * self.window + missing[1]
        whole = rate * self.window
        noise = max(self.window, whole // _NOISE)
        self.heard += 1
        least, most = self.bounds if self.size else (0, whole + whole // 10)
        is_against = low > most + noise or high + noise < least
        self.against = self.against + 1 if is_against else 0
        if 2 * missing[1] >= whole:  # as a full log does at any time: all is back after a window
            self.agreed = [(*each[:3], back) for each in self.agreed]
        self.agreed = [*self.agreed[1 - _COMPARED :], (low, high, left, back)]
        while (bounds := self._bounds())[0] > bounds[1] + noise:
            del self.agreed[0]
        if is_told:
            lefts = [left for _, _, left, _ in self.agreed]
            # Half, because replies come later than they were sent, some more than others.
            apart = max((max(lefts) - min(lefts)) * self.window, (back - self.agreed[0][3]) // 2)
            is_apart = apart > high - low + noise
        else:  # if nothing came back, they do not agree
            drifted = max(low + back for low, _, _, back in self.agreed)
            is_apart = drifted > min(high + back for _, high, _, back in self.agreed) + noise
        return self._judges(bounds, whole + noise, is_apart=is_apart)

    def _bounds(self) -> tuple[int, int]:
        return max(each[0] for each in self.agreed), min(each[1] for each in self.agreed)

    def _judges(self, bounds: tuple[int, int], most: int, *, is_apart: bool) -> bool:
        before = self.kind, self.size
        if self.against >= _PROOF and self.size:
            self.kind, self.size, self.against = None, 0, 0
        if len(self.agreed) < _PROOF:
            self.kind = "window" if self.against >= _PROOF else self.kind
        elif is_apart and not self.size and bounds[0] <= most:
            self.kind, self.bounds = "bucket", bounds
            self.size = max(1, -(-bounds[0] // self.window))
        return before != (self.kind, self.size)
