"""One budget for all loops and threads of a process, tested with real threads and in real time."""

import asyncio
import concurrent.futures
import contextlib
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from time import monotonic, sleep
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, Lease, Limiter, Pool, TokenBucket
from asyncbucket.engine.dispatchers import ThreadDispatcher
from asyncbucket.testing import VirtualClock, VirtualTime
from tests.engine.conftest import nothing_is_left, used

Loops = tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop]
#: Seconds after which a test that waits for another thread gives up.
ENOUGH = 20


@contextlib.contextmanager
def loop_in_thread() -> Generator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(ENOUGH)
        loop.close()


@pytest.fixture
def two_loops() -> Iterator[Loops]:
    """Give two loops that run only during `turn`."""
    loops = asyncio.new_event_loop(), asyncio.new_event_loop()
    yield loops
    for loop in loops:
        loop.close()


def turn(*loops: asyncio.AbstractEventLoop) -> None:
    for loop in loops * 9:
        loop.call_soon(loop.stop)
        loop.run_forever()


def eventually(happened: Callable[[], bool]) -> None:
    end = monotonic() + ENOUGH
    while not happened():
        assert monotonic() < end
        sleep(0.001)


async def take(limiter: Limiter, tokens: int | None = None) -> Lease:
    return await limiter.acquire(tokens=tokens)


async def awaited(call: Awaitable[Any]) -> Any:
    return await call


def in_another_thread(call: Callable[[], Awaitable[Any]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(awaited(call()))).result(ENOUGH)


def test_children_are_shared_by_loops_and_threads() -> None:
    key = Limiter("300 requests/s burst 300", concurrency=4)
    start = monotonic()
    common = key.child("common", concurrency=2)
    most = {key: 0, common: 0}

    def look() -> None:
        for limiter, before in list(most.items()):
            most[limiter] = max(before, limiter.statistics().in_flight)

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
        jobs = [pool.submit(asyncio.run, asynchronously(key.child(f"loop {n}"))) for n in range(3)]
        jobs += [pool.submit(synchronously, key.key(f"thread {number}")) for number in range(3)]
        for job in jobs:
            job.result(ENOUGH)
    assert monotonic() - start >= 1  # the last 60 of 360 wait for their window
    assert most[key] <= 4
    assert most[common] <= 2
    nothing_is_left(key, common)
    assert key.statistics().admitted == 360


@pytest.mark.parametrize("light", [6, 20])
def test_calls_of_two_loops_pass_in_order_of_arrival_and_by_shares(light: int) -> None:
    """In order among the calls of one limiter; no child is starved by another's many calls."""
    key = Limiter(concurrency=1)
    holder = key.acquire_nowait()
    served: list[tuple[str, int]] = []
    jobs: list[concurrent.futures.Future[None]] = []

    async def call(limiter: Limiter, number: int) -> None:
        async with limiter.acquire():
            served.append((limiter.name, number))

    def ask(loop: asyncio.AbstractEventLoop, limiter: Limiter) -> None:
        jobs.append(asyncio.run_coroutine_threadsafe(call(limiter, len(jobs)), loop))
        eventually(lambda: key.statistics().waiting == len(jobs))

    with loop_in_thread() as one, loop_in_thread() as other:
        for number in range(12 if light == 6 else 60):
            ask(one if light == 20 or number % 2 else other, key.child("heavy"))
        for _ in range(light):
            ask(other, key.child("light"))
        holder.release()
        for job in jobs:
            job.result(ENOUGH)
    numbers = [number for name, number in served if name.endswith("heavy")]
    assert numbers == sorted(numbers)
    # A loop that is late for its turn is passed over, so the shares are not exact.
    lights = [name.endswith("light") for name, _ in served]
    assert sum(lights[: 5 * light // 2]) >= light // 2


def test_timed_out_head_makes_room_for_call_on_another_loop(two_loops: Loops) -> None:
    clock = VirtualClock()
    limiter = Limiter("10 TPM", clock=clock.__call__)  # moved by hand, on real loops
    held = limiter.acquire_nowait(tokens=8)
    here, there = two_loops
    costly = asyncio.ensure_future(limiter.acquire(tokens=9, timeout=30), loop=here)
    turn(here)
    cheap = asyncio.ensure_future(limiter.acquire(tokens=1), loop=there)
    turn(there, here)
    clock.advance(30)
    limiter.pause(0)  # both dispatch again
    turn(here)
    assert isinstance(costly.exception(), AcquireTimeout)
    late = asyncio.ensure_future(limiter.acquire(tokens=1), loop=here)
    turn(there, here)
    assert (cheap.result().bound_by, late.done()) == ("tokens", True)
    held.release()


def test_call_passes_right_after_the_one_before_it_on_another_loop(two_loops: Loops) -> None:
    limiter = Limiter("10 TPM")
    held = limiter.acquire_nowait(tokens=10)
    here, there = two_loops
    first = asyncio.ensure_future(limiter.acquire(tokens=1), loop=here)
    turn(here)
    second = asyncio.ensure_future(limiter.acquire(tokens=2), loop=there)
    turn(there)
    held.settle(tokens=0)
    turn(there)
    turn(here)
    turn(there)
    assert (first.done(), second.done()) == (True, True)


def test_pool_compares_its_members_with_the_lock_held() -> None:
    """Looking how much is used forgets old bookings: two threads that do so at once forget too many."""
    clock = VirtualClock()
    pool = Pool(*(Limiter("10 TPM", name=name, clock=clock.__call__) for name in "ab"))
    pool.acquire_nowait(tokens=4).release()
    clock.advance(61)
    thread = threading.Thread(target=pool.acquire_nowait, kwargs={"tokens": 1})
    with pool._node.pacer.lock:
        thread.start()
        sleep(0.05)  # it would have looked by now
        windows = [window for each in pool.members for window in each._node.limits.values()]
        assert [window.log.used for window in windows] == [4, 0]
    thread.join(ENOUGH)
    assert sorted(window.log.used for window in windows) == [0, 1]


@pytest.mark.parametrize("where", ["a blocked thread", "another loop"])
def test_lowered_limit_fails_call_that_waits_elsewhere(where: str) -> None:
    limiter = Limiter("100 TPM")
    limiter.acquire_nowait(tokens=100).release()

    def call() -> Lease:
        if where == "another loop":
            return asyncio.run(take(limiter, 80))
        return limiter.acquire_sync(tokens=80)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(call)
        eventually(lambda: limiter.statistics().waiting == 1)
        limiter.reconfigure(tpm=60)
        with pytest.raises(CostExceedsLimit, match="80 tokens exceeds the limit of 60 tokens"):
            job.result(ENOUGH)
    nothing_is_left(limiter)


def test_lowered_limit_fails_calls_that_are_parked(two_loops: Loops) -> None:
    """They learn it once their loop runs again; what gave up meanwhile competes no more."""
    clock = VirtualClock()
    limiter = Limiter("100 TPM", clock=clock.__call__)  # moved by hand, on real loops
    held = limiter.acquire_nowait(tokens=100)
    blocked, running = two_loops
    calls = [asyncio.ensure_future(limiter.acquire(tokens=80), loop=blocked) for _ in range(2)]
    costly, cancelled = calls
    turn(blocked)
    cheap = asyncio.ensure_future(limiter.acquire(tokens=10), loop=running)
    turn(running)
    held.settle(tokens=0)
    turn(running)
    clock.advance(0.1)
    limiter.pause(0)  # both dispatch again
    turn(running)
    assert cheap.result().waited == 0.1
    cancelled.cancel()
    limiter.reconfigure(tpm=60)
    turn(blocked)
    assert isinstance(costly.exception(), CostExceedsLimit)
    assert limiter._node.pacer.top.living == 0


# --- threads without a loop ---


class Interrupted(BaseException):
    """Stand for a KeyboardInterrupt that arrives while a thread waits."""


@pytest.mark.parametrize("admitted", [False, True])
def test_interrupted_thread_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, *, admitted: bool
) -> None:
    limiter = Limiter("100 TPM", concurrency=1)
    holder = limiter.acquire_nowait()

    def block(dispatcher: Any, done: Callable[[], bool], _: object) -> None:
        assert limiter.statistics().waiting == 1
        if admitted:
            holder.release()
            dispatcher.dispatch(dispatcher)
        assert done() == admitted
        raise Interrupted

    monkeypatch.setattr(ThreadDispatcher, "block", block)
    with pytest.raises(Interrupted):
        limiter.acquire_sync(tokens=70)
    holder.release()
    nothing_is_left(limiter)
    assert (limiter.statistics().cancelled, used(limiter)) == (1, [0])
    limiter.acquire_nowait().release()


# --- other loops: eager tasks, which run before `create_task` returns, and uvloop, in real time ---


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_eager_tasks_are_served_in_order(time: VirtualTime) -> None:
    # getattr, because type checkers assume Python 3.11.
    factory = getattr(asyncio, "eager_task_factory")  # noqa: B009
    asyncio.get_running_loop().set_task_factory(factory)
    limiter = Limiter("10 RPS burst 1", concurrency=2, clock=time.clock)
    bucket = TokenBucket(rate=10.0, burst=1, clock=time.clock)
    served: list[int] = []

    async def call(number: int) -> None:
        async with limiter.acquire():
            await bucket.acquire()
            served.append(number)

    tasks = [asyncio.create_task(call(number)) for number in range(10)]
    assert served == [0]
    tasks[5].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert served == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    nothing_is_left(limiter)


@pytest.mark.real_clock
def test_limiter_keeps_order_and_leaks_nothing_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")
    limiter = Limiter("500 requests/s burst 5", concurrency=2)
    served: list[int] = []

    async def main() -> None:
        async def call(number: int) -> None:
            async with limiter.acquire():
                served.append(number)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(call(number)) for number in range(60)]
        await asyncio.sleep(0.005)
        for task in tasks[1::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert served == sorted(served)
    assert set(range(0, 60, 2)) <= set(served)
    nothing_is_left(limiter)
