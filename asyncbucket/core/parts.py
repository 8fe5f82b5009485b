"""What a call has booked, in parts: each can be moved, added to, or taken back at its own date."""

from collections.abc import Iterator
from typing import Final, TypeAlias

from asyncbucket.core.gates import Gates
from asyncbucket.core.meters import Amounts, Bucket

#: How many parts a lease remembers. If a stream is settled chunk by chunk, older debts count as
#: reserved, so giving them back errs on the safe side.
_PARTS: Final = 16

#: Units that a call has booked of one resource, and when: first the reservation, then each debt.
Parts: TypeAlias = list[tuple[int, int]]


def redate(gates: Gates, amounts: Amounts, when: int, now: int) -> None:
    """Move a booking at ``when`` to ``now``, except for its slot: the call leaves only now."""
    for meter, resource in gates.meters:
        amount = amounts.get(resource)
        if amount and resource != "concurrency" and not meter.remote:
            # The part above a burst was earned by being first in line, whenever the call leaves.
            units = min(amount, meter.burst) if isinstance(meter, Bucket) else amount
            meter.unbook(units, when)
            meter.owe(units, now)


def add_debt(parts: Parts, units: int, when: int) -> None:
    """Remember ``units`` that were used beyond what was booked."""
    parts.append((units, when))
    if len(parts) > _PARTS:
        (reserved, first), (debt, _) = parts[:2]
        parts[:2] = [(reserved + debt, first)]


def take_back(parts: Parts, units: int) -> Iterator[tuple[int, int, int]]:
    """Take ``units`` from ``parts``, the latest first; yield for each: units, date, what is left."""
    while units > 0:
        booked, when = parts.pop()
        back = min(booked, units)
        if booked > back:
            parts.append((booked - back, when))
        yield back, when, booked - back
        units -= back
