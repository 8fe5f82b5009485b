"""Under full load, a limiter uses at least 99 % of its limits, and never exceeds them."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from asyncbucket import Limit, Limiter, TokenBucket
from asyncbucket.testing import VirtualTime, assert_never_over, assert_within_bucket, virtual_time

Cost = Callable[[random.Random], dict[str, int]]


def saturate(
    *limits: str | Limit,
    cost: Cost,
    seconds: float,
    concurrency: int | None = None,
    latency: float = 0.0,
    callers: int = 200,
) -> dict[str, float]:
    """Let `callers` ask again and again; assert limits are kept; return each limit's share of use.

    The share counts only whole windows after the first, and the units that passed in them.
    """
    chance = random.Random(7)
    traces: dict[str, list[tuple[int, int]]] = {}
    most = 0

    async def caller(time: VirtualTime, limiter: Limiter) -> None:
        nonlocal most
        while time.now < seconds:
            amounts: dict[str, Any] = cost(chance)
            async with limiter.acquire(**amounts):
                for resource, amount in ({"requests": 1} | amounts).items():
                    traces.setdefault(resource, []).append((time.clock(), amount))
                most = max(most, limiter.statistics().in_flight)
                await asyncio.sleep(latency)

    async def main(time: VirtualTime, limiter: Limiter) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(caller(time, limiter))

    with virtual_time() as time:
        limiter = Limiter(*limits, concurrency=concurrency, clock=time.clock)
        time.run(main(time, limiter))
    shares: dict[str, float] = {}
    for limit in limiter.limits:
        trace = traces[limit.resource]
        assert_never_over(trace, limit)
        passed = sum(amount for when, amount in trace if limit.per <= when / 1e9 < seconds)
        shares[str(limit)] = passed / (limit.amount / limit.per * (seconds - limit.per))
    if concurrency is not None:
        assert most <= concurrency
        shares["concurrency"] = most / concurrency
    return shares


def one(_: random.Random) -> dict[str, int]:
    """Cost one request."""
    return {}


@pytest.mark.parametrize("limit", ["600 RPM", "60 RPM", "10/s", "1000 requests/10s burst 1000"])
def test_request_limit_is_used_to_99_percent(limit: str) -> None:
    per = Limit.parse(limit).per
    (share,) = saturate(limit, cost=one, seconds=10 * per).values()
    assert 0.99 <= share <= 1


def test_small_calls_use_99_percent_of_token_limit() -> None:
    (share,) = saturate(
        "60k TPM", cost=lambda chance: {"tokens": chance.randint(1, 600)}, seconds=600
    ).values()
    assert 0.99 <= share <= 1


def test_paced_token_limit_is_used_to_99_percent() -> None:
    """The burst is a sixtieth of the limit, as much as is refilled in a second."""
    (share,) = saturate(
        "60k TPM burst 1000", cost=lambda chance: {"tokens": chance.randint(1, 300)}, seconds=600
    ).values()
    assert 0.99 <= share <= 1


def test_calls_of_up_to_a_fifth_of_limit_use_89_percent_of_it() -> None:
    (share,) = saturate(
        "60k TPM", cost=lambda chance: {"tokens": chance.randint(1, 12_000)}, seconds=1200
    ).values()
    assert 0.89 <= share <= 1


@pytest.mark.heavy
def test_binding_limit_among_several_is_used_to_99_percent() -> None:
    """With requests, tokens and slots together, whichever binds is used up; none is exceeded."""

    def cost(chance: random.Random) -> dict[str, int]:
        return {"tokens": chance.randint(50, 150)}

    tokens_bind = saturate(
        "1200 RPM", "60k TPM", cost=cost, seconds=600, concurrency=50, latency=1.5
    )
    assert tokens_bind["60,000 tokens per 60 s"] >= 0.99
    requests_bind = saturate(
        "300 RPM", "60k TPM", cost=cost, seconds=600, concurrency=50, latency=1.5
    )
    assert requests_bind["300 requests per 60 s"] >= 0.99
    slots_bind = saturate(
        "1200 RPM", "120k TPM", cost=cost, seconds=600, concurrency=10, latency=1.5
    )
    assert slots_bind["concurrency"] == 1
    assert slots_bind["1,200 requests per 60 s"] == pytest.approx(10 / 1.5 / 20, rel=0.01)


def test_calls_that_refund_most_tokens_still_use_98_percent_of_limit() -> None:
    trace: list[tuple[int, int]] = []

    async def caller(time: VirtualTime, limiter: Limiter) -> None:
        while time.now < 600:
            async with limiter.acquire(tokens=300) as lease:
                admitted = time.clock()
                await asyncio.sleep(0.2)
                lease.settle(tokens=100)
                trace.append((admitted, 100))

    async def main(time: VirtualTime, limiter: Limiter) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(30):
                group.create_task(caller(time, limiter))

    with virtual_time() as time:
        limiter = Limiter("60k TPM", clock=time.clock)
        time.run(main(time, limiter))
    assert_never_over(trace, limiter.limits[0])
    used = sum(amount for when, amount in trace if 60 <= when / 1e9 < 600)
    assert used >= 0.985 * 60_000 * 9


@pytest.mark.parametrize(("rate", "burst"), [(10.0, 1), (7.25, 5), (0.5, 2), (1000.0, 50)])
def test_bucket_is_used_to_last_unit(rate: float, burst: int) -> None:
    """However many calls wait, just burst + rate * t units pass."""
    trace: list[tuple[int, int]] = []
    seconds = 500 / rate

    async def caller(time: VirtualTime, bucket: TokenBucket) -> None:
        while time.now < seconds:
            await bucket.acquire()
            trace.append((time.clock(), 1))

    async def main(time: VirtualTime, bucket: TokenBucket) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(caller(time, bucket))

    with virtual_time() as time:
        time.run(main(time, TokenBucket(rate=rate, burst=burst, clock=time.clock)))
    assert_within_bucket(trace, rate=rate, burst=burst)
    assert len([when for when, _ in trace if when / 1e9 <= seconds]) >= 500 + burst - 1
