"""The guard against paying twice, which the wrap shares with the transports beneath it.

Here a note carries the usage besides: where a method of a model ends in another and makes something
of its reply, the usage is seen within, and settles the call outside.
"""

import contextlib

from asyncbucket.http.held import Held, around, holding
from asyncbucket.http.learn import Ear
from asyncbucket.limiter import Limiter
from asyncbucket.limiter.lease import Lease
from asyncbucket.limiter.levels import is_under
from asyncbucket.llama_index.usage import Usage


class HeldCall(Held):
    """Note that a model's call runs in this context under a lease of ``limiter``."""

    __slots__ = ("usage",)

    def __init__(self, limiter: Limiter, lease: Lease, ear: Ear) -> None:
        super().__init__(limiter, lease, ear)
        #: What a method called within said it used.
        self.usage: Usage | None = None

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Put the note up for the time of a ``with`` block."""
        return holding(self)


def held_call(limiter: Limiter) -> Held | None:
    """Return the note that this context runs under a lease that counts at ``limiter``, or None."""
    return next((held for held, _ in around() if is_under(held.limiter, limiter)), None)


def note_usage(held: Held, usage: Usage | None) -> None:
    """Keep the usage that a nested call has seen, for the call outside."""
    if usage is not None and isinstance(held, HeldCall):
        held.usage = usage
