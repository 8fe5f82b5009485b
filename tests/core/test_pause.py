import asyncio
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, Limiter, WouldBlock
from asyncbucket.testing import VirtualTime


async def test_no_call_passes_during_pause(virtual_time: VirtualTime) -> None:
    """Neither waiting nor new calls pass; afterwards all do, in order."""
    limiter = Limiter("10 RPS burst 10", clock=virtual_time.clock)
    first = asyncio.ensure_future(limiter.acquire())
    limiter.pause(5)
    second = asyncio.ensure_future(limiter.acquire())
    with pytest.raises(WouldBlock) as error:
        limiter.acquire_nowait()
    assert error.value.bound_by == "paused"
    assert error.value.retry_after == 5.0
    leases = await asyncio.gather(first, second)
    assert [lease.waited for lease in leases] == [5.0, 5.0]
    assert {lease.bound_by for lease in leases} == {"paused"}
    assert limiter.statistics().waits["paused"].count == 2
    assert limiter.statistics().waits["paused"].seconds == 10.0


async def test_longer_pause_stays_in_force(virtual_time: VirtualTime) -> None:
    """A shorter one does not cut it; a longer one extends it, also for calls that wait."""
    limiter = Limiter(clock=virtual_time.clock)
    limiter.pause(5)
    limiter.pause(1)
    assert limiter.statistics().paused == 5.0
    waiting = asyncio.ensure_future(limiter.acquire())
    await asyncio.sleep(2)
    limiter.pause(10)
    assert (await waiting).waited == 12.0
    assert limiter.statistics().paused == 0
    limiter.pause(0)
    await limiter.acquire()
    assert virtual_time.now == 12.0


async def test_pause_of_zero_seconds_does_not_end_slow_start(virtual_time: VirtualTime) -> None:
    """The fourth call passes two steps after the first, as it would without it."""
    limiter = Limiter(clock=virtual_time.clock)
    limiter.pause(1.6, gradually=True)
    await limiter.acquire()
    await asyncio.sleep(0.15)
    limiter.pause(0)
    for _ in range(3):
        await limiter.acquire()
    assert virtual_time.now == pytest.approx(1.8)


def test_only_pauses_with_reason_429_count_as_upstream_429(virtual_time: VirtualTime) -> None:
    limiter = Limiter(clock=virtual_time.clock)
    limiter.pause(1, reason="429")
    limiter.pause(1, reason="maintenance")
    limiter.pause(1)
    assert limiter.statistics().upstream_429 == 1
    number: Any = 429
    with pytest.raises(TypeError, match='reason must be a string, such as "429", not 429'):
        limiter.pause(1, reason=number)


async def test_call_with_deadline_within_pause_fails(virtual_time: VirtualTime) -> None:
    limiter = Limiter("5 RPM", clock=virtual_time.clock)
    await limiter.acquire()
    waiting = asyncio.ensure_future(limiter.acquire(timeout=60))
    await virtual_time.all_blocked()
    limiter.pause(30)
    with pytest.raises(AcquireTimeout) as error:
        await limiter.acquire(timeout=10)
    assert str(error.value) == (
        "a call of 1 request cannot pass within 10 s: the limiter is paused for 30 s more; "
        "raise the timeout"
    )
    assert virtual_time.now == 0
    limiter.pause(90)
    with pytest.raises(AcquireTimeout, match="within 60 s: the limiter is paused for 30 s more"):
        await waiting
    assert virtual_time.now == 60


async def test_slot_released_during_pause_admits_no_call_until_its_end(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    lease = await limiter.acquire()
    limiter.pause(3)
    waiting = asyncio.ensure_future(limiter.acquire())
    await asyncio.sleep(1)
    lease.release()
    assert (await waiting).waited == 3.0


async def test_gradual_pause_admits_twice_as_many_calls_at_each_step(
    virtual_time: VirtualTime,
) -> None:
    passed: list[tuple[float, int]] = []

    async def call(limiter: Limiter, number: int) -> None:
        async with limiter.acquire() as lease:
            passed.append((virtual_time.now, number))
            assert lease.bound_by == "paused"

    limiter = Limiter(clock=virtual_time.clock)
    limiter.pause(1.6, gradually=True)
    await asyncio.gather(*(call(limiter, number) for number in range(300)))
    assert [number for _, number in passed] == list(range(300))
    assert [sum(at <= 1.6 + 0.1 * step for at, _ in passed) for step in range(9)] == [
        *(2**step for step in range(8)),
        300,
    ]
    await limiter.acquire()
    assert virtual_time.now == pytest.approx(2.4)


async def test_slow_start_applies_to_newcomers_too(virtual_time: VirtualTime) -> None:
    """A call that comes during a slow start takes its next step, or waits for it."""
    limiter = Limiter(clock=virtual_time.clock)
    limiter.pause(16, gradually=True)
    await limiter.acquire()
    assert virtual_time.now == 16
    with pytest.raises(WouldBlock, match="paused"):
        limiter.acquire_nowait()
    await asyncio.sleep(0.25)
    limiter.acquire_nowait()
    with pytest.raises(WouldBlock, match="paused"):
        limiter.acquire_nowait()
    await asyncio.sleep(60)
    for _ in range(300):
        limiter.acquire_nowait()


async def test_pause_keeps_priorities_and_holds_up_only_its_own_tenant(
    virtual_time: VirtualTime,
) -> None:
    passed: list[str] = []

    async def call(limiter: Limiter, name: str, priority: int) -> None:
        async with limiter.acquire(priority=priority):
            passed.append(name)

    key = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    key.pause(10)
    async with asyncio.TaskGroup() as group:
        for name, priority in (("batch", -1), ("normal", 0), ("interactive", 1)):
            group.create_task(call(key.child(name), name, priority))
    assert passed == ["interactive", "normal", "batch"]
    key.key("paused").pause(100)
    waiting = asyncio.ensure_future(key.acquire(tenant="paused"))
    assert (await key.acquire(tenant="other")).bound_by == "requests"
    assert (await waiting).bound_by == "paused"


async def test_call_cancelled_in_slow_start_leaves_its_step_to_next_call(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter(clock=virtual_time.clock)
    limiter.pause(16, gradually=True)
    calls = [asyncio.ensure_future(limiter.acquire()) for _ in range(3)]
    await virtual_time.all_blocked()
    calls[1].cancel()
    await asyncio.wait(calls)
    assert virtual_time.now == 16.25


async def test_call_closed_after_handover_in_slow_start_gives_its_step_back(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter(clock=virtual_time.clock)
    limiter.pause(16, gradually=True)
    waiting = limiter.acquire()
    waiting.send(None)
    await asyncio.sleep(16)
    await virtual_time.all_blocked()
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait()
    waiting.close()
    limiter.acquire_nowait()
    assert limiter.statistics().cancelled == 1
