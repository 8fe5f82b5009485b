"""How many calls a rate-limited provider refuses, paced by this and that.

The bundled provider runs in a process of its own and enforces its limits exactly; its minute lasts
a few seconds, so that a run of several minutes' worth of calls is short. Each way of pacing drives
LlamaIndex's own OpenAI class through the same calls, at most 50 in flight; retries are off, so
that a refusal is seen. Four providers: one is a token bucket that holds a minute's worth, which is
kind to limiters of that kind, and one counts every sliding minute; asyncbucket also meets one that
counts the clock's minutes, and its HTTP transport one that counts in slices, a 60th of a minute.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import aiolimiter
import httpx
from llama_index.core.llms import ChatMessage
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.llms.openai import OpenAI

import asyncbucket
from asyncbucket.testing.counting import PolicyName
from benchmarks.harness import progress, served_provider

_MINUTE = 10.0
_RPM = 300
_TPM = 60_000
_CONCURRENCY = 50
_MAX_TOKENS = 100

Chat: TypeAlias = Callable[[str], Coroutine[Any, Any, object]]
Way: TypeAlias = Callable[[str, httpx.AsyncBaseTransport], Chat]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of the calls through one way of pacing."""

    way: str
    policy: PolicyName
    calls: int
    answered: int
    #: Calls answered with 429.
    refused: int
    seconds: float


def _model(base_url: str, inner: httpx.AsyncBaseTransport, **options: Any) -> OpenAI:
    return OpenAI(
        model="gpt-4o-mini",
        api_base=base_url,
        api_key="none",
        async_http_client=httpx.AsyncClient(transport=inner, timeout=120),
        max_retries=0,
        max_tokens=_MAX_TOKENS,
        timeout=120,
        **options,
    )


def chat_through(llm: OpenAI, *gates: AbstractAsyncContextManager[Any]) -> Chat:
    """Return a function that asks ``llm`` something once all ``gates`` have let it pass."""

    async def chat(text: str) -> object:
        async with AsyncExitStack() as stack:
            for gate in gates:
                await stack.enter_async_context(gate)
            return await llm.achat([ChatMessage(content=text)])

    return chat


def _unpaced(base_url: str, inner: httpx.AsyncBaseTransport) -> Chat:
    return chat_through(_model(base_url, inner), asyncio.Semaphore(_CONCURRENCY))


def _llama_index(base_url: str, inner: httpx.AsyncBaseTransport) -> Chat:
    minutes = 60 / _MINUTE
    limiter = TokenBucketRateLimiter(
        requests_per_minute=_RPM * minutes, tokens_per_minute=_TPM * minutes
    )
    return chat_through(
        _model(base_url, inner, rate_limiter=limiter), asyncio.Semaphore(_CONCURRENCY)
    )


def _aiolimiter(base_url: str, inner: httpx.AsyncBaseTransport) -> Chat:
    limiter = aiolimiter.AsyncLimiter(_RPM, _MINUTE)
    return chat_through(_model(base_url, inner), asyncio.Semaphore(_CONCURRENCY), limiter)


def _limiter() -> asyncbucket.Limiter:
    requests = asyncbucket.Limit("requests", _RPM, per=_MINUTE)
    tokens = asyncbucket.Limit("tokens", _TPM, per=_MINUTE)
    return asyncbucket.Limiter(requests, tokens, concurrency=_CONCURRENCY)


def _asyncbucket(base_url: str, inner: httpx.AsyncBaseTransport) -> Chat:
    return chat_through(_limiter().wrap(_model(base_url, inner), retry=False))


def _transport(base_url: str, inner: httpx.AsyncBaseTransport) -> Chat:
    return chat_through(_model(base_url, _limiter().transport(inner)))


_WAYS: dict[str, Way] = {
    "a semaphore": _unpaced,
    "LlamaIndex's own and a semaphore": _llama_index,
    "aiolimiter and a semaphore": _aiolimiter,
    "asyncbucket, wrapped model": _asyncbucket,
    "asyncbucket, HTTP transport": _transport,
}
#: Who meets the providers that are hard on all; those who break the kinder ones need not.
_HARD: dict[PolicyName, tuple[Way, ...]] = {
    "fixed_window": (_asyncbucket, _transport),
    "one_second_slices": (_transport,),
}


def refusals(*, calls: int, policies: tuple[PolicyName, ...]) -> list[Outcome]:
    """Send ``calls`` chats at once through each way of pacing, and return the outcomes."""
    outcomes: list[Outcome] = []
    for policy in policies:
        for name, way in _WAYS.items():
            if way not in _HARD.get(policy, (way,)):
                continue
            progress(f"{calls} calls to a {policy} paced by {name}")
            outcomes.append(asyncio.run(_drive(name, way, policy, calls)))
    progress()
    return outcomes


async def _drive(name: str, way: Way, policy: PolicyName, calls: int) -> Outcome:
    with served_provider(
        rpm=_RPM, tpm=_TPM, minute=_MINUTE, policy=policy, latency=(0.1, 0.5)
    ) as provider:
        async with httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None)) as inner:
            chat = way(provider.base_url, inner)
            start = time.monotonic()
            replies = await asyncio.gather(
                *(chat(f"Tell me about number {n}.") for n in range(calls)), return_exceptions=True
            )
            seconds = time.monotonic() - start
    refused = provider.seen.refused
    answered = sum(not isinstance(reply, BaseException) for reply in replies)
    return Outcome(name, policy, calls, answered, refused, seconds)
