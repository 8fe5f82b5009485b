"""Real servers on loopback, valkey-server or else redis-server, each in its own folder."""

import asyncio
import contextlib
import itertools
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
from typing import Any, Self

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from asyncbucket import Limiter
from asyncbucket.stores import open_store
from asyncbucket.stores.redis import RedisStore, script

pytest.register_assert_rewrite("tests.stores.conformance")

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")


class RunningServer:
    """A server process that can be killed, frozen and started again on the same port."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        self.folder = folder
        self.port = 0
        self.options = options
        self.tls = tls
        #: A file of settings, which comes first on the command line, and what follows it.
        self.config: tuple[str, ...] = ()
        if options[:1] == ("--sentinel",):
            path = folder / "sentinel.conf"
            path.write_text(options[1])
            self.config, self.options = (str(path), "--sentinel"), ()
        self.process: subprocess.Popen[bytes] | None = None
        for _ in range(5):  # another program may take a port that was free a moment ago
            self.port = free_port()
            with contextlib.suppress(ConnectionRefusedError):
                self.start()
                break
            self.stop()
        else:
            raise TimeoutError(f"{SERVER} did not start on five ports")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        assert SERVER is not None
        self.process = subprocess.Popen(
            [
                SERVER,
                *self.config,
                *self._ports(),
                *("--bind", "127.0.0.1", "--dir", str(self.folder)),
                *("--save", "", "--appendonly", "no", "--daemonize", "no", *self.options),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(self.process, self.port, tls=self.tls)

    def _ports(self) -> tuple[str, ...]:
        port = str(self.port)
        return ("--port", "0", "--tls-port", port) if self.tls else ("--port", port)

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        assert self.process is not None
        self.thaw()
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def free_port() -> int:
    """Return a port that nobody listens on, a different one each time.

    Ports of cluster nodes, 10,000 higher, also stay below those that the system gives to clients.
    """
    for port in _PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError


#: Test processes that run in parallel start at different ports.
_PORTS = itertools.cycle(
    [10_000 + (1_200 * (os.getpid() % 10) + each) % 12_000 for each in range(12_000)]
)


def wait_for_port(process: "subprocess.Popen[bytes]", port: int, *, tls: bool) -> None:
    """Return as soon as the server listens, and has loaded its data.

    Raises:
        ConnectionRefusedError: it has ended, or another one listens there.
    """
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ConnectionRefusedError
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                if tls:
                    return
                probe.sendall(b"PING\r\n")
                if not probe.recv(100).startswith(b"-LOADING"):
                    probe.sendall(b"INFO server\r\n")
                    told = probe.recv(4096)
                    if b"process_id:" in told and b"process_id:%d\r" % process.pid not in told:
                        raise ConnectionRefusedError  # another server was faster
                    return
        time.sleep(0.01)
    raise TimeoutError(f"nobody listens on port {port} after 20 s")


@pytest.fixture(scope="session")
def server_program() -> str:
    """Return the server's program, or say loudly that there is none."""
    if SERVER is None:
        if "CI" in os.environ:
            pytest.fail("no valkey-server or redis-server: install the Debian package")
        pytest.skip("NO SERVER: install valkey-server (or redis-server) to test shared limits")
    return SERVER


@pytest.fixture
def start_server(server_program: str, tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Start servers with the given options, and stop all of them at the end."""
    running: list[RunningServer] = []
    assert server_program

    def start(*options: str, tls: bool = False) -> RunningServer:
        folder = tmp_path / f"server-{len(running)}"
        folder.mkdir()
        running.append(RunningServer(folder, *options, tls=tls))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture(scope="session")
def shared_server(
    server_program: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    assert server_program
    with RunningServer(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer than 0.2 s for replies, as the machine may be busy."""
    monkeypatch.setattr("asyncbucket.stores.redis.RedisLedger.patience", 5.0)


class Fault:
    """A store that can break and come back."""

    def __init__(self, url: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self.url = url
        self.begin = begin
        self.end = end


@pytest.fixture(params=["freeze", "kill", "lock"])
def fault(
    request: pytest.FixtureRequest, path: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fault]:
    """Return a server that freezes or is killed, or a file whose lock is held, with users' patience."""
    assert patient is None
    monkeypatch.setattr("asyncbucket.stores.redis.RedisLedger.patience", 0.2)
    if request.param == "lock":
        with contextlib.closing(
            sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        ) as holder:
            yield Fault(
                f"sqlite:///{path}",
                lambda: holder.execute("BEGIN IMMEDIATE"),
                lambda: holder.execute("ROLLBACK"),
            )
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
def start() -> Iterator[Callable[[str, str], "subprocess.Popen[str]"]]:
    """Run scripts in interpreters of their own, with an argument each, and kill them at the end."""
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
async def redis(shared_server: RunningServer) -> AsyncIterator[Any]:
    client = Redis.from_url(shared_server.url, decode_responses=True)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def store(shared_server: RunningServer, redis: Any) -> AsyncIterator[RedisStore]:
    assert await redis.dbsize() == 0
    store = open_store(shared_server.url)
    assert isinstance(store, RedisStore)
    yield store
    await store.aclose()
    await asyncio.sleep(0)


@pytest.fixture
def redis_sync(shared_server: RunningServer) -> Iterator[Any]:
    client = SyncRedis.from_url(shared_server.url, decode_responses=True)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def url(shared_server: RunningServer, redis_sync: Any) -> str:
    assert redis_sync.dbsize() == 0
    return shared_server.url


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "limits.db"


@pytest.fixture
def server_clock(redis_sync: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the time (ns) that the script reads for the limiter ``oracle``."""
    ours, text = "redis.call('TIME')", script.source()
    assert ours in text
    text = text.replace(ours, "redis.call('HMGET', KEYS[1] .. ':test', 's', 'us')")
    monkeypatch.setattr(script, "source", lambda: text)
    monkeypatch.setattr(script, "digest", lambda: "0" * 40)

    def set_to(instant: int) -> None:
        seconds, rest = divmod(instant // 1_000, 1_000_000)
        redis_sync.hset("asyncbucket:{oracle}:state:test", mapping={"s": seconds, "us": rest})

    return set_to


class Proxy:
    """A proxy between a client and a server that can break the connection at any byte."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        #: How many more bytes of answers pass before the connection breaks; None for all.
        self.left: int | None = None
        #: How many connections break.
        self.cuts = 1
        self.broken = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self, left: int, *, times: int = 1) -> None:
        self.left, self.cuts, self.broken = left, times, 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self._open |= {writer, back}
        forth = asyncio.create_task(self._forward(reader, back))
        try:
            while data := await there.read(65_536):
                left = self.left if self.broken < self.cuts else None
                if left is not None:
                    data, self.left = data[:left], max(0, left - len(data))
                writer.write(data)
                await writer.drain()
                if left is not None and self.left == 0:
                    self.broken += 1
                    self.left = 1
                    break
        except OSError:
            pass
        finally:
            forth.cancel()
            await asyncio.gather(forth, return_exceptions=True)
            for each in (writer, back):
                each.close()
            await asyncio.gather(writer.wait_closed(), back.wait_closed(), return_exceptions=True)
            self._open -= {writer, back}
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            back.write(data)
            await back.drain()
        back.write_eof()


@pytest.fixture
async def proxy(shared_server: RunningServer, redis: Any) -> AsyncIterator[Proxy]:
    """Return a proxy before the shared server, which is empty at first."""
    assert await redis.dbsize() == 0
    async with Proxy(shared_server.port) as proxy:
        yield proxy
