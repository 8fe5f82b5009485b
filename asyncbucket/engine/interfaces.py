"""What leans on the engine, as the engine sees it; besides meters, which say what may pass.

An `Account` is told of a call: a budget, a run of an agent, a pool's member, a store's slot. A lease
has a tuple of accounts, ``lease.accounts``, and for most calls it is empty. Whatever knows a call
before it asks (a scope around the code that makes it) puts an account there as the lease is made.
What belongs to the limiter (whatever finds its number of slots, whatever keeps its slots in a store)
is added when the call passes: ``Node.accounts``. An `Order` arranges a line, a `Sizer` finds the number
of slots, a `PauseMeter` lets nobody pass for a while, a `Place` keeps a root's limits in a store.
"""

# What they are told is for those who implement them.
# ruff: noqa: ARG002

from collections.abc import Collection, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from asyncbucket.engine.errors import AsyncBucketError
from asyncbucket.engine.events import Outcome
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Amounts, Meter, Meters, Slots
from asyncbucket.engine.statistics import LimitUse


class Admission(Protocol):
    """What an account may ask of a lease."""

    accounts: "tuple[Account, ...]"

    @property
    def bound_by(self) -> str | None:
        """What it waited for; None if it did not wait."""
        ...

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


class Order(Protocol):
    """Order the calls of a limiter that wait, if not by their arrival."""

    @property
    def applies(self) -> bool:
        """Whether it orders them now."""
        ...

    def arrange(self, calls: Iterable[Any]) -> Any:
        """Return ``calls`` in a line: something to be used like a deque."""
        ...


@runtime_checkable
class PauseMeter(Meter, Protocol):
    """Let nobody pass for a while: a meter that people set."""

    #: Until when (ns), and why.
    until: int
    reason: str
    #: The length of a step (ns) of its slow start, if it is to start slowly.
    step: int

    def begin(self, until: int, now: int, *, gradually: bool, reason: str = "") -> None:
        """Pause until ``until``; an earlier pause that ends later stays, with its slow start."""

    def end(self, now: int) -> None:
        """End it at ``now``, with its slow start."""


class Sizer(Protocol):
    """Find the number of slots from how calls end: the other half of the feedback interface."""

    size: int
    least: int
    most: int
    #: Whether it has raised the size, and no call that was admitted since has succeeded: a single
    #: refusal then tells of it.
    is_trying: bool

    def ended(self, outcome: str, *, started: int, now: int, waited: bool, full: bool) -> None:
        """Take in the end of a call; ``size`` may change.

        Args:
            outcome: ``"ok"``, ``"overloaded"`` or ``"failed"``.
            started: when the call was admitted.
            now: when it ended.
            waited: whether it had waited for a slot.
            full: whether all slots were taken until then.
        """


class Place(Account):
    """Keep the limits of a root, or of a tenant, where other processes reach them.

    The pacer decides who goes next, and books what is limited here. Then the call stands at its
    tenant's place until the store has booked it, and then at the root's, until that is booked, too,
    and its start has come. `room`, `let_go`, `push`, `leave` and `ended` are called with the pacer's lock held.
    """

    #: The calls that stand here: until the store books them, or until they start.
    calls: dict[Any, Any]  # pyright: ignore[reportUninitializedInstanceVariable]

    def below(self, node: Any) -> "Place":
        """Return what keeps the limits of ``node``, a tenant, in the same store."""
        raise NotImplementedError

    def is_idle(self) -> bool:
        """Tell whether the store knows everything, so that this may be forgotten."""
        raise NotImplementedError

    def room(self, dispatcher: Any) -> bool:
        """Tell whether it takes another call of this dispatcher now; it rings the dispatcher when that changes."""
        raise NotImplementedError

    def push(self, waiter: Any, below: Meters, now: int) -> None:
        """Take over ``waiter``, booked at ``now`` in the meters ``below`` the root.

        Later it goes (`let_go`), or fails by `Pacer.fail_locked`.
        """

    def let_go(self, dispatcher: Any, now: int) -> int:
        """Let the calls of ``dispatcher``, which dispatches, go whose start has come: by `Pacer.pass_on_locked`.

        Return when it must dispatch again on account of those that stand here.
        """
        raise NotImplementedError

    def leave(self, waiter: Any) -> Any:
        """Give back what a call took here that goes; return its line if it stood here, else None."""
        raise NotImplementedError

    def ended(self, lease: Admission, outcome: Outcome) -> None:
        """Give back the slot of ``lease``, once."""

    def held_up(self) -> tuple[str, int] | None:
        """Return what the first of them waits for, or another would, and until when at least, if that is known.

        "" means that it waits for the store to come back, and `NEVER` that it depends on a slot being given back.
        """
        raise NotImplementedError

    def held_back(self) -> list[Any]:
        """Return the calls, in order, that the store has not booked because it holds the first up."""
        raise NotImplementedError

    def use(self) -> Iterator[LimitUse]:
        """Yield how much of each limit is used, as last heard."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return the arguments with which another `Limiter` keeps its limits there; {} if none can."""
        raise NotImplementedError

    def check(self, limits: Iterable[Limit], concurrency: Any) -> None:
        """Refuse changes that the store cannot keep; this changes nothing.

        Raises:
            ValueError: it cannot keep one of them.
        """

    def configure(self) -> None:
        """Tell all processes the limits as they are now."""

    def pause(self, span: int, *, gradually: bool) -> None:
        """Tell all processes to let nobody pass for ``span`` ns."""

    async def aclose(self) -> None:
        """Give back what this process holds, and leave the store."""
