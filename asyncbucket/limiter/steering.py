"""What is done to a limiter while it runs, and what it shows: pauses, other limits, statistics."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

from asyncbucket.context import nanoseconds, span_of
from asyncbucket.events import Callback, Event, Paused
from asyncbucket.feedback.adaptive import Concurrency
from asyncbucket.limiter.account import Account
from asyncbucket.limiter.statistics import Statistics, Waits
from asyncbucket.limiter.terms import read_count, read_weight
from asyncbucket.limits import Limit, read_limits
from asyncbucket.meters import NEVER


class Steering(ABC):
    """Steer and watch the account of a `Limiter`, which inherits all of this."""

    __slots__ = ()

    @property
    @abstractmethod
    def _account(self) -> Account: ...

    @property
    def _awake(self) -> AbstractContextManager[object]:
        """Keep tenants from being put to rest, which takes the same lock."""
        return self._account.budget.making

    def pause(self, seconds: float, *, reason: str = "", gradually: bool = False) -> None:
        """Admit nobody for ``seconds`` from now; an earlier, longer pause stays in force.

        Args:
            seconds: how long.
            reason: why, for people; ``"429"`` counts as a refusal by the provider.
            gradually: begin again slowly, so that the end of the pause is no storm: one call at
                first, then twice as many in each 16th of the pause (at most 0.25 s), up to 256.

        Raises:
            ValueError: ``seconds`` is not a finite number from 0 on.
        """
        span = span_of(seconds, "a pause", "it counts from now")
        if span >= NEVER:
            raise ValueError("a pause must end: give a finite number of seconds")
        with self._awake, (account := self._account).budget.lock:
            until = account.budget.clock() + span
            for each in account.path:
                each.upstream_429 += reason == "429"
            account.pause_locked(until, gradually=gradually)
        account.tell(Paused, seconds=float(seconds), reason=reason)

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
        """Hear from the provider what is left of a limit that others spend from, too.

        It may lower what is available, never raise it above the limits of this limiter, and is
        forgotten when nothing is heard for a whole window. Of a window that is not limited here
        nothing is kept, nor where a store keeps the limits. Transports call this; see
        `asyncbucket.feedback.headroom` for what comes of it.

        Args:
            remaining: units left.
            resource: what they are units of.
            per: the window of the limit, in seconds.
            limit: the limit as the provider has it, if it says so.
            since: when the call was sent that was answered so, in seconds of the limiter's clock:
                later calls may or may not be in ``remaining`` yet.
            rounding: by how many units ``remaining`` may have been rounded down.

        Raises:
            ValueError: a number of units is not a whole number from 0 on, or ``since`` not a number.
        """
        read_count(remaining, "remaining")
        read_count(rounding, "rounding")
        if limit is not None:
            read_count(limit, "limit")
        with self._awake, (account := self._account).budget.lock:
            sent = account.budget.clock() if since is None else nanoseconds(since, "since")
            account.hear_remaining_locked(
                (resource, per), remaining, limit=limit, since=sent, rounding=rounding
            )

    def learn(self, limit: Limit) -> None:
        """Take over a limit that the provider announces, if this limiter was given none.

        What was learned follows what is announced later; what was given stays as it is.

        Raises:
            TypeError: it is no `Limit`.
            ValueError: the store that keeps the limits cannot count that far.
        """
        if not isinstance(limit, Limit):
            raise TypeError(f'learn() takes a Limit, such as Limit("requests", 500), not {limit!r}')
        with self._awake:
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
        """Change the limits that are named, at once, while calls wait; the others stay.

        ``concurrency`` may change between a fixed number and one to be found, too; ``weight`` is
        that of a child. What was admitted stays counted, and calls in flight hold slots that come to
        be (not those of a store), so a lower limit is kept from the first moment. Calls that wait and
        could never pass again fail with `CostExceedsLimit`.

        Raises:
            LimitSyntaxError, ValueError: as for `Limiter` and `child`.
        """
        given = read_limits(limits, limits_by_keyword)
        share = None if weight is None else read_weight(weight)
        with self._awake:
            account = self._account
            account.reconfigure(given, concurrency, weight=share)
        account.flush()

    def observe(self, callback: Callback) -> Callable[[], None]:
        """Tell ``callback`` of all that happens here and below; call what is returned to end that.

        See `asyncbucket.events` for what there is to hear. It is called synchronously, in the
        thread where something happens; what it raises is logged once, and harms nothing. While
        nobody listens, no events are made.

        Raises:
            TypeError: ``callback`` cannot be called, or is a coroutine function.
        """
        with self._awake:
            return self._account.observe(callback)

    def emit(self, event: Event) -> None:
        """Tell those who listen of an event of an adapter."""
        self._account.emit(event)

    async def aclose(self) -> None:
        """Leave the store, if the limits are in one: what is booked ahead is given back.

        Without a store there is nothing to close. Call it on the loop that used the limiter; where calls
        without a loop did, on any, when none of them waits.
        """
        if self._account.remote is not None:
            await self._account.remote.aclose()

    def now(self) -> float:
        """Return the present instant in seconds of the limiter's clock, as deadlines are given."""
        return self._account.budget.clock() * 1e-9

    @property
    def name(self) -> str:
        """How statistics, events, logs and metrics call it: ``"openai"``, ``"openai/chat"``."""
        return self._account.name

    @property
    def max_queue(self) -> int | None:
        """The most calls that may wait."""
        return self._account.max_queue

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits in force here; those of limiters above hold besides."""
        return tuple(kept.limit for kept in self._account.limits.values())

    @property
    def concurrency(self) -> int | None:
        """The most calls in flight at once, as it is now; None for no bound."""
        slots = self._account.slots
        return None if slots is None else slots.size

    def statistics(self) -> Statistics:
        """Return a frozen snapshot: what passed, what waits, and for what; children included."""
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
