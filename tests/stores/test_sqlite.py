"""Limits in a file: what it promises, and what still holds after each fault."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from asyncbucket import Limit, StoreError
from asyncbucket.stores import Batch, LimitConfig
from asyncbucket.stores.sqlite import SCHEMA, MachineClock, SQLiteLedger, SQLiteStore
from asyncbucket.stores.state import State
from tests.conftest import python
from tests.stores.conformance.place import outcomes, peek, terms, used

SECOND = 1_000_000_000
CONFIG = terms("1000 requests/day burst 1000", concurrency=10)
CALL = {"requests": 1, "concurrency": 1}
ONE = Batch(calls=({"requests": 1},))
#: Virtual time does not apply to locks and disks.
pytestmark = pytest.mark.real_clock


@contextlib.asynccontextmanager
async def opened(
    path: Path, config: LimitConfig = CONFIG, *, patience: float = 5.0, slot_ttl: float = 30.0
) -> AsyncGenerator[SQLiteLedger]:
    store = SQLiteStore(path, patience=patience)
    try:
        ledger = await store.open("openai", config, slot_ttl=slot_ttl)
        yield ledger
        await ledger.aclose()
    finally:
        await store.aclose()


async def test_file_is_made_when_used_and_alone_when_closed(path: Path) -> None:
    store = SQLiteStore(path)
    assert not path.exists()
    ledger = await store.open("openai", CONFIG)
    await store.aclose()
    await store.aclose()
    with pytest.raises(StoreError, match=f"{path}: this store has been closed: open another"):
        await ledger.commit(Batch(calls=(CALL,)))
    await ledger.aclose()
    assert [each.name for each in path.parent.iterdir()] == ["limits.db"]


def make(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        for statement in statements:
            other.execute(statement)


NO_FILE = (
    ": SQLite failed (unable to open database file), and nothing was booked: see that the folder"
)
#: What is at the path, and what the error says.
UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda path: path.parent.rmdir(), NO_FILE),
    "a folder": (Path.mkdir, NO_FILE),
    "another program's": (
        lambda path: make(path, "CREATE TABLE people (name)"),
        " is a database of another program (1 tables, application id 0x0): give asyncbucket a file",
    ),
    "no database": (
        lambda path: path.write_text("not a database at all, " * 100),
        ": SQLite failed (file is not a database), and nothing was booked",
    ),
    "another version's": (
        lambda path: make(path, "PRAGMA application_id = 0x61626B74", "PRAGMA user_version = 4"),
        f" has schema version 4, and this asyncbucket needs version {SCHEMA}: use one version",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
async def test_path_that_cannot_be_used_is_left_unchanged_and_named_with_the_remedy(
    tmp_path: Path, kind: str
) -> None:
    prepare, why = UNUSABLE[kind]
    path = tmp_path / "folder" / "limits.db"
    path.parent.mkdir()
    prepare(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreError) as error:
        async with opened(path):
            pass
    assert str(error.value).startswith(f"{path}{why}")
    assert before is None or path.read_bytes() == before


async def test_held_lock_raises_store_error_within_patience(path: Path) -> None:
    async with opened(path, patience=0.2) as ledger:
        ledger._slowest = 0  # on a busy machine it would be given more time
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError) as error:
                await ledger.commit(ONE)
        assert str(error.value) == (
            f"{path}: the file does not answer: find who holds its write lock with `fuser {path}`, see "
            f"what keeps the disk busy, or allow more with ?patience=5 (waited 0.2 s)"
        )
        assert outcomes(await ledger.commit(ONE)) == ["booked"]
        assert await used(ledger) == 1, "what was booked late did not come back"


async def test_lock_that_does_not_come_free_ends_the_wait_of_the_thread_at_last(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the interpreter could not end while another process is frozen in a transaction."""
    monkeypatch.setattr("asyncbucket.stores.sqlite.OPEN_PATIENCE", 0.2)
    async with opened(path, patience=0.2) as ledger:
        ledger.patience = 5
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="find who holds its write lock") as error:
                await ledger.commit(ONE)
        assert "waited" not in str(error.value)
        assert await used(ledger) == 0


async def test_worker_that_joins_waits_as_long_for_a_lock_as_for_a_server(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        store = SQLiteStore(path)
        joining = asyncio.create_task(store.open("openai", CONFIG))
        await asyncio.sleep(0.6)
        holder.execute("END")
        ledger = await joining
    assert outcomes(await ledger.commit(ONE)) == ["booked"]
    await ledger.aclose()
    await store.aclose()


async def test_disk_that_fills_up_loses_no_booking(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.commit(ONE)
        disk = ledger._store.connection()
        disk.execute("PRAGMA max_page_count = 1")  # no more than there are
        names = (f"limiter {number}" for number in range(1_000))

        async def fill() -> None:
            for name in names:
                await ledger._store.open(name, CONFIG)

        with pytest.raises(StoreError) as error:
            await fill()
        assert f"{path}: SQLite failed (database or disk is full), and nothing" in str(error.value)
        disk.execute("PRAGMA max_page_count = 100000")
        await ledger._store.open(next(names), CONFIG)
        assert await used(ledger) == 1


async def test_log_cut_off_at_any_byte_leaves_whole_batches(path: Path) -> None:
    async with opened(path) as ledger:
        for _ in range(30):
            await ledger.commit(ONE)
        log = path.with_name("limits.db-wal").read_bytes()
        file = path.read_bytes()
    seen = []
    for cut in range(0, len(log) + 1, len(log) // 50):
        folder = path.parent / str(cut)
        folder.mkdir()
        (folder / "limits.db").write_bytes(file)
        (folder / "limits.db-wal").write_bytes(log[:cut])
        async with opened(folder / "limits.db") as after:
            seen.append(await used(after))
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    assert seen[-1] >= 29


class Hands:
    """A wall clock and a steady one that are turned by hand."""

    def __init__(self) -> None:
        self.wall, self.steady = 1_000 * SECOND, 50 * SECOND

    def store(self, path: Path, boot: str = "boot-1") -> SQLiteStore:
        clock = MachineClock(lambda: self.wall, lambda: self.steady, boot)
        return SQLiteStore(path, clock=clock)

    def pass_by(self, seconds: int) -> None:
        self.wall += seconds * SECOND
        self.steady += seconds * SECOND


async def test_limiters_with_nothing_to_remember_are_deleted_from_file(path: Path) -> None:
    hands = Hands()
    store, minute = hands.store(path), terms("5/minute")
    ledgers = [await store.open("m", minute), await store.open("d", terms("5/day"))]
    for ledger in ledgers:
        await ledger.commit(ONE)
    hands.pass_by(3_600)
    assert await store.names() == ["d"]
    await store.open("new", minute)
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT min(name), count(*) FROM limiters").fetchall() == [("d", 2)]
    await ledgers[0].commit(ONE)
    assert await store.names() == ["d", "m", "new"]
    assert [await used(ledger) for ledger in ledgers] == [1, 1]
    await store.aclose()


async def seconds_at(store: SQLiteStore) -> float:
    ledger = await store.open("openai", CONFIG)
    now = (await peek(ledger)).now
    await store.aclose()
    return now / SECOND


async def test_clock_of_a_file_ignores_jumps_of_the_wall_clock(path: Path) -> None:
    hands = Hands()
    assert await seconds_at(hands.store(path)) == 1_000
    for jump in (3_600, -7_200):
        hands.wall += jump * SECOND
        hands.pass_by(10)
    assert await seconds_at(hands.store(path)) == 1_020


@pytest.mark.parametrize(
    ("boot", "jump", "after"),
    [("boot-2", 3_600, 4_600), ("boot-2", -600, 1_000), ("", 3_600, 4_600)],
)
async def test_clock_of_a_file_goes_on_after_a_reboot(
    path: Path, boot: str, jump: int, after: int
) -> None:
    """From the last instant in the file, if the wall clock shows an earlier one."""
    hands = Hands()
    assert await seconds_at(hands.store(path)) == 1_000
    hands.steady = 0
    hands.wall += jump * SECOND
    assert await seconds_at(hands.store(path, boot)) == after
    hands.pass_by(1)
    assert await seconds_at(hands.store(path, boot)) == after + 1


PREAMBLE = """
import asyncio, os, sys
from asyncbucket import Limit
from asyncbucket.stores import Batch, LimitConfig
from asyncbucket.stores.sqlite import SQLiteStore

store, one = SQLiteStore(sys.argv[1], patience=5), Batch(calls=({"requests": 1},))
config = LimitConfig(limits=(Limit("requests", 10**6, per=86_400, burst=10**6),), concurrency=10**6)
"""


#: Print what was booked as soon as it was, until killed.
BUSY = (
    PREAMBLE
    + """
async def main():
    ledger = await store.open("openai", config, slot_ttl=1.5)
    while True:
        receipt = await ledger.commit(Batch(calls=({"requests": 1, "concurrency": 1},) * 3))
        print(len(receipt.bookings), flush=True)

asyncio.run(main())
"""
)


async def test_process_killed_at_any_instant_loses_no_reported_booking(
    path: Path, start: Callable[[str, str], Any]
) -> None:
    told = 0
    limit = Limit("requests", 10**6, per=86_400, burst=10**6)
    config = LimitConfig(limits=(limit,), concurrency=10**6)
    async with opened(path, config, slot_ttl=1.5) as ledger:
        for round_ in range(6):
            process = start(BUSY, str(path))
            told += int(process.stdout.readline())
            await asyncio.sleep(0.005 * round_)
            process.send_signal(signal.SIGKILL)
            told += sum(int(line) for line in process.stdout if line.endswith("\n"))
            booked = await used(ledger)
            assert told <= booked <= told + 3
            told = booked
        with contextlib.closing(sqlite3.connect(path)) as other:
            assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_failure_inside_a_batch_books_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path) as ledger:
        for error in (sqlite3.OperationalError("disk I/O error"), ZeroDivisionError("odd")):
            monkeypatch.setattr(State, "apply", Mock(side_effect=error))
            with pytest.raises(StoreError, match=f"{path}: .*{error}"):
                await ledger.commit(ONE)
        monkeypatch.undo()
        assert await used(ledger) == 0
        assert outcomes(await ledger.commit(ONE)) == ["booked"]


async def test_unresponsive_disk_raises_store_error_and_charges_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path, patience=0.2) as ledger:
        apply, hang = State.apply, threading.Event()

        def hanging(*args: Any, **kwargs: Any) -> Any:
            hang.wait(9)  # else a failure of this test would keep the process from ending
            return apply(*args, **kwargs)

        ledger._slowest = 0  # on a busy machine it would be given more time
        with monkeypatch.context() as patched:
            patched.setattr(State, "apply", hanging)
            with pytest.raises(StoreError, match=r"does not answer: .*patience=5 .waited 0\.2 s"):
                await ledger.commit(Batch(calls=(CALL,)))
        hang.set()
        await ledger.commit(Batch())
        assert (await used(ledger), (await peek(ledger)).slots) == (0, 0)


async def test_deleted_file_is_made_anew_and_calls_in_flight_hold_their_slots(path: Path) -> None:
    async with opened(path) as one, opened(path) as two:
        for ledger in (one, two):
            await ledger.commit(Batch(calls=(CALL,) * 3))
        for each in path.parent.glob("limits.db*"):
            each.unlink()
        await one.commit(Batch(calls=(CALL,)))
        await two.commit(Batch())
        seen = await peek(two)
        assert (seen.limits[0].used, seen.slots) == (1, 7)


FORKING = (
    PREAMBLE
    + """
async def book(store):
    try:
        ledger = await store.open("openai", config)
        await ledger.commit(one)
        print((await store.peek("openai")).limits[0].used, flush=True)
    except Exception as error:
        print(error, flush=True)

loop = asyncio.new_event_loop()
loop.run_until_complete(book(store))
pid = os.fork()
if not pid:
    asyncio.run(book(store))
    asyncio.run(book(SQLiteStore(sys.argv[1])))
    os._exit(0)
os.waitpid(pid, 0)
loop.run_until_complete(book(store))
loop.run_until_complete(store.aclose())
loop.close()
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_file_open_at_a_fork_is_refused_in_the_child_and_serves_the_parent(path: Path) -> None:
    done = python("-c", FORKING, str(path))
    assert done.stderr == ""
    before, refused, again, after = done.stdout.splitlines()
    assert refused == again
    assert refused == (
        f"{path} was open when this process forked, and SQLite files cannot be shared with a fork: "
        f"make the limiter in the child, or close it before with `await limiter.aclose()`"
    )
    assert (before, after) == ("1", "2")
