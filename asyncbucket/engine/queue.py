"""Who goes next: lines of calls, and branches where several lines meet.

A call waits as a `Waiter` in a `Line`: one for each limiter and priority, first come, first served.
A waiter that gives up is marked, and skipped later, so cancelling is O(1) anywhere in a line. A
`Branch` chooses among the lines and branches below it: at a limiter, among its own calls and its
children; at the top, among priorities. Both are a `Flow`, and one rule holds for all flows.

The rule is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). Each flow has a tag, the
virtual time at which its next call may start. The lowest tag goes first, and grows by the call's
work (`Node.work`) divided by the flow's weight. So flows are served in proportion to their
weights, measured in cost, not in calls. What one does not want goes to the others at once; an idle
child saves nothing up and loses nothing. The work follows from what was reserved; settling
corrects the tag.

A newcomer starts at the branch's virtual time: in the paper, the start tag of the call served last.
But while newcomers keep coming, each would start at that same time, and go before the one just
served, whose tag is higher. So virtual time also moves by itself. Each call that is served adds its
work, divided by the weights of all competitors, to a *potential*: the tag that each would have if
all were served at once. Virtual time follows the potential at a distance: the work of the
competitors' last calls, divided likewise, because the one just served may be that far ahead. It
never passes the tag of the flow just served: the distance shrinks when newcomers add their weights.
(A distance of the largest work ever would stop virtual time for long after a costly call, while
newcomers with small calls go before all who wait. Finish tags, as in self-clocked fair queueing,
would be shorter; but a cheap newcomer would then pass a costly call that is next.)

A flow held up by limits of its own is no candidate. It sleeps until its meters say when, and holds
up nobody. When it wakes, it is treated as if it had been idle, except for one call: it keeps as
much of its share as its last call cost, and so goes next. Otherwise a child that may call every few
seconds would wait for its turn each time, and count the next seconds only from then: it would get
far less than its own limit and than its share. The head may still have to wait for the limits of
the node itself. Then only calls entitled to go before it may overtake, and virtual time bounds
that.

Above all this stand the priorities, which compete by the same rule, each with eight times the
weight of the next below. (At a limiter whose priorities count `within`, they stand below it.) So an urgent call that comes alone is next, up to eight in a row may be,
and a priority that is always outbid still gets its share: beside n more urgent ones, at least
1 / (1 + 8 + ... + 8^n) of the limit.
"""

import asyncio
import bisect
import concurrent.futures
import copy
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, Final, TypeAlias

from asyncbucket.engine.meters import NEVER, Amounts, Route, admit
from asyncbucket.engine.node import Node

#: "Nobody is left": later even than `NEVER`, which may still end when something is given back.
EMPTY: Final = NEVER << 1
#: Sweeping pays from this many done entries on.
SWEEP: Final = 64
#: The ratio of the weights of neighboring priorities among those that wait.
_STEP: Final = 8.0
#: When (ns) to look again whether what keeps a tenant's limits takes another call.
_LATER: Final = 1_000_000_000

#: Serves the queue for a dispatcher, and lets it sleep until it must dispatch again.
Dispatch: TypeAlias = Callable[["Dispatcher"], None]


class Dispatcher:
    """Where calls wait; by itself, only where leases are held: in plain threads."""

    #: Its event loop, if it is one.
    loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, dispatch: Dispatch | None = None) -> None:
        #: None once its calls count nowhere any more: its process was forked.
        self.dispatch = dispatch
        #: Where the leases of its calls count: those of a waiting thread belong to the loop that it
        #: blocks, or to all threads.
        self.home: Dispatcher = self
        #: Open leases of calls made here, and calls that wait here.
        self.leases = self.waiting = 0
        #: When it dispatches next, and when it did last.
        self.wakes_at = EMPTY
        self.ran_at = 0
        #: Whether it missed its turn; then its calls are parked until it dispatches.
        self.is_late = False
        self.parked: list[tuple[Line, AnyWaiter]] = []
        self._deadlines: list[tuple[int, AnyWaiter]] = []

    def ring(self, now: int) -> bool:
        """Make it dispatch soon; from any thread, with the lock held. Return whether it can be rung."""
        raise NotImplementedError

    def sleep(self, until: int, now: int) -> None:
        """Have it dispatch at ``until``, if the bell does not ring before."""

    def is_closed(self) -> bool:
        """Tell whether nothing can run here any more."""
        return self.loop is not None and self.loop.is_closed()

    def watch(self, waiter: "AnyWaiter", deadline: int) -> None:
        """Note that the time of ``waiter`` is up at ``deadline``."""
        heapq.heappush(self._deadlines, (deadline, waiter))
        if len(self._deadlines) > 2 * self.waiting + SWEEP:
            self._deadlines = [each for each in self._deadlines if not each[1].done()]
            heapq.heapify(self._deadlines)

    def seeks(self) -> None:
        """Forget the first deadline: who has it seeks another way, and waits on."""
        heapq.heappop(self._deadlines)

    def first_deadline(self) -> "tuple[int, AnyWaiter | None]":
        """Return the first deadline of those that still wait, and who has it."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][1].done():
            heapq.heappop(deadlines)
        return deadlines[0] if deadlines else (EMPTY, None)

    def unpark(self) -> None:
        """Put parked calls back in their places."""
        self.is_late = False
        parked, self.parked = self.parked, []
        lines = (line for line, _ in parked if line.living)  # else all have given up
        for line in dict.fromkeys(lines):
            line.refill([*(waiter for each, waiter in parked if each is line), *line.calls])
            line.arrive()


#: The dispatcher of calls that were counted out: they gave up, or their loop was closed.
NOWHERE: Final = Dispatcher()


class Call:
    """Hear what becomes of a waiter: a lease, or a token bucket for all its calls; with the lock held."""

    __slots__ = ()

    def _hold_locked(
        self, now: int, waiter: "AnyWaiter", bound_by: str | None, route: Route
    ) -> None:
        """Hold what ``waiter`` was given on ``route`` at ``now``, after it had waited."""
        raise NotImplementedError

    def _hand_back_locked(self, waiter: "AnyWaiter") -> None:
        """Give back what ``waiter`` was just handed: it gave up at that very moment."""
        raise NotImplementedError

    def _gave_up_locked(self) -> None:
        """Take in that the waiter has left its line without being admitted."""

    def _seek_locked(self, waiter: "AnyWaiter", now: int) -> None:
        """Have ``waiter`` stand wherever else it may pass by now: nowhere, if there is one way only."""

    def _declines_locked(self, waiter: "AnyWaiter", now: int) -> bool:
        """Tell whether ``waiter``, which stands in several lines, leaves the one where it may pass now."""
        raise NotImplementedError


class _Waiting:
    """What is known of a call that stands in a line."""

    __slots__ = ()

    amounts: Amounts  # pyright: ignore[reportUninitializedInstanceVariable]
    #: When it joined.
    asked: int  # pyright: ignore[reportUninitializedInstanceVariable]
    #: What is to hold what it is given.
    lease: Call  # pyright: ignore[reportUninitializedInstanceVariable]
    #: The place in the order of arrival.
    number: int  # pyright: ignore[reportUninitializedInstanceVariable]
    #: Where it stands now: usually in one line. If in several, the first where it is next lets it go.
    lines: "tuple[Line, ...]"  # pyright: ignore[reportUninitializedInstanceVariable]
    #: The one that has asked for it last, or that let it go.
    line: "Line"  # pyright: ignore[reportUninitializedInstanceVariable]
    #: Until when it waits, if not for ever.
    deadline: int | None  # pyright: ignore[reportUninitializedInstanceVariable]
    #: The loop or thread that it waits on: only that one lets it go.
    dispatcher: Dispatcher  # pyright: ignore[reportUninitializedInstanceVariable]

    def __lt__(self, other: "_Waiting") -> bool:
        return self.number < other.number


class Waiter(_Waiting, asyncio.Future[bool]):
    """Wait in a line; resolved with whether it has passed, or else its time is up.

    It holds as little as possible, because the garbage collector visits each of 100,000 waiters
    again and again.
    """

    __slots__ = ("amounts", "asked", "deadline", "dispatcher", "lease", "line", "lines", "number")


class SyncWaiter(_Waiting, concurrent.futures.Future[bool]):
    """Wait in a line as a `Waiter` does, in a blocked thread."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Stand in a copy of the line, on which nobody blocks: so it needs no lock of its own."""
        return copied(self, memo, ("lease", "line", "lines", "dispatcher"))


AnyWaiter: TypeAlias = Waiter | SyncWaiter


class Flow:
    """Compete with others for the next place in the branch above."""

    def __init__(self, node: Node, above: "Branch | None", weight: float, rank: int = 0) -> None:
        self.node, self.above, self.weight = node, above, weight
        #: Who goes first among equals: the more urgent priority, or who came first.
        self.rank = rank
        #: The virtual time at which its next call may start; what its last call cost; and what came
        #: back of that.
        self.tag = self.work = self.credit = 0.0
        #: Until when its own limits hold it up; 0 if they do not.
        self.asleep = 0
        #: How many wait here: calls in a line, flows in a branch.
        self.living = 0
        #: Whether its weight and work are in the sums of the branch above.
        self.competes = False

    def __lt__(self, other: "Flow") -> bool:
        return self.rank < other.rank

    def head(self, now: int, back: int = 0) -> tuple[AnyWaiter | None, int]:
        """Return who goes next here, as far as limits below the root are concerned; else when.

        ``back`` assumes that this many slots had been given back.
        """
        raise NotImplementedError

    def lines(self) -> Iterator["Line"]:
        """Yield the lines here and below in which somebody waits."""
        raise NotImplementedError

    def waiters(self) -> Iterator[AnyWaiter]:
        """Yield all who wait here and below."""
        for line in self.lines():
            yield from (each for each in line.calls if line in each.lines and not each.done())


class Line(Flow):
    """Hold the calls of one limiter and priority that wait, in order of arrival."""

    def __init__(self, node: Node, above: "Branch | None", priority: int) -> None:
        super().__init__(node, above, 1.0)
        self.priority = priority
        self._standings = tuple(map(attrgetter("standing"), node.chain))
        #: What a call notes that stands in no other line.
        self.only = (self,)
        #: In order of arrival, or in another: see `asyncbucket.engine.interfaces.Order`.
        self.calls: Any = deque()
        #: Since when somebody has been first here without anyone being served.
        self.since = 0
        #: What last held up its head.
        self.bound_by: str | None = None

    def lines(self) -> Iterator["Line"]:
        yield self

    def join(self, waiter: AnyWaiter, now: int) -> None:
        """Let ``waiter`` stand in its place: last, unless it has waited elsewhere."""
        waiter.line = self
        order = self.node.standing.order
        if order is not None and order.applies is (type(self.calls) is deque):
            self.refill(self.calls)
        if waiter.asked != now and type(self.calls) is deque:
            bisect.insort(self.calls, waiter)
        else:
            self.calls.append(waiter)
        if not self.living:
            self.since = now
        if not self.competes:  # also if all who stood here have given up
            self.arrive()
        self.living += 1
        for each in self._standings:
            each.waiting += 1

    def arrive(self) -> None:
        """Let flows compete that were empty, or asleep, here and above; somebody waits here anew."""
        flow: Flow = self
        self.node.pacer.refused = None
        is_new = not self.living
        while (branch := flow.above) is not None:
            was_empty = not branch.living
            branch.living += is_new
            is_new = is_new and was_empty
            if not flow.competes:
                branch.add(flow)
            flow = branch

    def depart(self) -> None:
        """Count out a call that is done, wherever it stands."""
        self.living -= 1
        for each in self._standings:
            each.waiting -= 1
        flow: Flow = self
        while not flow.living and (branch := flow.above) is not None:
            branch.leave(flow)
            branch.living -= 1
            flow = branch
        if len(self.calls) > 2 * self.living + SWEEP:
            self.refill(self.waiters())

    def refill(self, calls: Iterable[AnyWaiter]) -> None:
        """Hold ``calls`` instead, each in its place."""
        order = self.node.standing.order
        self.calls = deque(sorted(calls)) if order is None else order.arrange(calls)

    def head(self, now: int, back: int = 0) -> tuple[AnyWaiter | None, int]:  # noqa: ARG002 - as `Branch`
        """Return the first that waits on a dispatcher that keeps up; `EMPTY` if there is none."""
        calls = self.calls
        while calls:
            first = calls[0]
            if first.done() or (first.lines is not self.only and self not in first.lines):
                calls.popleft()
            elif first.dispatcher.is_late:
                first.dispatcher.parked.append((self, calls.popleft()))
            else:
                first.line = self
                return first, now
        return None, EMPTY

    def credit_flows(self, reserved: Amounts, used: Amounts | None = None) -> None:
        """Credit the flows that paid for a call with what it did not use; all, if it was not made."""
        flow: Flow = self
        while (branch := flow.above) is not None:
            node = branch.node
            spent = 0.0 if used is None else node.work(used)
            flow.credit += (node.work(reserved) - spent) / flow.weight
            flow = branch


class Branch(Flow):
    """Choose among flows: the lowest tag of those that may go."""

    def __init__(self, node: Node, above: "Branch | None", weight: float, rank: int = 0) -> None:
        super().__init__(node, above, weight, rank)
        #: Those in which somebody waits: ready, in the order of their tags, or asleep.
        self.flows: set[Flow] = set()
        self._ready: list[tuple[float, Flow]] = []
        self._asleep: list[tuple[int, Flow]] = []
        #: The virtual time at which newcomers start; the tag that all would have if they were served
        #: at once; the sums of those that compete.
        self.clock = self._potential = self._weights = self._works = 0.0
        self._joined = 0
        #: Whether its flows compete by their priorities.
        self.by_priority = above is None or node.standing.within

    def lines(self) -> Iterator[Line]:
        for flow in self.flows:
            yield from flow.lines()

    def add(self, flow: Flow) -> None:
        """Let ``flow`` compete, in which somebody waits anew."""
        if flow.asleep:
            self.wake(flow)
        elif flow in self.flows:  # emptied, but not forgotten yet
            self._enter(flow)
        else:
            self.flows.add(flow)
            if self.living <= 1:  # nobody else waits: what was served before delays no newcomer
                self._potential = self.clock
            if not self.by_priority:
                self._joined = flow.rank = self._joined + 1
            self._make_ready(flow, kept=0.0)

    def _make_ready(self, flow: Flow, *, kept: float) -> None:
        """Queue ``flow`` as if it had been idle until now, but for ``kept``."""
        flow.asleep = 0
        flow.tag = max(flow.tag - flow.credit, self.clock - kept)
        flow.credit = 0.0
        self._enter(flow)
        heapq.heappush(self._ready, (flow.tag, flow))

    def _enter(self, flow: Flow) -> None:
        flow.competes = True
        self._weights += flow.weight
        self._works += flow.work

    def leave(self, flow: Flow) -> None:
        """Let ``flow`` compete no longer; it is forgotten when it would be next."""
        if flow.competes:
            flow.competes = False
            self._weights -= flow.weight
            self._works -= flow.work

    def wake(self, flow: Flow) -> None:
        """Ask a sleeping flow anew, because something has changed; it keeps one call of its share."""
        self._make_ready(flow, kept=flow.work / flow.weight)

    def reweigh(self, flow: Flow, weight: float) -> None:
        """Change the weight of ``flow``."""
        if flow.competes:
            self._weights += weight - flow.weight
        flow.weight = weight

    def head(self, now: int, back: int = 0) -> tuple[AnyWaiter | None, int]:
        """Return who goes next here, as far as limits here and below are concerned; else when."""
        asleep, ready = self._asleep, self._ready
        while asleep and (asleep[0][0] <= now or back):
            due, flow = heapq.heappop(asleep)
            if flow.asleep == due:
                self.wake(flow)
        while ready:
            flow = ready[0][1]
            waiter, due = flow.head(now, back)
            if waiter is not None:
                # The root's limits are asked by whoever lets it go.
                return (waiter, now) if self.node.parent is None else self._ask(waiter, now, back)
            heapq.heappop(ready)
            self.leave(flow)
            if due >= EMPTY:
                self.flows.discard(flow)
            else:
                self._put_to_sleep(flow, due)
        return None, self._next_waking()

    def _ask(self, waiter: AnyWaiter, now: int, back: int) -> tuple[AnyWaiter | None, int]:
        """Return the head, or when the limits here let it pass."""
        own, since = self.node.own, waiter.line.since
        due, bound_by = admit(own, waiter.amounts, since, now, book=False, back=back)
        if due <= now:
            place = self.node.place
            if place is None or place.room(waiter.dispatcher):
                return waiter, now
            due = now + _LATER  # or as soon as the place has room
        waiter.line.bound_by = bound_by
        return None, min(due, self._next_waking())  # another call may be the head by then

    def _put_to_sleep(self, flow: Flow, due: int) -> None:
        flow.asleep = due
        heapq.heappush(self._asleep, (due, flow))
        if len(self._asleep) > 2 * len(self.flows) + SWEEP:
            self._asleep[:] = sorted((each.asleep, each) for each in self.flows if each.asleep)

    def _next_waking(self) -> int:
        """Return when the first sleeper wakes; `EMPTY` if nobody sleeps."""
        asleep = self._asleep
        while asleep and asleep[0][1].asleep != asleep[0][0]:
            heapq.heappop(asleep)
        return asleep[0][0] if asleep else EMPTY

    def charge(self, line: Line, amounts: Amounts) -> None:
        """Charge the flows on the way to ``line``, which is first at each branch."""
        flow: Flow = line
        node, work = None, 0.0
        while (branch := flow.above) is not None:
            if branch.node is not node:
                node = branch.node
                work = node.work(amounts)
            branch._charge_first(work)  # noqa: SLF001 - its own kind
            flow = branch

    def _charge_first(self, work: float) -> None:
        """Charge the flow that is first, and move virtual time."""
        flow = self._ready[0][1]
        if self.by_priority and len(self.flows) > 1:
            self.weigh_priorities()
        self._works += work - flow.work
        flow.work = work
        if flow.tag > self.clock:
            self.clock = self._potential = flow.tag
        step = work / flow.weight - flow.credit
        flow.credit = -step if step < 0.0 else 0.0
        if step > 0.0:
            flow.tag += step
        weights = max(flow.weight, self._weights)  # sums of floats drift
        distance = self._works / weights
        self._potential = min(self._potential + work / weights, flow.tag + distance)
        self.clock = max(self.clock, self._potential - distance)
        heapq.heapreplace(self._ready, (flow.tag, flow))

    def weigh_priorities(self) -> None:
        """Give each priority that waits eight times the weight of the next below."""
        competing = sorted((flow for flow in self.flows if flow.competes), reverse=True)
        for place, flow in enumerate(competing):
            flow.weight = _STEP**place
        self._weights = sum(flow.weight for flow in competing)


def copied(original: Any, memo: dict[int, Any], names: Iterable[str]) -> Any:
    """Return a copy of which only the attributes ``names`` are copies: it takes a tenth of the time."""
    memo[id(original)] = new = object.__new__(type(original))
    vars(new).update(vars(original))
    for name in vars(original).keys() & names:
        vars(new)[name] = copy.deepcopy(vars(original)[name], memo)
    return new


def line_of(node: Node, priority: int) -> Line:
    """Return the line for the calls of a limiter and a priority."""
    line: Line | None = node.standing.lines.get(priority)
    if line is None:
        line = Line(node, branch_of(node, priority), priority)
        line.rank = -priority
        node.standing.lines = {**node.standing.lines, priority: line}
    return line


def branch_of(node: Node, priority: int) -> Branch:
    """Return where the calls of one priority at a limiter and below it meet."""
    priority = 0 if node.standing.within else priority
    branch: Branch | None = node.standing.branches.get(priority)
    if branch is None:
        above = node.pacer.top if node.parent is None else branch_of(node.parent, priority)
        branch = Branch(node, above, node.standing.weight, rank=-priority)
        node.standing.branches = {**node.standing.branches, priority: branch}
    return branch


def wake(node: Node) -> None:
    """Ask the flows of a limiter and of those above anew, because something has changed there."""
    node.pacer.refused = None
    _wake_flows(node.path)
    for each in node.path:
        if each.ways and (each is node or each.own.meters or each.own.bounded):
            for way in each.ways:
                way.pacer.refused = None
                _wake_flows(way.chain)


def _wake_flows(nodes: Iterable[Node]) -> None:
    for node in nodes:
        for branch in node.standing.branches.values():
            if branch.asleep:
                branch.above.wake(branch)


def reweigh(node: Node, weight: float) -> None:
    """Change a limiter's share compared with its siblings'."""
    for branch in node.standing.branches.values():
        branch.above.reweigh(branch, weight)
    node.standing.weight = weight
