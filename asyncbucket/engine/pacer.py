"""When to dispatch again: one lock and one order for a tree of limiters.

All limiters of a tree share one `Pacer`. A *dispatch* is a plain function under its lock: it admits
every call that may go, in order, and finds out when the next may. Nothing else admits a call that
has waited. Each call that waits does so on a `Dispatcher`: its event loop, or its own blocked thread. A dispatcher
dispatches when its timer is due, and when the doorbell rings: whatever gives something back rings it
(`Pacer.ring`), all rings of one turn of the loop together. See `asyncbucket.engine.dispatchers`.

Why? Nothing is booked before it is handed over, and nothing but a dispatch books for those who wait,
so nobody is woken in vain and nobody barges. A call that is cancelled at the very instant of its
handover gives the booking back, and rings. The usual way, sleep and recheck, wakes all for one and
serves whoever is fastest; a timer for each waiter knows nothing of a refund.

All dispatchers share one queue. A dispatcher lets only its own calls go, so a call that is admitted runs in the
next turn of its loop, and is not booked long before it leaves. If the head waits elsewhere, that
dispatcher is rung. If it does not come within a grace period, it is late: its calls are parked until it
does, and come back in their places. So a loop that is blocked, or dead, holds up nobody for longer
than that.

The lock is never held across an await, and no code of a user runs under it. Work that must not wait
for it (a lease that is settled, released, or finalized by the garbage collector, which may
interrupt the very thread that holds it) is left to its holder: `DeferringLock.do`. Every release of the lock
runs what was left.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from functools import partial
from typing import Any, Final

from asyncbucket.engine.cost import Cost
from asyncbucket.engine.dispatchers import (
    GRACE,
    DeferringLock,
    Dispatchers,
    Stalls,
    reset_after_fork,
)
from asyncbucket.engine.errors import AsyncBucketError, CostExceedsLimit
from asyncbucket.engine.events import Cancelled, Event
from asyncbucket.engine.interfaces import Place
from asyncbucket.engine.meters import NEVER, Amounts, Meters, Route, admit, leeway, take, untake
from asyncbucket.engine.node import Node, shown_name
from asyncbucket.engine.queue import (
    EMPTY,
    NOWHERE,
    AnyWaiter,
    Branch,
    Dispatcher,
    Line,
    line_of,
    wake,
)
from asyncbucket.engine.terms import read_clocks

#: The most admissions in one dispatch, before other tasks of the loop get their turn.
BATCH: Final = 256
#: From so many calls that wait on, one timer serves several that come due in a row.
CROWD: Final = 64
#: A waiter may be cancelled between any two lines: by a signal handler.
_DONE: Final = (asyncio.InvalidStateError, InvalidStateError)


class Pacer:
    """Share a tree of limiters among all loops and threads; every method may be called anywhere.

    Methods whose names end in ``_locked`` are called with the lock held.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        name: str,
        wall_clock: Callable[[], int] | None = None,
    ) -> None:
        self.clock = clock
        #: A virtual clock's: raises if calls wait on a loop that runs on another clock.
        self.check_loop: Callable[[object], None] | None = getattr(clock, "check_loop", None)
        #: What the wall clock shows at an instant of the clock.
        self.wall = read_clocks(clock, wall_clock)
        self.root = Node(name, pacer=self)
        self.lock = DeferringLock()
        #: How many observers there are; while it is 0, no events are made.
        self.observed = 0
        #: What last held up the head.
        self.bound_by: str | None = None
        #: What keeps the root's limits, if they are not kept here.
        self.place: Place | None = None
        self.dispatchers = Dispatchers(self.dispatch)
        self._set_up()
        #: The trees that dispatch together, because calls may wait in several of them: see `share`.
        self.trees: tuple[Pacer, ...] = (self,)
        #: Where the first that it refused stands, and what that costs; None once anything else counts;
        #: and when to ask again.
        self.refused: tuple[Line, Amounts] | None = None
        self.due = EMPTY
        reset_after_fork(self)

    def share(self, *others: "Pacer") -> None:
        """Dispatch together with ``others`` from now on, in this order: a call may wait in several trees.

        All use this one's lock, and its dispatchers.
        """
        self.trees = (self, *others)
        self.observed = sum(tree.observed for tree in self.trees)
        for tree in others:
            tree.trees, tree.observed = self.trees, self.observed
            tree.lock, tree.dispatchers = self.lock, self.dispatchers
            tree.stalls = Stalls(tree.top, self.dispatchers, self.clock, self.lock.news)

    def _set_up(self) -> None:
        """Begin with nobody in line."""
        #: How many calls wait, in any of the trees that share its lock.
        self.waiting = 0
        #: Where all who wait compete: the priorities, above the root's own branches.
        self.top = Branch(self.root, None, 1.0)
        self.stalls = Stalls(self.top, self.dispatchers, self.clock, self.lock.news)

    # --- events ---

    def count_observers(self, number: int) -> None:
        """Count ``number`` observers more; with the lock held."""
        for pacer in self.trees:
            pacer.observed += number

    def notify_locked(
        self, node: Node, event_type: type[Event], at: int | None = None, **fields: Any
    ) -> None:
        """Tell the observers of ``node`` and of those above when the lock is released."""
        if self.observed:
            when = (self.clock() if at is None else at) * 1e-9
            event = event_type(limiter=shown_name(node.path[0].name), at=when, **fields)
            self.lock.news.append(partial(node.emit, event))

    def notify(self, node: Node, event_type: type[Event], **fields: Any) -> None:
        """Tell them now, in this thread; without the lock."""
        self.notify_locked(node, event_type, **fields)
        self.lock.catch_up()

    # --- standing in line ---

    def join_locked(
        self, waiter: AnyWaiter, nodes: Sequence[Node], now: int, priority: int = 0
    ) -> None:
        """Let ``waiter`` stand in line at all ``nodes``, of different trees; usually there is one.

        It knows its dispatcher, its amounts and its deadline.
        """
        dispatcher, deadline = waiter.dispatcher, waiter.deadline
        if self.check_loop is not None and dispatcher.loop is not None:
            self.check_loop(dispatcher.loop)
        waiter.asked = now
        waiter.number = self.dispatchers.arrivals = self.dispatchers.arrivals + 1
        lines: tuple[Line, ...] = ()
        is_first = False
        for node in nodes:
            line = line_of(node, priority)
            line.join(waiter, now)
            lines = (*lines, line) if lines else line.only
            is_first = is_first or line.living == 1
        waiter.lines = lines
        self.count_in(waiter, 1)
        if deadline is not None:
            dispatcher.watch(waiter, deadline)
        end = EMPTY if deadline is None else deadline
        if self.waiting == 1 and self._joins_alone(waiter, end, now):
            return
        if is_first or dispatcher.wakes_at >= EMPTY or end < dispatcher.wakes_at:
            dispatcher.ring(now)

    def _joins_alone(self, waiter: AnyWaiter, end: int, now: int) -> bool:
        """Let a dispatcher sleep whose call waits alone, without a dispatch; return whether that will do."""
        dispatcher, wakes = waiter.dispatcher, end
        for tree in self.trees:
            tree.stalls.since = now
        for line in waiter.lines:
            tree = line.node.pacer
            if tree.place is not None:
                return False
            due, bound_by = admit(line.node.route, waiter.amounts, now, now, book=False)
            tree.bound_by = line.bound_by = bound_by
            if due <= now or (due == NEVER and not dispatcher.leases):  # see `override`
                return False
            wakes = min(wakes, tree.stalls.wait_for_slots(now) if due == NEVER else due)
        dispatcher.sleep(wakes, now)
        return True

    def join_too_locked(self, waiter: AnyWaiter, node: Node, now: int) -> None:
        """Let a call that waits stand in line at ``node``, too: it has its place by order of arrival."""
        line = line_of(node, waiter.line.priority)
        if line in waiter.lines or (self.place is not None and waiter in self.place.calls):
            return
        waiter.lines = (*waiter.lines, line)
        line.join(waiter, now)
        if line.living == 1:
            waiter.dispatcher.ring(now)

    def leave_lines(self, waiter: AnyWaiter, served: Line | None = None) -> None:
        """Have a call stand in line nowhere; ``served`` counts it out by itself."""
        self.dispatchers.departures += 1
        for line in waiter.lines:
            if line is not served:
                line.depart()
        waiter.lines = ()

    def leave_stores(self, waiter: AnyWaiter) -> None:
        """Take a call back from the stores that have not let it go."""
        for tree in self.trees:
            line: Line | None = None if tree.place is None else tree.place.leave(waiter)
            if line is not None:
                for each in line.node.path:
                    each.slots.in_flight -= 1
                for each in line.node.chain:
                    each.standing.waiting -= 1
                line.credit_flows(waiter.amounts)

    def gone_locked(self, waiter: AnyWaiter, now: int) -> None:
        """Count out ``waiter``, which is done but did not pass, and ring: another may be next now."""
        lines = waiter.lines
        self.leave_stores(waiter)
        self.leave_lines(waiter)
        self.count_in(waiter, -1)
        waiter.lease._gave_up_locked()  # noqa: SLF001 - no user is to see it
        waiter.dispatcher = NOWHERE
        for line in lines or (waiter.line,):
            self.ring_locked(line.node, now)

    def count_in(self, waiter: AnyWaiter, calls: int) -> None:
        """Count a call that waits from now on, wherever it stands: 1; or no longer: -1."""
        for tree in self.trees:
            tree.waiting += calls
        waiter.dispatcher.waiting += calls
        common = waiter.line.node.common
        for each in () if common is None else common.path:
            each.standing.waiting += calls

    def withdraw_locked(self, waiter: AnyWaiter) -> None:
        """Take a call that gives up out of the line, or give back what it was just handed."""
        dispatcher, node, now = waiter.dispatcher, waiter.line.node, self.clock()
        if dispatcher.dispatch is None and dispatcher is not NOWHERE:
            return  # it waited in the parent process
        (node.common or node).count("cancelled")
        if self.observed:
            cost, waited = Cost.of(waiter.amounts), (now - waiter.asked) * 1e-9
            self.notify_locked(node.common or node, Cancelled, cost=cost, waited=waited)
        if dispatcher is NOWHERE:  # its time was up, it failed, or its loop was closed
            return
        if waiter.done() and not waiter.cancelled():
            waiter.lease._hand_back_locked(waiter)  # noqa: SLF001 - no user is to see it
            waiter.line.credit_flows(waiter.amounts)
            self.ring_locked(node, now)
        else:
            if not waiter.cancelled():
                with contextlib.suppress(RuntimeError):  # on a closed loop, it is marked
                    waiter.cancel()
            self.gone_locked(waiter, now)
            if not dispatcher.waiting:  # its task ends; else it might outlive the limiter
                dispatcher.ring(now)

    def fail_locked(self, waiter: AnyWaiter, error: AsyncBucketError) -> None:
        """Make ``waiter`` fail, because it can never pass; from any thread."""
        loop = waiter.dispatcher.loop
        if loop is None or asyncio._get_running_loop() is loop:  # noqa: SLF001
            self._fail(waiter, error)
        else:
            with contextlib.suppress(RuntimeError):  # closed: nobody waits there any more
                loop.call_soon_threadsafe(self._fail_here, waiter, error)

    def _fail_here(self, waiter: AnyWaiter, error: AsyncBucketError) -> None:
        with self.lock:  # `do` might leave it to another thread, and futures are not for those
            self._fail(waiter, error)

    def _fail(self, waiter: AnyWaiter, error: AsyncBucketError) -> None:
        if waiter.done() or waiter.dispatcher is NOWHERE:
            return  # it has passed, or its loop was closed just now
        waiter.set_exception(error)
        dispatcher, now = waiter.dispatcher, self.clock()
        self.gone_locked(waiter, now)
        dispatcher.ring(now)

    def is_free_locked(self, node: Node, now: int) -> bool:
        """Tell whether a newcomer at ``node`` would overtake nobody that may go now or next."""
        for line in node.standing.lines.values():  # `any` of a generator takes three times as long
            if line.living:
                return False
        for each in node.chain[:-1]:
            if each.standing.waiting and (each.own.meters or each.own.bounded):
                return False  # else the head is as good
        while True:
            head, _ = self.top.head(now)
            if head is None:
                return True
            if not self.is_late(head.dispatcher, now):
                return False

    def next_dispatch_locked(self, now: int) -> int:
        """Return when the first of those who wait will be dispatched: then a place is free."""
        wakes = (
            dispatcher.wakes_at for dispatcher in self.dispatchers.values() if dispatcher.waiting
        )
        return max(now, min(wakes, default=now))

    # --- the bell ---

    def ring_locked(self, node: Node, now: int | None = None) -> None:
        """Have all dispatch again, because something has changed at ``node`` or above."""
        if not self.waiting:
            return
        wake(node)
        now = self.clock() if now is None else now
        for dispatcher in self.dispatchers.values():
            if dispatcher.waiting and not dispatcher.ring(now):
                self._discard(dispatcher)

    def limits_changed_locked(self, node: Node) -> None:
        """Send newcomers and those who wait through the meters of ``node`` as they are now."""
        node.forget()
        for tree in self.trees if len(self.trees) > 1 else ():
            tree.root.forget()  # what they have in common may have changed
        if self.waiting:
            parked = [
                entry for dispatcher in self.dispatchers.values() for entry in dispatcher.parked
            ]
            standing = [
                (line, each)
                for tree in self.trees
                for line in tree.top.lines()
                for each in line.calls
            ]
            for line, waiter in [*standing, *parked]:
                if line in waiter.lines and not waiter.done():
                    self._check_locked(waiter, line)
            self.ring_locked(node)

    def _check_locked(self, waiter: AnyWaiter, line: Line) -> None:
        """Have a call leave a line where it can never pass; it fails if it stands in no other."""
        now = self.clock()
        waiter.lease._seek_locked(waiter, now)  # noqa: SLF001 - no user is to see it
        try:
            line.node.check(waiter.amounts)
        except CostExceedsLimit as error:
            if waiter.lines == line.only and not self._is_at_store(waiter):
                self.fail_locked(waiter, error)
            else:
                self.leave_line(waiter, line)

    def _is_at_store(self, waiter: AnyWaiter) -> bool:
        return any(tree.place is not None and waiter in tree.place.calls for tree in self.trees)

    def leave_line(self, waiter: AnyWaiter, line: Line) -> None:
        """Have a call leave one of the lines in which it stands."""
        self.dispatchers.departures += 1
        waiter.lines = tuple(each for each in waiter.lines if each is not line)
        line.depart()

    # --- loops that do not run ---

    def is_late(self, dispatcher: Dispatcher, now: int) -> bool:
        """Tell whether ``dispatcher`` missed its turn; if so, its calls are parked until it dispatches."""
        if dispatcher.is_closed():
            dispatcher.is_late = True
            self._discard(dispatcher)
        elif now > dispatcher.wakes_at + GRACE:
            dispatcher.is_late = True
        return dispatcher.is_late

    def discard_closed(self) -> bool:
        """Count out all who wait on loops that were closed; return whether there were any."""
        waiting = (each for each in self.dispatchers.values() if each.waiting)
        closed = [each for each in waiting if each.is_closed()]
        for dispatcher in closed:
            self._discard(dispatcher)
        return bool(closed)

    def _discard(self, dispatcher: Dispatcher) -> None:
        """Count out all who wait on ``dispatcher``, whose loop was closed."""
        lines = {line for tree in self.trees for line in tree.top.lines()}
        lines |= {line for line, _ in dispatcher.parked}
        parked = (waiter for _, waiter in dispatcher.parked)
        for waiter in [*(each for line in lines for each in line.calls), *parked]:
            if waiter.dispatcher is dispatcher and waiter.lines:
                self.leave_lines(waiter)
                self.count_in(waiter, -1)
                waiter.dispatcher = NOWHERE
        for line in lines:
            line.refill(each for each in line.calls if each.dispatcher is not NOWHERE)
        dispatcher.parked.clear()

    # --- dispatching ---

    def dispatch(self, dispatcher: Dispatcher) -> None:
        """Admit the calls of ``dispatcher`` that may go, end those whose time is up, sleep until the next."""
        with self.lock:
            now = self.clock()
            start = self._let_go(dispatcher, now)
            dispatcher.ran_at = now
            if dispatcher.is_late or dispatcher.parked:
                dispatcher.unpark()
            due = min(start, self._dispatch_all(dispatcher, now) if self.waiting else EMPTY)
            end, _ = dispatcher.first_deadline()
            if end <= now < due:  # else the head may still pass
                end = self._end_waits(dispatcher, now)
            dispatcher.sleep(max(now, min(due, end)) if dispatcher.waiting else EMPTY, now)

    def _let_go(self, dispatcher: Dispatcher, now: int) -> int:
        """Let go what stores have booked and is due; return when the next call of this dispatcher is."""
        start = EMPTY
        for tree in self.trees:
            if tree.place is not None:
                start = min(start, tree.place.let_go(dispatcher, now))
        return start

    def _dispatch_all(self, dispatcher: Dispatcher, now: int) -> int:
        """Admit all that may go, of all trees; return when this dispatcher must dispatch again."""
        if len(self.trees) == 1:
            return self.dispatch_tree(dispatcher, now)
        for _ in range(BATCH):
            due = EMPTY
            for tree in self.trees:
                if tree.root.standing.waiting and not tree.refuses_still(dispatcher, now):
                    before, tree.refused = self.dispatchers.departures, None
                    tree.due = tree.dispatch_tree(dispatcher, now, 1)
                    if self.dispatchers.departures != before:
                        break  # a call that has left a line may have made way for another there
                if tree.root.standing.waiting and tree.due < due:
                    due = tree.due
            else:
                return due
        return now

    def refuses(self, now: int) -> bool:
        """Tell whether it has refused the first of a line until later than ``now``."""
        return self.refused is not None and now < self.due

    def refuses_still(self, dispatcher: Dispatcher, now: int) -> bool:
        """Tell whether the first costs the same as the one that was refused until later than ``now``."""
        if self.refused is None or now >= self.due:
            return False
        line, amounts = self.refused
        first, _ = line.head(now)
        return first is not None and first.dispatcher is dispatcher and first.amounts == amounts

    def _end_waits(self, dispatcher: Dispatcher, now: int) -> int:
        """Resolve the waiters whose deadline has come; return when the next one does."""
        end, waiter = dispatcher.first_deadline()
        while waiter is not None and end <= now:
            if waiter.deadline is None or end < waiter.deadline:
                dispatcher.seeks()
                waiter.lease._seek_locked(waiter, now)  # noqa: SLF001 - as above
                return now  # it may pass before its time is up
            with contextlib.suppress(*_DONE):
                waiter.set_result(False)
                self.gone_locked(waiter, now)
            end, waiter = dispatcher.first_deadline()
        return end

    def dispatch_tree(self, dispatcher: Dispatcher, now: int, most: int = BATCH) -> int:  # noqa: C901, PLR0912 - read in one piece
        """Let up to ``most`` go that may; return when this dispatcher must dispatch again."""
        passed, place = 0, self.place
        while self.waiting and (place is None or place.room(dispatcher)):
            waiter, due = self.top.head(now)
            if waiter is None:
                return due if due != NEVER else self.override(dispatcher, now)
            line, is_ours = waiter.line, waiter.dispatcher is dispatcher
            if is_ours and passed >= most:
                return now
            if place is not None and line.node.common is not None and place.held_up():
                if place.held_back():
                    return NEVER  # it may pass elsewhere before
                if self._is_at_store(waiter):
                    self.leave_line(waiter, line)  # else it would go to and fro
                    continue
            has_ways = waiter.lines is not line.only
            book = is_ours and place is None and not has_ways
            due, bound_by = admit(line.node.route, waiter.amounts, line.since, now, book=book)
            if due > now:
                self.bound_by = line.bound_by = bound_by
                self.refused = (line, waiter.amounts) if has_ways else None
            if not is_ours:
                if self.is_late(waiter.dispatcher, now):
                    continue
                return self.leave_to(waiter.dispatcher, due, now)
            if due > now:
                return self._when_to_wake(waiter, due, now)
            if has_ways and waiter.lease._declines_locked(waiter, now):  # noqa: SLF001 - as above
                passed += waiter.done()
            elif has_ways:
                passed += self.serve_next(waiter, now)
            else:
                passed += self.serve(waiter, now)
        return NEVER if self.waiting else EMPTY

    def _when_to_wake(self, waiter: AnyWaiter, due: int, now: int) -> int:
        """Return when to dispatch again for the head, which is due then."""
        if due >= NEVER:
            return self.override(waiter.dispatcher, now)
        if waiter.dispatcher.waiting < CROWD:
            return due
        return due + leeway(waiter.line.node.route, waiter.amounts)

    def leave_to(self, other: Dispatcher, due: int, now: int) -> int:
        """Let another dispatcher admit the head, due at ``due``; return when to see whether it has."""
        if other.wakes_at > max(due, now):
            other.ring(now)
        return max(min(due, other.wakes_at), now) + GRACE

    def is_next(self, waiter: AnyWaiter, now: int) -> bool:
        """Tell whether a call that stands in several lines may pass now in this tree."""
        if self.place is not None or self.refuses(now):
            return False
        if self.top.head(now)[0] is not waiter:
            return False
        line = waiter.line
        return admit(line.node.route, waiter.amounts, line.since, now, book=False)[0] <= now

    def serve_next(self, waiter: AnyWaiter, now: int) -> int:
        """Let the head of a line go, which is due; return 1 if it still waited, else 0."""
        if self.place is None:
            take(waiter.line.node.route, waiter.amounts, now)
        return self.serve(waiter, now)

    def serve(self, waiter: AnyWaiter, now: int) -> int:
        """Let the head of a line go, which is booked; return 1 if it still waited, else 0."""
        line, amounts, asked = waiter.line, waiter.amounts, waiter.asked
        bound_by = line.bound_by or self.bound_by
        line.calls.popleft()
        self.leave_stores(waiter)
        if self.place is not None:
            self._push(waiter, self.place, now)
        elif self.let_go(waiter, now, bound_by):
            if bound_by is not None:
                line.node.count_waits(1, now - asked, bound_by)
            self.leave_lines(waiter, line)
            self.count_in(waiter, -1)
        else:
            untake(line.node.route, amounts, now)
            return 0
        self.top.charge(line, amounts)
        self.stalls.since = line.since = now
        line.depart()
        if len(line.node.chain) > 2:  # noqa: PLR2004 - a limiter above may sleep because of another call
            wake(line.node)
        return 1

    def let_go(
        self, waiter: AnyWaiter, now: int, bound_by: str | None, route: Route | None = None
    ) -> bool:
        """Resolve ``waiter`` and make its lease hold; return whether it still waited."""
        try:
            waiter.set_result(True)
        except _DONE:  # cancelled since it was asked for, in a signal handler
            return False
        route = route or waiter.line.node.route
        waiter.lease._hold_locked(now, waiter, bound_by, route)  # noqa: SLF001 - as above
        return True

    def _push(self, waiter: AnyWaiter, place: Place, now: int) -> None:
        """Hand ``waiter`` over to the store, booked below the root."""
        line = waiter.line
        below = tuple(
            pair for each in line.node.chain if each.place is None for pair in each.own.meters
        )
        for meter, resource in below:
            amount = waiter.amounts.get(resource)
            if amount:
                meter.book(amount, now)
        for each in line.node.path:
            each.slots.in_flight += 1
        next(line.node.places).push(waiter, below, now)
        self.leave_lines(waiter, line)
        for each in line.node.chain:
            each.standing.waiting += 1  # it stands at the store
        if place.held_up():
            waiter.lease._seek_locked(waiter, now)  # noqa: SLF001 - as above

    def pass_on_locked(
        self, waiter: AnyWaiter, meters: Meters, now: int, bound_by: str | None
    ) -> bool:
        """Let a call go that the store has booked in ``meters``; return whether it still waited."""
        node = waiter.line.node
        if not self.let_go(waiter, now, bound_by, Route(node.route.levels, meters)):
            return False  # its task gives back what it took
        for each in node.path:
            each.slots.admitted += 1
        if bound_by is not None:
            node.count_waits(1, now - waiter.asked, bound_by)
        self.leave_stores(waiter)
        self.leave_lines(waiter)
        for each in node.chain:
            each.standing.waiting -= 1
        self.count_in(waiter, -1)
        self.ring_locked(node, now)
        return True

    def override(self, dispatcher: Dispatcher, now: int) -> int:
        """Let one call pass without a slot if all are held where nothing runs; return when to dispatch again."""
        waiter, due = self.stalls.beyond_slots(dispatcher, now)
        if waiter is not None:
            take(waiter.line.node.route, waiter.amounts, now)
            self.serve(waiter, now)
        return due

    def after_fork(self) -> None:
        """Start afresh in a child process: the parent's loops, waiters and leases are not here."""
        self.dispatchers.after_fork()
        self.lock.after_fork()
        self._set_up()
        self.root.after_fork()
