"""One call's admission: asked for, waiting, held, over.

`Limiter.acquire` gives a `Lease` that asks: await it or enter it, and it is held. `settle` and
`release` never wait for the lock. If it is held by another thread, or by this one (interrupted by
the garbage collector, which closes a generator or a coroutine that holds a lease), whoever holds it
does the work: see `asyncbucket.engine.dispatchers.DeferringLock.do`.
"""

import asyncio
import contextlib
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, Unpack

from asyncbucket.engine import report
from asyncbucket.engine.cost import COMMON, Cost, rounded_up
from asyncbucket.engine.dispatchers import ATOMIC, OfThisProcess, ThreadDispatcher
from asyncbucket.engine.errors import AcquireTimeout, AsyncBucketError, CostExceedsLimit
from asyncbucket.engine.events import Admitted, Outcome, Queued, Released, Settled
from asyncbucket.engine.interfaces import Account
from asyncbucket.engine.meters import Amounts, Meters, Route, Slots, admit, untake
from asyncbucket.engine.node import Node, shown_name
from asyncbucket.engine.queue import NOWHERE, AnyWaiter, Call, Dispatcher, Line, SyncWaiter, Waiter
from asyncbucket.engine.terms import CallAmounts
from asyncbucket.engine.wording import USD, warn_user

if TYPE_CHECKING:
    from asyncbucket.engine.pacer import Pacer

#: What becomes of a call. Whoever enters it in a second place would make two calls of one.
ASKED, WAITING, HELD, ENTERED, OVER = range(5)
OPEN: Final = HELD, ENTERED
_USED: Final = "a lease serves one call, and this one was used already: call acquire() for another"
_BLOCKS: Final = (
    "this call waits for its admission and blocks the event loop, so nothing else runs: await "
    "limiter.acquire() in a coroutine, or move the blocking call to a thread with asyncio.to_thread()"
)
#: How many calls of a limiter are watched for calls inside that wait for their slot.
_EARLY: Final = 1_000
#: How long (ns) after its admission a call leaves that is dated anew.
_REDATE_AFTER: Final = 2_000_000
_NESTED: Final = (
    "this task holds the only slot of {!r} and waits for it here: release the first lease before this "
    "call, give the calls inside a limiter of their own, or raise concurrency"
)
PARTS_OF_TOKENS: Final = frozenset({"input_tokens", "output_tokens"})
#: How many parts a lease remembers. If a stream is settled chunk by chunk, older debts count as
#: reserved, so giving them back errs on the safe side.
_PARTS: Final = 16

#: Units that a call has booked of one resource, when, and in which meters: first the reservation,
#: then each debt. Limits that are set later never had it, so they get nothing back of it.
Parts: TypeAlias = list[tuple[int, int, Meters]]
#: How long (s) a call stood in line, what for, and where: that line's share paid for it.
_InLine: TypeAlias = tuple[float, str | None, Line]
#: What a call has passed that has not been admitted.
_NOTHING: Final = Route((), ())


class Lease(Call, OfThisProcess):
    """Ask for an admission; hold what it took until it is released.

    ``await`` it, or enter it with ``async with``, which releases it on leaving. Nothing is taken
    before that, and ``timeout`` counts from then. A lease that is held is a plain context manager,
    too. It serves one call: the next one needs another. It is no coroutine: for a task of its own,
    write ``asyncio.ensure_future(limiter.acquire())``.

    `settle` reports what the call really used; `release` gives the slot back. Both are synchronous
    and may be called from any thread, repeatedly, and in any order. A lease that is dropped
    releases itself. If the limiter finds its concurrency by itself, it learns from whichever of
    `release`, `overloaded` and `failed` comes first; leaving by an exception counts as one of the
    latter two.
    """

    # What most leases never set: they neither wait nor are settled.
    #: What is told of the call beside the limits.
    accounts: tuple[Account, ...] = ()
    #: Until when it may wait, worked out as it begins to; and how urgent it is.
    _deadline: Callable[[], int | None] | None = None
    _priority = 0
    _state = ASKED
    #: Where it was admitted; if it was not, settling changes nothing.
    _dispatcher: Dispatcher = NOWHERE
    #: When it was admitted; the meters that it passed, and the limiters at which it has its slot.
    _when = 0
    _route: Route = _NOTHING
    _in_line: _InLine | None = None
    #: What it has booked, once that is not what it reserved.
    _ledger: "Ledger | None" = None

    def __init__(self, node: Node, amounts: dict[str, int]) -> None:
        self._node = node
        self._amounts = amounts

    # --- asking ---

    def _take_now(self) -> bool:
        """Take everything now, or nothing, for a caller who will not wait."""
        self._raise_refusal()
        taken = self._try_now()
        if taken:
            self._raise_refusal()
        return taken

    def _try_now(self, state: int = ASKED) -> bool:
        """Take everything now if nobody has to wait longer for it, and it fits; else nothing."""
        if self._state != state:
            raise RuntimeError(_USED)
        node = self._node
        pacer: Pacer = node.pacer
        lock = pacer.lock
        lock.acquire()  # `with` would take twice the time
        try:
            now = pacer.clock()
            if (pacer.waiting and not pacer.is_free_locked(node, now)) or pacer.place is not None:
                return False
            route = node.route
            due, _ = admit(route, self._amounts, now, now)
            if due > now:
                return False
            dispatcher: Dispatcher | None = pacer.dispatchers.by_thread.get(get_ident())
            if dispatcher is None or not dispatcher.loop.is_running():  # type: ignore[union-attr]
                dispatcher = pacer.dispatchers.here()
            dispatcher.leases += 1
            self._dispatcher = dispatcher
            self._when = now
            self._route = route
            self._state = HELD
            if self.accounts or node.accounts:
                self._pass_locked(node, now)
        finally:
            lock.release()
        if lock.jobs or pacer.observed:
            lock.catch_up()
            self._notify_admitted()
        return True

    def _hold_locked(self, now: int, waiter: AnyWaiter, bound_by: str | None, route: Route) -> None:
        """Note that it passed ``route`` at ``now``, after it had waited as ``waiter``."""
        dispatcher, line = waiter.dispatcher.home, waiter.line
        dispatcher.leases += 1
        self._dispatcher, self._node = dispatcher, line.node
        self._when, self._route = now, route
        self._state = HELD
        self._in_line = (now - waiter.asked) * 1e-9, bound_by, line
        if self.accounts or line.node.accounts:
            self._pass_locked(line.node, now)

    def _pass_locked(self, node: Node, now: int) -> None:
        self.accounts = (*self.accounts, *node.accounts)
        for account in self.accounts:
            account.passed(self, now)

    def _hand_back_locked(self, waiter: AnyWaiter | None = None) -> None:  # noqa: ARG002 - its own
        """Give everything back that it was just handed: the call gave up at that very moment."""
        self._state = OVER
        self._dispatcher.leases -= 1
        self._dispatcher = NOWHERE
        untake(self._route, self._amounts, self._when)
        for account in self.accounts:
            account.settled(self, self._amounts, {})
            account.ended(self, "failed")

    # --- accounts ---

    def _gave_up_locked(self) -> None:
        for account in self.accounts:
            account.gave_up(self)

    def _raise_refusal(self) -> None:
        """Raise the error of an account that refuses the call, for a caller who will not wait."""
        refusal = self._refusal(self.accounts)
        if refusal is not None:
            self._refused(refusal[1])
            raise refusal[1]

    def _refused(self, error: BaseException) -> None:
        """Take the call back if it has passed, because of an account."""
        if self._state == HELD:
            self._take_back()
        self._state = OVER
        if isinstance(error, AsyncBucketError):
            report.count_refusal(self._node, self._amounts, error)

    def _take_back(self) -> None:
        """Give everything back that it was just handed, as if it had never passed."""
        pacer: Pacer = self._node.pacer
        with pacer.lock:
            self._hand_back_locked()
            if self._in_line is not None:
                self._in_line[2].credit_flows(self._amounts)
                self._in_line = None
            if pacer.observed:
                self._notify_released_locked("failed", {})
            pacer.ring_locked(self._node)

    # --- waiting ---

    def __await__(self) -> Generator[Any, Any, Self]:
        if self.accounts:
            yield from self._admit().__await__()
        elif not self._try_now():
            yield from self._wait().__await__()
        return self

    async def _admit(self, dispatcher: ThreadDispatcher | None = None) -> None:
        """Pass the limits, if the accounts agree."""
        if self._state != ASKED:
            raise RuntimeError(_USED)
        node, accounts, self._state = self._node, self.accounts, WAITING
        while True:
            refusal = self._refusal(accounts)
            if refusal is not None:
                if self._state == HELD:  # it keeps no slot while the account is asked
                    self._take_back()
                    self._node, self.accounts, self._state = node, accounts, WAITING
                await self._reconsider(*refusal, blocking=dispatcher is not None)
            elif self._state == HELD:
                return
            elif not self._try_now(WAITING):
                await self._wait(dispatcher)

    def _refusal(self, accounts: Iterable[Account]) -> tuple[Account, AsyncBucketError] | None:
        """Return the first account that refuses the call, and its error: asked first and last."""
        for account in accounts:
            error = account.refuses(self._amounts)
            if error is not None:
                return account, error
        return None

    async def _reconsider(
        self, account: Account, error: AsyncBucketError, *, blocking: bool
    ) -> None:
        try:
            if not await account.reconsiders(error, blocking=blocking):
                raise error  # noqa: TRY301 - counted below
        except BaseException as refusal:
            self._refused(refusal)
            raise

    async def _wait(self, dispatcher: ThreadDispatcher | None = None) -> None:
        """Wait in turn; in a blocked thread, its ``dispatcher`` blocks, and nothing is awaited."""
        self._state = WAITING
        node, amounts = self._node, self._amounts
        pacer: Pacer = node.pacer
        deadline = None if self._deadline is None else self._deadline()
        waiter: AnyWaiter | None = None
        try:
            waiter = self._join_line(deadline, dispatcher)
            asked = waiter.asked
            try:
                if pacer.observed:
                    pacer.notify(node, Queued, cost=self.cost, waiting=node.standing.waiting)
                if isinstance(waiter, Waiter):
                    in_time = await waiter
                else:
                    assert dispatcher is not None
                    _warn_of_blocked_loop()
                    dispatcher.block(waiter.done, pacer.clock)
                    in_time = waiter.result()
            except (CostExceedsLimit, AcquireTimeout):  # whoever raised it took the waiter out
                raise
            except BaseException as error:
                pacer.lock.do(pacer.withdraw_locked, waiter)
                # A finalizer tells nobody.
                if pacer.lock.news and not isinstance(error, GeneratorExit):
                    pacer.lock.catch_up()
                raise
            if not in_time:
                raise report.too_late(  # noqa: TRY301 - counted below
                    node, amounts, self._priority, asked, deadline
                )
            del waiter.lease  # the dispatcher may remember a deadline for long
        except BaseException as error:
            self._state = OVER
            if isinstance(error, report.REFUSALS):
                report.count_refusal(node, amounts, error)
            raise
        finally:
            del waiter  # else an error's traceback would keep it alive
        if pacer.observed:
            self._notify_admitted()

    def _join_line(self, deadline: int | None, dispatcher: Dispatcher | None) -> AnyWaiter:
        """Stand in line, unless that is hopeless."""
        node, amounts = self._node, self._amounts
        pacer: Pacer = node.pacer
        lock = pacer.lock
        lock.acquire()  # `with` would take twice the time
        try:
            now = pacer.clock()
            node.check(amounts)
            for level in node.path:
                most = level.standing.max_queue
                if most is not None and level.standing.waiting >= most:
                    raise report.too_many_wait_locked(level, node, amounts, self._priority)
            if deadline is not None and node.soonest(amounts, now) > deadline:
                raise report.too_late_locked(node, amounts, self._priority, now, deadline)
            waiter: AnyWaiter
            if dispatcher is None:
                _refuse_nesting(node)
                dispatcher = pacer.dispatchers.here()
                waiter = Waiter(loop=dispatcher.loop)
            else:
                dispatcher.home = pacer.dispatchers.here()
                pacer.dispatchers[dispatcher] = dispatcher
                waiter = SyncWaiter()
            waiter.lease, waiter.dispatcher = self, dispatcher
            waiter.amounts, waiter.deadline = amounts, deadline
            self._stand_locked(waiter, now)
            return waiter
        finally:
            lock.release()
            if lock.jobs:
                lock.catch_up()

    def _stand_locked(self, waiter: AnyWaiter, now: int) -> None:
        """Have ``waiter`` stand in line."""
        self._node.pacer.join_locked(waiter, (self._node,), now, self._priority)

    def _reprice(self, amounts: Mapping[str, int]) -> None:
        """Ask for ``amounts`` instead, in its place in line; once admitted, it is settled."""
        self._node.pacer.lock.do_and_tell(self._reprice_locked, amounts)

    def _reprice_locked(self, amounts: Mapping[str, int]) -> None:
        pacer: Pacer = self._node.pacer
        has_asked = any(tree.place is not None for tree in pacer.trees)
        if self._state == ASKED or (self._state == WAITING and not has_asked):
            self._amounts.update(amounts)  # the same object as the waiter's
            pacer.ring_locked(self._node)

    def _block(self) -> None:
        """Wait for the admission, blocking this thread."""
        pacer: Pacer = self._node.pacer
        dispatcher = ThreadDispatcher(pacer.dispatch)
        try:
            with contextlib.suppress(StopIteration):
                (self._admit(dispatcher) if self.accounts else self._wait(dispatcher)).send(None)
        finally:
            pacer.lock.do(pacer.dispatchers.pop, dispatcher, None)

    def _refuse(self) -> None:
        """Refuse the call, which cannot pass now."""
        report.refuse(self._node, self._amounts, self._priority)

    def _notify_admitted(self) -> None:
        node, asked = self._node, self._node.path[0]
        pacer: Pacer = node.pacer
        pacer.notify(
            node,
            Admitted,
            at=self._when,
            cost=self.cost,
            waited=self.waited,
            bound_by=self.bound_by,
            waiting=asked.standing.waiting,
            in_flight=asked.slots.in_flight,
        )

    async def __aenter__(self) -> Self:
        if self._state != HELD:  # it was not awaited before
            if self.accounts:
                await self._admit()
            elif not self._try_now():
                await self._wait()
        # Whoever waits inside for the same slot does so from the first call on.
        if self._node.slots.admitted < _EARLY:
            for level in self._route.levels:
                if level.most == 1:
                    level.entered = level.admitted, id(asyncio.current_task())
        self._state = ENTERED if self._state == HELD else self._state  # another thread may end it
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.release()
        else:
            self._broken(error)

    def __enter__(self) -> Self:
        if self._state < HELD:
            self._state = OVER
            raise TypeError(
                "write `async with limiter.acquire():`, or `with limiter.acquire_sync():` where there "
                "is no event loop"
            )
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.release()
        else:
            self._broken(error)

    # --- holding ---

    @property
    def cost(self) -> Cost:
        """What was reserved."""
        return Cost.of(self._amounts)

    @property
    def waited(self) -> float:
        """Seconds between asking and admission."""
        return 0.0 if self._in_line is None else self._in_line[0]

    @property
    def bound_by(self) -> str | None:
        """What it waited for: ``"requests"``, ``"tokens"``, ``"concurrency"``, ``"paused"``...; None if it did not wait."""
        return None if self._in_line is None else self._in_line[1]

    @property
    def released(self) -> bool:
        """Whether it is over."""
        return self._state == OVER

    def settle(self, **used: Unpack[CallAmounts]) -> None:
        """Report what the call really used.

        What was reserved beyond it is given back at once, and admits waiting calls. What was used
        beyond the reservation becomes a debt that later calls wait for. Resources that are not
        named stay as they are, except that ``tokens`` follows its parts. (If only ``tokens`` was
        reserved, report both parts, or ``tokens``: one part alone gives nothing back of the whole.)
        Settling again replaces the earlier report; reporting the same again changes nothing.

        Raises:
            TypeError, ValueError: an amount is not a finite number from 0 on, or no limit counts
                the resource; nothing is changed then.
        """
        if not used.keys() <= COMMON:
            self._node.check_known(used)
        amounts: dict[str, int] = {}
        given: Mapping[str, Any] = used
        for name, amount in given.items():
            if amount is not None:
                usual = type(amount) is int and amount >= 0 and name != USD
                amounts[name] = amount if usual else rounded_up(amount, name)  # pyright: ignore[reportArgumentType]
        self._settle(amounts)

    def _settle(self, used: dict[str, int]) -> None:
        if self._state < HELD:
            raise RuntimeError("this call has not been admitted yet: await it, or enter it")
        self._node.pacer.lock.do_and_tell(self._settle_locked, used)

    def _settle_locked(self, used: dict[str, int]) -> None:
        """Correct the meters to ``used``, and admit calls that fit into what comes back."""
        if self._dispatcher.dispatch is None:
            return  # it was never admitted, or in a parent process, and is counted there
        node, ledger = self._node, self._booked()
        pacer: Pacer = node.pacer
        before, used = ledger.amounts(), ledger.with_total(used)
        if pacer.observed:
            corrects = {name: before[name] for name in used if name in ledger.parts}
            pacer.notify_locked(node, Settled, reserved=self.cost, used=used, corrects=corrects)
        now, rings = pacer.clock(), False
        route = self._route if pacer.place else node.route
        for name, amount in used.items():
            delta = amount - before.get(name, 0)
            if delta < 0:
                node.count_refund(name, -delta)
            ledger.correct(name, delta, now, route)
            # A child in debt lets others go first, too.
            rings = rings or delta < 0 or (delta > 0 and node.parent is not None)
        if self._in_line is not None or self.accounts:
            after = ledger.amounts()
            if self._in_line is not None:
                self._in_line[2].credit_flows(before, after)
            for account in self.accounts:
                account.settled(self, before, after)
        if rings and pacer.waiting:
            pacer.ring_locked(node)

    def _booked(self) -> "Ledger":
        if self._ledger is None:
            self._ledger = Ledger(self._amounts, self._when, self._route.meters)
        return self._ledger

    def _used(self) -> Amounts:
        """Return what it has used: as settled, or else as reserved."""
        return self._amounts if self._ledger is None else self._ledger.amounts()

    def _sent(self) -> None:
        """Date the cost to now, because the call leaves only now.

        A client may work for a while between the admission and sending the request, and a provider
        counts from its arrival. Dating the booking likewise keeps windows true. Two milliseconds
        are not worth it.
        """
        pacer: Pacer = self._node.pacer
        with pacer.lock:
            now = pacer.clock()
            if now - self.began("ok") >= _REDATE_AFTER:
                self._booked().redate(now)

    # --- over ---

    def release(self) -> None:
        """Give the slot back; the cost stays counted, as reserved or as settled."""
        node = self._node
        pacer: Pacer = node.pacer
        if (
            ATOMIC
            and self._state in OPEN
            and self._dispatcher.dispatch is not None
            and not (self.accounts or pacer.waiting or pacer.observed)
        ):
            # No other thread interleaves between the tests and the first store. Whoever is about to
            # wait looks at the slots after having joined the line, or is rung.
            self._state = OVER
            self._dispatcher.leases -= 1
            for level in self._route.levels:
                level.in_flight -= 1
            if pacer.waiting:
                pacer.lock.do(pacer.ring_locked, node)
            return
        self._end("ok")

    def overloaded(self) -> None:
        """Release, and report that the server refused the call (429, 503) or let it time out.

        If the limiter finds its concurrency by itself, there will be fewer slots.
        """
        self._end("overloaded")

    def failed(self) -> None:
        """Release, and report that the call's duration says nothing about the server's load."""
        self._end("failed")

    def _broken(self, error: BaseException) -> None:
        """Release on leaving a ``with`` block by an exception."""
        if isinstance(error, TimeoutError) and not isinstance(error, AsyncBucketError):
            self.overloaded()
        else:
            self.failed()

    def _undo(self) -> None:
        """Give everything back, as if the call had never been: for calls that were not made."""
        self._settle({name: 0 for name in self._used() if name != "concurrency"})
        self.failed()

    def _give_up_slots_locked(self, path: Collection[Node]) -> None:
        """Give back the slots, for good, that a call made inside this one needs at ``path``.

        This call does nothing itself meanwhile. If it kept a slot that the other waits for, and all
        slots were held so, they would wait for ever.
        """
        held = self._route.levels
        given_up = [level for level in self._node.path if level in path and level.slots in held]
        if self._state not in OPEN or self._dispatcher.dispatch is None or not given_up:
            return
        gone = [level.slots for level in given_up]
        self._route = Route(tuple(each for each in held if each not in gone), self._route.meters)
        pacer: Pacer = self._node.pacer
        for level in given_up:
            level.slots.in_flight -= 1
            if level.place is not None:
                level.place.ended(self, "ok")
        pacer.ring_locked(self._node)

    def _end(self, outcome: Outcome) -> None:
        if self._state in OPEN:
            self._node.pacer.lock.do_and_tell(self._end_locked, outcome)

    def _end_locked(self, outcome: Outcome) -> None:
        if self._state not in OPEN or self._dispatcher.dispatch is None:
            return
        self._state = OVER
        self._dispatcher.leases -= 1
        node = self._node
        pacer: Pacer = node.pacer
        for account in self.accounts:
            account.ended(self, outcome)
        for level in self._route.levels:
            level.in_flight -= 1
        if pacer.waiting:
            for bound in node.route.bounded:
                if bound.in_flight + 1 >= bound.most:  # somebody may wait for this slot
                    pacer.ring_locked(node)
                    break
        if pacer.observed:
            self._notify_released_locked(outcome, self._used())

    def _notify_released_locked(self, outcome: Outcome, used: Mapping[str, int]) -> None:
        node, cost, amounts = self._node, self.cost, Cost.of(used)
        held = (node.pacer.clock() - self._when) * 1e-9
        node.pacer.notify_locked(
            node, Released, cost=cost, held=held, outcome=outcome, used=amounts
        )

    @property
    def amounts(self) -> Amounts:
        """What was reserved, the slot included."""
        return self._amounts

    @property
    def reported(self) -> Collection[str]:
        """The resources whose use was settled."""
        return () if self._ledger is None else self._ledger.parts

    @property
    def levels(self) -> tuple[Slots, ...]:
        """The levels at which it has its slot."""
        return self._route.levels

    def began(self, outcome: Outcome) -> int:
        """Return when the call began (ns): as it was sent, or else as it was admitted."""
        return self._ledger.when if outcome == "ok" and self._ledger is not None else self._when

    def __del__(self) -> None:
        state = self._state
        if state == OVER:
            return
        if state in OPEN:  # a finalizer may run anywhere, even inside the lock
            self._node.pacer.lock.do(self._end_locked, "failed")
        elif state == ASKED:
            _warn_of_first(self._node)

    def __repr__(self) -> str:
        state = ("asked", "waiting", "open", "open", "released")[self._state]
        return f"<Lease {state} {self.cost} waited={self.waited:.3f} s bound_by={self.bound_by}>"


class Ledger:
    """Keep what a call has booked of each resource: as reserved, or as settled since."""

    __slots__ = ("_meters", "_reserved", "parts", "when")

    def __init__(self, reserved: Amounts, when: int, meters: Meters) -> None:
        self._reserved, self._meters = reserved, meters
        #: The date of its cost.
        self.when = when
        #: For each settled resource, what is booked.
        self.parts: dict[str, Parts] = {}

    def amounts(self) -> Amounts:
        """Return what is booked in all."""
        if not self.parts:
            return self._reserved
        settled = {name: sum(units for units, _, _ in parts) for name, parts in self.parts.items()}
        return {**self._reserved, **settled}

    def with_total(self, used: dict[str, int]) -> dict[str, int]:
        """Return ``used`` with the tokens that follow from its input and output tokens, unless given.

        If the split was unknown, each was reserved as the whole. Then one that is not reported yet
        adds no more than the other leaves of the whole.
        """
        if "tokens" in used or used.keys().isdisjoint(PARTS_OF_TOKENS):
            return used
        reserved, now = self._reserved, {**self.amounts(), **used}
        total = now.get("input_tokens", 0) + now.get("output_tokens", 0)
        if not used.keys() | self.parts.keys() >= PARTS_OF_TOKENS:
            beyond = (max(0, now.get(name, 0) - reserved.get(name, 0)) for name in PARTS_OF_TOKENS)
            total = min(total, reserved.get("tokens", 0) + sum(beyond))
        return {**used, "tokens": total}

    def correct(self, resource: str, delta: int, now: int, route: Route) -> None:
        """Book ``delta`` units more, which later calls on ``route`` wait for.

        If it is negative, give that many back: the latest bookings first, each at its own date.
        """
        reserved = self._reserved.get(resource, 0), self.when, self._meters
        parts = self.parts.setdefault(resource, [reserved])
        if delta > 0:
            parts.append((delta, now, route.meters))
            if len(parts) > _PARTS:
                (units, when, meters), (debt, _, _) = parts[:2]
                parts[:2] = [(units + debt, when, meters)]
            for meter, counts in route.meters:
                if counts == resource:
                    meter.owe(delta, now)
        while delta < 0:
            units, when, meters = parts.pop()
            left = max(0, units + delta)
            if left:
                parts.append((left, when, meters))
            for meter, counts in meters:
                if counts == resource:
                    meter.unbook(units - left, when, left=left)
            delta += units - left

    def redate(self, now: int) -> None:
        """Date everything to ``now``."""
        for meter, resource in self._meters:
            reserved = [(self._reserved.get(resource, 0), self.when, self._meters)]
            for units, when, _ in self.parts.get(resource, reserved):
                if units:
                    meter.redate(units, when, now)
        for parts in self.parts.values():
            parts[:] = [(sum(units for units, _, _ in parts), now, self._meters)]
        self.when = now


def _warn_of_first(node: Node) -> None:
    """Warn that an acquisition was never awaited.

    Whoever forgets to await does so from the first call on. So only those of a limiter that nobody
    has used yet are watched.
    """
    if not (node.slots.admitted or node.standing.waiting or node.tally.counts):
        warnings.warn(
            "an acquisition was never awaited, so nothing was paced: write "
            "`await limiter.acquire(...)` or `async with limiter.acquire(...):`",
            RuntimeWarning,
            stacklevel=3,
        )


def _warn_of_blocked_loop() -> None:
    if asyncio._get_running_loop() is not None:  # noqa: SLF001 - None in a plain thread
        warn_user(_BLOCKS, RuntimeWarning)


def _refuse_nesting(node: Node) -> None:
    """Refuse a call that waits for the only slot, which its own task holds."""
    for level in node.path:
        slots = level.slots
        if slots.in_flight and slots.entered == (slots.admitted, id(asyncio.current_task())):
            raise RuntimeError(_NESTED.format(shown_name(level.name)))
