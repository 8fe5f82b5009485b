"""Calls that are booked: what each was given, and how it is let go at its start."""

import asyncio
import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from asyncbucket.core.meters import Amounts
from asyncbucket.core.pacer import NAP


class WaitingCall(Protocol):
    """A call in the line."""

    @property
    def amounts(self) -> Amounts:
        """What it costs, its slot included."""
        ...


W = TypeVar("W", bound=WaitingCall)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Say what an admitted call was given."""

    #: When it was booked, by the store's clock: the ``start`` of a `Correction`.
    booked_at: int
    #: When it may go, by the worker's clock.
    start: int
    #: The slot that it holds and must give back.
    slot: str | None = None
    #: What held it up; None if nothing did.
    bound_by: str | None = None


class Line(Protocol[W]):
    """The calls of a worker that wait, in an order that is fair among them."""

    def heads(self, most: int) -> Sequence[W]:
        """Return the calls that go next, at most ``most``; they stay in line."""
        ...

    def book(self, waiter: W, reservation: Reservation) -> None:
        """Take a call out of the line: it will go at ``reservation.start``, unless it gives up."""
        ...

    def admit(self, waiter: W, reservation: Reservation) -> None:
        """Let a booked call go, because its start has come."""
        ...

    def refuse(self, waiter: W, bound_by: str) -> None:
        """Take a call out of the line that exceeds a limit and can never pass."""
        ...

    def abandon(self, error: Exception) -> None:
        """Give up the desk, which has failed and serves no longer; it must be closed."""
        ...


class Starts(Generic[W]):
    """Hold a line's calls from booking to start; belongs to one loop's thread."""

    def __init__(
        self, line: Line[W], clock: Callable[[], int], on_failure: Callable[[Exception], None]
    ) -> None:
        self._line = line
        self._clock = clock
        self._on_failure = on_failure
        #: In order of their starts.
        self._booked: collections.OrderedDict[W, Reservation] = collections.OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, waiter: W, reservation: Reservation) -> None:
        """Add a call that was booked after all others; a later `admit_due` lets it go."""
        self._booked[waiter] = reservation
        self._line.book(waiter, reservation)

    def discard(self, waiter: W) -> None:
        """Forget a call, if it is here."""
        self._booked.pop(waiter, None)

    def admit_due(self) -> None:
        """Admit the calls whose start has come, and set the timer for the next."""
        self._cancel_timer()
        booked, now = self._booked, self._clock()
        while booked and next(iter(booked.values())).start <= now:
            self._line.admit(*booked.popitem(last=False))
        if booked:
            nap = (next(iter(booked.values())).start - self._clock()) * 1e-9
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(NAP, nap), self._on_timer)

    def close(self) -> list[tuple[W, Reservation]]:
        """Let nobody go any more; return the calls that are left."""
        self._cancel_timer()
        left = list(self._booked.items())
        self._booked.clear()
        return left

    def _on_timer(self) -> None:
        try:
            self.admit_due()
        except Exception as error:  # noqa: BLE001 - the loop would log it, and the others wait on
            self._on_failure(error)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
