"""`Limiter(..., store=...)` in several processes, and while its store is gone."""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import pytest

from asyncbucket import AcquireTimeout, Limit, Limiter, StoreError
from asyncbucket.core.events import Event, StoreLost, StoreRecovered
from asyncbucket.stores import Batch, LimitConfig, open_store
from asyncbucket.stores.store import Correction, Outcome
from asyncbucket.testing import assert_never_over
from tests.conftest import python
from tests.stores.conformance.place import outcomes, peek_at, terms

if TYPE_CHECKING:
    import subprocess

    from tests.stores.conftest import Fault, RunningServer

#: The processes wait for each other, which virtual time cannot speed up.
pytestmark = pytest.mark.real_clock

AGENTS = """
import asyncio, json, sys, time
from asyncbucket import Limiter
from asyncbucket.core.events import StoreLost

def start_of(lease):  # on the clock that all share; when the call goes is the scheduler's affair
    return next(m._reservation.booked_at for m, _ in lease._meters if hasattr(m, "_reservation"))

async def main():
    limiter = Limiter(
        "200 requests/2s burst 20", "100k TPM", concurrency=50, store=sys.argv[1], name="openai"
    )
    lost = []
    limiter.observe(lambda event: isinstance(event, StoreLost) and lost.append(event.reason))
    (await limiter.acquire(tokens=1)).release()
    print("ready", flush=True)
    sys.stdin.readline()
    went, end = [], time.monotonic() + 3

    async def agent():
        while time.monotonic() < end:
            async with limiter.acquire(tokens=100, deadline=end) as lease:
                went.append(start_of(lease))
                await asyncio.sleep(0.05)
                lease.settle(tokens=50)

    async def block():
        while True:
            await asyncio.sleep(1)
            time.sleep(0.15)

    blocking = asyncio.create_task(block())
    await asyncio.gather(*(agent() for _ in range(15)), return_exceptions=True)
    blocking.cancel()
    await limiter.aclose()
    print(json.dumps([went, lost]))

asyncio.run(main())
"""

FORGETTING = """
import asyncio, os, sys
from asyncbucket import Limiter
from asyncbucket.stores import open_store

limiter = Limiter("1000 TPM", store=sys.argv[1], name="openai")

async def call():
    (await limiter.acquire(tokens=100, timeout=5))._undo()

async def look():
    await limiter.acquire(tokens=500, timeout=5)
    await limiter.aclose()
    store = open_store(sys.argv[1])
    print((await store.peek("openai")).limits[0].used)
    await store.aclose()

async def book():
    await limiter.acquire(tokens=200, timeout=5)

asyncio.run(book())
asyncio.run(call())  # whose refund is not told
pid = os.fork()
if pid == 0:
    asyncio.run(book())
    os._exit(0)
os.waitpid(pid, 0)
asyncio.run(look())
"""

HOLDING = """
import asyncio, sys
from asyncbucket.stores import Batch, open_store
from tests.stores.conformance.place import terms

async def main():
    store = open_store(sys.argv[1])
    ledger = await store.open("killed", terms("1000/s", concurrency=4), slot_ttl=1.0)
    receipt = await ledger.commit(Batch(calls=({"requests": 1, "concurrency": 1},) * 4))
    assert receipt.bookings[3].slot
    print("holding", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""

CALL = {"requests": 1, "concurrency": 1}
Limiters: TypeAlias = Callable[..., Limiter]


async def call_once(limiter: Limiter) -> None:
    async with limiter.acquire():
        pass


def test_processes_share_one_limit(
    where: str, start: "Callable[[str, str], subprocess.Popen[str]]"
) -> None:
    """How well is another promise, on virtual time: see `test_session`."""
    processes = [start(AGENTS, where) for _ in range(3)]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    reports = [json.loads(each.communicate()[0]) for each in processes]
    went = [starts for starts, _ in reports]
    assert not any(lost for _, lost in reports)
    every = sorted(when for each in went for when in each if when)  # 0 in an outage
    assert_never_over([(when, 1) for when in every], Limit("requests", 200, per=2, burst=20))
    shares = [len(each) for each in went]
    assert min(shares) > 0.5 * max(shares), f"{shares}: a machine that is busy may spoil some"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_does_not_report_refunds_of_its_parent(url: str) -> None:
    done = python("-c", FORGETTING, url)
    assert (done.stdout, done.stderr) == ("900\n", "")


async def test_call_cancelled_at_any_await_returns_all(where: str, limited: Limiters) -> None:
    one, other = [limited(where, "1000 RPM burst 1000", concurrency=50) for _ in range(2)]
    await call_once(one)
    for turns in range(40):
        task = asyncio.create_task(call_once(one))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        (answer,) = await asyncio.gather(task, return_exceptions=True)
        assert answer is None or isinstance(answer, asyncio.CancelledError)
    await asyncio.sleep(0.3)
    await call_once(other)
    assert other.statistics().limits[0].used == one.statistics().admitted + 1
    for limiter in (one, other):
        await limiter.aclose()
    assert (await peek_at(open_store(where))).slots == 0


async def test_lost_store_is_an_outage_and_hangs_no_call(
    fault: "Fault", limited: Limiters, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Event] = []
    back = asyncio.Event()
    limiter = limited(fault.url, "100 RPM burst 100")
    limiter.observe(events.append)
    limiter.observe(lambda event: back.set() if isinstance(event, StoreRecovered) else None)
    await call_once(limiter)
    with caplog.at_level(logging.WARNING, "asyncbucket"):
        fault.begin()
        for _ in range(4):
            await call_once(limiter)
        assert any(isinstance(event, StoreLost) for event in events), "the store is still gone"
        fault.end()
        await asyncio.wait_for(back.wait(), 5)
    await asyncio.sleep(0.1)
    await call_once(limiter)
    assert limiter.statistics().limits[0].used == 6
    changes = [type(event) for event in events if isinstance(event, (StoreLost, StoreRecovered))]
    assert changes == [StoreLost, StoreRecovered]
    lost, recovered = (record.getMessage() for record in caplog.records)
    assert "; limiter openai goes on with its share, 1 of 1" in lost
    assert "is back after" in recovered


async def test_corrections_of_a_failed_batch_are_applied_once(fault: "Fault") -> None:
    store = open_store(fault.url)
    ledger = await store.open("owed", terms("100 requests/minute burst 100", concurrency=9))
    bookings = (await ledger.commit(Batch(calls=(CALL,) * 4))).bookings
    fault.begin()
    for held, booking in zip((3, 2, 1), bookings, strict=False):
        undone = Correction.undo(CALL, booking.start)
        with pytest.raises(StoreError):
            await ledger.commit(Batch(corrections=(undone,), held=held, calls=(CALL,)))
    fault.end()
    other = await store.open("owed", terms("50 requests/minute burst 50", concurrency=9))
    assert (await ledger.commit(Batch())).changed == other.config
    for _ in range(2):
        seen = await ledger.peek()
        assert (seen.limits[0].used, seen.slots) == (1, 1)
    await ledger.commit(Batch(held=0))
    assert (await ledger.peek()).slots == 0
    await ledger.aclose()
    await store.aclose()


async def test_slots_of_killed_process_come_back_after_slot_ttl(
    where: str,
    start: "Callable[[str, str], subprocess.Popen[str]]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    process = start(HOLDING, where)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    process.kill()
    store = open_store(where)
    ledger = await store.open("killed", terms("1000/s", concurrency=4), slot_ttl=1.0)
    receipt = await ledger.commit(Batch(calls=(CALL,) * 4))
    assert receipt.ask_at < receipt.now + 1_000_000_000
    while receipt.bookings[0].outcome is Outcome.FULL:
        await ledger.changed(timeout=(receipt.ask_at - receipt.now) * 1e-9)
        receipt = await ledger.commit(Batch(calls=(CALL,) * 4))
    assert outcomes(receipt) == ["booked"] * 4
    await ledger.aclose()
    await store.aclose()


SPENDING = """
import asyncio, os, signal, sys
from asyncbucket import Limiter

async def main():
    limiter = Limiter("0.10 USD/day", store=sys.argv[1], name="money")
    leases = await asyncio.gather(*(limiter.acquire(usd=0.03) for _ in range(3)))
    leases[0].settle(usd=0.01)
    while limiter.statistics().limits[0].used != 70_000:  # until the store has heard of it
        await asyncio.sleep(0.01)
    print("spending", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_cap_of_dollars_holds_for_those_who_follow_a_killed_process(
    where: str,
    start: "Callable[[str, str], subprocess.Popen[str]]",
    limited: Limiters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its calls may have been made: what was reserved for them stays spent."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    process = start(SPENDING, where)
    assert process.stdout is not None
    assert process.stdout.readline() == "spending\n"
    process.wait()
    limiter = limited(where, "0.10 USD/day", name="money")
    (await limiter.acquire(usd=0.03, timeout=5)).release()
    with pytest.raises(AcquireTimeout, match=r"0\.000001 USD cannot pass within"):
        await limiter.acquire(usd=0.000_001, timeout=0.2)
    assert limiter.statistics().limits[0].used == 100_000


@pytest.mark.parametrize("fault", ["freeze", "lock"], indirect=True)
async def test_limits_and_pauses_set_in_outage_reach_store_afterwards(
    fault: "Fault", limited: Limiters
) -> None:
    back = asyncio.Event()
    limiter = limited(fault.url, "100 RPM burst 100")
    limiter.observe(lambda event: back.set() if isinstance(event, StoreRecovered) else None)
    async with asyncio.timeout(10):
        await call_once(limiter)
        fault.begin()
        await call_once(limiter)
        limiter.reconfigure("50 RPM burst 50", concurrency=7)
        limiter.pause(2)
        await asyncio.sleep(0.4)
        fault.end()
        await back.wait()
        await call_once(limiter)
    snapshot = await peek_at(open_store(fault.url))
    assert snapshot.config == LimitConfig(limits=limiter.limits, concurrency=7)
    assert snapshot.paused_until > 0


async def test_unreachable_server_fails_first_call_with_store_error(limited: Limiters) -> None:
    limiter = limited("redis://:s3cret@127.0.0.1:1/0", "100 RPM")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1/0 cannot be reached") as error:
        await limiter.acquire(timeout=5)
    assert "s3cret" not in str(error.value)


async def test_server_frozen_at_start_fails_all_calls_until_it_answers(
    start_server: "Callable[..., RunningServer]",
    limited: Limiters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncbucket.stores.store.OPEN_PATIENCE", 1.0)
    monkeypatch.setattr("asyncbucket.stores.redis.RedisLedger.patience", 0.2)
    server = start_server()
    server.freeze()
    limiter = limited(server.url, "100 RPM burst 100")
    calls = [call_once(limiter) for _ in range(100)]
    async with asyncio.timeout(10):
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in ended} == {StoreError}
        assert "does not answer: see whether" in str(ended[0]), "longer than later, to connect"
        server.thaw()
        await call_once(limiter)


@pytest.mark.parametrize("fault", ["freeze", "lock"], indirect=True)
async def test_loop_that_was_blocked_does_not_take_the_store_for_gone(
    fault: "Fault", limited: Limiters
) -> None:
    lost: list[Event] = []
    limiter = limited(fault.url, "1000/s", concurrency=9)
    limiter.observe(lambda event: lost.append(event) if isinstance(event, StoreLost) else None)
    for _ in range(2):
        call = asyncio.create_task(call_once(limiter))
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251 - three times the store's patience
        await call
    assert not lost
