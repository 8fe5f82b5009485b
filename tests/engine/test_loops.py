"""Other loops: eager tasks, which run before `create_task` returns, and uvloop, in real time."""

import asyncio
import sys

import pytest

from asyncbucket import Limiter, TokenBucket
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import nothing_is_left


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
