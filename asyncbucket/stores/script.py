"""The script that a Redis or Valkey server runs, and how it is called.

The Lua files in ``lua/`` form one script: the arithmetic of windows and buckets, the state that is
loaded and saved around them, slots, and the commands that a worker may send. It is called by its
digest. A server that does not know it (new, flushed, a promoted replica) says so before anything
has happened; only then is the text sent, once.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from asyncbucket.kept import keep
from asyncbucket.limits import Limit
from asyncbucket.meters import Amounts
from asyncbucket.stores.store import (
    Batch,
    Booking,
    Correction,
    Outcome,
    Receipt,
    Terms,
)

_PARTS: Final = ("window", "bucket", "state", "limits", "turns", "slots", "admit", "verbs")
#: Nanoseconds in the script's unit of time.
GRAIN: Final = 1_000
#: The most that a meter is meant to hold, in units or ticks. A double counts exactly to 128 times
#: that; the rest is for debts.
_MOST: Final = 1 << 46
#: The most that one call may have used: a larger debt would be the same, as it is never paid off.
_MOST_USED: Final = _MOST << 6
_OUTCOMES: Final = {-1: Outcome.FULL, -2: Outcome.LATER, -3: Outcome.NEVER}
_PAUSED: Final = -1


@functools.cache
def source() -> str:
    """Return the text of the script."""
    folder = Path(__file__).with_name("lua")
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in _PARTS)


@functools.cache
def digest() -> str:
    """Return the digest by which a server knows the script."""
    return hashlib.sha1(source().encode(), usedforsecurity=False).hexdigest()


class Dialect:
    """Encode batches and decode answers under given terms: which resource has which number."""

    def __init__(self, terms: Terms) -> None:
        limits = sorted(terms.limits, key=lambda limit: (limit.resource, limit.window))
        self.terms = Terms(limits=tuple(limits), concurrency=terms.concurrency)
        self.resources = tuple(dict.fromkeys(limit.resource for limit in limits))
        self.text = json.dumps(self._config(limits), separators=(",", ":"))
        names = (None, *self.resources, "concurrency")
        self._bounds = {_PAUSED: "paused", **dict(enumerate(names))}

    def _config(self, limits: Sequence[Limit]) -> dict[str, Any]:
        numbers = {name: number for number, name in enumerate(self.resources, 1)}
        config: dict[str, Any] = {
            "limits": [[each.resource, each.amount, each.per, each.burst] for each in limits],
            "resources": len(numbers),
            "meters": [_meter(each) | {"resource": numbers[each.resource]} for each in limits],
        }
        if self.terms.concurrency is not None:
            config["concurrency"] = self.terms.concurrency
        return config

    @classmethod
    def read(cls, config: dict[str, Any]) -> "Dialect":
        """Return the dialect of terms that another worker has set."""
        limits = tuple(
            Limit(resource, amount, per=per, burst=burst)
            for resource, amount, per, burst in config["limits"]
        )
        return cls(Terms(limits=limits, concurrency=config.get("concurrency")))

    def corrections(self, corrections: Sequence[Correction]) -> str:
        """Encode corrections: for each its start, then what was booked and used of every resource."""
        flat: list[int] = []
        for each in corrections:
            flat.append(each.start // GRAIN)
            flat += [each.booked.get(name, 0) for name in self.resources]
            used = {**each.booked, **each.used}
            flat += [min(used.get(name, 0), _MOST_USED) for name in self.resources]
        return json.dumps(flat, separators=(",", ":")) if flat else ""

    def calls(self, calls: Sequence[Amounts]) -> str:
        """Encode calls: for each the amount of every resource, then its slots."""
        names = (*self.resources, "concurrency")
        flat = [call.get(name, 0) for call in calls for name in names]
        return json.dumps(flat, separators=(",", ":")) if flat else ""

    def receipt(
        self, reply: dict[str, Any], batch: Batch, slot: str, changed: Terms | None
    ) -> Receipt:
        """Decode the answer to ``batch``, whose slots' names begin with ``slot``."""
        now = reply["now"] * GRAIN
        flat = reply["bookings"]
        counted = self.terms.concurrency is not None
        bookings: list[Booking] = []
        for index, (offset, bound) in enumerate(zip(flat[::2], flat[1::2], strict=True)):
            bound_by = self._bounds.get(bound)  # may be missing if set under earlier terms
            if offset < 0:
                bookings.append(Booking(_OUTCOMES[offset], 0, bound_by))
                continue
            held = f"{slot}{index}" if counted and batch.calls[index].get("concurrency") else None
            bookings.append(Booking(Outcome.BOOKED, now + offset * GRAIN, bound_by, held))
        return Receipt(
            now=now,
            bookings=tuple(bookings),
            debts_at=reply["debts"] * GRAIN,
            ask_at=reply["ask"] * GRAIN,
            changed=changed,
            lost=reply["lost"],
            left=tuple(reply["left"]),
            workers=reply["workers"],
            crowded=reply["crowded"],
        )


def _meter(limit: Limit) -> dict[str, Any]:
    """Return the numbers of a limit's meters, in whole microseconds, rounded to the safe side."""
    if limit.amount > _MOST:
        raise ValueError(f"a store counts to {_MOST:,}: {limit} is above; lower the limit")
    _, window, bucket = keep(limit, None, 0)
    meter: dict[str, Any] = {
        "key": f"{limit.resource}:{limit.window}",
        "amount": limit.amount,
        "grain": -(-window._grain // GRAIN),  # noqa: SLF001 - one rule for all windows
        "hold": -(-window._hold // GRAIN),  # noqa: SLF001 - as above
    }
    if bucket is not None:
        p, q = _ticks(Fraction(bucket.p, bucket.q * GRAIN), limit.amount + bucket.burst)
        meter |= {"burst": bucket.burst, "p": p, "q": q}
    return meter


def _ticks(each: Fraction, most: int) -> tuple[int, int]:
    """Return microseconds per unit as a fraction with which ``most`` units can be counted.

    It is exact unless amount and window are both huge. Then a unit takes longer than it should, by
    less than a ten-thousandth for up to a billion units.
    """
    p, q = each.as_integer_ratio()
    if p * most <= _MOST:
        return p, q
    q = max(1, int(_MOST / most / each))
    return -(-each.numerator * q // each.denominator), q
