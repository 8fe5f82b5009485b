"""Eager tasks, which run before `create_task` returns (Python 3.12 and newer)."""

import asyncio
import sys

import pytest

from asyncbucket import Limiter, TokenBucket
from asyncbucket.testing import VirtualTime

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")


async def test_eager_tasks_are_served_in_order(virtual_time: VirtualTime) -> None:
    """The pacer is started while the lock is held, so it must not run at once."""
    # getattr, because type checkers assume Python 3.11.
    factory = getattr(asyncio, "eager_task_factory")  # noqa: B009
    asyncio.get_running_loop().set_task_factory(factory)
    limiter = Limiter("10 RPS burst 1", concurrency=2, clock=virtual_time.clock)
    bucket = TokenBucket(rate=10.0, burst=1, clock=virtual_time.clock)
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
    now = limiter.statistics()
    assert (now.waiting, now.in_flight) == (0, 0)
