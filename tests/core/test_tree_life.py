"""Children on several loops and threads, in forks, cancelled at every step, on blocked loops."""

import asyncio
import concurrent.futures
import contextlib
import gc
import time

import pytest

import asyncbucket
from asyncbucket import CostExceedsLimit, Lease, Limiter
from asyncbucket.testing import VirtualTime
from tests.core.conftest import FakeLock

#: Seconds after which a test that waits for another thread gives up.
ENOUGH = 20


def test_children_are_shared_by_loops_and_threads() -> None:
    """Three loops and three threads each use a child of their own and one in common."""
    key = Limiter("300 requests/s burst 300", concurrency=4)
    start = time.monotonic()
    common = key.child("common", concurrency=2)
    most = {"key": 0, "common": 0}

    def look() -> None:
        for limiter, name in ((key, "key"), (common, "common")):
            most[name] = max(most[name], limiter.statistics().in_flight)

    async def asynchronously(own: Limiter) -> None:
        async def call(limiter: Limiter, priority: int) -> None:
            async with limiter.acquire(priority=priority):
                look()
                await asyncio.sleep(0.0005)

        calls = [call(limiter, number % 3 - 1) for limiter in (own, common) for number in range(30)]
        await asyncio.gather(*calls)

    def synchronously(own: Limiter) -> None:
        for number in range(30):
            for limiter in (own, common):
                with limiter.acquire_sync(priority=number % 2):
                    look()

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [
            pool.submit(asyncio.run, asynchronously(key.child(f"loop {number}")))
            for number in range(3)
        ]
        jobs += [pool.submit(synchronously, key.key(f"thread {number}")) for number in range(3)]
        for job in jobs:
            job.result(ENOUGH)
    assert time.monotonic() - start >= 1  # the last 60 of 360 wait for their window
    assert most["key"] <= 4
    assert most["common"] <= 2
    for limiter in (key, common):
        now = limiter.statistics()
        assert (now.waiting, now.in_flight) == (0, 0)
    assert key.statistics().admitted == 360


def test_light_child_on_one_loop_is_not_starved_by_heavy_child_on_another() -> None:
    key = Limiter(concurrency=1)
    heavy, light = key.child("heavy"), key.child("light")
    holder = key.acquire_nowait()
    served: list[str] = []

    async def call(limiter: Limiter) -> None:
        async with limiter.acquire():
            served.append(limiter.name.rpartition("/")[2])

    async def many(limiter: Limiter, calls: int) -> None:
        await asyncio.gather(*(call(limiter) for _ in range(calls)))

    def wait_for(count: int) -> None:
        end = time.monotonic() + ENOUGH
        while key.statistics().waiting < count:
            assert time.monotonic() < end
            time.sleep(0.001)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(asyncio.run, many(heavy, 60))
        wait_for(60)
        second = pool.submit(asyncio.run, many(light, 20))
        wait_for(80)
        holder.release()
        first.result(ENOUGH)
        second.result(ENOUGH)
    # A loop that is late for its turn is passed over, so the order is not exact.
    assert served[:50].count("light") >= 12


def test_loop_that_ends_with_calls_in_tree_leaves_nothing_behind(virtual_time: VirtualTime) -> None:
    """Nothing is left at the root or in between, and the places in a child's queue are free."""
    key = Limiter("1 RPS", concurrency=1, clock=virtual_time.clock)
    chat = key.child("chat", max_queue=20)
    agent = chat.child("agent")

    async def call() -> None:
        async with agent.acquire():
            await asyncio.sleep(3)

    async def left_behind() -> None:
        held = await key.acquire()
        for _ in range(20):
            asyncio.create_task(call())  # noqa: RUF006 - to be cancelled by asyncio.run
        await asyncio.sleep(0)
        assert agent.statistics().waiting == 20
        held.release()

    asyncio.run(left_behind())
    for limiter in (key, chat, agent):
        now = limiter.statistics()
        assert (now.waiting, now.in_flight) == (0, 0)

    async def once() -> None:
        async with agent.acquire() as lease:
            assert lease.waited == 0

    virtual_time.advance(2)
    asyncio.run(once())


def test_loop_closed_with_calls_waiting_in_tree_is_counted_out() -> None:
    key = Limiter(concurrency=1)
    agent = key.child("chat").child("agent")
    held = key.acquire_nowait()
    loop = asyncio.new_event_loop()

    async def waiting() -> None:
        abandoned.extend(asyncio.ensure_future(agent.acquire()) for _ in range(5))
        await asyncio.sleep(0)

    abandoned: list[asyncio.Task[Lease]] = []
    loop.run_until_complete(waiting())
    abandoned[2].cancel()
    while abandoned:
        setattr(abandoned.pop(), "_log_destroy_pending", False)  # noqa: B010 - not in the stubs
    loop.close()
    held.release()
    gc.collect()
    for limiter in (key, agent):
        assert limiter.statistics().waiting == 0
    key.acquire_nowait().release()


class Contended(FakeLock):
    """A lock that looks taken, as if by another thread, to any caller that does not wait."""

    def acquire(self, blocking: bool = True) -> bool:  # noqa: FBT001, FBT002 - as `Lock.acquire`
        return blocking and super().acquire()


def test_calls_cancelled_by_ending_loop_while_lock_is_taken_are_counted_out() -> None:
    """Its postponed work is done after the loop is closed and its pacer is gone."""
    key = Limiter(concurrency=1, max_queue=3)
    chat = key.child("chat")
    held = key.acquire_nowait()

    async def left_behind() -> None:
        for _ in range(3):
            asyncio.create_task(chat.acquire())  # noqa: RUF006 - to be cancelled by asyncio.run
        await asyncio.sleep(0)
        assert chat.statistics().waiting == 3
        key._node.pacer.lock = Contended()

    asyncio.run(left_behind())
    for limiter in (key, chat):
        now = limiter.statistics()
        assert (now.waiting, now.cancelled) == (0, 3)
    held.release()
    assert key._node.pacer.waiting == 0


async def test_refused_call_in_child_makes_room_for_call_behind_it(
    virtual_time: VirtualTime,
) -> None:
    key = Limiter("100 TPM", clock=virtual_time.clock)
    child = key.child("child", "100 TPM")
    held = await child.acquire(tokens=40)
    costly = asyncio.ensure_future(child.acquire(tokens=90))
    cheap = asyncio.ensure_future(child.acquire(tokens=20))
    await virtual_time.all_blocked()
    child.reconfigure(tpm=60)
    with pytest.raises(CostExceedsLimit):
        await costly
    assert (await cheap).waited == 0
    held.release()


async def test_timeout_in_line_of_one_tenant_does_not_affect_others(
    virtual_time: VirtualTime,
) -> None:
    key = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    await key.acquire()
    served: list[int] = []

    async def call(number: int) -> None:
        with (
            contextlib.suppress(asyncbucket.AcquireTimeout),
            asyncbucket.deadline(2.5 if number % 2 else 100),
        ):
            async with key.acquire(tenant=f"tenant {number % 3}"):
                served.append(number)

    await asyncio.gather(*(call(number) for number in range(12)))
    assert len(served) == 6 + sum(number % 2 for number in served)
    assert virtual_time.now <= 10
    assert key.statistics().waiting == 0


async def test_cancelled_head_that_leaves_late_is_not_mistaken_for_new_head(
    virtual_time: VirtualTime,
) -> None:
    """It is cancelled, the pacer skips it, and another call becomes head before its task runs."""
    key = Limiter(clock=virtual_time.clock)
    child, other = key.child("child", "1/s"), key.child("other", "1/s")
    for limiter in (child, other):
        await limiter.acquire()
    waiting = asyncio.create_task(other.acquire())
    gone = asyncio.create_task(child.acquire())
    await asyncio.sleep(0)
    key.pause(0.5)  # the pacer looks first
    followers = [asyncio.create_task(child.acquire()) for _ in range(2)]
    gone.cancel()
    async with asyncio.timeout(60):
        leases = await asyncio.gather(waiting, *followers)
    assert [lease.bound_by for lease in leases] == ["requests"] * 3
    assert (key.statistics().waiting, key.statistics().cancelled) == (0, 1)
