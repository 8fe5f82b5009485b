"""A plan compared with reality: real calls over HTTP to the bundled provider."""

import asyncio
import time

import httpx
import pytest

from asyncbucket import Limiter
from asyncbucket.plan import plan
from asyncbucket.testing import RateLimitedProvider

CALLS = 300
LATENCY = 0.05
REQUEST = {
    "model": "m",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Is it?"}],
}
HEADERS = {"authorization": "Bearer any"}
#: All are paced: a hundred calls at one instant would measure how busy the machine is.
LOADS: dict[str, tuple[str, str, int]] = {
    "requests": ("100 requests/s", "100k tokens/s", 50),
    "tokens": ("1k requests/s", "10k tokens/s burst 1k", 50),
    "concurrency": ("1k requests/s", "100k tokens/s", 5),
}


async def run_for_real(requests: str, tokens: str, concurrency: int) -> tuple[float, list[float]]:
    """Return how long all calls took over real sockets, and how long each was under way."""
    took: list[float] = []
    limiter = Limiter(requests, tokens, concurrency=concurrency)
    with RateLimitedProvider(latency=LATENCY) as provider:
        async with httpx.AsyncClient(base_url=provider.base_url, headers=HEADERS) as client:

            async def call() -> None:
                async with limiter.acquire(tokens=100):
                    begun = time.monotonic()
                    reply = await client.post("chat/completions", json=REQUEST)
                    took.append(time.monotonic() - begun)
                assert reply.status_code == 200

            start = time.monotonic()
            await asyncio.gather(*(call() for _ in range(CALLS)))
            return time.monotonic() - start, took


@pytest.mark.real_clock  # the plan is compared with real time
@pytest.mark.parametrize("binds", LOADS)
async def test_plan_agrees_with_a_real_run_within_three_percent(binds: str) -> None:
    """The plan knows how long calls took; there are ten tries, as a busy machine may spoil some."""
    requests, tokens, concurrency = LOADS[binds]
    runs: list[tuple[str | None, float]] = []
    for _ in range(10):
        real, took = await run_for_real(requests, tokens, concurrency)
        planned = plan(requests, tokens, tokens=100, latency=took, concurrency=concurrency)
        runs.append((planned.bound_by, abs(planned.duration / real - 1)))
        if planned.bound_by == binds and runs[-1][1] <= 0.03:
            return
    pytest.fail(f"no run in ten went as planned, {binds} binding: {runs}")
