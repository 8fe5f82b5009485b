"""What a limiter tells: why it refuses a call, and what it has done so far.

An error says what binds, for how long, and the remedy. It asks the same function and the same store
as whoever admits calls.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from asyncbucket.engine.cost import Cost
from asyncbucket.engine.errors import (
    AcquireTimeout,
    AsyncBucketError,
    CostExceedsLimit,
    QueueFull,
    WouldBlock,
)
from asyncbucket.engine.events import Refused
from asyncbucket.engine.meters import NEVER, Amounts, admit
from asyncbucket.engine.node import Node
from asyncbucket.engine.statistics import CacheUse, LimitUse, Statistics, Waits
from asyncbucket.engine.wording import counted, in_seconds, with_verb

if TYPE_CHECKING:
    from asyncbucket.engine.pacer import Pacer
    from asyncbucket.engine.queue import Flow

Refusal = TypeVar("Refusal", WouldBlock, AcquireTimeout, QueueFull)
_AT_ONCE: Final = "cannot pass without waiting"
_WAIT: Final = "wait with acquire()"
#: If more wait, so many of them stand for all.
_SAMPLE: Final = 20
#: A deadline further back (ns) than this was probably meant as seconds from now.
_LONG_PAST: Final = 1_000_000_000
REFUSALS: Final = (WouldBlock, AcquireTimeout, QueueFull, CostExceedsLimit)


# --- refusals ---


def too_many_wait_locked(level: Node, node: Node, amounts: Amounts, priority: int) -> QueueFull:
    """Return the error of a call for which the line of ``level`` is too long."""
    ahead = counted(level.standing.waiting, "calls")
    how = f"cannot pass behind {ahead} waiting already" if level.standing.waiting else _AT_ONCE
    remedy = f"try again later or raise max_queue={level.standing.max_queue:,}"
    error = _refusal_locked(QueueFull, node, amounts, priority, how, remedy)
    error.limiter = level.name
    return error


def refuse(node: Node, amounts: Amounts, priority: int) -> None:
    """Refuse a call that cannot pass now.

    Raises:
        WouldBlock: it cannot pass now, or others wait.
        CostExceedsLimit: it can never pass.
    """
    try:
        with node.pacer.lock:
            node.check(amounts)
            raise _refusal_locked(WouldBlock, node, amounts, priority, _AT_ONCE, _WAIT)
    except REFUSALS as error:
        count_refusal(node, amounts, error)
        raise


def too_late(
    node: Node, amounts: Amounts, priority: int, asked: int, deadline: int | None
) -> AcquireTimeout:
    """Return the error of a call whose time is up."""
    assert deadline is not None
    with node.pacer.lock:
        return too_late_locked(node, amounts, priority, asked, deadline)


def too_late_locked(
    node: Node, amounts: Amounts, priority: int, asked: int, deadline: int
) -> AcquireTimeout:
    """Return the error of a call that cannot pass by its deadline, or has waited until then."""
    span = in_seconds(max(0, deadline - asked) * 1e-9)
    gave_up = asked < deadline <= node.pacer.clock()
    how = f"gave up after {span} in line" if gave_up else f"cannot pass within {span}"
    remedy = "raise the timeout or the limit"
    if asked - deadline > _LONG_PAST:
        how = "cannot pass by a deadline that has passed"
        remedy = f"a deadline is an instant of time.monotonic(), not seconds from now: {remedy}"
    return _refusal_locked(AcquireTimeout, node, amounts, priority, how, remedy)


def count_refusal(node: Node, amounts: Amounts, error: AsyncBucketError) -> None:
    """Count a refused call, and tell observers."""
    pacer: Pacer = node.pacer
    with pacer.lock:
        node.count("refused")
    if pacer.observed:
        pacer.notify(
            node,
            Refused,
            cost=Cost.of(amounts),
            reason=error._reason,  # noqa: SLF001 - for this
            bound_by=getattr(error, "bound_by", None),
            retry_after=getattr(error, "retry_after", None),
        )


def _refusal_locked(
    error_type: type[Refusal],
    node: Node,
    amounts: Amounts,
    priority: int,
    how: str,
    remedy: str,
) -> Refusal:
    """Return the error of a refusal, with what binds and for how long."""
    pacer: Pacer = node.pacer
    now = pacer.clock()
    if node.ways:
        ways = ways_of(node, amounts)
        node = min(ways, key=lambda way: way.earliest(amounts, now)[0])
    at_once = error_type is WouldBlock
    due, bound_by, why = _reason_locked(node, amounts, priority, now, at_once=at_once)
    if bound_by == "paused":
        remedy = remedy.removesuffix(" or the limit")  # no limit ends a pause
    limited = node.resources()
    named = [name for name, amount in amounts.items() if amount and name in limited]
    what = ", ".join(counted(amounts[name], name) for name in named or Cost.of(amounts))
    return error_type(
        f"a call of {what} {how}: {why}; {remedy}",
        retry_after=None if due >= NEVER else (due - now) * 1e-9,
        bound_by=bound_by,
        limiter=_binder(node, amounts, now).name,
    )


def _binder(node: Node, amounts: Amounts, now: int) -> Node:
    """Return who holds up such a call for longest; the root if nobody does."""
    dues = [(admit(each.own, amounts, now, now, book=False)[0], each) for each in node.path]
    due, binder = max(dues, key=lambda each: each[0])
    return binder if due > now else node.path[-1]


def ways_of(node: Node, amounts: Amounts) -> list[Node]:
    """Return where such a call may pass: at its own limiter, or in which of several trees."""
    return [*(node.able(amounts) or node.ways or (node,))]


def _time_ahead_locked(node: Node, priority: int) -> int:
    """Return about how long (ns) the limits make those wait who go before a newcomer at ``node``.

    Those are all in its line, and above whom the others' weights let go meanwhile.
    """
    flow: Flow | None = node.standing.lines.get(priority)
    if flow is None or not flow.living:
        return 0
    short = node.short_limits()
    calls, ahead, seconds = float(flow.living), _cost_of(flow, flow.living), 0.0
    while flow is not None:
        for limit in (window.limit for window in flow.node.limits.values()):
            if limit in short:
                seconds = max(seconds, ahead[limit.resource] * limit.per / limit.units)
        if (above := flow.above) is not None:
            if above.by_priority:
                above.weigh_priorities()
            share = (calls + 1) / flow.weight
            for other in above.flows - {flow}:
                waiting = sum(line.living for line in other.lines())
                number = min(waiting, share * other.weight)
                calls += number
                ahead.update(_cost_of(other, number))
        flow = above
    return round(seconds * 1e9)


def _cost_of(flow: "Flow", calls: float) -> Counter[str]:
    """Return what so many calls of those that wait at ``flow`` cost on average."""
    sample = [waiter.amounts for waiter in islice(flow.waiters(), _SAMPLE)]
    total = Counter[str]()
    for amounts in sample:
        total.update(amounts)
    return Counter({name: amount * calls / len(sample) for name, amount in total.items()})


def _held_up(node: Node) -> tuple[str, int] | None:
    """Return what a store holds up the first of those calls for, and until when at least."""
    known = (place.held_up() for place in node.places)
    return next((each for each in known if each and each[0]), None)


def _reason_locked(
    node: Node, amounts: Amounts, priority: int, now: int, *, at_once: bool
) -> tuple[int, str | None, str]:
    """Return when such a call could pass, or `NEVER` if unknown; what binds; and both in words."""
    pacer: Pacer = node.pacer
    due, bound_by = node.earliest(amounts, now)
    windows = [window for level in node.path for window in level.limits.values()]
    for limit in (window.limit for window in windows if at_once and pacer.place is None):
        burst = limit.burst_units
        if burst is not None and amounts.get(limit.resource, 0) > burst:
            most = counted(burst, limit.resource)
            why = f"above a burst of {most} it earns the rest while it is first in line"
            return NEVER, limit.resource, why
    if bound_by is None and pacer.place is not None:
        known = _held_up(node)
        if known is None:
            return NEVER, None, "the store that keeps its limits has to be asked"
        bound_by, due = known[0], max(now, known[1])
    ahead = 0 if due >= NEVER else _time_ahead_locked(node, priority)
    if bound_by is None:
        why = f"those ahead need about {in_seconds(ahead * 1e-9)}" if ahead else "others came first"
        return pacer.next_dispatch_locked(now) + ahead, None, why
    if bound_by == "paused":
        left = in_seconds((due - now) * 1e-9)
        why = f"the limiter is paused for {left} more{node.why_paused()}"
        return due + ahead, bound_by, why
    if due < NEVER:
        due += ahead
        left = in_seconds((due - now) * 1e-9)
        binding = (each for each in windows if each.limit.resource == bound_by)
        full = (each.limit for each in binding if each.available(now) < amounts[bound_by])
        resets = next((limit.resets for limit in full if limit.resets), None)
        until = "" if resets is None else f", until the limit resets at {resets}"
        return due, bound_by, f"{with_verb(bound_by, 'bind')} for {left} more{until}"
    taken = [level.most for level in node.route.bounded if level.in_flight >= level.most]
    slots = min(taken, default=0)  # 0: they are in a store
    words = {0: "all slots are", 1: "the one slot is"}.get(slots, f"all {slots:,} slots are")
    return due, bound_by, f"{words} taken"


# --- statistics ---


def statistics_locked(node: Node) -> Statistics:
    """Return what passed at ``node`` and below, what waits, and what for."""
    pacer: Pacer = node.pacer
    pacer.lock.run_jobs_locked()
    pacer.discard_closed()
    now, tally = pacer.clock(), node.tally
    return Statistics(
        name=node.name,
        admitted=node.slots.admitted,
        refused=tally.counts["refused"],
        cancelled=tally.counts["cancelled"],
        waiting=node.standing.waiting,
        in_flight=node.slots.in_flight,
        concurrency=node.concurrency,
        paused=max((0, *(pause.until - now for pause in node.pauses()))) * 1e-9,
        upstream_429=tally.counts["upstream_429"],
        overridden=pacer.root.tally.counts["overridden"],
        waits={name: Waits(n, ns * 1e-9) for name, (n, ns) in tally.waits.items()},
        refunded=dict(tally.refunded),
        limits=tuple(_uses(node, now)),
        bound_by=_bound_by(node, now),
        cache=CacheUse(tally.counts["reads"], tally.counts["writes"], tally.counts["saved_tokens"]),
    )


def _uses(node: Node, now: int) -> Iterator[LimitUse]:
    """Yield how much of each limit is used."""
    wall, place = node.pacer.wall(now), node.place
    if place is not None:
        for use in place.use():
            yield replace(use, resets_in=use.limit.resets_in(wall))
        return
    for key, window in node.limits.items():
        beside = node.beside(key)
        left = min(meter.available(now) for meter in (window, *beside))
        belief = beside[0].belief if beside else None
        yield LimitUse(window.limit, window.used, left, window.limit.resets_in(wall), belief)


def _bound_by(node: Node, now: int) -> str | None:
    """Return what holds up the next call, if anybody waits at ``node`` or below."""
    pacer: Pacer = node.pacer
    if not node.standing.waiting:
        return None
    known = _held_up(node)
    lines = [line for tree in pacer.trees for line in tree.top.lines()]
    lines = [line for line in lines if line.living and node in line.node.path]
    lines.sort(key=lambda line: (line.node.path[0] is not node, -line.priority))  # its own first
    here = [line.bound_by for line in lines]
    of_store = None if known is None else known[0]
    if node.parent is not None:
        return next(filter(None, (*here, of_store, pacer.bound_by)), None)
    # The store keeps the limits of the root. If nobody is next, all wait for limits below the root.
    is_next = pacer.top.head(now)[0] is not None
    answers = (pacer.bound_by, *here) if is_next else (*here, pacer.bound_by)
    return of_store or next(filter(None, answers), None)
