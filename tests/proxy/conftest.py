"""A proxy before a provider: real servers on loopback, on the test's own loop."""

import asyncio
import contextlib
import gzip
import json
import socket
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

import httpx
import pytest

from asyncbucket.cli.proxy import ProxyOptions
from asyncbucket.cli.proxy.app import Proxy, _Server
from tests.conftest import until

CHAT: dict[str, Any] = {"model": "gpt", "messages": [{"role": "user", "content": "salve"}]}
MEBIBYTE = 1_048_576


class Upstream:
    """A provider that shows what it got, with so many mebibytes more, and does what its path says."""

    def __init__(self) -> None:
        self.calls = 0
        self.url = ""
        self.targets: list[str] = []
        self.is_cut_off = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        self.targets.append((scope["raw_path"] + b"?" + scope["query_string"]).decode())
        path, size, more = scope["path"], 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        if path == "/hangs":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.is_cut_off.set()
            return
        headers = [(b"set-cookie", b"a=1"), (b"Set-Cookie", b"b=2"), (b"keep-alive", b"timeout=5")]
        headers.append((b"content-encoding", b"gzip"))
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        part = {"type": "http.response.body", "body": b"x" * 999, "more_body": True}
        if path == "/breaks":
            return
        if path == "/endless":
            watch = asyncio.ensure_future(receive())
            while not watch.done():
                await send(part)
                await asyncio.sleep(0.001)
            self.is_cut_off.set()
            return
        shown = {
            "method": scope["method"],
            "target": self.targets[-1],
            "headers": [(name.decode(), value.decode()) for name, value in scope["headers"]],
            "body": size,
        }
        content = gzip.compress(json.dumps(shown).encode())
        await send({**part, "body": content})
        if path == "/big":
            for _ in range(int(scope["query_string"])):
                await send({**part, "body": bytes(MEBIBYTE)})
        await send({**part, "body": b"", "more_body": False})


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

    def __init__(self, proxy: Proxy, client: httpx.AsyncClient) -> None:
        self.proxy = proxy
        self.limiter = proxy.limiter
        self.client = client
        self.url = str(client.base_url)
        self.status_url = f"http://{proxy.status_address}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a bare connection to the proxy."""
        url = self.client.base_url
        return await asyncio.open_connection(url.host, url.port)

    async def until(self, **wanted: int) -> None:
        """Wait until the limiter's statistics are like that."""
        await until(lambda: wanted.items() <= asdict(self.limiter.statistics()).items())


@contextlib.asynccontextmanager
async def proxied(upstream: str | None, *limits: str, **given: Any) -> AsyncGenerator[Proxied]:
    """Serve a proxy before ``upstream``; ``given`` are other options."""
    given |= {"upstream": upstream, "also": [*limits], "listen": "0", "status": "127.0.0.1:0"}
    proxy = Proxy(ProxyOptions(**given))
    async with (
        served(proxy, *proxy.sockets) as url,
        httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client,
    ):
        yield Proxied(proxy, client)
        await proxy.aclose()


@pytest.fixture
async def upstream() -> AsyncGenerator[Upstream]:
    app = Upstream()
    async with served(app) as app.url:
        yield app
