"""Loops that are blocked, stopped or closed hold up no call elsewhere, and keep nothing for ever."""

import asyncio
import concurrent.futures
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns, sleep
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, Lease, Limiter, Pool
from asyncbucket.engine import dispatchers
from asyncbucket.testing import VirtualClock, VirtualTime
from tests.engine.conftest import cancel, nothing_is_left, start_all
from tests.engine.test_threads import ENOUGH, eventually, in_another_thread, loop_in_thread, take


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(dispatchers, "_PATIENCE", 100_000_000)
    return 0.1


def below(key: Limiter, depth: int, concurrency: int) -> Limiter:
    limiter = key
    for level in range(depth):
        limiter = limiter.child(f"level {level}")
    limiter.reconfigure(concurrency=concurrency)
    return limiter


def overridden(key: Limiter) -> int:
    """Assert that nothing is left over; return how many calls passed without a slot."""
    nothing_is_left(key)
    return key.statistics().overridden


async def test_loop_that_dispatches_in_its_next_turn_is_not_blocked(time: VirtualTime) -> None:
    """It does so when a caller who may be back then would be next."""
    await asyncio.sleep(60)
    limiter = Limiter(concurrency=1, clock=time.clock.__call__)  # a real loop asks, too
    children = limiter.child("a", weight=4), limiter.child("b")

    async def call(child: Limiter) -> None:
        async with child.acquire():
            with pytest.raises(AcquireTimeout):
                in_another_thread(lambda: limiter.acquire(timeout=0))

    held = await limiter.acquire()
    waiting = await start_all(call(children[each]) for each in (1, 0, 1))
    held.release()
    await asyncio.gather(*waiting)


@pytest.mark.usefixtures("impatient")
def test_blocked_loop_with_all_slots_does_not_deadlock(caplog: pytest.LogCaptureFixture) -> None:
    """Calls on other loops pass after a second; they are counted, and one warning is logged."""
    limiter = Limiter(concurrency=2)

    async def main() -> None:
        held = [await limiter.acquire() for _ in range(2)]
        for _ in range(2):  # as VectorStoreIndex(use_async=True) does in a running loop
            in_another_thread(lambda: take(limiter))
        for lease in held:
            lease.release()

    with caplog.at_level(logging.WARNING, logger="asyncbucket"):
        asyncio.run(main())
    assert overridden(limiter) == 2
    # In its debug mode, asyncio warns of the blocked loop, too.
    (record,) = (each for each in caplog.records if each.name == "asyncbucket")
    assert record.getMessage() == (
        "a call passed without a slot: every slot is held on an event loop that has been blocked "
        "for over 1 s; await on that loop instead of blocking it"
    )


@pytest.mark.parametrize("stopped_first", [False, True])
@pytest.mark.parametrize("is_pool", [False, True])
def test_slot_left_on_ended_loop_holds_up_nobody(
    impatient: float, *, stopped_first: bool, is_pool: bool
) -> None:
    """It is ignored like one held on a blocked loop, also by a call on a stopped loop before it."""
    limiter = Pool(Limiter(concurrency=1)) if is_pool else Limiter(concurrency=1)
    leaked = asyncio.run(take(limiter))
    stopped = asyncio.new_event_loop()
    first = stopped.create_task(take(limiter))
    if stopped_first:
        run_until_waiting(stopped, limiter)
    with limiter.acquire_sync(timeout=10) as lease:
        assert impatient <= lease.waited < 5
    first.cancel()
    stopped.run_until_complete(asyncio.wait([first]))
    stopped.close()
    leaked.release()
    assert overridden(limiter) == 1


@pytest.mark.usefixtures("impatient")
async def test_call_that_a_store_holds_back_passes_without_slot_elsewhere(tmp_path: Path) -> None:
    free = Limiter(concurrency=1, name="free")
    used_up = Limiter("1 requests/h burst 1", name="used up", store=f"sqlite:///{tmp_path}/db")
    pool = Pool(free, used_up)
    leaked: Any = await asyncio.to_thread(asyncio.run, take(pool))
    (await pool.acquire()).release()
    held_back = asyncio.create_task(take(pool))
    place = used_up._node.pacer.place
    while not held_back.done() and (place is None or not place.held_back()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # a session of its own says so, soon before the call passes
    behind = asyncio.create_task(take(pool))
    lease: Any = await asyncio.wait_for(held_back, ENOUGH)
    assert (leaked.limiter, lease.limiter, behind.done()) == (free, free, False)
    behind.cancel()
    await asyncio.wait([behind])
    lease.release()
    leaked.release()
    assert overridden(pool) == 1
    await pool.aclose()


@pytest.mark.usefixtures("impatient")
async def test_call_that_waits_for_a_store_does_not_pass_without_slot(tmp_path: Path) -> None:
    pool = Pool(Limiter("1 requests/h burst 1", store=f"sqlite:///{tmp_path}/db"))
    leaked = await asyncio.to_thread(asyncio.run, take(pool))
    waiting = [asyncio.create_task(take(pool))]
    for _ in range(2):  # by the second round, the store has said that it holds the first call up
        await asyncio.sleep(0.3)
        waiting.append(asyncio.create_task(take(pool)))
    assert pool.statistics().overridden == 0
    cancel(*waiting)
    await asyncio.wait(waiting)
    leaked.release()
    assert overridden(pool) == 0
    await pool.aclose()


@pytest.mark.parametrize("holder", ["thread", "same loop"])
def test_slot_held_where_code_runs_is_waited_for(impatient: float, holder: str) -> None:
    """A plain thread may release it at any time, and so may the loop on which the call waits."""
    limiter = Limiter(concurrency=1)
    lease = limiter.acquire_nowait() if holder == "thread" else None

    async def main() -> None:
        held = lease or await limiter.acquire()
        with pytest.raises(AcquireTimeout):
            await limiter.acquire(timeout=3 * impatient)
        held.release()

    asyncio.run(main())
    assert overridden(limiter) == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("depth", [0, 1])
def test_calls_without_slot_keep_limits_and_run_no_more_at_once_than_slots(depth: int) -> None:
    key = Limiter()
    limiter = below(key, depth, 2)
    limiter.reconfigure("5 requests/s burst 5")
    inside, most = 0, 0
    trace: list[int] = []

    async def call() -> None:
        nonlocal inside, most
        async with limiter.acquire():
            trace.append(monotonic_ns())
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= 1

    async def elsewhere() -> None:
        await asyncio.gather(*(call() for _ in range(4)))

    async def main() -> None:
        held = [await limiter.acquire() for _ in range(2)]
        trace.append(monotonic_ns())
        in_another_thread(elsewhere)
        with pytest.warns(RuntimeWarning, match="blocks the event loop") as warned:
            limiter.child("agent").acquire_sync().release()  # and it holds the slots
        assert warned[0].filename == __file__
        for lease in held:
            lease.release()

    asyncio.run(main())
    assert 1 <= most <= 2
    assert overridden(key) == 5
    assert trace[-1] - trace[0] >= 900_000_000


def test_calls_wait_for_busy_loop_that_holds_all_slots() -> None:
    clock = VirtualClock()
    limiter = Limiter(concurrency=1, clock=clock)
    with loop_in_thread() as loop:
        lease = asyncio.run_coroutine_threadsafe(take(limiter), loop).result(ENOUGH)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            job = pool.submit(limiter.acquire_sync)
            eventually(lambda: limiter.statistics().waiting == 1)
            dispatcher = limiter._node.pacer.dispatchers[loop]
            for _ in range(20):
                clock.advance(0.6)
                limiter.pause(0)  # it rings the pacer
                eventually(lambda: dispatcher.wakes_at > clock())  # it has answered
            assert not job.done()
            lease.release()
            job.result(ENOUGH).release()
    assert overridden(limiter) == 0


# --- loops that are gone ---


def run_until_waiting(loop: asyncio.AbstractEventLoop, limiter: Limiter) -> None:

    async def waiting() -> None:
        async with asyncio.timeout(ENOUGH):
            while not limiter.statistics().waiting:  # noqa: ASYNC110 - two turns of the loop
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop.run_until_complete(waiting())


def waiting_on_closed_loop(
    limiter: Limiter, *, tokens: int | None = None, rung: Callable[[], object] = int
) -> asyncio.Task[Lease]:
    """Return a call that waits on a loop that was closed; ``rung`` was called just before."""
    dead = asyncio.new_event_loop()
    dead.set_exception_handler(lambda _, __: None)  # "Task was destroyed": this is intended
    task = dead.create_task(take(limiter, tokens))
    run_until_waiting(dead, limiter)
    rung()
    dead.close()
    return task


@pytest.mark.parametrize("path", [(), ("chat", "agent")])
@pytest.mark.parametrize("rung", [False, True])
@pytest.mark.parametrize("how", ["thread", "at once", "loop", "cancelled", "coroutine", "dropped"])
def test_call_on_closed_loop_ends_once(path: tuple[str, ...], how: str, *, rung: bool) -> None:
    """It holds up no other call, and may still be cancelled, closed or dropped."""
    key = limiter = Limiter("1000/s burst 2", concurrency=1)
    for name in path:
        limiter = limiter.child(name)
    holder = key.acquire_nowait()
    task = [waiting_on_closed_loop(limiter, rung=holder.release if rung else int)]
    holder.release()
    if how == "thread":
        limiter.acquire_sync(timeout=ENOUGH).release()
    elif how == "at once":
        sleep(0.01)
        limiter.acquire_nowait().release()
    elif how == "loop":
        asyncio.run(asyncio.wait_for(limiter.acquire(), ENOUGH)).release()
    elif how == "cancelled":
        with pytest.raises(RuntimeError, match="closed"):
            task[0].cancel()
        assert key.statistics().waiting == 0
    elif how == "coroutine":
        coroutine = task[0].get_coro()
        assert coroutine is not None
        coroutine.close()
    task.clear()
    gc.collect()
    nothing_is_left(key, limiter)
    sleep(0.01)
    key.acquire_nowait().release()
    assert key.statistics().waiting == 0


@pytest.mark.parametrize("dead_first", [True, False])
def test_limit_can_be_lowered_below_cost_of_waiter_on_closed_loop(*, dead_first: bool) -> None:
    """The call on the closed loop cannot be told, which is no error; calls on other loops are."""
    limiter = Limiter("1k TPM")
    limiter.acquire_nowait(tokens=1_000)
    dead = [waiting_on_closed_loop(limiter, tokens=900)] if dead_first else []
    live = asyncio.new_event_loop()
    waiting = live.create_task(take(limiter, 900))
    live.run_until_complete(asyncio.sleep(0))
    if not dead_first:
        dead.append(waiting_on_closed_loop(limiter, tokens=900))

    async def lower() -> None:
        limiter.reconfigure(tpm=100)
        with pytest.raises(CostExceedsLimit):
            await waiting

    live.run_until_complete(lower())
    live.close()
    nothing_is_left(limiter)
