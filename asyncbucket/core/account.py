"""What a limiter keeps: its limits in force, with their meters."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Self

from asyncbucket.core.books import EMPTY_MAPPING, Books
from asyncbucket.core.cost import COMMON
from asyncbucket.core.errors import CostExceedsLimit
from asyncbucket.core.events import LimitChanged, LimitLearned
from asyncbucket.core.gates import Gates
from asyncbucket.core.kept import Kept, keep
from asyncbucket.core.limits import Key, Limit
from asyncbucket.core.meters import Amounts, Meter, Slots
from asyncbucket.core.queue import Waiter
from asyncbucket.core.statistics import LimitUse
from asyncbucket.core.terms import Terms
from asyncbucket.core.wording import counted, is_integer
from asyncbucket.feedback.adaptive import Adaptive, Concurrency, read_concurrency
from asyncbucket.feedback.headroom import Headroom
from asyncbucket.feedback.pause import Pause

if TYPE_CHECKING:
    from asyncbucket.core.keys import Keys
    from asyncbucket.core.limiter import Limiter
    from asyncbucket.core.remote import Remote

_NO_KEYS: Final[frozenset[Any]] = frozenset()


class Account(Books):
    """Keep a limiter's limits in force.

    Everything is written with the budget's lock held. `limits`, `headrooms` and `learned` are
    replaced, never changed in place, so they may be read without it.
    """

    __slots__ = (
        "adaptive",
        "children",
        "early_calls",
        "headrooms",
        "keys",
        "learned",
        "limiters",
        "limits",
        "max_queue",
        "pause",
        "remote",
        "retired",
        "slots",
        "steered",
    )

    def __init__(
        self,
        name: str,
        parent: "Self | None" = None,
        *,
        clock: Callable[[], int],
        weight: float = 1.0,
        max_queue: int | None = None,
    ) -> None:
        super().__init__(name, parent, clock=clock, weight=weight)
        self.max_queue = max_queue
        self.children: dict[str, Account] = EMPTY_MAPPING
        #: The children's `Limiter` objects, by name, and the tenants: the same for all `Limiter`
        #: objects of this account. A tenant that was put to rest and came back has several.
        self.limiters: dict[str, Limiter] = EMPTY_MAPPING
        self.keys: Keys[Limiter] | None = None
        self.limits: dict[Key, Kept] = {}
        self.slots: Slots | None = None
        #: Calls admitted before there were slots; each counts as holding one until it ends.
        self.early_calls = 0
        #: What finds the number of slots, if it is not given.
        self.adaptive: Adaptive | None = None
        self.pause: Pause | None = None
        #: What the provider says is left, where it says so.
        self.headrooms: dict[Key, Headroom] = EMPTY_MAPPING
        #: Limits that the provider announced and nobody gave.
        self.learned: frozenset[Key] = _NO_KEYS
        #: Where the limits are kept, if not here.
        self.remote: Remote | None = None
        #: Whether its limits were changed after it was made.
        self.steered = False
        #: Whether it was put to rest; another account will stand for the same tenant.
        self.retired = False

    @property
    def belongs_to_tenant(self) -> bool:
        """Whether it belongs to a tenant."""
        return "/*" in self.name

    def add_child_locked(self, name: str, terms: Terms) -> "Account":
        """Return a new account under this one."""
        child = Account(
            f"{self.name}/{name}",
            self,
            clock=self.budget.clock,
            weight=terms.weight,
            max_queue=terms.max_queue,
        )
        self.children = self.children or {}
        self.children[child.name] = child
        return child

    def after_fork(self) -> None:
        """See `Node.after_fork`: the slots that are taken are the parent's."""
        super().after_fork()
        self.early_calls = 0
        if self.slots is not None:
            self.slots.used = 0
        for kept in self.limits.values():
            kept.window.lent = 0
        for child in self.children.values():
            child.after_fork()

    def set_limits(self, limits: list[Limit], concurrency: Concurrency | None) -> None:
        """Put limits in force, keeping what was booked under limits of the same window."""
        bounds = read_concurrency(concurrency)
        with self.budget.lock:
            now = self.budget.clock()
            changed = {limit.key: keep(limit, self.limits.get(limit.key), now) for limit in limits}
            self.limits = self.limits | changed
            if bounds is not None:
                self._set_slots_locked(bounds, fixed=is_integer(concurrency))
            self.refresh_gates_locked()

    def reconfigure(
        self, limits: list[Limit], concurrency: Concurrency | None, *, weight: float | None
    ) -> None:
        """Change limits, given or learned, and a child's weight."""
        read_concurrency(concurrency)  # report mistakes before anything is changed
        if self.remote is not None:
            self.remote.check(limits, concurrency)
        with self.budget.lock:
            self.steered = True
            self.learned -= {limit.key for limit in limits}
            if weight is not None:
                self.reweigh(weight)
        self.set_limits(limits, concurrency)
        if self.remote is not None:
            self.remote.configure()
        for limit in limits:
            self.notify_later(LimitChanged, limit=str(limit))
        if concurrency is not None and self.slots is not None:
            self.notify_later(LimitChanged, limit=f"concurrency {self.slots.size}")

    def learn(self, limit: Limit) -> None:
        """Adopt a limit that the provider announces, if none was given.

        Raises:
            ValueError: the store cannot count that far.
        """
        if self.remote is not None:
            self.remote.check([limit], None)
        with self.budget.lock:
            kept = self.limits.get(limit.key)
            if self.limits.keys() - self.learned or (kept and kept.limit.amount == limit.amount):
                return
            self.steered = True
            self.learned |= {limit.key}
        self.set_limits([limit], None)
        if self.remote is not None:
            self.remote.configure()
        self.notify_later(LimitLearned, limit=str(limit))

    def observe_remaining_locked(
        self, key: Key, remaining: int, *, limit: int | None, since: int, rounding: int
    ) -> None:
        """Take in what the provider says is left of a limit that others spend from, too."""
        kept = self.limits.get(key)
        if kept is None or self.remote is not None:
            return
        own_limit, window, _ = kept
        headroom = self.headrooms.get(key)
        if headroom is None:
            ours = window.without_open_calls()
            headroom = Headroom(own_limit, ours.entries(self.budget.clock()))
            self.headrooms = {**self.headrooms, key: headroom}
            self.refresh_gates_locked()
        headroom.update(
            remaining,
            self.budget.clock(),
            amount=own_limit.amount if limit is None else max(1, min(limit, own_limit.amount)),
            limit=limit,
            booked_since=window.booked_since(since),
            lent=window.lent,
            rounding=rounding,
        )
        self.budget.ring_locked(self)

    def pause_locked(self, until: int, *, gradually: bool) -> None:
        """Let nobody pass before ``until``, and then, if ``gradually``, few at first."""
        if self.pause is None:
            self.pause = Pause()
            self.refresh_gates_locked()
        now = self.budget.clock()
        self.pause.begin(until, now, gradually=gradually)
        if self.remote is not None:
            self.remote.pause(until - now, gradually=gradually)
        self.budget.ring_locked(self)

    def hold_added_slots_locked(self, gates: Gates) -> None:
        """Let a call through ``gates`` hold slots, here and above, that were added before it ran."""
        for account in self.path:
            slots = account.slots
            if slots is not None and account.remote is None and slots not in gates.slots:
                account.early_calls += 1
                slots.book(1, 0)

    def release_added_slot_locked(self, gates: Gates) -> bool:
        """Give back the slot of a call through ``gates`` that was in flight before there were slots."""
        slots = self.slots
        if (
            not self.early_calls
            or slots is None
            or slots in gates.slots
            or slots in gates.given_back
        ):
            return False
        self.early_calls -= 1
        slots.give_back()
        return True

    def resize_locked(self) -> None:
        """Adopt the number of slots that was found, and admit the calls that it lets in."""
        assert self.adaptive is not None
        assert self.slots is not None
        larger = self.adaptive.size > self.slots.size
        self.slots.reshape(size=self.adaptive.size)
        if larger and self.budget.waiting:
            self.budget.ring_locked(self)

    def refresh_gates_locked(self) -> None:
        """Send newcomers and those who wait through the meters as they are now."""
        self.forget_gates()
        if self.waiting:
            self.budget.recheck_waiters_locked(_check)

    def make_gates(self) -> Gates:
        """See `Node.make_gates`."""
        return Gates(self._meters(), tuple(kept.limit for kept in self.limits.values()))

    def forget_path_gates(self) -> None:
        """See `Node.forget_path_gates`; the meters above the children have changed, too."""
        super().forget_path_gates()
        for child in self.children.values():
            child.forget_path_gates()

    def check_locked(self, amounts: Amounts) -> None:
        """Refuse a cost that can never pass, here or above.

        Raises:
            CostExceedsLimit: it costs more than a limit.
        """
        for account in self.path:
            for key, (limit, *_) in account.limits.items():
                amount = amounts.get(limit.resource, 0)
                if amount > limit.amount:
                    remedy = f"raise {limit.keyword or 'the limit'} or split the request"
                    if key in account.learned:
                        remedy = "the provider announced that limit, so split the request"
                    raise CostExceedsLimit(
                        f"cost of {counted(amount, limit.resource)} exceeds the limit of {limit} "
                        f"and can never pass; {remedy}"
                    )

    def resources(self) -> set[str]:
        """Return the resources that are limited, here or above."""
        return {resource for account in self.path for resource, _ in account.limits}

    def check_known(self, names: Iterable[str]) -> None:
        """Refuse resources that nothing counts, here or above.

        Raises:
            TypeError: there is one among ``names``.
        """
        known = COMMON | self.resources()
        unknown = sorted(set(names) - known)
        if unknown:
            raise TypeError(
                f"no limit counts {', '.join(unknown)}: this limiter counts "
                f"{', '.join(sorted(known))}"
            )

    def use_locked(self) -> Iterator[LimitUse]:
        """Yield how much of each limit is used."""
        now = self.budget.clock()
        if self.remote is not None:
            yield from self.remote.use()
            return
        for key, (limit, window, bucket) in self.limits.items():
            meters = [meter for meter in (window, bucket, self.headrooms.get(key)) if meter]
            available = min(meter.available(now) for meter in meters)
            yield LimitUse(limit, used=window.used, available=available)

    def _set_slots_locked(self, bounds: tuple[int, int], *, fixed: bool) -> None:
        """Set a fixed number of slots, or search for one, on from where an earlier search is."""
        size = bounds[0]
        if fixed:
            self.adaptive = None
        else:
            start = {} if self.adaptive is None else {"start": self.adaptive.size}
            self.adaptive = Adaptive(least=bounds[0], most=bounds[1], **start)
            size = self.adaptive.size
        if self.slots is None:
            self.slots = Slots(size=size)
            self.early_calls = self.in_flight
            self.slots.book(self.early_calls, 0)
        else:
            self.slots.reshape(size=size)

    def _meters(self) -> Iterator[tuple[Meter, str]]:
        """Yield each meter with what it counts; a bucket follows its window: see `Gates.soonest`."""
        if self.pause is not None:
            yield self.pause, "concurrency"  # each call takes one of it
        if self.remote is not None:
            return
        if self.slots is not None:
            yield self.slots, "concurrency"
        for limit, window, bucket in self.limits.values():
            yield window, limit.resource
            if bucket is not None:
                yield bucket, limit.resource
        for (resource, _), headroom in self.headrooms.items():
            yield headroom, resource

    def binding_locked(self) -> str | None:
        """Return what holds up the next call, if anybody waits here."""
        if not self.waiting:
            return None
        remote = self.path[-1].remote
        known = None if remote is None else remote.held_up()
        in_store = None if known is None else known[0]
        pacers = self.budget.pacers.values()
        local = next(filter(None, (pacer.queue.binding(self) for pacer in pacers)), None)
        # At the root the store's answer comes first, as it keeps these limits; below, the child's.
        bound = (in_store or local) if self.parent is None else (local or in_store)
        return bound or next(filter(None, (pacer.bound_by for pacer in pacers)), None)


def _check(waiter: Waiter) -> None:
    assert isinstance(waiter.node, Account)
    waiter.node.check_locked(waiter.amounts)
