"""Who goes next: the calls that wait, in the order in which they came.

A waiter is a future in a deque. Whoever gives up is marked and skipped, so that cancelling is
O(1) wherever it stands; the dead are swept out once they outnumber the living. Where several lines
compete, `asyncbucket.shares` chooses among them.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from asyncbucket.gates import Gates
from asyncbucket.meters import NEVER, Amounts

if TYPE_CHECKING:
    from asyncbucket.branch import Branch
    from asyncbucket.node import Node
    from asyncbucket.pacer import Pacer

#: "Nobody is left": later even than `NEVER`, at which a slot may still come back.
EMPTY: Final = NEVER << 1
#: Sweeping is worth its while from this many dead entries on.
SWEEP: Final = 64


class Passage(NamedTuple):
    """Say how a call has passed; those who passed together share one."""

    gates: Gates
    #: When it was booked there and let go. Where it has to wait for a store, too, that is put off.
    when: int
    #: What had held it up.
    bound_by: str | None


class Waiter(asyncio.Future[Passage | None]):
    """Stand in a line for ``amounts`` to pass all gates from its node up to the root.

    It is resolved with its passage, or with None when the deadline came first. It holds no more than
    it must: the collector looks at each of 100,000 again and again.
    """

    __slots__ = ("amounts", "deadline", "line", "number")

    amounts: Amounts
    #: The place in the order of arrival over all loops.
    number: int
    deadline: int | None
    #: Where it stands, or stood; set by `Line.push`.
    line: "Line"
    #: Who has taken it over, where limits are kept elsewhere. No slot: few have one, and a future takes
    #: other attributes all the same.
    outlet: "Outlet | None" = None

    @property
    def node(self) -> "Node":
        """The limiter at which it waits."""
        return self.line.node

    def unbook(self, passage: Passage) -> None:
        """Undo the booking of a call that was not made, with what its shares paid for it."""
        passage.gates.unbook(self.amounts, passage.when)
        self.node.correct(self.line.priority, self.amounts, None)

    def __lt__(self, other: "Waiter") -> bool:
        return self.number < other.number


class Outlet(Protocol):
    """Take over those who go next, where the limits of the root are kept elsewhere."""

    def room(self) -> bool:
        """Tell whether it takes another one now; it rings the pacer when that changes."""
        ...

    def push(self, waiter: Waiter, passage: Passage) -> None:
        """Take over ``waiter``, whose ``passage`` is booked; its pacer is told what becomes of it."""
        ...

    def put_off(self, now: int) -> None:
        """Have all count from ``now`` who were taken over, on whichever loop, and have not left yet.

        Else limits below the root would forget those who wait for long, and let too many leave at once.
        """
        ...

    def leave(self, waiter: Waiter) -> bool:
        """Give back all that ``waiter``, done, has taken; return True, as `Line.leave` does of a head."""
        ...


class Line:
    """Hold in order of arrival those who wait at one node, on one loop, with one priority.

    Every operation is O(1), amortised. It is a whole queue, too, where nobody but the root's own calls
    waits: then it stands for a `Tree`, and has all that a pacer asks one for.
    """

    __slots__ = ("_line", "_living", "above", "bound_by", "node", "pacer", "priority", "since")

    #: A line never sleeps: without a head nobody is left.
    wake: Final = EMPTY
    #: Lines of several loops compete by arrival alone.
    turn: Final = ()
    #: In a line nobody is expected: whoever comes back stands at its end.
    expects: Final = False
    #: In a line nobody has limits that others have not.
    calm_until: Final = EMPTY
    #: Below a line there is nothing.
    held_by: Final = None

    def __init__(self, node: "Node", pacer: "Pacer", priority: int = 0) -> None:
        self.node = node
        self.pacer = pacer
        self.priority = priority
        self._line: deque[Waiter] = deque()
        self._living = 0
        #: Since when somebody has stood first here without anyone being served.
        self.since = 0
        #: Who counts those who wait here, too.
        self.above: tuple[Branch, ...] = ()
        #: What held up its head last.
        self.bound_by: str | None = None

    def __len__(self) -> int:
        return self._living

    def waiters(self) -> Iterator[Waiter]:
        """Yield all who wait, in order."""
        return (waiter for waiter in self._line if not waiter.done())

    def push(self, waiter: Waiter, now: int) -> None:
        """Let ``waiter`` stand at the end of the line."""
        if not self._living:
            self.since = now
        waiter.line = self
        self._line.append(waiter)
        self._living += 1
        for each in self.above:
            each.living += 1

    def head(self, now: int = 0, *, slotless: int = 0) -> Waiter | None:  # noqa: ARG002 - as `Branch.head`
        """Return the first who still waits."""
        line = self._line
        while line:
            if not line[0].done():
                return line[0]
            line.popleft()
        return None

    def served(self, head: Waiter, now: int) -> None:  # noqa: ARG002 - as `Tree.served`
        """Take ``head``, which passed, out of the line; `Branch.served` counts it out above."""
        self._line.popleft()
        self._living -= 1
        self.since = now

    def serve_alike(self, amounts: Amounts, most: int, now: int) -> list[Waiter]:
        """Take out, as `served`, the head and those right behind it who want the same ``amounts``."""
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

    def begin(self) -> None:
        """See `expects`."""

    def free_for(self, node: "Node", now: int) -> bool:  # noqa: ARG002 - as `Tree.free_for`
        """Tell whether a newcomer would overtake nobody."""
        return self.head() is None

    def binding(self, node: "Node") -> str | None:  # noqa: ARG002 - as `Tree.binding`
        """Return what held up its head last."""
        return self.bound_by

    def rouse(self, node: "Node") -> None:
        """Nobody sleeps in a line."""

    def rouse_all(self) -> None:
        """Nobody sleeps in a line."""

    def disband(self) -> None:
        """Nobody competes in a line."""

    def leave(self, waiter: Waiter) -> bool:
        """Take ``waiter``, done, out of the line; return whether it was its head, or the last.

        It may have been skipped already, by whoever looked for the head since; another line may stand
        in the place of this one by then.
        """
        self._living -= 1
        for each in self.above:
            each.living -= 1
        line = self._line
        first = line[0].number >= waiter.number if line else not self._living
        if len(line) > 2 * self._living + SWEEP:
            self._line = deque(self.waiters())
        return first


class Deadlines:
    """Know whose deadline comes first, so that one timer serves them all."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[int, Waiter]] = []

    def push(self, waiter: Waiter, deadline: int) -> None:
        """Watch ``waiter``."""
        heapq.heappush(self._heap, (deadline, waiter))

    def first(self) -> int:
        """Return the first deadline of those who still wait, or `NEVER`."""
        heap = self._heap
        while heap and heap[0][1].done():
            heapq.heappop(heap)
        return heap[0][0] if heap else NEVER

    def expired(self, now: int) -> Iterator[Waiter]:
        """Yield those whose deadline has come; the caller resolves them."""
        while self.first() <= now:
            yield self._heap[0][1]

    def sweep(self, living: int) -> None:
        """Forget the dead if they outnumber the ``living``."""
        if len(self._heap) > 2 * living + SWEEP:
            self._heap = [each for each in self._heap if not each[1].done()]
            heapq.heapify(self._heap)
