"""What a call has booked, part by part: put off, added to, or taken back, each at its own date."""

from collections.abc import Iterator
from typing import Final, TypeAlias

from asyncbucket.gates import Gates
from asyncbucket.meters import Amounts, Bucket

#: A lease remembers so many parts of what it booked; where a stream is settled chunk by chunk, older
#: debts count as reserved, so that giving them back errs on the safe side.
_PARTS: Final = 16

#: The units that a call has booked of one resource, and when: first what was reserved, then each debt.
Parts: TypeAlias = list[tuple[int, int]]


def put_off(gates: Gates, amounts: Amounts, when: int, now: int) -> None:
    """Have a booking at ``when`` count from ``now``, but for its slot: the call leaves no sooner."""
    for meter, resource in gates.meters:
        amount = amounts.get(resource)
        if amount and resource != "concurrency" and not meter.remote:
            # Above a burst it was earned by standing first, whenever the call leaves.
            units = min(amount, meter.burst) if isinstance(meter, Bucket) else amount
            meter.unbook(units, when)
            meter.owe(units, now)


def add_debt(parts: Parts, units: int, when: int) -> None:
    """Remember ``units`` that were used beyond what was booked."""
    parts.append((units, when))
    if len(parts) > _PARTS:
        (reserved, first), (debt, _) = parts[:2]
        parts[:2] = [(reserved + debt, first)]


def taken_back(parts: Parts, units: int) -> Iterator[tuple[int, int, int]]:
    """Take ``units`` from ``parts``, the latest first; yield how many of each, its date, and its rest."""
    while units > 0:
        booked, when = parts.pop()
        back = min(booked, units)
        if booked > back:
            parts.append((booked - back, when))
        yield back, when, booked - back
        units -= back
