"""`Limiter(..., store="sqlite:///limits.db")` as people use it, in one process and in several."""

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limit, Limiter
from asyncbucket.core.events import Event, StoreLost, StoreRecovered
from asyncbucket.testing import assert_never_over

#: The processes wait for each other, which virtual time cannot speed up.
pytestmark = pytest.mark.real_clock

AGENTS = """
import asyncio, json, sys, time
from asyncbucket import Limiter

def start_of(lease):  # on the clock that all share; when the call goes is the scheduler's affair
    return next(m._reservation.booked_at for m, _ in lease._meters if hasattr(m, "_reservation"))

async def main():
    limiter = Limiter(
        "400 requests/4s burst 20", "100k TPM", concurrency=12,
        store=f"sqlite:///{sys.argv[1]}?patience=5", name="openai",
    )
    print("ready", flush=True)
    sys.stdin.readline()
    went, end = [], time.monotonic() + 9

    async def agent():
        while time.monotonic() < end:
            async with limiter.acquire(tokens=50, deadline=end) as lease:
                went.append(start_of(lease))
                await asyncio.sleep(0.02)

    await asyncio.gather(*(agent() for _ in range(20)), return_exceptions=True)
    await limiter.aclose()
    print(json.dumps(went))

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


def start(script: str, path: Path) -> "subprocess.Popen[str]":
    """Run `script` in an interpreter of its own."""
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.asynccontextmanager
async def limited(path: Path, *limits: str, **options: Any) -> AsyncGenerator[Limiter]:
    """Make a limiter in the file at `path`."""
    limiter = Limiter(*limits, store=f"sqlite:///{path}", name="openai", **options)
    try:
        yield limiter
    finally:
        await limiter.aclose()


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold the write lock, as a frozen process would."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        yield
        holder.execute("ROLLBACK")


def test_three_processes_share_one_limit_in_equal_parts(path: Path) -> None:
    processes = [start(AGENTS, path) for _ in range(3)]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    went = [json.loads(each.communicate()[0]) for each in processes]
    every = sorted(when for each in went for when in each)
    limit = Limit("requests", 400, per=4, burst=20)
    assert_never_over([(when, 1) for when in every], limit)
    until = every[0] + 8_000_000_000
    used = sum(when < until for when in every) - 20
    assert used >= 0.97 * 800, f"{used / 8:.1f} % used"
    shares = [len(each) for each in went]
    assert max(shares) - min(shares) <= 0.1 * max(shares), shares


def test_relative_path_is_resolved_when_limiter_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    limiter = Limiter("9 RPD burst 9", store="sqlite:///limits.db", name="moves")

    async def call() -> None:
        (await limiter.acquire()).release()
        await limiter.aclose()

    for folder in ("there", "here"):
        monkeypatch.chdir(tmp_path / folder)
        asyncio.run(call())
    assert [path.name for path in tmp_path.glob("*/limits.db")] == ["limits.db"]
    assert limiter.statistics().limits[0].used == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_does_not_report_refunds_of_its_parent(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORGETTING, url], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("900\n", "")


async def test_held_lock_is_an_outage_and_hangs_no_call(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Event] = []
    back = asyncio.Event()

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, StoreRecovered):
            back.set()

    async with limited(path, "100 RPM burst 100") as limiter:
        limiter.observe(hear)
        (await limiter.acquire()).release()
        with caplog.at_level(logging.WARNING, "asyncbucket"), locked(path):
            began = time.monotonic()
            (await limiter.acquire()).release()
            assert time.monotonic() - began < 1.5
            (await limiter.acquire()).release()
        async with asyncio.timeout(5):
            await back.wait()
        (await limiter.acquire()).release()
    changes = [event for event in events if isinstance(event, (StoreLost, StoreRecovered))]
    assert [type(event) for event in changes] == [StoreLost, StoreRecovered]
    first, second = (record.getMessage() for record in caplog.records)
    assert "another process has held the write lock for over 0.2 s" in first
    assert "is back after" in second
    async with limited(path, "100 RPM burst 100") as other:
        (await other.acquire()).release()
        assert other.statistics().limits[0].used == 5


async def test_statistics_name_limit_that_binds_at_store(path: Path) -> None:
    limiter = Limiter(
        "1 requests/2s", concurrency=9, store=f"sqlite:///{path}?patience=5", name="openai"
    )
    roomy, narrow = limiter.child("roomy", concurrency=8), limiter.child("narrow", concurrency=1)
    async with limiter.acquire(), asyncio.timeout(20):
        holder = asyncio.create_task(take(narrow))
        waiting = [asyncio.create_task(take(each)) for each in (narrow, roomy)]
        while limiter.statistics().bound_by is None:  # noqa: ASYNC110 - it takes a trip to the store
            await asyncio.sleep(0.01)
        assert limiter.statistics().bound_by == "requests"
        assert roomy.statistics().bound_by == "requests"
        assert narrow.statistics().bound_by == "concurrency"
    for task in (holder, *waiting):
        task.cancel()
    await asyncio.gather(holder, *waiting, return_exceptions=True)
    assert limiter.statistics().bound_by is None
    await limiter.aclose()


async def take(limiter: Limiter) -> None:
    """Hold a lease until the end."""
    async with limiter.acquire():
        await asyncio.sleep(60)
