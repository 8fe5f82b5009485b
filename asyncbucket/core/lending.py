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

from asyncbucket.core.gates import Gates
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import effective_limiter
from asyncbucket.core.limiter import Limiter

if TYPE_CHECKING:
    from asyncbucket.core.account import Account
    from asyncbucket.core.budget import Budget

# A lease gives its slots back all at once; only this module gives back some of them.
# ruff: noqa: SLF001


def give_back(lease: Lease, limiter: Limiter) -> None:
    """Release the slots of ``lease`` that a call of ``limiter`` from this context may need."""
    account, path = lease._account, effective_limiter(limiter)._account.path
    budget = account.budget
    if budget is not path[-1].budget:
        return
    with budget.lock:
        if lease.released or lease._epoch != budget.epoch:
            return
        graph = _WAIT_GRAPHS.setdefault(budget, _WaitGraph())
        held = lease._gates
        wanted = [level for level in path if level not in account.path and level.gates.slots]
        needed = [slots for level in path for slots in level.gates.slots]
        for level in account.path:
            if level not in path and level.gates.slots and graph.would_deadlock(level, wanted):
                needed += level.gates.slots
        # Slots in a store belong to the lease itself, and to the root.
        returned = [slots for slots in held.slots if slots in needed or slots.remote]
        for slots in returned:
            slots.give_back()
        returned += (
            level.slots
            for level in account.path
            if level.slots is not None
            and level.slots in needed
            and level.release_added_slot_locked(held)
        )
        if returned:
            lease._gates = Gates(pair for pair in held.meters if pair[0] not in returned)
            lease._gates.given_back = (*held.given_back, *returned)
            budget.ring_locked(account)


class _WaitGraph:
    """Remember which levels' slots were held while which others' were waited for."""

    __slots__ = ("_edges",)

    def __init__(self) -> None:
        self._edges: dict[str, set[str]] = {}

    def would_deadlock(self, held: "Account", wanted: "list[Account]") -> bool:
        """Tell whether calls may wait for each other in a circle; if not, remember the pair."""
        name = held.shown_name  # all tenants share it, as there may be many
        goals = {level.shown_name for level in wanted}
        if any(self._reaches(goal, name) for goal in goals):
            return True
        self._edges.setdefault(name, set()).update(goals)
        return False

    def _reaches(self, start: str, goal: str) -> bool:
        seen, rest = {start}, [start]
        while rest:
            current = rest.pop()
            if current == goal:
                return True
            new = self._edges.get(current, set()) - seen
            seen |= new
            rest += new
        return False


_WAIT_GRAPHS: Final["weakref.WeakKeyDictionary[Budget, _WaitGraph]"] = weakref.WeakKeyDictionary()
