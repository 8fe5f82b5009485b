"""How a refusal is worded: what was asked, what binds and for how long, and the remedy."""

from typing import TypeVar

from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import AcquireTimeout, QueueFull, WouldBlock
from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.node import Node
from asyncbucket.core.pacer import Pacer
from asyncbucket.core.wording import counted, in_seconds, with_verb

Refusal = TypeVar("Refusal", WouldBlock, AcquireTimeout, QueueFull)


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
            if limit.burst is not None and amounts.get(limit.resource, 0) > limit.burst:
                burst = counted(limit.burst, limit.resource)
                why = f"above a burst of {burst} it earns the rest while it is first in line"
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
        return due, bound_by, f"the limiter is paused for {left} more"
    if due < NEVER:
        return due, bound_by, f"{with_verb(bound_by, 'bind')} for {left} more"
    taken = [level.slots for level in node.bounded if level.in_flight >= level.slots]
    slots = min(taken, default=0)  # 0: they are in a store
    words = "the one slot is" if slots == 1 else f"all {slots:,} slots are" if slots else "all slots are"
    return due, bound_by, f"{words} taken"
