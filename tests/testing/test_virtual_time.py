import asyncio
import re
import time as real
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncbucket import Limiter, TokenBucket
from asyncbucket.testing.virtual_time import (
    DeadlockError,
    VirtualClock,
    VirtualTime,
    VirtualTimeLoop,
    virtual_time,
)

SECOND = 1_000_000_000


def test_virtual_hour_passes_to_the_nanosecond_in_less_than_a_second_of_cpu() -> None:
    async def an_hour() -> None:
        for seconds in (0.1,) * 10 + (1,) * 3_599:
            await asyncio.sleep(seconds)
            assert asyncio.get_running_loop().time() == time.clock() / SECOND == time.now

    started = real.process_time()
    with virtual_time() as time:
        time.run(an_hour())
    assert time.clock() == 3600 * SECOND
    assert real.process_time() - started < 1.0


@given(st.lists(st.floats(min_value=0, max_value=1e5), min_size=1, max_size=50))
@example([1.26e-09, 1.6e-71])
@example([1.0, 1.0000000005])
def test_timers_run_in_order_at_their_own_nanosecond(delays: list[float]) -> None:
    ran: list[tuple[float, int]] = []

    def note(due: float) -> None:
        ran.append((due, time.clock()))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for delay in delays:
            loop.call_at(delay, note, delay)
        await asyncio.sleep(1e5)

    with virtual_time() as time:
        time.run(main())
    assert [due for due, _ in ran] == sorted(delays)
    for due, at in ran:
        assert due * SECOND - 0.1 <= at <= due * SECOND + 1.1


@pytest.mark.parametrize("start", [0.0, 1e6, 1e7, 1e9, 1e10])
def test_bucket_paces_however_late_the_clock_starts(start: float) -> None:
    with virtual_time(start=start) as time:
        bucket = TokenBucket(rate=3.0, burst=1, clock=time.clock)

        async def main() -> None:
            await asyncio.gather(*(bucket.acquire() for _ in range(31)))

        time.run(main())
        assert time.now == pytest.approx(start + 10, abs=0.001)


@pytest.mark.parametrize("start", [-1.0, 1e12, 1_795_714_549_366_466_200, float("nan"), "0"])
def test_start_outside_0_to_10_billion_seconds_is_refused(start: Any) -> None:
    with pytest.raises(ValueError, match="from 0 to 10,000,000,000, not"):
        VirtualTime(start=start)


def test_time_continues_across_runs_and_loops() -> None:
    with virtual_time() as time:
        time.run(asyncio.sleep(1))
        time.advance(0.5)
        time.run(asyncio.sleep(1))
        with asyncio.Runner(loop_factory=time.new_loop) as runner:
            runner.run(asyncio.sleep(1))
        assert time.now == 3.5
        assert repr(time) == "<VirtualTime at 3.5 s>"
        assert repr(time.clock) == "<VirtualClock at 3.5 s>"


def test_all_blocked_returns_when_every_task_waits_and_a_moved_clock_runs_timers() -> None:
    async def main() -> None:
        steps = 0

        async def worker() -> None:
            nonlocal steps
            for _ in range(10):
                await asyncio.sleep(0)
                steps += 1
            await asyncio.sleep(0.5)

        task = asyncio.create_task(worker())
        await time.all_blocked()
        assert (steps, time.clock(), task.done()) == (10, 0, False)
        time.advance(0.5)
        await time.all_blocked()
        assert task.done()
        assert time.now == 0.5

    with virtual_time() as time:
        time.run(main())
        with pytest.raises(TypeError, match="needs a VirtualTimeLoop"):
            asyncio.run(time.all_blocked())


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_clock_refuses_negative_or_non_finite_advance(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"finite and at least 0, not {seconds}"):
        VirtualClock().advance(seconds)


def test_deadlock_error_names_waiting_tasks_and_sleeping_forever_sets_no_timer() -> None:
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        ended = asyncio.create_task(asyncio.sleep(1e18))
        sleeper = asyncio.create_task(anyio.sleep_forever(), name="sleeper")
        await asyncio.sleep(2)
        ended.cancel()
        await asyncio.gather(sleeper, asyncio.create_task(waits_for_ever(), name="other"))

    with virtual_time() as time, pytest.raises(DeadlockError) as caught:
        time.run(main())
    assert re.fullmatch(
        r"deadlock at 2\.0 s of virtual time: nothing is ready and no timer is set; "
        r"these tasks wait:\n"
        r"  Task-\d+: \S*main \(test_virtual_time\.py:\d+\)\n"
        r"  other: \S*waits_for_ever \(test_virtual_time\.py:\d+\) > Event\.wait \(locks\.py:\d+\)\n"
        r"  sleeper: sleep_forever .*",
        str(caught.value),
    )


def test_executor_work_takes_no_virtual_time() -> None:
    order: list[str] = []

    async def timer() -> None:
        await asyncio.sleep(0.001)
        order.append("timer")

    async def thread() -> None:
        await asyncio.to_thread(real.sleep, 0.05)
        assert time.clock() == 0
        order.append("thread")

    async def main() -> None:
        await asyncio.gather(timer(), thread())

    with virtual_time() as time:
        time.run(main())
    assert order == ["thread", "timer"]


@pytest.mark.parametrize("new_loop", [asyncio.SelectorEventLoop, VirtualTimeLoop])
def test_call_that_would_wait_on_a_loop_of_another_clock_raises_at_once(new_loop: Any) -> None:
    """It would hang, because nothing on that loop moves the limiter's clock."""
    limiter = Limiter("60 RPM burst 1", clock=VirtualClock(5.0))
    bucket = TokenBucket(rate=1, burst=1, clock=VirtualClock(5.0))
    with asyncio.Runner(loop_factory=new_loop) as runner:
        for acquire in limiter.acquire, bucket.acquire:
            runner.run(just(acquire))
            with pytest.raises(
                RuntimeError, match=r"clock \(5\.0 s\) .* take the fixture virtual_time"
            ):
                runner.run(just(acquire))
    assert limiter.statistics().waiting == 0


async def just(acquire: Callable[[], Awaitable[object]]) -> None:
    _ = await acquire()


@pytest.mark.parametrize(("limit", "seconds"), [("600 RPM", 114), ("600 RPM burst 600", 60)])
def test_crowd_takes_as_long_as_the_burst_lets_it(limit: str, seconds: int) -> None:
    """The documentation quotes it."""
    with virtual_time() as time:
        limiter = Limiter(limit, clock=time.clock)

        async def main() -> None:
            await asyncio.gather(*(limiter.acquire() for _ in range(1_200)))

        time.run(main())
        assert round(time.now) == seconds
