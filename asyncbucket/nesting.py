"""One call inside another: the guard against paying twice, and against waiting for oneself.

**Paying once.** Layers are stacked. LlamaIndex's public methods call each other: ``CustomLLM.achat``
calls ``chat``, which calls ``complete``, and each of them is paced. Beneath them there may be an
HTTP client whose transport is paced, too. The outermost layer pays, and notes it in a context
variable while the inner code runs; a layer that finds the note does not pay.

**Giving slots back.** A tool may call a paced model, or another tool, or run a whole agent. While
it waits for that it does nothing itself, yet holds a slot. If both pass the same limiter, be it
only the root, the inner call may be waiting for that very slot: for ever, if all slots are held
this way. So before an inner call is admitted, the calls around it give back their slots, for good,
at the levels that both pass. At the others they keep them: of a child ``tools`` with two slots, no
more than two tools run, even if both call models of a sibling. What a call costs stays charged. A
model that calls another one gives up slots like a tool, unless its own call pays for that one.

Two traps shape this module. First, a context outlives the call that ran in it: asyncio keeps a copy
for every connection that the call opened, and a task started inside keeps one for good. So a note
refers to its lease weakly (otherwise a pooled connection would hold a slot for ever), and counts
only until the lease is released. Second, a variable set in the body of an async generator leaks
into the code that iterates over it. So it is set around one step of the inner stream at a time.
"""

import contextlib
import weakref
from collections.abc import Generator, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.core.context import put_back
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import give_back, on_one_path, sent
from asyncbucket.core.limiter import Limiter
from asyncbucket.providers.errors import FIRST_ERROR

if TYPE_CHECKING:
    from asyncbucket.providers.learn import HeaderReader
    from asyncbucket.providers.profiles import Profile


class LeaseRef:
    """Refer to a lease while it is held, without keeping it alive."""

    __slots__ = ("_lease",)

    def __init__(self, lease: Lease) -> None:
        self._lease = weakref.ref(lease)

    @property
    def lease(self) -> Lease | None:
        """The lease, while it is held."""
        lease = self._lease()
        return None if lease is None or lease.released else lease


class HeldLease(LeaseRef):
    """Note that calls in this context run under a lease of ``limiter``."""

    __slots__ = (
        "_header_reader",
        "_paid_requests",
        "_sent_at",
        "limiter",
        "outer",
        "profile",
        "requests",
    )

    def __init__(
        self, limiter: Limiter, lease: Lease, header_reader: "HeaderReader | None" = None
    ) -> None:
        super().__init__(lease)
        self.limiter = limiter
        self._header_reader = header_reader
        self._sent_at: float | None = None
        #: The profile of the provider that its requests go to, once one was seen to leave.
        self.profile: Profile | None = None
        self.outer = _HELD.get()
        #: Requests that were seen to leave under this lease.
        self.requests = 0
        #: Requests that the lease pays for.
        self._paid_requests = 1

    def request_prepared(self) -> None:
        """Count a request that is about to leave, and date the booking to now."""
        lease = self.lease
        if lease is not None:
            self.requests += 1
            self.pay_for(self.requests)  # one call of the model may send several requests
            sent(lease)

    def pay_for(self, requests: int) -> None:
        """Make the lease pay for ``requests`` requests, unless it does so already."""
        lease = self.lease
        if lease is not None and requests > self._paid_requests:
            self._paid_requests = requests
            lease.settle(requests=requests)

    def request_sent(self) -> None:
        """Date the booking to now, when the request really goes out."""
        self._sent_at = self.limiter.now()
        lease = self.lease
        if lease is not None:
            sent(lease)

    def headers_received(self, status: int, headers: Any, profile: "Profile") -> None:
        """Take in what the headers of a reply say of the provider's limits."""
        if self._header_reader is not None:
            self._header_reader.read(headers, profile, since=self._sent_at, ok=status < FIRST_ERROR)


_HELD: Final[ContextVar[HeldLease | None]] = ContextVar("asyncbucket_held", default=None)


def innermost_held_lease() -> HeldLease | None:
    """Return the innermost note of this context."""
    return _HELD.get()


def held_leases() -> Iterator[tuple[HeldLease, Lease]]:
    """Yield the notes of this context whose leases are held, and the leases, innermost first."""
    held = _HELD.get()
    while held is not None:
        lease = held.lease
        if lease is not None:
            yield held, lease
        held = held.outer


def paying_limiter(limiter: Limiter) -> Limiter | None:
    """Return the limiter whose lease is held here, if it is on one path with ``limiter``."""
    for held, _ in held_leases():
        if on_one_path(held.limiter, limiter):
            return held.limiter
    return None


@contextlib.contextmanager
def holding(held: HeldLease) -> Generator[None]:
    """Make ``held`` the innermost note for the time of a ``with`` block."""
    token = _HELD.set(held)
    try:
        yield
    finally:
        put_back(_HELD, token)


class RunningCall(LeaseRef):
    """Note that a tool's call runs in this context."""

    __slots__ = ("has_inner_calls", "outer", "tool")

    def __init__(self, tool: object, lease: Lease, outer: "RunningCall | None") -> None:
        super().__init__(lease)
        self.tool = tool
        self.outer = outer
        #: Whether another call was made inside.
        self.has_inner_calls = False


_RUNNING: Final[ContextVar[RunningCall | None]] = ContextVar("asyncbucket tools", default=None)


@contextlib.contextmanager
def running(tool: object, lease: Lease) -> Generator[None]:
    """Note that ``tool`` runs under ``lease`` in a ``with`` block."""
    token = _RUNNING.set(RunningCall(tool, lease, _RUNNING.get()))
    try:
        yield
    finally:
        put_back(_RUNNING, token)


def is_running(tool: object) -> bool:
    """Tell whether a method of ``tool`` is running here: then another method is part of its call.

    Once another call was made inside, such as a model's, a further call of ``tool`` is a new one.
    """
    current = _RUNNING.get()
    return (
        current is not None
        and current.tool is tool
        and not current.has_inner_calls
        and current.lease is not None
    )


def give_up_slots(limiter: Limiter) -> None:
    """Make the calls around this context give back the slots that a call of ``limiter`` needs."""
    current = _RUNNING.get()
    while current is not None:
        current.has_inner_calls = True
        lease = current.lease
        if lease is not None:
            give_back(lease, limiter)
        current = current.outer
    for _, lease in held_leases():
        give_back(lease, limiter)
