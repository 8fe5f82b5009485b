"""Tool calls under way in a context, and how they make way for the calls made inside them.

A tool may ask a paced model, or another tool, or run a whole agent. While it waits for that it does
nothing itself, yet holds a slot; and where both pass the same limiter, up to its root, the call
inside may be waiting for that very slot: for ever, if all slots are held so. So before a call inside
is admitted, the tools around it give back their slots at the levels that both pass. At the others
they keep them: of a child ``tools`` with two slots no more than two tools run, though both ask models
of a sibling. What a tool costs stays charged.

To hold one slot while waiting for another is still how two come to wait for each other: a tool of
``a`` asks one of ``b`` just when that asks one of ``a``. So it is remembered which levels were held
while which were waited for, and where that would go round in a circle the slot is given back as well.

A task that a tool has started knows the tool by its context, even when that has ended. A note counts
only until its lease is released.
"""

import contextlib
import re
import weakref
from collections.abc import Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from asyncbucket.gates import Gates
from asyncbucket.lease import Lease
from asyncbucket.limiter import Limiter
from asyncbucket.llama_index.tenants import asked

if TYPE_CHECKING:
    from asyncbucket.account import Account
    from asyncbucket.budget import Budget


class Running:
    """Note that a tool's call runs in this context."""

    __slots__ = ("_lease", "made_way", "outer", "tool")

    def __init__(self, tool: object, lease: Lease, outer: "Running | None") -> None:
        self.tool = tool
        self._lease = weakref.ref(lease)
        self.outer = outer
        #: Whether another call was made inside.
        self.made_way = False

    @property
    def lease(self) -> Lease | None:
        """The lease, while it is held."""
        lease = self._lease()
        return None if lease is None or lease.released else lease

    def make_way(self, path: "tuple[Account, ...]") -> None:
        """Give back the slots at the levels of ``path``."""
        self.made_way = True
        lease = self.lease
        if lease is not None:
            _give_back(lease, path)


_RUNNING: Final[ContextVar[Running | None]] = ContextVar("asyncbucket tools", default=None)


@contextlib.contextmanager
def running(tool: object, lease: Lease) -> Generator[None]:
    """Note for the time of a ``with`` block that ``tool`` runs under ``lease``."""
    token = _RUNNING.set(Running(tool, lease, _RUNNING.get()))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # closed in another context than it ran in
            _RUNNING.reset(token)


def is_running(tool: object) -> bool:
    """Tell whether a method of ``tool`` runs here and calls another one: that is one call.

    Once another call was made inside, a model's, say, ``tool`` is asked for anew by that.
    """
    here = _RUNNING.get()
    return here is not None and here.tool is tool and not here.made_way and here.lease is not None


def make_way(limiter: Limiter) -> None:
    """Have the tools around this context give back the slots that a call of ``limiter`` needs."""
    here = _RUNNING.get()
    if here is None:
        return
    path = asked(limiter)._account.path  # noqa: SLF001 - a lease gives its slots back all at once
    while here is not None:
        here.make_way(path)
        here = here.outer


def _give_back(lease: Lease, path: "tuple[Account, ...]") -> None:
    """Release the slots of ``lease`` that a call at the levels of ``path`` may need."""
    account = lease._account  # noqa: SLF001 - as above
    budget = account.budget
    if budget is not path[-1].budget:
        return
    with budget.lock:
        if lease.released or lease._epoch != budget.epoch:  # noqa: SLF001 - as above
            return
        order = _ORDER.setdefault(budget, _Order())
        held = lease._gates  # noqa: SLF001 - as above
        wanted = [each for each in path if each not in account.path and each.gates.slots]
        lent = [slots for each in path for slots in each.gates.slots]
        for each in account.path:
            if each not in path and each.gates.slots and order.is_circle(each, wanted):
                lent += each.gates.slots
        # Those in a store are the lease's own, and are the root's.
        lent = [slots for slots in held.slots if slots in lent or slots.remote]
        for slots in lent:
            slots.give_back()
        if lent:
            lease._gates = Gates(each for each in held.meters if each[0] not in lent)  # noqa: SLF001
            budget.ring_locked(account)


class _Order:
    """Remember which levels' slots were held while others' were waited for."""

    __slots__ = ("_after",)

    def __init__(self) -> None:
        self._after: dict[str, set[str]] = {}

    def is_circle(self, held: "Account", wanted: "list[Account]") -> bool:
        """Tell whether those who wait may wait for each other; if not, keep it in mind."""
        name = _name(held)
        goals = {_name(each) for each in wanted}
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


def _name(account: "Account") -> str:
    """Return a level's name; the tenants are taken for one, for there may be many."""
    return re.sub(r"/\*[^/]*", "/*", account.name)
