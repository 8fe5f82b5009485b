"""Who goes next: the calls that wait, in order of arrival.

A waiter is a future in a deque. A waiter that gives up is marked, and skipped later, so cancelling
is O(1) anywhere in the line. Done entries are swept out once they outnumber those that still wait.
If several lines compete, `asyncbucket.core.shares` chooses among them.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from asyncbucket.core.gates import Gates
from asyncbucket.core.meters import NEVER, Amounts

if TYPE_CHECKING:
    from asyncbucket.core.branch import Branch
    from asyncbucket.core.node import Node
    from asyncbucket.core.pacer import Pacer

#: "Nobody is left": later even than `NEVER`, which may still end when a slot is given back.
EMPTY: Final = NEVER << 1
#: Sweeping pays from this many done entries on.
SWEEP: Final = 64


class Passage(NamedTuple):
    """Say how a call has passed; calls that passed together share one."""

    gates: Gates
    #: When it was booked and let go; moved later while it still waits for a store.
    when: int
    #: What held it up.
    bound_by: str | None


class Waiter(asyncio.Future[Passage | None]):
    """Wait in a line for ``amounts`` to pass all gates from its node up to the root.

    It is resolved with its passage, or with None if the deadline came first. It holds as little as
    possible, because the garbage collector visits each of 100,000 waiters again and again.
    """

    __slots__ = ("amounts", "deadline", "line", "number")

    amounts: Amounts
    #: The place in the order of arrival over all loops.
    number: int
    deadline: int | None
    #: The line it stands or stood in; set by `Line.join`.
    line: "Line"
    #: Where limits are kept elsewhere, who has taken it over. Not in a slot: few waiters have one,
    #: and a future has a `__dict__` anyway.
    outlet: "Outlet | None" = None

    @property
    def node(self) -> "Node":
        """The limiter at which it waits."""
        return self.line.node

    def unbook(self, passage: Passage) -> None:
        """Undo the booking of a call that was not made, and what its shares paid for it."""
        passage.gates.unbook(self.amounts, passage.when)
        self.node.correct(self.line.priority, self.amounts, None)

    def __lt__(self, other: "Waiter") -> bool:
        return self.number < other.number


class Outlet(Protocol):
    """Take over the waiters that go next, if the root's limits are kept elsewhere."""

    def room(self) -> bool:
        """Tell whether it takes another waiter now; it rings the pacer when that changes."""
        ...

    def push(self, waiter: Waiter, passage: Passage) -> None:
        """Take over ``waiter``, whose ``passage`` is booked; its pacer is told how that ends."""
        ...

    def redate(self, now: int) -> None:
        """Date to ``now`` all waiters, of any loop, that were taken over and have not left yet.

        Otherwise limits below the root would forget those that wait for long, and let too many
        leave at once.
        """
        ...

    def leave(self, waiter: Waiter) -> bool:
        """Give back all that ``waiter``, done, has taken; return True, as `Line.leave` of a head."""
        ...


class Line:
    """Hold the waiters of one node, one loop and one priority, in order of arrival.

    Every operation is O(1), amortised. If only the root's own calls wait, a line is the whole
    queue: it then stands in for a `Tree`, and has all the attributes that a pacer uses.
    """

    __slots__ = ("_line", "_living", "above", "bound_by", "node", "pacer", "priority", "since")

    #: A line never sleeps: if it has no head, nobody is left.
    wake: Final = EMPTY
    #: Lines of several loops compete by order of arrival alone.
    turn: Final = ()
    #: A line never waits for callers to come back: they go to its end.
    expects_caller: Final = False
    #: No call in a line has limits that the others do not have.
    calm_until: Final = EMPTY
    #: There are no limits below a line.
    held_by: Final = None

    def __init__(self, node: "Node", pacer: "Pacer", priority: int = 0) -> None:
        self.node = node
        self.pacer = pacer
        self.priority = priority
        self._line: deque[Waiter] = deque()
        self._living = 0
        #: Since when somebody has been first here without anyone being served.
        self.since = 0
        #: The branches above, which count these waiters, too.
        self.above: tuple[Branch, ...] = ()
        #: What last held up its head.
        self.bound_by: str | None = None

    def __len__(self) -> int:
        return self._living

    def waiters(self) -> Iterator[Waiter]:
        """Yield all who wait, in order."""
        return (waiter for waiter in self._line if not waiter.done())

    def join(
        self,
        waiter: Waiter,
        now: int,
        node: "Node | None" = None,  # noqa: ARG002 - as `Tree.join`
        priority: int = 0,  # noqa: ARG002 - as `Tree.join`
    ) -> None:
        """Append ``waiter`` to the line."""
        if not self._living:
            self.since = now
        waiter.line = self
        self._line.append(waiter)
        self._living += 1
        for branch in self.above:
            branch.living += 1

    def head(self, now: int = 0, *, slotless: int = 0) -> Waiter | None:  # noqa: ARG002 - as `Branch.head`
        """Return the first that still waits."""
        line = self._line
        while line:
            if not line[0].done():
                return line[0]
            line.popleft()
        return None

    def served(self, head: Waiter, now: int) -> None:  # noqa: ARG002 - as `Tree.served`
        """Remove ``head``, which passed; `Branch.served` counts it out above."""
        self._line.popleft()
        self._living -= 1
        self.since = now

    def serve_alike(self, amounts: Amounts, most: int, now: int) -> list[Waiter]:
        """Remove, as `served` does, the head and those right behind it with the same ``amounts``."""
        line = self._line
        alike: list[Waiter] = []
        while line and len(alike) < most:
            head = line[0]
            if not head.done():
                if head.amounts is not amounts and head.amounts != amounts:
                    break
                alike.append(head)
            line.popleft()
        self._living -= len(alike)
        self.since = now
        return alike

    def begin_pass(self) -> None:
        """Do nothing: see `expects_caller`."""

    def is_free_for(self, node: "Node", now: int) -> bool:  # noqa: ARG002 - as `Tree.is_free_for`
        """Tell whether a newcomer would overtake nobody."""
        return self.head() is None

    def binding(self, node: "Node") -> str | None:  # noqa: ARG002 - as `Tree.binding`
        """Return what last held up its head."""
        return self.bound_by

    def rouse(self, node: "Node") -> None:
        """Do nothing: nobody sleeps in a line."""

    def rouse_all(self) -> None:
        """Do nothing: nobody sleeps in a line."""

    def disband(self) -> None:
        """Do nothing: nobody competes in a line."""

    def leave(self, waiter: Waiter) -> bool:
        """Count out ``waiter``, which is done; return whether it was the head, or the last one.

        It may have been skipped already while looking for the head, and another line may have
        taken this line's place.
        """
        self._living -= 1
        for branch in self.above:
            branch.living -= 1
        line = self._line
        first = line[0].number >= waiter.number if line else not self._living
        if len(line) > 2 * self._living + SWEEP:
            self._line = deque(self.waiters())
        return first


class Deadlines:
    """Know which deadline comes first, so that one timer serves all."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[int, Waiter]] = []

    def push(self, waiter: Waiter, deadline: int) -> None:
        """Watch ``waiter``."""
        heapq.heappush(self._heap, (deadline, waiter))

    def first(self) -> int:
        """Return the first deadline of those that still wait, or `NEVER`."""
        heap = self._heap
        while heap and heap[0][1].done():
            heapq.heappop(heap)
        return heap[0][0] if heap else NEVER

    def expired(self, now: int) -> Iterator[Waiter]:
        """Yield the waiters whose deadline has come; the caller resolves them."""
        while self.first() <= now:
            yield self._heap[0][1]

    def sweep(self, living: int) -> None:
        """Forget waiters that are done, if they outnumber the ``living``."""
        if len(self._heap) > 2 * living + SWEEP:
            self._heap = [entry for entry in self._heap if not entry[1].done()]
            heapq.heapify(self._heap)
