"""Only one layer retries, a booking is dated when its request is sent, and clients fit their loop.

What undoes pacing is switched off for each call, or warned of with the remedy.
"""

import asyncio
import functools
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI
from pydantic import PrivateAttr

from asyncbucket import Limiter, pace
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from asyncbucket.waiting import PerLoopTransport
from tests.llama_index.conftest import (
    API_BASE,
    KEY,
    MESSAGES,
    FakeAPI,
    Reader,
    admitted,
    charged,
    make_anthropic,
    make_azure,
    make_like,
    make_openai,
    make_responses,
)

if TYPE_CHECKING:
    from asyncbucket.engine.lease import Lease
    from asyncbucket.testing.pytest_plugin import ProviderFactory


def make_users_client(**options: Any) -> OpenAI:
    return make_openai(async_openai_client=AsyncOpenAI(api_key="k", base_url=API_BASE), **options)


def make_users_http_client(**options: Any) -> OpenAI:
    return make_openai(async_http_client=httpx.AsyncClient(), **options)


def make_used_client(**options: Any) -> OpenAI:
    llm = make_openai(**options)
    llm._get_aclient()
    return llm


class LazyEmbedding(OpenAIEmbedding):  # type: ignore[misc]  # untyped where it isn't installed
    """Make a client with the SDK's retries when it is needed, as AzureOpenAIEmbedding does."""

    def _get_aclient(self) -> Any:
        private: Any = self.__pydantic_private__
        if private["_aclient"] is None:
            private["_aclient"] = AsyncOpenAI(api_key="k", base_url=API_BASE)
        return private["_aclient"]


@pytest.mark.parametrize(
    "make",
    [
        *(make_openai, make_responses, make_azure, make_anthropic),
        functools.partial(LazyEmbedding, api_key="k"),
        *(make_users_client, make_users_http_client, make_used_client),
        functools.partial(make_openai, reuse_client=False),
    ],
)
def test_refused_call_obeys_retry(make: Any, api: FakeAPI, virtual_time: VirtualTime) -> None:
    api.refuse(429, times=200)
    limiter = Limiter("1000 RPM", clock=virtual_time.clock)
    inner = make(max_retries=3)
    for retry, requests in ((None, 5), (False, 6)):
        model = limiter.wrap(inner, retry=retry)
        is_llm = isinstance(model, LLM)
        call = model.achat(MESSAGES) if is_llm else model.aget_text_embedding_batch(["one", "two"])
        with pytest.raises(Exception, match="scripted") as raised:
            virtual_time.run(call)
        assert len(api.requests) == admitted(limiter) == requests
        assert retry is False or "asyncbucket: tried 5 times" in raised.value.__notes__[0]


async def test_booking_is_dated_when_its_request_is_made_and_again_when_the_body_leaves(
    rate_limited_provider: "ProviderFactory", monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    dated: list[Lease] = []
    monkeypatch.setattr("asyncbucket.llama_index.pacing.sent", dated.append)
    options = {"default_headers": {"connection": "close"}}  # nobody closes the client
    llm = make_openai(api_base=rate_limited_provider().base_url, **options)
    llm = Limiter("1000 RPM").wrap(llm)
    await reader.call(llm, "chat", MESSAGES)
    assert len(dated) == 2


def test_lost_reply_costs_but_no_lost_connection(api: FakeAPI, virtual_time: VirtualTime) -> None:
    errors = httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.ReadError("lost")
    api.script = list(errors)
    limiter = Limiter("2 RPM burst 2", clock=virtual_time.clock)
    virtual_time.run(limiter.wrap(make_openai()).achat(MESSAGES))
    assert len(api.requests) == 4
    assert charged(limiter) == [2]


async def test_model_hears_what_the_provider_says_is_left_and_learns_how_it_counts(
    rate_limited_provider: "ProviderFactory", reader: Reader
) -> None:
    provider = rate_limited_provider(rpm=600, tpm=100_000)
    limiter = Limiter("600 RPM", "100k TPM")
    options = {"default_headers": {"connection": "close"}}  # nobody closes the client
    plain = make_openai(api_base=provider.base_url, **options)
    for _ in range(40):
        await plain.achat(MESSAGES)
    llm = limiter.wrap(plain)
    for _ in range(8):
        await reader.call(llm, "chat", MESSAGES)
    requests, _ = limiter.statistics().limits
    assert requests.belief is not None
    assert (requests.belief.kind, requests.belief.size) == ("bucket", 600)
    assert requests.available < 600 - 8  # others' calls count


@pytest.mark.parametrize(("learn", "at_once"), [(True, 10), (False, 60)])
async def test_first_calls_are_few(virtual_time: VirtualTime, *, learn: bool, at_once: int) -> None:
    limiter = Limiter("600 RPM", clock=virtual_time.clock)
    provider = RateLimitedProvider(latency=1.0, clock=virtual_time.clock)
    client = httpx.AsyncClient(transport=provider.mock_transport())
    llm = limiter.wrap(make_openai(async_http_client=client), learn=learn)
    calls = [asyncio.ensure_future(llm.achat(MESSAGES)) for _ in range(100)]
    await asyncio.sleep(0.05)
    assert admitted(limiter) == at_once
    await asyncio.gather(*calls)


async def test_model_keeps_the_strict_window_if_it_is_not_to_learn(
    rate_limited_provider: "ProviderFactory", reader: Reader
) -> None:
    limiter = Limiter("600 RPM")
    options = {"default_headers": {"connection": "close"}}  # nobody closes the client
    plain = make_openai(api_base=rate_limited_provider(rpm=600).base_url, **options)
    llm = limiter.wrap(plain, learn=False)
    for _ in range(8):
        await reader.call(llm, "chat", MESSAGES)
    assert limiter.statistics().limits[0].belief is None


@pytest.mark.parametrize(("host", "counted"), [("api.groq.com", 26), ("llm.test", 90)])
async def test_cached_tokens_count_as_at_provider(api: FakeAPI, host: str, counted: int) -> None:
    usage: dict[str, Any] = {"prompt_tokens": 90, "completion_tokens": 7, "total_tokens": 97}
    usage |= {"prompt_tokens_details": {"cached_tokens": 64}}
    choices = [{"message": {"role": "assistant", "content": "hi"}}]
    api.script = [httpx.Response(200, json={"choices": choices, "usage": usage})]
    limiter = Limiter("100k ITPM")
    await limiter.wrap(make_like(api_base=f"https://{host}/v1")).achat(MESSAGES)
    assert charged(limiter) == [counted]


# A connection that is still open when its loop ends is closed by the collector, which says so.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("kind", ["own client", "own client, made before", "user's client"])
def test_call_is_sent_once_on_each_of_several_event_loops(
    rate_limited_provider: "ProviderFactory", kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider = rate_limited_provider()
    limiter = Limiter("60k RPM")
    options: dict[str, Any] = {"api_key": "k", "api_base": provider.base_url}
    if kind == "user's client":
        options["async_openai_client"] = AsyncOpenAI(api_key="k", base_url=provider.base_url)
    model = OpenAI(**options)
    if kind == "own client, made before":
        model._get_aclient()
    llm = limiter.wrap(model, retry=False)

    async def ask() -> None:
        await asyncio.gather(llm.achat(MESSAGES), llm.achat(MESSAGES))
        assert [chunk async for chunk in await llm.astream_chat(MESSAGES)]

    for _ in range(3):
        asyncio.run(ask())
    asyncio.run(llm._get_aclient().close())
    gc.collect()
    assert admitted(limiter) == provider.statistics().requests == 9
    assert not caplog.records


@pytest.mark.usefixtures("api")
async def test_first_request_needs_no_thread_while_all_threads_wait_for_its_slot() -> None:
    limiter = Limiter(concurrency=1)
    llm = limiter.wrap(make_openai())
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        async with limiter.acquire():
            calls = [asyncio.ensure_future(llm.achat(MESSAGES))]
            await asyncio.sleep(0)  # it is the first in line
            calls.append(asyncio.ensure_future(asyncio.to_thread(llm.chat, MESSAGES)))
            while limiter.statistics().waiting < 2:  # noqa: ASYNC110 - nothing tells when it waits
                await asyncio.sleep(0.001)
        done, _ = await asyncio.wait(calls, timeout=5)
        calls[0].cancel()  # or the thread would wait for ever
        await asyncio.wait(calls)
    assert len(done) == 2


def test_rewrapping_keeps_one_transport(limiter: Limiter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    llm = make_used_client()
    for _ in range(2):
        limiter.wrap(llm)
    client: Any = llm._aclient
    transports = [client._client._transport, *client._client._mounts.values()]
    assert [type(each) for each in transports] == [PerLoopTransport] * 2
    assert not any(isinstance(each._first, PerLoopTransport) for each in transports)


def test_clients_given_by_the_user_are_not_touched() -> None:
    theirs = httpx.AsyncClient()
    transport = theirs._transport
    llm = Limiter("1000 RPM").wrap(make_openai(async_http_client=theirs))
    assert llm._get_aclient()._client is theirs
    assert theirs._transport is transport
    late = llm._aclient = AsyncOpenAI(api_key="k", max_retries=2)
    assert llm._get_aclient() is llm._get_aclient()
    assert llm._get_aclient().max_retries == 0
    assert (type(late), late.max_retries) == (AsyncOpenAI, 2)


WAYS: list[Callable[[OpenAI], object]] = [
    Limiter("100 RPM").wrap,
    lambda model: Limiter("100 RPM").wrap([model]),
    lambda model: pace(model, rpm=100),
]


@pytest.mark.parametrize("put_behind", WAYS)
def test_native_rate_limiter_warns_the_caller(put_behind: Callable[[OpenAI], object]) -> None:
    inner = OpenAI(api_key=KEY, rate_limiter=TokenBucketRateLimiter(requests_per_minute=10))
    with pytest.warns(UserWarning, match="OpenAI has a rate_limiter of its own") as caught:
        put_behind(inner)
    assert caught[0].filename == __file__


def integration(module: str, base: type[Any], **names: Any) -> Any:
    return type("Model", (base,), {"__module__": f"llama_index.{module}.base", **names})


class Recording(MockLLM):
    """A model that notes what it is called with, and calls nothing."""

    def chat(self, *_: Any, **kwargs: Any) -> Any:
        return kwargs


@pytest.mark.parametrize(
    ("module", "options"),
    [("litellm", {"num_retries": 0}), ("cohere", {"request_options": {"max_retries": 0}})],
)
def test_sdk_beneath_a_model_is_asked_not_to_retry(module: str, options: dict[str, Any]) -> None:
    llm = Limiter("100 RPM").wrap(integration(f"llms.{module}", Recording)())
    assert llm.chat([], seed=7) == {"seed": 7, **options}
    assert llm.chat([], **dict.fromkeys(options, 1)) == dict.fromkeys(options, 1)


def test_retries_of_a_google_embedding_model_read_zero_and_stay_a_field() -> None:
    fields = {"retries": 3, "__annotations__": {"retries": int}}
    inner = integration("embeddings.google_genai", MockEmbedding, **fields)(embed_dim=2)
    paced = Limiter("100 RPM").wrap(inner)
    assert (paced.retries, inner.retries, paced.to_dict()) == (0, 3, inner.to_dict())


class Bedrock(MockEmbedding):
    """A model on a client of botocore, which retries four times if nothing else is said."""

    _client: Any = PrivateAttr()

    def __init__(self, **retries: Any) -> None:
        super().__init__(embed_dim=2)
        self._client = type("Client", (), {"__module__": "botocore.client"})()
        self._client.meta = SimpleNamespace(config=SimpleNamespace(retries=retries))


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        ("embeddings.cohere", r"pass httpx_client=limiter.http_client\(sync=True\) and"),
        ("embeddings.litellm", "set DEFAULT_MAX_RETRIES=0 in the environment"),
        ("embeddings.together", r"use OpenAILikeEmbedding\(api_base="),
        (Bedrock, r"make it with botocore_config=Config\(retries="),
    ],
)
def test_retries_that_stay_on_are_warned_of(limiter: Limiter, make: Any, remedy: str) -> None:
    model = integration(make, MockEmbedding)(embed_dim=2) if isinstance(make, str) else make()
    with pytest.warns(UserWarning, match=f"tries failed requests again by itself, .*{remedy}"):
        limiter.wrap(model)
    limiter.wrap(model, retry=False)
    limiter.wrap(Bedrock(total_max_attempts=1))
