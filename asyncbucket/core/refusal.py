"""How a refusal is worded: what was asked, what binds and for how long, and the remedy."""

from collections.abc import Iterator
from typing import TypeVar

from asyncbucket.core.account import Account
from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import AcquireTimeout, QueueFull, WouldBlock
from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.wording import counted, in_seconds, with_verb

Refusal = TypeVar("Refusal", WouldBlock, AcquireTimeout, QueueFull)


def refusal_locked(
    error_type: type[Refusal], account: Account, amounts: dict[str, int], how: str, remedy: str
) -> Refusal:
    """Return the error of a refusal, with what binds and for how long."""
    now = account.budget.clock()
    due, bound_by, why = _reason_locked(account, amounts, now, at_once=error_type is WouldBlock)
    if bound_by == "paused":
        remedy = remedy.removesuffix(" or the limit")  # no limit ends a pause
    what = ", ".join(counted(amounts[name], name) for name in _limited_resources(account, amounts))
    return error_type(
        f"a call of {what} cannot pass {how}: {why}; {remedy}",
        retry_after=None if due >= NEVER else (due - now) * 1e-9,
        bound_by=bound_by,
    )


def _reason_locked(
    account: Account, amounts: Amounts, now: int, *, at_once: bool
) -> tuple[int, str | None, str]:
    """Return when such a call could pass, or `NEVER` if unknown; what binds; and both in words."""
    remote = account.path[-1].remote  # only the root's limits may be in a store
    due, bound_by = account.budget.earliest_locked(account, amounts, now)
    burst_limit = _limit_with_lower_burst(account, amounts) if at_once and remote is None else None
    if burst_limit is not None:
        burst = counted(burst_limit.burst or 0, burst_limit.resource)
        why = f"above a burst of {burst} it earns the rest while it is first in line"
        return NEVER, burst_limit.resource, why
    if bound_by is None and remote is not None:
        known = remote.held_up()
        if known is None:
            return NEVER, None, "the store that keeps its limits has to be asked"
        bound_by, due = known[0], max(now, known[1])
    if bound_by is None:
        return due, None, "others came first"
    return due, bound_by, _wait_for(bound_by, due, account, now)


def _wait_for(bound_by: str, due: int, account: Account, now: int) -> str:
    """Say what a call would wait for, and for how long."""
    left = in_seconds((due - now) * 1e-9)
    if bound_by == "paused":
        return f"the limiter is paused for {left} more"
    if due < NEVER:
        return f"{with_verb(bound_by, 'bind')} for {left} more"
    taken = [slots.size for slots in account.path_gates.slots if slots.available(now) < 1]
    if not taken:  # they are in a store
        return "all slots are taken"
    slots = min(taken)
    return "the one slot is taken" if slots == 1 else f"all {slots:,} slots are taken"


def _limit_with_lower_burst(account: Account, amounts: Amounts) -> Limit | None:
    """Return a limit whose burst is below the cost; such a call passes only by waiting."""
    return next(
        (
            limit
            for limit in account.path_gates.limits
            if limit.burst is not None and amounts.get(limit.resource, 0) > limit.burst
        ),
        None,
    )


def _limited_resources(account: Account, amounts: Amounts) -> Iterator[str]:
    """Yield the resources of ``amounts`` that are limited; if none is, all that it costs."""
    limited = account.resources()
    counted = [name for name, amount in amounts.items() if amount and name in limited]
    return iter(counted or Cost.of(amounts))
