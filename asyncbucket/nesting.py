"""One call inside another: the guard against paying twice, and against waiting for oneself.

**Paying once.** Layers are stacked. LlamaIndex's public methods call each other: ``CustomLLM.achat``
calls ``chat``, which calls ``complete``, and each of them is paced. Beneath them there may be an
HTTP client whose transport is paced, too. The outermost layer pays, and notes it in a context
variable while the inner code runs; a layer that finds the note does not pay. A tool's note differs:
it pays for the tool alone, and what the tool calls pays for itself.

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

import weakref
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Final

from asyncbucket.engine.context import put_back
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.levels import counts_at, give_back, is_under


class HeldLease:
    """Note that the calls in a ``with`` block of this object run under a lease of ``limiter``.

    Args:
        limiter: the limiter that was asked.
        lease: the lease; it is not kept alive.
        tool: the tool whose call it is; None if the lease pays for the calls inside.
    """

    __slots__ = ("_lease", "_token", "has_inner_calls", "limiter", "outer", "tool")

    def __init__(self, limiter: Limiter, lease: Lease, *, tool: object = None) -> None:
        self.limiter = limiter
        self.tool = tool
        self.outer = _HELD.get()
        self._lease = weakref.ref(lease)
        self.has_inner_calls = False
        self._token: Token[HeldLease | None] | None = None

    def __enter__(self) -> None:
        self._token = _HELD.set(self)

    def __exit__(self, *error: object) -> None:
        token, self._token = self._token, None
        if token is not None:
            put_back(_HELD, token)

    @property
    def lease(self) -> Lease | None:
        """The lease, while it is held."""
        lease = self._lease()
        return None if lease is None or lease.released else lease

    def give_up_slot(self, limiter: Limiter) -> None:
        """Give back the slots that a call of ``limiter``, inside this one, needs."""
        self.has_inner_calls = True
        lease = self.lease
        if lease is not None:
            give_back(lease, limiter)


_HELD: Final[ContextVar[HeldLease | None]] = ContextVar("asyncbucket_held", default=None)


def innermost_held_lease() -> HeldLease | None:
    """Return the innermost note of this context."""
    return _HELD.get()


def held_leases() -> Iterator[HeldLease]:
    """Yield the notes of this context, innermost first."""
    held = _HELD.get()
    while held is not None:
        yield held
        held = held.outer


def paying_lease(limiter: Limiter) -> HeldLease | None:
    """Return the note of the lease that pays for calls of ``limiter`` here, if they count at one."""
    for held in held_leases():
        lease = None if held.tool is not None else held.lease
        if lease is not None and (counts_at(lease, limiter) or is_under(limiter, held.limiter)):
            return held
    return None


def is_running(tool: object) -> bool:
    """Tell whether a method of ``tool`` is running here: then another method is part of its call.

    Once another call was made inside, such as a model's, a further call of ``tool`` is a new one.
    """
    held = _HELD.get()
    if held is None or held.tool is not tool or held.has_inner_calls:
        return False
    return held.lease is not None


def give_up_slots(limiter: Limiter) -> None:
    """Make the calls around this context give back the slots that a call of ``limiter`` needs."""
    for held in held_leases():
        held.give_up_slot(limiter)
