"""Pauses hold back all calls, and may let them go gradually afterwards."""

import asyncio
import math

import pytest

from asyncbucket import AcquireTimeout, Limiter, WouldBlock
from asyncbucket.engine.meters import NEVER
from asyncbucket.engine.statistics import Waits
from asyncbucket.feedback.pause import Pause
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import all_blocked, nothing_is_left, refused, start_all


async def test_no_call_passes_during_pause(time: VirtualTime) -> None:
    limiter = Limiter("10 RPS burst 10", concurrency=2, clock=time.clock)
    held = [limiter.acquire_nowait(), limiter.acquire_nowait()]
    limiter.pause(2)
    calls = await start_all(limiter.acquire() for _ in range(2))
    limiter.pause(5)
    limiter.pause(1)  # the longer one stays
    assert limiter.statistics().paused == 5.0
    await asyncio.sleep(1)
    for lease in held:
        lease.release()
    with refused(WouldBlock, "paused for 4 s more", retry_after=4.2, bound_by="paused"):
        limiter.acquire_nowait()
    with refused(AcquireTimeout, retry_after=4.2, bound_by="paused"):  # two go before it
        await limiter.acquire(timeout=3)
    assert time.now == 1
    leases = await asyncio.gather(*calls)
    assert [(lease.waited, lease.bound_by) for lease in leases] == [(5.0, "paused")] * 2
    assert limiter.statistics().waits == {"paused": Waits(2, 10.0)}


async def test_gradual_pause_admits_twice_as_many_calls_at_each_step(time: VirtualTime) -> None:
    passed: list[tuple[float, int]] = []

    async def call(limiter: Limiter, number: int) -> None:
        async with limiter.acquire() as lease:
            passed.append((time.now, number))
            assert lease.bound_by == "paused"

    limiter = Limiter(clock=time.clock)
    limiter.pause(1.6, gradually=True)
    await asyncio.gather(*(call(limiter, number) for number in range(300)))
    assert [number for _, number in passed] == list(range(300))
    done = [sum(at <= 1.6 + 0.1 * step for at, _ in passed) for step in range(9)]
    assert done == [*(2**step for step in range(8)), 300]
    await limiter.acquire()
    assert time.now == pytest.approx(2.4)


@pytest.mark.parametrize("when", ["before", "handed over"])
async def test_call_gone_in_slow_start_leaves_its_step(time: VirtualTime, when: str) -> None:
    limiter = Limiter(clock=time.clock)
    limiter.pause(16, gradually=True)
    waiting = limiter.acquire().__await__()
    waiting.send(None)
    if when == "handed over":
        await asyncio.sleep(16)
        await time.all_blocked()
        with pytest.raises(WouldBlock):
            limiter.acquire_nowait()
    waiting.close()
    calls = await start_all(limiter.acquire() for _ in range(2))
    await asyncio.wait(calls)
    assert time.now == 16.25
    assert limiter.statistics().cancelled == 1


def test_restored_pause_goes_on_as_the_one_before() -> None:
    """A store keeps it."""
    pause, other = Pause(), Pause()
    pause.begin(1_600, 0, gradually=True)
    pause.book(1, 1_600)
    other.restore(pause.state())
    other.owe(5, 1_600)  # which is owed to nobody
    other.redate(1, 1_600, 1_700)
    for each in (pause, other):
        each.book(1, each.until)
        assert (each.until, each.available(each.until)) == (1_600 + int(100 * math.log2(3)), NEVER)


# --- A number of slots found by search: how a limiter tells it of calls, and follows it ---


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
