"""Only one layer retries, a booking is dated when its request is sent, and clients fit their loop.

What undoes pacing is switched off for each call, or warned of with the remedy.
"""

import asyncio
import functools
import gc
import warnings
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import httpcore
import httpx
import openai
import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI, OpenAIResponses
from openai import AsyncOpenAI
from pydantic import PrivateAttr

from asyncbucket import Limiter, pace
from asyncbucket.core.lease import Lease
from asyncbucket.providers.profiles import OPENAI
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import (
    API_BASE,
    KEY,
    MESSAGES,
    Reader,
    ScriptedOpenAI,
    admitted,
    charged,
    in_flight,
    make_azure,
    make_like,
    make_openai,
    make_responses,
    name_of,
)

if TYPE_CHECKING:
    from asyncbucket.testing.pytest_plugin import ProviderFactory


def make_fresh_client(**options: Any) -> OpenAI:
    return make_openai(reuse_client=False, **options)


def make_users_client(**options: Any) -> OpenAI:
    retries = options.get("max_retries", 2)
    return make_openai(
        async_openai_client=AsyncOpenAI(api_key="k", base_url=API_BASE, max_retries=retries),
        openai_client=openai.OpenAI(api_key="k", base_url=API_BASE, max_retries=retries),
        **options,
    )


def make_users_http_client(**options: Any) -> OpenAI:
    return make_openai(async_http_client=httpx.AsyncClient(), http_client=httpx.Client(), **options)


def make_used_client(**options: Any) -> OpenAI:
    llm = make_openai(**options)
    llm._get_client()
    llm._get_aclient()
    return llm


MAKERS: list[Callable[..., LLM]] = [
    make_openai,
    make_fresh_client,
    make_users_client,
    make_users_http_client,
    make_used_client,
    make_responses,
    make_azure,
]


@pytest.mark.parametrize(("retry", "requests"), [(None, 5), (False, 1)])
@pytest.mark.parametrize("make", MAKERS, ids=name_of)
def test_call_refused_every_time_makes_as_many_requests_as_retry_says(
    make: Callable[..., LLM],
    openai_api: ScriptedOpenAI,
    virtual_time: VirtualTime,
    *,
    retry: bool | None,
    requests: int,
) -> None:
    openai_api.refuse(429, times=50)
    limiter = Limiter("1000 RPM", clock=virtual_time.clock)
    llm = limiter.wrap(make(max_retries=3), retry=retry)
    with pytest.raises(openai.RateLimitError, match="scripted") as raised:
        virtual_time.run(llm.achat(MESSAGES))
    assert len(openai_api.requests) == admitted(limiter) == requests
    assert retry is False or "asyncbucket: tried 5 times" in raised.value.__notes__[0]


class LazyEmbedding(OpenAIEmbedding):  # type: ignore[misc]  # untyped where it isn't installed
    """Make a client with the SDK's retries when it is needed, as AzureOpenAIEmbedding does."""

    def _get_aclient(self) -> Any:
        private: Any = self.__pydantic_private__
        if private["_aclient"] is None:
            private["_aclient"] = AsyncOpenAI(api_key="k", base_url=API_BASE)
        return private["_aclient"]


def test_client_that_a_model_makes_later_does_not_retry(
    openai_api: ScriptedOpenAI, virtual_time: VirtualTime
) -> None:
    openai_api.refuse(429, {"retry-after": "1"}, times=200)
    limiter = Limiter("1000 RPM", clock=virtual_time.clock)
    model: Any = limiter.wrap(LazyEmbedding(api_key="k"))
    with pytest.raises(openai.RateLimitError):
        virtual_time.run(model.aget_text_embedding_batch(["one", "two"]))
    assert len(openai_api.requests) == admitted(limiter) == 5
    assert limiter.statistics().upstream_429 == 5


@pytest.mark.parametrize("make", MAKERS, ids=name_of)
async def test_booking_is_dated_just_before_each_request_is_sent(
    make: Callable[..., LLM], openai_api: ScriptedOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def sent(_: Lease) -> None:
        seen.append(len(openai_api.requests))

    monkeypatch.setattr("asyncbucket.llama_index.pacing.sent", sent)
    llm = Limiter("1000 RPM").wrap(make())
    await llm.achat(MESSAGES)
    await anext(await llm.astream_chat(MESSAGES))
    await asyncio.to_thread(llm.chat, MESSAGES)
    assert seen == [0, 1, 2]


async def test_booking_is_dated_again_when_request_body_is_sent(
    monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    seen: list[str] = []

    def write(_: object, buffer: bytes, **__: Any) -> None:
        if buffer:
            seen.append("body" if buffer.startswith(b"{") else "head")

    async def write_async(_: object, buffer: bytes, **__: Any) -> None:
        write(_, buffer)

    def dated(_: Lease) -> None:
        seen.append("dated")

    monkeypatch.setattr("asyncbucket.llama_index.pacing.sent", dated)
    monkeypatch.setattr(httpcore.MockStream, "write", write)
    monkeypatch.setattr(httpcore.AsyncMockStream, "write", write_async)
    reply = b'{"choices": [{"message": {"role": "assistant", "content": "hi"}}]}'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    wire = [head % len(reply), reply]
    here, there = httpx.HTTPTransport(), httpx.AsyncHTTPTransport()
    here._pool = httpcore.ConnectionPool(network_backend=httpcore.MockBackend(wire))
    there._pool = httpcore.AsyncConnectionPool(network_backend=httpcore.AsyncMockBackend(wire))
    with httpx.Client(transport=here) as client:
        async with httpx.AsyncClient(transport=there) as async_client:
            llm = make_openai(http_client=client, async_http_client=async_client)
            llm = Limiter("1000 RPM").wrap(llm)
            await reader.call(llm.achat, llm.chat, MESSAGES)
    assert seen == ["dated", "head", "dated", "body"]


@pytest.mark.parametrize("make", [make_openai, make_users_client], ids=name_of)
def test_attempts_without_a_connection_cost_nothing(
    make: Callable[..., LLM], openai_api: ScriptedOpenAI, virtual_time: VirtualTime
) -> None:
    openai_api.script = [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow")]
    limiter = Limiter("1 RPM", "100k TPM", clock=virtual_time.clock)
    virtual_time.run(limiter.wrap(make()).achat(MESSAGES))
    assert virtual_time.now <= 3.0
    assert len(openai_api.requests) == 3
    assert charged(limiter) == [1, 18]


async def test_request_whose_reply_is_lost_stays_charged(openai_api: ScriptedOpenAI) -> None:
    openai_api.script = [httpx.ReadError("lost")]
    limiter = Limiter("1000 RPM")
    with pytest.raises(openai.APIConnectionError):
        await limiter.wrap(make_openai(), retry=False).achat(MESSAGES)
    assert charged(limiter) == [1]


async def test_model_learns_remaining_units_from_headers_of_known_provider_only(
    rate_limited_provider: "ProviderFactory", monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    provider = rate_limited_provider(rpm=60, tpm=100_000)
    limiter = Limiter("60 RPM burst 60", "100k TPM")
    async with httpx.AsyncClient() as async_client:
        with httpx.Client() as client:
            options: Any = {"http_client": client, "async_http_client": async_client}
            llm = make_openai(api_base=provider.base_url, **options)
            for _ in range(40):
                await llm.achat(MESSAGES)
            paced = limiter.wrap(llm)
            await reader.call(paced.achat, paced.chat, MESSAGES)
            assert limiter.statistics().limits[0].available == 59
            monkeypatch.setattr(
                "asyncbucket.llama_index.clients.profile_of", Mock(return_value=OPENAI)
            )
            await reader.call(paced.achat, paced.chat, MESSAGES)
    assert 14 <= limiter.statistics().limits[0].available <= 20


@pytest.mark.parametrize(("host", "counted"), [("api.groq.com", 26), ("llm.test", 90)])
async def test_cached_tokens_count_as_the_provider_counts_them(
    openai_api: ScriptedOpenAI, host: str, counted: int
) -> None:
    openai_api.usage = {"prompt_tokens": 90, "completion_tokens": 7, "total_tokens": 97}
    openai_api.usage |= {"prompt_tokens_details": {"cached_tokens": 64}}
    limiter = Limiter("100k ITPM")
    llm = limiter.wrap(make_like(api_base=f"https://{host}/v1"))
    await llm.achat(MESSAGES)
    assert charged(limiter) == [counted]
    assert [chunk async for chunk in await llm.astream_chat(MESSAGES)]
    assert charged(limiter) == [2 * counted]


@pytest.mark.parametrize(("status", "slots"), [(503, 3), (400, 4)])
async def test_overload_error_cuts_slots_and_bad_request_does_not(
    openai_api: ScriptedOpenAI, reader: Reader, status: int, slots: int
) -> None:
    for streaming in (False, True):
        openai_api.refuse(status)
        limiter = Limiter(concurrency="auto")
        llm = limiter.wrap(make_openai(), retry=False)
        with pytest.raises(openai.APIStatusError):
            await (
                reader.read(llm) if streaming else reader.call(llm.acomplete, llm.complete, "hi")
            )
        assert (limiter.concurrency, in_flight(limiter)) == (slots, 0)


async def ask(llm: LLM) -> None:
    await asyncio.gather(llm.achat(MESSAGES), llm.achat(MESSAGES))


async def read(llm: LLM) -> None:
    assert [chunk async for chunk in await llm.astream_chat(MESSAGES)]


async def embed(model: OpenAIEmbedding) -> None:
    await model.aget_text_embedding_batch(["one", "two"])


async def hang_up(llm: Any) -> None:
    client = llm._aclient if isinstance(llm, OpenAIResponses) else llm._get_aclient()
    await client.close()


# A connection that is still open when its loop ends is closed by the collector, which says so.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("call", [ask, read, embed])
@pytest.mark.parametrize("kind", ["own client", "own client, made before", "user's client"])
def test_call_is_sent_once_on_each_of_several_event_loops(
    rate_limited_provider: "ProviderFactory",
    call: Callable[[Any], Coroutine[Any, Any, None]],
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    provider = rate_limited_provider()
    limiter = Limiter("60k RPM")
    cls: Any = OpenAIEmbedding if call is embed else OpenAI
    options: dict[str, Any] = {"api_key": "k", "api_base": provider.base_url}
    if kind == "user's client":
        options["async_openai_client"] = AsyncOpenAI(api_key="k", base_url=provider.base_url)
    model = cls(**options)
    if kind == "own client, made before":
        model._get_aclient()
    llm = limiter.wrap(model, retry=False)
    for _ in range(3):
        asyncio.run(call(llm))
    asyncio.run(hang_up(llm))
    gc.collect()
    assert provider.statistics().requests == (6 if call is ask else 3)
    assert admitted(limiter) == provider.statistics().requests
    assert not caplog.records


@pytest.mark.usefixtures("openai_api")
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


@pytest.mark.usefixtures("openai_api")
def test_client_given_by_the_user_is_kept_on_every_loop() -> None:
    theirs = AsyncOpenAI(api_key="k", base_url=API_BASE)
    for make in (
        make_users_http_client,
        functools.partial(make_openai, async_openai_client=theirs),
    ):
        llm = Limiter("1000 RPM").wrap(make())
        asyncio.run(ask(llm))
        ours = llm._get_aclient()
        asyncio.run(ask(llm))
        assert llm._get_aclient() is ours
    assert not theirs.is_closed()


def test_native_rate_limiter_warning_points_to_callers_line() -> None:
    native = TokenBucketRateLimiter(requests_per_minute=10)
    inner = OpenAI(api_key=KEY, rate_limiter=native)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Limiter("100 RPM").wrap([inner])
        pace(inner, rpm=5)
    said = "OpenAI has a rate_limiter of its own"
    assert [str(each.message).partition(":")[0] for each in seen] == [said] * 2
    assert [each.filename for each in seen] == [__file__] * 2


async def test_retries_that_wrap_switches_off_cause_no_warning() -> None:
    limiter = Limiter("100 RPM")
    async with AsyncOpenAI(api_key=KEY, max_retries=9) as client:
        limiter.wrap(OpenAI(api_key=KEY, max_retries=9, async_openai_client=client))
        limiter.wrap(OpenAIEmbedding(api_key=KEY, max_retries=9))


def integration(module: str, base: type[Any], **names: Any) -> Any:
    return type("Model", (base,), {"__module__": f"llama_index.{module}.base", **names})


class Recording(MockLLM):
    """A model that notes what it is called with, and calls nothing."""

    additional_kwargs: dict[str, Any] | None = None

    def chat(self, *_: Any, **kwargs: Any) -> Any:
        return kwargs


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("llms.litellm", {"num_retries": 0}),
        ("llms.cohere", {"request_options": {"max_retries": 0}}),
        ("llms.openai", {}),
    ],
)
def test_sdk_beneath_a_model_is_asked_not_to_retry(module: str, options: dict[str, Any]) -> None:
    llm = Limiter("100 RPM").wrap(integration(module, Recording)())
    assert llm.chat([], seed=7) == {"seed": 7, **options}
    assert llm.chat([], **dict.fromkeys(options, 1)) == dict.fromkeys(options, 1)
    llm.additional_kwargs = dict.fromkeys(options, 2)
    assert llm.chat([]) == {}


def test_retries_of_a_google_embedding_model_read_zero_and_stay_a_field() -> None:
    base = integration(
        "embeddings.google_genai", MockEmbedding, retries=3, __annotations__={"retries": int}
    )
    inner = base(embed_dim=2)
    paced = Limiter("100 RPM").wrap(inner)
    assert (paced.retries, inner.retries) == (0, 3)
    assert paced.to_dict() == inner.to_dict()


class Botocore:
    """A client of botocore, which retries four times if nothing else is said."""

    def __init__(self, **retries: Any) -> None:
        self.meta = SimpleNamespace(config=SimpleNamespace(retries=retries))


Botocore.__module__ = "botocore.client"


class Bedrock(MockEmbedding):
    """A model on such a client."""

    _client: Any = PrivateAttr()

    def __init__(self, **retries: Any) -> None:
        super().__init__(embed_dim=2)
        self._client = Botocore(**retries)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        ("embeddings.cohere", r"pass httpx_client=limiter.http_client\(sync=True\) and"),
        ("embeddings.litellm", "set DEFAULT_MAX_RETRIES=0 in the environment"),
        ("embeddings.together", r"use OpenAILikeEmbedding\(api_base="),
        (Bedrock, r"make it with botocore_config=Config\(retries="),
        (lambda: Bedrock(max_attempts=10), r"make it with botocore_config=Config\(retries="),
    ],
)
def test_retries_that_nobody_can_switch_off_are_warned_of(make: Any, remedy: str) -> None:
    limiter = Limiter("100 RPM")
    model = integration(make, MockEmbedding)(embed_dim=2) if isinstance(make, str) else make()
    with pytest.warns(UserWarning, match=f"tries failed requests again by itself, .*{remedy}"):
        limiter.wrap(model)
    limiter.wrap(model, retry=False)
    limiter.wrap(Bedrock(total_max_attempts=1))
