"""`Limiter(..., store=...)` in several processes, and while its store is gone."""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from asyncbucket import AcquireTimeout, Limit, Limiter, StoreError
from asyncbucket.engine.events import Event, StoreLost, StoreRecovered
from asyncbucket.stores import Batch, LimitConfig, open_store
from asyncbucket.stores.store import Correction
from asyncbucket.testing import assert_never_over
from tests.conftest import python
from tests.stores.conformance.place import peek, peek_at, terms
from tests.stores.conftest import Fault, Start, StartServer, take

#: The processes wait for each other, which virtual time cannot speed up.
pytestmark = pytest.mark.real_clock

CALL = {"requests": 1, "concurrency": 1}
Limiters: TypeAlias = Callable[..., Limiter]

AGENTS = """
import asyncio, json, sys, time
from asyncbucket import Limiter
from asyncbucket.engine.events import StoreLost

def start_of(lease):  # on the clock that all share; when the call goes is the scheduler's affair
    return next(m._reservation.booked_at for m, _ in lease._route.meters if hasattr(m, "_reservation"))

async def main():
    limits = "200 requests/2s burst 20", "100k TPM"
    limiter, lost, went = Limiter(*limits, concurrency=50, store=sys.argv[1], name="openai"), [], []
    limiter.observe(lambda event: isinstance(event, StoreLost) and lost.append(event.reason))
    (await limiter.acquire(tokens=1)).release()
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + 3

    async def agent():
        while True:
            async with limiter.acquire(tokens=100, deadline=end) as lease:
                went.append(start_of(lease))
                await asyncio.sleep(0.05)
                lease.settle(tokens=50)

    await asyncio.gather(*(agent() for _ in range(15)), return_exceptions=True)
    await limiter.aclose()
    print(json.dumps([went, lost]))

asyncio.run(main())
"""

FORGETTING = """
import asyncio, os, sys
from asyncbucket import Limiter

limiter = Limiter("1000 TPM", store=sys.argv[1], name="openai")

async def take(tokens):
    return await limiter.acquire(tokens=tokens, timeout=5)

async def undo():
    (await take(100))._undo()

async def last():
    await take(500)
    await limiter.aclose()

asyncio.run(take(200))
asyncio.run(undo())  # which is not told
pid = os.fork()
if pid == 0:
    asyncio.run(take(200))
    os._exit(0)
os.waitpid(pid, 0)
asyncio.run(last())
"""

DYING = """
import asyncio, os, signal, sys
from asyncbucket import Limiter

async def main():
    limiter = Limiter("0.10 USD/day", concurrency=3, store=sys.argv[1], name="money", slot_ttl=1)
    leases = await asyncio.gather(*(limiter.acquire(usd=0.03) for _ in range(3)))
    leases[0].settle(usd=0.01)
    while limiter.statistics().limits[0].used != 70_000:  # until the store has heard of it
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def noted(limiter: Limiter, kind: type[Event]) -> asyncio.Queue[Event]:
    """Return a queue of the events of that kind."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    limiter.observe(lambda event: events.put_nowait(event) if isinstance(event, kind) else None)
    return events


def test_processes_share_one_limit(where: str, start: Start) -> None:
    """How well is another promise, on virtual time: see `test_session`."""
    processes: list[Any] = [start(AGENTS, where) for _ in range(3)]
    for each in processes:
        assert each.stdout.readline() == "ready\n"
    for each in processes:
        each.stdin.write("go\n")
        each.stdin.flush()
    reports = [json.loads(each.communicate()[0]) for each in processes]
    assert [lost for _, lost in reports] == [[]] * 3
    went = sorted((when, 1) for starts, _ in reports for when in starts)
    assert_never_over(went, Limit("requests", 200, per=2, burst=20))
    shares = [len(starts) for starts, _ in reports]
    assert min(shares) > 0.5 * max(shares), f"{shares}: a machine that is busy may spoil some"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_does_not_report_refunds_of_its_parent(url: str) -> None:
    done = python("-c", FORGETTING, url)
    assert (done.stdout, done.stderr) == ("", "")
    assert asyncio.run(peek_at(open_store(url))).limits[0].used == 900


async def test_call_cancelled_at_any_await_returns_all(where: str, limited: Limiters) -> None:
    one, other = [limited(where, "1000 RPM burst 1000", concurrency=50) for _ in range(2)]
    await take(one)
    for turns in range(40):
        task = asyncio.create_task(take(one))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        (answer,) = await asyncio.gather(task, return_exceptions=True)
        assert answer is None or isinstance(answer, asyncio.CancelledError)
    await asyncio.sleep(0.3)
    await take(other)
    assert other.statistics().limits[0].used == one.statistics().admitted + 1
    for limiter in (one, other):
        await limiter.aclose()
    assert (await peek_at(open_store(where))).slots == 0


async def test_lost_store_is_an_outage_and_hangs_no_call(
    fault: Fault, limited: Limiters, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = limited(fault.url, "100 RPM burst 100")
    lost, back = noted(limiter, StoreLost), noted(limiter, StoreRecovered)
    await take(limiter)
    await asyncio.sleep(2)  # until its share means something
    with caplog.at_level(logging.WARNING, "asyncbucket"):
        fault.begin()
        for _ in range(4):
            await take(limiter)
        assert lost.qsize() == 1, "the store is still gone"
        fault.end()
        await asyncio.wait_for(back.get(), 5)
    await asyncio.sleep(0.1)
    await take(limiter)
    assert limiter.statistics().limits[0].used == 6
    assert (lost.qsize(), back.qsize()) == (1, 0)
    told = [record.getMessage() for record in caplog.records]
    assert "; limiter openai goes on alone (share), as 1 of 1" in told[0]
    assert "is back after" in told[1]


async def test_corrections_of_a_failed_batch_are_applied_once(fault: Fault) -> None:
    store = open_store(fault.url)
    ledger = await store.open("owed", terms("100 requests/minute burst 100", concurrency=9))
    bookings = (await ledger.commit(Batch(calls=(CALL,) * 4))).bookings
    fault.begin()
    for held, booking in zip((3, 2, 1), bookings, strict=False):
        undone = Correction.undo(CALL, booking.start)
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"does not answer|cannot be reached"):
            await ledger.commit(Batch(corrections=(undone,), held=held, calls=(CALL,)))
        assert time.monotonic() < began + 1.5, "0.3 s, but for busy machines"
    fault.end()
    other = await store.open("owed", terms("50 requests/minute burst 50", concurrency=9))
    await ledger.commit(Batch())
    assert ledger.config == other.config
    for held in (1, 0):
        seen = await peek(ledger)
        assert (seen.limits[0].used, seen.slots) == (1, held)
        await ledger.commit(Batch(held=0))
    await ledger.aclose()
    await store.aclose()


async def test_killed_process_frees_its_slots_after_slot_ttl_but_what_it_spent_stays_spent(
    where: str, start: Start, limited: Limiters
) -> None:
    """Its calls may have been made."""
    start(DYING, where).wait()
    limiter = limited(where, "0.10 USD/day", concurrency=3, name="money", slot_ttl=1)
    leases = [await limiter.acquire(usd=0.01, timeout=5) for _ in range(3)]
    with pytest.raises(AcquireTimeout, match=r"0\.000001 USD (cannot pass within|gave up after)"):
        await limiter.acquire(usd=0.000_001, timeout=0.2)
    assert limiter.statistics().limits[0].used == 100_000
    for lease in leases:
        lease.release()


@pytest.mark.parametrize("fault", ["freeze", "lock"], indirect=True)
async def test_limits_and_pauses_set_in_outage_reach_store_afterwards(
    fault: Fault, limited: Limiters
) -> None:
    limiter = limited(fault.url, "100 RPM burst 100")
    back = noted(limiter, StoreRecovered)
    await take(limiter)
    await asyncio.sleep(2)
    fault.begin()
    await take(limiter)
    limiter.reconfigure("50 RPM burst 50", concurrency=7)
    limiter.pause(2)
    await asyncio.sleep(0.4)
    fault.end()
    await asyncio.wait_for(back.get(), 5)
    await take(limiter)
    snapshot = await peek_at(open_store(fault.url))
    assert snapshot.config == LimitConfig(limits=limiter.limits, concurrency=7)
    assert snapshot.paused_until > 0


async def test_unreachable_server_fails_first_calls_with_store_error(limited: Limiters) -> None:
    """Each on its own loop, as asyncio demands in debug mode, where calls once hung."""
    asyncio.get_running_loop().set_debug(True)
    for _ in range(5):
        limiter = limited("redis://user:s3cret@127.0.0.1:1/0", "100 RPM")
        calls = (take(limiter) for _ in range(5))
        async with asyncio.timeout(5):
            errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in errors} == {StoreError}
        says = r"\*\*\*@127\.0\.0\.1:1/0 cannot be reached: .*; check that it is running"
        assert re.search(says, str(errors[0]))
        assert "s3cret" not in str(errors)


async def test_server_frozen_at_start_fails_all_calls_until_it_answers(
    start_server: StartServer, limited: Limiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncbucket.stores.store.OPEN_PATIENCE", 1.0)
    server = start_server()
    server.freeze()
    monkeypatch.setattr("asyncbucket.stores.redis.RedisLedger.patience", 0.2)
    limiter = limited(server.url, "100 RPM burst 100")
    async with asyncio.timeout(10):
        calls = (take(limiter) for _ in range(100))
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in ended} == {StoreError}
        assert str(ended[0]).endswith("(waited 1 s)"), "longer than later, to connect"
        server.thaw()
        await take(limiter)


@pytest.mark.parametrize("fault", ["freeze", "lock"], indirect=True)
async def test_loop_that_was_blocked_does_not_take_the_store_for_gone(
    fault: Fault, limited: Limiters
) -> None:
    limiter = limited(fault.url, "1000/s", concurrency=9)
    lost = noted(limiter, StoreLost)
    for _ in range(2):
        call = asyncio.create_task(take(limiter))
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251 - three times the store's patience
        await call
    assert lost.empty()
