import asyncio
import os
import signal
import threading

import pytest

from asyncbucket import Limiter
from asyncbucket.engine.seats import Lock
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_lock_that_was_held_at_a_fork_is_open_in_the_child() -> None:
    lock, held, done = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(5)
        with lock:
            os._exit(0)
    done.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0
