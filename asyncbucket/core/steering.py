"""How a limiter is changed and observed while it runs: pauses, other limits, statistics."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

from asyncbucket.core.account import Account
from asyncbucket.core.context import nanoseconds, span_of
from asyncbucket.core.events import Callback, Event, Paused
from asyncbucket.core.limits import Limit, read_limits
from asyncbucket.core.meters import NEVER
from asyncbucket.core.statistics import Statistics, Waits
from asyncbucket.core.terms import read_count, read_weight
from asyncbucket.feedback.adaptive import Concurrency


class Steering(ABC):
    """Steer and observe the account of a `Limiter`, which inherits all of these methods."""

    __slots__ = ()

    @property
    @abstractmethod
    def _account(self) -> Account: ...

    @property
    def _lifecycle_lock(self) -> AbstractContextManager[object]:
        """Keep tenants from being put to rest, which takes the same lock."""
        return self._account.budget.lifecycle_lock

    def pause(self, seconds: float, *, reason: str = "", gradually: bool = False) -> None:
        """Admit nobody for ``seconds`` from now; an earlier pause that ends later stays in force.

        Args:
            seconds: how long.
            reason: why, for people; ``"429"`` counts as a refusal by the provider.
            gradually: start slowly after the pause, so that its end causes no storm: one call at
                first, then twice as many in each step of a 16th of the pause (at most 0.25 s), up
                to 256.

        Raises:
            ValueError: ``seconds`` is not a finite number from 0 on.
            TypeError: ``reason`` is not a string.
        """
        if not isinstance(reason, str):
            raise TypeError(f'reason must be a string, such as "429", not {reason!r}')
        span = span_of(seconds, "a pause", "it counts from now")
        if span >= NEVER:
            raise ValueError("a pause must end: give a finite number of seconds")
        with self._lifecycle_lock, (account := self._account).budget.lock:
            until = account.budget.clock() + span
            for level in account.path:
                level.upstream_429 += reason == "429"
            account.pause_locked(until, gradually=gradually)
        account.notify(Paused, seconds=float(seconds), reason=reason)

    def observe_remaining(
        self,
        remaining: int,
        *,
        resource: str,
        per: float,
        limit: int | None = None,
        since: float | None = None,
        rounding: int = 0,
    ) -> None:
        """Take in what the provider says is left of a limit that others spend from, too.

        It may lower what is available, but never raise it above this limiter's limits. It is
        forgotten if nothing more is heard for a whole window. It is ignored if this limiter does
        not limit that window, or if a store keeps the limits. Transports call this;
        `asyncbucket.feedback.headroom` explains what happens then.

        Args:
            remaining: units left.
            resource: what the units count, such as ``"tokens"``.
            per: the window of the limit, in seconds.
            limit: the provider's own limit, if it says.
            since: when the call with this answer was sent, in seconds of the limiter's clock; calls
                sent later may or may not be counted in ``remaining`` yet.
            rounding: by how many units ``remaining`` may have been rounded down.

        Raises:
            ValueError: a number of units is not a whole number from 0 on, or ``since`` not a number.
        """
        remaining, rounding = read_count(remaining, "remaining"), read_count(rounding, "rounding")
        limit = None if limit is None else read_count(limit, "limit")
        with self._lifecycle_lock, (account := self._account).budget.lock:
            sent = account.budget.clock() if since is None else nanoseconds(since, "since")
            account.observe_remaining_locked(
                (resource, per), remaining, limit=limit, since=sent, rounding=rounding
            )

    def learn(self, limit: Limit) -> None:
        """Adopt a limit that the provider announces, if this limiter was given none.

        A learned limit follows later announcements; given limits stay as they are.

        Raises:
            TypeError: it is not a `Limit`.
            ValueError: the store that keeps the limits cannot count that far.
        """
        if not isinstance(limit, Limit):
            raise TypeError(f'learn() takes a Limit, such as Limit("requests", 500), not {limit!r}')
        with self._lifecycle_lock:
            account = self._account
            account.learn(limit)
        account.flush()

    def reconfigure(
        self,
        *limits: str | Limit,
        concurrency: Concurrency | None = None,
        weight: float | None = None,
        **limits_by_keyword: float | None,
    ) -> None:
        """Change the named limits at once, while calls wait; the others stay.

        ``concurrency`` may also change between a fixed number and ``"auto"``; ``weight`` applies to
        a child. What was admitted stays counted, and calls in flight hold slots that are added (not
        those of a store), so a lower limit is kept from the first moment. Waiting calls that can
        never pass under the new limits fail with `CostExceedsLimit`.

        Raises:
            LimitSyntaxError, ValueError: as for `Limiter` and `child`.
        """
        given = read_limits(limits, limits_by_keyword)
        new_weight = None if weight is None else read_weight(weight)
        with self._lifecycle_lock:
            account = self._account
            account.reconfigure(given, concurrency, weight=new_weight)
        account.flush()

    def observe(self, callback: Callback) -> Callable[[], None]:
        """Call ``callback`` with each event here and below; the returned function ends that.

        See `asyncbucket.core.events` for the events. The callback runs synchronously, in the thread
        where the event happens. The first exception it raises is logged, and none does harm. While
        nobody observes, no events are made.

        Raises:
            TypeError: ``callback`` cannot be called, or is a coroutine function.
        """
        with self._lifecycle_lock:
            return self._account.observe(callback)

    def emit(self, event: Event) -> None:
        """Send an adapter's event to the observers."""
        self._account.emit(event)

    async def aclose(self) -> None:
        """Leave the store, if one keeps the limits: what is booked ahead is given back.

        Without a store it does nothing. Call it on the event loop that used the limiter. If only
        calls without a loop used it, any loop will do, once none of them waits.
        """
        if self._account.remote is not None:
            await self._account.remote.aclose()

    def now(self) -> float:
        """Return the current time in seconds of the limiter's clock, as used by deadlines."""
        return self._account.budget.clock() * 1e-9

    @property
    def name(self) -> str:
        """The name in statistics, events, logs and metrics: ``"openai"``, ``"openai/chat"``."""
        return self._account.name

    @property
    def max_queue(self) -> int | None:
        """The most calls that may wait."""
        return self._account.max_queue

    @property
    def limits(self) -> tuple[Limit, ...]:
        """This limiter's own limits in force; those of the limiters above apply as well."""
        return tuple(kept.limit for kept in self._account.limits.values())

    @property
    def concurrency(self) -> int | None:
        """The most calls in flight at once, as it is now; None if unbounded."""
        slots = self._account.slots
        return None if slots is None else slots.size

    def statistics(self) -> Statistics:
        """Return a frozen snapshot: what passed, what waits, and what for; children included."""
        account = self._account
        budget = account.budget
        account.flush()
        with budget.lock:
            budget.run_postponed_locked()
            pause = 0 if account.pause is None else account.pause.until - budget.clock()
            return Statistics(
                name=account.name,
                admitted=account.admitted,
                refused=account.refused,
                cancelled=account.cancelled,
                waiting=account.waiting,
                in_flight=account.in_flight,
                concurrency=None if account.slots is None else account.slots.size,
                paused=max(0, pause) * 1e-9,
                upstream_429=account.upstream_429,
                overridden=budget.blocked.overridden,
                waits={name: Waits(n, ns * 1e-9) for name, (n, ns) in account.waits.items()},
                refunded=dict(account.refunded),
                limits=tuple(account.use_locked()),
                bound_by=account.binding_locked(),
            )

    def _repr_html_(self) -> str:
        return self.statistics()._repr_html_()

    def __repr__(self) -> str:
        account = self._account
        parts = [f"Limiter {self.name!r}", *map(str, self.limits)]
        if account.slots is not None:
            adaptive = account.adaptive
            found = "" if adaptive is None else f" of {adaptive.least:,} to {adaptive.most:,}"
            used = account.slots.used if account.remote is None else account.in_flight
            parts.append(f"concurrency {used}/{account.slots.size}{found}")
        return f"<{', '.join(parts)}, {account.waiting:,} waiting>"
