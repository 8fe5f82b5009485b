"""A tree of limiters whose root's limits are kept in a store, which a test plays: see `Place`."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from asyncbucket import Lease, Limiter, Pool
from asyncbucket.core.node import Meters
from asyncbucket.core.pool import PoolLease
from asyncbucket.core.queue import AnyWaiter
from asyncbucket.core.statistics import LimitUse
from asyncbucket.testing import VirtualTime
from tests.core.conftest import all_blocked, nothing_is_left, start_all, used


class Store:
    """Take one call at a time; let it go when the test says so."""

    def __init__(self, limiter: Limiter) -> None:
        self.pacer: Any = limiter._node.pacer
        self.pacer.place, self.pacer.is_plain = self, False
        #: The call that stands here, what it has booked below the root, and when.
        self.standing: tuple[AnyWaiter, Meters, int] | None = None
        self.ended_calls = 0
        self.waits_for: tuple[str, int] | None = None

    def let_go(self) -> bool:
        assert self.standing is not None
        with self.pacer:
            (waiter, below, pushed), now = self.standing, self.pacer.clock()
            for meter, resource in below:
                if waiter.amounts.get(resource):
                    meter.redate(waiter.amounts[resource], pushed, now)
            self.standing = waiter, below, now
            if passed := self.pacer.pass_on_locked(waiter, below, now, "tokens"):
                self.standing = None
            for seat in list(self.pacer.seats.values()):
                seat.ring(now)
        return bool(passed)

    def ring(self) -> None:
        with self.pacer:
            for seat in list(self.pacer.seats.values()):
                seat.ring(self.pacer.clock())

    def room(self, _: object) -> bool:
        return self.standing is None

    def push(self, waiter: AnyWaiter, below: Meters, now: int) -> None:
        self.standing = waiter, below, now

    def leave(self, waiter: AnyWaiter) -> bool:
        if self.standing is None or self.standing[0] is not waiter:
            return False
        for meter, resource in self.standing[1]:
            if waiter.amounts.get(resource):
                meter.unbook(waiter.amounts[resource], self.standing[2])
        self.standing = None
        return True

    def ended(self, _: object) -> None:
        self.ended_calls += 1

    def held_up(self) -> tuple[str, int] | None:
        return self.waits_for

    def holds_up(self) -> bool:
        return self.waits_for is not None

    def held_back(self) -> list[AnyWaiter]:
        return [self.standing[0]] if self.standing and self.waits_for else []

    def use(self) -> Iterator[LimitUse]:
        return iter(())


async def stand_in(limiter: Limiter, calls: int) -> list[asyncio.Task[Lease]]:
    return await start_all(limiter.acquire(tokens=30) for _ in range(calls))


async def test_member_of_a_pool_in_a_store_takes_the_head_when_it_has_room(
    time: VirtualTime,
) -> None:
    shared, own = (Limiter(rpm=600, name=name, clock=time.clock) for name in ("shared", "own"))
    store = Store(shared)
    pool = Pool(shared, own, prefer="first")
    chat = pool.child("chat", rpm=600)
    own.pause(1)
    held_back = await start_all([chat.acquire(tokens=1)])
    assert store.standing is not None
    store.waits_for = ("requests", 10**12)
    store.ring()
    taken = await held_back[0]  # the other does as soon as it can
    assert (time.now, taken.waited) == (1.0, 1.0)
    taken.settle(tokens=2)
    taken.release()
    assert store.standing is None
    assert own.statistics().admitted == 1
    assert (chat.statistics().waiting, shared.statistics().in_flight) == (0, 0)
    store.waits_for = None
    own.pause(5)
    calls = await stand_in(chat, 3)
    await asyncio.sleep(1)
    assert store.let_go()
    first = await calls[0]
    assert isinstance(first, PoolLease)
    assert (first.limiter, first.waited, first.bound_by) == (shared, 1.0, "tokens")
    await all_blocked()
    calls[1].cancel()  # which stands in the store
    await all_blocked()
    assert store.standing is not None
    assert (chat.statistics().waiting, chat.statistics().in_flight) == (1, 2)
    assert store.let_go()
    for lease in (first, await calls[2]):
        lease.settle(tokens=10)
        lease.release()
    assert store.ended_calls == 2
    nothing_is_left(pool, chat, shared, own)


@pytest.mark.parametrize("path", [(), ("team", "agent")])
async def test_calls_pass_in_order_when_store_has_booked_them(
    time: VirtualTime, path: tuple[str, ...]
) -> None:
    limiter = key = Limiter(clock=time.clock)
    store = Store(key)
    for name in path:
        limiter = limiter.child(name, "500 RPM", "50 images/m")
    calls = await stand_in(limiter, 3)
    await asyncio.sleep(2)
    for call in calls:
        assert store.let_go()
        lease = await call
        assert (lease.waited, lease.bound_by) == (2.0, "tokens")
        lease.release()
        lease.release()
        await all_blocked()
    assert store.ended_calls == 3
    nothing_is_left(key, limiter)
    assert (key.statistics().admitted, limiter.statistics().waits["tokens"].count) == (3, 3)


@pytest.mark.parametrize("when", ["in line", "in the store", "handed over", "just before"])
async def test_call_that_gives_up_leaves_nothing_anywhere(time: VirtualTime, when: str) -> None:
    key = Limiter(clock=time.clock)
    store = Store(key)
    team = key.child("team", "60 TPM", concurrency=5)
    first, *others = await stand_in(team, 1 + (when == "in line"))
    gone = others[0] if when == "in line" else first
    if when == "just before":
        gone.cancel()
    if when in {"handed over", "just before"}:
        assert store.let_go() == (when == "handed over")
    gone.cancel()
    await all_blocked()
    assert gone.cancelled()
    assert store.ended_calls == (when == "handed over")
    if when == "in line":
        assert store.let_go()
        (await first)._undo()
    assert team.statistics().cancelled == 1
    assert used(team) == [0]
    nothing_is_left(key, team)
