"""Under full load, a limiter uses at least 99 % of its limits, and never exceeds them."""

import random
from typing import Any

import pytest

from asyncbucket import Limit, Limiter
from asyncbucket.testing import VirtualTime, assert_never_over
from tests.engine.test_shares import Passed, saturate

pytestmark = pytest.mark.heavy


def used_of(limit: Limit, passed: Passed, seconds: float) -> float:
    """Assert that a limit is kept; return which part of it was used after the first window."""
    trace = [
        (round(when * 1e9), tokens if limit.resource == "tokens" else 1)
        for when, _, tokens in passed
    ]
    assert_never_over(trace, limit)
    later = sum(amount for when, amount in trace if limit.per <= when / 1e9 < seconds)
    return later / (limit.amount / limit.per * (seconds - limit.per))


@pytest.mark.parametrize(
    ("limits", "most", "options", "share"),
    [
        (["60 RPM"], 0, {}, 0.99),
        (["10/s"], 0, {}, 0.99),
        (["1000 requests/10s burst 1000"], 0, {}, 0.99),
        (["60k TPM"], 600, {}, 0.99),
        (["60k TPM burst 1000"], 300, {}, 0.99),
        (["60k TPM"], 12_000, {}, 0.89),  # up to a fifth of the limit
        (["1200 RPM", "60k TPM"], 200, {"latency": 1.5, "concurrency": 50}, 0.99),
        (["300 RPM", "60k TPM"], 200, {"latency": 1.5, "concurrency": 50}, 0.99),
        (["1200 RPM", "120k TPM"], 200, {"latency": 1.5, "concurrency": 10}, 0.98),
        (["60k TPM"], 600, {"latency": 0.2, "used": 1 / 3}, 0.98),
    ],
)
async def test_whichever_limit_binds_is_used_to_99_percent_and_none_is_exceeded(
    time: VirtualTime, limits: list[str], most: int, options: dict[str, Any], share: float
) -> None:
    chance = random.Random(7)
    limiter = Limiter(*limits, concurrency=options.pop("concurrency", None), clock=time.clock)
    seconds = (20 if share < 0.9 else 6) * limiter.limits[-1].per
    caller = (limiter, (lambda: chance.randint(1, most)) if most else 0)
    passed = await saturate(time, seconds, *[caller] * 200, **options)
    used = [used_of(limit, passed, seconds) for limit in limiter.limits]
    if limiter.concurrency:
        used.append(len(passed) * options["latency"] / (limiter.concurrency * time.now))
    assert share <= max(used) <= 1.01
