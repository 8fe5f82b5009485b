"""What the limiter refuses reaches the caller of an SDK as what it is, at once."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from asyncbucket import (
    AcquireTimeout,
    AsyncBucketError,
    BudgetExceeded,
    CostExceedsLimit,
    Limiter,
    QueueFull,
    UnknownPrice,
    budget,
)
from asyncbucket.http.exchange import family_of, library_named
from tests.http.conftest import Server

CALL: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Why?"}],
    "max_tokens": 50,
}


@contextlib.contextmanager
def full(**terms: Any) -> Generator[Limiter]:
    limiter = Limiter(concurrency=1, **terms)
    with limiter.acquire_nowait():
        yield limiter


@contextlib.contextmanager
def broke() -> Generator[Limiter]:
    with budget(requests=0):
        yield Limiter("10 RPM")


REFUSALS: dict[type[AsyncBucketError], Callable[[], contextlib.AbstractContextManager[Limiter]]] = {
    AcquireTimeout: lambda: full(timeout=0),
    QueueFull: lambda: full(max_queue=0),
    BudgetExceeded: broke,
    CostExceedsLimit: lambda: contextlib.nullcontext(Limiter("9 TPM")),
    UnknownPrice: lambda: contextlib.nullcontext(Limiter("25 USD/day")),
}


def create_of(
    sdk: str, limiter: Limiter, server: Any, *, retries: int = 1, **hooks: Any
) -> Callable[..., Any]:
    """Return what calls a model by an SDK with its own retries, whose requests come to ``server``."""
    module: Any = openai if sdk.endswith("OpenAI") else anthropic
    library = library_named(family_of(module.DefaultHttpxClient) or "")
    make = library.AsyncClient if sdk.startswith("Async") else library.Client
    transport = limiter.transport(library.MockTransport(server), retries=0)
    client = getattr(module, sdk)(
        api_key="k", max_retries=retries, http_client=make(transport=transport, event_hooks=hooks)
    )
    create: Callable[..., Any] = (
        client.messages if module is anthropic else client.chat.completions
    ).create
    return create


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sdk", ["AsyncOpenAI", "AsyncAnthropic", "OpenAI", "Anthropic"])
async def test_refusal_is_raised_as_what_it_is_and_not_tried_again(
    sdk: str, kind: type[AsyncBucketError], *, stream: bool
) -> None:
    server = Server()
    with REFUSALS[kind]() as limiter:
        with pytest.raises(kind):
            await create_of(sdk, limiter, server)(**CALL, stream=stream)
        assert limiter.statistics().refused == (kind is not UnknownPrice)
    assert server.requests == []


async def test_transport_above_another_gets_the_refusal_itself(library: Any) -> None:
    """It would take a reply for the provider's."""
    with full(timeout=0) as busy:
        outer, inner = Limiter(name="outer"), busy.transport(library.MockTransport(Server()))
        async with library.AsyncClient(transport=outer.transport(inner)) as client:
            for headers in ({}, {"x-stainless-lang": "python"}):
                with pytest.raises(AcquireTimeout):
                    _ = (await client.get("https://api.openai.com", headers=headers)).is_success
    assert outer.statistics().upstream_429 == 0


@pytest.mark.parametrize("sdk", ["AsyncOpenAI", "AsyncAnthropic"])
async def test_error_of_an_sdk_shows_the_callers_own_request(sdk: str) -> None:
    seen: list[Any] = []

    def refuse(_: Any) -> Any:
        raise httpx.ConnectError("refused")

    async def see(request: Any) -> None:
        seen.append(request)

    with pytest.raises((openai.APIConnectionError, anthropic.APIConnectionError)) as caught:
        await create_of(sdk, Limiter(), refuse, retries=0, request=[see])(**CALL)
    error: Any = caught.value
    assert error.request is error.__cause__.request is seen[-1]
