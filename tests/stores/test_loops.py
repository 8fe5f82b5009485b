"""A limiter with a store over several event loops and threads, and loops that end without closing it."""

import asyncio
import concurrent.futures
import contextlib
import gc
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from redis.asyncio import Redis

from asyncbucket import Lease, Limiter, StoreError
from asyncbucket.stores import open_store
from asyncbucket.stores.loop import Errands
from asyncbucket.stores.redis import RedisStore
from tests.stores.conformance.place import peek_at
from tests.stores.conftest import take

#: If a loop ends without closing the limiter, its connections are left to the garbage collector.
UNCLOSED = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore:loop is closed")


@UNCLOSED
def test_run_that_ends_while_a_batch_is_unanswered_loses_no_slot(where: str) -> None:
    limiter = Limiter("100k RPM burst 100000", concurrency=3, store=where, name="openai")

    async def break_off(turns: int) -> None:
        (await limiter.acquire(timeout=5)).release()
        calls = [asyncio.ensure_future(take(limiter)) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        assert calls

    for turns in range(24):
        asyncio.run(break_off(turns))
    asyncio.run(limiter.aclose())
    gc.collect()
    assert asyncio.run(peek_at(open_store(where))).slots == 0


def test_loop_closed_while_its_call_waits_leaves_the_slot_of_a_child(path: Path) -> None:
    limiter = Limiter("1 request/0.4s burst 1", store=f"sqlite:///{path}?patience=5")
    child, loop = limiter.child("chat", concurrency=1), asyncio.new_event_loop()
    loop.run_until_complete(take(limiter))
    waiting = asyncio.ensure_future(child.acquire(), loop=loop)
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()
    assert child.statistics().in_flight == 1

    async def next_run() -> None:
        async with child.acquire(timeout=5):
            assert child.statistics().in_flight == 1
        await limiter.aclose()

    asyncio.run(next_run())
    with contextlib.suppress(RuntimeError):  # the loop is closed
        waiting.cancel()
    del waiting
    gc.collect()
    assert (limiter.statistics().waiting, limiter.statistics().in_flight) == (0, 0)


@UNCLOSED
def test_store_object_used_on_second_loop_raises_store_error(url: str) -> None:
    limiter = Limiter("10 RPM burst 10", store=open_store(url), name="openai")

    async def once() -> None:
        (await limiter.acquire(timeout=2)).release()
        await limiter.aclose()

    asyncio.run(once())
    with pytest.raises(
        StoreError, match=r"made for another event loop or .*: give the limiter a URL"
    ):
        asyncio.run(once())
    with pytest.raises(StoreError, match="made for another event loop"):
        limiter.acquire_sync(timeout=2)
    gc.collect()


@UNCLOSED
def test_lease_can_be_released_after_its_loop_has_ended(where: str) -> None:
    limiter = Limiter("1000 TPM", concurrency=3, store=where, name="openai")

    async def hold() -> Lease:
        return await limiter.acquire(tokens=100, timeout=2)

    async def release_beside(lease: Lease) -> None:
        await asyncio.to_thread(lease.release)
        for each in await asyncio.gather(hold(), hold(), hold()):
            each.release()
        await limiter.aclose()

    between, beside = asyncio.run(hold()), asyncio.run(hold())
    between.settle(tokens=10)
    between.release()
    asyncio.run(release_beside(beside))
    gc.collect()
    snapshot = asyncio.run(peek_at(open_store(where)))
    assert (snapshot.limits[0].used, snapshot.slots) == (410, 0)


def test_session_ends_with_its_limiter_though_nobody_closed_it(where: str) -> None:
    before = threading.enumerate()
    limiter = Limiter("1000 RPM", concurrency=3, store=where, name="openai")
    asyncio.run(take(limiter))
    new = set(threading.enumerate()) - set(before)
    (thread,) = (each for each in new if each.name == "asyncbucket session")
    del limiter
    until = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < until:  # it may be using its limiter just now
        gc.collect()
        thread.join(0.1)
    assert not thread.is_alive()
    assert asyncio.run(peek_at(open_store(where))).workers == 0


def test_nothing_is_booked_for_a_loop_that_is_blocked(where: str) -> None:
    limiter = Limiter("1 request/0.4s burst 1", store=where, name="openai")
    limiter.acquire_sync(timeout=5).release()
    is_over = threading.Event()

    async def block() -> None:
        call = asyncio.ensure_future(take(limiter))
        await asyncio.sleep(0.1)
        is_over.wait(20)
        await call

    with concurrent.futures.ThreadPoolExecutor() as threads:
        blocked = threads.submit(asyncio.run, block())
        time.sleep(0.2)
        began = time.monotonic()
        limiter.acquire_sync(timeout=5).release()
        assert time.monotonic() - began < 0.5, "in the next window, not in the one after it"
        is_over.set()
        blocked.result()
    asyncio.run(limiter.aclose())


def test_blocked_loop_keeps_its_slots_and_gives_other_loops_no_cause_to_wait(where: str) -> None:
    limiter = Limiter("1k RPM burst 1000", concurrency=2, store=where, slot_ttl=0.5, name="openai")
    is_seen = threading.Event()

    async def block() -> None:
        async with limiter.acquire():
            is_seen.wait(20)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        blocked = threads.submit(asyncio.run, block())
        time.sleep(1.2)  # more than twice the time to live
        assert asyncio.run(peek_at(open_store(where))).slots == 1
        limiter.acquire_sync(timeout=5).release()
        is_seen.set()
        blocked.result()
    asyncio.run(limiter.aclose())


def test_closing_fails_calls_of_threads_and_disconnects(url: str, redis: Any) -> None:
    limiter = Limiter(concurrency=1, store=url, name="openai")
    before = len(redis.client_list())
    for _ in range(2):  # later calls open it again
        lease = limiter.acquire_sync(timeout=5)
        assert len(redis.client_list()) > before
        with concurrent.futures.ThreadPoolExecutor() as threads:
            waiting = threads.submit(limiter.acquire_sync, timeout=5)
            while not limiter.statistics().waiting:
                time.sleep(0.001)
            asyncio.run(limiter.aclose())
            with pytest.raises(StoreError, match="was closed while this call waited"):
                waiting.result()
        lease.release()
        while len(redis.client_list()) > before:  # the server may notice it later
            time.sleep(0.001)


def test_closing_does_not_wait_for_a_store_whose_loop_stands(url: str) -> None:
    client = Redis.from_url(url)
    limiter = Limiter("1000 RPM", store=RedisStore.of(client), name="openai")
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(take(limiter))
        asyncio.run(asyncio.wait_for(limiter.aclose(), 5))
        loop.run_until_complete(limiter.aclose())
        loop.run_until_complete(client.aclose())


def test_loop_is_woken_once_for_all_that_it_is_asked_until_it_comes() -> None:
    """To wake a loop for each of five hundred limiters takes a busy machine a minute."""
    done: list[int] = []
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        errands = Errands(loop)
        with patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as wake:
            for number in range(500):
                errands.add(partial(done.append, number))
            loop.run_until_complete(asyncio.sleep(0.01))
            assert sorted(done) == [*range(500)]
            errands.add(done.clear)
            assert wake.call_count == 2
        loop.run_until_complete(asyncio.sleep(0.01))
        assert not done
    errands.add(done.clear)  # which is closed
