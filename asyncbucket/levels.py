"""What adapters ask of a limiter: a call counts at each level, and one of them is the provider's."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from asyncbucket.budgets import Budget, Charge
from asyncbucket.engine.context import inherited, nanoseconds
from asyncbucket.engine.cost import rounded_up
from asyncbucket.engine.events import BeliefChanged, Event, PromptCached
from asyncbucket.engine.interfaces import PauseMeter
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Window
from asyncbucket.engine.node import Node
from asyncbucket.engine.node import shown_name as _shown_name
from asyncbucket.engine.wording import USD

_log: Final = logging.getLogger("asyncbucket")
_LOWER: Final = "limiter %r is told %s, but the provider announces %s: set the lower limit"
T = TypeVar("T")

# The face of the core's private parts.
# ruff: noqa: SLF001


def levels(limiter: Limiter) -> Iterator[Limiter]:
    """Yield ``limiter`` and those above it, up to the root."""
    level: Limiter | None = limiter
    while level is not None:
        yield level
        level = level.parent


def shared(cls: Callable[[Limiter], T], limiter: Limiter, name: str) -> T:
    """Return what all who use ``limiter`` share of a kind: ``cls(limiter)``, made once and kept as ``name``."""
    kept: dict[str, Any] = vars(limiter)
    found: T = kept.get(name) or kept.setdefault(name, cls(limiter))
    return found


def root_of(limiter: Limiter) -> Limiter:
    """Return the limiter above all those above ``limiter``; itself if there is none."""
    return [*levels(limiter)][-1]


def ways(limiter: Limiter) -> list[tuple[Node, ...]]:
    """Return the nodes that a call here passes: on the only way, or on one through each pool member."""
    return _ways(limiter._node)


def _ways(node: Node) -> list[tuple[Node, ...]]:
    return [way.path for way in node.ways] or [node.path]


def members_of(limiter: Limiter) -> tuple[Limiter, ...]:
    """Return the members of a pool; none of any other limiter, nor of one below a pool."""
    return () if limiter.parent is not None else getattr(limiter, "members", ())


def _passed(limiter: Limiter) -> set[Node]:
    return {node for way in ways(limiter) for node in way}


def is_under(limiter: Limiter, other: Limiter) -> bool:
    """Tell whether what ``limiter`` admits also counts at ``other``, or may, if that is in its pool."""
    return any(other._node in way for way in ways(limiter))


def counts_at(lease: Lease, limiter: Limiter) -> bool:
    """Tell whether an admitted call counts at ``limiter``."""
    return limiter._node in lease._node.path


def share_a_level(limiter: Limiter, other: Limiter) -> bool:
    """Tell whether calls of both may count at one limiter, be it only the root."""
    return not _passed(limiter).isdisjoint(_passed(other))


def on_one_path(limiter: Limiter, other: Limiter) -> bool:
    """Tell whether a call of one of these limiters counts at the other, too.

    Then a lease of each would be two for the same call: if there is only one slot, the call would
    wait for itself.
    """
    return is_under(limiter, other) or is_under(other, limiter)


def provider_of(limiter: Limiter) -> Limiter:
    """Return the level whose limits are the provider's own: the highest with any limits.

    What a provider says of its limits, in a header or a refusal, concerns everything below that
    level. Levels above it have no limits of their own; they only group several providers.
    """
    path = list(levels(limiter))
    return next((level for level in reversed(path) if level.limits), path[-1])


class InForce(NamedTuple):
    """The limits that calls of a limiter meet: its own, and those of the levels above."""

    #: The routes that calls take, by which a change shows.
    routes: list[Any]
    #: The units of each limit on each of the `ways` of a call, by resource.
    by_way: list[list[tuple[str, int]]]
    limits: tuple[Limit, ...]
    resources: frozenset[str]

    def counts(self, resource: str) -> bool:
        """Tell whether one of them, or a budget around this code, counts ``resource``."""
        return resource in self.resources or resource in capped()


def excess_of(cost: Mapping[str, int], by_way: Iterable[Iterable[tuple[str, int]]]) -> int:
    """Return by how much ``cost`` exceeds what the limits of any way can ever admit."""
    least = None
    for limits in by_way:
        excess = 0
        for resource, units in limits:
            excess = max(excess, cost.get(resource, 0) - units)
        least = excess if least is None else min(least, excess)
    return least or 0


def excess_at(lease: Lease, cost: Mapping[str, int]) -> int:
    """Return by how much ``cost`` exceeds what the limits that ``lease`` meets can ever admit."""
    return excess_of(cost, map(_units, map(_limits, _ways(lease._node))))


def _limits(way: Iterable[Node]) -> list[Limit]:
    """Return the limits on one of the `ways` of a call."""
    return [window.limit for node in way for window in tuple(node.limits.values())]


def _units(limits: Iterable[Limit]) -> list[tuple[str, int]]:
    return [(limit.resource, limit.units) for limit in limits]


def in_force(limiter: Limiter) -> InForce:
    """Return the limits that hold for calls of ``limiter``, worked out anew when they change."""
    node, known = limiter._node, vars(limiter).get("_in_force")
    # Not `node.route`, which would work it out, and that needs the lock.
    routes = [vars(each).get("route") for each in node.ways or (node,)]
    # By identity: a window may get another limit, and is equal to itself.
    if known is not None and [*map(id, known.routes)] == [*map(id, routes)]:
        found: InForce = known
        return found
    limits = [*map(_limits, ways(limiter))]
    every = tuple(limit for way in limits for limit in way)
    units = [*map(_units, limits)]
    found = InForce(routes, units, every, frozenset(limit.resource for limit in every))
    if None not in routes:
        vars(limiter)["_in_force"] = found
    return found


def capped() -> set[str]:
    """Return the resources of which budgets around this code cap the use."""
    context = inherited.get()
    if context is None or not context.payers:
        return set()
    return {name for each in context.payers if isinstance(each, Budget) for name in each.cap}


def count_unpriced_call() -> None:
    """Tell the budgets around this code of a call that is refused because nobody knows its price."""
    context = inherited.get()
    payers = () if context is None else context.payers
    for each in [payer for payer in payers if isinstance(payer, Budget)]:
        each.cannot_price()


def is_in_shadow(limiter: Limiter) -> bool:
    """Tell whether its calls pass at once, as if there were no limiter."""
    return limiter._node.path[-1].bystander is not None


def prices_of(limiter: Limiter) -> Mapping[str, Any]:
    """Return the prices that the root of ``limiter`` was given."""
    prices: Mapping[str, Any] = getattr(root_of(limiter), "_prices", {})
    return prices


def can_give_slots_up(limiter: Limiter) -> bool:
    """Tell whether this limiter, or one above, can answer a refusal by reducing its slots."""
    sizers = (node.sizer for node in limiter._node.path)
    return any(sizer and sizer.size > sizer.least for sizer in sizers)


def is_trying_slots(lease: Lease) -> bool:
    """Tell whether a larger number of slots is being tried at a level of this call."""
    return any(node.sizer.is_trying for node in lease._node.path if node.sizer)


def effective_limiter(limiter: Limiter) -> Limiter:
    """Return the limiter that admits a call here: this one, or the tenant's inside `tenant`."""
    context = inherited.get()
    return limiter if context is None else limiter._limiter_for(None, context)


def give_back(lease: Lease, limiter: Limiter) -> None:
    """Have ``lease`` give up the slots that a call of ``limiter`` from this context may need.

    A tool or a model that calls another model does nothing itself meanwhile, yet holds a slot. If
    both pass the same limiter, be it only the root, the inner call may be waiting for that very
    slot. So the outer call gives up its slots at the levels that both pass, for good. At the others
    it keeps them.
    """
    lease._node.pacer.lock.do(lease._give_up_slots_locked, _passed(effective_limiter(limiter)))


def sent(lease: Lease) -> None:
    """Date the cost of a call to now, because it leaves only now; see `Lease`."""
    lease._sent()


async def reserve_more(lease: Lease, more: Mapping[str, float], *, blocking: bool) -> None:
    """Have the budgets around an admitted call pay for a further request of it.

    Raises:
        BudgetExceeded: one cannot, so the request must not be sent.
    """
    amounts = {name: rounded_up(amount, name) for name, amount in more.items()}
    charges = [each for each in lease.accounts if isinstance(each, Charge)]
    for number, charge in enumerate(charges):
        error = charge.reserve(amounts)
        while error is not None and await charge.reconsiders(error, blocking=blocking):
            error = charge.reserve(amounts)
        if error is not None:
            for paid in charges[:number]:
                paid.give_back(amounts)
            raise error


def admitted_now(lease: Lease) -> bool:
    """Take everything that a call needs if it needn't wait; return whether it needn't."""
    return not lease.accounts and lease._try_now()


def admit_here(lease: Lease) -> Lease:
    """Block this thread until ``lease`` is admitted."""
    if not admitted_now(lease):
        lease._block()
    return lease


def amounts_of(lease: Lease) -> Mapping[str, int]:
    """Return what a call is charged, without a copy."""
    return lease._amounts


def reprice(lease: Lease, amounts: Mapping[str, int]) -> None:
    """Have a call that is not admitted yet cost ``amounts`` instead, in its place in line.

    If a store keeps the limits, it has been asked once the call waits, so nothing changes then.
    """
    lease._reprice(amounts)


def count_cached(lease: Lease, *, read: bool, written: bool, saved: int) -> None:
    """Count a call whose prompt was read from its provider's cache, or written to it.

    ``saved`` tokens were read and not counted by the limits.
    """
    lease._node.pacer.lock.do_and_tell(_count_cached_locked, lease._node, read, written, saved)


def _count_cached_locked(node: Node, read: bool, written: bool, saved: int) -> None:  # noqa: FBT001
    if read:
        node.count("reads")
    if written:
        node.count("writes")
    if saved:
        node.count("saved_tokens", saved)
    node.pacer.notify_locked(node, PromptCached, read=read, written=written, saved_tokens=saved)


def left_at(lease: Lease) -> float:
    """Return when a call was sent, or else admitted, in seconds of the limiter's clock."""
    return lease.began("ok") * 1e-9


def undo(lease: Lease) -> None:
    """Give everything back, as if the call had never been: it was not made."""
    lease._undo()


def emit(limiter: Limiter, event: Event) -> None:
    """Send an adapter's event to the observers."""
    limiter._node.emit(event)


def is_learning(limiter: Limiter) -> bool:
    """Tell whether a limit of ``limiter`` learns how its provider counts."""
    return any(meter.learns for meter, _ in limiter._node.extra)


def meet_provider(limiter: Limiter) -> None:
    """Have the limits of ``limiter`` learn how its provider counts them, from the first call on."""
    node = limiter._node
    with node.pacer.lock:
        if node.place is None:
            for window in node.limits.values():
                if window.limit.resource != USD:
                    find_provider_meter(node, window)


def observe_remaining(  # noqa: PLR0913 - what a reply says, each by keyword
    limiter: Limiter,
    remaining: int,
    *,
    resource: str,
    per: float,
    limit: int | None = None,
    since: float | None = None,
    own: int = 0,
    rounding: int = 0,
    full_in: tuple[int, int] | None = None,
) -> None:
    """Take in what the provider says is left of a limit.

    It is ignored if ``limiter`` does not limit that window, or if a store keeps its limits.
    Transports call this; `asyncbucket.feedback.provider_meter` explains what happens then.

    Args:
        limiter: the level whose limits are the provider's.
        remaining: units left.
        resource: what the units count, such as ``"tokens"``.
        per: the window of the limit, in seconds.
        limit: the provider's own limit, if it says.
        since: when the call with this answer was sent, in seconds of the limiter's clock; calls
            sent later may or may not be counted in ``remaining`` yet.
        own: what that call itself has booked: it is counted.
        rounding: by how many units ``remaining`` may have been rounded down.
        full_in: in how many nanoseconds all is back, if the provider says, and by how many that may
            be off.
    """
    node = limiter._node
    pacer = node.pacer
    with pacer.lock:
        now = pacer.clock()
        window = node.limits.get((resource, per))
        if window is None or node.place is not None:
            return
        meter = find_provider_meter(node, window)
        before, was_alone = meter.announced, meter.is_alone
        is_news = meter.heard(
            remaining,
            now,
            limit=limit,
            since=None if since is None else nanoseconds(since, "since"),
            own=own,
            rounding=rounding,
            full_in=full_in,
        )
        if is_news or meter.is_alone != was_alone:
            if meter.is_law:
                # In shadow the meter sees calls that pass at once, so it cannot decide.
                window.give_way(meter.bucket() if is_in_shadow(limiter) else None)
            else:
                window.reshape(window.limit, now, paced=meter.keeps_pace)
            _tell_belief(node, meter)
        if meter.announced < min(before, window.units):
            told = _shown_name(node.name), str(window.limit), f"{meter.announced:,}"
            pacer.lock.news.append(partial(_log.warning, _LOWER, *told))
        pacer.ring_locked(node, now)


def call_accepted(lease: Lease) -> None:
    """Tell what learns how a provider counts that it has accepted a call."""
    when = lease.began("ok")
    meters: Any = lease._route.meters
    moved = [meter for meter, _ in meters if meter.learns and meter.is_moved_by(when)]
    if moved:
        node = lease._node
        with node.pacer.lock:
            now = node.pacer.clock()
            for meter in moved:
                meter.accepted(when, now)
            node.pacer.ring_locked(node, now)


def calls_with_room(lease: Lease, limiter: Limiter) -> int:
    """Return how many calls are in flight, if the provider's reply to this one shows room for it."""
    node = limiter._node
    with node.pacer.lock:
        now = node.pacer.clock()
        learning: list[Any] = [pair for pair in node.extra if pair[0].learns]
        room = {meter.has_room(lease._amounts.get(name, 0), now) for meter, name in learning}
    return node.slots.in_flight if True in room and False not in room else 0


def call_refused(lease: Lease, limiter: Limiter, resource: str | None) -> None:
    """Tell what learns how the provider of ``limiter`` counts that it has refused a call for rate.

    That is blamed on the limit of ``resource``, if the provider names it, or else on the one that
    came closest to what is known to pass. If nothing limits the calls, the number of slots is found.
    """
    node, when = limiter._node, lease.began("ok")
    if not (node.limits or limiter.concurrency or node.place or is_in_shadow(limiter)):
        limiter.reconfigure(concurrency="auto")
    meet_provider(limiter)
    with node.pacer.lock:
        passed: list[Any] = [pair for pair in node.extra if pair in lease._route.meters]
        learning = [pair for pair in passed if pair[0].learns]
        now, amounts = node.pacer.clock(), lease._amounts
        empty = [
            pair for pair in learning if pair[0].has_room(amounts.get(pair[1], 0), now) is False
        ]
        blamed = [pair for pair in learning if pair[1] == resource] or empty or learning
        if blamed:
            meter, counts = max(blamed, key=lambda pair: pair[0].pressure(when))
            if meter.refused(amounts.get(counts, 0), when, now):
                _tell_belief(node, meter)


def _tell_belief(node: Node, meter: Any) -> None:
    """Tell observers what is believed now of how the provider counts a limit."""
    if node.pacer.observed:
        belief, words = meter.belief, "it is not known how the provider counts"
        if belief is not None:
            words = belief.words(meter.limit)
        node.pacer.notify_locked(node, BeliefChanged, limit=str(meter.limit), belief=words)


def shown_name(limiter: Limiter) -> str:
    """Return the name that others may see: with a star instead of a tenant."""
    return _shown_name(limiter.name)


def terms_of(limiter: Limiter) -> dict[str, Any]:
    """Return what ``limiter`` was made with besides its name and limits."""
    node, sizer = limiter._node, limiter._node.sizer
    terms: dict[str, Any] = {
        "concurrency": limiter.concurrency if sizer is None else (sizer.least, sizer.most),
        "max_queue": limiter.max_queue,
        "timeout": limiter._timeout,
    }
    if limiter.parent is not None:
        return terms | {"weight": node.standing.weight, "priority": limiter._priority}
    place = node.pacer.place
    if prices := prices_of(limiter):
        terms["prices"] = prices
    return terms if place is None else terms | place.options()


def find_provider_meter(node: Node, window: Window) -> Any:
    """Return what is known of how a provider counts a limit; with the lock held."""
    from asyncbucket.feedback.provider_meter import ProviderMeter

    for meter in node.beside(window.limit.key):
        return meter
    began = 0 if window.was_used else node.pacer.clock()
    found = ProviderMeter.of(window, began)
    node.extra = (*node.extra, (found, window.limit.resource))
    node.pacer.limits_changed_locked(node)
    return found


def find_pause(node: Node) -> PauseMeter:
    """Return the pause of a limiter, made at the first one; with the lock held."""
    from asyncbucket.feedback.pause import Pause

    for found in node.pauses():
        return found
    pause = Pause()
    node.extra = ((pause, "concurrency"), *node.extra)  # each call takes one of it
    node.pacer.limits_changed_locked(node)
    return pause
