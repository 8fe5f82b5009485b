"""The provider at work: in a thread of this process, or in a process of its own."""

import asyncio
import contextlib
import importlib
import json
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, get_args

import uvicorn

from asyncbucket.testing.provider.app import Api, StreamBrokenError
from asyncbucket.testing.provider.enforcer import Enforcer
from asyncbucket.testing.provider.options import Arrival, Failure, Options, ProviderStatistics
from asyncbucket.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

Family: TypeAlias = Literal["httpx", "httpx2"]

_HOST = "127.0.0.1"
_BACKLOG = 4096
"""Thousands of agents may connect in one instant."""
_KEEP_ALIVE = 600
"""Seconds. Longer than any client's own expiry, so no request meets a closing connection."""
_STOPPING = 10.0
"""Seconds that a process gets to end."""


class Provider(Options, ABC):
    """A provider as a context, async or not, and what one may ask of it while it runs."""

    _url: str = ""

    @property
    def url(self) -> str:
        """The root, such as ``http://127.0.0.1:8000``: Azure's endpoint, Anthropic's base URL."""
        if not self._url:
            raise RuntimeError("the provider isn't running: enter it with `with` or `async with`")
        return self._url

    @property
    def base_url(self) -> str:
        """What an OpenAI client calls its base URL, such as ``http://127.0.0.1:8000/v1``."""
        return f"{self.url}/v1"

    @property
    def arrivals(self) -> list[Arrival]:
        """The latest million calls and whether they were admitted, oldest first."""
        return [Arrival(*fields) for fields in self._ask("arrivals")]

    def statistics(self) -> ProviderStatistics:
        """Take a snapshot of what was seen since the start."""
        return ProviderStatistics(**self._ask("statistics"))

    def reconfigure(self, **changes: Any) -> None:
        """Change limits, latency, error rate and the like; what was used stays used.

        Raises:
            ValueError: For a value out of range, or an option that is fixed at the start.
            TypeError: There is no such option.
        """
        self._ask("reconfigure", **changes)
        for name, value in changes.items():
            setattr(self, name, value)

    def fail_next(self, count: int = 1, **failure: Any) -> None:
        """Let the next `count` calls fail, after those scripted before; 0 forgets all of them.

        Args:
            count: How many calls.
            failure: `status`, `code`, `retry_after` and `after_chunks`, as `Failure` has them.
        """
        self._ask("fail_next", count=count, **asdict(Failure(**failure)))

    @abstractmethod
    def start(self) -> None:
        """Start, and return when it answers. Done by entering the context; takes a moment."""

    @abstractmethod
    def stop(self) -> None:
        """Stop, and return when nothing is left. Done by leaving the context. Idempotent."""

    @abstractmethod
    def _ask(self, command: str, **arguments: Any) -> Any: ...

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        given = "".join(f" {name}={value}" for name, value in self.given().items())
        return f"<{type(self).__name__}{given} {self._url or 'not running'}>"


def carry_out(enforcer: Enforcer, command: str, arguments: dict[str, Any]) -> Any:
    """Do what a `Provider` was asked to do; return it in values that JSON can hold."""
    match command:
        case "arrivals":
            return enforcer.arrivals()
        case "statistics":
            return asdict(enforcer.statistics())
        case "fail_next":
            return enforcer.fail_next(arguments.pop("count"), Failure(**arguments))
        case _:
            if isinstance(arguments.get("latency"), list):
                arguments["latency"] = tuple(arguments["latency"])
            return enforcer.reconfigure(**arguments)


class RateLimitedProvider(Provider):
    """A provider on loopback that enforces its limits; `Options` has its keywords.

    A context manager, async or not; inside it answers at `base_url`::

        async with RateLimitedProvider(rpm=600, tpm=100_000) as provider:
            client = AsyncOpenAI(base_url=provider.base_url, api_key="any")

    It runs in a thread with an event loop of its own and shares the interpreter's lock with the
    caller; `ProviderProcess` doesn't. Its methods may be called from any thread, before, while and
    after it runs. Any API key is accepted; all keys share one budget.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.enforcer = Enforcer(self)
        self.app = Api(self.enforcer)
        """The application itself, for frameworks' test clients; see `mock_transport` too."""
        self._server: _ProviderServer | None = None

    def mock_transport(self, *, family: Family = "httpx", sync: bool = False) -> Any:
        """Return a transport with which this provider answers: no server, no sockets.

        It works without being started, and with `clock=time.clock` on virtual time::

            provider = RateLimitedProvider(rpm=600, latency=1.5, clock=time.clock)
            http = httpx.AsyncClient(transport=provider.mock_transport())
            client = AsyncOpenAI(http_client=http, api_key="any")

        A reply comes whole, a stream too, when all of its latency has passed.

        Args:
            family: The library whose clients take it: "httpx" or "httpx2".
            sync: For ``Client`` instead of ``AsyncClient``.

        Raises:
            ImportError: The library isn't installed.
            ValueError: ``family`` is neither of the two.
        """
        if family not in get_args(Family):
            raise ValueError(f"family must be httpx or httpx2, not {family!r}")
        try:
            library = importlib.import_module(family)
        except ModuleNotFoundError as exc:
            raise ImportError(f"{family} isn't installed: pip install {family}") from exc

        async def app(scope: "Scope", receive: "Receive", send: "Send") -> None:
            try:
                await self.app.serve(scope, receive, send)
            except StreamBrokenError as exc:
                raise library.RemoteProtocolError("the connection is closed in a stream") from exc

        transport = library.ASGITransport(app)

        async def answer(request: Any) -> Any:
            reply = await transport.handle_async_request(request)
            content = await reply.aread()
            return library.Response(reply.status_code, headers=reply.headers, content=content)

        def answer_sync(request: Any) -> Any:
            with ThreadPoolExecutor(1) as thread:  # a loop may be running in this one
                return thread.submit(asyncio.run, answer(request)).result()

        return library.MockTransport(answer_sync) if sync else transport

    def start(self) -> None:
        if self._server is not None:
            raise RuntimeError(f"the provider runs already, at {self.url}")
        self._server = _ProviderServer(self.app, self.port)
        try:
            self._server.start()
        except BaseException:
            self._server = None
            raise
        self._url = f"http://{_HOST}:{self._server.port}"

    def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            server.stop()

    def _ask(self, command: str, **arguments: Any) -> Any:
        return carry_out(self.enforcer, command, arguments)


class ProviderProcess(Provider):
    """`RateLimitedProvider` in a process: no shared interpreter lock, for demos and benchmarks.

    After the end `statistics()` returns the last values; `arrivals` must be read before. The
    process ends with its parent, however that ends. Times in `arrivals` are comparable with
    `time.monotonic_ns()` here if that clock is the machine's, as on Linux and macOS.

    Raises:
        ValueError: Also for a `clock` or a callable `latency`, which can't leave this process.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if "clock" in self.given() or callable(self.latency):
            raise ValueError("a clock or a callable latency can't be sent to another process")
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()
        self._last_statistics = asdict(ProviderStatistics())

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        if self._process is not None:
            raise RuntimeError(f"the provider runs already, at {self.url}")
        options = [
            f"--{name.replace('_', '-')}={':'.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in self.given().items()
        ]
        self._process = process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
            [sys.executable, "-m", "asyncbucket.testing.provider", "--commands", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # the parent handles Ctrl-C, and ends this process
        )
        assert process.stdout is not None
        self._url = process.stdout.readline().strip().removesuffix("/v1")
        if not self._url:
            status = process.wait()
            self.stop()
            raise RuntimeError(f"the provider's process ended with status {status} at its start")

    def stop(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(RuntimeError):  # it may be dead already
            self._last_statistics = self._ask("statistics")
        process, self._process = self._process, None
        try:
            process.communicate(timeout=_STOPPING)  # closes its standard input, upon which it ends
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def _ask(self, command: str, **arguments: Any) -> Any:
        """Send a command as a line of JSON, and read the answer from another."""
        process = self._process
        if process is None and command == "statistics":
            return self._last_statistics
        if process is None:
            raise RuntimeError("the provider isn't running: enter it with `with` or `async with`")
        assert process.stdin is not None
        assert process.stdout is not None
        with self._lock:
            try:
                process.stdin.write(json.dumps([command, arguments]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
        if not line:
            raise RuntimeError(
                f"the provider's process doesn't answer (its exit status: {process.poll()})"
            )
        answer, error = json.loads(line)
        if error is not None:
            raise (TypeError if error[0] == "TypeError" else ValueError)(error[1])
        return answer


class _ProviderServer(uvicorn.Server):
    """uvicorn in a thread with a loop of its own; it is stopped by an event, and at once."""

    def __init__(self, app: "ASGIApp", port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                backlog=_BACKLOG,
                date_header=False,
                lifespan="off",
                log_config=None,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                ws="none",
            )
        )
        self._socket = _listen(port)
        self.port: int = self._socket.getsockname()[1]
        #: Resolved with what stops the server, once it answers.
        self._ready: Future[Callable[[], object]] = Future()
        self._thread = threading.Thread(
            target=self._run, name=f"asyncbucket-provider:{self.port}", daemon=True
        )

    def start(self) -> None:
        """Start the thread and return when the server answers."""
        self._thread.start()
        try:
            self._ready.result()
        except Exception as exc:
            self._socket.close()
            raise RuntimeError("the provider's server did not start") from exc

    def stop(self) -> None:
        """Cut off what is left, and return when thread and socket are gone."""
        self._ready.result()()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            asyncio.run(self.serve([self._socket]))
        except BaseException as exc:  # noqa: BLE001 - handed over to the thread that waits
            if not self._ready.done():
                self._ready.set_exception(exc)

    async def main_loop(self) -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._ready.set_result(lambda: loop.call_soon_threadsafe(stopped.set))
        await stopped.wait()

    async def shutdown(
        self,
        sockets: list[socket.socket] | None = None,  # noqa: ARG002 - the parent's signature
    ) -> None:
        # Not the parent's, which waits for calls in flight to the end of their latency. Once cut
        # off, they see their client gone, and end.
        for server in self.servers:
            server.close()
        for connection in self.server_state.connections:
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks)


def _listen(port: int) -> socket.socket:
    # `socket.create_server` leaves the protocol at 0, and asyncio sets TCP_NODELAY only for TCP:
    # each reply would wait 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise OSError(exc.errno, f"cannot listen on {_HOST}:{port}: {exc.strerror}") from exc
    return listener
