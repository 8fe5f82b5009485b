"""Tool calls in progress in a context, and how they give up slots for calls made inside.

A tool may call a paced model, or another tool, or run a whole agent. While it waits for that it
does nothing itself, yet holds a slot. If both pass the same limiter, be it only the root, the inner
call may be waiting for that very slot: for ever, if all slots are held this way. So before an inner
call is admitted, the tools around it give back their slots at the levels that both pass. At the
others they keep them: of a child ``tools`` with two slots, no more than two tools run, even if both
call models of a sibling. What a tool costs stays charged.

See `asyncbucket.core.lending` for which slots those are, and how two calls are kept from waiting
for each other.

A model may call another one that is paced elsewhere: by a child of its limiter, or by a sibling. If
the model's own call does not pay for that one (see `held`), the model gives up slots like a tool.

A task started by a tool sees the tool in its context even after the tool has ended. So a note
counts only until its lease is released.
"""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Final

from asyncbucket.core.context import put_back
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import give_back
from asyncbucket.core.limiter import Limiter
from asyncbucket.http.held import LeaseRef, held_leases


class RunningCall(LeaseRef):
    """Note that a tool's call runs in this context."""

    __slots__ = ("has_inner_calls", "outer", "tool")

    def __init__(self, tool: object, lease: Lease, outer: "RunningCall | None") -> None:
        super().__init__(lease)
        self.tool = tool
        self.outer = outer
        #: Whether another call was made inside.
        self.has_inner_calls = False

    def give_up_slots(self, limiter: Limiter) -> None:
        """Give back the slots that a call of ``limiter`` needs."""
        self.has_inner_calls = True
        lease = self.lease
        if lease is not None:
            give_back(lease, limiter)


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
        current.give_up_slots(limiter)
        current = current.outer
    for _, lease in held_leases():
        give_back(lease, limiter)
