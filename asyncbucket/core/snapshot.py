"""What a limiter shows of itself at one instant."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from asyncbucket.core.doors import pauses
from asyncbucket.core.node import Node
from asyncbucket.core.seats import bury_closed
from asyncbucket.core.statistics import LimitUse, Statistics, Waits

if TYPE_CHECKING:
    from asyncbucket.core.pacer import Pacer


def statistics_locked(node: Node) -> Statistics:
    """Return what passed at ``node`` and below, what waits, and what for."""
    pacer: Pacer = node.pacer
    pacer.run_jobs_locked()
    bury_closed(pacer)
    now = pacer.clock()
    return Statistics(
        name=node.name,
        admitted=node.admitted,
        refused=node.refused,
        cancelled=node.cancelled,
        waiting=node.waiting,
        in_flight=node.in_flight,
        concurrency=node.concurrency,
        paused=max((0, *(pause.until - now for pause in pauses(node)))) * 1e-9,
        upstream_429=node.upstream_429,
        overridden=pacer.overridden,
        waits={name: Waits(n, ns * 1e-9) for name, (n, ns) in node.waits.items()},
        refunded=dict(node.refunded),
        limits=tuple(_uses(node, now)),
        bound_by=_bound_by(node),
        agents=None if node.agents is None else node.agents.statistics(),
    )


def _uses(node: Node, now: int) -> Iterator[LimitUse]:
    """Yield how much of each limit is used."""
    wall, place = node.pacer.wall(now), node.place
    if place is not None:
        for use in place.use():
            yield replace(use, resets_in=use.limit.resets_in(wall))
        return
    for key, window in node.limits.items():
        beside = [meter for meter, _ in node.extra if getattr(meter, "key", None) == key]
        left = min(meter.available(now) for meter in (window, *beside))
        yield LimitUse(window.limit, window.used, left, window.limit.resets_in(wall))


def _bound_by(node: Node) -> str | None:
    """Return what holds up the next call, if anybody waits at ``node`` or below."""
    pacer: Pacer = node.pacer
    if not node.waiting:
        return None
    known = None if pacer.place is None else pacer.place.held_up()
    lines = [line.bound_by for line in node.lines.values() if line.living]
    below = (each.line.bound_by for each in pacer.top.waiters() if node in each.line.node.path)
    store = None if known is None else known[0]
    # At the root the store's answer comes first, as it keeps these limits; below, the child's.
    first = (store, pacer.bound_by) if node.parent is None else ()
    return next(filter(None, (*first, *lines, *below, store, pacer.bound_by)), None)
