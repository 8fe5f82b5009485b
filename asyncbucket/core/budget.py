"""Budgets: what everything in a ``with`` block may spend together.

A limit is so much per window, and calls wait for it. A budget is so much in all, and nobody waits
for it: the call that would pass it is refused with `BudgetExceeded`, before it is sent.

>>> with asyncbucket.budget(usd=2.00) as budget:
...     answer = await agent.run("...")
>>> budget.spent
{'usd': 0.0412}

When is a call charged? Not before it is admitted: a hundred calls in line hold nothing of the
budget, or most would be refused because of others that have not even begun. From its admission on
it holds what it may cost at most; when it ends, it has spent what it used. A call that the budget
can't pay for even if all calls in flight turn out to cost nothing is refused before it waits.

So a budget that calls reserve truly, by ``max_tokens``, is never passed. A call that used more than
it reserved overdraws it, and the next one is refused.

Leases report to their budgets without waiting for a lock, because the garbage collector may end one
anywhere: a change goes into a queue, and whoever next looks at the numbers takes it in.
"""

import asyncio
import functools
import inspect
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Self, TypeAlias

from asyncbucket.core.admission import count_refusal
from asyncbucket.core.context import InheritedScope
from asyncbucket.core.cost import rounded_up
from asyncbucket.core.errors import BudgetExceeded
from asyncbucket.core.events import Outcome
from asyncbucket.core.lease import ASKED, HELD, LENT, OVER, Lease
from asyncbucket.core.meters import Amounts
from asyncbucket.core.process import reset_after_fork
from asyncbucket.core.seats import ThreadSeat
from asyncbucket.core.wording import counted, in_given_unit, is_number

#: What is asked before a call is refused: it returns the new cap, or None.
OnExceeded: TypeAlias = Callable[[BudgetExceeded], float | Awaitable[float | None] | None]

_REMEDY: Final = (
    "finish with what you have, make a cheaper call, or have whoever set the budget raise it"
)


class Budget:
    """Cap what the calls in a ``with`` block may spend; made by `budget`."""

    def __init__(self, caps: Mapping[str, int], on_exceeded: OnExceeded | None) -> None:
        self._caps = dict(caps)
        #: By calls that have ended, and by calls in flight.
        self._spent = dict.fromkeys(caps, 0)
        self._reserved = dict.fromkeys(caps, 0)
        #: What leases report: amounts, and the sums to which they are added.
        self._changes: deque[tuple[Amounts, dict[str, int]]] = deque()
        self._on_exceeded = on_exceeded
        #: One question at a time, on each event loop.
        self._turns: weakref.WeakKeyDictionary[Any, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._scope = InheritedScope(budgets=(self,))
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Replace the lock, which the parent may have held."""
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._scope.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._scope.__exit__(*error)

    @property
    def cap(self) -> Mapping[str, float]:
        """What may be spent of each resource, as it was given: in dollars, or in units."""
        return self._as_given(self._caps)

    @property
    def spent(self) -> Mapping[str, float]:
        """What calls have cost that are over."""
        self._catch_up()
        return self._as_given(self._spent)

    @property
    def reserved(self) -> Mapping[str, float]:
        """What calls in flight may cost at most."""
        self._catch_up()
        return self._as_given(self._reserved)

    @property
    def left(self) -> Mapping[str, float]:
        """What is neither spent nor reserved; negative if calls used more than they reserved."""
        self._catch_up()
        left = {
            name: cap - self._spent[name] - self._reserved[name] for name, cap in self._caps.items()
        }
        return self._as_given(left)

    def __repr__(self) -> str:
        self._catch_up()
        caps = ", ".join(counted(cap, name) for name, cap in self._caps.items())
        spent = ", ".join(counted(spent, name) for name, spent in self._spent.items())
        return f"<Budget of {caps}, {spent} spent>"

    def _as_given(self, amounts: Amounts) -> Mapping[str, float]:
        return {name: in_given_unit(amount, name) for name, amount in amounts.items()}

    # --- what leases ask ---

    def reserve(self, amounts: Amounts) -> BudgetExceeded | None:
        """Reserve what a call may cost, or return why it can't."""
        with self._lock:
            self._catch_up_locked()
            error = self._check_locked(amounts, self._reserved)
            if error is None:
                self._add(amounts, self._reserved)
            return error

    def check(self, amounts: Amounts) -> BudgetExceeded | None:
        """Return why a call can't pass even if all calls in flight turn out to cost nothing."""
        with self._lock:
            self._catch_up_locked()
            return self._check_locked(amounts, {})

    def give_back(self, amounts: Amounts) -> None:
        """Give back what was reserved for a call that was not admitted."""
        self._changes.append((_negative(amounts), self._reserved))

    def settle(self, change: Amounts, *, in_flight: bool) -> None:
        """Correct what a call has reserved or, once it is over, spent."""
        self._changes.append((change, self._reserved if in_flight else self._spent))

    def end(self, amounts: Amounts) -> None:
        """Count what a call has cost that is over."""
        self._changes.append((_negative(amounts), self._reserved))
        self._changes.append((amounts, self._spent))

    async def has_raised(self, error: BudgetExceeded, *, blocking: bool) -> bool:
        """Ask whether the cap may be raised, for one call at a time; return whether it was.

        Raises:
            TypeError: ``on_exceeded`` returned no number, or is async and the caller blocks.
        """
        if self._on_exceeded is None:
            return False
        if blocking:
            answer = self._on_exceeded(error)
            if inspect.isawaitable(answer):
                getattr(answer, "close", bool)()
                raise TypeError("a blocking call can't await on_exceeded: give a plain function")
            return self._raise_cap(error.resource, answer)
        turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with turn:
            if error.cap != self.cap[error.resource]:
                return True  # it was raised for another call meanwhile
            answer = self._on_exceeded(error)
            if inspect.isawaitable(answer):
                answer = await answer
            return self._raise_cap(error.resource, answer)

    def _raise_cap(self, resource: str, answer: object) -> bool:
        if answer is None or answer is False:
            return False
        if not is_number(answer):
            raise TypeError(
                f"on_exceeded must return the new cap, such as 5.0, or None, not {answer!r}"
            )
        cap = rounded_up(answer, resource)
        with self._lock:
            before, self._caps[resource] = self._caps[resource], max(self._caps[resource], cap)
        return cap > before

    # --- with the lock held ---

    def _check_locked(self, amounts: Amounts, reserved: Amounts) -> BudgetExceeded | None:
        for name, cap in self._caps.items():
            cost = amounts.get(name, 0)
            if cost and self._spent[name] + reserved.get(name, 0) + cost > cap:
                return self._error_locked(name, cost)
        return None

    def _error_locked(self, name: str, cost: int) -> BudgetExceeded:
        cap, spent, reserved = self._caps[name], self._spent[name], self._reserved[name]
        left = max(0, cap - spent - reserved)
        in_flight = f", {counted(reserved, name)} reserved by calls in flight" if reserved else ""
        return BudgetExceeded(
            f"this call may cost {counted(cost, name)}, and {counted(left, name)} "
            f"{'is' if left == 1 else 'are'} left of the budget of {counted(cap, name)} "
            f"({counted(spent, name)} spent{in_flight}); {_REMEDY}",
            budget=self,
            resource=name,
            cap=in_given_unit(cap, name),
            spent=in_given_unit(spent, name),
            reserved=in_given_unit(reserved, name),
            cost=in_given_unit(cost, name),
        )

    def _catch_up(self) -> None:
        with self._lock:
            self._catch_up_locked()

    def _catch_up_locked(self) -> None:
        while self._changes:
            self._add(*self._changes.popleft())

    def _add(self, amounts: Amounts, sums: dict[str, int]) -> None:
        for name in self._caps:
            sums[name] += amounts.get(name, 0)


def budget(
    *,
    usd: float | None = None,
    tokens: float | None = None,
    requests: float | None = None,
    input_tokens: float | None = None,
    output_tokens: float | None = None,
    on_exceeded: OnExceeded | None = None,
) -> Budget:
    """Cap what all calls inside may spend together, across limiters, models, tools and sub-agents.

    >>> with asyncbucket.budget(usd=2.00, requests=100) as budget:
    ...     answer = await agent.run("...")
    >>> budget.spent, budget.left

    It holds in every task that is started inside, for async and for blocking calls. Budgets nest:
    each of them holds. A call reserves what it may cost at its admission, and is refused if that is
    more than is left. So with ``max_tokens`` set, the cap is never passed. Without it, a call may
    use more than was expected; then what follows is refused.

    Args:
        usd: US dollars. Wrapped models, transports and commands know what their calls cost (see
            `asyncbucket.prices`); for a plain ``acquire``, say it: ``acquire(usd=0.002)``.
        tokens: LLM tokens, input and output together.
        requests: calls, retries included.
        input_tokens: LLM tokens sent.
        output_tokens: LLM tokens received.
        on_exceeded: called before a call is refused, for one call at a time, with the error. It
            returns a new cap for the error's ``resource``, or None to leave it; it may be async. A
            call that is asked about may hold its slot.

    Raises:
        ValueError, TypeError: a cap is not a finite number from 0 on, there is none, or
            ``on_exceeded`` cannot be called.
    """
    given = {
        "usd": usd,
        "tokens": tokens,
        "requests": requests,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
    }
    caps = {name: rounded_up(cap, name) for name, cap in given.items() if cap is not None}
    if not caps:
        raise ValueError("a budget needs a cap: give e.g. usd=2.00, tokens=100_000 or requests=50")
    if on_exceeded is not None and not callable(on_exceeded):
        raise TypeError(f"on_exceeded must be a function of the error, not {on_exceeded!r}")
    return Budget(caps, on_exceeded)


class BudgetLease(Lease):
    """Ask for an admission that budgets pay for, too."""

    _budgets: tuple[Budget, ...] = ()
    _is_reserved = False

    def _try_now(self) -> bool:
        if self._state == ASKED and self._reserve() is not None:
            return False  # `_wait` asks, or refuses
        passed = False
        try:
            passed = super()._try_now()
        finally:
            if not passed and self._is_reserved:
                self._give_back()
        return passed

    def _refuse(self) -> None:
        error = self._reserve()
        if error is not None:
            self._state = OVER
            count_refusal(self._node, self._amounts, error)
            raise error
        self._give_back()
        super()._refuse()

    async def _wait(self, seat: ThreadSeat | None = None) -> None:
        """Wait in turn, unless a budget can't pay in any case; then reserve."""
        try:
            await self._ask(self._check, blocking=seat is not None)
        except BaseException as error:
            self._state = OVER
            if isinstance(error, BudgetExceeded):
                count_refusal(self._node, self._amounts, error)
            raise
        await super()._wait(seat)
        try:
            await self._ask(self._reserve, blocking=seat is not None)
        except BaseException as error:
            self._undo()
            if isinstance(error, BudgetExceeded):
                count_refusal(self._node, self._amounts, error)
            raise

    async def _ask(self, look: Callable[[], BudgetExceeded | None], *, blocking: bool) -> None:
        """Have caps raised until ``look`` finds no budget exceeded.

        Raises:
            BudgetExceeded: one is exceeded, and was not raised.
        """
        while (error := look()) is not None:
            asked: Budget = error.budget
            if not await asked.has_raised(error, blocking=blocking):
                raise error

    def _check(self) -> BudgetExceeded | None:
        errors = (each.check(self._amounts) for each in self._budgets)
        return next((error for error in errors if error is not None), None)

    def _reserve(self) -> BudgetExceeded | None:
        """Reserve at all budgets, or at none, and return the error of the one that refused."""
        for number, each in enumerate(self._budgets):
            error = each.reserve(self._amounts)
            if error is not None:
                for earlier in self._budgets[:number]:
                    earlier.give_back(self._amounts)
                return error
        self._is_reserved = True
        return None

    def _give_back(self) -> None:
        self._is_reserved = False
        for each in self._budgets:
            each.give_back(self._amounts)

    def _settle_locked(self, used: dict[str, int]) -> None:
        before = self._booked()
        super()._settle_locked(used)
        after = self._booked()
        if self._is_reserved:
            change = {name: amount - before.get(name, 0) for name, amount in after.items()}
            for each in self._budgets:
                each.settle(change, in_flight=self._state != OVER)

    def release(self) -> None:
        """Give the slot back; the cost stays counted, as reserved or as settled."""
        self._end("ok")

    def _end_locked(self, outcome: Outcome) -> None:
        ends = self._state in (HELD, LENT) and self._seat.look is not None
        super()._end_locked(outcome)
        if ends and self._is_reserved:
            for each in self._budgets:
                each.end(self._booked())


@functools.cache
def _paying(kind: type[Lease]) -> type[Lease]:
    """Return the class of leases of a ``kind`` that budgets pay for: an agent's, a pool's..."""
    return type(f"Budget{kind.__name__}", (BudgetLease, kind), {})


def pay_from(budgets: tuple[Budget, ...], lease: Lease) -> None:
    """Have ``budgets``, outermost first, pay for the call of a new ``lease``."""
    lease.__class__ = _paying(type(lease))
    assert isinstance(lease, BudgetLease)
    lease._budgets = budgets  # noqa: SLF001 - just made


def _negative(amounts: Amounts) -> Amounts:
    return {name: -amount for name, amount in amounts.items()}
