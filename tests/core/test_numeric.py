"""Costs, and what counts as a number wherever one is given."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Cost, Limit, Limiter, TokenBucket, plan
from asyncbucket.core.levels import observe_remaining
from asyncbucket.core.wording import usd_written
from asyncbucket.testing import VirtualTime
from tests.core.conftest import available, used

amounts = st.none() | st.integers(0, 10**6) | st.floats(0, 1e6)


def test_cost_maps_resources_to_whole_amounts() -> None:
    """One request is the default, fractions are rounded up, and only zeros are left out."""
    cost = Cost(tokens=10.1, images=3)
    assert isinstance(cost, Mapping)
    tokens = {"tokens": 11, "input_tokens": 11, "output_tokens": 11}
    assert dict(cost) == {"requests": 1, **tokens, "images": 3}
    assert (cost["tokens"], len(cost)) == (11, 5)
    assert cost == Cost(tokens=11, images=3)
    assert "concurrency" not in cost
    assert repr(Cost(images=0)) == "Cost(requests=1)"
    assert dict(Cost(requests=0, tokens=1))["tokens"] == 1


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ({"input_tokens": 900, "output_tokens": 300}, {"tokens": 1_200}),
        ({"input_tokens": 5}, {"tokens": 5}),
        ({"tokens": 9, "output_tokens": 5}, {}),
    ],
)
def test_tokens_default_to_sum_of_input_and_output_tokens(
    given: dict[str, Any], whole: dict[str, int]
) -> None:
    assert dict(Cost(**given)) == {"requests": 1, **given, **whole}


@given(amounts, amounts, amounts)
def test_amounts_of_cost_are_whole_positive_and_never_less_than_given(
    tokens: float | None, inputs: float | None, outputs: float | None
) -> None:
    cost = Cost(tokens=tokens, input_tokens=inputs, output_tokens=outputs)
    assert all(type(amount) is int and amount > 0 for amount in cost.values())
    assert cost.get("tokens", 0) >= (tokens if tokens is not None else (inputs or 0))


async def test_numpy_numbers_are_accepted_everywhere(time: VirtualTime) -> None:
    """Small ones, too, whose sums would overflow."""
    numpy = pytest.importorskip("numpy")
    n, real = numpy.int8, numpy.float32
    limiter = Limiter(
        rpm=n(60), tpm=n(100), concurrency=n(3), max_queue=n(5), timeout=n(40), clock=time.clock
    )
    child = limiter.child("child", weight=n(2), concurrency=(n(1), n(4)))
    async with child.acquire(tokens=n(50), timeout=real(30), priority=n(2)) as lease:
        lease.settle(tokens=real(2.5))
    assert used(limiter) == [1, 3]
    limiter.pause(n(30))
    await limiter.acquire(timeout=n(30), deadline=n(30), tokens=n(5))
    assert time.now == 30
    limit = Limit("tokens", n(10), per=real(60), burst=n(3))
    told = json.dumps([limit.amount, limit.per, limit.burst, limiter.concurrency])
    assert told == "[10, 60.0, 3, 3]"
    bucket = TokenBucket(n(1), n(2), clock=time.clock)
    for _ in range(4):
        await bucket.acquire(n(1))
    assert time.now == 32
    with pytest.raises(TypeError, match="tokens must be a number, not bool"):
        Cost(tokens=numpy.bool_(True))


def test_numpy_numbers_are_accepted_by_plans_and_reports() -> None:
    three = pytest.importorskip("numpy").int8(3)
    told = plan(rpm=100, calls=three, concurrency=three, latency=three)
    assert told == plan(rpm=100, calls=3, concurrency=3, latency=3)
    limiter = Limiter("1k TPM")
    observe_remaining(limiter, three, resource="tokens", per=60, limit=three, rounding=three)
    assert available(limiter) == three


@pytest.mark.parametrize(
    ("dollars", "text"), [(25, "25"), (1_000.1, "1,000.10"), (0.00001, "0.00001"), (-0.5, "-0.50")]
)
def test_dollars_are_written_out(dollars: float, text: str) -> None:
    assert usd_written(dollars) == text
