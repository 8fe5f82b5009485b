import asyncio

import pytest

from asyncbucket import Limiter
from asyncbucket.waiting import ASYNC, IO, SYNC, run
from tests.http.conftest import BLOCKS


async def work(io: IO, numbers: object, limiter: Limiter) -> list[object]:
    """Do everything that may wait through ``io``."""
    with await io.admit(limiter.acquire()) as lease:
        found = [await io.next_item(numbers, "end") for _ in range(3)]
    return [*found, lease.released]


@BLOCKS
async def test_one_function_serves_async_and_blocking_callers() -> None:
    async def numbers() -> object:
        yield 1
        yield 2

    limiter, expected = Limiter("10 RPS"), [1, 2, "end", True]
    assert await ASYNC.function(work)(ASYNC, numbers(), limiter) == expected
    assert SYNC.function(work)(SYNC, iter((1, 2)), limiter) == expected
    assert SYNC.function(work).__name__ == "work"


def test_blocking_function_that_suspends_is_refused_and_closed() -> None:
    closed = []

    async def wait() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append(True)

    with pytest.raises(RuntimeError, match="wait was to block, but suspended: it must wait by its"):
        run(wait())
    assert closed == [True]
