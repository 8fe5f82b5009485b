"""A number of slots found by search: how a limiter tells it of calls, and follows it."""

import asyncio

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import all_blocked, nothing_is_left


@pytest.fixture
def limiter(time: VirtualTime) -> Limiter:
    return Limiter(concurrency=(1, 100), clock=time.clock)


async def test_raised_concurrency_admits_waiting_calls(time: VirtualTime, limiter: Limiter) -> None:
    """A raise when a call ends admits several: one by the slot given back, others by new slots."""

    async def call(seconds: float) -> None:
        async with limiter.acquire():
            await asyncio.sleep(seconds)

    calls = [asyncio.create_task(call(1 + number % 7 / 1_000)) for number in range(200)]
    sizes: list[int] = []
    while limiter.statistics().waiting or not sizes:
        await all_blocked()
        now = limiter.statistics()
        assert now.in_flight == now.concurrency or not now.waiting
        sizes.append(now.concurrency or 0)
        await asyncio.sleep(0.25)
    assert sizes[0] == 4
    assert sizes[-1] >= 32
    await asyncio.gather(*calls)
    assert time.now < 30


def test_only_first_reported_outcome_of_call_counts(limiter: Limiter) -> None:
    for _ in range(200):
        lease = limiter.acquire_nowait()
        lease.failed()
        assert lease.released
        lease.overloaded()
        lease.release()
        limiter.acquire_nowait()._undo()
        limiter.acquire_nowait()  # and dropped
    assert limiter.concurrency == 4
    nothing_is_left(limiter)
    plain = Limiter(concurrency=3).acquire_nowait()
    plain.overloaded()
    assert plain.released


async def test_calls_of_one_wave_cut_once(time: VirtualTime, limiter: Limiter) -> None:
    wave = [await limiter.acquire() for _ in range(4)]
    for lease in wave:
        time.advance(0.01)
        lease._sent()
        lease.overloaded()
    assert limiter.concurrency == 3


def test_reconfigure_switches_between_fixed_and_auto_concurrency() -> None:
    """The search starts anew after a fixed number, and goes on if only its bounds change."""
    limiter = Limiter("60 RPM")
    lease = limiter.acquire_nowait()
    limiter.reconfigure(concurrency="auto")
    lease.release()
    assert limiter.concurrency == 4
    for bounds, size in (((8, 20), 8), ((1, 20), 8), (7, 7), ((1, 2), 2)):
        lease = limiter.acquire_nowait()  # which ends on other terms than it began
        limiter.reconfigure(concurrency=bounds)
        assert limiter.concurrency == size
        lease.release()
    nothing_is_left(limiter)
