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

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Window
from asyncbucket.stores import state
from asyncbucket.stores.store import (
    FAR,
    LATE,
    MAX_AMOUNT,
    SLOT,
    Batch,
    Booking,
    Correction,
    LimitConfig,
    Receipt,
)

_PARTS: Final = ("meters", "state", "line", "verbs")
#: Nanoseconds in the script's unit of time.
GRAIN: Final = 1_000
#: The version of what the script keeps; others are refused.
_SCHEMA: Final = 9
#: What the script knows by name: times in microseconds.
_CONSTANTS: Final = {
    "SCHEMA": _SCHEMA,
    "SLOT": SLOT,
    "NEVER": 1e18,
    "UNPRICED": state.UNPRICED,
    "AHEAD": state.AHEAD,
    "FAR": FAR // GRAIN,
    "LATE": LATE // GRAIN,
} | {name: getattr(state, name) // GRAIN for name in ("SOON", "STEP", "TURN")}
#: The most that one call may have used: a larger debt would be the same, as it is never paid off.
_MAX_USED: Final = MAX_AMOUNT << 6


@functools.cache
def source() -> str:
    """Return the text of the script, which begins with the constants that `asyncbucket.stores.state` has, too."""
    folder = Path(__file__).with_name("lua")
    head = f"local {', '.join(_CONSTANTS)} = {', '.join(map(json.dumps, _CONSTANTS.values()))}"
    return "\n".join(
        (head, *((folder / f"{part}.lua").read_text(encoding="utf-8") for part in _PARTS))
    )


@functools.cache
def digest() -> str:
    """Return the digest by which a server knows the script."""
    return hashlib.sha1(source().encode(), usedforsecurity=False).hexdigest()


class Codec:
    """Encode limits, batches and answers."""

    def __init__(self, config: LimitConfig) -> None:
        self.config = config
        meters = [_meter_config(limit) for limit in config.limits]
        self.text = as_json({**config.to_dict(), "meters": meters, "work": config.work})

    @classmethod
    def from_text(cls, text: str) -> "Codec":
        """Return the codec for limits that another worker has set."""
        return cls(LimitConfig.from_dict(json.loads(text)))

    def starts(self, wall: int) -> str:
        """Encode when some periods of the limits begin that reset, around the server's ``wall``."""
        starts: dict[str, list[int]] = {}
        for limit in self.config.limits:
            if (calendar := limit.calendar) is not None:
                number = calendar.number(wall * GRAIN)
                near = range(number - 1, number + 4)
                starts[_key_of(limit)] = [calendar.start(each) // GRAIN for each in near]
        return as_json(starts)

    def corrections(self, corrections: Sequence[Correction]) -> str:
        """Encode corrections: for each its start, and what was booked and used of each resource."""
        encoded: list[Any] = []
        for each in corrections:
            used = {**each.booked, **each.used}
            used = {resource: min(units, _MAX_USED) for resource, units in used.items()}
            encoded.append((each.start // GRAIN, each.booked, used, each.dated))
        return as_json(encoded)

    def receipt(self, reply: dict[str, Any], batch: Batch) -> Receipt:
        """Decode the answer to ``batch``."""
        now, bound_by = int(reply["now"]) * GRAIN, reply["bound"] or None
        bookings = [Booking(0, bound_by)] * len(batch.calls)
        for index, (offset, bound) in enumerate(reply["answers"]):
            if offset < 0:
                bookings[index] = Booking(0, bound, exceeds=True)
            else:
                bookings[index] = Booking(now + offset * GRAIN, bound or None)
        return Receipt(
            now=now,
            bookings=tuple(bookings),
            ask_at=int(reply["ask"]) * GRAIN,
            left=tuple(map(int, reply["left"])),
            workers=reply["workers"],
            steady=int(reply["steady"]) * GRAIN,
            in_line=reply["in_line"],
            soonest=int(reply["soonest"]) * GRAIN,
            crowded=reply["crowded"],
        )


def as_json(value: Any) -> str:
    """Encode ``value`` as the script reads it."""
    return json.dumps(value, separators=(",", ":"))


def _key_of(limit: Limit) -> str:
    """Return the name of a limit's meters on the server."""
    return f"{limit.resource}:{limit.window}"


def _meter_config(limit: Limit) -> dict[str, Any]:
    """Return the numbers of a limit's meters, in whole microseconds, rounded to the safe side."""
    window = Window(limit)
    meter: dict[str, Any] = {
        "key": _key_of(limit),
        "resource": limit.resource,
        "amount": limit.units,
        "grain": -(-window.log.grain // GRAIN),
        "hold": -(-window.log.hold // GRAIN),
    }
    if limit.resets is not None:
        meter |= {"resets": limit.resets, "hold": 3 * limit.window // GRAIN}
    pace = window.pace
    if limit.calendar is None or pace is not None:
        burst = limit.units if pace is None else pace.burst
        per_unit = Fraction(limit.window, limit.units * GRAIN)
        p, q = _ticks_per_unit(per_unit, limit.units + burst)
        meter |= {"burst": burst, "p": p, "q": q, "is_paced": pace is not None}
    return meter


def _ticks_per_unit(time_per_unit: Fraction, most: int) -> tuple[int, int]:
    """Return microseconds per unit as a fraction with which ``most`` units can be counted.

    It is exact unless amount and window are both huge. Then a unit takes longer than it should, by
    less than a ten-thousandth for up to a billion units.
    """
    p, q = time_per_unit.as_integer_ratio()
    if p * most <= MAX_AMOUNT:
        return p, q
    q = max(1, int(MAX_AMOUNT / most / time_per_unit))
    return -(-time_per_unit.numerator * q // time_per_unit.denominator), q
