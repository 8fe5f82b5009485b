"""Budgets: what everything in a ``with`` block may spend together.

A limit caps a window of time, and calls wait for it. A budget caps a total, and nobody waits for it:
the call that would exceed it is refused with `BudgetExceeded`, before it is sent.

>>> with asyncbucket.budget(usd=2.00) as budget:
...     answer = await agent.run("...")
>>> budget.spent
{'usd': 0.0412}

When is a call charged? Not before it is admitted. If a hundred calls in line reserved their cost,
most would be refused because of calls that have not even started. From its admission on, a call
reserves the most it may cost; when it ends, it has spent what it used. A call that the budget could
not pay for even if all calls in flight turned out to be free is refused before it waits.

So a budget is never exceeded as long as calls reserve enough, which ``max_tokens`` ensures. A call
that uses more than it reserved overdraws the budget, and the next one is refused.

Leases report to their budgets without taking a lock, because the garbage collector may end a lease
anywhere. Each report goes into a queue, and whoever reads the sums next adds it up first.
"""

import asyncio
import contextlib
import functools
import inspect
import weakref
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final, Literal, TypeAlias

from asyncbucket.engine.context import InheritedScope
from asyncbucket.engine.cost import rounded_up
from asyncbucket.engine.errors import BudgetExceeded
from asyncbucket.engine.events import Outcome
from asyncbucket.engine.lease import ASKED, HELD, OVER, PARTS_OF_TOKENS, WAITING, Lease
from asyncbucket.engine.meters import Amounts
from asyncbucket.engine.seats import Lock, OfThisProcess, ThreadSeat
from asyncbucket.engine.wording import counted, in_given_unit, is_number
from asyncbucket.explanations import count_refusal

#: What is asked before a call is refused: it returns the new cap, or None.
OnExceeded: TypeAlias = Callable[[BudgetExceeded], float | Awaitable[float | None] | None]
#: Where an amount counts: at calls in flight, or at calls that are over; or nowhere yet.
_Side: TypeAlias = Literal["reserved", "spent", "left"]

_NOTHING: Final[Amounts] = {}
_REMEDY: Final = "finish with what you have, make a cheaper call, or ask for a larger budget"
#: The budgets about which somebody is being asked from here.
_asking: Final[ContextVar[tuple["Budget", ...]]] = ContextVar("asyncbucket asking", default=())


class Budget(InheritedScope, OfThisProcess):
    """Cap what all calls inside may spend together, across limiters, models, tools and sub-agents.

    >>> with asyncbucket.budget(usd=2.00, requests=100) as budget:
    ...     answer = await agent.run("...")
    >>> budget.spent, budget.left

    It holds for async and blocking calls, in every task started inside and in `asyncio.to_thread`,
    but not in plain threads. If budgets nest, all of them hold. At its admission a call reserves the
    most it may cost, and is refused if less is left. So with ``max_tokens`` set, the cap is never
    exceeded. Without it, a call may use more than expected; then the next ones are refused.

    Args:
        usd: US dollars. Wrapped models, transports and commands know what their calls cost (see
            `asyncbucket.prices`); for a plain ``acquire``, say it: ``acquire(usd=0.002)``.
        tokens: LLM tokens used, input and output together, whatever the provider's limits count.
        requests: calls, retries included.
        input_tokens: LLM tokens sent.
        output_tokens: LLM tokens received.
        on_exceeded: called with the error before a call is refused, for one call at a time on each
            event loop. It returns a new cap for the error's ``resource``, or None to refuse; it may
            be async. The call may hold its slot meanwhile, and its ``timeout`` does not count. Not
            called for ``acquire_nowait``, nor for calls that it makes itself.

    Raises:
        ValueError, TypeError: a cap is not a finite number from 0 on, there is none, or
            ``on_exceeded`` cannot be called.
    """

    def __init__(
        self,
        *,
        usd: float | None = None,
        tokens: float | None = None,
        requests: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        on_exceeded: OnExceeded | None = None,
    ) -> None:
        super().__init__(budgets=(self,))
        caps = {"usd": usd, "tokens": tokens, "requests": requests}
        caps |= {"input_tokens": input_tokens, "output_tokens": output_tokens}
        self._caps = {name: rounded_up(cap, name) for name, cap in caps.items() if cap is not None}
        if not self._caps:
            raise ValueError(
                "a budget needs a cap: give e.g. usd=2.00, tokens=100_000 or requests=50"
            )
        if on_exceeded is not None and not callable(on_exceeded):
            raise TypeError(f"on_exceeded must be a function of the error, not {on_exceeded!r}")
        self._on_exceeded = on_exceeded
        #: How many units of each resource count where.
        self._sums = Counter({("left", name): cap for name, cap in self._caps.items()})
        #: What leases report: where something counts, how much did, and how much does now.
        self._changes: deque[tuple[_Side, Amounts, Amounts]] = deque()
        #: One question at a time, on each event loop.
        self._turns: weakref.WeakKeyDictionary[Any, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._lock = Lock()

    @property
    def cap(self) -> Mapping[str, float]:
        """The caps as they were given: dollars, or units of each resource."""
        return {name: in_given_unit(cap, name) for name, cap in self._caps.items()}

    @property
    def spent(self) -> Mapping[str, float]:
        """What calls that have ended cost."""
        return self._read("spent")

    @property
    def reserved(self) -> Mapping[str, float]:
        """What calls in flight may cost at most."""
        return self._read("reserved")

    @property
    def left(self) -> Mapping[str, float]:
        """What is neither spent nor reserved; negative if calls used more than they reserved."""
        return self._read("left")

    def _read(self, side: _Side) -> Mapping[str, float]:
        with self._lock:
            self._catch_up_locked()
            return {name: in_given_unit(self._sums[side, name], name) for name in self._caps}

    def __repr__(self) -> str:
        spent = self.spent
        caps = (f"{counted(cap, name)} ({spent[name]:,} spent)" for name, cap in self._caps.items())
        return f"<Budget of {', '.join(caps)}>"

    # --- what leases ask ---

    def look(self, amounts: Amounts, *, reserve: bool) -> BudgetExceeded | None:
        """Return why a call can't pass; if it can, ``reserve`` what it may cost.

        Without ``reserve``, a call passes if it could, should all calls in flight cost nothing.
        """
        with self._lock:
            self._catch_up_locked()
            for name in self._caps:
                cost, left = amounts.get(name, 0), self._sums["left", name]
                if cost and cost > left + (0 if reserve else self._sums["reserved", name]):
                    return self._error_locked(name, cost)
            if reserve:
                self.change("reserved", _NOTHING, amounts)
            return None

    def change(self, side: _Side, before: Amounts, after: Amounts) -> None:
        """Count ``after`` for a call, instead of what was counted ``before``."""
        self._changes.append((side, before, after))

    async def is_raised(self, error: BudgetExceeded, *, blocking: bool) -> bool:
        """Ask whether the cap may be raised, for one call at a time; return whether it was.

        Nobody is asked about calls that are made in order to answer.

        Raises:
            TypeError: ``on_exceeded`` returned no number, or is async and the caller blocks.
        """
        if self._on_exceeded is None or self in _asking.get():
            return False
        turn: Any = contextlib.nullcontext()
        if not blocking:
            turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with turn:
            if error.cap != self.cap[error.resource]:
                return True  # it was raised for another call meanwhile
            token = _asking.set((*_asking.get(), self))
            try:
                answer: Any = self._on_exceeded(error)
                if blocking and inspect.iscoroutine(answer):
                    answer.close()
                    raise TypeError(
                        "a blocking call can't await on_exceeded: give a plain function"
                    )
                answer = await answer if inspect.isawaitable(answer) else answer
            finally:
                _asking.reset(token)
            return answer not in (None, False) and self._raise_cap(error, answer)

    def _raise_cap(self, error: BudgetExceeded, answer: float) -> bool:
        if not is_number(answer):
            raise TypeError(
                f"on_exceeded must return the new cap, such as 5.0, or None, not {answer!r}"
            )
        name = error.resource
        with self._lock:
            more = max(0, rounded_up(answer, name) - self._caps[name])
            self._caps[name] += more
            self._sums["left", name] += more
        return self.cap[name] > error.cap

    # --- with the lock held ---

    def _error_locked(self, name: str, cost: int) -> BudgetExceeded:
        cap, left = self._caps[name], max(0, self._sums["left", name])
        reserved, spent = self._sums["reserved", name], self._sums["spent", name]
        in_flight = f", {counted(reserved, name)} reserved by calls in flight" if reserved else ""
        return BudgetExceeded(
            f"this call may cost {counted(cost, name)}, but the budget of {counted(cap, name)} has "
            f"only {counted(left, name)} left ({counted(spent, name)} spent{in_flight}); {_REMEDY}",
            budget=self,
            resource=name,
            cap=in_given_unit(cap, name),
            spent=in_given_unit(spent, name),
            reserved=in_given_unit(reserved, name),
            cost=in_given_unit(cost, name),
        )

    def _catch_up_locked(self) -> None:
        """Add up what leases have reported."""
        while self._changes:
            side, before, after = self._changes.popleft()
            for name in self._caps:
                change = after.get(name, 0) - before.get(name, 0)
                self._sums[side, name] += change
                self._sums["left", name] -= change


#: What people write: ``with asyncbucket.budget(usd=2.00):``.
budget = Budget


class BudgetLease(Lease):
    """Ask for an admission that budgets pay for, too."""

    _budgets: tuple[Budget, ...] = ()
    #: What the budgets count for this call.
    _held = _NOTHING

    def _try_now(self) -> bool:
        if self._state != ASKED:
            return super()._try_now()  # which refuses
        if self._look(reserve=True) is not None:
            return False  # `_wait` asks, or refuses
        passed = False
        try:
            passed = super()._try_now()
        finally:
            if not passed:
                self._hold(_NOTHING)
        return passed

    def _refuse(self) -> None:
        error = self._look(reserve=True)
        if error is not None:
            count_refusal(self._node, self._amounts, error)
            raise error
        self._hold(_NOTHING)
        super()._refuse()

    async def _wait(self, seat: ThreadSeat | None = None) -> None:
        """Wait in turn, unless a budget can't pay in any case; then reserve."""
        self._state, blocking = WAITING, seat is not None
        try:
            await self._ask(reserve=False, blocking=blocking)
            await super()._wait(seat)
            await self._ask(reserve=True, blocking=blocking)
        except BaseException as error:
            if self._state == HELD:
                self._undo()  # perhaps later: another thread may hold the lock
            else:
                self._state = OVER
            if isinstance(error, BudgetExceeded):
                count_refusal(self._node, self._amounts, error)
            raise

    async def _ask(self, *, reserve: bool, blocking: bool, more: Amounts | None = None) -> None:
        """Have caps raised until no budget is exceeded.

        Raises:
            BudgetExceeded: one is, and was not raised.
        """
        while (error := self._look(reserve=reserve, more=more)) is not None:
            asked: Budget = error.budget
            if not await asked.is_raised(error, blocking=blocking):
                raise error

    def _look(self, *, reserve: bool, more: Amounts | None = None) -> BudgetExceeded | None:
        """Reserve at all budgets or at none; return the error of one that refuses.

        What is reserved is ``more`` than before, or else what the call may cost.
        """
        amounts = self._used_tokens(self._amounts) if more is None else more
        for number, each in enumerate(self._budgets):
            error = each.look(amounts, reserve=reserve)
            if error is not None:
                for earlier in self._budgets[:number] if reserve else ():
                    earlier.change("reserved", amounts, _NOTHING)
                return error
        if reserve:
            held = self._held
            self._held = {**held, **{name: held.get(name, 0) + amounts[name] for name in amounts}}
        return None

    def _hold(self, amounts: Amounts, *, side: _Side = "reserved") -> None:
        """Have the budgets count ``amounts`` instead of what they do."""
        for each in self._budgets:
            each.change(side, self._held, amounts)
        self._held = amounts

    def _used_tokens(self, booked: Amounts) -> Amounts:
        """Return what is ``booked`` with the tokens that are used: limits may count them otherwise.

        OpenAI's count the larger of prompt and reply, Gemini's the prompt alone.
        """
        tokens, *parts = (booked.get(name, 0) for name in ("tokens", *PARTS_OF_TOKENS))
        settled = self._parts or _NOTHING
        is_split = settled.keys() >= set(PARTS_OF_TOKENS)
        if not (is_split or "tokens" in settled):
            is_split = parts != [tokens, tokens]  # else only their sum is known
        return {**booked, "tokens": sum(parts)} if is_split else booked

    def _settle_locked(self, used: dict[str, int]) -> None:
        super()._settle_locked(used)
        if self._held:
            side: _Side = "spent" if self._state == OVER else "reserved"
            self._hold(self._used_tokens(self._booked()), side=side)

    def release(self) -> None:
        """Give the slot back; the cost stays counted, as reserved or as settled."""
        self._end("ok")

    def _end_locked(self, outcome: Outcome) -> None:
        was_over = self._state == OVER
        super()._end_locked(outcome)
        if self._held and self._state == OVER and not was_over:
            for each in self._budgets:
                each.change("reserved", self._held, _NOTHING)
                each.change("spent", _NOTHING, self._held)


@functools.cache
def _paying(kind: type[Lease]) -> type[Lease]:
    """Return the class of leases of a ``kind`` that budgets pay for: an agent's, a pool's..."""
    return type(f"Budget{kind.__name__}", (BudgetLease, kind), {})


def pay_from(budgets: tuple[Budget, ...], lease: Lease) -> None:
    """Have ``budgets``, outermost first, pay for the call of a new ``lease``."""
    lease.__class__ = _paying(type(lease))
    assert isinstance(lease, BudgetLease)
    lease._budgets = budgets  # noqa: SLF001 - just made
