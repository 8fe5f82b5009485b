"""When to look again: one task for each loop, alive only while a call waits."""

import asyncio
import contextvars
import gc
import itertools
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVarTuple

import pytest

from asyncbucket import Limiter, TokenBucket
from asyncbucket.testing import VirtualTime, VirtualTimeLoop
from tests.engine.conftest import cancel, start, start_all

Ts = TypeVarTuple("Ts")


def pacers() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "asyncbucket pacer"]


async def test_pacer_lives_while_calls_wait_whoever_cancels_it(time: VirtualTime) -> None:
    limiter = Limiter("1/s burst 1", concurrency=1, clock=time.clock)
    holder = await limiter.acquire()
    await asyncio.sleep(0)
    assert not pacers()
    waiting = await start_all(limiter.acquire() for _ in range(2))
    for _ in range(3):
        limiter.pause(0)  # somebody rings
        await time.all_blocked()
        (pacer,) = pacers()
        pacer.cancel()
        await time.all_blocked()
    holder.release()
    for call in waiting:
        (await call).release()
    assert time.now == pytest.approx(2.0, rel=0.01)
    await time.all_blocked()
    assert not pacers()


async def test_limiter_is_forgotten_once_all_waiting_calls_are_cancelled(time: VirtualTime) -> None:
    for waiting in 1, 3:
        limiter = Limiter("1 RPH", concurrency=1, clock=time.clock)
        limiter.acquire_nowait().release()
        forgotten = weakref.ref(limiter._node.pacer)
        cancel(*await start_all(limiter.acquire() for _ in range(waiting)))
        await time.all_blocked()
        assert not pacers()
        del limiter
        gc.collect()
        assert forgotten() is None


@pytest.mark.parametrize("children", [1, 2])
async def test_1000_calls_are_admitted_in_batches_of_256(time: VirtualTime, children: int) -> None:
    limiter = Limiter("1000 TPM", clock=time.clock)
    below = [limiter.child(str(number)) for number in range(children)]
    holder = await limiter.acquire(tokens=1000)
    calls = await start_all(below[number % children].acquire(tokens=1) for number in range(1000))
    holder.settle(tokens=0)
    turns: list[int] = []
    while not all(call.done() for call in calls):
        await asyncio.sleep(0)
        turns.append(sum(call.done() for call in calls))
    assert max(after - before for before, after in itertools.pairwise(turns)) == 256
    assert time.now == 0


def test_timer_that_fires_early_admits_no_call_early() -> None:
    """Timers of uvloop may be up to 1 ms early: the pacer looks again, and sleeps for the rest."""
    naps: list[float] = []

    class EarlyLoop(VirtualTimeLoop):
        def call_at(
            self,
            when: float,
            callback: Callable[[*Ts], object],
            *args: *Ts,
            context: contextvars.Context | None = None,
        ) -> asyncio.TimerHandle:
            naps.append(when - self.time())
            early = max(self.time() + 1e-5, when - 0.001)
            return super().call_at(early, callback, *args, context=context)

    async def main(loop: EarlyLoop) -> None:
        bucket = TokenBucket(rate=1.0, clock=loop.clock)
        for _ in range(4):
            await bucket.acquire()

    with asyncio.Runner(loop_factory=EarlyLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, EarlyLoop)
        runner.run(main(loop))
        assert 3.0 <= loop.time() < 3.0001
    assert len(naps) < 400


async def test_calls_that_leave_a_long_line_leave_nothing_behind(time: VirtualTime) -> None:
    limiter = Limiter("1 RPH", clock=time.clock)
    limiter.acquire_nowait()
    leases = [limiter.acquire(timeout=3_700) for _ in range(2_000)]
    left = [weakref.ref(lease) for lease in leases[1:-1]]
    first, *calls, last = await start_all(leases)
    leases.clear()
    cancel(*calls)
    await asyncio.wait(calls)
    calls.clear()
    late = await start(limiter.acquire(timeout=3_700))
    gc.collect()
    assert sum(each() is not None for each in left) < 100
    assert limiter.statistics().waiting == 3
    cancel(first, last, late)


async def test_slots_that_do_not_come_back_are_named_once(
    time: VirtualTime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the machine's clock says so, which this clock is taken for: on others a minute is nothing."""
    clock = time.clock
    monkeypatch.setattr("asyncbucket.engine.dispatchers.time", SimpleNamespace(monotonic_ns=clock))
    limiter = Limiter(concurrency=2, name="openai", clock=clock)
    below = limiter.child("chat", concurrency=5)
    forgotten = [await below.acquire() for _ in range(2)]
    await asyncio.sleep(600)  # while nobody waits, nobody is kept waiting
    calls = [asyncio.ensure_future(below.acquire()) for _ in range(3)]
    await asyncio.sleep(3)
    forgotten.pop().release()
    await asyncio.sleep(400)
    (said,) = caplog.messages
    assert said.startswith("no call has passed for 7 s: open leases hold 2 of 2 slots of 'openai'")
    for lease in forgotten:
        lease.release()
    for call in calls:
        (await call).release()


async def test_patient_call_keeps_nothing_of_those_that_pass_meanwhile(time: VirtualTime) -> None:
    key = Limiter("1000/s", clock=time.clock)
    agent = key.child("chat", "1M TPD").child("agent")
    await agent.acquire(tokens=700_000)
    patient = await start(agent.acquire(tokens=500_000, timeout=90_000))
    await asyncio.gather(*(agent.acquire(tokens=1, priority=1) for _ in range(100)))
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(1_000):
        (await agent.acquire(tokens=1, priority=1, timeout=99_000)).release()
    gc.collect()
    assert sys.getallocatedblocks() < before + 1_500
    patient.cancel()
