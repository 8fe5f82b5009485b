"""A rate-limited provider on loopback, for tests, demos and benchmarks.

It speaks OpenAI's `/v1/chat/completions` and `/v1/responses` (with tools, streams and response formats)
and `/v1/embeddings`, and Anthropic's `/v1/messages`. It refuses what exceeds its limits as they do:
with 429, `retry-after` and headers about what is left. Its answers are a fake model's text, the same
every time.

`RateLimitedProvider` runs in a thread, and `python -m asyncbucket.testing.provider --rpm 500` in a
process of its own. Needs `pip install "asyncbucket[testing]"`.

Beneath it, `endpoints` answers, `enforcer` counts and decides, and `replies` has the model's words.
"""

import argparse
import ast
import asyncio
import contextlib
import inspect
import json
import re
import signal
import socket
import threading
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal, Self

if not find_spec("uvicorn"):
    raise ImportError('the bundled provider needs uvicorn: pip install "asyncbucket[testing]"')

import uvicorn

from asyncbucket.http_server import configured, listen
from asyncbucket.testing.counting import Counting
from asyncbucket.testing.endpoints import Api, BrokenOffError, Reply
from asyncbucket.testing.enforcer import (
    Arrival,
    Enforcer,
    Failure,
    Options,
    ProviderStatistics,
    Rules,
)
from asyncbucket.testing.prompt_cache import Cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = [
    "Arrival",
    "Cache",
    "Counting",
    "Options",
    "ProviderStatistics",
    "RateLimitedProvider",
    "Rules",
    "main",
]

_HOST: Final = "127.0.0.1"
_FIXED: Final = ("profile", "policy", "cache", "minute")
#: What `--help` shows for an option that takes no whole number.
_METAVARS: Final = {
    "profile": "NAME",
    "policy": "NAME",
    "charge": "NAME",
    "latency": "SECONDS",
    "begins": "PART",
    "accidents": "PART",
    "always": "STATUS",
    "minute": "SECONDS",
}
_STARTING: Final = 60.0
"""Seconds that a server gets to start; a thread's own error is on standard error."""


@dataclass(kw_only=True, eq=False, repr=False)
class RateLimitedProvider(Options):
    """A provider on loopback that enforces its limits; `Options` has its keywords.

    A context manager, async or not; inside it answers at `base_url`::

        async with RateLimitedProvider(rpm=600, tpm=100_000) as provider:
            client = AsyncOpenAI(base_url=provider.base_url, api_key="any")

    It runs in a thread with an event loop of its own and shares the interpreter's lock with the
    caller; `python -m asyncbucket.testing.provider` doesn't. Its methods may be called from any
    thread, before, while and after it runs. Any API key is accepted; all keys share one budget.
    """

    enforcer: Enforcer = field(init=False)
    app: Api = field(init=False)
    """The application itself, for frameworks' test clients; see `mock_transport` too."""
    _server: "_Server | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.enforcer = Enforcer(self)
        self.app = Api(self.enforcer)

    def __setattr__(self, name: str, value: Any) -> None:
        if "app" in vars(self) and name != "_server":
            if name in _FIXED:
                raise AttributeError(f"{name} of a provider can't be changed: make another one")
            Options(**{name: value})  # what is wrong is an error here
        super().__setattr__(name, value)

    @property
    def url(self) -> str:
        """The root, such as ``http://127.0.0.1:8000``: Azure's endpoint, Anthropic's base URL."""
        if self._server is None:
            raise RuntimeError("the provider isn't running: enter it with `with` or `async with`")
        return f"http://{_HOST}:{self._server.port}"

    @property
    def base_url(self) -> str:
        """What an OpenAI client calls its base URL, such as ``http://127.0.0.1:8000/v1``."""
        return f"{self.url}/v1"

    @property
    def arrivals(self) -> list[Arrival]:
        """The latest million calls and whether they were admitted, oldest first."""
        return self.enforcer.arrivals()

    def statistics(self) -> ProviderStatistics:
        """Take a snapshot of what was seen since the start."""
        return self.enforcer.statistics()

    def fail_next(
        self,
        count: int = 1,
        *,
        status: int = 500,
        code: str | None = None,
        retry_after: float | None = None,
        after_chunks: int | None = None,
    ) -> None:
        """Let the next `count` calls fail, after those scripted before; 0 forgets all of them.

        Args:
            count: How many calls.
            status: HTTP status; 429 refuses without charging, any other is admitted, charged and
                then fails, like a call that breaks down inside a provider.
            code: The error's `code`; by default the provider's for that status. With
                `"insufficient_quota"` a 429 says that the account is empty.
            retry_after: Seconds, for `retry-after` and `retry-after-ms`; by default none is sent.
            after_chunks: Break a stream off after this many chunks, instead of answering with `status`.

        Raises:
            ValueError: A number is out of its range.
        """
        self.enforcer.fail_next(count, Failure(status, code, retry_after, after_chunks))

    def mock_transport(self, *, family: Literal["httpx", "httpx2"] = "httpx") -> Any:
        """Return a transport of async clients with which this provider answers: no server, no sockets.

        It works without being started, and with `clock=time.clock` on virtual time::

            provider = RateLimitedProvider(rpm=600, latency=1.5, clock=time.clock)
            http = httpx.AsyncClient(transport=provider.mock_transport())
            client = AsyncOpenAI(http_client=http, api_key="any")

        Args:
            family: The library whose clients take it: "httpx" or "httpx2".
        """
        library: Any = import_module(family)
        stream_of = type("ProviderStream", (_Body, library.AsyncByteStream), {})

        async def handle(request: Any) -> Any:
            sent = request.method, request.url.path, request.headers, request.content
            reply = await self.app.respond(*sent)
            body = stream_of(reply, library.RemoteProtocolError)
            return library.Response(reply.status, headers=reply.headers, stream=body)

        return library.MockTransport(handle)

    def start(self) -> None:
        """Start, and return when it answers. Done by entering the context; takes a moment."""
        if self._server is not None:
            raise RuntimeError(f"the provider is already running, at {self.url}")
        server = _Server(self.app, self.port)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Stop, and return when nothing is left. Done by leaving the context. Idempotent."""
        if self._server is not None:
            server, self._server = self._server, None
            server.stop()

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
        return f"<RateLimitedProvider {self.url if self._server else 'not running'}>"


class _Body:
    """A reply's body as a client reads it."""

    def __init__(self, reply: Reply, broken_off: type[Exception]) -> None:
        self._reply, self._broken_off = reply, broken_off

    async def __aiter__(self) -> "AsyncIterator[bytes]":
        try:
            async for chunk in self._reply.chunks:
                yield chunk
        except BrokenOffError as exc:
            raise self._broken_off("the connection is closed in a stream") from exc

    async def aclose(self) -> None:
        self._reply.leave()


class _Server(uvicorn.Server):
    """uvicorn in a thread with a loop of its own; it is stopped by an event, and at once."""

    def __init__(self, app: Api, port: int) -> None:
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


def main() -> None:
    """Serve until SIGINT or SIGTERM; print one line with the URL, and at the end the statistics."""
    parser = argparse.ArgumentParser(
        prog="python -m asyncbucket.testing.provider",
        usage="%(prog)s [--rpm N] [--tpm N] [--latency LOW,HIGH] [--port N] ...",
        description="Serve a rate-limited provider on 127.0.0.1, without a key: a fake model that "
        "speaks OpenAI's and Anthropic's API. It prints its base URL, and at Ctrl-C what it has seen.",
        epilog="example: %(prog)s --rpm 500 --tpm 200000 --latency 0.1,0.3 --port 8000",
        argument_default=argparse.SUPPRESS,
    )
    attributes = str(inspect.getdoc(Options)).partition("\n    clock:")[0]
    for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, re.MULTILINE):
        if name != "cache":  # an object of Python
            flag, metavar = f"--{name.replace('_', '-')}", _METAVARS.get(name, "N")
            says = " ".join(text.split())
            parser.add_argument(flag, type=_value, metavar=metavar, help=says)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stopped.set())
    try:
        with RateLimitedProvider(**vars(parser.parse_args())) as provider:
            print(provider.base_url, flush=True)  # noqa: T201 - a command's output
            stopped.wait()
        print(json.dumps(asdict(provider.statistics())), flush=True)  # noqa: T201
    except (OSError, OverflowError, TypeError, ValueError) as exc:
        raise SystemExit(f"error: {getattr(exc, 'strerror', None) or exc}") from exc


def _value(text: str) -> Any:
    """Read a number, a range such as (0.2, 0.6), or a name; `Options` checks it."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    main()
