"""How a refusal is worded: what was asked, what binds and for how long, and the remedy."""

from collections.abc import Iterator
from typing import TypeVar

from asyncbucket.cost import Cost, counted, rounded
from asyncbucket.errors import AcquireTimeout, QueueFull, WouldBlock
from asyncbucket.limiter.account import Account
from asyncbucket.meters import NEVER, Amounts

Refusal = TypeVar("Refusal", WouldBlock, AcquireTimeout, QueueFull)


def refuse_locked(
    kind: type[Refusal], account: Account, amounts: dict[str, int], how: str, remedy: str
) -> Refusal:
    """Return the error of a refusal, with what binds and for how long."""
    now = account.budget.clock()
    due, bound_by = account.through.earliest(amounts, now)
    remote = account.path[-1].remote  # only the root's limits may lie in a store
    if bound_by is None and remote is not None and (known := remote.held_up()) is not None:
        bound_by, due = known[0], max(now, known[1])
        due = NEVER if bound_by == "concurrency" else due
    elif (
        bound_by is None and account.budget.pacers
    ):  # a place in line is free when the head has gone
        due = max(now, min(pacer.due for pacer in account.budget.pacers.values()))
    after = (due - now) * 1e-9
    what = ", ".join(counted(amounts[each], each) for each in _counted(account, amounts))
    if bound_by is None and remote is not None:
        why = "the store that keeps its limits has to be asked"
    elif bound_by is None:
        why = "others came first"
    elif bound_by == "paused":
        why = f"the limiter is paused for {seconds(after)} more"
    elif due >= NEVER and remote is not None:
        why = "all slots are taken"
    elif due >= NEVER:
        slots = min(slots.size for slots in account.through.slots if slots.available(now) < 1)
        why = f"all {slots} slots are taken"
    else:
        why = f"{bound_by} bind for {seconds(after)} more"
    return kind(
        f"a call of {what} cannot pass {how}: {why}; {remedy}",
        retry_after=None if due >= NEVER else after,
        bound_by=bound_by,
    )


def seconds(value: float) -> str:
    """Return a time as people say it."""
    return f"{rounded(value)} s"


def _counted(account: Account, amounts: Amounts) -> Iterator[str]:
    """Yield the resources of ``amounts`` that are limited, or requests."""
    limited = account.resources()
    counted = [name for name, amount in amounts.items() if amount and name in limited]
    return iter(counted or Cost.of(amounts))
