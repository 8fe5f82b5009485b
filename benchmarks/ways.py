"""Ways to pace calls of a language model: each peer as its own documentation shows it.

Each function is given a `Place`, and yields what sends one chat and returns its reply, or raises. A
peer is told what the key allows if it takes that; what goes beyond its documentation's example is
said where it is set. All use OpenAI's SDK, with its retries unless the peer retries by itself;
LlamaIndex and LiteLLM bring clients of their own. Peers are loaded where they are used, so that
those that are missing can be left out.
"""

import asyncio
import importlib
import os
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeAlias

import httpx
from llama_index.core.llms import ChatMessage
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI

import asyncbucket

RPM: Final = 120
TPM: Final = 12_000
CONCURRENCY: Final = 50
MODEL: Final = "gpt-4o-mini"
MAX_TOKENS: Final = 40
#: What a call costs in tokens at most: its prompt and `MAX_TOKENS`.
TOKENS: Final = MAX_TOKENS + 10
#: How long (s) a run may take: twice what the limit makes of 400 calls.
PATIENCE: Final = 420.0

Chat: TypeAlias = Callable[[str], Coroutine[Any, Any, object]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the calls go, and whose processor time counts."""

    url: str
    processes: list[int] = field(default_factory=lambda: [os.getpid()])

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"{self.url}/v1"


def _client(base_url: str, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=base_url, api_key="none", **options)


def _request(text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": MAX_TOKENS}


async def _ask(client: AsyncOpenAI, text: str) -> Any:
    return await client.chat.completions.create(**_request(text))


@asynccontextmanager
async def _nothing(place: Place) -> AsyncGenerator[Chat]:
    async with _client(place.base_url) as client:
        yield partial(_ask, client)


@asynccontextmanager
async def _asyncbucket(place: Place) -> AsyncGenerator[Chat]:
    limiter = asyncbucket.Limiter(f"{RPM} RPM", f"{TPM} TPM", concurrency=CONCURRENCY)
    http_client = limiter.http_client()
    async with _client(place.base_url, http_client=http_client, max_retries=0) as client:
        yield partial(_ask, client)


@asynccontextmanager
async def _llama_index(place: Place) -> AsyncGenerator[Chat]:
    limiter = TokenBucketRateLimiter(requests_per_minute=RPM, tokens_per_minute=TPM)
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as client:
        llm = OpenAI(
            model=MODEL,
            api_base=place.base_url,
            api_key="none",
            async_http_client=client,
            max_tokens=MAX_TOKENS,
            rate_limiter=limiter,
        )
        yield lambda text: llm.achat([ChatMessage(content=text)])


@asynccontextmanager
async def _aiolimiter(place: Place) -> AsyncGenerator[Chat]:
    slots = asyncio.Semaphore(CONCURRENCY)
    limiter = importlib.import_module("aiolimiter").AsyncLimiter(RPM, 60)

    async def chat(text: str) -> object:
        async with slots, limiter:
            return await _ask(client, text)

    async with _client(place.base_url) as client:
        yield chat


@asynccontextmanager
async def _pyrate_limiter(place: Place) -> AsyncGenerator[Chat]:
    peer: Any = importlib.import_module("pyrate_limiter")
    slots = asyncio.Semaphore(CONCURRENCY)
    limiter = peer.Limiter(peer.Rate(RPM, peer.Duration.MINUTE))

    async def chat(text: str) -> object:
        async with slots:
            await limiter.try_acquire_async("openai")
            return await _ask(client, text)

    async with _client(place.base_url) as client:
        yield chat


@asynccontextmanager
async def _token_throttle(place: Place) -> AsyncGenerator[Chat]:
    """Follow the memory quickstart; its counter of tokens would load tables from the network."""
    peer: Any = importlib.import_module("token_throttle")
    slots = asyncio.Semaphore(CONCURRENCY)
    quotas = [
        peer.Quota(metric="requests", limit=RPM, per_seconds=60),
        peer.Quota(metric="tokens", limit=TPM, per_seconds=60),
    ]
    config = peer.PerModelConfig(quotas=peer.UsageQuotas(quotas))

    async def chat(text: str) -> object:
        usage = {"requests": 1, "tokens": TOKENS}
        async with slots, limiter.reserve(usage, model=MODEL) as handle:
            reply = await _ask(client, text)
            handle.set_actual_usage({"requests": 1, "tokens": reply.usage.total_tokens})
            return reply

    async with (
        peer.RateLimiter(config, backend=peer.MemoryBackendBuilder()) as limiter,
        _client(place.base_url) as client,
    ):
        yield chat


@asynccontextmanager
async def _async_batch_llm(place: Place) -> AsyncGenerator[Chat]:
    """Follow "Token-aware admission", with the cooldown of the guide's example of a rate limit."""
    peer: Any = importlib.import_module("async_batch_llm")
    classifiers: Any = importlib.import_module("async_batch_llm.classifiers")

    async def invoke(prompt: str, **_: object) -> object:
        reply = await _ask(client, prompt)
        usage = {
            "input_tokens": reply.usage.prompt_tokens,
            "output_tokens": reply.usage.completion_tokens,
            "total_tokens": reply.usage.total_tokens,
        }
        return peer.CallOutcome(reply.choices[0].message.content, token_usage=usage)

    async def chat(text: str) -> object:
        return await pool.submit(text)  # raises what an item failed with

    config = peer.ProcessorConfig(
        concurrency=CONCURRENCY,
        max_requests_per_minute=RPM,
        max_tokens_per_minute=TPM,
        token_estimator=peer.CharacterTokenEstimator(expected_output_tokens=MAX_TOKENS),
        rate_limit=peer.RateLimitConfig(cooldown_seconds=60.0),
    )
    strategy = peer.CallableStrategy(invoke, error_classifier=classifiers.OpenAIErrorClassifier())
    async with (
        _client(place.base_url, max_retries=0) as client,
        peer.LLMCallPool(strategy, config=config) as pool,
    ):
        yield chat


def _litellm(place: Place, **options: Any) -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices
    # `max_parallel_requests` is left out: calls above it would not wait, but fail.
    peer: Any = importlib.import_module("litellm")
    peer.suppress_debug_info = True
    deployment = {
        "model": f"openai/{MODEL}",
        "api_base": place.base_url,
        "api_key": "none",
        "rpm": RPM,
        "tpm": TPM,
    }
    model = {"model_name": MODEL, "litellm_params": deployment}
    by_usage = "usage-based-routing-v2"  # it leaves a deployment alone that has reached its limit
    return peer.Router(model_list=[model], routing_strategy=by_usage, num_retries=3, **options)


@asynccontextmanager
async def _litellm_router(place: Place) -> AsyncGenerator[Chat]:
    router = _litellm(place)
    yield lambda text: router.acompletion(**_request(text))


@asynccontextmanager
async def _litellm_scheduler(place: Place) -> AsyncGenerator[Chat]:
    router = _litellm(place, timeout=PATIENCE, polling_interval=0.03)
    yield lambda text: router.acompletion(priority=0, **_request(text))


@asynccontextmanager
async def _hivemind(place: Place) -> AsyncGenerator[Chat]:
    importlib.import_module("hivemind")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, "-m", "hivemind", "--log-level", "ERROR", "proxy")
    with tempfile.TemporaryDirectory() as folder:
        options = ("--port", str(port), "--upstream", place.url, "--db", f"{folder}/hivemind.db")
        proxy = await asyncio.create_subprocess_exec(
            *command, *options, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            await _answers(f"http://127.0.0.1:{port}/_health")
            place.processes.append(proxy.pid)
            async with _client(f"http://127.0.0.1:{port}/v1") as client:
                yield partial(_ask, client)
        finally:
            proxy.terminate()
            await proxy.wait()


async def _answers(url: str) -> None:
    async with httpx.AsyncClient() as client:
        for _ in range(300):
            try:
                (await client.get(url)).raise_for_status()
            except httpx.ConnectError:
                await asyncio.sleep(0.1)
            else:
                return
    raise TimeoutError(f"nothing answers at {url}")


@dataclass(frozen=True, slots=True)
class Way:
    """One way of pacing."""

    name: str
    start: Callable[[Place], AbstractAsyncContextManager[Chat]]
    distribution: str

    @property
    def installed(self) -> bool:
        """Whether it can be measured here."""
        try:
            return bool(version(self.distribution))
        except PackageNotFoundError:
            return False


WAYS: Final = (
    Way("nothing, the SDK alone", _nothing, "openai"),
    Way("LlamaIndex's rate_limiter", _llama_index, "llama-index-core"),
    Way("aiolimiter, semaphore", _aiolimiter, "aiolimiter"),
    Way("pyrate-limiter, semaphore", _pyrate_limiter, "pyrate-limiter"),
    Way("token-throttle, semaphore", _token_throttle, "token-throttle"),
    Way("async-batch-llm", _async_batch_llm, "async-batch-llm"),
    Way("LiteLLM's router", _litellm_router, "litellm"),
    Way("LiteLLM's scheduler", _litellm_scheduler, "litellm"),
    Way("HiveMind, a proxy", _hivemind, "hivemind-scheduler"),
    Way("asyncbucket", _asyncbucket, "asyncbucket"),
)
