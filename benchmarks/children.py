"""An admission through three levels: a tenant's agent, the tenant, the key."""

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine

from asyncbucket import Limit, Limiter
from benchmarks.harness import Claim, Figure, measure

_PLENTY = 10**9
_TENANTS = 100
_FLAT, _DEEP = "one limiter", "three levels, 100 tenants"
_PROMISE = 40


def _leaves(key: Limiter, *, deep: bool) -> list[Limiter]:
    """Return whom calls ask: the key itself, or an agent of each of a hundred tenants."""
    if not deep:
        return [key] * _TENANTS
    tenants = [key.child(f"tenant {number}", rpm=_PLENTY) for number in range(_TENANTS)]
    return [tenant.child("agent", rpm=_PLENTY) for tenant in tenants]


async def _idle(calls: int, *, deep: bool) -> float:
    key = Limiter(rpm=_PLENTY, tpm=_PLENTY * 1000, concurrency=_PLENTY)
    leaf = _leaves(key, deep=deep)[0]
    start = time.process_time()
    for _ in range(calls):
        async with leaf.acquire(tokens=500):
            pass
    return (time.process_time() - start) / calls * 1e6


async def _crowded(calls: int, *, deep: bool) -> float:
    key = Limiter(Limit("requests", calls, per=1.5, burst=calls // 100), concurrency=_PLENTY)
    leaves = _leaves(key, deep=deep)

    async def call(number: int) -> None:
        async with leaves[number % _TENANTS].acquire():
            pass

    start = time.process_time()
    async with asyncio.TaskGroup() as group:
        for number in range(calls):
            group.create_task(call(number))
    return (time.process_time() - start) / calls * 1e6


def _ways(
    way: Callable[..., Coroutine[None, None, float]], calls: int
) -> dict[str, Callable[[], Coroutine[None, None, float]]]:
    return {
        name: functools.partial(way, calls, deep=deep)
        for name, deep in ((_FLAT, False), (_DEEP, True))
    }


def children_idle(*, rounds: int, calls: int) -> Figure:
    """Count the CPU of an admission through three levels where nobody waits."""
    return Figure(
        key="children_idle",
        title="Three levels of limits, nobody waiting",
        unit="µs CPU an admission",
        note="From acquire to release. Each level limits requests, the key tokens and slots besides; "
        f"all are taken at once or none. asyncbucket promises less than {_PROMISE} µs.",
        rows=measure(_ways(_idle, calls), rounds=rounds),
        claims=(Claim(_DEEP, _FLAT, 2),),
    )


def children_crowd(waiters: int, *, rounds: int) -> Figure:
    """Count the CPU of an admission through three levels while ``waiters`` calls share a key."""
    return Figure(
        key="children_crowd",
        title=f"Three levels of limits, {waiters:,} calls at once",
        unit="µs CPU an admission",
        note="Until all have passed, in 1.5 s; the tasks themselves, some 7 µs each, included. A "
        "hundred tenants share the key by weight, in cost; one limiter is first come, first served.",
        rows=measure(_ways(_crowded, waiters), rounds=rounds),
        claims=(Claim(_DEEP, _FLAT, 3),),
    )
