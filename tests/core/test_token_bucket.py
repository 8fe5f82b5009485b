import asyncio
import enum
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, TokenBucket, WouldBlock
from asyncbucket.testing import VirtualTime


async def instants(time: VirtualTime, bucket: TokenBucket, calls: int) -> list[float]:
    """Return when each of `calls` concurrent calls passed."""

    async def call() -> float:
        await bucket.acquire()
        return time.now

    return await asyncio.gather(*(call() for _ in range(calls)))


@pytest.mark.parametrize(
    ("rate", "bursts", "passed"),
    [(2.0, [2], [0.0, 0.0, 0.5, 1.0, 1.5, 2.0]), (0.5, [], [0.0, 2.0, 4.0, 6.0, 8.0])],
)
def test_bucket_passes_its_burst_at_once_and_then_keeps_its_rate(
    virtual_time: VirtualTime, rate: float, bursts: list[int], passed: list[float]
) -> None:
    """By default the burst is one."""
    bucket = TokenBucket(rate, *bursts, clock=virtual_time.clock)
    assert virtual_time.run(instants(virtual_time, bucket, len(passed))) == passed


async def test_idle_bucket_fills_up_to_its_burst(virtual_time: VirtualTime) -> None:
    """After a minute it has three units, not sixty."""
    bucket = TokenBucket(rate=1.0, burst=3, clock=virtual_time.clock)
    await bucket.acquire(3)
    await asyncio.sleep(60)
    assert bucket.statistics().available == 3
    before = virtual_time.now
    passed = await instants(virtual_time, bucket, 5)
    assert [now - before for now in passed] == [0, 0, 0, 1, 2]


def test_acquire_nowait_takes_unit_or_says_how_long_to_wait(virtual_time: VirtualTime) -> None:
    bucket = TokenBucket(rate=4.0, burst=2, clock=virtual_time.clock)
    bucket.acquire_nowait(2)
    with pytest.raises(WouldBlock) as error:
        bucket.acquire_nowait()
    assert str(error.value) == (
        "1 unit cannot pass before 0.25 s from now at 4 a second; wait with acquire()"
    )
    assert (error.value.retry_after, error.value.bound_by) == (0.25, "units")
    virtual_time.advance(0.25)
    bucket.acquire_nowait()
    assert bucket.statistics().available == 0


async def test_acquire_nowait_does_not_pass_waiting_calls(virtual_time: VirtualTime) -> None:
    """One unit is available, but a call that waits for two came first."""
    bucket = TokenBucket(rate=1.0, burst=2, clock=virtual_time.clock)
    await bucket.acquire(1)
    waiting = asyncio.create_task(bucket.acquire(2))
    await virtual_time.all_blocked()
    assert bucket.statistics().available == 1
    with pytest.raises(WouldBlock):
        bucket.acquire_nowait()
    await waiting
    assert virtual_time.now == 1.0


async def test_bucket_as_context_manager_takes_one_unit_for_good(virtual_time: VirtualTime) -> None:
    """Entering takes one unit; leaving gives nothing back, not even after an error."""
    bucket = TokenBucket(rate=1.0, burst=2, clock=virtual_time.clock)
    async with bucket as entered:
        assert entered is bucket
        assert bucket.statistics().available == 1
    with pytest.raises(ZeroDivisionError):
        async with bucket:
            raise ZeroDivisionError
    assert bucket.statistics().available == 0


async def test_retry_after_tells_when_first_waiting_call_will_pass(
    virtual_time: VirtualTime,
) -> None:
    """A caller that sleeps for ``retry_after`` seconds and tries again does not spin."""
    bucket = TokenBucket(rate=1.0, burst=5, clock=virtual_time.clock)
    await bucket.acquire(4)
    first = asyncio.create_task(bucket.acquire(5))
    await virtual_time.all_blocked()
    with pytest.raises(WouldBlock, match="1 unit cannot pass before 4 s from now") as error:
        bucket.acquire_nowait()
    assert error.value.retry_after == 4.0
    await first


async def test_call_behind_another_fails_exactly_at_its_timeout(virtual_time: VirtualTime) -> None:
    bucket = TokenBucket(rate=1.0, burst=5, clock=virtual_time.clock)
    await bucket.acquire(4)
    first = asyncio.create_task(bucket.acquire(5))
    await virtual_time.all_blocked()
    with pytest.raises(AcquireTimeout) as error:
        await bucket.acquire(timeout=3)
    assert virtual_time.now == 3.0
    assert str(error.value) == (
        "1 unit cannot pass within 3 s at 1 a second; raise the timeout or the rate"
    )
    assert error.value.retry_after == 1.0
    await first
    assert virtual_time.now == 4.0
    await bucket.acquire(timeout=10)
    assert virtual_time.now == 5.0


async def test_bucket_repr_shows_units_available_and_calls_waiting(
    virtual_time: VirtualTime,
) -> None:
    bucket = TokenBucket(rate=0.5, burst=2_000, clock=virtual_time.clock)
    await bucket.acquire(1_500)
    waiting = asyncio.create_task(bucket.acquire(501))
    await virtual_time.all_blocked()
    assert repr(bucket) == "<TokenBucket rate=0.5/s burst=2,000 available=500 waiting=1>"
    await waiting
    now = bucket.statistics()
    assert (now.available, now.waiting) == (0, 0)


def test_whole_float_is_accepted_as_burst() -> None:
    """2.0 counts as two."""
    assert TokenBucket(1, 2.0).burst == 2  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def test_rate_and_burst_of_bucket_cannot_be_set() -> None:
    """Setting its rate or burst would change what it shows, but not how it paces."""
    bucket: Any = TokenBucket(rate=2, burst=3)
    for name in ("rate", "burst"):
        with pytest.raises(AttributeError):
            setattr(bucket, name, 10)
    assert (bucket.rate, bucket.burst) == (2.0, 3)


async def test_int_enum_member_is_accepted_as_amount(virtual_time: VirtualTime) -> None:
    """An IntEnum's member counts as its value."""

    class Size(enum.IntEnum):
        SMALL = 1
        LARGE = 3

    bucket = TokenBucket(rate=1.0, burst=4, clock=virtual_time.clock)
    await bucket.acquire(Size.LARGE)
    bucket.acquire_nowait(Size.SMALL)
    assert bucket.statistics().available == 0
