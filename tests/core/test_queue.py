"""The line by itself, without a clock and without meters."""

import asyncio
from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket.core.meters import NEVER
from asyncbucket.core.node import Node
from asyncbucket.core.queue import Deadlines, Line, Waiter

#: No pacer serves these lines.
NOBODY: Final[Any] = None


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Give a loop for futures to belong to; it never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def waiter(loop: asyncio.AbstractEventLoop, number: int, deadline: int | None = None) -> Waiter:
    """Return a waiter with this place in the order of arrival."""
    made = Waiter(loop=loop)
    made.number = number
    made.deadline = deadline
    return made


moves = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "pass", "leave", "expire", "leave some"]),
        st.integers(0, 1000),
    ),
    max_size=200,
)


@settings(deadline=None, max_examples=100)
@given(moves)
def test_line_behaves_like_plain_list(history: list[tuple[str, int]]) -> None:
    """Head, members and deadlines are those of a plain list, whatever is pushed, served or left."""
    loop = asyncio.new_event_loop()
    line, deadlines = Line(Node(), NOBODY), Deadlines()
    waiting: list[Waiter] = []
    now = 0
    for number, (verb, pick) in enumerate(history):
        if verb == "push":
            deadline = None if pick % 2 else now + pick
            made = waiter(loop, number, deadline)
            line.join(made, now)
            if deadline is not None:
                deadlines.push(made, deadline)
            waiting.append(made)
        elif verb == "pass" and waiting:
            head = line.head()
            assert head is not None
            assert head is waiting.pop(0)
            head.set_result(None)
            line.served(head, now)
        elif verb.startswith("leave") and waiting:
            head, told = waiting[0], False
            for gone in [
                waiting.pop(pick % len(waiting)) for _ in range(min(len(waiting), pick % 20))
            ]:
                gone.cancel()
                told = line.leave(gone) or told
                deadlines.sweep(len(line))
            assert told == head.done()
        elif verb == "expire":
            now += pick
            for gone in deadlines.expired(now):
                gone.set_result(None)
                line.leave(gone)
                waiting.remove(gone)
        assert len(line) == len(waiting)
        assert list(line.waiters()) == waiting
        assert line.head() is (waiting[0] if waiting else None)
        ends = [each.deadline for each in waiting if each.deadline is not None]
        assert deadlines.first() == min(ends, default=NEVER)
        assert all(end > now or verb != "expire" for end in ends)
        assert len(line._line) <= 2 * len(waiting) + 70
        deadlines.sweep(len(waiting))
        assert len(deadlines._heap) <= 2 * len(waiting) + 70
    loop.close()


def test_calls_that_left_line_are_swept_out(loop: asyncio.AbstractEventLoop) -> None:
    """Ten thousand calls that left from the middle are removed, and so are their deadlines."""
    line, deadlines = Line(Node(), NOBODY), Deadlines()
    first, last = waiter(loop, 0), waiter(loop, 10_001)
    line.join(first, 0)
    crowd = [waiter(loop, number, number) for number in range(1, 10_001)]
    for each in crowd:
        line.join(each, 0)
        deadlines.push(each, each.number)
    line.join(last, 0)
    for each in crowd:
        each.cancel()
        assert not line.leave(each)
        deadlines.sweep(len(line))
    assert list(line.waiters()) == [first, last]
    assert len(line._line) < 100
    assert len(deadlines._heap) < 100


def test_skipped_head_still_counts_as_head_when_it_leaves(loop: asyncio.AbstractEventLoop) -> None:
    """The pacer may have looked for the head before the cancelled call itself has left."""
    line = Line(Node(), NOBODY)
    first, second = waiter(loop, 0), waiter(loop, 1)
    line.join(first, 0)
    line.join(second, 0)
    first.cancel()
    assert line.head() is second
    assert line.leave(first)
    second.cancel()
    assert line.head() is None
    assert line.leave(second)


def test_line_has_interface_of_tree(loop: asyncio.AbstractEventLoop) -> None:
    """A line has the methods of a tree, so a pacer need not know which of the two it serves."""
    node = Node()
    line = Line(node, NOBODY)
    assert line.is_free_for(node, 0)
    line.join(waiter(loop, 0), 0)
    line.rouse(node)
    line.rouse_all()
    assert not line.is_free_for(node, 0)
    assert line.wake > NEVER
