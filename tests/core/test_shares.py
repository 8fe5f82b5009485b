"""The arithmetic of shares, and the tree that chooses who is next, without a pacer."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any, Final

import pytest

from asyncbucket import Limit
from asyncbucket.core.branch import Branch, Flow
from asyncbucket.core.gates import Gates
from asyncbucket.core.meters import NEVER, Slots, Window
from asyncbucket.core.node import Node
from asyncbucket.core.queue import EMPTY, Line, Waiter
from asyncbucket.core.shares import Prices, Share, VirtualClock
from asyncbucket.core.tree import Tree

#: No pacer serves these lines.
NOBODY: Final[Any] = None
#: A price of one second.
ONE = {"tokens": 1}


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Give a loop for futures to belong to; it never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Grove:
    """A tree of nodes and the calls that wait in it; a token has a price of one second."""

    def __init__(self, loop: asyncio.AbstractEventLoop, root: Node | None = None) -> None:
        self.loop = loop
        limit = Limit("tokens", 1_000, per=1_000)
        window = Window(amount=limit.amount, window=limit.window)
        self.root = root or Node(gates=Gates([(window, "tokens")], (limit,)))
        self.tree = Tree(self.root, Line(self.root, NOBODY), self.rouse)
        self.arrivals = 0

    def rouse(self, node: Node) -> None:
        """Look again at the flows that sleep at ``node`` or above, on the only loop."""
        self.tree.rouse(node)

    def child(self, above: Node | None = None, *, weight: float = 1.0) -> Node:
        """Make a limiter's node."""
        return Node(self.root if above is None else above, weight=weight)

    def push(self, node: Node, tokens: int = 1, *, priority: int = 0) -> Waiter:
        """Add a call to the line of ``node``."""
        self.arrivals += 1
        waiter = Waiter(loop=self.loop)
        waiter.amounts = {"tokens": tokens, "concurrency": 1}
        waiter.number = self.arrivals
        waiter.deadline = None
        self.tree.line(node, priority).join(waiter, 0)
        return waiter

    def serve(self, now: int = 0) -> Waiter:
        """Admit the head; its caller does not come back."""
        self.tree.begin_pass()
        head = self.tree.head(now)
        assert head is not None
        head.set_result(None)
        self.tree.served(head, now)
        return head


def serve_next(*loops: Grove) -> Waiter:
    """Admit the head of the loop whose turn it is, by the rule that pacers use."""
    for each in loops:
        each.tree.begin_pass()
    standing = [each for each in loops if each.tree.head(0) is not None]
    return min(standing, key=lambda each: each.tree.turn).serve()


@pytest.fixture
def grove(loop: asyncio.AbstractEventLoop) -> Grove:
    """Give a tree in which no call waits."""
    return Grove(loop)


def test_idle_share_saves_nothing_up() -> None:
    """A share that competes again starts at the present, however long it was idle."""
    share = Share(2.0)
    share.join(10.0)
    share.charge(3.0)
    assert share.tag == 13.0
    share.join(11.0)
    assert share.tag == 13.0
    share.join(50.0)
    assert share.tag == 50.0


def test_share_held_up_keeps_price_of_one_call() -> None:
    """What it did not use counts up to its last call's price; what it used above stays used."""
    share = Share(2.0)
    share.charge(3.0)
    share.join(5.0, kept=3.0)
    assert share.tag == 3.0
    share.join(50.0, kept=3.0)
    assert share.tag == 47.0
    share.charge(10.0)
    share.join(48.0, kept=10.0)
    assert share.tag == 57.0


def test_refund_pays_for_later_calls_and_debt_is_charged_with_next() -> None:
    """A refund is credit first, and then pays; a debt is charged with the next call."""
    share = Share(1.0)
    share.charge(10.0)
    share.correct(4.0)
    assert share.tag == 10.0
    share.charge(3.0)
    assert share.tag == 10.0
    share.charge(3.0)
    assert share.tag == 12.0
    share.correct(-5.0)
    share.charge(1.0)
    assert share.tag == 18.0


def test_credit_of_idle_share_is_lost() -> None:
    """Credit lowers the tag to the present at most."""
    share = Share(1.0)
    share.charge(10.0)
    share.correct(8.0)
    share.join(5.0)
    assert share.tag == 5.0
    share.charge(1.0)
    assert share.tag == 6.0


def test_virtual_time_is_start_of_call_served_last() -> None:
    """As in the paper on start-time fair queueing."""
    clock, share = VirtualClock(), Share(2.0)
    clock.enter(share)
    clock.advance(share, 1.0, weights=2.0)
    assert clock.now == 0.0
    share.tag = 3.0
    clock.advance(share, 1.0, weights=2.0)
    assert clock.now == 3.0


def serve_newcomers(clock: VirtualClock, *, number: int, beside: float) -> None:
    """Serve newcomers one after the other, each as soon as the last one is gone."""
    for _ in range(number):
        newcomer = Share(1.0)
        newcomer.join(clock.now)
        clock.enter(newcomer)
        clock.advance(newcomer, 1.0, weights=1.0 + beside)
        clock.leave(newcomer)


@pytest.mark.parametrize("times", [1, 2, 10])
def test_virtual_time_does_not_stand_still_among_newcomers(times: int) -> None:
    """With newcomers served one by one, it follows the potential, one call of each behind."""
    clock, waiting = VirtualClock(), Share(9.0)
    clock.enter(waiting)
    for _ in range(times):
        clock.advance(waiting, 9.0, weights=9.0)
    serve_newcomers(clock, number=20, beside=9.0)
    assert clock.now == pytest.approx(times + 1.0)


@pytest.mark.parametrize("price", [1.0, 1_000.0])
@pytest.mark.parametrize("weight", [1.0, 0.001])
def test_virtual_time_forgets_costly_call_whose_caller_is_gone(price: float, weight: float) -> None:
    """Once the caller is gone, its call delays virtual time no longer, so nobody is overtaken."""
    clock, costly, waiting = VirtualClock(), Share(weight), Share(1.0)
    clock.enter(waiting)
    clock.advance(waiting, 1.0, weights=1.0)
    waiting.charge(1.0)
    clock.enter(costly)
    clock.advance(costly, price, weights=1.0 + weight)
    clock.leave(costly)
    serve_newcomers(clock, number=4, beside=1.0)
    assert clock.now >= waiting.tag


def test_siblings_share_cost_by_weight(grove: Grove) -> None:
    """Costly calls of a light child and cheap ones of a heavy child: 1 to 3 in tokens."""
    one, three = grove.child(), grove.child(weight=3.0)
    for _ in range(40):
        grove.push(one, 20)
        grove.push(three, 5)
        grove.push(three, 5)
    served = [grove.serve() for _ in range(70)]
    tokens = {
        node: sum(each.amounts["tokens"] for each in served if each.node is node)
        for node in (one, three)
    }
    assert tokens[one] >= 100
    assert abs(tokens[three] / 3 - tokens[one]) <= 20


def test_siblings_with_equal_tags_go_in_order_of_arrival(grove: Grove) -> None:
    """Siblings with equal tags are served by when they began to wait."""
    a, b = grove.child(), grove.child()
    calls = [grove.push(a), grove.push(b), grove.push(a), grove.push(b)]
    assert [grove.serve() for _ in range(4)] == calls


def test_many_siblings_of_equal_cost_keep_order_of_arrival_in_every_round(grove: Grove) -> None:
    """This holds for every round, as long as all calls cost the same."""
    children = [grove.child() for _ in range(7)]
    calls = [grove.push(child) for _ in range(3) for child in children]
    assert [grove.serve() for _ in calls] == calls


def test_priority_class_gets_eight_times_as_much_as_next_lower_class(grove: Grove) -> None:
    """Three classes get 1 : 8 : 64; two of them 1 : 8, even if they are not neighbours."""
    node = grove.child()
    for priority in (-1, 0, 1):
        for _ in range(800):
            grove.push(node, priority=priority)
    served = [grove.serve().line.priority for _ in range(730)]
    assert [served.count(priority) for priority in (-1, 0, 1)] == [
        pytest.approx(10, abs=1),
        pytest.approx(80, abs=1),
        pytest.approx(640, abs=1),
    ]
    for waiter in list(grove.tree.waiters()):
        if waiter.line.priority == 0:
            waiter.cancel()
            waiter.line.leave(waiter)
    served = [grove.serve().line.priority for _ in range(90)]
    assert served.count(-1) == pytest.approx(10, abs=1)


def test_urgent_newcomer_is_next(grove: Grove) -> None:
    """It is next however many less urgent calls wait."""
    node = grove.child()
    for _ in range(100):
        grove.push(node, priority=-1)
    for _ in range(10):
        grove.serve()
    urgent = grove.push(node, priority=1)
    assert grove.serve() is urgent
    assert grove.serve().line.priority == -1


def test_child_at_its_own_limit_sleeps_until_its_time_or_refund(grove: Grove) -> None:
    """It wakes when its time comes, or when something was given back on its path."""
    poor, rich = grove.child(), grove.child()
    window = Window(amount=1, window=1_000)
    poor._gates = Gates([(window, "tokens")])
    window.book(1, 0)
    first, second = grove.push(poor), grove.push(rich)
    assert grove.serve() is second
    assert grove.tree.head(0) is None
    due = grove.tree.wake
    assert 1_000 <= due < NEVER
    assert grove.tree.head(due - 1) is None
    assert grove.tree.head(due) is first
    again = grove.child()
    again._gates = Gates([(window, "tokens")])
    waiting = grove.push(again)
    first.cancel()
    first.line.leave(first)
    assert grove.tree.head(0) is None
    window.unbook(1, 0)
    grove.tree.rouse(again)
    assert grove.tree.head(0) is waiting


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_child_at_its_own_limit_keeps_share_of_one_call_only(grove: Grove, weight: float) -> None:
    """It keeps the price of one call, divided by its weight, and so goes next."""
    poor, rich = grove.child(weight=weight), grove.child()
    window = Window(amount=10, window=1_000)
    poor._gates = Gates([(window, "tokens")])
    calls = [grove.push(poor, 10), grove.push(poor, 10)]
    for _ in range(40):
        grove.push(rich, 5)
    assert grove.serve() is calls[0]
    window.book(10, 0)
    assert all(grove.serve().node is rich for _ in range(30))
    awake = 2_000
    assert grove.tree.head(awake) is calls[1]
    present = grove.root.fairness.clocks[0].now
    assert poor.fairness.shares[0].tag == pytest.approx(present - 10 / weight)


def test_head_that_lacks_only_a_slot_can_be_found_without_it(grove: Grove) -> None:
    """The head that lacks only a slot is found, for use when blocked loops hold all slots."""
    slots = Slots(size=1)
    slots.book(1, 0)
    node, other = grove.child(), grove.child()
    node._gates = Gates([(slots, "concurrency")])
    window = Window(amount=1, window=1_000)
    window.book(1, 0)
    other._gates = Gates([(window, "tokens"), (slots, "concurrency")])
    call = grove.push(node)
    grove.push(other)
    assert grove.tree.head(0) is None
    assert grove.tree.wake < EMPTY
    assert grove.tree.head(0, slotless=1) is call


def test_emptied_flow_is_expected_back_for_one_pass(grove: Grove) -> None:
    """A sibling with a higher tag waits one pass for it, and no longer."""
    patient, busy = grove.child(weight=8.0), grove.child()
    first = grove.push(patient)
    for _ in range(3):
        grove.push(busy)
    assert grove.serve() is first
    assert grove.serve().node is busy
    assert grove.tree.head(0) is not None
    assert not grove.tree.expects_caller
    back = grove.push(patient)
    assert grove.serve() is back
    assert grove.tree.head(0) is not None
    assert grove.tree.expects_caller
    grove.tree.begin_pass()
    assert not grove.tree.expects_caller


def test_tree_takes_over_line_in_order(loop: asyncio.AbstractEventLoop) -> None:
    """Calls that waited before there were children or priorities keep their places."""
    root = Node()
    line = Line(root, NOBODY)
    waiters: list[Waiter] = []
    for number in range(3):
        waiter = Waiter(loop=loop)
        waiter.number, waiter.amounts, waiter.deadline = number, ONE, None
        line.join(waiter, 0)
        waiters.append(waiter)
    roused: list[Node] = []
    tree = Tree(root, line, roused.append)
    assert list(tree.waiters()) == waiters
    assert tree.head(0) is waiters[0]
    assert not tree.is_free_for(root, 0)
    assert not roused


@pytest.mark.heavy
def test_empty_flows_are_forgotten(grove: Grove) -> None:
    """Ten thousand children with one call each leave neither a flow nor a class behind."""
    for _ in range(10_000):
        grove.push(grove.child())
    for _ in range(10_000):
        grove.serve()
    assert grove.tree.head(0) is None
    assert grove.tree.wake == EMPTY
    assert list(grove.tree._classes.keys()) == []


def test_total_weight_counts_only_flows_with_waiting_calls(loop: asyncio.AbstractEventLoop) -> None:
    """Empty flows do not count; one that has calls again does."""
    root, clock, share = Node(), VirtualClock(), Share(2.0)
    branch = Branch(root, clock, set())
    line = Line(root, NOBODY)

    def push() -> Waiter:
        waiter = Waiter(loop=loop)
        waiter.number = 0
        waiter.amounts = ONE
        line.join(waiter, 0)
        return waiter

    push()
    flow = branch.add("a", line, share)
    assert clock._weights == 2.0
    head = branch.head(0)
    assert head is not None
    branch.living += 1
    head.set_result(None)
    branch.served(head, 0)
    assert (clock._weights, share.loops) == (0.0, 0)
    branch.reactivate(flow)
    branch.reactivate(flow)
    assert (clock._weights, share.loops) == (2.0, 1)
    share.weight = 5.0
    push()
    head = branch.head(0)
    assert head is not None
    head.set_result(None)
    branch.served(head, 0)
    assert clock._weights == 0.0
    assert branch.head(0) is None
    assert branch.find("a") is None
    assert branch.lowest_emptied < math.inf


def test_flows_with_equal_tags_go_in_order_they_were_made() -> None:
    """The flow that was made first goes first."""
    line = Line(Node(), NOBODY)
    first = Flow("a", line, Share(1.0), child=None, order=1)
    second = Flow("b", line, Share(1.0), child=None, order=2)
    assert first < second
    assert not second < first


def test_lower_tag_goes_first_across_loops(loop: asyncio.AbstractEventLoop) -> None:
    """A sibling with a lower tag on another loop goes first, though its call came later."""
    here = Grove(loop)
    there = Grove(loop, here.root)
    heavy, light = here.child(), here.child()
    for _ in range(10):
        here.push(heavy)
    for _ in range(5):
        here.serve()
    there.push(light)
    assert here.tree.head(0) is not None
    assert there.tree.head(0) is not None
    assert there.tree.turn < here.tree.turn
    assert len(here.tree.turn) == 4
    assert Line.turn == ()


def test_urgent_call_goes_first_across_loops_with_equal_tags(
    loop: asyncio.AbstractEventLoop,
) -> None:
    """An urgent call goes first, as on one loop, though it came later and deeper in the tree."""
    here = Grove(loop)
    there = Grove(loop, here.root)
    here.push(here.root, priority=-1)
    urgent = there.push(here.child(), priority=1)
    assert serve_next(here, there) is urgent


def test_late_child_gets_equal_share_across_two_loops(loop: asyncio.AbstractEventLoop) -> None:
    """Virtual time counts all competitors, on whichever loop they wait."""
    here = Grove(loop)
    there = Grove(loop, here.root)
    one, other, late = (here.child() for _ in range(3))
    for _ in range(600):
        here.push(one)
        there.push(other)
    for _ in range(900):
        serve_next(here, there)
    for _ in range(100):
        there.push(late)
    served = [serve_next(here, there).node for _ in range(300)]
    assert [served.count(each) for each in (one, other, late)] == [
        pytest.approx(100, abs=1) for _ in range(3)
    ]


def test_priorities_share_eight_to_one_across_loops(loop: asyncio.AbstractEventLoop) -> None:
    """With urgent calls on one loop and the others on another, shares are 8 to 1, as on one."""
    here = Grove(loop)
    there = Grove(loop, here.root)
    for _ in range(900):
        here.push(here.root, priority=-1)
        there.push(here.root, priority=1)
    served = [serve_next(here, there).line.priority for _ in range(900)]
    assert served.count(-1) == pytest.approx(100, abs=1)


def test_disbanded_tree_no_longer_competes_for_shares(loop: asyncio.AbstractEventLoop) -> None:
    """It no longer counts at any level; calls on another loop still do."""
    here = Grove(loop)
    there = Grove(loop, here.root)
    child = here.child()
    grandchild = here.child(child)
    here.push(grandchild, priority=1)
    there.push(child, priority=1)
    fairness = here.root.fairness
    counted = [fairness.classes[1], child.fairness.shares[1], grandchild.fairness.shares[1]]
    assert [share.loops for share in counted] == [2, 2, 1]
    here.tree.disband()
    assert [share.loops for share in counted] == [1, 1, 0]
    assert fairness.clocks[1]._weights == 1.0
    assert child.fairness.clocks[1]._weights == 1.0


def test_idle_node_keeps_no_fairness_state() -> None:
    """Idle nodes keep no account of fairness, which saves memory for ten thousand children."""
    node = Node(Node())
    assert node._fairness is None
    node.reweigh(3.0)
    assert node._fairness is None
    node.fairness.shares[0] = Share(3.0)
    node.reweigh(4.0)
    assert node.fairness.shares[0].weight == 4.0


def test_price_of_call_is_its_largest_part_of_any_short_term_limit() -> None:
    """It is the largest part of any limit, of one resource the fastest; days do not count."""
    limits = (
        Limit("requests", 600),
        Limit("requests", 100, per=86_400),
        Limit("tokens", 60_000),
        Limit("tokens", 500, per=1),
    )
    prices = Prices(limits)
    assert prices.of({"requests": 1}) == 0.1
    assert prices.of({"requests": 1, "tokens": 5_000}) == 5.0
    assert Prices(()).of({"requests": 7}) == 1.0
