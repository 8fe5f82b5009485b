"""Real servers on loopback, valkey-server or else redis-server, each in its own folder."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from redis import Redis

from asyncbucket import Limiter
from asyncbucket.stores import open_store, script
from asyncbucket.stores.redis import RedisStore
from asyncbucket.testing import VirtualTime
from tests.stores.memory import MemoryStore

pytest.register_assert_rewrite("tests.stores.conformance")

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")


class RunningServer:
    """A server process that can be killed, frozen and started again on the same port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        for _ in range(5):  # another program may take a port that was free a moment ago
            self.port = free_port()
            with contextlib.suppress(ConnectionRefusedError):
                self.start()
                return
        raise TimeoutError(f"{SERVER} did not start on five ports")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        if SERVER is None:
            say = pytest.fail if "CI" in os.environ else pytest.skip
            say("NO SERVER: install valkey-server (or redis-server) to test shared limits")
        place = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder))
        options = (*place, "--save", "", *self._options)
        settings = [str(self._folder / "sentinel.conf")] if "--sentinel" in self._options else []
        self._process = subprocess.Popen(
            [SERVER, *settings, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait_until_it_listens(self._process)

    def _wait_until_it_listens(self, process: "subprocess.Popen[bytes]") -> None:
        """Return as soon as it has loaded its data.

        Raises:
            ConnectionRefusedError: it has ended, because another program has the port.
        """
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if process.poll() is not None:
                raise ConnectionRefusedError
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    probe.sendall(b"PING\r\n")
                    if not probe.recv(100).startswith(b"-LOADING"):
                        probe.sendall(b"INFO server\r\n")
                        told = probe.recv(4096)
                        if b"process_id:" in told and b"_id:%d\r" % process.pid not in told:
                            break  # another server was faster
                        return
            time.sleep(0.01)
        self.kill()
        raise ConnectionRefusedError

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


StartServer = Callable[..., RunningServer]
Start = Callable[[str, str], "subprocess.Popen[str]"]


def free_port() -> int:
    """Return a port that nobody listens on, below those that the system gives to clients."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = 10_000 + int.from_bytes(os.urandom(2), "big") % 12_000
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start servers with the given options, and stop all of them at the end."""
    running: list[RunningServer] = []

    def start(*options: str) -> RunningServer:
        folder = tmp_path / f"server-{len(running)}"
        folder.mkdir()
        if options[:1] == ("--sentinel",):
            (folder / "sentinel.conf").write_text(options[1])
            options = ("--sentinel",)
        running.append(RunningServer(folder, *options))
        return running[-1]

    yield start
    for each in running:
        each.kill()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer than 0.2 s for replies, as the machine may be busy."""
    monkeypatch.setattr("asyncbucket.stores.redis.RedisLedger.patience", 5.0)


async def take(limiter: Limiter, **options: Any) -> None:
    """Let one call go that takes no time."""
    async with limiter.acquire(**options):
        pass


async def stop(*calls: "asyncio.Future[Any]") -> None:
    """Cancel calls, and wait until they have ended."""
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


class Fault(NamedTuple):
    """A store that can break and come back."""

    url: str
    begin: Callable[[], object]
    end: Callable[[], object]


@pytest.fixture(params=["freeze", "kill", "lock"])
def fault(
    request: pytest.FixtureRequest, path: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fault]:
    """Return a server that freezes or is killed, or a file whose lock is held, with users' patience."""
    assert patient is None
    monkeypatch.setattr("asyncbucket.stores.redis.RedisLedger.patience", 0.2)
    if request.param == "lock":
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        with contextlib.closing(connection) as holder:
            begin, end = (lambda sql=sql: holder.execute(sql) for sql in ("BEGIN IMMEDIATE", "END"))
            yield Fault(f"sqlite:///{path}", begin, end)
        return
    start_server = request.getfixturevalue("start_server")
    server: RunningServer = start_server("--appendonly", "yes", "--appendfsync", "always")
    if request.param == "freeze":
        yield Fault(server.url, server.freeze, server.thaw)
    else:
        yield Fault(server.url, server.kill, server.start)


@pytest.fixture(params=["server", "file"])
def where(request: pytest.FixtureRequest, path: Path) -> str:
    """Return the URL of each kind of store, empty."""
    if request.param == "file":
        return f"sqlite:///{path}?patience=5"
    return str(request.getfixturevalue("url"))


@pytest.fixture
async def limited() -> AsyncIterator[Callable[..., Limiter]]:
    """Make limiters called openai, and close them at the end."""
    made: list[Limiter] = []

    def make(url: str, *limits: str, name: str = "openai", **options: Any) -> Limiter:
        made.append(Limiter(*limits, store=url, name=name, **options))
        return made[-1]

    yield make
    for limiter in made:
        await limiter.aclose()


@pytest.fixture
def start() -> Iterator[Start]:
    """Run scripts in interpreters of their own until they print a line, and kill them at the end."""
    with contextlib.ExitStack() as running:

        def start(script: str, where: str) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-c", script, where],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.enter_context(process)
            running.callback(process.kill)
            return process

        yield start


@pytest.fixture
def redis(shared_server: RunningServer) -> Iterator[Any]:
    """Return a client of the shared server, which is empty at first."""
    with Redis.from_url(shared_server.url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def url(shared_server: RunningServer, redis: Any) -> str:
    assert redis.dbsize() == 0
    return shared_server.url


@pytest.fixture
async def store(url: str) -> AsyncIterator[RedisStore]:
    store = open_store(url)
    assert isinstance(store, RedisStore)
    yield store
    await store.aclose()
    await asyncio.sleep(0)


@pytest.fixture
def memory(virtual_time: VirtualTime) -> MemoryStore:
    """Return a store in memory, on virtual time."""
    return MemoryStore(virtual_time.clock, virtual_time.run)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "limits.db"


@pytest.fixture
def server_clock(redis: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the time (ns) that the script reads for the limiter ``oracle``."""
    ours, text = "redis.call('TIME')", script.source()
    assert ours in text
    text = text.replace(ours, "redis.call('HMGET', KEYS[1] .. ':test', 's', 'us')")
    monkeypatch.setattr(script, "source", lambda: text)
    monkeypatch.setattr(script, "digest", lambda: "0" * 40)

    def set_to(instant: int) -> None:
        seconds, rest = divmod(instant // 1_000, 1_000_000)
        redis.hset("asyncbucket:{oracle}:state:test", mapping={"s": seconds, "us": rest})

    return set_to


class Proxy:
    """A proxy between a client and a server that can break the connection at any byte of an answer."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.url = ""
        #: How many more bytes of answers pass before the connection breaks, and how often it does.
        self.left = self.cuts = 0
        self.broken = 0
        self._close: Callable[[], None] = list[None]().clear
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self, left: int, *, times: int = 1) -> None:
        self.left, self.cuts, self.broken = left, times, 0

    async def __aenter__(self) -> Self:
        server = await asyncio.start_server(self._serve, "127.0.0.1")
        self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        self._close = server.close
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        forth = asyncio.create_task(self._forward(reader, back))
        try:
            while data := await there.read(65_536):
                if self.broken >= self.cuts:
                    writer.write(data)
                    continue
                writer.write(data[: self.left])
                self.left -= len(data)
                if self.left <= 0:
                    self.broken += 1
                    self.left = 1
                    break
            await writer.drain()
        finally:
            forth.cancel()
            for each in (writer, back):
                each.close()
            waits = (forth, writer.wait_closed(), back.wait_closed())
            await asyncio.gather(*waits, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            back.write(data)


@pytest.fixture
async def proxy(shared_server: RunningServer, url: str) -> AsyncIterator[Proxy]:
    """Return a proxy before the shared server, which is empty at first."""
    assert url
    async with Proxy(shared_server.port) as proxy:
        yield proxy
