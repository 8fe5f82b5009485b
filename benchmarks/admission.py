"""A call's whole way, from acquire to release, where it need not wait."""

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine

import aiolimiter

from asyncbucket import Limiter
from benchmarks.harness import Claim, Figure, measure

_PLENTY = 10**9
_SLOTS = 50
_TOKENS = 500


async def _entered(calls: int) -> float:
    limiter = Limiter(rpm=_PLENTY, tpm=_PLENTY * 1000, concurrency=_SLOTS)
    start = time.perf_counter()
    for _ in range(calls):
        async with limiter.acquire(tokens=_TOKENS):
            pass
    return time.perf_counter() - start


async def _awaited(calls: int) -> float:
    limiter = Limiter(rpm=_PLENTY, tpm=_PLENTY * 1000, concurrency=_SLOTS)
    start = time.perf_counter()
    for _ in range(calls):
        lease = await limiter.acquire(tokens=_TOKENS)
        lease.release()
    return time.perf_counter() - start


async def _aiolimiter_entered(calls: int) -> float:
    limiter = aiolimiter.AsyncLimiter(_PLENTY, 1)
    start = time.perf_counter()
    for _ in range(calls):
        async with limiter:
            pass
    return time.perf_counter() - start


async def _aiolimiter_awaited(calls: int) -> float:
    limiter = aiolimiter.AsyncLimiter(_PLENTY, 1)
    start = time.perf_counter()
    for _ in range(calls):
        await limiter.acquire()
    return time.perf_counter() - start


async def _aiolimiter_thrice(calls: int) -> float:
    requests, tokens = aiolimiter.AsyncLimiter(_PLENTY, 1), aiolimiter.AsyncLimiter(_PLENTY, 1)
    slots = asyncio.Semaphore(_SLOTS)
    start = time.perf_counter()
    for _ in range(calls):
        async with slots, requests:
            await tokens.acquire(_TOKENS)
    return time.perf_counter() - start


_WAYS: dict[str, Callable[[int], Coroutine[None, None, float]]] = {
    "asyncbucket, async with": _entered,
    "asyncbucket, await and release": _awaited,
    "aiolimiter, one bucket, async with": _aiolimiter_entered,
    "aiolimiter, one bucket, await": _aiolimiter_awaited,
    "aiolimiter twice and a semaphore": _aiolimiter_thrice,
}


def admission(*, rounds: int, calls: int) -> Figure:
    """Time an idle admission of requests, tokens and a slot."""

    async def sample(way: Callable[[int], Coroutine[None, None, float]]) -> float:
        return await way(calls) / calls * 1e9

    entered, awaited, one_entered, one_awaited, _ = _WAYS
    return Figure(
        key="admission",
        title="Requests, tokens and a slot, from acquire to release",
        unit="ns",
        note="Idle. asyncbucket takes all three at once or none, keeps both limits in every window, "
        "and knows afterwards how much to give back; two buckets and a semaphore do not.",
        rows=measure(
            {name: functools.partial(sample, way) for name, way in _WAYS.items()}, rounds=rounds
        ),
        claims=(Claim(entered, one_entered, 3), Claim(awaited, one_awaited, 3)),
    )
