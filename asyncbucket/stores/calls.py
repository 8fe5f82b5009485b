"""The calls of this process that stand at a store: until they are booked, and until they start.

The limiter's own order decides who goes next. The calls that are next stand here, first come, first
served, and as many of them as one batch books. What they have booked below the root, children's
limits for instance, is dated anew while they wait.
"""

import asyncio
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asyncbucket.core.errors import StoreError
from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.node import Meters
from asyncbucket.stores.pending import Reservation
from asyncbucket.stores.store import Correction

if TYPE_CHECKING:
    from asyncbucket.stores.place import StorePlace

#: The bounds of the number of calls that wait to be booked.
_MIN_ROOM: Final = 8
_MAX_ROOM: Final = 512

#: What a call has booked below the root, and when.
Below: TypeAlias = tuple[Meters, int]


def redated(waiter: Any, below: Below, now: int) -> Below:
    """Date to ``now`` what ``waiter`` has booked below the root."""
    meters, when = below
    for meter, resource in meters:
        if amount := waiter.amounts.get(resource):
            meter.redate(amount, when, now)
    return meters, now


class StoreCalls:
    """Keep the calls that wait at the store; with the limiter's lock held."""

    def __init__(self, place: "StorePlace") -> None:
        self._place = place
        #: Those to be booked, in order, with what they have booked below the root.
        self._unbooked: dict[Any, Below] = {}
        self._room = _MIN_ROOM
        #: Those that are booked and wait for their start, in that order.
        self._booked: dict[Any, tuple[Reservation, Below]] = {}
        #: Why no call waits any more that had come before, and the number of the last one of them.
        self._failure: tuple[Exception, int] = (StoreError(), 0)

    def __iter__(self) -> Iterator[Any]:
        yield from (*self._unbooked, *self._booked)

    def push(self, waiter: Any, below: Below) -> None:
        """Take over ``waiter``, which has booked ``below`` the root."""
        self._unbooked[waiter] = below

    def leave(self, waiter: Any) -> bool:
        """Give back all that ``waiter``, which gave up, has booked; return whether it stood here."""
        reservation = None
        if waiter in self._unbooked:
            below, when = self._unbooked.pop(waiter)
        elif waiter in self._booked:
            reservation, (below, when) = self._booked.pop(waiter)
        else:
            return False
        for meter, resource in below:
            if amount := waiter.amounts.get(resource):
                meter.unbook(amount, when)
        if reservation is not None:
            self._cancel(waiter.amounts, reservation)
        return True

    def bury(self) -> None:
        """Count out the calls whose loop has ended; those that gave up before are counted out by themselves."""
        for waiter in self:
            if waiter.seat.is_closed() and not waiter.done():
                self._place.bury(waiter)

    # --- to be booked ---

    def has_room(self, now: int) -> bool:
        """Return whether another call may come; date to now what stands here below the root.

        Otherwise limits there would forget those that wait for long, and let too many leave at once.
        """
        if len(self._unbooked) >= self._room:
            return False
        for waiter, below in self._unbooked.items():
            self._unbooked[waiter] = redated(waiter, below, now)
        for waiter, (reservation, below) in self._booked.items():
            self._booked[waiter] = reservation, redated(waiter, below, now)
        return True

    def adapt_room(self, sent: int, booked: int) -> None:
        """Have as many calls wait here as a batch books."""
        wanted = self._room * 5 // 4 if booked == sent else 2 * booked
        self._room = min(max(wanted, _MIN_ROOM), _MAX_ROOM)

    def first(self) -> Any:
        """Return the first call to be booked; None if there is none."""
        return next(iter(self._unbooked), None)

    def unbooked(self) -> list[Any]:
        """Return the calls to be booked, in order."""
        return [waiter for waiter in self._unbooked if not waiter.done()]

    def heads(self) -> list[Any]:
        """Return the calls that go next; they stay here. Those that have failed are told."""
        self.bury()
        self._tell_failed()
        waiting = (each for each in self.unbooked() if not self.has_failed(each))
        return list(itertools.islice(waiting, self._room))

    # --- failing ---

    def fail_all(self, cause: Exception, last: int) -> None:
        """Make all calls fail up to number ``last``.

        More of them wait in the pacer's line than fit in here. Each of those would otherwise try the
        store anew, in vain: it may take seconds to notice that it is gone.
        """
        self._failure = cause, last
        self._tell_failed()

    def has_failed(self, waiter: Any) -> bool:
        """Tell whether a call came too early: see `fail_all`."""
        return bool(waiter.number <= self._failure[1])

    def _tell_failed(self) -> None:
        for waiter in self:
            if self.has_failed(waiter):
                self._place.fail(waiter, self._failure[0])

    # --- booked ---

    def reserve(self, waiter: Any, reservation: Reservation) -> None:
        """Note that a call is booked; it may have given up while the batch was in flight."""
        if waiter.done() or waiter not in self._unbooked:
            self._cancel(waiter.amounts, reservation)
        else:
            self._booked[waiter] = reservation, self._unbooked.pop(waiter)

    def admit_due(
        self, here: asyncio.AbstractEventLoop, home: asyncio.AbstractEventLoop, now: int
    ) -> tuple[int, set[asyncio.AbstractEventLoop]]:
        """Admit what is due ``here``; return when the next start is, and where else calls are due.

        Those of plain threads are due at ``home``.
        """
        elsewhere: set[asyncio.AbstractEventLoop] = set()
        for waiter, (reservation, below) in list(self._booked.items()):
            loop = waiter.seat.loop or home
            if reservation.start > now:
                return reservation.start, elsewhere
            if waiter.done():  # it gave up, and will leave
                continue
            if loop.is_closed():
                self._place.bury(waiter)
            elif loop is not here:
                elsewhere.add(loop)
            else:
                meters, _ = redated(waiter, below, now)
                if self._place.admit(waiter, reservation, meters, now):
                    del self._booked[waiter]
        return NEVER, elsewhere

    def _cancel(self, amounts: Amounts, reservation: Reservation) -> None:
        """Give back what was booked for a call that is gone, whether or not its start has come."""
        if reservation.booked_at:
            self._place.correct(Correction.undo(amounts, reservation.booked_at))
        if reservation.slot:
            self._place.release()
