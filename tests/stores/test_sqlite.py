"""Limits in a file: what it promises, and what still holds after each fault."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limit, StoreError
from asyncbucket.stores import Batch, LimitConfig
from asyncbucket.stores.sqlite import SCHEMA, MachineClock, SQLiteLedger, SQLiteStore
from asyncbucket.stores.state import State
from tests.conftest import python
from tests.stores.conformance.place import outcomes, terms

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


async def used(ledger: SQLiteLedger) -> int:
    return (await ledger.peek()).limits[0].used


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


UNREADABLE = (
    ": it cannot be opened or written (unable to open database file): see that the folder {folder} "
    "exists and this user may write there, or give another path"
)


def remove_folder(path: Path) -> None:
    path.parent.rmdir()


def make_text(path: Path) -> None:
    path.write_text("not a database at all, " * 100)


def make_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE people (name)")


def make_other_version(path: Path) -> None:

    async def make() -> None:
        async with opened(path):
            pass

    asyncio.run(make())
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"PRAGMA user_version = {SCHEMA + 1}")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        pytest.param(remove_folder, UNREADABLE, id="no folder"),
        pytest.param(Path.mkdir, UNREADABLE, id="a folder"),
        pytest.param(
            make_database,
            " is a database of another program (1 tables, application id 0x0): give asyncbucket a "
            "file of its own",
            id="another program's",
        ),
        pytest.param(
            make_text,
            ": it is not a SQLite file, or is damaged (file is not a database): move it away, and a "
            "new one is made",
            id="no database",
        ),
        pytest.param(
            make_other_version,
            f" has schema version {SCHEMA + 1}, and this asyncbucket needs version {SCHEMA}: use one "
            f"version of asyncbucket for one file, or another file",
            id="another version's",
        ),
    ],
)
def test_path_that_cannot_be_used_is_left_unchanged_and_named_with_the_remedy(
    tmp_path: Path, make: Any, why: str
) -> None:
    path = tmp_path / "folder" / "limits.db"
    path.parent.mkdir()
    make(path)
    before = path.read_bytes() if path.is_file() else None

    async def use() -> None:
        async with opened(path):
            pass

    with pytest.raises(StoreError) as error:
        asyncio.run(use())
    assert str(error.value) == f"{path}{why.format(folder=path.parent)}"
    assert before is None or path.read_bytes() == before


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        yield
        holder.execute("ROLLBACK")


async def test_held_lock_raises_store_error_within_patience(path: Path) -> None:
    async with opened(path, patience=0.2) as ledger:
        with locked(path), pytest.raises(StoreError) as error:
            await ledger.commit(ONE)
        assert str(error.value) == (
            f"{path}: another process has held the write lock for over 0.2 s; find it with "
            f"`fuser {path}`, or allow more with ?patience=5"
        )
        assert await used(ledger) == 0
        assert outcomes(await ledger.commit(ONE)) == ["booked"]


ON_A_SMALL_DISK = """
import asyncio, contextlib, pathlib, sys
from asyncbucket import Limit, StoreError
from asyncbucket.stores import Batch, LimitConfig, open_store

async def main(folder):
    store, booked, ballast = open_store(f"sqlite:///{folder / 'limits.db'}"), 0, folder / "ballast"
    config = LimitConfig(limits=(Limit("requests", 10**9, per=86_400, burst=10**9),))
    ledger = await store.open("openai", config)
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        while True:
            await ledger.commit(Batch(calls=({"requests": 1},) * 50))
            booked += 50
    except StoreError as error:
        print(error)
    ballast.unlink()
    await ledger.commit(Batch(calls=({"requests": 1},)))
    print((await ledger.peek()).limits[0].used - booked)
    await store.aclose()

asyncio.run(main(pathlib.Path(sys.argv[1])))
"""


def test_disk_that_fills_up_loses_no_booking(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} - {tmp_path}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    if os.geteuid() == 0:
        command = ["unshare", "--mount", "sh", "-c", mount]
    try:
        done = subprocess.run(
            command, input=ON_A_SMALL_DISK, capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this system")
    if done.returncode and "Traceback" not in done.stderr:
        pytest.skip(f"no file system can be made here: {done.stderr.strip()}")
    assert not done.stderr
    error, difference = done.stdout.splitlines()
    assert error.endswith(
        "limits.db: SQLite failed (database or disk is full), and nothing was booked: look at the disk, "
        "or move the file to another"
    )
    assert difference == "1"


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
        names = other.execute("SELECT name FROM limiters ORDER BY 1").fetchall()
    assert names == [("d",), ("new",)]
    await ledgers[0].commit(ONE)
    assert await store.names() == ["d", "m", "new"]
    assert [(await ledger.peek()).limits[0].used for ledger in ledgers] == [1, 1]
    await store.aclose()


async def seconds_at(store: SQLiteStore) -> float:
    ledger = await store.open("openai", CONFIG)
    now = (await ledger.peek()).now
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


UNCLOSED = (
    PREAMBLE
    + """
async def main():
    ledger = await store.open("openai", config)
    await ledger.commit(one)
    waiting = asyncio.ensure_future(ledger.changed(timeout=60))
    await asyncio.sleep(0.05)
    waiting.cancel()

asyncio.run(main())
"""
)


async def test_process_killed_at_any_instant_loses_no_reported_booking(
    path: Path, start: "Callable[[str, str], subprocess.Popen[str]]"
) -> None:
    told = 0
    limit = Limit("requests", 10**6, per=86_400, burst=10**6)
    config = LimitConfig(limits=(limit,), concurrency=10**6)
    async with opened(path, config, slot_ttl=1.5) as ledger:
        for round_ in range(6):
            process = start(BUSY, str(path))
            assert process.stdout is not None
            told += int(process.stdout.readline())
            await asyncio.sleep(0.005 * round_)
            process.send_signal(signal.SIGKILL)
            told += sum(int(line) for line in process.stdout if line.endswith("\n"))
            booked = (await ledger.peek()).limits[0].used
            assert told <= booked <= told + 3
            told = booked
        with contextlib.closing(sqlite3.connect(path)) as other:
            assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_unclosed_store_does_not_keep_process_alive(path: Path) -> None:
    done = python("-X", "dev", "-c", UNCLOSED, str(path), check=True, timeout=30)
    slow = "Executing <"  # what a busy machine has asyncio say
    assert [line for line in done.stderr.splitlines() if not line.startswith(slow)] == []


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (sqlite3.SQLITE_IOERR_WRITE, "SQLite failed .disk I/O error., and nothing"),
        (None, "ZeroDivisionError: odd"),
    ],
)
async def test_failure_inside_a_batch_names_file_and_cause_and_books_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, why: str
) -> None:
    error: Any = sqlite3.OperationalError("disk I/O error") if code else ZeroDivisionError("odd")
    error.sqlite_errorcode = code

    def fail(state: State, *_: Any, **__: Any) -> None:
        state.last_start = 10**30
        raise error

    async with opened(path) as ledger:
        monkeypatch.setattr(State, "apply", fail)
        with pytest.raises(StoreError, match=f"{path}.*{why}"):
            await ledger.commit(Batch(calls=(CALL,)))
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

        monkeypatch.setattr(State, "apply", hanging)
        ledger._slowest = 0  # on a busy machine it would be given more time
        try:
            with pytest.raises(StoreError, match=r"does not answer: .*patience=5 .waited 0\.25 s"):
                await ledger.commit(Batch(calls=(CALL,)))
        finally:
            monkeypatch.undo()
            hang.set()
        await ledger.commit(Batch(calls=None))
        assert (await used(ledger), (await ledger.peek()).slots) == (0, 0)


async def test_deleted_file_is_made_anew_and_calls_in_flight_hold_their_slots(path: Path) -> None:
    async with opened(path) as one, opened(path) as two:
        for ledger in (one, two):
            await ledger.commit(Batch(calls=(CALL,) * 3))
        for each in path.parent.glob("limits.db*"):
            each.unlink()
        await one.commit(Batch(calls=(CALL,)))
        await two.commit(Batch(calls=None))
        seen = await two.peek()
        assert (seen.limits[0].used, seen.slots) == (1, 7)


FORKING = (
    PREAMBLE
    + """
async def book(store):
    ledger = await store.open("openai", config)
    await ledger.commit(one)
    print((await ledger.peek()).limits[0].used, flush=True)

async def refused():
    for again in (store, SQLiteStore(sys.argv[1])):
        try:
            await book(again)
        except Exception as error:
            print(error, flush=True)

def child(coroutine):
    pid = os.fork()
    if not pid:
        asyncio.run(coroutine)
        os._exit(0)
    coroutine.close()
    assert os.waitpid(pid, 0)[1] == 0

loop = asyncio.new_event_loop()
ledger = loop.run_until_complete(store.open("openai", config))
loop.run_until_complete(ledger.commit(one))
child(refused())
loop.run_until_complete(book(store))
loop.run_until_complete(store.aclose())
child(book(SQLiteStore(sys.argv[1])))
loop.close()
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_file_open_at_a_fork_is_refused_in_the_child_and_serves_the_parent(path: Path) -> None:
    done = python("-c", FORKING, str(path))
    assert done.stderr == ""
    refused, again, used_by_parent, child_alone = done.stdout.splitlines()
    assert refused == again
    assert refused == (
        f"{path} was open when this process forked, and SQLite files cannot be shared with a fork: "
        f"make the limiter in the child, or close it before with `await limiter.aclose()`"
    )
    assert (used_by_parent, child_alone) == ("2", "3")
