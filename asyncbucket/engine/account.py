"""What is told of a call beside the limits: a budget, a run of an agent, a pool's member, a store's slot.

A lease has a tuple of accounts, ``lease.accounts``, and for most calls it is empty. Whatever knows a
call before it asks (a scope around the code that makes it) puts an account there as the lease is
made. What belongs to the limiter (whatever finds its number of slots, whatever keeps its slots in a
store) is added when the call passes: ``Node.accounts``.
"""

# What they are told is for those who implement them.
# ruff: noqa: ARG002

from collections.abc import Collection
from typing import Protocol

from asyncbucket.engine.errors import AsyncBucketError
from asyncbucket.engine.events import Outcome
from asyncbucket.engine.meters import Amounts, Slots


class Admission(Protocol):
    """What an account may ask of a lease."""

    accounts: "tuple[Account, ...]"
    bound_by: str | None

    @property
    def amounts(self) -> Amounts:
        """What was reserved."""
        ...

    @property
    def reported(self) -> Collection[str]:
        """The resources whose use was settled."""
        ...

    @property
    def levels(self) -> tuple[Slots, ...]:
        """Where it has its slots."""
        ...

    @property
    def released(self) -> bool:
        """Whether the call is over."""
        ...

    def began(self, outcome: Outcome) -> int:
        """Return when the call began (ns), if it ended so."""
        ...


class Account:
    """Hear of a call: the one interface for everything beside the limits. By default, nothing happens.

    A call that is taken back, because it gave up when it had just passed or because an account
    refused it then, is settled to nothing, and ends as ``"failed"``.
    """

    __slots__ = ()

    def refuses(self, amounts: Amounts) -> AsyncBucketError | None:
        """Return why the call must not be made, or None; without the limiter's lock.

        It is asked twice: before the call waits, and again when it has `passed`. If the second answer
        is an error, the call is taken back.
        """

    async def reconsiders(self, error: AsyncBucketError, *, blocking: bool) -> bool:
        """Tell whether to ask once more instead of raising ``error``, which it returned.

        ``blocking`` says that nothing can be awaited here, because a thread waits for the call.
        """
        return False

    def gave_up(self, lease: Admission) -> None:
        """Take in that the call has left its line without being admitted; with the lock held."""

    def passed(self, lease: Admission, now: int) -> None:
        """Take in that the call was admitted at ``now``; with the limiter's lock held."""

    def settled(self, lease: Admission, before: Amounts, after: Amounts) -> None:
        """Take in that the call costs ``after``, no longer ``before``; with the limiter's lock held."""

    def ended(self, lease: Admission, outcome: Outcome) -> None:
        """Take in that the call is over; with the limiter's lock held."""

    def refused(self, now: int) -> None:
        """Take in that the provider refused a call for rate; with the limiter's lock held."""
