"""A limiter's own state: its limits in force, what its calls have done, and its place in the tree.

Limiters form a tree, and all of them are alike: a root, a child, a tenant. A call passes the meters
of its own node and of all those above it at once, or none. A slot is no meter but an open call:
every node counts its calls in flight, whether or not their number is bounded. So a bound that comes
later counts them, too.

There may be thousands of idle children. What a call passes is therefore worked out when the first
one comes (`Node.route`), and forgotten when limits change here or above.
"""

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from asyncbucket.engine.cost import COMMON
from asyncbucket.engine.errors import CostExceedsLimit
from asyncbucket.engine.events import Event, Observers, Outcome
from asyncbucket.engine.interfaces import Account, Admission, Order, PauseMeter, Place, Sizer
from asyncbucket.engine.limits import Key, Limit
from asyncbucket.engine.meters import NEVER, Amounts, Meter, Meters, Route, Slots, Window, admit
from asyncbucket.engine.wording import counted

#: An empty mapping: most of ten thousand idle limiters need no container of their own.
EMPTY_MAPPING: Final[Any] = MappingProxyType({})
#: Windows more than this many times longer than the shortest do not affect who goes next.
_LONG: Final = 100


class Standing:
    """Know how the calls of a limiter, and of those below it, stand in line; and on what terms."""

    __slots__ = ("branches", "lines", "max_queue", "order", "waiting", "weight", "within")

    def __init__(self) -> None:
        #: How many calls wait, and at most may.
        self.waiting = 0
        self.max_queue: int | None = None
        #: Its share compared with its siblings'; and whether its calls' priorities count among themselves alone.
        self.weight, self.within = 1.0, False
        #: Where its calls wait, by priority: see `asyncbucket.engine.queue`; and what orders them, if
        #: not their arrival.
        self.lines: dict[int, Any] = EMPTY_MAPPING
        self.branches: dict[int, Any] = EMPTY_MAPPING
        self.order: Order | None = None

    def after_fork(self) -> None:
        """Forget calls that wait: they are the parent's."""
        self.waiting, self.order = 0, None
        self.lines = self.branches = EMPTY_MAPPING


class Tally:
    """Count what has happened to the calls of a limiter besides being admitted."""

    __slots__ = ("counts", "refunded", "waits")

    def __init__(self) -> None:
        #: How often something else happened, by its name in `Statistics` or `CacheUse`.
        self.counts: Counter[str] = Counter()
        #: Units given back by settling, by resource.
        self.refunded: Counter[str] = Counter()
        #: How many calls waited, and how long (ns) in total, by what bound them.
        self.waits: dict[str, list[int]] = {}


class Node:
    """Keep the limits of one limiter in force, count its calls, and know those above it.

    Everything is read and written with the pacer's lock held, unless it says otherwise.
    """

    # What most limiters never set:
    children: "weakref.WeakSet[Node] | None" = None
    observers: Observers | None = None
    #: What finds the number of slots, if it is not given.
    sizer: Sizer | None = None
    #: What keeps its limits, once it has some: see `place`.
    keeper: Place | None = None
    #: Called before it is forgotten, if it was let go.
    on_finalize: "Callable[[Node], object] | None" = None
    #: If a root has it, every call of the tree passes at once, and only this account hears of it.
    bystander: Account | None = None
    #: If its calls may pass in any of several trees: its nodes there. Each counts for itself, and
    #: what it has in common with the others counts once, here: see `add_ways`.
    ways: "tuple[Node, ...]" = ()
    common: "Node | None" = None

    def __init__(self, name: str, parent: "Node | None" = None, *, pacer: Any = None) -> None:
        self.name, self.parent = name, parent
        #: The `asyncbucket.engine.pacer.Pacer` of the tree, which stands on nodes.
        self.pacer: Any = pacer if parent is None else parent.pacer
        if parent is not None:
            if parent.children is None:
                parent.children = weakref.WeakSet()
            parent.children.add(self)
        self.limits: dict[Key, Window] = EMPTY_MAPPING
        #: Meters that hold calls back besides the limits: a pause, what the provider says is left.
        self.extra: Meters = ()
        self.slots, self.standing = Slots(), Standing()

    def add_ways(self, ways: "Iterable[Node]") -> None:
        """Have the calls of ``ways``, nodes of other trees, pass the limits here and above, too."""
        self.ways = tuple(ways)
        for way in self.ways:
            way.common = self
            vars(way).pop("path", None)

    @cached_property
    def path(self) -> "tuple[Node, ...]":
        """All nodes at which its calls count: those above it, and what they have in common with others."""
        common = () if self.common is None else (self.common,)
        return (*common, self, *(() if self.parent is None else self.parent.path))

    @cached_property
    def chain(self) -> "tuple[Node, ...]":
        """This node and those above it in its tree, up to the root."""
        return (self,) if self.parent is None else (self, *self.parent.chain)

    def able(self, amounts: Amounts) -> "tuple[Node, ...]":
        """Return the ways where such a call can ever pass."""
        for resource, most in self.least.items():
            if amounts.get(resource, 0) > most:
                return tuple(way for way in self.ways if way.exceeded(amounts) is None)
        return self.ways

    @cached_property
    def least(self) -> dict[str, int]:
        """The most that one call may cost of each resource wherever it passes."""
        least: dict[str, int] = {}
        for way in self.ways:
            for resource, most in way.route.most.items():
                least[resource] = min(most, least.get(resource, most))
        return least

    @cached_property
    def own(self) -> Route:
        """What a call passes here alone; of several ways, also what they have in common."""
        windows = ((window, window.limit.resource) for window in self.limits.values())
        common = Route((), ()) if self.common is None else self.common.own
        is_bound_here = self.slots.most < NEVER and self.place is None
        return Route(
            (self.slots, *common.levels),
            (*windows, *self.extra, *common.meters),
            bounded=(*((self.slots,) if is_bound_here else ()), *common.bounded),
        )

    @cached_property
    def route(self) -> Route:
        """What a call passes in all, from here up to the root."""
        levels = tuple(node.slots for node in self.path)
        above = None if self.parent is None else self.parent.route  # so that it forgets, too
        if self.path[-1].bystander is not None:
            return Route(levels, ())
        is_limited = any(node.limits for node in self._here)
        return Route(
            levels,
            (*self.own.meters, *(above.meters if above else ())),
            bounded=(*self.own.bounded, *(above.bounded if above else ())),
            most=above.most if above and not is_limited else self._most(),
            seconds=above.seconds if above and not is_limited else self._seconds(),
        )

    @cached_property
    def accounts(self) -> tuple[Account, ...]:
        """What is told of each call that passes here, whoever makes it."""
        bystander = self.path[-1].bystander
        if bystander is not None:
            return (bystander,)
        sizers = (_Sized(node) for node in self._here if node.sizer is not None)
        above = () if self.parent is None else self.parent.accounts
        return (*sizers, *((self.place,) if self.place else ()), *above)

    @property
    def _here(self) -> "tuple[Node, ...]":
        """This node, and what it has in common with others."""
        return (self,) if self.common is None else (self, self.common)

    def _most(self) -> dict[str, int]:
        most: dict[str, int] = {}
        for node in self.path:
            for window in node.limits.values():
                resource, units = window.limit.resource, window.units
                if window.refuses:
                    most[resource] = min(units, most.get(resource, units))
        return most

    def _seconds(self) -> dict[str, float]:
        rates: dict[str, float] = {}  # of all ways together
        for way in self.path[-1].ways:
            for resource, each in way.route.seconds.items():
                rates[resource] = rates.get(resource, 0.0) + 1 / each
        seconds = {resource: 1 / rate for resource, rate in rates.items()}
        for limit in self.short_limits():
            each = limit.per / limit.units
            seconds[limit.resource] = min(each, seconds.get(limit.resource, each))
        return seconds

    def short_limits(self) -> list[Limit]:
        """Return the limits, here and above, that bind from call to call: none over far longer windows."""
        limits = [window.limit for node in self.path for window in node.limits.values()]
        longest = _LONG * min((limit.per for limit in limits), default=0)
        return [limit for limit in limits if limit.per <= longest]

    def beside(self, key: Key) -> list[Meter]:
        """Return what learns how the provider counts the limit with that key."""
        return [meter for meter, _ in self.extra if meter.key == key]

    def forget(self) -> None:
        """Work everything out again when next asked, here and below, because meters have changed."""
        known = vars(self).keys() & {"route", "accounts"}
        for name in ("own", "least", *known):
            vars(self).pop(name, None)
        for way in self.ways:
            way.forget()
        if not known and not self.ways:  # so nothing below either
            return
        for child in self.children or ():
            child.forget()

    @property
    def concurrency(self) -> int | None:
        """The most calls in flight at once, as it is now; None if unbounded."""
        return None if self.slots.most >= NEVER else self.slots.most

    @property
    def place(self) -> Place | None:
        """What keeps its limits and slots (`asyncbucket.engine.interfaces.Place`), if a store does."""
        if self.parent is None:
            root: Place | None = self.pacer.place
            return root
        return self.keeper if self.keeper and (self.limits or self.slots.most < NEVER) else None

    @property
    def places(self) -> Iterator[Place]:
        """What keeps limits and slots here and above, from here up to the root."""
        return filter(None, (node.place for node in self.chain))

    # --- what its calls pass ---

    def earliest(self, amounts: Amounts, now: int) -> tuple[int, str | None]:
        """Return from when on a newcomer could pass, here and above, and what binds."""
        return admit(self.route, amounts, now, now, book=False)

    def pauses(self) -> "Iterator[PauseMeter]":
        """Yield the pause of this limiter itself, if there has been one."""
        yield from (meter for meter, _ in self.extra if isinstance(meter, PauseMeter))

    def why_paused(self) -> str:
        """Return the reason of the pause that ends last, here or above, in brackets; "" if none has one."""
        pauses = [each for node in self.path for each in node.pauses() if each.reason]
        return f" ({max(pauses, key=lambda pause: pause.until).reason})" if pauses else ""

    def soonest(self, amounts: Amounts, now: int, *, is_first: bool = True) -> int:
        """Return a lower bound of when a call can pass: if open calls gave back all they may.

        Unless it ``is_first``, it may inherit what the head of the line has earned.
        """
        if self.ways:
            return min((way.soonest(amounts, now) for way in self.able(amounts)), default=NEVER)
        soonest = now
        since = now if is_first and not self.standing.waiting else 0
        for node in self.path:
            for window in node.limits.values():
                amount = amounts.get(window.limit.resource)
                if amount:
                    back = window.lent(node.slots.in_flight)
                    soonest = max(soonest, window.earliest(amount, since, back=back))
            for meter, resource in node.extra:
                if amounts.get(resource):
                    soonest = max(soonest, meter.earliest(amounts[resource], now, back=NEVER))
        return soonest

    def work(self, amounts: Amounts) -> float:
        """Return how much work a call is here: the largest part, in seconds, that it takes of any limit.

        6,000 tokens of 60,000 a minute are six seconds. Of several limits of one resource, the
        fastest counts, because it binds from call to call; limits over a day do not count beside
        limits over a minute. Without any limit a call costs one.
        """
        per_unit, work = self.route.seconds, 0.0
        if not per_unit:
            return 1.0
        for resource, seconds in per_unit.items():
            part = amounts.get(resource, 0) * seconds
            if part > work:  # noqa: PLR1730 - `max` would be a call
                work = part
        return work

    # --- limits in force ---

    def set_limits(self, limits: Iterable[Limit], now: int, *, learned: bool = False) -> None:
        """Put limits in force, with what was booked under limits of the same window."""
        changed = dict(self.limits)
        for limit in limits:
            window = changed.get(limit.key)
            if window is None:
                window = changed[limit.key] = Window(limit, wall=self.pacer.wall)
            else:
                allowed = max(window.allowed, limit.units)
                window.reshape(limit, now)
                window.allowed = allowed  # lowering a limit puts nobody into debt
            window.refuses = not learned
        self.limits = changed
        self.extra = tuple((meter.renewed(changed), counts) for meter, counts in self.extra)

    def exceeded(self, amounts: Amounts) -> Limit | None:
        """Return a limit, here or above, that such a call exceeds, so that it can never pass."""
        for resource, most in self.route.most.items():
            if amounts.get(resource, 0) > most:
                break
        else:
            return None
        limits = (each.limit for node in self.path for each in node.limits.values() if each.refuses)
        return next(each for each in limits if amounts.get(each.resource, 0) > each.units)

    def check(self, amounts: Amounts) -> None:
        """Refuse a cost that can never pass, here or above.

        Raises:
            CostExceedsLimit: it costs more than a limit.
        """
        limit = self.exceeded(amounts)
        if limit is None:
            self._check_ways(amounts)
            return
        amount = amounts[limit.resource]
        raise CostExceedsLimit(
            f"cost of {counted(amount, limit.resource)} exceeds the limit of {limit} and can never "
            f"pass; raise {limit.keyword or 'the limit'} or split the request"
        )

    def _check_ways(self, amounts: Amounts) -> None:
        if not self.ways or self.able(amounts):
            return
        exceeded = {way.path[-1].name: way.exceeded(amounts) for way in self.ways}
        resources = dict.fromkeys(limit.resource for limit in exceeded.values() if limit)
        cost = ", ".join(counted(amounts[each], each) for each in resources)
        limits = ", ".join(f"{limit} at {name!r}" for name, limit in exceeded.items())
        raise CostExceedsLimit(
            f"cost of {cost} exceeds a limit everywhere ({limits}) and can never pass; raise one of "
            f"them or split the request"
        )

    def resources(self) -> set[str]:
        """Return the resources that are limited, here or above, on any way."""
        paths = [self.path, *(way.path for way in self.ways)]
        return {resource for path in paths for node in path for resource, _ in node.limits}

    def check_known(self, names: Iterable[str]) -> None:
        """Refuse resources that nothing counts, here or above.

        Raises:
            TypeError: there is one among ``names``.
        """
        others = set(names) - COMMON
        if others and not others <= self.resources():
            known = COMMON | self.resources()
            raise TypeError(
                f"no limit counts {', '.join(sorted(others - known))}: this limiter counts "
                f"{', '.join(sorted(known))}"
            )

    # --- what happened ---

    @cached_property
    def tally(self) -> Tally:
        """What has happened so far to its calls."""
        return Tally()

    def count(self, what: str, number: int = 1) -> None:
        """Count what has happened to a call, here and above."""
        for node in self.path:
            node.tally.counts[what] += number

    def count_waits(self, calls: int, waited: int, bound_by: str) -> None:
        """Count ``calls`` calls that waited ``waited`` ns in all, here and above."""
        for node in self.path:
            sums = node.tally.waits.setdefault(bound_by, [0, 0])
            sums[0] += calls
            sums[1] += waited

    def count_refund(self, resource: str, units: int) -> None:
        """Count units that were given back, here and above."""
        for node in self.path:
            node.tally.refunded[resource] += units

    def is_as_new(self, now: int) -> bool:
        """Tell whether a limiter made anew would do the same, so that this one may be forgotten."""
        return (
            not (self.slots.in_flight or self.standing.waiting or self.children or self.observers)
            and (self.keeper is None or self.keeper.is_idle())
            and not (self.standing.order and self.standing.order.applies)
            and all(each.refuses and each.is_as_new(now) for each in self.limits.values())
            and all(meter.available(now) >= NEVER for meter, _ in self.extra)
        )

    def emit(self, event: Event) -> None:
        """Tell observers, here and above; without the lock."""
        for node in reversed(self.path):
            if node.observers is not None:
                node.observers.emit(event)

    def __del__(self) -> None:
        if self.on_finalize is not None:
            self.on_finalize(self)

    def after_fork(self) -> None:
        """Start afresh in a child process: calls that wait or are in flight are the parent's."""
        self.slots.in_flight = 0
        self.standing.after_fork()
        for child in self.children or ():
            child.after_fork()


class _Sized(Account):
    """Tell what finds a node's number of slots how calls end."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    def ended(self, lease: Admission, outcome: Outcome) -> None:
        node = self._node
        slots = node.slots
        if node.sizer is None or slots not in lease.levels:
            return  # it has a fixed number now, or the call has given its slot up
        node.sizer.ended(
            outcome,
            started=lease.began(outcome),
            now=node.pacer.clock(),
            waited=lease.bound_by == "concurrency",
            full=slots.in_flight >= slots.most,
        )
        before, slots.most = slots.most, node.sizer.size
        if slots.most > before:
            node.pacer.ring_locked(node)


def shown_name(name: str) -> str:
    """Return a limiter's name as others may see it: with a star instead of a tenant."""
    return re.sub(r"/\*[^/]*", "/*", name) if "/*" in name else name
