"""What one call has booked at a store: meters by which its lease settles and releases."""

from collections.abc import Iterator
from typing import ClassVar, Protocol

from asyncbucket.meters import Amounts, Meter, Slots
from asyncbucket.stores.starts import Grant
from asyncbucket.stores.store import Correction


class Teller(Protocol):
    """Tell the store of what leases do."""

    def correct(self, correction: Correction) -> None:
        """Have a booking changed."""
        ...

    def release(self, slot: str) -> None:
        """Give a slot back."""
        ...


class Entry:
    """Stand for what one call has booked at the store."""

    def __init__(self, teller: Teller, grant: Grant, amounts: Amounts) -> None:
        self.teller = teller
        self.grant = grant
        self._amounts = amounts

    def meters(self) -> Iterator[tuple[Meter, str]]:
        """Yield a meter for each resource, and one for the slot."""
        for resource, amount in self._amounts.items():
            if resource != "concurrency":
                yield _Booked(self, resource, amount), resource
        if self.grant.slot is not None:
            yield _Slot(self), "concurrency"


class _Booked:
    """The meter of what one call has booked of one resource."""

    __slots__ = ("_entry", "_resource", "_units")

    bound_by: ClassVar[str | None] = None
    remote: ClassVar[bool] = True

    def __init__(self, entry: Entry, resource: str, units: int) -> None:
        self._entry = entry
        self._resource = resource
        self._units = units

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - the store has its own date
        """See `asyncbucket.meters.Meter.unbook`."""
        self._change(self._units - amount)

    def owe(self, amount: int, when: int) -> None:  # noqa: ARG002 - the store has its own date
        """See `asyncbucket.meters.Meter.owe`."""
        self._change(self._units + amount)

    def _change(self, units: int) -> None:
        start, name = self._entry.grant.booked_at, self._resource
        before, self._units = self._units, units
        if before != units:
            self._entry.teller.correct(
                Correction(start=start, booked={name: before}, used={name: units})
            )

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:  # noqa: ARG002 - it is booked
        """See `asyncbucket.meters.Meter.earliest`."""
        return now

    def take(self, amount: int, now: int) -> bool:  # noqa: ARG002 - it is booked
        """See `asyncbucket.meters.Meter.take`."""
        return True

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.meters.Meter.book`: it is booked."""

    def available(self, now: int) -> int:  # noqa: ARG002 - the store knows
        """See `asyncbucket.meters.Meter.available`."""
        return self._units


class _Slot(Slots):
    """The slot that one call holds."""

    __slots__ = ("_entry",)

    remote: ClassVar[bool] = True

    def __init__(self, entry: Entry) -> None:
        super().__init__(size=1)
        self._entry = entry

    def give_back(self) -> None:
        slot = self._entry.grant.slot
        assert slot is not None
        self._entry.teller.release(slot)

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - it is one
        self.give_back()
