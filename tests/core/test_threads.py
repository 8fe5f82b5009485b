"""One budget for all loops and threads of a process, tested with real threads and in real time."""

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, Lease, Limiter, TokenBucket
from asyncbucket.core import pacer
from asyncbucket.core.events import Event, Queued, Settled
from asyncbucket.core.seats import ThreadSeat
from asyncbucket.testing import VirtualClock, VirtualTime

#: Seconds after which a test that waits for another thread gives up.
ENOUGH = 20


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    """Take loops for blocked after a tenth of a second."""
    monkeypatch.setattr(pacer, "_PATIENCE", 100_000_000)
    return 0.1


@contextlib.contextmanager
def loop_in_thread() -> Generator[asyncio.AbstractEventLoop]:
    """Run an event loop in a separate thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(ENOUGH)
        loop.close()


def run_until_waiting(loop: asyncio.AbstractEventLoop, limiter: Limiter) -> None:
    """Run `loop` until a call waits, and then abandon it."""

    async def waiting() -> None:
        async with asyncio.timeout(ENOUGH):
            while not limiter.statistics().waiting:  # noqa: ASYNC110 - two turns of the loop
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop.run_until_complete(waiting())


def turn(*loops: asyncio.AbstractEventLoop) -> None:
    """Let each loop run some iterations, one loop after the other, too briefly for their timers."""
    for loop in loops * 9:
        loop.call_soon(loop.stop)
        loop.run_forever()


@contextlib.contextmanager
def two_loops() -> Generator[tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop]]:
    """Give two loops that run only during `turn`."""
    loops = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        yield loops
    finally:
        for loop in loops:
            loop.close()


def eventually(happened: Callable[[], bool]) -> None:
    """Wait until something that happens in another thread has happened."""
    end = time.monotonic() + ENOUGH
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_limiter_and_bucket_work_in_several_asyncio_runs() -> None:
    limiter = Limiter("1000/s", concurrency=1)
    bucket = TokenBucket(rate=10_000, burst=1)

    async def main() -> None:
        async def call() -> None:
            async with limiter.acquire(), bucket:
                await asyncio.sleep(0)

        await asyncio.gather(*(call() for _ in range(10)))

    for _ in range(3):
        asyncio.run(main())
    assert limiter.statistics().admitted == 30


def test_calls_of_two_loops_pass_in_order_of_arrival() -> None:
    limiter = Limiter(concurrency=1)
    holder = limiter.acquire_nowait()
    served: list[int] = []

    async def call(number: int) -> None:
        async with limiter.acquire():
            served.append(number)

    with loop_in_thread() as one, loop_in_thread() as other:
        jobs: list[concurrent.futures.Future[None]] = []
        for number in range(12):
            loop = one if number % 2 else other
            jobs.append(asyncio.run_coroutine_threadsafe(call(number), loop))
            eventually(lambda: limiter.statistics().waiting == len(jobs))
        holder.release()
        for job in jobs:
            job.result(ENOUGH)
    assert served == list(range(12))


def test_timed_out_head_makes_room_for_call_on_another_loop() -> None:
    clock = VirtualClock()
    limiter = Limiter("10 TPM", clock=clock)
    held = limiter.acquire_nowait(tokens=8)
    with two_loops() as (here, there):
        costly = here.create_task(limiter.acquire(tokens=9, timeout=30))
        turn(here)
        cheap = there.create_task(limiter.acquire(tokens=1))
        turn(there, here)
        clock.advance(30)
        limiter._node.pacer.seats[here].ring(clock())
        turn(here)
        assert isinstance(costly.exception(), AcquireTimeout)
        turn(there)
        assert cheap.result().bound_by == "tokens"
    held.release()


def test_loop_that_does_not_know_it_is_next_is_woken() -> None:
    """It meant to let a call of this loop go first, but it is no longer that call's turn."""
    clock = VirtualClock()
    limiter = Limiter("10 TPM", clock=clock)
    limiter.acquire_nowait(tokens=10).release()
    with two_loops() as (here, there):
        first = there.create_task(limiter.acquire(tokens=1))
        turn(there)
        second = here.create_task(limiter.acquire(tokens=1))
        turn(here, there)
        seats = limiter._node.pacer.seats
        clock.advance(60.5)
        seats[there].looks_at = clock() + 1_000_000_000
        seats[here].ring(clock())
        turn(here, there)
        assert (first.done(), second.done()) == (True, True)


async def test_lease_can_be_released_and_settled_in_another_thread() -> None:
    """Both the slot and the refund reach a call that waits on this loop."""
    limiter = Limiter("100 TPM", concurrency=1)
    lease = await limiter.acquire(tokens=100)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=60))
    await asyncio.sleep(0)

    def elsewhere() -> None:
        lease.settle(tokens=40)
        lease.release()
        lease.release()

    await asyncio.to_thread(elsewhere)
    async with asyncio.timeout(ENOUGH):
        (await waiting).release()
    assert limiter.statistics().in_flight == 0


def test_acquire_sync_waits_for_slot() -> None:
    """A thread sleeps until another gives its slot back; `waited` and `bound_by` tell of it."""
    limiter = Limiter(concurrency=1)
    holder = limiter.acquire_sync()
    assert (holder.waited, holder.bound_by) == (0, None)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(limiter.acquire_sync)
        eventually(lambda: limiter.statistics().waiting == 1)
        holder.release()
        with job.result(ENOUGH) as lease:
            assert lease.waited > 0
            assert lease.bound_by == "concurrency"
    assert limiter.statistics().in_flight == 0


def test_acquire_sync_refuses_like_acquire() -> None:
    """A cost that can never pass, a deadline that cannot be met, and one that is reached."""
    limiter = Limiter("10 TPM burst 10", concurrency=1)
    with pytest.raises(CostExceedsLimit, match="cost of 11 tokens exceeds the limit of 10 tokens"):
        limiter.acquire_sync(tokens=11)
    held = limiter.acquire_sync(tokens=10)
    with pytest.raises(AcquireTimeout, match="cannot pass within"):
        limiter.acquire_sync(timeout=0.01)
    held.release()
    with pytest.raises(AcquireTimeout, match=r"within 0\.0\d+ s: tokens bind for 60\.\d s more"):
        limiter.acquire_sync(tokens=1, timeout=0.01)
    assert limiter.statistics().refused == 3
    assert limiter.statistics().waiting == 0


class Interrupted(BaseException):
    """Stand for a KeyboardInterrupt that arrives while a thread waits."""


@pytest.mark.parametrize("admitted", [False, True])
def test_interrupted_thread_gives_everything_back(
    monkeypatch: pytest.MonkeyPatch, *, admitted: bool
) -> None:
    """After Ctrl-C in `acquire_sync` the call no longer waits, and keeps nothing it was given."""
    limiter = Limiter("100 TPM", concurrency=1)
    holder = limiter.acquire_nowait()

    def block(seat: Any, done: Callable[[], bool], _: object) -> None:
        assert limiter.statistics().waiting == 1
        if admitted:
            holder.release()
            seat.look(seat)
        assert done() == admitted
        raise Interrupted

    monkeypatch.setattr(ThreadSeat, "block", block)
    with pytest.raises(Interrupted):
        limiter.acquire_sync(tokens=70)
    holder.release()
    now = limiter.statistics()
    assert (now.waiting, now.in_flight, now.cancelled, now.limits[0].used) == (0, 0, 1, 0)
    limiter.acquire_nowait().release()


def test_acquire_sync_starts_no_thread() -> None:
    before = set(threading.enumerate())
    limiter = Limiter(concurrency=1)
    with limiter.acquire_sync(), pytest.raises(AcquireTimeout):
        limiter.acquire_sync(timeout=0.001)
    assert set(threading.enumerate()) == before


def test_system_exit_in_observer_does_not_affect_other_waiting_threads() -> None:
    limiter = Limiter(concurrency=1)
    held = limiter.acquire_nowait()

    def leave(event: Event) -> None:
        if isinstance(event, Queued) and event.waiting == 2:
            sys.exit(3)

    limiter.observe(leave)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(limiter.acquire_sync)
        eventually(lambda: limiter.statistics().waiting == 1)
        with pytest.raises(SystemExit):
            limiter.acquire_sync()
        held.release()
        waiting.result(ENOUGH).release()
    assert limiter.statistics().waiting == 0


def in_another_thread(call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Run ``call`` on a loop of its own, and block this one, as synchronous code on it does."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(call())).result(ENOUGH)


@pytest.mark.usefixtures("impatient")
def test_blocked_loop_that_holds_all_slots_does_not_deadlock(
    caplog: pytest.LogCaptureFixture,
) -> None:
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
    assert limiter.statistics().overridden == 2
    assert limiter.statistics().in_flight == 0
    # In its debug mode, asyncio warns of the blocked loop, too.
    (record,) = (each for each in caplog.records if each.name == "asyncbucket")
    assert record.getMessage() == (
        "a call passed without a slot: every slot is held on an event loop that has been blocked "
        "for over 1 s; await on that loop instead of blocking it"
    )


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("path", [(), ("model",)])
def test_acquire_sync_on_loop_that_holds_all_slots_does_not_deadlock(path: tuple[str, ...]) -> None:
    """Blocking code on the loop's own thread passes, too, at any level of the tree."""
    key = limiter = Limiter(concurrency=10)
    for name in path:
        limiter = limiter.child(name)
    limiter.reconfigure(concurrency=1)

    async def main() -> None:
        async with limiter.acquire():
            with limiter.child("agent").acquire_sync():
                pass

    asyncio.run(main())
    now = key.statistics()
    assert (now.overridden, now.in_flight, now.waiting) == (1, 0, 0)


def test_slot_left_on_ended_loop_does_not_hold_up_calls_for_ever(impatient: float) -> None:
    """A slot leaked by a finished run is ignored, like one held on a blocked loop."""
    limiter = Limiter(concurrency=1)
    leaked = asyncio.run(take(limiter))
    with limiter.acquire_sync(timeout=ENOUGH) as lease:
        assert lease.waited >= impatient
    leaked.release()
    assert limiter.statistics().overridden == 1
    assert limiter.statistics().in_flight == 0


@pytest.mark.usefixtures("impatient")
def test_call_passes_without_slot_though_one_on_stopped_loop_came_first() -> None:
    limiter = Limiter(concurrency=1)
    leaked = asyncio.run(take(limiter))
    stopped = asyncio.new_event_loop()
    first = stopped.create_task(take(limiter))
    run_until_waiting(stopped, limiter)
    limiter.acquire_sync(timeout=ENOUGH).release()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        stopped.run_until_complete(first)
    stopped.close()
    leaked.release()
    now = limiter.statistics()
    assert (now.overridden, now.in_flight, now.waiting) == (1, 0, 0)


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
    assert limiter.statistics().overridden == 0


def test_slot_held_by_thread_that_had_to_wait_for_it_is_waited_for(impatient: float) -> None:
    limiter = Limiter(concurrency=2)
    leaked = asyncio.run(take(limiter))
    first = limiter.acquire_nowait()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(limiter.acquire_sync)
        eventually(lambda: limiter.statistics().waiting == 1)
        first.release()
        second = job.result(ENOUGH)
    with pytest.raises(AcquireTimeout):
        limiter.acquire_sync(timeout=3 * impatient)
    second.release()
    leaked.release()
    assert limiter.statistics().overridden == limiter.statistics().in_flight == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("path", [(), ("chat",)])
def test_calls_without_slot_run_no_more_at_once_than_there_are_slots(path: tuple[str, ...]) -> None:
    """At most as many pass at once as if the slots were free; they wait one second in all."""
    limiter = Limiter()
    for name in path:
        limiter = limiter.child(name)
    limiter.reconfigure(concurrency=2)
    inside, most = 0, 0

    async def call() -> None:
        nonlocal inside, most
        async with limiter.acquire():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= 1

    async def elsewhere() -> None:
        await asyncio.gather(*(call() for _ in range(9)))

    async def main() -> float:
        held = [await limiter.acquire() for _ in range(2)]
        start = time.monotonic()
        in_another_thread(elsewhere)
        for lease in held:
            lease.release()
        return time.monotonic() - start

    assert asyncio.run(main()) < 5
    assert 1 <= most <= 2
    assert limiter.statistics().overridden == 9


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("path", [(), ("child",)])
def test_call_that_passes_without_slot_keeps_other_limits(path: tuple[str, ...]) -> None:
    """The windows are kept: the third call waits until the first has left its window."""
    limiter = key = Limiter(concurrency=1)
    for name in path:
        limiter = limiter.child(name)
    limiter.reconfigure("2 requests/s burst 2")
    trace: list[tuple[int, int]] = []

    async def elsewhere() -> None:
        await limiter.acquire()
        trace.append((time.monotonic_ns(), 1))

    async def main() -> None:
        async with limiter.acquire():
            trace.append((time.monotonic_ns(), 1))
            for _ in range(2):
                in_another_thread(elsewhere)

    asyncio.run(main())
    assert key.statistics().overridden == 2
    assert trace[2][0] - trace[0][0] >= 900_000_000


def test_calls_wait_for_busy_loop_that_holds_all_slots() -> None:
    clock = VirtualClock()
    limiter = Limiter(concurrency=1, clock=clock)

    with loop_in_thread() as loop:
        lease = asyncio.run_coroutine_threadsafe(take(limiter), loop).result(ENOUGH)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            job = pool.submit(limiter.acquire_sync)
            eventually(lambda: limiter.statistics().waiting == 1)
            for _ in range(20):
                clock.advance(0.6)
                limiter.pause(0)  # it rings the pacer
                time.sleep(0.005)
            assert not job.done()
            lease.release()
            job.result(ENOUGH).release()
    assert limiter.statistics().overridden == 0


async def take(limiter: Limiter, tokens: int | None = None) -> Lease:
    """Acquire, and keep the lease."""
    return await limiter.acquire(tokens=tokens)


@pytest.mark.parametrize("closed", [True, False])
def test_waiters_on_dead_loop_hold_up_no_other_call(*, closed: bool) -> None:
    limiter = Limiter("1000/s burst 1", concurrency=1)
    holder = limiter.acquire_nowait()
    dead = asyncio.new_event_loop()
    dead.set_exception_handler(lambda _, __: None)  # "Task was destroyed": this is intended
    task = dead.create_task(take(limiter))
    run_until_waiting(dead, limiter)
    assert limiter.statistics().waiting == 1
    if closed:
        dead.close()

    async def main() -> None:
        async with asyncio.timeout(ENOUGH):
            waiting = asyncio.create_task(take(limiter))
            await asyncio.sleep(0)
            holder.release()
            (await waiting).release()
            (await take(limiter)).release()

    asyncio.run(main())
    assert limiter.statistics().in_flight == 0
    if not closed:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            dead.run_until_complete(task)
        dead.close()
    assert limiter.statistics().waiting == 0
    del task
    gc.collect()
    assert limiter.statistics().waiting == 0


def call_waiting_on_closed_loop(
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


def test_waiter_on_closed_loop_does_not_hold_up_acquire_nowait() -> None:
    """Not even ahead of calls that do not wait, and even if nobody has rung since."""
    clock = VirtualClock()
    limiter = Limiter("1000/s burst 1", clock=clock)
    limiter.acquire_nowait()
    task = call_waiting_on_closed_loop(limiter)
    clock.advance(0.01)
    limiter.acquire_nowait()
    assert limiter.statistics().waiting == 0
    del task


def test_newcomer_does_not_wait_behind_waiter_on_closed_loop(virtual_time: VirtualTime) -> None:
    """However long the lost call would have had to wait, it does not delay others."""
    bucket = TokenBucket(rate=1, burst=100, clock=virtual_time.clock)
    bucket.acquire_nowait(100)
    dead = virtual_time.new_loop()
    dead.set_exception_handler(lambda _, __: None)  # "Task was destroyed": this is intended
    task = dead.create_task(bucket.acquire(100))
    dead.run_until_complete(dead.all_blocked())
    dead.close()
    virtual_time.run(bucket.acquire())
    assert virtual_time.now == 1
    assert bucket.statistics().waiting == 0
    del task


def test_loop_closed_before_it_hears_ring_is_counted_out() -> None:
    limiter = Limiter(concurrency=1)
    holder = limiter.acquire_nowait()
    task = call_waiting_on_closed_loop(limiter, rung=holder.release)
    limiter.acquire_sync(timeout=ENOUGH).release()
    assert limiter.statistics().waiting == 0
    limiter.acquire_nowait().release()
    del task


def test_limit_can_be_lowered_below_cost_of_waiter_on_closed_loop() -> None:
    """The call on the closed loop cannot be told, which is no error; calls on other loops are."""
    limiter = Limiter("1k TPM")
    limiter.acquire_nowait(tokens=1_000)

    async def main() -> None:
        waiting = asyncio.ensure_future(limiter.acquire(tokens=900))
        await asyncio.sleep(0)
        limiter.reconfigure(tpm=100)
        with pytest.raises(CostExceedsLimit):
            await waiting

    task = call_waiting_on_closed_loop(limiter, tokens=900)
    asyncio.run(main())
    assert limiter.statistics().waiting == 0
    del task


def test_waiter_cancelled_on_closed_loop_is_counted_out_once() -> None:
    key = Limiter(concurrency=1)
    child = key.child("chat")
    holder = key.acquire_nowait()
    abandoned = [call_waiting_on_closed_loop(child)]
    holder.release()
    assert child.statistics().waiting == 0
    with pytest.raises(RuntimeError, match="closed"):
        abandoned[0].cancel()
    abandoned.clear()
    gc.collect()
    assert child.statistics().waiting == 0


def test_coroutine_closed_after_its_loop_is_counted_out() -> None:
    limiter = Limiter(concurrency=1)
    holder = limiter.acquire_nowait()
    task = call_waiting_on_closed_loop(limiter)
    coroutine = task.get_coro()
    assert coroutine is not None
    coroutine.close()
    assert limiter.statistics().waiting == 0
    holder.release()
    limiter.acquire_nowait().release()


@pytest.mark.parametrize("locked", [False, True])
async def test_dropped_lease_gives_its_slot_to_waiting_call(*, locked: bool) -> None:
    """The collector may run while the same thread holds the lock: no deadlock, no lost slot."""
    limiter = Limiter(concurrency=1)
    lease: Lease | None = await limiter.acquire()
    waiting = asyncio.ensure_future(limiter.acquire())
    await asyncio.sleep(0)
    assert not waiting.done()
    with limiter._node.pacer if locked else contextlib.nullcontext():
        del lease
    async with asyncio.timeout(ENOUGH):
        (await waiting).release()
    assert limiter.statistics().in_flight == 0


def test_newcomer_does_what_others_left_to_holder_of_lock() -> None:
    limiter = Limiter(concurrency=1)
    left: list[str] = []
    limiter._node.pacer.jobs.append(lambda: left.append("done"))
    limiter.acquire_nowait().release()
    assert left == ["done"]


def test_lease_dropped_while_lock_is_held_frees_its_slot_for_newcomer() -> None:
    """If nobody waits, the next call handles what was dropped, and so does `statistics()`."""
    limiter = Limiter(concurrency=1)
    for look in (limiter.acquire_nowait, limiter.statistics):
        lease: Lease | None = limiter.acquire_nowait()
        with limiter._node.pacer:
            del lease
        look()
        assert limiter.statistics().in_flight == 0


def test_generator_holding_lease_can_be_closed_while_lock_is_held() -> None:
    """The collector may close a generator at any point, and so leave its ``with`` block."""
    limiter = Limiter("100 TPM", concurrency=1)
    told: list[str] = []
    limiter.observe(lambda event: told.append(type(event).__name__))

    def generator() -> Generator[None]:
        with limiter.acquire_sync(tokens=60) as lease:
            try:
                yield
            finally:
                lease.settle(tokens=10)

    abandoned = generator()
    next(abandoned)
    with limiter._node.pacer:
        abandoned.close()
    now = limiter.statistics()
    assert (now.in_flight, now.limits[0].used) == (0, 10)
    limiter.acquire_nowait(tokens=90).release()
    assert told == ["Admitted", "Settled", "Released", "Admitted", "Released"]


def test_settlements_made_while_lock_is_held_apply_in_order() -> None:
    """Of several settlements of one lease, the last holds; each event says what it corrects."""
    limiter = Limiter("100 ITPM", "100 OTPM", "100 TPM")
    corrected: list[dict[str, int]] = []
    limiter.observe(
        lambda event: corrected.append(dict(event.corrects)) if isinstance(event, Settled) else None
    )
    lease = limiter.acquire_nowait(input_tokens=30, output_tokens=40)
    with limiter._node.pacer:
        lease.settle(input_tokens=10)
        lease.settle(output_tokens=5)
    lease.settle(input_tokens=20)
    assert [use.used for use in limiter.statistics().limits] == [20, 5, 25]
    assert corrected == [{}, {"tokens": 50}, {"input_tokens": 10, "tokens": 15}]


async def test_coroutine_closed_while_lock_is_held_leaves_line() -> None:
    """The collector may close a coroutine that waits; that does not deadlock, either."""
    limiter = Limiter(concurrency=1)
    holder = await limiter.acquire()
    acquisition = limiter.acquire()
    acquisition.send(None)
    with limiter._node.pacer:
        acquisition.close()
    await asyncio.sleep(0.01)
    assert limiter.statistics().waiting == 0
    holder.release()
    (await limiter.acquire()).release()


def test_lease_dropped_while_lock_is_held_comes_back_despite_closed_loop() -> None:
    limiter = Limiter(concurrency=1)
    lease: Lease | None = limiter.acquire_nowait()
    dead = asyncio.new_event_loop()
    dead.set_exception_handler(lambda _, __: None)
    task = dead.create_task(take(limiter))
    run_until_waiting(dead, limiter)
    dead.close()
    with limiter._node.pacer:
        del lease
    limiter.acquire_sync(timeout=ENOUGH).release()
    del task
    gc.collect()
    assert limiter.statistics().in_flight == 0


def test_loops_that_take_turns_in_one_thread_keep_their_calls_apart() -> None:
    """Each loop lets only its own calls go, in order of arrival, whichever ran last."""
    limiter = Limiter(concurrency=1)
    holder = limiter.acquire_nowait()
    with two_loops() as (here, there):
        tasks: list[asyncio.Task[Lease]] = []
        for loop in (here, there, here, there):
            tasks.append(loop.create_task(take(limiter)))
            turn(loop)
        holder.release()
        for task in tasks:
            turn(here, there)
            task.result().release()
    assert limiter.statistics().in_flight == 0
