"""What a session has yet to tell its store, or to hand over to the one that follows it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from asyncbucket.stores.store import Batch, Correction, LimitConfig

if TYPE_CHECKING:
    from asyncbucket.core.node import Meters
    from asyncbucket.stores.session import Session


class PendingUpdates:
    """Keep the latest limits and the longest pause until the store has heard of them.

    They are set in any thread. The sessions of several loops may report the same ones, which is
    harmless.
    """

    def __init__(self) -> None:
        #: The limits that the store has not heard of.
        self.config: LimitConfig | None = None
        #: Until when (ns of the worker's clock), and whether gradually.
        self._pause: tuple[int, bool] | None = None

    def __bool__(self) -> bool:
        return self.config is not None or self._pause is not None

    def pause(self, until: int, *, gradually: bool) -> None:
        """Let nobody start before ``until``; an earlier pause that ends later stays."""
        if self._pause is None or until > self._pause[0]:
            self._pause = until, gradually

    def add_to(self, batch: Batch, now: int) -> tuple[Batch, Callable[[], None]]:
        """Return ``batch`` with what is wanted, and what to call when the store has heard of it."""
        config, pause = self.config, self._pause
        until, gradually = pause or (0, False)
        batch = replace(batch, config=config, pause=max(0, until - now), gradually=gradually)

        def heard() -> None:  # what was set meanwhile stays
            self.config = None if self.config is config else self.config
            self._pause = None if self._pause is pause else self._pause

        return batch, heard


@dataclass(frozen=True, slots=True)
class Reservation:
    """Say what an admitted call was given, by whom."""

    session: "Session"
    #: When it was booked, by the store's clock: the ``start`` of a `Correction`; 0 without the store.
    booked_at: int
    #: When it may go, by the worker's clock.
    start: int
    slot: bool = False
    bound_by: str | None = None


#: What a call has booked below the root, and when.
Below: TypeAlias = tuple["Meters", int]


def redated(waiter: Any, below: Below, now: int) -> Below:
    """Date to ``now`` what ``waiter`` has booked below the root."""
    meters, when = below
    for meter, resource in meters:
        if amount := waiter.amounts.get(resource):
            meter.redate(amount, when, now)
    return meters, now


@dataclass(slots=True, eq=False)
class Leftover:
    """What a session leaves when it ends: slots of calls in flight, and what the store has to hear."""

    worker: str
    held: int = 0
    corrections: list[Correction] = field(default_factory=list)
    #: The session that has taken it over.
    successor: "Session | None" = None

    def correct(self, correction: Correction) -> None:
        """Have a booking changed; a call that was admitted without the store has none."""
        if correction.start:
            self.corrections.append(correction)

    def release(self) -> None:
        """Give a slot back."""
        self.held -= 1
