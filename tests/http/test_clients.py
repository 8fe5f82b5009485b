"""A paced client is like the one that an SDK would make, with a limiter underneath."""

import sys
from typing import Any

import httpx
import openai
import pytest

from asyncbucket import Limiter
from asyncbucket.by_loop import PerLoopTransport
from asyncbucket.http import clients


def inner_of(client: Any) -> Any:
    """Return the transport that a paced client sends with, on this loop."""
    inner = client._transport.inner
    return inner.current() if isinstance(inner, PerLoopTransport) else inner


async def test_http_client_has_sdk_defaults(library: Any, limiter: Limiter) -> None:
    """Pool, timeouts and redirects are those of the SDK's own client."""
    async with limiter.http_client(family=library.__name__) as client:
        assert type(client) is library.AsyncClient
        assert client.timeout == library.Timeout(timeout=600, connect=5.0)
        assert client.follow_redirects
        assert inner_of(client)._pool._max_connections == 1_000
        assert inner_of(client)._pool._max_keepalive_connections == 100


async def test_http_client_defaults_match_openai_sdk() -> None:
    """OpenAI's own client and ours agree, whatever the SDK's version."""
    theirs: Any = openai.DefaultAsyncHttpxClient()
    async with Limiter(concurrency=1).http_client() as ours, theirs:
        assert ours.timeout.as_dict() == theirs.timeout.as_dict()
        assert ours.follow_redirects == theirs.follow_redirects
        assert inner_of(ours)._pool._max_connections == theirs._transport._pool._max_connections


def test_sync_true_makes_synchronous_client(library: Any, limiter: Limiter) -> None:
    """`sync=True` makes a synchronous client; other options go to the client."""
    with limiter.http_client(family=library.__name__, sync=True, timeout=3) as client:
        assert type(client) is library.Client
        assert client.timeout == library.Timeout(3)
        assert type(inner_of(client)) is library.HTTPTransport


async def test_environment_proxy_transports_are_paced(
    library: Any, limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transports that the client mounts for the environment's proxies are paced, too."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "local.test")
    async with limiter.http_client(family=library.__name__) as client:
        request = library.URL("https://api.openai.com/")
        paced = client._transport_for_url(request)
        assert paced is not client._transport
        assert paced.limiter is limiter
        assert type(paced.inner.current()) is library.AsyncHTTPTransport
        direct = client._transport_for_url(library.URL("https://local.test/"))
        assert direct is client._transport


def test_unknown_family_is_refused(limiter: Limiter) -> None:
    """The error names the known ones."""
    with pytest.raises(ValueError, match="family must be auto, httpx or httpx2, not 'aiohttp'"):
        limiter.http_client(family="aiohttp")


def test_missing_http_library_error_says_what_to_install(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any HTTP library, the error says what to install."""

    def find_nothing(_: str) -> None:
        return None

    monkeypatch.setattr("importlib.util.find_spec", find_nothing)

    with pytest.raises(ImportError, match="no HTTP client is installed: pip install httpx"):
        clients.http_client(limiter)


def test_missing_family_library_error_says_what_to_install(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making a client or a transport of a missing family says what to install."""
    monkeypatch.setitem(sys.modules, "httpx2", None)

    for make in (limiter.http_client, limiter.transport, limiter.transport_sync):
        with pytest.raises(ImportError, match="httpx2 is not installed: pip install httpx2"):
            make(family="httpx2")


async def test_auto_family_prefers_httpx(limiter: Limiter) -> None:
    """If both are installed, it is httpx."""
    async with limiter.http_client() as client:
        assert type(client) is httpx.AsyncClient
