"""Run an ASGI application with uvicorn in a thread of its own, from start to clean end."""

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import uvicorn
from starlette.types import ASGIApp

T = TypeVar("T")

HOST = "127.0.0.1"

BACKLOG = 4096
"""Thousands of agents may connect in one instant."""

KEEP_ALIVE = 600
"""Seconds. Longer than any client's own expiry, so no request meets a closing connection."""


class ThreadedServer:
    """uvicorn in a thread, listening on loopback.

    Its loop is its own, so a busy event loop on the client's side delays replies only as far as the
    interpreter's lock does. `start` and `stop` block for a moment; `in_thread` awaits them.

    Args:
        app: What to serve.
        port: 0 takes a free one.
    """

    def __init__(self, app: ASGIApp, *, port: int = 0) -> None:
        self._socket = _listen(port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            access_log=False,
            backlog=BACKLOG,
            date_header=False,
            lifespan="off",
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            ws="none",
        )
        self._server = _Server(config, self._set_ready)
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"asyncbucket-provider:{self.port}", daemon=True
        )

    def start(self) -> None:
        """Start the thread and return when the server answers."""
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self.stop()
            raise RuntimeError("the provider's server did not start") from self._error

    def stop(self) -> None:
        """Cut off what is left, and return when thread and sockets are gone. Idempotent."""
        self._server.request_stop()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            # Not `uvicorn.Server.run`, which until 0.36 sets the event loop policy of the process.
            with asyncio.Runner() as runner:
                runner.run(self._server.serve([self._socket]))
        except BaseException as exc:  # noqa: BLE001 - handed over to the thread that waits
            self._error = exc
        finally:
            self._ready.set()

    def _set_ready(self) -> None:
        self._ready.set()


def _listen(port: int) -> socket.socket:
    # `socket.create_server` leaves the protocol at 0, and asyncio sets TCP_NODELAY only for TCP:
    # each reply would wait 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise OSError(exc.errno, f"cannot listen on {HOST}:{port}: {exc.strerror}") from exc
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server, stopped by an event instead of checking every 0.1 s whether it should stop."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    def request_stop(self) -> None:
        """Let `main_loop` return; from any thread, even long after it has returned."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._on_ready()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._stop.wait()

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
        for server in self.servers:
            await server.wait_closed()


async def in_thread(work: Callable[[], T]) -> T:
    """Await a blocking `work` in a thread that is gone afterwards, unlike an executor's.

    A cancelled caller still waits for the end of `work`, which starts or stops something: half of
    it would be a leak.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001 - handed over to the task that waits
            loop.call_soon_threadsafe(_resolve, done, None, exc)
        else:
            loop.call_soon_threadsafe(_resolve, done, result, None)

    thread = threading.Thread(target=run, name="asyncbucket-provider-start-stop")
    thread.start()
    try:
        outcome: T = await done
    finally:
        thread.join()
    return outcome


def _resolve(done: "asyncio.Future[T]", result: T, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
