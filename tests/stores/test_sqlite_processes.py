"""Real processes share one file: they stay within the limit, even if one of them dies."""

import asyncio
import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from asyncbucket import Limit, StoreError
from asyncbucket.stores import Batch, Outcome, Terms
from asyncbucket.stores.sqlite import SQLiteLedger, SQLiteStore
from asyncbucket.testing import assert_never_over

#: The processes wait for each other, which virtual time cannot speed up.
pytestmark = pytest.mark.real_clock

PREAMBLE = """
import asyncio, json, os, signal, sys, time
from asyncbucket import Limit
from asyncbucket.stores import Batch, Outcome, Terms
from asyncbucket.stores.sqlite import SQLiteStore

store = SQLiteStore(sys.argv[1], patience=5)
"""

#: Take all there is, some calls at a time, and sleep until shortly before the last may go.
GREEDY = (
    PREAMBLE
    + """
async def main():
    ledger = await store.open("openai", Terms(limits=(Limit("requests", 300, per=1, burst=30),)))
    print("ready", flush=True)
    sys.stdin.readline()
    starts, end = [], time.monotonic() + 4
    while time.monotonic() < end:
        receipt = await ledger.commit(Batch(calls=({"requests": 1},) * 10))
        starts += [each.start for each in receipt.bookings if each.outcome is Outcome.BOOKED]
        await asyncio.sleep(max(0, (starts[-1] - receipt.now) / 1e9 - 0.2))
    print(json.dumps(starts))
    await ledger.aclose()
    await store.aclose()

asyncio.run(main())
"""
)

#: Commit as fast as possible, with more patience, as a busy machine may stop the lock's holder.
PUSHING = """
import asyncio, sys, time
from asyncbucket import Limit
from asyncbucket.stores import Batch, Terms
from asyncbucket.stores.sqlite import SQLiteStore

async def main():
    store = SQLiteStore(sys.argv[1], patience=1)
    limit = Limit("requests", 10**6, per=86_400, burst=10**6)
    sys.stdin.readline()
    ledger = await store.open("openai", Terms(limits=(limit,)))
    booked, end = 0, time.monotonic() + 2
    while time.monotonic() < end:
        booked += len((await ledger.commit(Batch(calls=({"requests": 1},)))).bookings)
    print(booked)
    await store.aclose()

asyncio.run(main())
"""

#: Print what was booked as soon as it was, until killed.
BUSY = (
    PREAMBLE
    + """
async def main():
    limit = Limit("requests", 10**6, per=86_400, burst=10**6)
    ledger = await store.open("openai", Terms(limits=(limit,), concurrency=10**6), slot_ttl=1.5)
    while True:
        receipt = await ledger.commit(Batch(calls=({"requests": 1, "concurrency": 1},) * 3))
        print(len(receipt.bookings), flush=True)

asyncio.run(main())
"""
)

#: Stop within a transaction, as a process halted by a debugger does.
FROZEN = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""

FORKING = (
    PREAMBLE
    + """
call = Batch(calls=({"requests": 1},))
terms = Terms(limits=(Limit("requests", 100, per=86_400, burst=100),))

async def go_on(ledger):
    await ledger.commit(call)
    print(ledger.worker, (await ledger.peek()).limits[0].used, flush=True)

async def first():
    ledger = await store.open("openai", terms, worker="w")
    await go_on(ledger)
    return ledger

loop = asyncio.new_event_loop()
ledger = loop.run_until_complete(first())
child = os.fork()
if not child:
    asyncio.run(go_on(ledger))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
loop.run_until_complete(go_on(ledger))
loop.run_until_complete(store.aclose())
loop.close()
"""
)

#: Fork while the parent books as fast as it can; the child goes on after the parent has closed.
OUTLIVING = (
    PREAMBLE
    + """
call = Batch(calls=({"requests": 1},))
terms = Terms(limits=(Limit("requests", 10**6, per=86_400, burst=10**6),))
closed, close = os.pipe()

async def book(times):
    ledger = await store.open("openai", terms)
    for _ in range(times):
        await ledger.commit(call)

async def go_on():
    await book(5)
    os.read(closed, 1)
    await book(5)

async def used():
    store = SQLiteStore(sys.argv[1])
    print((await store.peek("openai")).limits[0].used)
    await store.aclose()

loop = asyncio.new_event_loop()
busy = loop.create_task(book(500))
loop.run_until_complete(book(20))
child = os.fork()
if not child:
    asyncio.run(go_on())
    os._exit(0)
loop.run_until_complete(busy)
loop.run_until_complete(store.aclose())
os.write(close, b"!")
assert os.waitpid(child, 0)[1] == 0
loop.run_until_complete(used())
loop.close()
"""
)

UNCLOSED = (
    PREAMBLE
    + """
async def main():
    ledger = await store.open("openai", Terms(limits=(Limit("requests", 100, per=60),)))
    await ledger.commit(Batch(calls=({"requests": 1},)))
    waiting = asyncio.ensure_future(ledger.changed(timeout=60))
    await asyncio.sleep(0.05)
    waiting.cancel()

asyncio.run(main())
"""
)


def start(script: str, path: Path) -> "subprocess.Popen[str]":
    """Run `script` in an interpreter of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> None:
    """Kill a process and close its pipes."""
    with process:
        process.kill()


@contextlib.asynccontextmanager
async def opened(path: Path, terms: Terms) -> AsyncGenerator[SQLiteLedger]:
    """Open a worker in this process."""
    store = SQLiteStore(path)
    try:
        yield await store.open("openai", terms, slot_ttl=1.5)
    finally:
        await store.aclose()


def test_three_processes_are_never_over_and_never_idle(path: Path) -> None:
    """No window exceeds the limit, and together they use at least 97 % of it."""
    processes = [start(GREEDY, path) for _ in range(3)]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    answers = [each.communicate("go\n")[0] for each in processes]
    limit = Limit("requests", 300, per=1, burst=30)
    starts = sorted(when for answer in answers for when in json.loads(answer))
    busiest = assert_never_over([(when, 1) for when in starts], limit)
    assert busiest.amount == 300
    until = starts[0] + 3_500_000_000
    went = sum(when < until for when in starts) - 30
    assert went >= 0.97 * 3.5 * 300, f"{went / 10.5:.1f} % used"


def test_processes_that_commit_nonstop_neither_starve_nor_miscount(path: Path) -> None:
    """Four start at once without a file; none runs out of patience, and all is counted."""
    processes = [start(PUSHING, path) for _ in range(4)]
    answers = [each.communicate("go\n")[0] for each in _started(processes)]
    with contextlib.closing(sqlite3.connect(path)) as other:
        (entries,) = other.execute("SELECT seq FROM limiters").fetchone()
    assert sum(map(int, answers)) == entries - 2 * len(processes)


def _started(processes: "list[subprocess.Popen[str]]") -> "list[subprocess.Popen[str]]":
    """Let all of them start at once."""
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    return processes


async def test_process_killed_at_any_instant_loses_no_reported_booking(path: Path) -> None:
    """All it reported is booked, plus at most the batch under way, and the file is sound."""
    told = 0
    terms = Terms(limits=(Limit("requests", 10**6, per=86_400, burst=10**6),), concurrency=10**6)
    async with opened(path, terms) as ledger:
        for round_ in range(10):
            process = start(BUSY, path)
            assert process.stdout is not None
            told += int(process.stdout.readline())
            await asyncio.sleep(0.003 * round_)
            process.send_signal(signal.SIGKILL)
            told += sum(int(line) for line in process.stdout if line.endswith("\n"))
            end(process)
            booked = (await ledger.peek()).limits[0].used
            assert told <= booked <= told + 3
            told = booked
        with contextlib.closing(sqlite3.connect(path)) as other:
            assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_slots_of_killed_process_come_back_within_slot_ttl(path: Path) -> None:
    """Within their TTL by the file's clock, those who wait are told, and get them."""
    terms = Terms(limits=(Limit("requests", 10**6, per=86_400, burst=10**6),), concurrency=10**6)
    process = start(BUSY, path)
    assert process.stdout is not None
    process.stdout.readline()
    end(process)
    killed = time.monotonic()
    async with opened(path, terms) as ledger:
        held = (await ledger.peek()).slots
        assert held >= 3
        await ledger.configure(Terms(limits=terms.limits, concurrency=held))
        call = Batch(calls=({"concurrency": 1},))
        receipt = await ledger.commit(call)
        assert receipt.bookings[0].outcome is Outcome.FULL
        latest = receipt.now + 1_500_000_000
        while receipt.bookings[0].outcome is Outcome.FULL:
            assert receipt.now < latest
            assert receipt.ask_at <= latest
            await ledger.changed(timeout=(receipt.ask_at - receipt.now) / 1e9)
            receipt = await ledger.commit(call)
        assert time.monotonic() - killed < 2 * 1.5


async def test_process_frozen_in_transaction_causes_error_until_killed(path: Path) -> None:
    """The error comes within the patience; once killed, it leaves nothing to repair."""
    terms = Terms(limits=(Limit("requests", 10, per=60, burst=10),))
    call = Batch(calls=({"requests": 1},))
    async with opened(path, terms) as ledger:
        frozen = start(FROZEN, path)
        assert frozen.stdout is not None
        assert frozen.stdout.readline() == "ready\n"
        began = time.monotonic()
        with pytest.raises(StoreError, match="another process has held the write lock"):
            await ledger.commit(call)
        assert time.monotonic() - began < 1.5
        end(frozen)
        assert (await ledger.commit(call)).bookings[0].outcome is Outcome.BOOKED
        assert (await ledger.peek()).limits[0].used == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system does not fork")
def test_forked_child_is_a_separate_worker(path: Path) -> None:
    """It opens the file anew, under another name, and leaves its parent's connection alone."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["w 1", "w' 2", "w 3"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system does not fork")
def test_forked_child_goes_on_after_parent_closes_store(path: Path) -> None:
    """The child has its own locks, whatever the parent was doing, and loses no booking."""
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVING, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("530\n", "")


def test_unclosed_store_does_not_keep_process_alive(path: Path) -> None:
    """It does not hang or print anything: the store's thread does not keep the process alive."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", UNCLOSED, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stderr == ""
    assert time.monotonic() - began < 10
