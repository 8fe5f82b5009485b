"""Under full load, a limiter uses at least 99 % of its limits, and never exceeds them."""

import asyncio
import random

import pytest

from asyncbucket import Limit, Limiter, TokenBucket
from asyncbucket.testing import VirtualTime, assert_never_over, assert_within_bucket
from tests.core.test_shares import Passed, saturate

pytestmark = pytest.mark.heavy


def used_of(limit: Limit, passed: Passed, seconds: float) -> float:
    """Assert that a limit is kept; return which part of it was used after the first window."""
    trace = [
        (round(when * 1e9), tokens if limit.resource == "tokens" else 1)
        for when, _, tokens in passed
    ]
    assert_never_over(trace, limit)
    later = sum(amount for when, amount in trace if limit.per <= when / 1e9 < seconds)
    return later / (limit.amount / limit.per * (seconds - limit.per))


@pytest.mark.parametrize(
    ("limit", "most", "share"),
    [
        ("600 RPM", 0, 0.99),
        ("60 RPM", 0, 0.99),
        ("10/s", 0, 0.99),
        ("1000 requests/10s burst 1000", 0, 0.99),
        ("60k TPM", 600, 0.99),
        ("60k TPM burst 1000", 300, 0.99),
        ("60k TPM", 12_000, 0.89),  # up to a fifth of the limit
    ],
)
async def test_limit_is_used_to_99_percent(
    time: VirtualTime, limit: str, most: int, share: float
) -> None:
    chance = random.Random(7)
    seconds = (20 if share < 0.9 else 6) * Limit.parse(limit).per
    limiter = Limiter(limit, clock=time.clock)
    caller = (limiter, (lambda: chance.randint(1, most)) if most else 0)
    passed = await saturate(time, seconds, *[caller] * 200)
    assert share <= used_of(limiter.limits[0], passed, seconds) <= 1


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
    chance = random.Random(7)
    limiter = Limiter(*limits, concurrency=concurrency, clock=time.clock)
    caller = (limiter, lambda: chance.randint(50, 150))
    passed = await saturate(time, 600, *[caller] * 200, latency=1.5)
    used = {limit.resource: used_of(limit, passed, 600) for limit in limiter.limits}
    used["concurrency"] = len(passed) * 1.5 / (concurrency * time.now)
    assert used[binds] >= (0.98 if binds == "concurrency" else 0.99)  # calls vary in length


async def test_calls_that_refund_most_tokens_use_98_percent_of_limit(time: VirtualTime) -> None:
    limiter = Limiter("60k TPM", clock=time.clock)
    passed = await saturate(time, 600, *[(limiter, 300)] * 200, latency=0.2, used=1 / 3)
    assert used_of(limiter.limits[0], passed, 600) >= 0.98


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
