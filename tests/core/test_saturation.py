"""Under full load, a limiter uses at least 99 % of its limits, and never exceeds them."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from asyncbucket import Limit, Limiter, TokenBucket
from asyncbucket.testing import VirtualTime, assert_never_over, assert_within_bucket

pytestmark = pytest.mark.heavy

Cost = Callable[[random.Random], dict[str, Any]]


async def saturate(
    time: VirtualTime,
    *limits: str | Limit,
    cost: Cost = lambda _: {},
    seconds: float,
    concurrency: int | None = None,
    latency: float = 0.0,
    used: float = 1.0,
) -> dict[str, float]:
    """Let 200 callers ask again and again; assert limits are kept; return each one's share of use.

    The share counts only whole windows after the first, and the units that were used in them.
    """
    chance = random.Random(7)
    traces: dict[str, list[tuple[int, int]]] = {}
    most = 0
    limiter = Limiter(*limits, concurrency=concurrency, clock=time.clock)

    async def caller() -> None:
        nonlocal most
        while time.now < seconds:
            amounts = cost(chance)
            async with limiter.acquire(**amounts) as lease:
                spent = {name: round(used * amount) for name, amount in amounts.items()}
                for resource, amount in ({"requests": 1} | spent).items():
                    traces.setdefault(resource, []).append((time.clock(), amount))
                most = max(most, limiter.statistics().in_flight)
                await asyncio.sleep(latency)
                lease.settle(**spent)

    await asyncio.gather(*(caller() for _ in range(200)))
    shares: dict[str, float] = {}
    for limit in limiter.limits:
        trace = traces[limit.resource]
        assert_never_over(trace, limit)
        passed = sum(amount for when, amount in trace if limit.per <= when / 1e9 < seconds)
        shares[limit.resource] = passed / (limit.amount / limit.per * (seconds - limit.per))
    if concurrency is not None:
        assert most <= concurrency
        shares["concurrency"] = most / concurrency
    return shares


def tokens(least: int, most: int) -> Cost:
    return lambda chance: {"tokens": chance.randint(least, most)}


@pytest.mark.parametrize(
    ("limit", "cost", "share"),
    [
        ("600 RPM", None, 0.99),
        ("60 RPM", None, 0.99),
        ("10/s", None, 0.99),
        ("1000 requests/10s burst 1000", None, 0.99),
        ("60k TPM", tokens(1, 600), 0.99),
        ("60k TPM burst 1000", tokens(1, 300), 0.99),
        ("60k TPM", tokens(1, 12_000), 0.89),  # up to a fifth of the limit
    ],
)
async def test_limit_is_used_to_99_percent(
    time: VirtualTime, limit: str, cost: Cost | None, share: float
) -> None:
    seconds = (20 if share < 0.9 else 6) * Limit.parse(limit).per
    (use,) = (await saturate(time, limit, cost=cost or (lambda _: {}), seconds=seconds)).values()
    assert share <= use <= 1


@pytest.mark.parametrize(
    ("limits", "concurrency", "binds"),
    [
        (("1200 RPM", "60k TPM"), 50, "tokens"),
        (("300 RPM", "60k TPM"), 50, "requests"),
        (("1200 RPM", "120k TPM"), 10, "concurrency"),
    ],
)
async def test_binding_limit_among_several_is_used_to_99_percent(
    time: VirtualTime, limits: tuple[str, ...], concurrency: int, binds: str
) -> None:
    shares = await saturate(
        time, *limits, cost=tokens(50, 150), seconds=600, concurrency=concurrency, latency=1.5
    )
    assert shares[binds] >= 0.99
    if binds == "concurrency":
        assert shares["requests"] == pytest.approx(10 / 1.5 / 20, rel=0.01)


async def test_calls_that_refund_most_tokens_use_98_percent_of_limit(time: VirtualTime) -> None:
    shares = await saturate(
        time, "60k TPM", cost=tokens(300, 300), seconds=600, latency=0.2, used=1 / 3
    )
    assert shares["tokens"] >= 0.98


@pytest.mark.parametrize(("rate", "burst"), [(10.0, 1), (7.25, 5), (0.5, 2), (1000.0, 50)])
async def test_bucket_is_used_to_last_unit(time: VirtualTime, rate: float, burst: int) -> None:
    trace: list[tuple[int, int]] = []
    seconds = 500 / rate
    bucket = TokenBucket(rate=rate, burst=burst, clock=time.clock)

    async def caller() -> None:
        while time.now < seconds:
            await bucket.acquire()
            trace.append((time.clock(), 1))

    await asyncio.gather(*(caller() for _ in range(20)))
    assert_within_bucket(trace, rate=rate, burst=burst)
    assert len([when for when, _ in trace if when / 1e9 <= seconds]) >= 500 + burst - 1
