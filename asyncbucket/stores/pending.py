"""What a process has yet to tell the store, and what it was given there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncbucket.core.meters import Amounts
from asyncbucket.stores.store import Batch, Correction, LimitConfig

if TYPE_CHECKING:
    from asyncbucket.stores.place import StorePlace


class PendingUpdates:
    """Keep what came back, the latest limits and the longest pause until the store has heard of them.

    All but `add_to` is called with the limiter's lock held.
    """

    def __init__(self) -> None:
        #: Slots of calls in flight, and of booked calls; and as many as the store knows of.
        self.held = self.reported = 0
        self.corrections: list[Correction] = []
        #: The limits that the store has not heard of.
        self.config: LimitConfig | None = None
        #: Until when (ns of the worker's clock), and whether gradually.
        self._pause: tuple[int, bool] | None = None

    def is_urgent(self) -> bool:
        """Tell whether all processes wait to hear of limits or a pause."""
        return self.config is not None or self._pause is not None

    def __bool__(self) -> bool:
        return self.is_urgent() or bool(self.corrections) or self.held != self.reported

    def pause(self, until: int, *, gradually: bool) -> None:
        """Let nobody start before ``until``; an earlier pause that ends later stays."""
        if self._pause is None or until > self._pause[0]:
            self._pause = until, gradually

    def batch(
        self, calls: Sequence[Amounts] | None, now: int, horizon: int
    ) -> tuple[Batch, Callable[[], None]]:
        """Return the next batch, and what to call when the store has heard of it.

        From now on the ledger keeps its corrections.
        """
        config, pause = self.config, self._pause
        until, gradually = pause or (0, False)
        corrections, self.corrections = tuple(self.corrections), []
        self.reported = self.held
        batch = Batch(
            config=config,
            pause=max(0, until - now),
            gradually=gradually,
            corrections=corrections,
            held=self.held,
            calls=None if calls is None else tuple(calls),
            horizon=horizon,
        )

        def heard() -> None:  # what was set meanwhile stays
            self.config = None if self.config is config else self.config
            self._pause = None if self._pause is pause else self._pause

        return batch, heard


@dataclass(frozen=True, slots=True)
class Reservation:
    """Say what a call was given."""

    #: When it was booked, by the store's clock: the ``start`` of a `Correction`; 0 without the store.
    booked_at: int
    #: When it may go, by the worker's clock.
    start: int
    slot: bool = False
    bound_by: str | None = None


class BookedMeter:
    """Stand for what one call has booked of one resource at a store; it reports what changes.

    It is as much of a `asyncbucket.core.meters.Meter` as a lease needs that holds the call.
    """

    __slots__ = ("_parts", "_place", "_reservation", "_resource")

    def __init__(
        self, place: "StorePlace", reservation: Reservation, resource: str, units: int
    ) -> None:
        self._place = place
        self._reservation = reservation
        self._resource = resource
        #: What is booked, and when by the store's clock: first the reservation, then each debt.
        self._parts = [(units, reservation.booked_at)]

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - the store has its own dates
        """See `asyncbucket.core.meters.Meter.unbook`."""
        while amount > 0 and self._parts:
            units, start = self._parts.pop()
            back = min(units, amount)
            amount -= back
            if units > back:
                self._parts.append((units - back, start))
            self._report(start, booked=units, used=units - back)

    def owe(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.owe`."""
        # The store dates it on arrival, which is no sooner, so a refund errs on the safe side.
        booked_at = self._reservation.booked_at
        start = booked_at and booked_at + when - self._reservation.start
        self._parts.append((amount, start))
        self._report(start, booked=0, used=amount)

    def _report(self, start: int, *, booked: int, used: int) -> None:
        name = self._resource
        self._place.correct(Correction(start=start, booked={name: booked}, used={name: used}))

    def redate(self, amount: int, when: int, now: int) -> None:
        """See `asyncbucket.core.meters.Meter.redate`: the store's dates stay."""
