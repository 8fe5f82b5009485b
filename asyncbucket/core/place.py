"""What a tree of limiters asks of the store that keeps the limits and slots of its root."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from asyncbucket.core.limits import Limit
from asyncbucket.core.node import Meters
from asyncbucket.core.queue import AnyWaiter
from asyncbucket.core.seats import Seat
from asyncbucket.core.statistics import LimitUse


class Place(Protocol):
    """Keep the limits of a root where other processes reach them.

    The pacer decides who goes next, and books the limits below the root. Then the call stands here
    until the store has booked it and its start has come. `room`, `push`, `leave` and `ended` are
    called with the pacer's lock held.
    """

    def room(self, seat: Seat) -> bool:
        """Tell whether it takes another call of this seat now; it rings the seat when that changes."""
        ...

    def push(self, waiter: AnyWaiter, below: Meters, now: int) -> None:
        """Take over ``waiter``, booked at ``now`` in the meters ``below`` the root.

        Later, on its own seat, it goes by `Pacer.pass_on_locked` or fails by `Pacer.fail_locked`.
        """
        ...

    def leave(self, waiter: AnyWaiter) -> bool:
        """Give back what a call that has given up took here; return whether it stood here."""
        ...

    def ended(self, lease: Any) -> None:
        """Give back the slot of ``lease``, once."""
        ...

    def waiting(self) -> int:
        """Return how many calls stand here: until the store books them, or until they start."""
        ...

    def held_up(self) -> tuple[str, int] | None:
        """Return what the first of them waits for, and until when at least, if that is known.

        `NEVER` means that it depends on a slot being given back.
        """
        ...

    def holds_up(self) -> bool:
        """Tell whether the first of them has to wait, or another would have to, as far as is known."""
        ...

    def held_back(self) -> list[AnyWaiter]:
        """Return the calls, in order, that the store has not booked because it holds the first up."""
        ...

    def use(self) -> Iterator[LimitUse]:
        """Yield how much of each limit is used, as last heard."""
        ...

    def options(self) -> dict[str, Any]:
        """Return the arguments with which another `Limiter` keeps its limits there; {} if none can."""
        ...

    def check(self, limits: Iterable[Limit], concurrency: Any) -> None:
        """Refuse changes that the store cannot keep; this changes nothing.

        Raises:
            ValueError: it cannot keep one of them.
        """
        ...

    def configure(self) -> None:
        """Tell all processes the limits as they are now."""
        ...

    def pause(self, span: int, *, gradually: bool) -> None:
        """Tell all processes to let nobody pass for ``span`` ns."""
        ...

    async def aclose(self) -> None:
        """Give back what this process holds, and leave the store."""
        ...
