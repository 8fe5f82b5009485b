"""What one run has done so far, counted while it runs."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from asyncbucket.cli.run.job import Price

#: Reasons that are told apart: a screenful.
_REASONS: Final = 20


@dataclass(slots=True)
class Tally:
    """Count lines, calls and tokens."""

    price: Price | None = None
    #: Lines that are requests or should be; None while unknown.
    total: int | None = None
    #: Answered by an earlier run.
    earlier: int = 0
    answered: int = 0
    failed: int = 0
    #: Lines that could not be read.
    bad: int = 0
    #: Requests that the provider refused (429).
    refused: int = 0
    #: Requests that were sent, refused ones and those without a reply included.
    sent: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    #: The total of what was admitted, by resource.
    admitted: Counter[str] = field(default_factory=Counter[str])
    #: Why lines failed or were bad, and how many.
    reasons: Counter[str] = field(default_factory=Counter[str])
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    #: Whether it was told to stop.
    stopping: bool = False
    #: Why no call can succeed, if none can.
    fatal: str | None = None

    def count_reason(self, reason: str) -> None:
        """Count why a line failed; reasons beyond the first few are one."""
        known = reason in self.reasons or len(self.reasons) < _REASONS
        self.reasons[reason if known else "others"] += 1

    @property
    def done(self) -> int:
        """Lines that are finished, in this run or an earlier one."""
        return self.earlier + self.answered + self.failed + self.bad

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    @property
    def cost(self) -> float | None:
        """Dollars for the tokens so far, if the price is known."""
        return None if self.price is None else self.price.of(self.input_tokens, self.output_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return it in values that JSON can hold."""
        cost = self.cost
        return {
            "lines": self.done if self.total is None else self.total,
            "answered": self.answered,
            "answered_earlier": self.earlier,
            "failed": self.failed,
            "bad": self.bad,
            "seconds": round(self.seconds, 3),
            "requests": self.sent,
            "refused_429": self.refused,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost": None if cost is None else round(cost, 6),
            "stopped": self.stopping,
            "reasons": dict(self.reasons),
        }
