"""A call that gives up, at whatever await, leaves everything as if it had never asked."""

import asyncio
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, Limiter, TokenBucket
from asyncbucket.engine import limiter as core
from asyncbucket.testing import VirtualTime, virtual_time
from tests.engine import conftest
from tests.engine.conftest import all_blocked, start, start_all, steps, used

CORE = core.__file__.rpartition("limiter.py")[0]


def nothing_is_left(limiter: Limiter) -> None:
    conftest.nothing_is_left(limiter)
    with limiter.acquire_nowait() as lease:
        assert lease.waited == 0


async def acquire_and_release(limiter: Limiter) -> None:
    async with limiter.acquire(tokens=10):
        pass


def call_after(steps_left: int, function: Callable[[], object]) -> None:
    if steps_left:
        asyncio.get_running_loop().call_soon(call_after, steps_left - 1, function)
    else:
        function()


@pytest.mark.parametrize(
    ("path", "others"),
    [
        ((), None),
        ((), "alike"),
        (("chat", "agent"), "elsewhere"),
        pytest.param(("chat", "agent"), "alike", marks=pytest.mark.heavy),
    ],
)
def test_cancelling_at_any_line_leaks_nothing(path: tuple[str, ...], others: str | None) -> None:
    """Ctrl-C under ``asyncio.run`` cancels the main task between any two lines of Python."""

    async def interrupted(time: VirtualTime, moment: int) -> bool:
        """Cancel at this moment of the handover; return whether there was one."""
        limiter = key = Limiter("100 TPM", "5 images/m", concurrency=1, clock=time.clock)
        for name in path:
            limiter = limiter.child(name)
        holder = await limiter.acquire(tokens=10)
        other = key.child("other") if others == "elsewhere" else limiter
        limiters = [limiter, *[other] * (2 if others else 0)]
        calls = await start_all(acquire_and_release(each) for each in limiters)
        left = moment

        def interrupt(frame: FrameType, *_: object) -> None:
            nonlocal left
            if frame.f_code.co_filename.startswith(CORE):
                left -= 1
                if left == 0:
                    calls[0].cancel()

        sys.setprofile(interrupt)
        try:
            holder.release()
            await asyncio.gather(*calls, return_exceptions=True)
        finally:
            sys.setprofile(None)
        assert not any(call.cancelled() for call in calls[1:])
        admitted = key.statistics().admitted
        assert len(calls) + 1 - admitted in ([0, 1] if calls[0].cancelled() else [0])
        assert used(key) == [10 * admitted, 0]
        assert time.now == 0
        nothing_is_left(key)
        return left <= 0

    for moment in range(1, 10_000):
        with virtual_time() as time:
            if not time.run(interrupted(time, moment)):
                assert moment > 50
                break


@pytest.mark.parametrize("depth", range(5))
async def test_bucket_takes_unit_back_from_cancelled_waiter(time: VirtualTime, depth: int) -> None:
    """Cancelled at any step around its own instant, it leaves its unit to the next call."""
    bucket = TokenBucket(rate=1.0, burst=1, clock=time.clock)
    await bucket.acquire()
    first, second = await start_all(bucket.acquire() for _ in range(2))
    asyncio.get_running_loop().call_at(1.0, call_after, depth, first.cancel)
    await second
    assert time.now == (1.0 if first.cancelled() else 2.0)


@pytest.mark.parametrize("depth", range(5))
async def test_settling_call_that_never_went_changes_nothing(time: VirtualTime, depth: int) -> None:
    """Neither one cancelled around its own instant, when others booked, nor one that was refused."""
    limiter = Limiter("100 TPM", concurrency=1, clock=time.clock)
    held = await limiter.acquire(tokens=10)

    async def call(timeout: float | None = None) -> None:
        lease = limiter.acquire(tokens=50, timeout=timeout)
        try:
            await lease
        finally:
            lease.settle(tokens=0)
            lease.release()

    with pytest.raises(AcquireTimeout):
        await call(timeout=1)
    waiting = await start(call())
    held.settle(tokens=30)
    held.release()
    call_after(depth, waiting.cancel)
    await asyncio.wait([waiting])
    assert (used(limiter), limiter.statistics().in_flight) == ([30], 0)


async def test_next_call_passes_at_once_when_head_is_cancelled(time: VirtualTime) -> None:
    limiter = Limiter("50 tokens/10s burst 7", clock=time.clock)
    limiter.acquire_nowait(tokens=7)
    late = asyncio.ensure_future(limiter.acquire(tokens=7, timeout=1.5))
    await asyncio.sleep(1)
    limiter.pause(1)
    with pytest.raises(AcquireTimeout):
        await late
    await asyncio.sleep(5)
    costly = await start(limiter.acquire(tokens=20))
    cheap = asyncio.ensure_future(limiter.acquire(tokens=5))
    await asyncio.sleep(1)
    costly.cancel()
    assert (await cheap).waited == 1


async def test_asyncio_wait_for_and_timeout_leave_nothing_behind(time: VirtualTime) -> None:
    limiter = Limiter(concurrency=1, clock=time.clock)
    holder = await limiter.acquire()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(limiter.acquire(), 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), limiter.acquire():
            pass
    late = limiter.acquire(timeout=1)
    with pytest.raises(AcquireTimeout):
        await late
    assert late.released
    assert time.now == 3.0
    now = limiter.statistics()
    assert (now.cancelled, now.refused) == (2, 1)
    holder.release()
    nothing_is_left(limiter)


@pytest.mark.parametrize("turns", range(6))
def test_call_handed_over_on_loop_that_is_closed_then_leaks_nothing(turns: int) -> None:
    """It had passed, but its task never ran again."""
    limiter = Limiter("100 TPM", concurrency=1)
    holder = limiter.acquire_nowait()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, __: None)  # "Task was destroyed": this is intended
    task = loop.create_task(acquire_and_release(limiter))
    loop.run_until_complete(steps(3))
    assert limiter.statistics().waiting == 1

    async def release() -> None:
        holder.release()
        await steps(turns)

    loop.run_until_complete(release())
    loop.close()
    del task
    gc.collect()
    nothing_is_left(limiter)
    assert used(limiter) in ([0], [10])


async def test_dropped_lease_that_waited_with_deadline_releases_itself(time: VirtualTime) -> None:
    """Nothing that looks after deadlines keeps it alive."""
    limiter = Limiter(concurrency=1, clock=time.clock)
    held = await limiter.acquire()
    waiting = await start(limiter.acquire(timeout=1_000))
    held.release()
    await waiting
    del waiting, held
    await asyncio.sleep(0)  # until then the task is an argument of the callback that runs
    await all_blocked()
    limiter.acquire_nowait().release()
    assert time.now == 0


@pytest.mark.parametrize("before", [False, True])
async def test_call_that_gives_up_as_its_store_hands_it_over_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    key = Limiter("60 TPM", concurrency=1, store=f"sqlite:///{tmp_path}/limits.db")
    team = key.child("team", "60 TPM", "5 images/m")
    pacer = key._node.pacer
    pass_on = pacer.pass_on_locked

    def cancelling(*booked: Any) -> bool:
        if before:
            call.cancel()
        passed = pass_on(*booked)
        call.cancel()
        assert passed is not before
        return bool(passed)

    monkeypatch.setattr(pacer, "pass_on_locked", cancelling)
    call = asyncio.ensure_future(team.acquire(tokens=5))
    await asyncio.wait([call])
    monkeypatch.undo()
    async with team.acquire(tokens=60, timeout=20):
        assert (team.statistics().cancelled, key.statistics().in_flight) == (1, 1)
    await key.aclose()
