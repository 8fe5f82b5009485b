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
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any, Final, Literal, Never, TypeAlias

from asyncbucket.engine.context import InheritedScope
from asyncbucket.engine.cost import rounded_up
from asyncbucket.engine.dispatchers import Lock, OfThisProcess
from asyncbucket.engine.errors import AsyncBucketError, BudgetExceeded
from asyncbucket.engine.events import Outcome
from asyncbucket.engine.interfaces import Account, Admission
from asyncbucket.engine.lease import PARTS_OF_TOKENS
from asyncbucket.engine.meters import Amounts
from asyncbucket.engine.node import Node
from asyncbucket.engine.wording import counted, in_given_unit, is_number, warn_user

# An account is told more than it needs.
# ruff: noqa: ARG002

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

    It counts the calls that pass a limiter: those of wrapped models and tools, of paced clients and
    functions, and what you acquire. What nothing paces, it does not see; a block that counts
    nothing warns once. It holds for async and blocking calls, in every task started inside and in `asyncio.to_thread`,
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
            be async. The call holds nothing meanwhile, and its ``timeout`` does not count. Not
            called for ``acquire_nowait``, nor for calls that it makes itself.

    Raises:
        ValueError, TypeError: a cap is not a finite number from 0 on, there is none, or
            ``on_exceeded`` cannot be called.
    """

    def __init__(
        self,
        *amounts: Never,
        usd: float | None = None,
        tokens: float | None = None,
        requests: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        on_exceeded: OnExceeded | None = None,
        **others: Never,
    ) -> None:
        if amounts or others:
            given = [*map(repr, amounts), *(f"{name}=" for name in others)]
            raise TypeError(
                f"a budget caps usd=, tokens=, requests=, input_tokens= or output_tokens=, not "
                f"{', '.join(given)}: write e.g. budget(usd=2.00)"
            )
        super().__init__(payers=(self,))
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
        self._calls = 0
        #: The resources of which some call said what it costs.
        self._named: set[str] = set()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        with self._lock:
            self._catch_up_locked()
            unnamed = [name for name in self._caps if name not in self._named]
        if unnamed and error[0] is None:
            _warn_of_no_call() if not self._calls else _warn_of_unnamed_cost(unnamed[0])

    @property
    def cap(self) -> Mapping[str, float]:
        """The caps as they were given: dollars, or units of each resource."""
        return {name: in_given_unit(cap, name) for name, cap in self._caps.items()}

    @property
    def calls(self) -> int:
        """How many calls inside asked a limiter."""
        return self._calls

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

    def account(self, node: Node, amounts: Amounts) -> "Charge":
        """Return what counts a new call."""
        with self._lock:
            self._calls += 1
            self._named.update(name for name in self._caps if name in amounts)
        return Charge(self)

    def cannot_price(self) -> None:
        """Count a call that was refused because nobody knows its price."""
        with self._lock:
            self._calls += 1
            self._named.update(self._caps)

    # --- what accounts ask ---

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
                if name in after:
                    self._named.add(name)


#: What people write: ``with asyncbucket.budget(usd=2.00):``.
budget = Budget


class Charge(Account):
    """What one call costs a budget: reserved when it passes, spent when it ends."""

    __slots__ = ("_has_passed", "_held", "budget")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._has_passed = False
        #: What the budget counts for the call.
        self._held = _NOTHING

    def refuses(self, amounts: Amounts) -> BudgetExceeded | None:
        """Reserve what the call may cost; before it has passed, only look whether that may ever do."""
        return None if self._held else self.reserve(_used_tokens(amounts, {}))

    def reserve(self, amounts: Amounts) -> BudgetExceeded | None:
        """Reserve ``amounts`` more; return the error if the budget refuses."""
        error = self.budget.look(amounts, reserve=self._has_passed)
        if error is None and self._has_passed:
            held = self._held
            self._held = {**held, **{name: held.get(name, 0) + amounts[name] for name in amounts}}
        return error

    def give_back(self, amounts: Amounts) -> None:
        """Reserve ``amounts`` no longer."""
        held = self._held
        self._held = {name: held[name] - amounts.get(name, 0) for name in held}
        self.budget.change("reserved", held, self._held)

    async def reconsiders(self, error: AsyncBucketError, *, blocking: bool) -> bool:
        assert isinstance(error, BudgetExceeded)
        return await self.budget.is_raised(error, blocking=blocking)

    def passed(self, lease: Admission, now: int) -> None:
        self._has_passed = True

    def settled(self, lease: Admission, before: Amounts, after: Amounts) -> None:
        if self._held:
            held, self._held = self._held, _used_tokens(after, lease.reported)
            self.budget.change("spent" if lease.released else "reserved", held, self._held)

    def ended(self, lease: Admission, outcome: Outcome) -> None:
        self.budget.change("reserved", self._held, _NOTHING)
        self.budget.change("spent", _NOTHING, self._held)
        self._has_passed = False


def _used_tokens(booked: Amounts, settled: Collection[str]) -> Amounts:
    """Return what is ``booked`` with the tokens that are used: limits may count them otherwise.

    OpenAI's count the larger of prompt and reply, Gemini's the prompt alone.
    """
    tokens, *parts = (booked.get(name, 0) for name in ("tokens", *PARTS_OF_TOKENS))
    is_split = all(name in settled for name in PARTS_OF_TOKENS)
    if not (is_split or "tokens" in settled):
        is_split = parts != [tokens, tokens]  # else only their sum is known
    return {**booked, "tokens": sum(parts)} if is_split else booked


@functools.cache
def _warn_of_no_call() -> None:
    """Warn, once, at the line behind a budget's block."""
    warn_user(
        "a budget has ended without counting a call: it counts calls that pass a limiter, so pace "
        "what makes them, by limiter.wrap(model) or http_client=limiter.http_client()",
        RuntimeWarning,
    )


@functools.cache
def _warn_of_unnamed_cost(resource: str) -> None:
    """Warn, once, that calls passed and the budget could not count what they cost."""
    warn_user(
        f"a budget of {resource} has ended, but no call named any: say what each call costs, as in "
        f"acquire({resource}=...) or paced(..., {resource}=...)",
        RuntimeWarning,
    )
