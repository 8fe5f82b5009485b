"""Who goes next: the calls that wait, in the order in which they came.

A waiter is a future in a deque. Whoever gives up is marked and skipped, so that cancelling is
O(1) wherever it stands; the dead are swept out once they outnumber the living. Deadlines lie on a
heap beside the deque, so that one timer serves them all.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Iterator
from typing import Final

from asyncbucket.meters import NEVER, Amounts, Gates

#: Sweeping is worth its while from this many dead entries on.
_SWEEP: Final = 64


class Waiter(asyncio.Future[int]):
    """Stand in line for ``amounts`` to pass ``gates``.

    It is resolved with the instant at which they were booked, or with `NEVER` when the deadline
    came first.
    """

    __slots__ = ("amounts", "arrived", "bound_by", "deadline", "gates", "number", "queue")

    gates: Gates
    amounts: Amounts
    #: The place in the order of arrival over all loops.
    number: int
    arrived: int
    deadline: int | None
    #: The resource that held up the line when this waiter left it.
    bound_by: str | None
    #: Where it stands; set by `Queue.push`.
    queue: "Queue"

    def __lt__(self, other: "Waiter") -> bool:
        return self.number < other.number


class Queue:
    """Hold waiters in order of arrival; every operation is O(1), amortised, or O(log n)."""

    __slots__ = ("_deadlines", "_line", "_living")

    def __init__(self) -> None:
        self._line: deque[Waiter] = deque()
        self._deadlines: list[tuple[int, Waiter]] = []
        self._living = 0

    def __len__(self) -> int:
        return self._living

    def __iter__(self) -> Iterator[Waiter]:
        return (waiter for waiter in self._line if not waiter.done())

    def push(self, waiter: Waiter) -> None:
        """Let ``waiter`` stand at the end of the line."""
        waiter.queue = self
        self._line.append(waiter)
        self._living += 1
        if waiter.deadline is not None:
            heapq.heappush(self._deadlines, (waiter.deadline, waiter))

    def head(self) -> Waiter | None:
        """Return the first who still waits."""
        line = self._line
        while line:
            if not line[0].done():
                return line[0]
            line.popleft()
        return None

    def passed(self, count: int) -> None:
        """Count that ``count`` heads, done, have left the line."""
        self._living -= count

    def leave(self, waiter: Waiter) -> bool:
        """Count that ``waiter``, done, has left the line; return whether it was its head.

        It may have been skipped already, by whoever looked for the head since.
        """
        self._living -= 1
        line = self._line
        first = not line or line[0].number >= waiter.number
        if len(line) > 2 * self._living + _SWEEP:
            self._line = deque(self)
        if len(self._deadlines) > 2 * self._living + _SWEEP:
            self._deadlines = [each for each in self._deadlines if not each[1].done()]
            heapq.heapify(self._deadlines)
        return first

    def expired(self, now: int) -> Iterator[Waiter]:
        """Yield those whose deadline has come; the caller resolves them and lets them leave."""
        while self.next_deadline() <= now:
            yield self._deadlines[0][1]

    def next_deadline(self) -> int:
        """Return the first deadline of those who still wait, or `NEVER`."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][1].done():
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else NEVER
