"""A limiter with a store of either kind: opening, closing, failing, what is refused."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from asyncbucket import Limit, Limiter, Pool, StoreError
from asyncbucket.engine.events import Event, StoreLost
from asyncbucket.stores import LimitConfig, open_store
from asyncbucket.stores.redis import RedisLedger
from tests.stores.conformance.place import peek_at
from tests.stores.conftest import take

Limiters: TypeAlias = Callable[..., Limiter]


@pytest.mark.parametrize("turns", [1, 4, 9])
async def test_cancelled_closing_is_completed_later(
    turns: int, where: str, limited: Limiters
) -> None:
    tasks, threads = asyncio.all_tasks(), threading.enumerate()
    limiter = limited(where, "20/s")
    await take(limiter)
    closing = asyncio.ensure_future(limiter.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await limiter.aclose()
    assert (await peek_at(open_store(where))).workers == 0
    assert not [task for task in asyncio.all_tasks() - tasks if "asyncbucket" in task.get_name()]
    started = {each.name for each in threading.enumerate() if each not in threads}
    assert "asyncbucket sqlite" not in started
    await take(limiter)


async def test_store_object_passed_to_limiter_is_left_open(where: str) -> None:
    store = open_store(where)
    one = Limiter("20/s", concurrency=2, store=store, name="one")
    two = Limiter("20/s", store=store, name="two")
    lost: list[Event] = []
    two.observe(lost.append)
    for limiter in (one, two):
        await take(limiter)
    await one.aclose()
    await take(two)
    snapshot = await store.peek("one")
    assert snapshot is not None
    assert (snapshot.slots, snapshot.workers) == (0, 0)
    assert StoreLost not in map(type, lost)
    await take(one)
    for each in (one, two, store):
        await each.aclose()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": ""}, "1 to 200 printable characters and no braces"),
        ({"name": "a{b}" * 5_000}, "1 to 200 printable characters and no braces"),
        ({"name": "line\nbreak"}, "printable"),
        ({"slot_ttl": 0.09}, r"slot_ttl must be .* from 0\.1 to 86,400, a day, not 0\.09"),
        ({"slot_ttl": float("nan")}, "slot_ttl must be a number of seconds"),
        ({"on_outage": "half"}, "on_outage must be one of share, closed, open, not 'half'"),
        ({"concurrency": "auto"}, "with a store, concurrency must be a number"),
        (
            {"tpm": 10**15},
            "a store counts to 70,368,744,177,664: 1,000,000,000,000,000 tokens per .* is above; lower",
        ),
    ],
)
async def test_what_no_store_keeps_is_refused_when_limiter_is_made_or_changed(
    url: str, options: dict[str, Any], why: str, limited: Limiters
) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        limited(url, **{"rpm": 10, **options})
    assert len(str(refused.value)) < 400
    limiter = limited(url, "10 RPM", concurrency=4)
    if options.keys() & {"concurrency", "tpm"}:
        with pytest.raises(ValueError, match=why):
            limiter.reconfigure("20 RPM", **options)
    assert (limiter.limits, limiter.concurrency) == ((Limit("requests", 10),), 4)


async def test_failed_session_fails_waiting_calls_and_is_replaced(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limited: Limiters,
) -> None:
    limiter = limited(url, "1000/s", concurrency=2, slot_ttl=0.3)
    leases = [await limiter.acquire() for _ in range(2)]  # they expire, if the session takes long

    async def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("odd")

    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR, "asyncbucket"):
        patched.setattr(RedisLedger, "commit", fail)
        calls = [asyncio.ensure_future(take(limiter)) for _ in range(30)]
        async with asyncio.timeout(5):
            ended = await asyncio.gather(*calls, return_exceptions=True)
    told = [error for error in ended if error is not None]  # others got a slot that had expired
    assert {type(error) for error in told} == {StoreError}
    assert "has failed, see the log: ask again, and report this error" in str(told[0])
    assert 1 <= len(caplog.records) <= 30 / 8 + 1
    assert "the session of limiter openai has failed; waiting calls fail" in caplog.text
    assert "ArithmeticError: odd" in caplog.text
    for lease in leases:
        lease.release()
    await asyncio.wait_for(take(limiter), 5)


@pytest.mark.parametrize("turns", [0, 3])
async def test_limits_changed_while_store_opens_reach_it(
    turns: int, where: str, limited: Limiters
) -> None:
    limiter = limited(where, "1000 RPM burst 100")
    call = asyncio.ensure_future(take(limiter))
    for _ in range(turns):
        await asyncio.sleep(0)
    limiter.reconfigure("10 RPM burst 10", concurrency=3)
    limiter.pause(0.6)
    await call
    await limiter.aclose()
    snapshot = await peek_at(open_store(where))
    assert snapshot.config == LimitConfig(limits=limiter.limits, concurrency=3)
    assert snapshot.paused_until > 0


@pytest.mark.real_clock
async def test_blocked_loops_at_a_store_do_not_hold_up_a_pool(
    where: str, limited: Limiters
) -> None:
    a, b = limited(where, "1 requests/h burst 1", name="a"), Limiter(concurrency=1, name="b")
    pool = Pool(a, b, prefer="first")
    at_b, at_a = [await asyncio.wait_for(pool.acquire(), 5) for _ in range(2)]
    direct = asyncio.ensure_future(a.acquire())

    async def wait_and_block() -> None:
        waiting = asyncio.ensure_future(pool.acquire())
        await asyncio.sleep(0.3)  # meanwhile the store holds it back
        time.sleep(1)  # noqa: ASYNC251
        (await waiting).release()

    blocked = asyncio.create_task(asyncio.to_thread(asyncio.run, wait_and_block()))
    await asyncio.sleep(0.5)
    at_b.release()
    began = time.monotonic()
    lease = await asyncio.wait_for(pool.acquire(), 5)
    assert (lease.limiter, time.monotonic() - began < 0.5) == (b, True)
    lease.release()
    await asyncio.wait_for(blocked, 5)
    at_a.release()
    direct.cancel()
    await asyncio.wait([direct])
    assert (pool.statistics().waiting, pool.statistics().in_flight) == (0, 0)
