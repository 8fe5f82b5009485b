"""The limiters that are compared, each used as its own documentation shows it."""

from importlib.metadata import version

import aiolimiter
import asynciolimiter
import pyrate_limiter
import throttled.asyncio
from langchain_core.rate_limiters import InMemoryRateLimiter
from llama_index.core.rate_limiter import TokenBucketRateLimiter

from asyncbucket import TokenBucket
from benchmarks.harness import Acquire

#: Distributions that the tables name with their versions.
VERSIONS = {
    name: version(name)
    for name in (
        "asyncbucket",
        "aiolimiter",
        "asynciolimiter",
        "pyrate-limiter",
        "throttled-py",
        "llama-index-core",
        "langchain-core",
    )
}


def asyncbucket(rate: float, burst: int) -> Acquire:
    """Ours."""
    return TokenBucket(rate, burst).acquire


def aio(rate: float, burst: int) -> Acquire:
    """Let a leaky bucket leak ``rate`` a second; its size is its rate times its period."""
    return aiolimiter.AsyncLimiter(burst, burst / rate).acquire


def asyncio_leaky(rate: float, burst: int) -> Acquire:
    """Let a leaky bucket leak ``rate`` a second."""
    return asynciolimiter.LeakyBucketLimiter(rate, capacity=burst).wait


def pyrate(rate: float, burst: int) -> Acquire:
    """Let ``burst`` pass in every window of ``burst / rate``; the lists inside hold them all."""
    window = max(1, round(burst / rate * 1000))
    limiter = pyrate_limiter.Limiter(pyrate_limiter.Rate(burst, window))
    return limiter.try_acquire_async


def throttled_py(rate: float, burst: int) -> Acquire:
    """Let a token bucket in a memory store refill ``rate`` a second."""
    quota = throttled.asyncio.rate_limiter.per_sec(round(rate), burst)
    limiter = throttled.asyncio.Throttled(
        key="benchmark",
        quota=quota,
        timeout=600,
        store=throttled.asyncio.store.MemoryStore(),
    )
    return limiter.limit


def llama_index(rate: float, burst: int) -> Acquire:
    """LlamaIndex's own; its burst is a minute's worth, so all but ``burst`` is taken beforehand."""
    limiter = TokenBucketRateLimiter(requests_per_minute=rate * 60)
    limiter._request_tokens = burst  # noqa: SLF001 - there is no public way
    return limiter.async_acquire


def langchain(rate: float, burst: int) -> Acquire:
    """LangChain's own, which looks ten times a second unless it is configured otherwise."""
    limiter = InMemoryRateLimiter(requests_per_second=rate, max_bucket_size=burst)
    return limiter.aacquire
