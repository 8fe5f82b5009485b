"""Who goes next: the rule of fair shares by itself, without a pacer."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from asyncbucket import Limit, Limiter
from asyncbucket.core.queue import SOON, Branch, Waiter, line_of
from asyncbucket.core.seats import EMPTY, Seat
from asyncbucket.testing import VirtualTime

SECOND = 1_000_000_000


class Grove:
    """A tree of limiters and the calls that wait in it; a token has a price of one second."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.root = Limiter(Limit("tokens", 10**6, per=10**6), clock=lambda: 0)
        self.pacer: Any = self.root._node.pacer
        self.top: Branch = self.pacer.top

    def push(self, limiter: Limiter, tokens: int = 1, *, priority: int = 0) -> Waiter:
        """Add a call to the line of ``limiter``."""
        waiter = Waiter(loop=self.loop)
        self.pacer.arrivals += 1
        waiter.number, waiter.amounts = self.pacer.arrivals, {"tokens": tokens}
        waiter.seat, waiter.lease = Seat(), None
        line_of(limiter._node, priority).join(waiter, 0)
        return waiter

    def head(self, now: int = 0) -> Waiter | None:
        """Return who is next in another look."""
        self.pacer.looks += 1
        head, _ = self.top.head(now)
        assert head is None or isinstance(head, Waiter)
        return head

    def serve(self, now: int = 0) -> Waiter:
        """Admit the head; its caller does not come back."""
        head = self.head(now)
        assert head is not None
        head.set_result(True)
        head.line.calls.popleft()
        head.line.node.book(head.amounts, now)
        self.top.serve(head)
        return head

    def serve_some(self, calls: int) -> Counter[Limiter]:
        """Admit some calls, and count whose they were."""
        limiters = {each._node: each for each in (self.root, *self.root.children.values())}
        return Counter(limiters[self.serve().line.node] for _ in range(calls))


@pytest.fixture
def grove() -> Iterator[Grove]:
    """Give a tree in which no call waits."""
    grove = Grove()
    yield grove
    grove.loop.close()


@pytest.mark.parametrize("children", [1, 2, 7])
def test_siblings_of_equal_cost_keep_order_of_arrival_in_every_round(
    grove: Grove, children: int
) -> None:
    limiters = [grove.root.child(str(number)) for number in range(children)]
    calls = [grove.push(limiter) for _ in range(3) for limiter in limiters]
    assert [grove.serve() for _ in calls] == calls


@pytest.mark.parametrize(
    ("before", "calls"), [("both wait", 29), ("alone", 30), ("idle since", 30)]
)
def test_refund_pays_for_later_calls_unless_share_was_idle(
    grove: Grove, before: str, calls: int
) -> None:
    """Eight of ten come back: in sum, both have used 31 in the end, and 30 of the later ones.

    What was taken while nobody else waited cost nobody else anything, so its refund is no credit.
    """
    thrifty, other = grove.root.child("thrifty"), grove.root.child("other")
    costly = grove.push(thrifty, 10)
    if before == "both wait":
        grove.push(other)
    assert grove.serve() is costly
    if before == "idle since":
        for _ in range(30):
            grove.push(other)
        grove.serve_some(30)
        assert grove.head() is None
    costly.line.credit_flows({"tokens": 10}, {"tokens": 2})
    for _ in range(40):
        grove.push(other)
        grove.push(thrifty)
    assert grove.serve_some(60)[thrifty] == pytest.approx(calls, abs=1)


def test_debt_is_charged_with_next_call(grove: Grove) -> None:
    spender, other = grove.root.child("spender"), grove.root.child("other")
    first = grove.push(spender)
    for _ in range(40):
        grove.push(other)
        grove.push(spender)
    assert grove.serve() is first
    first.line.credit_flows({"tokens": 1}, {"tokens": 9})
    assert grove.serve_some(50)[other] == pytest.approx(29, abs=1)


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_child_at_its_own_limit_keeps_share_of_one_call_only(grove: Grove, weight: float) -> None:
    """When it wakes, it goes next, with the price of one call, divided by its weight, in hand."""
    poor = grove.root.child("poor", Limit("tokens", 10, per=1), weight=weight)
    rich = grove.root.child("rich")
    calls = [grove.push(poor, 10), grove.push(poor, 10)]
    for _ in range(40):
        grove.push(rich, 5)
    assert grove.serve() is calls[0]
    assert grove.serve_some(30)[rich] == 30
    assert grove.head(2 * SECOND) is calls[1]
    (branch,) = grove.root._node.branches.values()
    assert poor._node.branches[0].tag == pytest.approx(branch.clock - 10 / weight)


def test_emptied_flow_is_expected_back_for_one_look(grove: Grove) -> None:
    """A sibling with a higher tag waits one look for it, and no longer."""
    patient, busy = grove.root.child("patient", weight=8.0), grove.root.child("busy")
    first = grove.push(patient)
    for _ in range(3):
        grove.push(busy)
    assert grove.serve() is first
    assert grove.serve().line.node is busy._node
    back = grove.push(patient)
    assert grove.serve() is back
    assert grove.top.head(0) == (None, SOON)
    grove.pacer.looks += 1
    head, _ = grove.top.head(0)
    assert head is not None


def test_empty_flows_are_forgotten(grove: Grove) -> None:
    for number in range(2_000):
        grove.push(grove.root.child(str(number)))
    grove.serve_some(2_000)
    assert grove.head() is None
    assert grove.top.head(0) == (None, EMPTY)
    assert not grove.top.flows
    assert not grove.root._node.branches[0].flows


async def test_calls_that_left_line_are_swept_out(virtual_time: VirtualTime) -> None:
    """Thousands that leave from the middle are removed, and so are their deadlines."""
    limiter = Limiter("1 RPH", clock=virtual_time.clock)
    limiter.acquire_nowait()
    waiting = [asyncio.ensure_future(limiter.acquire(timeout=3_700)) for _ in range(2_000)]
    await virtual_time.all_blocked()
    for call in waiting[1:-1]:
        call.cancel()
    await virtual_time.all_blocked()
    assert limiter.statistics().waiting == 2
    assert len(limiter._node.lines[0].calls) < 100
    (seat,) = limiter._node.pacer.seats.values()
    late = asyncio.ensure_future(limiter.acquire(timeout=3_700))
    await virtual_time.all_blocked()
    assert len(seat._deadlines) < 100
    for call in (waiting[0], waiting[-1], late):
        call.cancel()


async def test_seat_forgets_deadlines_of_calls_that_have_passed(virtual_time: VirtualTime) -> None:
    key = Limiter("100/s burst 1", clock=virtual_time.clock)
    slow = key.child("slow", "1 RPH")
    await slow.acquire()
    patient = asyncio.ensure_future(slow.acquire(timeout=3_625))
    await asyncio.sleep(10)
    for _ in range(500):
        await key.acquire(timeout=3_700)
    (seat,) = key._node.pacer.seats.values()
    assert len(seat._deadlines) < 100
    patient.cancel()


async def test_branch_keeps_few_entries_for_flow_that_sleeps_long(
    virtual_time: VirtualTime,
) -> None:
    """A call that waits for a limit of a day is looked at each time another passes below it."""
    key = Limiter("1000/s", clock=virtual_time.clock)
    agent = key.child("chat", "1M TPD").child("agent")
    other = key.child("other", "1M tokens/h")
    await agent.acquire(tokens=700_000)
    await other.acquire(tokens=700_000)
    costly = [asyncio.ensure_future(each.acquire(tokens=500_000)) for each in (agent, other)]
    await asyncio.gather(*(agent.acquire(tokens=1, priority=1) for _ in range(1_000)))
    for node in (key._node, key.child("chat")._node):
        for branch in node.branches.values():
            assert len(branch._asleep) < 100
    for each in costly:
        each.cancel()
