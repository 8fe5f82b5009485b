"""How a refusal is worded: what was asked, what binds and for how long, and the remedy."""

from collections.abc import Iterator
from typing import TypeVar

from asyncbucket.cost import Cost
from asyncbucket.errors import AcquireTimeout, QueueFull, WouldBlock
from asyncbucket.limiter.account import Account
from asyncbucket.limits import Limit
from asyncbucket.meters import NEVER, Amounts
from asyncbucket.wording import counted, does, in_seconds

Refusal = TypeVar("Refusal", WouldBlock, AcquireTimeout, QueueFull)


def refuse_locked(
    kind: type[Refusal], account: Account, amounts: dict[str, int], how: str, remedy: str
) -> Refusal:
    """Return the error of a refusal, with what binds and for how long."""
    now = account.budget.clock()
    due, bound_by = account.budget.earliest_locked(account, amounts, now)
    remote = account.path[-1].remote  # only the root's limits may lie in a store
    if bound_by is None and remote is not None and (known := remote.held_up()) is not None:
        bound_by, due = known[0], max(now, known[1])
        due = NEVER if bound_by == "concurrency" else due
    paced = _above_a_burst(account, amounts) if kind is WouldBlock and remote is None else None
    if paced is not None:
        due, bound_by = NEVER, paced.resource
    after = (due - now) * 1e-9
    what = ", ".join(counted(amounts[each], each) for each in _counted(account, amounts))
    unknown = bound_by is None and remote is not None
    if paced is not None:
        burst = counted(paced.burst or 0, paced.resource)
        why = f"above a burst of {burst} it earns the rest while it is first in line"
    elif unknown:
        why = "the store that keeps its limits has to be asked"
    elif bound_by is None:
        why = "others came first"
    elif bound_by == "paused":
        why = f"the limiter is paused for {in_seconds(after)} more"
        remedy = remedy.removesuffix(" or the limit")  # no limit ends a pause
    elif due >= NEVER and remote is not None:
        why = "all slots are taken"
    elif due >= NEVER:
        slots = min(slots.size for slots in account.through.slots if slots.available(now) < 1)
        why = "the one slot is taken" if slots == 1 else f"all {slots:,} slots are taken"
    else:
        why = f"{does(bound_by, 'bind')} for {in_seconds(after)} more"
    return kind(
        f"a call of {what} cannot pass {how}: {why}; {remedy}",
        retry_after=None if due >= NEVER or unknown else after,
        bound_by=bound_by,
    )


def _above_a_burst(account: Account, amounts: Amounts) -> Limit | None:
    """Return a limit whose burst is less than the call costs; without waiting it never passes that."""
    return next(
        (
            limit
            for limit in account.through.limits
            if limit.burst is not None and amounts.get(limit.resource, 0) > limit.burst
        ),
        None,
    )


def _counted(account: Account, amounts: Amounts) -> Iterator[str]:
    """Yield the resources of ``amounts`` that are limited, or requests."""
    limited = account.resources()
    counted = [name for name, amount in amounts.items() if amount and name in limited]
    return iter(counted or Cost.of(amounts))
