"""What a limiter shows of itself at one instant."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from asyncbucket.core.doors import pauses
from asyncbucket.core.meters import NEVER
from asyncbucket.core.node import Node
from asyncbucket.core.statistics import LimitUse, Statistics, Waits

if TYPE_CHECKING:
    from asyncbucket.core.pacer import Pacer


def statistics_locked(node: Node) -> Statistics:
    """Return what passed at ``node`` and below, what waits, and what for."""
    pacer: Pacer = node.pacer
    pacer.run_jobs_locked()
    pacer.bury_locked()
    now = pacer.clock()
    return Statistics(
        name=node.name,
        admitted=node.admitted,
        refused=node.refused,
        cancelled=node.cancelled,
        waiting=node.waiting,
        in_flight=node.in_flight,
        concurrency=None if node.slots >= NEVER else node.slots,
        paused=max((0, *(pause.until - now for pause in pauses(node)))) * 1e-9,
        upstream_429=node.upstream_429,
        overridden=pacer.overridden,
        waits={name: Waits(n, ns * 1e-9) for name, (n, ns) in node.waits.items()},
        refunded=dict(node.refunded),
        limits=tuple(_uses(node, now)),
        bound_by=pacer.binding_locked(node),
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
