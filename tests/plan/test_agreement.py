"""A plan agrees with a limiter: on virtual time, and over HTTP with the bundled provider."""

import asyncio
import random
import time as real_time
from collections.abc import Sequence

import httpx
import pytest

from asyncbucket import Limiter, Pool
from asyncbucket.plan import Plan, Poisson, plan
from asyncbucket.testing import RateLimitedProvider, virtual_time

#: A timer of the event loop may be late by this much (s), because its instants are floats.
LATE = 1e-6


def run(
    limits: Sequence[str], concurrency: int, calls: Sequence[tuple[float, int, float]]
) -> tuple[float, list[float]]:
    waits: list[float] = []
    with virtual_time() as time:
        limiter = Limiter(*limits, concurrency=concurrency, clock=time.clock)

        async def call(arrival: float, tokens: int, latency: float) -> None:
            await asyncio.sleep(arrival)
            async with limiter.acquire(tokens=tokens) as lease:
                waits.append(lease.waited)
                await asyncio.sleep(latency)

        async def main() -> None:
            await asyncio.gather(*(call(*each) for each in calls))

        time.run(main())
        return time.now, sorted(waits)


def assert_same(planned: Plan, real: tuple[float, list[float]]) -> None:
    """Compare the figures of a plan with those of a run."""
    duration, waits = real
    calls = len(waits)
    assert planned.calls == calls
    assert planned.duration == pytest.approx(duration, abs=LATE * calls)
    assert planned.waits.max == pytest.approx(waits[-1], abs=LATE * calls)
    assert planned.waits.p50 == pytest.approx(waits[-(-calls // 2) - 1], abs=LATE * calls)
    assert planned.waits.p95 == pytest.approx(waits[-(-calls * 95 // 100) - 1], abs=LATE * calls)


@pytest.mark.parametrize("seed", range(32))
def test_plan_of_a_random_history_agrees_with_a_limiter(seed: int) -> None:
    """Whatever limits there are, whenever calls come, and if some cannot pass."""
    chance = random.Random(seed)
    calls, tpm = chance.randint(20, 250), chance.choice([4, 10, 40])
    limits = [
        f"{chance.choice([10, 30, 60, 300])} RPM{chance.choice(['', ' burst 1', ' burst 10'])}",
        f"{tpm}k TPM{chance.choice(['', ' burst 1k', ' burst 4k'])}",
    ]
    chosen = chance.sample(limits, k=chance.choice([1, 2, 2]))
    concurrency = chance.randint(1, 12)
    tokens = [chance.randint(50, 4_500) for _ in range(calls)]
    latency = [chance.uniform(0.01, chance.choice([1, 5, 30])) for _ in range(calls)]
    arrivals = Poisson(calls / chance.choice([1, 60, 600]))
    planned = plan(
        *chosen,
        concurrency=concurrency,
        tokens=tokens,
        latency=latency,
        arrivals=arrivals,
        seed=seed,
    )
    largest = 1_000 * tpm if limits[1] in chosen else 5_000
    instants = [instant * 1e-9 for instant in arrivals.instants(calls, seed)]
    history = zip(instants, tokens, latency, strict=True)
    passing = [each for each in history if each[1] <= largest]
    assert_same(planned, run(chosen, concurrency, passing))
    assert planned.tokens == sum(each[1] for each in passing)
    assert planned.refused == calls - len(passing)


@pytest.mark.parametrize("seed", range(6))
def test_plan_of_a_pool_agrees_with_the_pool(seed: int) -> None:
    chance = random.Random(seed)
    calls = 150
    tokens = [chance.randint(50, 1_500) for _ in range(calls)]
    latency = [chance.uniform(0.01, 5) for _ in range(calls)]
    with virtual_time() as time:
        members = [
            Limiter(
                f"{chance.choice([30, 60, 300])} RPM burst {chance.randint(1, 10)}",
                f"{chance.choice([2, 10, 40])}k TPM",
                concurrency=chance.randint(1, 6),
                name=name,
                clock=time.clock,
            )
            for name in "abc"
        ]
        pool, waits = Pool(*members, prefer="first"), []
        planned = plan(pool=pool, tokens=tokens, latency=latency)

        async def call(tokens: int, latency: float) -> None:
            async with pool.acquire(tokens=tokens) as lease:
                waits.append(lease.waited)
                await asyncio.sleep(latency)

        async def main() -> None:
            await asyncio.gather(*map(call, tokens, latency))

        time.run(main())
        assert_same(planned, (time.now, sorted(waits)))
    assert [limit.limit.partition(":")[0] for limit in planned.limits] == [*"aaabbbccc"]


CALLS = 300
LATENCY = 0.05
REQUEST = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "Is it?"}]}
HEADERS = {"authorization": "Bearer any"}
#: All are paced: a hundred calls at one instant would measure how busy the machine is.
LIMITS = ("1k requests/s", "10k tokens/s burst 1k")


async def run_for_real() -> tuple[float, list[float]]:
    took: list[float] = []
    limiter = Limiter(*LIMITS, concurrency=50)
    with RateLimitedProvider(latency=LATENCY) as provider:
        async with httpx.AsyncClient(base_url=provider.base_url, headers=HEADERS) as client:

            async def call() -> None:
                async with limiter.acquire(tokens=100):
                    begun = real_time.monotonic()
                    reply = await client.post("chat/completions", json=REQUEST)
                    took.append(real_time.monotonic() - begun)
                assert reply.status_code == 200

            start = real_time.monotonic()
            await asyncio.gather(*(call() for _ in range(CALLS)))
            return real_time.monotonic() - start, took


@pytest.mark.real_clock  # the plan is compared with real time
async def test_plan_agrees_with_a_real_run_within_three_percent() -> None:
    runs: list[tuple[str | None, float]] = []
    for _ in range(10):
        real, took = await run_for_real()
        planned = plan(*LIMITS, tokens=100, latency=took, concurrency=50)
        runs.append((planned.bound_by, abs(planned.duration / real - 1)))
        if planned.bound_by == "tokens" and runs[-1][1] <= 0.03:
            return
    pytest.fail(f"no run in ten went as planned: {runs}")
