"""How many calls a rate-limited provider refuses, paced by this and that.

The bundled provider runs in a process of its own and enforces its limits exactly; its minute lasts
a few seconds, so that a run of several minutes' worth of calls is short. Each way of pacing drives
LlamaIndex's own OpenAI class through the same calls, at most 50 in flight; retries are off, so
that a refusal is seen. Two providers: one is a token bucket that holds a minute's worth, which is
kind to limiters of that kind, and one counts every sliding minute.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import aiolimiter
import httpx
from llama_index.core.llms import ChatMessage
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.llms.openai import OpenAI

import asyncbucket
from asyncbucket.testing import ProviderProcess

_MINUTE = 10.0
_RPM = 300
_TPM = 60_000
_CONCURRENCY = 50
_MAX_TOKENS = 100

Chat: TypeAlias = Callable[[str], Coroutine[Any, Any, object]]
Way: TypeAlias = Callable[[str, httpx.AsyncClient], Chat]
Policy: TypeAlias = Literal["token_bucket", "sliding_window"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the calls of one way."""

    way: str
    policy: Policy
    calls: int
    answered: int
    #: Calls answered with 429.
    refused: int
    seconds: float


def _model(base_url: str, client: httpx.AsyncClient, **options: Any) -> OpenAI:
    return OpenAI(
        model="gpt-4o-mini",
        api_base=base_url,
        api_key="none",
        async_http_client=client,
        max_retries=0,
        max_tokens=_MAX_TOKENS,
        timeout=120,
        **options,
    )


def _chat(llm: OpenAI, *gates: AbstractAsyncContextManager[Any]) -> Chat:
    async def chat(text: str) -> object:
        async with AsyncExitStack() as stack:
            for gate in gates:
                await stack.enter_async_context(gate)
            return await llm.achat([ChatMessage(content=text)])

    return chat


def _unpaced(base_url: str, client: httpx.AsyncClient) -> Chat:
    return _chat(_model(base_url, client), asyncio.Semaphore(_CONCURRENCY))


def _llama_index(base_url: str, client: httpx.AsyncClient) -> Chat:
    minutes = 60 / _MINUTE
    limiter = TokenBucketRateLimiter(
        requests_per_minute=_RPM * minutes, tokens_per_minute=_TPM * minutes
    )
    return _chat(_model(base_url, client, rate_limiter=limiter), asyncio.Semaphore(_CONCURRENCY))


def _aiolimiter(base_url: str, client: httpx.AsyncClient) -> Chat:
    limiter = aiolimiter.AsyncLimiter(_RPM, _MINUTE)
    return _chat(_model(base_url, client), asyncio.Semaphore(_CONCURRENCY), limiter)


def _asyncbucket(base_url: str, client: httpx.AsyncClient) -> Chat:
    requests = asyncbucket.Limit("requests", _RPM, per=_MINUTE)
    tokens = asyncbucket.Limit("tokens", _TPM, per=_MINUTE)
    limiter = asyncbucket.Limiter(requests, tokens, concurrency=_CONCURRENCY)
    return _chat(limiter.wrap(_model(base_url, client), retry=False))


_WAYS: dict[str, Way] = {
    "a semaphore": _unpaced,
    "LlamaIndex's own and a semaphore": _llama_index,
    "aiolimiter and a semaphore": _aiolimiter,
    "asyncbucket": _asyncbucket,
}


def refusals(*, calls: int, policies: tuple[Policy, ...]) -> list[Outcome]:
    """Send ``calls`` chats at once through each way of pacing; return what became of them."""
    outcomes: list[Outcome] = []
    for policy in policies:
        for name, way in _WAYS.items():
            sys.stderr.write(f"\r\x1b[K  {calls} calls to a {policy} paced by {name}")
            outcomes.append(asyncio.run(_drive(name, way, policy, calls)))
    sys.stderr.write("\r\x1b[K")
    return outcomes


async def _drive(name: str, way: Way, policy: Policy, calls: int) -> Outcome:
    with ProviderProcess(
        rpm=_RPM, tpm=_TPM, minute=_MINUTE, policy=policy, latency=(0.1, 0.5)
    ) as provider:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
            chat = way(provider.base_url, client)
            start = time.monotonic()
            replies = await asyncio.gather(
                *(chat(f"Tell me about number {n}.") for n in range(calls)), return_exceptions=True
            )
            seconds = time.monotonic() - start
        refused = provider.statistics().refused
    answered = sum(not isinstance(reply, BaseException) for reply in replies)
    return Outcome(name, policy, calls, answered, refused, seconds)
