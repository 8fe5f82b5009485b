"""Tool calls of an MCP session wait their turn; tests with the real package are among the frameworks'."""

from typing import Any

import pytest

from asyncbucket import Limiter


class Session:
    """Look like the package's own."""

    async def call_tool(self, name: str) -> str:
        return f"called {name}"


Session.__module__ = "mcp.client.session"


async def test_tool_calls_count_at_the_child_of_the_tools_name() -> None:
    limiter = Limiter("10 RPM", concurrency=2)
    search = limiter.child("search", concurrency=1)
    session: Any = limiter.wrap(Session())
    called = [await session.call_tool(name) for name in ("search", "add")]
    assert called == ["called search", "called add"]
    assert (limiter.statistics().admitted, search.statistics().admitted) == (2, 1)
    assert isinstance(session, Session)
    assert limiter.wrap(session) is session
    with pytest.raises(ValueError, match=r"is paced by .* already: wrap what it was made of"):
        Limiter("5 RPM").wrap(session)
    with pytest.raises(TypeError, match="retry= is for LlamaIndex's models and agents, not for"):
        limiter.wrap(Session(), retry=3)
