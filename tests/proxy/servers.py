"""A proxy before a provider: real servers on loopback, on the test's own loop."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx

from asyncbucket.proxy.options import read_options
from asyncbucket.proxy.serving import Serving, _Server


async def until(is_so: Callable[[], object]) -> None:
    """Wait until something is so; servers have no events that tell."""
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - there is nothing to await
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def served(app: Any, *listeners: socket.socket) -> AsyncGenerator[str]:
    """Serve an application, and cut off what is open at the end."""
    listeners = listeners or (socket.create_server(("127.0.0.1", 0)),)
    server = _Server(app)
    task = asyncio.create_task(server.serve(list(listeners)))
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listeners[0].getsockname()[1]}"
    finally:
        for each in server.servers:
            each.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks)
        task.cancel()
        await asyncio.wait([task])


class Proxied:
    """A proxy that serves, and a client whose base URL it is."""

    def __init__(self, serving: Serving, client: httpx.AsyncClient) -> None:
        self.serving = serving
        self.limiter = serving.limiter
        self.client = client
        self.url = str(client.base_url)
        self.status_url = f"http://{serving.status_address}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a bare connection to the proxy."""
        url = self.client.base_url
        return await asyncio.open_connection(url.host, url.port)

    async def until(self, **wanted: int) -> None:
        """Wait until the limiter's statistics are like that."""
        await until(
            lambda: all(
                getattr(self.limiter.statistics(), name) == number
                for name, number in wanted.items()
            )
        )


@contextlib.asynccontextmanager
async def proxied(upstream: str | None, *limits: str, **given: Any) -> AsyncGenerator[Proxied]:
    """Serve a proxy before ``upstream``; ``given`` are options, and arguments of its limiter."""
    given |= {"upstream": upstream, "listen": "0", "status": "127.0.0.1:0"}
    serving = Serving(read_options(limits=limits, **given))
    async with (
        served(serving, *serving._sockets) as url,
        httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client,
    ):
        yield Proxied(serving, client)
        await serving._proxy.aclose()
        await serving.limiter.aclose()
