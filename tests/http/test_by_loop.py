"""One paced client serves several event loops: each has connections of its own."""

import asyncio
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from asyncbucket import Limiter
from tests.http.conftest import answering

if TYPE_CHECKING:
    from asyncbucket.testing.pytest_plugin import ProviderFactory

URL = "https://llm.test/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
KEY = {"authorization": "Bearer k"}


def with_transport(limiter: Limiter, library: Any) -> Any:
    return library.AsyncClient(transport=limiter.transport())


def made_by_limiter(limiter: Limiter, library: Any) -> Any:
    return limiter.http_client(family=library.__name__)


async def ask(client: Any, url: str) -> None:
    replies = await asyncio.gather(
        *(client.post(f"{url}/chat/completions", json=BODY, headers=KEY) for _ in range(2))
    )
    assert [reply.status_code for reply in replies] == [200, 200]


@pytest.mark.parametrize("make", [with_transport, made_by_limiter])
def test_each_of_several_event_loops_has_connections_that_close_with_it(
    rate_limited_provider: "ProviderFactory",
    library: Any,
    limiter: Limiter,
    make: Callable[[Limiter, Any], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    provider = rate_limited_provider()
    client = make(limiter, library)

    async def pool() -> Any:
        await ask(client, provider.base_url)
        return client._transport.inner._pool

    for _ in range(3):
        assert asyncio.run(pool()).connections == []
    asyncio.run(client.aclose())
    gc.collect()
    assert provider.statistics().requests == limiter.statistics().admitted == 6
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_each_loop_has_a_transport_with_the_same_options(library: Any, limiter: Limiter) -> None:
    limits = library.Limits(max_connections=7)
    client = limiter.http_client(family=library.__name__, limits=limits, proxy="http://[::1]:9")

    async def pool() -> Any:
        paced = client._transport_for_url(library.URL(URL))
        assert paced.inner is paced.inner
        return paced.inner._pool

    first, second = asyncio.run(pool()), asyncio.run(pool())
    assert first is not second
    assert first._max_connections == second._max_connections == 7
    assert first._proxy_url == second._proxy_url


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
            asyncio.run(client.get(URL))
    assert limiter.statistics().admitted == 12
