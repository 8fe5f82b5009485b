"""How a call is refused, and gives up: what binds, for how long, and the remedy.

Whoever admits a call makes its lease hold (`Lease._hold_locked`), under the lock. Whoever gives up
after that gives the lease back. So nothing is handed over that could be lost on the way, and a call
may be cancelled at whichever await.
"""

from typing import TYPE_CHECKING, Final, TypeVar

from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import (
    AcquireTimeout,
    AsyncBucketError,
    BudgetExceeded,
    CostExceedsLimit,
    QueueFull,
    WouldBlock,
)
from asyncbucket.core.events import Reason, Refused
from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.node import Node
from asyncbucket.core.wording import counted, in_seconds, with_verb

if TYPE_CHECKING:
    from asyncbucket.core.pacer import Pacer

Refusal = TypeVar("Refusal", WouldBlock, AcquireTimeout, QueueFull)
#: A deadline further back (ns) than this was probably meant as seconds from now.
_LONG_PAST: Final = 1_000_000_000
_AT_ONCE: Final = "without waiting"
#: What observers hear of a refusal.
_REASONS: Final[dict[type, Reason]] = {
    WouldBlock: "would_block",
    AcquireTimeout: "timeout",
    QueueFull: "queue_full",
    CostExceedsLimit: "too_costly",
    BudgetExceeded: "budget",
}
REFUSALS: Final = (WouldBlock, AcquireTimeout, QueueFull, CostExceedsLimit)


def too_many_wait_locked(level: Node, node: Node, amounts: Amounts) -> QueueFull:
    """Return the error of a call for which the line of ``level`` is too long."""
    how = f"behind {counted(level.waiting, 'calls')} waiting already" if level.waiting else _AT_ONCE
    remedy = f"try again later or raise max_queue={level.max_queue:,}"
    return refusal_locked(QueueFull, node, amounts, how, remedy)


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
    except REFUSALS as error:
        count_refusal(node, amounts, error)
        raise


def too_late(node: Node, amounts: Amounts, asked: int, deadline: int | None) -> AcquireTimeout:
    """Return the error of a call whose time is up.

    Raises:
        CostExceedsLimit: it can never pass, because limits have been lowered since.
    """
    assert deadline is not None
    with node.pacer:
        node.check(amounts)
        return too_late_locked(node, amounts, asked, deadline)


def too_late_locked(node: Node, amounts: Amounts, asked: int, deadline: int) -> AcquireTimeout:
    """Return the error of a call that cannot pass by its deadline."""
    how = f"within {in_seconds(max(0, deadline - asked) * 1e-9)}"
    remedy = "raise the timeout or the limit"
    if asked - deadline > _LONG_PAST:
        how = "by a deadline that has passed"
        remedy = f"a deadline is an instant of time.monotonic(), not seconds from now: {remedy}"
    return refusal_locked(AcquireTimeout, node, amounts, how, remedy)


def count_refusal(node: Node, amounts: Amounts, error: AsyncBucketError) -> None:
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


def refusal_locked(
    error_type: type[Refusal], node: Node, amounts: Amounts, how: str, remedy: str
) -> Refusal:
    """Return the error of a refusal, with what binds and for how long."""
    pacer: Pacer = node.pacer
    now = pacer.clock()
    due, bound_by, why = _reason_locked(node, amounts, now, at_once=error_type is WouldBlock)
    if bound_by == "paused":
        remedy = remedy.removesuffix(" or the limit")  # no limit ends a pause
    limited = node.resources()
    named = [name for name, amount in amounts.items() if amount and name in limited]
    what = ", ".join(counted(amounts[name], name) for name in named or Cost.of(amounts))
    return error_type(
        f"a call of {what} cannot pass {how}: {why}; {remedy}",
        retry_after=None if due >= NEVER else (due - now) * 1e-9,
        bound_by=bound_by,
    )


def _reason_locked(
    node: Node, amounts: Amounts, now: int, *, at_once: bool
) -> tuple[int, str | None, str]:
    """Return when such a call could pass, or `NEVER` if unknown; what binds; and both in words."""
    pacer: Pacer = node.pacer
    due, bound_by = node.earliest_of_all(amounts, now)
    if at_once and pacer.place is None:
        for limit in (window.limit for level in node.path for window in level.limits.values()):
            burst = limit.burst_units
            if burst is not None and amounts.get(limit.resource, 0) > burst:
                most = counted(burst, limit.resource)
                why = f"above a burst of {most} it earns the rest while it is first in line"
                return NEVER, limit.resource, why
    if bound_by is None and pacer.place is not None:
        known = pacer.place.held_up()
        if known is None:
            return NEVER, None, "the store that keeps its limits has to be asked"
        bound_by, due = known[0], max(now, known[1])
    if bound_by is None:
        return pacer.next_look_locked(now), None, "others came first"
    left = in_seconds((due - now) * 1e-9)
    if bound_by == "paused":
        return due, bound_by, f"the limiter is paused for {left} more{node.why_paused()}"
    if due < NEVER:
        until = _until_reset(node, bound_by, amounts, now)
        return due, bound_by, f"{with_verb(bound_by, 'bind')} for {left} more{until}"
    taken = [level.slots for level in node.bounded if level.in_flight >= level.slots]
    slots = min(taken, default=0)  # 0: they are in a store
    words = (
        "the one slot is"
        if slots == 1
        else f"all {slots:,} slots are"
        if slots
        else "all slots are"
    )
    return due, bound_by, f"{words} taken"


def _until_reset(node: Node, bound_by: str, amounts: Amounts, now: int) -> str:
    """Say when the limit that binds resets, if it does so by the calendar."""
    for window in (each for level in node.path for each in level.limits.values()):
        limit = window.limit
        if (
            limit.resets
            and limit.resource == bound_by
            and window.available(now) < amounts[bound_by]
        ):
            return f", until the limit resets at {limit.resets}"
    return ""
