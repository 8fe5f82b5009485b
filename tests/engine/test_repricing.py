"""A call that waits may come to cost less, or more: it keeps its place, and the line is looked at again."""

import asyncio
from typing import Any

from asyncbucket import Cost, Limiter, Pool
from asyncbucket.engine.lease import Lease
from asyncbucket.levels import reprice
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import all_blocked, nothing_is_left, used


async def test_call_that_becomes_cheaper_passes_at_once_in_its_place(time: VirtualTime) -> None:
    limiter = Limiter(tpm=100, clock=time.clock)
    (await limiter.acquire(tokens=90)).release()
    served: list[str] = []

    async def call(name: str, lease: Lease) -> None:
        async with lease:
            served.append(name)

    leases = [limiter.acquire(tokens=80), limiter.acquire(tokens=5)]
    calls = [asyncio.create_task(call(name, each)) for name, each in zip("ab", leases, strict=True)]
    await all_blocked()
    reprice(leases[0], Cost(tokens=5))
    await asyncio.gather(*calls)
    assert (served, time.now, used(limiter)) == (["a", "b"], 0.0, [100])
    reprice(leases[0], Cost(tokens=70))
    assert used(limiter) == [100]  # what was admitted is settled
    nothing_is_left(limiter)


async def test_call_that_becomes_dearer_keeps_its_place(time: VirtualTime) -> None:
    limiter = Limiter(tpm=100, clock=time.clock).child("chat", itpm=50)
    (await limiter.acquire(tokens=50)).release()
    first, second = limiter.acquire(tokens=10), limiter.acquire(tokens=1)
    calls = [asyncio.ensure_future(each) for each in (first, second)]
    await all_blocked()
    reprice(first, Cost(tokens=50))
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert (first.cost["input_tokens"], first.bound_by) == (50, "input_tokens")
    assert not calls[1].done()
    first.settle(input_tokens=0)
    await calls[1]
    assert second.waited == first.waited
    for each in (first, second):
        each.release()
    nothing_is_left(limiter)


async def test_call_of_a_pool_is_repriced_wherever_it_waits(time: VirtualTime) -> None:
    members = [Limiter(tpm=100, clock=time.clock, name=name) for name in "ab"]
    for member in members:
        (await member.acquire(tokens=90)).release()
    lease: Any = Pool(*members).acquire(tokens=80)
    waiting = asyncio.ensure_future(lease)
    await all_blocked()
    reprice(lease, Cost(tokens=10))
    (await waiting).release()
    assert (time.now, sorted(used(members[0]) + used(members[1]))) == (0.0, [90, 100])
