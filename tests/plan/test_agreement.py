"""A plan agrees with a limiter."""

import asyncio
import random
from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from typing import Any

import pytest

from asyncbucket import Limiter, Pool
from asyncbucket.plan import Plan, Poisson, plan
from asyncbucket.testing import virtual_time

#: A timer of the event loop may be late by this much (s), because its instants are floats.
LATE = 1e-6


def assert_same(
    planned: Plan, make: Callable[..., Limiter], calls: Iterable[tuple[float, int, float]]
) -> None:
    """Run calls that come at an instant, cost tokens and take seconds; compare with their plan."""
    waits: list[float] = []
    with virtual_time() as time:
        limiter = make(clock=time.clock)

        async def call(arrival: float, tokens: int, latency: float) -> None:
            await asyncio.sleep(arrival)
            async with limiter.acquire(tokens=tokens) as lease:
                waits.append(lease.waited)
                await asyncio.sleep(latency)

        async def main() -> None:
            await asyncio.gather(*(call(*each) for each in calls))

        time.run(main())
        duration = time.now
    waits.sort()
    count = len(waits)
    assert planned.calls == count
    found = (planned.duration, planned.waits.p50, planned.waits.p95, planned.waits.max)
    rank50, rank95 = (-(-count * rank // 100) - 1 for rank in (50, 95))
    expected = (duration, waits[rank50], waits[rank95], waits[-1])
    assert found == pytest.approx(expected, abs=LATE * count)


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
    slots = chance.randint(1, 12)
    tokens = [chance.randint(50, 4_500) for _ in range(calls)]
    latency = [chance.uniform(0.01, chance.choice([1, 5, 30])) for _ in range(calls)]
    arrivals = Poisson(calls / chance.choice([1, 60, 600]))
    given: dict[str, Any] = {"tokens": tokens, "latency": latency, "arrivals": arrivals}
    planned = plan(*chosen, concurrency=slots, seed=seed, **given)
    largest = 1_000 * tpm if limits[1] in chosen else 5_000
    instants = [instant * 1e-9 for instant in arrivals.instants(calls, seed)]
    history = zip(instants, tokens, latency, strict=True)
    passing = [each for each in history if each[1] <= largest]
    assert_same(planned, partial(Limiter, *chosen, concurrency=slots), passing)
    assert planned.tokens == sum(each[1] for each in passing)
    assert planned.refused == calls - len(passing)


@pytest.mark.parametrize("seed", range(6))
def test_plan_of_a_pool_agrees_with_the_pool(seed: int) -> None:
    chance = random.Random(seed)
    tokens = [chance.randint(50, 1_500) for _ in range(150)]
    latency = [chance.uniform(0.01, 5) for _ in tokens]
    members: list[tuple[str, str, int]] = []
    for _ in range(3):
        requests = f"{chance.choice([30, 60, 300])} RPM burst {chance.randint(1, 10)}"
        members.append((requests, f"{chance.choice([2, 10, 40])}k TPM", chance.randint(1, 6)))

    def pool(**clock: Any) -> Pool:
        each = (
            Limiter(*limits, concurrency=slots, name=name, **clock)
            for name, (*limits, slots) in zip("abc", members, strict=True)
        )
        return Pool(*each, prefer="first")

    planned = plan(pool=pool(), tokens=tokens, latency=latency)
    assert_same(planned, pool, zip(repeat(0), tokens, latency, strict=False))
    assert [limit.limit.partition(":")[0] for limit in planned.limits] == [*"aaabbbccc"]
