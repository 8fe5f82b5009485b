"""Slots given up early: what a call gives back while it waits for another one made inside it.

A tool or a model that calls another model does nothing itself meanwhile, yet holds a slot. If both
pass the same limiter, be it only the root, the inner call may be waiting for that very slot. So the
outer call gives back its slots at the levels that both pass, for good. At the others it keeps them.

Even so, two calls may wait for each other, as each holds one slot while it waits for another: a
tool of ``a`` calls one of ``b`` just when that calls one of ``a``. So it is remembered which levels
were held while which were waited for. Where that would form a cycle, the slot is given back as
well.
"""

import weakref
from typing import TYPE_CHECKING, Final

from asyncbucket.gates import Gates
from asyncbucket.limiter.lease import Lease
from asyncbucket.limiter.levels import asked
from asyncbucket.limiter.limiter import Limiter

if TYPE_CHECKING:
    from asyncbucket.budget import Budget
    from asyncbucket.limiter.account import Account

# A lease gives its slots back all at once; only this module gives back some of them.
# ruff: noqa: SLF001


def give_back(lease: Lease, limiter: Limiter) -> None:
    """Release the slots of ``lease`` that a call of ``limiter`` from this context may need."""
    account, path = lease._account, asked(limiter)._account.path
    budget = account.budget
    if budget is not path[-1].budget:
        return
    with budget.lock:
        if lease.released or lease._epoch != budget.epoch:
            return
        order = _ORDER.setdefault(budget, _Order())
        held = lease._gates
        wanted = [each for each in path if each not in account.path and each.gates.slots]
        needed = [slots for each in path for slots in each.gates.slots]
        for each in account.path:
            if each not in path and each.gates.slots and order.is_circle(each, wanted):
                needed += each.gates.slots
        # Slots in a store belong to the lease itself, and to the root.
        mine = [slots for slots in held.slots if slots in needed or slots.remote]
        for slots in mine:
            slots.give_back()
        mine += (
            each.slots
            for each in account.path
            if each.slots is not None and each.slots in needed and each.end_early_locked(held)
        )
        if mine:
            lease._gates = Gates(each for each in held.meters if each[0] not in mine)
            lease._gates.given_back = (*held.given_back, *mine)
            budget.ring_locked(account)


class _Order:
    """Remember which levels' slots were held while which others' were waited for."""

    __slots__ = ("_after",)

    def __init__(self) -> None:
        self._after: dict[str, set[str]] = {}

    def is_circle(self, held: "Account", wanted: "list[Account]") -> bool:
        """Tell whether calls may wait for each other in a circle; if not, remember the pair."""
        name = held.shown  # all tenants share it, as there may be many
        goals = {each.shown for each in wanted}
        if any(self._leads(goal, name) for goal in goals):
            return True
        self._after.setdefault(name, set()).update(goals)
        return False

    def _leads(self, start: str, goal: str) -> bool:
        seen, rest = {start}, [start]
        while rest:
            here = rest.pop()
            if here == goal:
                return True
            new = self._after.get(here, set()) - seen
            seen |= new
            rest += new
        return False


_ORDER: Final["weakref.WeakKeyDictionary[Budget, _Order]"] = weakref.WeakKeyDictionary()
