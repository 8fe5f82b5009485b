"""How a call gets in that cannot pass at once: in turn, or not at all.

Whoever admits a call makes its lease hold (`Lease.hold_locked`), under the lock. Whoever gives up
after that gives the lease back. So nothing is handed over that could be lost on the way, and a call
may be cancelled at whichever await.
"""

from functools import partial
from typing import Any, Final

from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import (
    AcquireTimeout,
    AsyncBucketError,
    CostExceedsLimit,
    QueueFull,
    WouldBlock,
)
from asyncbucket.core.events import Cancelled, Queued, Reason, Refused
from asyncbucket.core.meters import Amounts
from asyncbucket.core.node import Node
from asyncbucket.core.pacer import Pacer
from asyncbucket.core.queue import AnyWaiter, SyncWaiter, Waiter
from asyncbucket.core.refusal import refusal_locked
from asyncbucket.core.seats import Seat, ThreadSeat
from asyncbucket.core.wording import counted, in_seconds

#: A deadline further back (ns) than this was probably meant as seconds from now.
_LONG_PAST: Final = 1_000_000_000
_AT_ONCE: Final = "without waiting"
#: What observers hear of a refusal.
_REASONS: Final[dict[type, Reason]] = {
    WouldBlock: "would_block",
    AcquireTimeout: "timeout",
    QueueFull: "queue_full",
    CostExceedsLimit: "too_costly",
}
_REFUSALS: Final = (WouldBlock, AcquireTimeout, QueueFull, CostExceedsLimit)


def refuse(node: Node, amounts: Amounts) -> None:
    """Refuse a call that cannot pass now.

    Raises:
        WouldBlock: it cannot pass now, or others wait.
        CostExceedsLimit: it can never pass.
    """
    try:
        with node.pacer:
            node.check(amounts)
            raise refusal_locked(WouldBlock, node, amounts, _AT_ONCE, "wait with acquire()")
    except _REFUSALS as error:
        _count_refusal(node, amounts, error)
        raise


async def wait(
    lease: Any, node: Node, amounts: Amounts, *, deadline: int | None, priority: int
) -> None:
    """Wait until ``lease`` holds: in turn."""
    pacer: Pacer = node.pacer
    try:
        waiter = Waiter()
        waiter.lease = lease
        asked = _join(waiter, node, amounts, deadline=deadline, priority=priority)
        try:
            if pacer.observed:
                pacer.notify(node, Queued, cost=Cost.of(amounts), waiting=node.waiting)
            in_time = await waiter
        except CostExceedsLimit:  # whoever raised it has taken the waiter out
            raise
        except BaseException as error:
            _give_up(waiter, asked, is_finalizer=isinstance(error, GeneratorExit))
            del waiter  # else the error's traceback would keep it alive
            raise
        if not in_time:
            raise _too_late(node, amounts, asked, deadline)
    except _REFUSALS as error:
        _count_refusal(node, amounts, error)
        raise


def block(
    lease: Any, node: Node, amounts: Amounts, *, deadline: int | None, priority: int
) -> None:
    """Block this thread until ``lease`` holds: in turn."""
    pacer: Pacer = node.pacer
    seat, waiter = ThreadSeat(pacer.look), SyncWaiter()
    waiter.lease = lease
    try:
        asked = _join(waiter, node, amounts, deadline=deadline, priority=priority, seat=seat)
        try:
            pacer.notify(node, Queued, cost=Cost.of(amounts), waiting=node.waiting)
            seat.block(waiter.done, pacer.clock)
            in_time = waiter.result()
        except CostExceedsLimit:
            raise
        except BaseException:
            _give_up(waiter, asked)
            raise
        if not in_time:
            raise _too_late(node, amounts, asked, deadline)
    except _REFUSALS as error:
        _count_refusal(node, amounts, error)
        raise
    finally:
        pacer.do(partial(pacer.seats.pop, seat, None))


def _join(
    waiter: AnyWaiter,
    node: Node,
    amounts: Amounts,
    *,
    deadline: int | None,
    priority: int,
    seat: Seat | None = None,
) -> int:
    """Stand in line, unless that is hopeless; return since when."""
    pacer: Pacer = node.pacer
    with pacer:
        now = pacer.clock()
        node.check(amounts)
        for level in node.path:
            if level.max_queue is not None and level.waiting >= level.max_queue:
                how = _AT_ONCE
                if level.waiting:
                    how = f"behind {counted(level.waiting, 'calls')} waiting already"
                remedy = f"try again later or raise max_queue={level.max_queue:,}"
                raise refusal_locked(QueueFull, node, amounts, how, remedy)
        if deadline is not None and node.soonest(amounts, now) > deadline:
            raise _too_late_locked(node, amounts, now, deadline)
        if seat is None:
            seat = pacer.seat_here_locked()
        else:
            pacer.seats[seat] = seat
        pacer.join_locked(waiter, node, amounts, seat, now, deadline=deadline, priority=priority)
        return now


def _give_up(waiter: AnyWaiter, asked: int, *, is_finalizer: bool = False) -> None:
    """Withdraw a call that waits no longer; a finalizer tells nobody."""
    pacer: Pacer = waiter.line.node.pacer
    pacer.do(partial(_withdraw_locked, waiter, asked))
    if pacer.news and not is_finalizer:
        pacer.catch_up()


def _withdraw_locked(waiter: AnyWaiter, asked: int) -> None:
    node = waiter.line.node
    pacer: Pacer = node.pacer
    now = pacer.clock()
    if pacer.withdraw_locked(waiter, now):
        node.count("cancelled")
    cost, waited = Cost.of(waiter.amounts), (now - asked) * 1e-9
    pacer.notify_locked(node, Cancelled, cost=cost, waited=waited)


def _too_late(
    node: Node, amounts: Amounts, asked: int, deadline: int | None
) -> AcquireTimeout | CostExceedsLimit:
    assert deadline is not None
    with node.pacer:
        node.check(amounts)  # limits may have been lowered since
        return _too_late_locked(node, amounts, asked, deadline)


def _too_late_locked(node: Node, amounts: Amounts, asked: int, deadline: int) -> AcquireTimeout:
    how = f"within {in_seconds(max(0, deadline - asked) * 1e-9)}"
    remedy = "raise the timeout or the limit"
    if asked - deadline > _LONG_PAST:
        how = "by a deadline that has passed"
        remedy = f"a deadline is an instant of time.monotonic(), not seconds from now: {remedy}"
    return refusal_locked(AcquireTimeout, node, amounts, how, remedy)


def _count_refusal(node: Node, amounts: Amounts, error: AsyncBucketError) -> None:
    """Count a refused call, and tell observers."""
    pacer: Pacer = node.pacer
    with pacer:
        node.count("refused")
    if pacer.observed:
        pacer.notify(
            node,
            Refused,
            cost=Cost.of(amounts),
            reason=_REASONS[type(error)],
            bound_by=getattr(error, "bound_by", None),
            retry_after=getattr(error, "retry_after", None),
        )
