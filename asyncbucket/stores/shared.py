"""A limiter whose limits are in a store: what stands between the core's pacer and the desk.

The pacer still decides who goes next, including children and priorities, and books the limits below
the root. Then it hands the call over to the loop's `Counter` instead of letting it go. There the
call waits in a line, first come, first served, until the desk has booked it at the store and its
start has come. That line is kept short, about as long as what one trip books, so that an urgent
call is never behind many that wait for the store.
"""

import asyncio
import collections
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Final

from asyncbucket.core.account import Account
from asyncbucket.core.events import LimitChanged
from asyncbucket.core.limits import Limit
from asyncbucket.core.process import reset_after_fork
from asyncbucket.core.remote import Remote
from asyncbucket.core.statistics import LimitUse
from asyncbucket.core.terms import OnOutage
from asyncbucket.feedback.adaptive import Concurrency
from asyncbucket.stores import open_store
from asyncbucket.stores.counter import Counter
from asyncbucket.stores.orders import Orders
from asyncbucket.stores.returns import Leftover
from asyncbucket.stores.store import Store, Terms, check_membership

_AUTO_REFUSED: Final = (
    "with a store, concurrency must be a number: one process alone cannot find it"
)


def share(
    account: Account, store: str | Store, *, on_outage: OnOutage = "share", slot_ttl: float = 30.0
) -> "Shared":
    """Keep the limits of ``account``, a root, in ``store`` from now on.

    Args:
        account: whose limits; processes share them by its name.
        store: a URL, or a store made by the caller. That serves one event loop only, and stays open
            when the limiter is closed, because others may use it.
        on_outage: what to do while the store is gone: see `asyncbucket.stores.outage`.
        slot_ttl: seconds without a sign of life after which a process's slots come back.

    Raises:
        ValueError: no store accepts the name, the URL is not a store's, the limiter finds its
            concurrency by itself, or the store cannot count that far.
        TypeError: ``store`` is neither a URL nor a store.
        ImportError: the extra for this store is not installed.
    """
    check_membership(account.name, slot_ttl)
    if account.adaptive is not None:
        raise ValueError(_AUTO_REFUSED)
    make_store = functools.partial(_as_store, _with_absolute_path(store))
    shared = Shared(account, make_store, on_outage=on_outage, slot_ttl=slot_ttl)
    # A wrong URL is refused here, not at the first call, and so are limits that are too large.
    shared.check((), None)
    with account.budget.lock:
        account.remote = shared
        account.budget.outlet_for = shared.counter
        account.refresh_gates_locked()
    return shared


def _with_absolute_path(store: Any) -> Any:
    """Return ``store`` with a relative path made absolute, so that changing directories is harmless."""
    if isinstance(store, str) and store.lower().startswith("sqlite:"):
        return open_store(store).url
    return store


def _as_store(store: Any) -> Store:
    opened: Store = store if hasattr(store, "check") else open_store(store)
    return opened


class Shared(Remote):
    """Know the counters of a limiter, one for each loop."""

    def __init__(
        self,
        account: Account,
        make_store: functools.partial[Store],
        *,
        on_outage: OnOutage,
        slot_ttl: float,
    ) -> None:
        self.account = account
        self.make_store = make_store
        self.on_outage: OnOutage = on_outage
        self.slot_ttl = slot_ttl
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Start afresh in a child process: loops, and what they hold at the store, are the parent's."""
        self._counters: dict[asyncio.AbstractEventLoop, Counter] = {}
        #: What loops that have ended left behind; the next desk that looks takes it over.
        self.leftovers: collections.deque[Leftover] = collections.deque()
        #: Limits and pauses that the store has to hear of.
        self.orders = Orders(self.adopt_terms)
        #: The units that were left of each limit when a desk was last closed.
        self.last_left: dict[Limit, int] = {}

    def counter(self, loop: asyncio.AbstractEventLoop) -> Counter:
        """Return the counter of a loop."""
        counter = self._counters.get(loop)
        if counter is None:
            self.drop_closed_loops()
            counter = self._counters[loop] = Counter(self, loop)
        return counter

    def redate_locked(self, now: int) -> None:
        """Date to ``now``, in the limits below the root, all calls at the counters."""
        for counter in list(self._counters.values()):
            if not counter.loop.is_closed():
                counter.redate_locked(now)

    def report_leftover(self, leftover: Leftover) -> None:
        """Report to the store what came back to a loop that has ended: now, or by the next desk."""
        self.drop_closed_loops()  # the call that gives a slot back here is among what that loop left
        self.leftovers.append(leftover)
        any(counter.take_over() for counter in self._running_first())

    def drop_closed_loops(self) -> None:
        """Drop the counters of loops that have ended, but keep what they left behind."""
        for loop in [loop for loop in list(self._counters) if loop.is_closed()]:
            counter = self._counters.pop(loop, None)
            if counter is not None:  # else another thread was faster
                self.last_left = counter.left() or self.last_left
                self.leftovers.extend(counter.leftovers())

    def terms(self, changes: Iterable[Limit] = (), concurrency: int | None = None) -> Terms:
        """Return the limits as they are, or as they would be after ``changes``."""
        slots = self.account.slots
        limits = {key: kept.limit for key, kept in self.account.limits.items()}
        limits |= {limit.key: limit for limit in changes}
        if concurrency is None and slots is not None:
            concurrency = slots.size
        return Terms(limits=tuple(limits.values()), concurrency=concurrency)

    def use(self) -> Iterator[LimitUse]:
        """See `asyncbucket.core.remote.Remote`: as the store's last reply said."""
        left = self.last_left
        for counter in self._counters.values():
            left = counter.left() or left
        for limit in self.terms().limits:
            available = left.get(limit, limit.amount)
            yield LimitUse(limit, used=limit.amount - available, available=available)

    def held_up(self) -> tuple[str, int] | None:
        """See `asyncbucket.core.remote.Remote`."""
        known = (counter.held_up() for counter in self._running_first())
        return next(filter(None, known), None)

    def waiting(self) -> int:
        """See `asyncbucket.core.remote.Remote`."""
        return sum(counter.waiting() for counter in self._running_first())

    def pause(self, span: int, *, gradually: bool) -> None:
        """See `asyncbucket.core.remote.Remote`."""
        self.orders.pause(self.account.budget.clock() + span, gradually=gradually)
        self._ring()

    async def close(self, store: Store) -> None:
        """Close a store that was made here; one that was given is closed by its maker."""
        (given,) = self.make_store.args
        if store is not given:
            await store.aclose()

    def options(self) -> dict[str, Any]:
        """See `asyncbucket.core.remote.Remote`: by a URL, another process reaches the same store."""
        (store,) = self.make_store.args
        if not isinstance(store, str):
            return {}
        return {"store": store, "on_outage": self.on_outage, "slot_ttl": self.slot_ttl}

    def check(self, changes: Iterable[Limit], concurrency: Concurrency | None) -> None:
        """See `asyncbucket.core.remote.Remote`."""
        if not isinstance(concurrency, int | None):
            raise ValueError(_AUTO_REFUSED)  # noqa: TRY004 - "auto" is of the right type elsewhere
        self.make_store().check(self.terms(changes, concurrency))

    def configure(self) -> None:
        """See `asyncbucket.core.remote.Remote`."""
        self.orders.configure(self.terms())
        self._ring()

    def _ring(self) -> None:
        """Make one desk tell the store, which tells the other processes."""
        any(counter.ring() for counter in self._running_first())

    def _running_first(self) -> Iterable[Counter]:
        """Return the counters, those of running loops first, newer ones before older ones.

        A loop that is not running hears nothing until it runs again.
        """
        youngest_first = reversed(self._counters.values())
        return sorted(youngest_first, key=lambda counter: not counter.loop.is_running())

    def adopt_terms(self, terms: Terms) -> None:
        """Adopt limits that another process has set; limits that it does not name are removed."""
        account, before = self.account, self.terms()
        named = {limit.key for limit in terms.limits}
        with account.budget.lock:
            account.limits = {key: kept for key, kept in account.limits.items() if key in named}
            if terms.concurrency is None:
                account.slots = None
        account.set_limits(list(terms.limits), terms.concurrency)
        for limit in terms.limits:
            if limit not in before.limits:
                account.notify(LimitChanged, limit=str(limit))
        if terms.concurrency not in {None, before.concurrency}:
            account.notify(LimitChanged, limit=f"concurrency {terms.concurrency}")

    async def aclose(self) -> None:
        """See `asyncbucket.core.remote.Remote`.

        It covers the running loop, loops that have ended, and threads without a loop if none waits.
        """
        self.drop_closed_loops()
        loop, background = asyncio.get_running_loop(), self.account.budget.background.loop
        if self.leftovers or loop in self._counters:
            await self.counter(loop).aclose()
        if background in self._counters and not self.account.waiting:
            closing = self._counters[background].aclose()
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(closing, background))
