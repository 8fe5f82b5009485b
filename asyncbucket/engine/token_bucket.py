"""The primitive: the same machine with one bucket, where a `Limiter` has many meters."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from asyncbucket.engine.context import deadline_of
from asyncbucket.engine.dispatchers import ATOMIC, OfThisProcess
from asyncbucket.engine.errors import AcquireTimeout, CostExceedsLimit, WouldBlock
from asyncbucket.engine.meters import Amounts, Bucket, Route, admit, untake
from asyncbucket.engine.pacer import Pacer
from asyncbucket.engine.queue import AnyWaiter, Call, Waiter
from asyncbucket.engine.wording import counted, in_seconds, is_integer, is_number, read_count, shown

_ONE: Final[Amounts] = {"units": 1}
#: The range of rates (units a second); no real limit lies outside.
_SLOWEST: Final = 1e-9
_FASTEST: Final = 1e9


@dataclass(frozen=True, slots=True)
class BucketStatistics:
    """Show a bucket at one instant."""

    #: Units that could pass now; negative while nobody could pass.
    available: int
    #: Calls that wait.
    waiting: int


class TokenBucket(Call, OfThisProcess):
    """Let ``rate`` units a second pass, and at most ``burst`` units at once.

    In any interval of t seconds at most ``burst + rate * t`` units pass. Calls pass in order of
    arrival; a newcomer never passes those who wait. A call that is cancelled gives back what it
    took. One bucket may be used on several event loops and threads at once.

    >>> bucket = TokenBucket(rate=2.0, burst=2)
    >>> await bucket.acquire()  # wait for one unit
    >>> bucket.acquire_nowait()  # or take it now, or raise WouldBlock
    >>> async with bucket:
    ...     ...  # wait for one unit, then go on

    Args:
        rate: units a second, from 1e-9 to 1e9.
        burst: whole units that a full bucket holds, at least 1. What flows in while it is full is
            lost, as with a burst of 1 while the event loop is busy: to use all of ``rate``, choose
            what flows in during the loop's longest delays, a tenth of ``rate`` for 0.1 s.
        clock: a callable that returns monotonic integer nanoseconds.

    Raises:
        ValueError: ``rate`` or ``burst`` is out of range.
        TypeError: ``clock`` returns no integer.
    """

    def __init__(
        self, rate: float, burst: int = 1, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        if not is_number(rate) or not _SLOWEST <= rate <= _FASTEST:
            raise ValueError(f"rate must be from 1e-9 to 1e9 units a second, not {rate!r}")
        self._rate = float(rate)
        self._clock = clock
        self._bucket = Bucket(rate=self._rate, burst=read_count(burst, "burst", least=1))
        self._pacer = Pacer(clock, "bucket")
        self._node = self._pacer.root
        self._node.extra = ((self._bucket, "units"),)
        #: The amount that passes without the lock while nobody waits: 1, or none.
        self._open: int | None = 1 if ATOMIC else None

    async def acquire(self, amount: int = 1, timeout: float | None = None) -> None:
        """Wait until ``amount`` units may pass, at most ``timeout`` seconds.

        Raises:
            AcquireTimeout: the units did not pass in time, or cannot (then at once); a
                TimeoutError.
            CostExceedsLimit: ``amount`` is above ``burst`` and can never pass.
            ValueError: ``amount`` is not a whole number from 1 on, or ``timeout`` not a number from 0 on.
        """
        # The fast path for one unit that the bucket holds: `admit`, inlined. Between reading
        # the clock and the last store there is no call and no backward jump, so no other thread can
        # interleave. `_open` equals no amount where that does not hold, and while anyone changes
        # the bucket. This takes a quarter of the time that a lock would.
        now = self._clock()
        bucket = self._bucket
        if amount is self._open and timeout is None and not self._pacer.waiting:
            if bucket.q != 1:  # the test is cheaper than multiplying
                now *= bucket.q
            if now >= bucket.tat:
                bucket.full_at = now
                bucket.tat = now + bucket.p
                return
            backlog = bucket.tat - now
            if backlog <= bucket.slack:
                bucket.tat += bucket.p
                if backlog < bucket.low:  # noqa: PLR1730 - `min` would be a call
                    bucket.low = backlog
                return
        waiter = self._take_or_join(amount, timeout)
        del now, bucket  # fewer objects for the collector to visit in each of 100,000 frames
        if waiter is None:
            return
        try:
            if await waiter:
                return
        except BaseException:
            self._pacer.lock.do(self._withdraw_locked, waiter)
            del waiter  # else the error's traceback would keep it alive
            raise
        raise self._timeout_error("gave up after", amount, timeout, self._wait_of(waiter.amounts))

    def acquire_nowait(self, amount: int = 1) -> None:
        """Take ``amount`` units now.

        Raises:
            WouldBlock: they cannot pass now, or others wait; ``retry_after`` is the wait in
                seconds.
            CostExceedsLimit, ValueError: as for `acquire`.
        """
        amounts = self._amounts(amount)
        with self._pacer.lock:
            taken = self._take_locked(amounts, self._clock()) or (
                self._pacer.discard_closed() and self._take_locked(amounts, self._clock())
            )
        if not taken:
            retry_after = self._wait_of(amounts) * 1e-9
            raise WouldBlock(
                f"{counted(amount, 'units')} cannot pass before {in_seconds(retry_after)} from now at "
                f"{self.rate:g} a second; wait with acquire()",
                retry_after=retry_after,
                bound_by="units",
            )

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give nothing back: a bucket limits how often calls pass, not how many run."""

    @property
    def rate(self) -> float:
        """Units a second."""
        return self._rate

    @property
    def burst(self) -> int:
        """Units that a full bucket holds."""
        return self._bucket.burst

    def statistics(self) -> BucketStatistics:
        """Return a frozen snapshot."""
        with self._pacer.lock:
            self._pacer.discard_closed()
            return BucketStatistics(self._bucket.available(self._clock()), self._pacer.waiting)

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<TokenBucket rate={self.rate:g}/s burst={self.burst:,} "
            f"available={now.available:,} waiting={now.waiting:,}>"
        )

    def _amounts(self, amount: int) -> Amounts:
        if not is_integer(amount) or amount < 1:
            raise ValueError(
                f"amount must be a whole number of at least 1 unit, not {shown(amount)}"
            )
        if amount > self.burst:
            raise CostExceedsLimit(
                f"cost of {counted(amount, 'units')} exceeds the burst of "
                f"{counted(self.burst, 'units')} and can never pass; raise burst or split the call"
            )
        return {"units": int(amount)}

    def _take_or_join(self, amount: int, timeout: float | None) -> Waiter | None:
        """Take ``amount`` now, or return a waiter in the queue."""
        pacer, now = self._pacer, self._clock()
        amounts = _ONE if amount == 1 and type(amount) is int else self._amounts(amount)
        deadline = None if timeout is None else deadline_of(now, timeout)
        lock = pacer.lock
        lock.acquire()  # `with` would take twice the time
        try:
            if not pacer.waiting and self._take_locked(amounts, now):
                return None
            if deadline is not None:
                due = self._bucket.earliest(amounts["units"], now)
                if due > deadline:
                    raise self._timeout_error("cannot pass within", amount, timeout, due - now)
            dispatcher = pacer.dispatchers.here()
            waiter = Waiter(loop=dispatcher.loop)
            waiter.lease, waiter.dispatcher = self, dispatcher
            waiter.amounts, waiter.deadline = amounts, deadline
            pacer.join_locked(waiter, (self._node,), now)
            return waiter
        finally:
            lock.release()
            lock.catch_up()

    def _take_locked(self, amounts: Amounts, now: int) -> bool:
        """Take ``amounts`` now if nobody waits longer; keep out callers without the lock."""
        before, self._open = self._open, None
        taken = (not self._pacer.waiting or self._pacer.is_free_locked(self._node, now)) and admit(
            self._node.route, amounts, now, now
        )[0] <= now
        self._open = before
        return taken

    def _hold_locked(
        self,
        now: int,
        waiter: AnyWaiter,
        bound_by: str | None,  # noqa: ARG002 - for a lease
        route: Route,  # noqa: ARG002 - as above
    ) -> None:
        waiter.asked = now  # from now on when it passed

    def _hand_back_locked(self, waiter: AnyWaiter) -> None:
        untake(self._node.route, waiter.amounts, waiter.asked)

    def _withdraw_locked(self, waiter: Waiter) -> None:
        before, self._open = self._open, None
        self._pacer.withdraw_locked(waiter)
        self._open = before

    def _timeout_error(
        self, how: str, amount: int, timeout: float | None, wait: int
    ) -> AcquireTimeout:
        assert timeout is not None
        return AcquireTimeout(
            f"{counted(amount, 'units')} {how} {in_seconds(timeout)} at {self.rate:g} a second; raise "
            f"the timeout or the rate",
            retry_after=wait * 1e-9,
            bound_by="units",
        )

    def _wait_of(self, amounts: Amounts) -> int:
        """Return for how long (ns) at least ``amounts`` cannot pass."""
        with self._pacer.lock:
            now = self._clock()
            due, bound_by = self._node.earliest(amounts, now)
            return (due if bound_by else self._pacer.next_dispatch_locked(now)) - now
