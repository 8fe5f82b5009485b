"""What a limiter counts of its calls, and which observers it tells."""

import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final, Self

from asyncbucket.core.budget import Budget
from asyncbucket.core.events import Callback, Event, Observers
from asyncbucket.core.node import Node
from asyncbucket.core.queue import Waiter

#: An empty mapping: most of ten thousand idle limiters need no container of their own.
EMPTY_MAPPING: Final[Any] = MappingProxyType({})


class Books(Node):
    """Count the calls of one limiter, here and above, and tell observers what happens."""

    __slots__ = (
        "admitted",
        "budget",
        "cancelled",
        "ended",
        "name",
        "observers",
        "refunded",
        "refused",
        "shown_name",
        "upstream_429",
        "waits",
    )

    def __init__(
        self,
        name: str,
        parent: "Self | None" = None,
        *,
        clock: Callable[[], int],
        weight: float = 1.0,
    ) -> None:
        super().__init__(parent, weight=weight)
        self.budget: Budget = Budget(clock, self) if parent is None else parent.budget
        self.name = name
        #: The name that others may see: tenants' names are private.
        self.shown_name = shown_name(name)
        self.observers: Observers | None = None
        self.admitted = 0
        self.cancelled = 0
        self.refused = 0
        #: Admissions whose leases are no longer open.
        self.ended = 0
        self.upstream_429 = 0
        #: Units given back by settling, by resource.
        self.refunded: dict[str, int] = EMPTY_MAPPING
        #: How many calls waited, and how long (ns) in total, by what bound them.
        self.waits: dict[str, tuple[int, int]] = EMPTY_MAPPING

    @property
    def in_flight(self) -> int:
        """How many leases are open."""
        return self.admitted - self.ended

    def after_fork(self) -> None:
        """Start afresh in a child process: the leases in flight are the parent's."""
        super().after_fork()
        self.ended = self.admitted

    def count_refusal_locked(self) -> None:
        """Count a refused call, here and above."""
        for account in self.path:
            account.refused += 1

    def give_up_locked(self, waiter: Waiter) -> None:
        """Withdraw ``waiter``, and count that it gave up, here and above."""
        if self.budget.withdraw_locked(waiter):
            for account in self.path:
                account.cancelled += 1

    def count_wait_locked(self, waited: int, bound_by: str | None) -> None:
        """Count a call that waited ``waited`` ns."""
        if bound_by is None:
            return
        for account in self.path:
            count, total = account.waits.get(bound_by, (0, 0))
            account.waits = account.waits or {}
            account.waits[bound_by] = (count + 1, total + waited)

    def count_refund_locked(self, resource: str, amount: int) -> None:
        """Count a refund, here and above."""
        for account in self.path:
            account.refunded = account.refunded or {}
            account.refunded[resource] = account.refunded.get(resource, 0) + amount

    @property
    def waiting(self) -> int:
        """How many calls wait, here or below."""
        return self.budget.waiting if self.parent is None else self.waiting_below_root

    def observe(self, callback: Callback) -> Callable[[], None]:
        """Call ``callback`` with all events here and below, until the returned function is called."""
        if self.observers is None:
            self.observers = Observers()
        remove = self.observers.add(callback)
        with self.budget.lock:
            self.budget.observed += 1
        watching = True

        def unobserve() -> None:
            nonlocal watching
            remove()
            with self.budget.lock:
                self.budget.observed -= watching
                watching = False

        return unobserve

    def emit(self, event: Event) -> None:
        """Tell observers, here and above; called without the lock."""
        for account in reversed(self.path):
            if account.observers is not None:
                account.observers.emit(event)

    def notify(self, event_type: type[Event], at: int | None = None, **fields: Any) -> None:
        """Make an event of now, or of ``at``, for observers here and above; called without the lock."""
        if self.budget.observed:
            at = self.budget.clock() if at is None else at
            self.emit(event_type(limiter=self.shown_name, at=at * 1e-9, **fields))

    def notify_later(self, event_type: type[Event], **fields: Any) -> None:
        """Make an event that is sent with the next one, because the lock may be held."""
        event = event_type(limiter=self.shown_name, at=self.budget.clock() * 1e-9, **fields)
        for account in self.path:
            if account.observers is not None:
                account.observers.emit_later(event)

    def flush(self) -> None:
        """Send the events that were postponed; called without the lock."""
        for account in self.path:
            if account.observers is not None:
                account.observers.flush()


def shown_name(name: str) -> str:
    """Return the name that others may see: a star instead of a tenant, which `keys` marks by one."""
    return re.sub(r"/\*[^/]*", "/*", name)
