"""Tests on uvloop, whose timers fire up to a millisecond early, in real time."""

import asyncio
import time

import pytest

from asyncbucket import Limiter, TokenBucket
from asyncbucket.testing import assert_within_bucket

uvloop = pytest.importorskip("uvloop")


@pytest.mark.real_clock
def test_bucket_keeps_its_rate_on_uvloop() -> None:
    """No call is early, though the loop's timers are, and none is stuck."""
    trace: list[tuple[int, int]] = []

    def clock() -> int:
        return time.monotonic_ns()

    async def main() -> None:
        bucket = TokenBucket(rate=400.0, burst=3, clock=clock)

        async def call() -> None:
            await bucket.acquire()
            trace.append((clock(), 1))

        await asyncio.gather(*(call() for _ in range(60)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert len(trace) == 60
    assert trace[-1][0] - trace[0][0] >= 56 / 400.0 * 1e9
    # Times are noted after the admission, so a late one may be followed closely by the next.
    assert_within_bucket(trace, rate=400.0, burst=5)


@pytest.mark.real_clock
def test_limiter_keeps_order_and_leaks_nothing_on_uvloop() -> None:
    """Half of the calls are cancelled; the others pass in order; nothing is left over."""

    async def main() -> None:
        limiter = Limiter("500 requests/s burst 5", concurrency=2)
        served: list[int] = []

        async def call(number: int) -> None:
            async with limiter.acquire():
                served.append(number)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(call(number)) for number in range(60)]
        await asyncio.sleep(0.005)
        for task in tasks[1::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert served == sorted(served)
        assert set(range(0, 60, 2)) <= set(served)
        now = limiter.statistics()
        assert (now.waiting, now.in_flight) == (0, 0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
