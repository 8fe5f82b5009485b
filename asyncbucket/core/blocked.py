"""What to do about event loops that do not run: calls that stand aside, and slots that do not come back.

A seat whose loop is blocked misses its turn. Then its calls stand aside, so that it holds up nobody,
until it looks again; those of a closed loop are counted out for good. If every slot is held on loops
that are blocked, one call at a time passes without a slot, because what blocks a loop may be waiting
for that very call. All of this is called by the `asyncbucket.core.pacer.Pacer`, with its lock held.
"""

import itertools
import logging
import time
from functools import partial
from typing import Any, Final

from asyncbucket.core.meters import NEVER
from asyncbucket.core.node import shown_name
from asyncbucket.core.queue import AnyWaiter
from asyncbucket.core.seats import NOWHERE, Seat

#: How late (ns) a seat may be for its turn before others go first; before it counts as blocked.
GRACE: Final = 50_000_000
_PATIENCE: Final = 1_000_000_000
#: After this time (ns) without an admission, slots may have been forgotten.
_STALL: Final = 60_000_000_000

_log: Final = logging.getLogger("asyncbucket")


def is_late(pacer: Any, seat: Seat, now: int) -> bool:
    """Tell whether ``seat`` missed its turn; if so, its calls stand aside until it looks."""
    if seat.is_closed():
        seat.is_late = True
        bury(pacer, seat)
    elif now > seat.looks_at + GRACE:
        seat.is_late = True
    return seat.is_late


def return_set_aside(seat: Seat) -> None:
    """Put calls that stood aside back in their places."""
    seat.is_late = False
    waiters, seat.set_aside = seat.set_aside, []
    for line, group in itertools.groupby(waiters, lambda waiter: waiter.line):
        line.refill((*group, *line.calls))
        line.arrive()


def bury_closed(pacer: Any) -> bool:
    """Count out all who wait on loops that were closed; return whether there were any."""
    closed = [seat for seat in pacer.seats.values() if seat.waiting and seat.is_closed()]
    for seat in closed:
        bury(pacer, seat)
    return bool(closed)


def bury(pacer: Any, seat: Seat) -> None:
    """Count out all who wait on ``seat``, whose loop was closed."""
    trees = (pacer,) if pacer.group is None else pacer.group.pacers
    lines = {line for tree in trees for line in tree.top.lines()}
    lines |= {waiter.line for waiter in seat.set_aside}
    for waiter in [*(each for line in lines for each in line.calls), *seat.set_aside]:
        if waiter.seat is seat and not waiter.done():
            waiter.line.depart()
            node = waiter.line.waited_at
            node.pacer.count_in(node, seat, -1)
            waiter.seat = NOWHERE
    for line in lines:  # those that gave up before go, too: their tasks count them out
        line.refill(each for each in line.calls if each.seat not in (NOWHERE, seat))
    seat.set_aside.clear()


def beyond_slots(pacer: Any, seat: Seat, now: int) -> tuple[AnyWaiter | None, int]:
    """Return a call that is to pass without a slot, because loops that do not run hold all; else when to look again.

    Code may block its loop while it waits for a call on another loop (LlamaIndex's
    ``VectorStoreIndex(use_async=True)`` does), while tasks of the blocked loop hold all slots.
    """
    holders = [each for each in pacer.seats.values() if each.leases]
    if not holders or seat.leases or pacer.seats.threads.leases:
        return None, wait_for_slots(pacer, now)
    for each in holders:
        each.ring(now)
    heard = max(each.looks_at for each in holders)
    if now < heard + _PATIENCE:
        return None, heard + _PATIENCE
    back = sum(each.leases for each in holders)
    waiter: AnyWaiter | None
    waiter, due = pacer.top.head(now, back)
    if waiter is None or waiter.seat is not seat:
        return None, due
    due, _ = pacer.root.earliest(waiter.amounts, waiter.line.since, back)
    if due > now:
        return None, due
    pacer.overridden += 1
    if pacer.overridden == 1:
        pacer.news.append(
            partial(
                _log.warning,
                "a call passed without a slot: every slot is held on an event loop that has "
                "been blocked for over 1 s; await on that loop instead of blocking it",
            )
        )
    return waiter, now


def wait_for_slots(pacer: Any, now: int) -> int:
    """Return when to look again while slots have to come back; warn once if none does.

    A lease that is dropped gives its slot back; one that something still holds does not.
    """
    if pacer.has_warned or pacer.clock is not time.monotonic_ns:
        return NEVER
    if now < pacer.since + _STALL:
        later: int = (pacer.since // _STALL + 2) * _STALL
        return later  # seldom another: so the timer can stay
    pacer.has_warned = True
    nodes = {
        node for line in pacer.top.lines() for node in (*line.node.bounded, *pacer.root.bounded)
    }
    held = (
        f"{node.in_flight} of {node.slots} slots of {shown_name(node.name)!r}"
        for node in sorted(nodes, key=lambda node: node.name)
        if node.in_flight >= node.slots
    )
    pacer.news.append(
        partial(
            _log.warning,
            "no call has passed for %.0f s: open leases hold %s; if those calls are over, release "
            "their leases (`async with` does)",
            (now - pacer.since) * 1e-9,
            ", ".join(held),
        )
    )
    return NEVER
