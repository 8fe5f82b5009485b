"""The line itself, without a clock and without meters."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket.meters import NEVER
from asyncbucket.queue import Queue, Waiter


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Give a loop for futures to belong to; it never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def waiter(loop: asyncio.AbstractEventLoop, number: int, deadline: int | None = None) -> Waiter:
    """Make a waiter with a place in the order of arrival."""
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
def test_a_queue_is_a_list_without_its_costs(history: list[tuple[str, int]]) -> None:
    """Whoever pushes, passes, leaves or expires: who is head, who is left and when is as said."""
    loop = asyncio.new_event_loop()
    queue = Queue()
    line: list[Waiter] = []
    now = 0
    for number, (verb, pick) in enumerate(history):
        if verb == "push":
            deadline = None if pick % 2 else now + pick
            queue.push(waiter(loop, number, deadline))
            line.append(list(queue)[-1])
        elif verb == "pass" and line:
            line.pop(0).set_result(0)
            queue.passed(1)
        elif verb.startswith("leave") and line:
            head, told = line[0], False
            for gone in [line.pop(pick % len(line)) for _ in range(min(len(line), pick % 20))]:
                gone.cancel()
                told = queue.leave(gone) or told
            assert told == head.done()
        elif verb == "expire":
            now += pick
            for gone in queue.expired(now):
                gone.set_result(NEVER)
                queue.leave(gone)
                line.remove(gone)
        assert len(queue) == len(line)
        assert list(queue) == line
        assert queue.head() is (line[0] if line else None)
        deadlines = [each.deadline for each in line if each.deadline is not None]
        assert queue.next_deadline() == min(deadlines, default=NEVER)
        assert all(deadline > now or verb != "expire" for deadline in deadlines)
        assert len(queue._line) <= 2 * len(line) + 70
        assert len(queue._deadlines) <= 2 * len(line) + 70
    loop.close()


def test_the_dead_are_swept_out(loop: asyncio.AbstractEventLoop) -> None:
    """Ten thousand who left from the middle are not remembered, nor are their deadlines."""
    queue = Queue()
    first, last = waiter(loop, 0), waiter(loop, 10_001)
    queue.push(first)
    crowd = [waiter(loop, number, number) for number in range(1, 10_001)]
    for each in crowd:
        queue.push(each)
    queue.push(last)
    for each in crowd:
        each.cancel()
        assert not queue.leave(each)
    assert list(queue) == [first, last]
    assert len(queue._line) < 100
    assert len(queue._deadlines) < 100


def test_a_head_that_was_skipped_still_counts_as_head(loop: asyncio.AbstractEventLoop) -> None:
    """Somebody else may have looked for the head before it could say that it left."""
    queue = Queue()
    first, second = waiter(loop, 0), waiter(loop, 1)
    queue.push(first)
    queue.push(second)
    first.cancel()
    assert queue.head() is second
    assert queue.leave(first)
    second.cancel()
    assert queue.head() is None
    assert queue.leave(second)
