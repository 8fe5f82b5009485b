"""What one call has booked at a store: meters with which its lease settles and releases."""

from collections.abc import Iterator
from typing import ClassVar, Protocol

from asyncbucket.core.meters import Amounts, Meter, Slots
from asyncbucket.core.parts import Parts, add_debt, take_back
from asyncbucket.stores.starts import Reservation
from asyncbucket.stores.store import Correction


class Reporter(Protocol):
    """Tell the store what leases do."""

    def correct(self, correction: Correction) -> None:
        """Have a booking changed."""
        ...

    def release(self, slot: str) -> None:
        """Give a slot back."""
        ...


class Entry:
    """Stand for what one call has booked at the store."""

    def __init__(self, reporter: Reporter, reservation: Reservation, amounts: Amounts) -> None:
        self.reporter = reporter
        self.reservation = reservation
        self._amounts = amounts

    def meters(self) -> Iterator[tuple[Meter, str]]:
        """Yield a meter for each resource, and one for the slot."""
        for resource, amount in self._amounts.items():
            if resource != "concurrency":
                yield _BookedMeter(self, resource, amount), resource
        if self.reservation.slot is not None:
            yield _SlotMeter(self), "concurrency"


class _BookedMeter:
    """The meter of what one call has booked of one resource."""

    __slots__ = ("_entry", "_parts", "_resource")

    bound_by: ClassVar[str | None] = None
    remote: ClassVar[bool] = True

    def __init__(self, entry: Entry, resource: str, units: int) -> None:
        self._entry = entry
        self._resource = resource
        #: Dated by the store's clock.
        self._parts: Parts = [(units, entry.reservation.booked_at)]

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - the store has its own dates
        """See `asyncbucket.core.meters.Meter.unbook`."""
        for back, start, rest in take_back(self._parts, amount):
            self._report(start, booked=rest + back, used=rest)

    def owe(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.owe`."""
        # The store dates it on arrival, which is no sooner, so a refund errs on the safe side.
        reservation = self._entry.reservation
        start = reservation.booked_at and reservation.booked_at + when - reservation.start
        add_debt(self._parts, amount, start)
        self._report(start, booked=0, used=amount)

    def _report(self, start: int, *, booked: int, used: int) -> None:
        name = self._resource
        self._entry.reporter.correct(
            Correction(start=start, booked={name: booked}, used={name: used})
        )

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:  # noqa: ARG002 - it is booked
        """See `asyncbucket.core.meters.Meter.earliest`."""
        return now

    def take(self, amount: int, now: int) -> bool:  # noqa: ARG002 - it is booked
        """See `asyncbucket.core.meters.Meter.take`."""
        return True

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.book`: it is booked."""

    def available(self, now: int) -> int:  # noqa: ARG002 - the store knows
        """See `asyncbucket.core.meters.Meter.available`."""
        return sum(units for units, _ in self._parts)


class _SlotMeter(Slots):
    """The slot that one call holds."""

    __slots__ = ("_entry",)

    remote: ClassVar[bool] = True

    def __init__(self, entry: Entry) -> None:
        super().__init__(size=1)
        self._entry = entry

    def give_back(self) -> None:
        slot = self._entry.reservation.slot
        assert slot is not None
        self._entry.reporter.release(slot)

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - it is one
        self.give_back()
