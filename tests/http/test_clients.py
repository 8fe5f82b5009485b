"""A paced client is like the one that an SDK would make, with a limiter underneath."""

import sys
from types import SimpleNamespace
from typing import Any

import httpx
import httpx2
import openai
import pytest

from asyncbucket import Limiter
from asyncbucket.http import clients
from asyncbucket.http.transport import family_of


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
async def test_http_client_defaults_match_those_of_the_sdks(limiter: Limiter, sdk: str) -> None:
    theirs: Any = pytest.importorskip(sdk).DefaultAsyncHttpxClient()
    family: Any = family_of(type(theirs))
    async with limiter.http_client(family=family) as ours, theirs:
        pool, their_pool = ours._transport.inner._pool, theirs._transport._pool
        assert pool._max_connections == their_pool._max_connections
        assert pool._max_keepalive_connections == their_pool._max_keepalive_connections
        assert ours.follow_redirects == theirs.follow_redirects
        assert ours.timeout.as_dict() == theirs.timeout.as_dict()


def test_sync_true_makes_synchronous_client(library: Any, limiter: Limiter) -> None:
    with limiter.http_client(family=library.__name__, sync=True, timeout=3) as client:
        assert type(client) is library.Client
        assert client.timeout == library.Timeout(3)
        assert type(client._transport.inner) is library.HTTPTransport


async def test_environment_proxy_transports_are_paced(
    library: Any, limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "local.test")
    async with limiter.http_client(family=library.__name__) as client:
        request = library.URL("https://api.openai.com/")
        paced = client._transport_for_url(request)
        assert paced is not client._transport
        assert paced.limiter is limiter
        assert type(paced.inner) is library.AsyncHTTPTransport
        direct = client._transport_for_url(library.URL("https://local.test/"))
        assert direct is client._transport


def test_missing_http_library_error_says_what_to_install(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match="httpx2 is not installed: pip install httpx2"):
        limiter.http_client(family="httpx2")
    with pytest.raises(ValueError, match="family must be auto, httpx or httpx2, not 'requests'"):
        limiter.http_client(family="requests")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    monkeypatch.setattr(clients, "_SDKS", ())
    with pytest.raises(ImportError, match="no HTTP client is installed: pip install httpx"):
        limiter.http_client()


@pytest.mark.parametrize(
    ("installed", "imported", "taken"),
    [
        ("httpx httpx2", "openai", "httpx"),
        ("httpx httpx2", "sdk2", "httpx2"),
        ("httpx httpx2", "", "httpx"),
        ("httpx2", "", "httpx2"),
        ("httpx httpx2", "openai sdk2", None),
    ],
)
def test_auto_family_is_that_of_the_imported_sdk_or_the_first_installed(
    limiter: Limiter,
    monkeypatch: pytest.MonkeyPatch,
    installed: str,
    imported: str,
    taken: str | None,
) -> None:
    sdk2 = SimpleNamespace(DefaultHttpxClient=type("Client", (httpx2.Client,), {}))
    monkeypatch.setattr(clients, "_SDKS", ("openai", "sdk2"))
    monkeypatch.setattr("importlib.util.find_spec", dict.fromkeys(installed.split(), 1).get)
    for name, module in (("openai", openai), ("sdk2", sdk2)):
        monkeypatch.setitem(sys.modules, name, module if name in imported.split() else None)
    if taken is None:
        with pytest.raises(ValueError, match=r"pass family='httpx' .openai before 3"):
            limiter.http_client()
    else:
        with limiter.http_client(sync=True) as client:
            assert isinstance(client, {"httpx": httpx, "httpx2": httpx2}[taken].Client)
