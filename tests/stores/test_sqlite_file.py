"""Each fault of a file: its message, and what still holds afterwards."""

import asyncio
import contextlib
import dataclasses
import gc
import os
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limit, StoreError
from asyncbucket.stores import Batch, Correction, Outcome, Terms, open_store
from asyncbucket.stores.sqlite import SQLiteLedger, SQLiteStore, from_url
from asyncbucket.stores.sqlite.clock import SharedClock
from asyncbucket.stores.sqlite.file import VERSION
from asyncbucket.stores.sqlite.file_thread import FileThread

TERMS = Terms(limits=(Limit("requests", 1_000, per=86_400, burst=1_000),), concurrency=10)
#: Virtual time does not apply to locks and disks.
pytestmark = pytest.mark.real_clock

CALL = {"requests": 1, "concurrency": 1}
HALF: Any = {"requests": 1.5}


@contextlib.asynccontextmanager
async def opened(path: Path, *, patience: float = 0.2) -> AsyncGenerator[SQLiteLedger]:
    """Open a worker in the file at `path`."""
    store = SQLiteStore(path, patience=patience)
    try:
        ledger = await store.open("openai", TERMS)
        yield ledger
        await ledger.aclose()
    finally:
        await store.aclose()


async def used(ledger: SQLiteLedger) -> int:
    """Return the number of units booked."""
    return (await ledger.peek()).limits[0].used


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///limits.db", "limits.db"),
        ("sqlite:////var/lib/limits.db", "/var/lib/limits.db"),
        ("sqlite:///a%20b%3F/limits.db?patience=2", "a b?/limits.db"),
    ],
)
def test_sqlite_url_names_relative_or_absolute_path(url: str, path: str) -> None:
    """Three slashes are for a relative path, four for an absolute one."""
    assert repr(open_store(url)) == f"<SQLiteStore {Path(path).absolute()}>"


@pytest.mark.parametrize("options", ["", "?patience=2.5"])
def test_store_url_leads_to_same_file_from_any_folder(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL keeps special characters and the patience."""
    monkeypatch.chdir(tmp_path)
    store = open_store(f"sqlite:///a%20b%3F/100%25%23.db{options}")
    monkeypatch.chdir("/")
    assert store.url == f"sqlite:///{tmp_path}/a%20b%3F/100%25%23.db{options}"
    again = open_store(store.url)
    assert (repr(again), again.url) == (repr(store), store.url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (
            "sqlite://:memory:",
            "'sqlite://:memory:' names a host, and a file has none: write sqlite:///limit",
        ),
        ("sqlite://limits.db", "'sqlite://limits.db' names a host, and a file has none"),
        ("sqlite:///", "names no file that processes could share: write sqlite:///limits.db"),
        ("sqlite:///:memory:", "names no file .*; for one process no store is needed"),
        ("sqlite:///limits.db?mode=ro&patience=1", "sets mode: only patience can be set"),
        ("sqlite:///limits.db?patience=soon", "number of seconds, e.g. 0.2, not 'soon'"),
        ("sqlite:///limits.db?patience=nan", "patience must be a positive number of seconds"),
        ("sqlite:///limits.db?patience=0", "patience must be a positive number of seconds"),
    ],
)
def test_invalid_sqlite_url_is_refused_with_remedy(url: str, why: str) -> None:
    """The error comes as soon as the store is made."""
    with pytest.raises(ValueError, match=why):
        from_url(url)


async def test_unused_store_creates_no_file(path: Path) -> None:
    """A store that nobody uses leaves no file, and can still be closed."""
    store = SQLiteStore(path)
    assert repr(store) == f"<SQLiteStore {path}>"
    await store.aclose()
    assert not path.exists()


async def test_closing_last_worker_leaves_a_single_file(path: Path) -> None:
    """The last worker to close merges the log into the file."""
    async with opened(path) as ledger:
        await ledger.commit(Batch(calls=(CALL,)))
        assert repr(ledger) == f"<SQLiteLedger 'openai', worker {ledger.worker}>"
        details = (await ledger.peek()).details
        assert details["path"] == str(path)
        assert details["schema"] == str(VERSION)
    assert [each.name for each in path.parent.iterdir()] == ["limits.db"]


async def test_closed_store_raises_store_error(path: Path) -> None:
    """Closing twice is fine, and so is closing a ledger whose store has been closed."""
    store = SQLiteStore(path)
    ledger = await store.open("openai", TERMS)
    await store.aclose()
    await store.aclose()
    with pytest.raises(StoreError, match=f"{path}: this store has been closed: open another"):
        await ledger.commit(Batch(calls=(CALL,)))
    await ledger.aclose()


async def test_garbage_collected_store_closes_its_file(path: Path) -> None:
    """A ledger keeps its store; once both are gone the thread ends and the log is merged."""
    ledger = await SQLiteStore(path).open("openai", TERMS)
    gc.collect()
    await ledger.commit(Batch(calls=(CALL,)))
    thread = ledger._file_thread._thread
    assert thread is not None
    del ledger
    gc.collect()
    await asyncio.to_thread(thread.join, 5)
    assert [each.name for each in path.parent.iterdir()] == ["limits.db"]


async def failure(path: Path) -> str:
    """Return why the file cannot be used."""
    with pytest.raises(StoreError) as caught:
        async with opened(path):
            pass
    return str(caught.value)


async def test_missing_folder_is_named_in_error(tmp_path: Path) -> None:
    """It is not created: with a typing error each process would get a limit of its own."""
    path = tmp_path / "nowhere" / "limits.db"
    assert await failure(path) == (
        f"{path}: it cannot be opened: there is no folder {path.parent}; make the folder, or give "
        f"another path"
    )


async def test_path_that_cannot_be_opened_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is there need not be made."""
    assert await failure(tmp_path) == (
        f"{tmp_path}: it cannot be opened: it is not a plain file, or may not be read; see what it "
        f"is, or give another path"
    )

    def refused(_path: object, _mode: int) -> bool:
        return False

    monkeypatch.setattr(os, "access", refused)  # root may write everywhere
    assert await failure(tmp_path) == (
        f"{tmp_path}: it cannot be opened: the folder {tmp_path.parent} is not writable; give this "
        f"user the right to write there, or give another path"
    )


async def test_newer_schema_is_refused(path: Path) -> None:
    """The file is left as it is."""
    async with opened(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = path.read_bytes()
    assert await failure(path) == (
        f"{path} has schema version {VERSION + 1}, and this asyncbucket knows versions up to "
        f"{VERSION}: upgrade asyncbucket, or use another file"
    )
    assert path.read_bytes() == before


async def test_database_of_another_program_is_left_unchanged(path: Path) -> None:
    """Its tables are not mixed with ours, and not a byte is changed."""
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE people (name)")
    before = path.read_bytes()
    assert await failure(path) == (
        f"{path} is a database of another program (1 tables, application id 0x0): give "
        f"asyncbucket a file of its own"
    )
    assert path.read_bytes() == before


async def test_file_that_is_no_database_is_left_unchanged(path: Path) -> None:
    """A text file stays as it is."""
    path.write_text("not a database at all, " * 100)
    assert await failure(path) == (
        f"{path}: it is not a SQLite file, or is damaged (file is not a database): move it away, and "
        f"a new one is made"
    )
    assert path.read_text().startswith("not a database")


async def test_sqlite_failure_raises_store_error_with_file_and_cause(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even unforeseen errors name the file and the cause."""
    async with opened(path) as ledger:
        error = sqlite3.OperationalError("disk I/O error")
        for code, why in (
            (
                sqlite3.SQLITE_IOERR_WRITE,
                "the disk failed to read or write .disk I/O error; .* free",
            ),
            (sqlite3.SQLITE_CONSTRAINT, "SQLite failed .disk I/O error., and nothing was booked"),
            (sqlite3.SQLITE_READONLY, "give this user the right to write the file and its folder"),
        ):
            error.sqlite_errorcode = code
            monkeypatch.setattr(ledger._file_thread, "_apply", _raising(error))
            with pytest.raises(StoreError, match=f"{path}.*{why}"):
                await ledger.commit(Batch(calls=(CALL,)))
        monkeypatch.undo()
        assert await used(ledger) == 0


def _raising(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
async def test_read_only_file_error_names_remedy(path: Path) -> None:
    """The error names the remedy."""
    async with opened(path):
        pass
    path.chmod(0o400)
    assert "give this user the right to write the file" in await failure(path)


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold the write lock, as a frozen process or a careless tool would."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        yield
        holder.execute("ROLLBACK")


async def test_held_lock_raises_store_error_within_patience(path: Path) -> None:
    """All who ask meanwhile get the same error; once the lock is free everything goes on."""
    async with opened(path) as ledger:
        with locked(path):
            began = time.monotonic()
            asked = [asyncio.create_task(ledger.commit(Batch(calls=(CALL,)))) for _ in range(5)]
            await asyncio.sleep(0.1)
            asked += [asyncio.create_task(ledger.commit(Batch(calls=(CALL,)))) for _ in range(5)]
            errors = await asyncio.gather(*asked, return_exceptions=True)
            assert time.monotonic() - began < 1.5
        assert {str(error) for error in errors} == {
            (
                f"{path}: another process has held the write lock for over 0.2 s; find it with "
                f"`fuser {path}`, or allow more with ?patience=5"
            )
        }
        assert {type(error) for error in errors} == {StoreError}
        assert await used(ledger) == 0
        receipt = await ledger.commit(Batch(calls=(CALL,)))
        assert receipt.bookings[0].outcome is Outcome.BOOKED


async def test_corrections_of_a_failed_batch_are_applied_once(path: Path) -> None:
    """They go with whatever is sent next, even a peek; the failed calls do not."""
    async with opened(path) as ledger:
        receipt = await ledger.commit(Batch(calls=(CALL,) * 3))
        first, second, third = receipt.bookings
        with locked(path):
            for booking in (first, second):
                assert booking.slot is not None
                batch = Batch(
                    corrections=(Correction.undo(CALL, booking.start),),
                    released=(booking.slot,),
                    calls=(CALL,),
                )
                with pytest.raises(StoreError):
                    await ledger.commit(batch)
        await ledger.peek()
        for _ in range(3):
            snapshot = await ledger.peek()
            assert (snapshot.limits[0].used, snapshot.slots) == (1, 1)
        assert third.slot is not None
        await ledger.commit(Batch(released=(third.slot,)))
        assert (await ledger.peek()).slots == 0


async def test_booking_undone_while_lock_is_held_is_returned_later(path: Path) -> None:
    """Its caller has gone and giving back fails at first, so it is kept until it succeeds."""
    async with opened(path) as ledger:
        await ledger.commit(Batch())
        receipt = await ledger.commit(Batch(calls=(CALL,)))
        with locked(path):
            ledger._undo(Batch(calls=(CALL,)), receipt)
            await asyncio.sleep(0.4)
            assert ledger._pending.corrections
        snapshot = await ledger.peek()
        assert (snapshot.limits[0].used, snapshot.slots) == (0, 0)


async def test_caller_cancelled_as_answer_arrives_is_charged_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The booking was made and reported, but its caller was cancelled at that moment."""
    put = FileThread.put
    tasks: list[asyncio.Task[Any]] = []

    def put_and_cancel(file_thread: FileThread, job: Any) -> None:
        def done(*what: Any) -> None:
            job.done(*what)
            for task in tasks:
                task.cancel()
            tasks.clear()

        put(file_thread, dataclasses.replace(job, done=done))

    async with opened(path) as ledger:
        monkeypatch.setattr(FileThread, "put", put_and_cancel)
        tasks.append(asyncio.create_task(ledger.commit(Batch(calls=(CALL,)))))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        snapshot = await ledger.peek()
        assert (snapshot.limits[0].used, snapshot.slots) == (0, 0)


async def test_lock_held_for_less_than_patience_only_delays_call(path: Path) -> None:
    """With more patience the call waits for the lock."""
    async with opened(path, patience=5) as ledger:
        held = threading.Event()

        def hold() -> None:
            with locked(path):
                held.set()
                time.sleep(0.4)

        holder = threading.Thread(target=hold)
        holder.start()
        await asyncio.to_thread(held.wait)
        receipt = await ledger.commit(Batch(calls=(CALL,)))
        holder.join()
        assert receipt.bookings[0].outcome is Outcome.BOOKED


async def test_unresponsive_disk_raises_store_error_and_charges_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hanging write holds up only its thread; what it books in the end is given back."""
    async with opened(path) as ledger:
        file_thread = ledger._file_thread
        serve, hang = file_thread._serve, threading.Event()

        def hanging(*args: Any) -> None:
            hang.wait()
            serve(*args)

        monkeypatch.setattr(file_thread, "_serve", hanging)
        with pytest.raises(StoreError, match=r"the disk has not answered for 0.2 s: .*patience=5"):
            await ledger.commit(Batch(calls=(CALL,)))
        monkeypatch.undo()
        hang.set()
        assert await used(ledger) == 0


async def test_opening_store_may_take_longer_than_patience(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk takes its time to create the tables, and the first call waits for that."""
    store = SQLiteStore(path)
    connect = store._file_thread._file._connect

    def slowly() -> sqlite3.Connection:
        time.sleep(0.5)
        return connect()

    monkeypatch.setattr(store._file_thread._file, "_connect", slowly)
    ledger = await store.open("openai", TERMS)
    assert await used(ledger) == 0
    await store.aclose()


async def test_full_disk_raises_store_error_and_books_nothing(path: Path) -> None:
    """StoreError says how much space is free; once there is some, everything goes on."""
    async with opened(path) as ledger:
        await ledger.commit(Batch(calls=(CALL,)))
        log = path.with_name("limits.db-wal")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, before[1]))
        try:
            with pytest.raises(StoreError) as caught:
                await ledger.commit(Batch(calls=(CALL,) * 5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(path) in str(caught.value)
        assert " bytes free" in str(caught.value)
        assert await used(ledger) == 1
        receipt = await ledger.commit(Batch(calls=(CALL,)))
        assert receipt.bookings[0].outcome is Outcome.BOOKED
        assert await used(ledger) == 2


ON_A_SMALL_DISK = """
import asyncio, pathlib, sys
from asyncbucket import Limit, StoreError
from asyncbucket.stores import Batch, Terms, open_store

folder = pathlib.Path(sys.argv[1])

async def main():
    store = open_store(f"sqlite:///{folder / 'limits.db'}")
    terms = Terms(limits=(Limit("requests", 10**9, per=86_400, burst=10**9),))
    ledger = await store.open("openai", terms)
    booked, error = 0, None
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    for _ in range(20_000):
        try:
            await ledger.commit(Batch(calls=({"requests": 1},) * 50))
        except StoreError as failed:
            error = failed
            break
        booked += 50
    print(error)
    ballast.unlink()
    await ledger.commit(Batch(calls=({"requests": 1},)))
    print((await ledger.peek()).limits[0].used - booked)
    await store.aclose()

asyncio.run(main())
"""


def test_disk_that_fills_up_loses_no_booking(tmp_path: Path) -> None:
    """A real file system of 1 MB fills up: the error says so, and every booking is counted once."""
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
        "limits.db: no space is left (0 bytes free), so nothing was booked; free some, or move the "
        "file to another disk"
    )
    assert difference == "1"


async def test_deleted_file_is_rebuilt_from_what_its_workers_know(path: Path) -> None:
    """If somebody deletes it, old workers and new ones still find the day's use counted."""
    async with opened(path) as one, opened(path) as two:
        await one.commit(Batch(calls=(CALL,) * 3))
        await two.commit(Batch(calls=(CALL,) * 3))
        for each in path.parent.glob("limits.db*"):
            each.unlink()
        await one.commit(Batch(calls=(CALL,)))  # it never saw the last batch of `two`
        await two.commit(Batch(calls=(CALL,)))
        assert await used(one) == 8
        async with opened(path) as new:
            assert await used(new) == 8
            assert (await new.peek()).slots == 8


async def test_file_recreated_by_newcomer_is_charged_with_earlier_use(path: Path) -> None:
    """When a newcomer has made the file again, those who knew the old one add their part."""
    async with opened(path) as old:
        await old.commit(Batch(calls=(CALL,) * 3))
        for each in path.parent.glob("limits.db*"):
            each.unlink()
        async with opened(path) as new:
            await new.commit(Batch(calls=(CALL,) * 2))
            await old.commit(Batch(calls=(CALL,)))
            assert await used(new) == 6


async def test_log_cut_off_at_any_byte_leaves_whole_batches(path: Path) -> None:
    """A power failure leaves a prefix of what was booked, and a sound file."""
    async with opened(path) as ledger:
        for _ in range(30):
            await ledger.commit(Batch(calls=({"requests": 1},)))
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


async def test_journal_entry_of_differing_version_raises_store_error(path: Path) -> None:
    """Two versions whose arithmetic differs must not share a limit, or it could be exceeded."""
    async with opened(path) as one, opened(path) as two:
        await one.commit(Batch(calls=(CALL,)))
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute(
                "UPDATE journal SET sum = sum + 1 WHERE seq = (SELECT max(seq) FROM journal)"
            )
            other.commit()
        with pytest.raises(
            StoreError, match=r"entry \d of limiter 'openai' was made by a version of async.*"
        ):
            await two.commit(Batch(calls=(CALL,)))


async def test_journal_stays_short_and_newcomer_counts_all_bookings(path: Path) -> None:
    """However many batches there were, the file stays small and a newcomer reads little."""
    async with opened(path) as ledger:
        for _ in range(900):
            await ledger.commit(Batch(calls=({"requests": 1},)))
        with contextlib.closing(sqlite3.connect(path)) as other:
            (entries,) = other.execute("SELECT count(*) FROM journal").fetchone()
        assert entries < 256
        async with opened(path) as new:
            assert await used(new) == 900


def mistaken(*_: Any, **__: Any) -> None:
    """Raise as a programming error would."""
    raise ZeroDivisionError("division by zero")


async def test_limiters_with_nothing_to_remember_are_deleted_from_file(path: Path) -> None:
    """Unused names do not pile up; a worker that still has one can go on with it."""
    hands = Hands()
    store = SQLiteStore(path, clock=hands.clock("boot"))
    minute, day = (Terms(limits=(Limit("requests", 5, per=per),)) for per in (60, 86_400))
    ledgers = [await store.open(name, terms) for name, terms in (("m", minute), ("d", day))]
    for ledger in ledgers:
        await ledger.commit(Batch(calls=({"requests": 1},)))
    hands.pass_by(3_600)
    assert await store.names() == ["d"]
    await store.open("new", minute)
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM limiters ORDER BY 1").fetchall() == [
            ("d",),
            ("new",),
        ]
        assert other.execute("SELECT count(*) FROM journal WHERE name = 'm'").fetchone() == (0,)
    await ledgers[0].commit(Batch(calls=({"requests": 1},)))
    assert await store.names() == ["d", "m", "new"]
    assert [(await ledger.peek()).limits[0].used for ledger in ledgers] == [1, 1]
    await store.aclose()


class Hands:
    """Clocks that are turned by hand."""

    def __init__(self) -> None:
        self.now = 10**18

    def clock(self, boot: str) -> SharedClock:
        """Return a clock that shows the time of the hands."""
        return SharedClock(wall=lambda: self.now, steady=lambda: self.now, boot=boot)

    def pass_by(self, seconds: int) -> None:
        """Advance the time."""
        self.now += seconds * 1_000_000_000


async def test_internal_error_raises_store_error_and_store_works_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread lives on, and nothing is booked."""
    async with opened(path) as ledger:
        books = ledger._file_thread._replicas["openai"].books
        monkeypatch.setattr(books, "commit", mistaken)
        with pytest.raises(StoreError, match="ZeroDivisionError: division by zero"):
            await ledger.commit(Batch(calls=(CALL,)))
        receipt = await ledger.commit(Batch(calls=(CALL,)))
        assert receipt.bookings[0].outcome is Outcome.BOOKED


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (Batch(calls=(HALF,)), "requests must be a whole number from 0 on, not 1.5"),
        (Batch(calls=({"requests": -1},)), "requests must be a whole number from 0 on, not -1"),
        (Batch(horizon=-1), "horizon must be a whole number from 0 on, not -1"),
        (Batch(calls=({"concurrency": 2},)), "a call takes one slot, not 2"),
        (
            Batch(corrections=(Correction(start=True, booked={}, used={}),)),
            "start must be a whole number from 0 on, not True",
        ),
    ],
)
async def test_invalid_amounts_in_batch_are_refused(path: Path, batch: Batch, why: str) -> None:
    """The error comes before anything is written that others would have to read."""
    async with opened(path) as ledger:
        with pytest.raises(ValueError, match=why):
            await ledger.commit(batch)
        assert await used(ledger) == 0
