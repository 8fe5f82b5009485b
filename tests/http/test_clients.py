"""A paced client is like the one that an SDK would make, and has connections for each event loop."""

import asyncio
import gc
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import openai
import pytest

from asyncbucket import Limiter
from asyncbucket.http import clients
from asyncbucket.http.exchange import family_of
from tests.http.conftest import answering

if TYPE_CHECKING:
    from asyncbucket.testing.pytest_plugin import ProviderFactory

URL = "https://llm.test/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
KEY = {"authorization": "Bearer k"}


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


def test_environment_proxy_transports_are_paced_and_made_for_each_loop_with_the_same_options(
    library: Any, limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://[::1]:9")
    monkeypatch.setenv("NO_PROXY", "local.test")
    limits = library.Limits(max_connections=7)
    client = limiter.http_client(family=library.__name__, limits=limits)

    async def pool() -> Any:
        paced = client._transport_for_url(library.URL(URL))
        assert paced.limiter is limiter
        assert type(paced.inner) is library.AsyncHTTPTransport
        assert paced.inner is paced.inner
        return paced.inner._pool

    first, second = asyncio.run(pool()), asyncio.run(pool())
    assert first is not second
    assert first._max_connections == second._max_connections == 7
    assert first._proxy_url == second._proxy_url
    direct = client._transport_for_url(library.URL("https://local.test/"))
    assert direct is client._transport


def test_missing_library_is_named(limiter: Limiter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(
        ImportError, match=r'httpx2 is not installed: pip install "asyncbucket\[http\]" httpx2'
    ):
        limiter.http_client(family="httpx2")
    with pytest.raises(ValueError, match="family must be auto, httpx or httpx2, not 'requests'"):
        limiter.http_client(family="requests")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    monkeypatch.setattr(clients, "_SDKS", ())
    with pytest.raises(
        ImportError, match=r'no HTTP client is installed: pip install "asyncbucket\[http\]"'
    ):
        limiter.http_client()


@pytest.mark.parametrize(
    ("installed", "imported", "taken"),
    [
        ("httpx httpx2", "openai", httpx),
        ("httpx httpx2", "sdk2", httpx2),
        ("httpx httpx2", "", httpx),
        ("httpx2", "", httpx2),
        ("httpx httpx2", "openai sdk2", None),
    ],
)
def test_auto_family_is_that_of_the_imported_sdk_or_the_first_installed(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch, installed: str, imported: str, taken: Any
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
            assert isinstance(client, taken.Client)


@pytest.mark.parametrize("made_by_limiter", [False, True])
def test_each_of_several_event_loops_has_connections_that_close_with_it(
    rate_limited_provider: "ProviderFactory",
    library: Any,
    limiter: Limiter,
    caplog: pytest.LogCaptureFixture,
    *,
    made_by_limiter: bool,
) -> None:
    provider = rate_limited_provider()
    client: Any = library.AsyncClient(transport=limiter.transport())
    if made_by_limiter:
        client = limiter.http_client(family=library.__name__)

    async def pool() -> Any:
        url = f"{provider.base_url}/chat/completions"
        asked = (client.post(url, json=BODY, headers=KEY) for _ in range(2))
        assert [reply.status_code for reply in await asyncio.gather(*asked)] == [200, 200]
        return client._transport.inner._pool

    for _ in range(3):
        assert asyncio.run(pool()).connections == []
    asyncio.run(client.aclose())
    gc.collect()
    assert provider.statistics().requests == limiter.statistics().admitted == 6
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_transport_given_by_the_user_is_used_on_every_loop(library: Any, limiter: Limiter) -> None:
    class Theirs(library.MockTransport):  # type: ignore[misc]
        async def aclose(self) -> None:
            raise AssertionError

    theirs = Theirs(answering(library, b"ok"))
    options = {"family": library.__name__}
    for client in (
        library.AsyncClient(transport=limiter.transport(theirs)),
        limiter.http_client(transport=theirs, **options),
        limiter.http_client(mounts={"all://llm.test": theirs}, **options),
    ):
        for _ in range(2):
            assert asyncio.run(client.get(URL)).content == b"ok"
    assert limiter.statistics().admitted == 6
