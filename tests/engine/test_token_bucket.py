"""The primitive: exact instants, first come, first served; nobody overtaken, however cheap."""

import asyncio
import random
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, TokenBucket, WouldBlock
from asyncbucket.engine.meters import Bucket
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import refused, start, take


async def instants(time: VirtualTime, bucket: TokenBucket, calls: int) -> list[float]:

    async def call() -> float:
        await bucket.acquire()
        return time.now

    return await asyncio.gather(*(call() for _ in range(calls)))


@pytest.mark.parametrize(
    ("rate", "bursts", "passed"),
    [(2.0, [2], [0.0, 0.0, 0.5, 1.0, 1.5, 2.0]), (0.5, [], [0.0, 2.0, 4.0, 6.0, 8.0])],
)
async def test_bucket_passes_its_burst_at_once_and_then_keeps_its_rate(
    time: VirtualTime, rate: float, bursts: list[int], passed: list[float]
) -> None:
    """After a minute without calls it has its burst again, and no more."""
    bucket = TokenBucket(rate, *bursts, clock=time.clock)
    assert await instants(time, bucket, len(passed)) == passed
    await asyncio.sleep(60)
    assert bucket.statistics().available == bucket.burst
    before = time.now
    assert [now - before for now in await instants(time, bucket, len(passed))] == passed


async def test_newcomer_does_not_pass_waiting_calls_and_hears_when(time: VirtualTime) -> None:
    bucket = TokenBucket(rate=1.0, burst=5, clock=time.clock)
    never = "cost of 6 units exceeds the burst of 5 units and can never pass; raise burst or split"
    with pytest.raises(CostExceedsLimit, match=never):
        bucket.acquire_nowait(6)
    bucket.acquire_nowait(4)
    says = "2 units cannot pass before 1 s from now at 1 a second; wait with acquire()"
    with refused(WouldBlock, says, retry_after=1.0, bound_by="units"):
        bucket.acquire_nowait(2)
    first = await start(bucket.acquire(5))
    assert bucket.statistics().available == 1
    with refused(WouldBlock, "1 unit cannot pass before 4 s from now", retry_after=4.0):
        bucket.acquire_nowait()
    says = "1 unit gave up after 3 s at 1 a second; raise the timeout or the rate"
    with refused(AcquireTimeout, says, retry_after=1.0, bound_by="units"):
        await bucket.acquire(timeout=3)
    assert time.now == 3.0
    await first
    with refused(AcquireTimeout, "2 units cannot pass within 1.5 s", retry_after=2.0):
        await bucket.acquire(2, timeout=1.5)
    assert time.now == 4.0
    await bucket.acquire(timeout=10)
    assert time.now == 5.0


async def test_bucket_as_context_manager_takes_one_unit_for_good(time: VirtualTime) -> None:
    burst: Any = 2.0  # a whole number, as others write it
    bucket = TokenBucket(rate=1.0, burst=burst, clock=time.clock)
    async with bucket as entered:
        assert entered is bucket
    with pytest.raises(ZeroDivisionError):
        async with bucket:
            raise ZeroDivisionError
    waiting = await start(bucket.acquire(2))
    assert (bucket.rate, bucket.burst) == (1.0, 2)
    assert repr(bucket) == "<TokenBucket rate=1/s burst=2 available=0 waiting=1>"
    await waiting


@pytest.mark.parametrize("rate", [1.0, 3.0, 0.7, 1e6, 1e-9])
@pytest.mark.parametrize("burst", [1, 2, 50])
def test_bucket_books_and_gives_back_as_its_meter_does(rate: float, burst: int) -> None:
    """`TokenBucket.acquire` contains a copy of `Bucket.take`, and leaves the same state."""
    now = 10**12
    bucket = TokenBucket(rate, burst, clock=lambda: now)
    written, plain = bucket._bucket, Bucket(rate=rate, burst=burst)
    booked: list[tuple[int, int]] = []
    chance = random.Random(burst)
    for _ in range(500):
        now += chance.choice([0, 0, 1, int(chance.random() * burst * 1e9 / rate)])
        choice = chance.random()
        amount = 1 if choice < 0.5 else chance.randint(1, burst)
        if choice < 0.75:
            if take(plain, amount, now):
                if choice < 0.5:
                    with pytest.raises(StopIteration):  # it passes at once
                        bucket.acquire().send(None)
                else:
                    bucket.acquire_nowait(amount)
                    booked.append((amount, now))
        elif booked:
            refund = booked.pop(-chance.randint(1, min(4, len(booked))))
            plain.unbook(*refund)
            written.unbook(*refund)
        assert written.available(now) == plain.available(now)
        assert written.earliest(burst, now) == plain.earliest(burst, now)
