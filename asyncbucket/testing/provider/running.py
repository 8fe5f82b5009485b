"""The provider at work: in a thread of this process, or in a process of its own."""

import asyncio
import contextlib
import importlib
import pickle
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias, get_args

import uvicorn

from asyncbucket.http_server import configured, listen
from asyncbucket.testing.provider.app import Api, StreamBrokenError
from asyncbucket.testing.provider.enforcer import Enforcer
from asyncbucket.testing.provider.options import Arrival, Failure, Options, ProviderStatistics
from asyncbucket.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

Family: TypeAlias = Literal["httpx", "httpx2"]

_HOST: Final = "127.0.0.1"
_STARTING: Final = 60.0
"""Seconds that a server gets to start; a thread's own error is on standard error."""
_STOPPING: Final = 10.0
"""Seconds that a process gets to end."""
_SERVE: Final = f"from {__name__} import serve_parent; serve_parent()"


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
        arrivals: list[Arrival] = self._ask("arrivals")
        return arrivals

    def statistics(self) -> ProviderStatistics:
        """Take a snapshot of what was seen since the start."""
        statistics: ProviderStatistics = self._ask("statistics")
        return statistics

    def reconfigure(self, **changes: Any) -> None:
        """Change limits, latency and the like; what was used stays used.

        Raises:
            ValueError: For a value out of range, or an option that is fixed at the start.
            TypeError: There is no such option.
        """
        self._ask("reconfigure", changes)
        for name, value in changes.items():
            setattr(self, name, value)

    def fail_next(self, count: int = 1, **failure: Any) -> None:
        """Let the next `count` calls fail, after those scripted before; 0 forgets all of them.

        Args:
            count: How many calls.
            failure: `status`, `code`, `retry_after` and `after_chunks`, as `Failure` has them.
        """
        self._ask("fail_next", count, Failure(**failure))

    @abstractmethod
    def start(self) -> None:
        """Start, and return when it answers. Done by entering the context; takes a moment."""

    @abstractmethod
    def stop(self) -> None:
        """Stop, and return when nothing is left. Done by leaving the context. Idempotent."""

    @abstractmethod
    def _ask(self, command: str, *arguments: Any) -> Any:
        """Call a method of the `Enforcer`."""

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
        server = _ProviderServer(self.app, self.port)
        server.start()
        self._server = server
        self._url = f"http://{_HOST}:{server.port}"

    def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            server.stop()

    def _ask(self, command: str, *arguments: Any) -> Any:
        return getattr(self.enforcer, command)(*arguments)


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
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self._last_statistics = ProviderStatistics()

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        if self._process is not None:
            raise RuntimeError(f"the provider runs already, at {self.url}")
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # the parent handles Ctrl-C, and ends this process
        )
        try:
            self._url = self._ask("start", self.given())
        except BaseException:
            self._end(self._process)
            raise

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(RuntimeError):  # it may be dead already
                self._last_statistics = self._ask("statistics")
            self._end(self._process)

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = None
        try:
            process.communicate(timeout=_STOPPING)  # closes its standard input, upon which it ends
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def _ask(self, command: str, *arguments: Any) -> Any:
        process = self._process
        if process is None and command == "statistics":
            return self._last_statistics
        if process is None:
            raise RuntimeError("the provider isn't running: enter it with `with` or `async with`")
        assert process.stdin is not None
        assert process.stdout is not None
        with self._lock:
            try:
                pickle.dump((command, arguments), process.stdin)
                process.stdin.flush()
                answer, error = pickle.load(process.stdout)  # noqa: S301 - our own child
            except (OSError, EOFError, pickle.UnpicklingError) as exc:
                raise RuntimeError(
                    f"the provider's process doesn't answer (its exit status: {process.poll()})"
                ) from exc
        if error is not None:
            raise error
        return answer


def serve_parent() -> None:
    """Be the process of a `ProviderProcess`: obey its commands until it closes standard input."""
    commands, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever is printed, it is no answer
    # Ctrl-C goes to all processes of a terminal; the parent says when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    provider = RateLimitedProvider()

    def start(options: dict[str, Any]) -> str:
        nonlocal provider
        provider = RateLimitedProvider(**options)
        provider.start()
        return provider.url

    with contextlib.suppress(EOFError):
        while True:
            command, arguments = pickle.load(commands)  # noqa: S301 - our own parent
            obey = start if command == "start" else getattr(provider.enforcer, command)
            answer: tuple[Any, Exception | None]
            try:
                answer = obey(*arguments), None
            except (OSError, TypeError, ValueError) as exc:
                answer = None, exc
            pickle.dump(answer, answers)
            answers.flush()
    provider.stop()


class _ProviderServer(uvicorn.Server):
    """uvicorn in a thread with a loop of its own; it is stopped by an event, and at once."""

    def __init__(self, app: "ASGIApp", port: int) -> None:
        super().__init__(configured(app))
        self._socket = listen(_HOST, port)
        self.port: int = self._socket.getsockname()[1]
        #: Resolved with what stops the server, once it answers.
        self._ready: Future[Callable[[], object]] = Future()
        self._thread = threading.Thread(
            target=asyncio.run,
            args=(self.serve([self._socket]),),
            name=f"asyncbucket-provider:{self.port}",
            daemon=True,
        )

    def start(self) -> None:
        """Start the thread and return when the server answers."""
        self._thread.start()
        self._ready.result(_STARTING)

    def stop(self) -> None:
        """Cut off what is left, and return when thread and socket are gone."""
        self._ready.result()()
        self._thread.join()
        self._socket.close()

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
        # off, they see their client gone, and end. asyncio would leave a connection open that it
        # has accepted, but not yet served, when its server closes: so those get there first.
        connections, loop = self.server_state.connections, asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # Windows, where none comes late
            loop.remove_reader(self._socket)
        while connections or len(asyncio.all_tasks()) > 1:
            for connection in tuple(connections):
                connection.transport.abort()
            await asyncio.sleep(0.001)
        for server in self.servers:
            server.close()
