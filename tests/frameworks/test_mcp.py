"""MCP: a session's tool calls are paced by its server's limiter and by the tool's."""

import ast
import asyncio
import contextlib
import importlib
import inspect
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limiter, pace
from asyncbucket.testing import VirtualTime

mcp: Any = pytest.importorskip("mcp")

# What the tests of other frameworks left open is collected at last when these begin.
pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")

#: What mcp 1 has for a server.
FIRST = ("mcp.server.fastmcp", "FastMCP")
with_client = pytest.mark.skipif(not hasattr(mcp, "Client"), reason="mcp 1 has no Client")


def make_server() -> Any:
    """Return a server with two tools, one of which takes a second."""
    name = ("mcp.server", "MCPServer") if hasattr(mcp, "Client") else FIRST
    server = getattr(importlib.import_module(name[0]), name[1])("weather")

    async def forecast(city: str) -> str:
        await asyncio.sleep(1)
        return f"Sun in {city}."

    async def alerts(city: str) -> str:
        return f"None for {city}."

    server.add_tool(forecast)
    server.add_tool(alerts)
    return server


@pytest.fixture
def weather(virtual_time: VirtualTime) -> Limiter:
    """Limit the server, and one of its tools."""
    limiter = Limiter("600 RPM burst 600", concurrency=3, name="weather", clock=virtual_time.clock)
    limiter.child("forecast", concurrency=2)
    return limiter


@contextlib.asynccontextmanager
async def connected() -> AsyncGenerator[Any]:
    """Connect a session to a server in this process."""
    server = make_server()
    if hasattr(mcp, "Client"):
        async with mcp.Client(server) as client:
            yield client.session
    else:
        memory = importlib.import_module("mcp.shared.memory")
        async with memory.create_connected_server_and_client_session(server) as session:
            yield session


async def test_tools_are_paced_by_name(weather: Limiter, virtual_time: VirtualTime) -> None:
    forecast = weather.children["forecast"]
    async with connected() as inner:
        session = weather.wrap(inner)
        assert isinstance(session, mcp.ClientSession)
        calls = [session.call_tool("forecast", {"city": "Rome"}) for _ in range(5)]
        calls.append(session.call_tool(name="alerts", arguments={"city": "Rome"}))
        replies = await asyncio.gather(*calls)
        texts = {reply.content[0].text for reply in replies}
        assert texts == {"Sun in Rome.", "None for Rome."}
        assert len((await session.list_tools()).tools) == 2
        _ = await inner.call_tool("alerts", {"city": "Rome"})  # stays unpaced
    assert virtual_time.now == 3.0  # two at once
    assert (forecast.statistics().admitted, weather.statistics().admitted) == (5, 6)
    assert weather.statistics().in_flight == 0


async def test_ended_tools_free_slots(weather: Limiter, virtual_time: VirtualTime) -> None:
    async with connected() as inner:
        session = weather.wrap(inner)
        asks = (session.call_tool("forecast", {"city": "Rome"}) for _ in range(4))
        calls = [asyncio.ensure_future(ask) for ask in asks]
        await asyncio.sleep(0.5)
        assert weather.statistics().in_flight == 2
        for call in calls:
            call.cancel()
        _ = await asyncio.gather(*calls, return_exceptions=True)
        assert weather.statistics().in_flight == weather.statistics().waiting == 0
        assert (await session.call_tool("forecast", {})).content  # an error, told in a reply
    assert (weather.statistics().in_flight, virtual_time.now) == (0, 0.5)


@with_client
async def test_client_is_wrapped_before_or_after_it_connects(weather: Limiter) -> None:
    async with weather.wrap(mcp.Client(make_server())) as client:
        _ = await client.call_tool("alerts", {"city": "Rome"})
    async with mcp.Client(make_server()) as client:
        _ = await weather.wrap(client).call_tool("alerts", {"city": "Rome"})
    assert weather.statistics().admitted == 2


async def test_session_waits_in_one_line_only(weather: Limiter) -> None:
    async with connected() as inner:
        session = weather.wrap(inner)
        assert weather.wrap(session) is session
        with pytest.raises(ValueError, match=r"is paced by .*'weather'.* already"):
            _ = pace(session, rpm=60)
        with pytest.raises(TypeError, match=r"^retry= is for LlamaIndex's models and agents"):
            weather.wrap(inner, retry=3)


@with_client
async def test_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text("utf-8")
    blocks = r"^## MCP\n.*?^```python\n(.*?)^```\s+^```text\n(.*?)^```"
    source, printed = re.findall(blocks, page, re.MULTILINE | re.DOTALL)[0]
    code = compile(source, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    awaiting: Any = eval(code, {"Limiter": Limiter, "__name__": "page"})  # noqa: S307 - our own
    assert inspect.iscoroutine(awaiting)
    await awaiting

    assert capsys.readouterr().out == printed
