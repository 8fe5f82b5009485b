"""What the script does with the server's clock, which the tests set: every instant is exact."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket.engine.limits import Limit
from asyncbucket.stores import Batch, LimitConfig, script
from asyncbucket.stores.redis import RedisStore
from tests.stores.conformance.place import peek, terms

MICROSECOND = 1_000
SECOND = 1_000_000_000
#: When histories begin: an instant with as many digits as the server's own.
START = 1_795_000_000 * SECOND


@pytest.fixture
def clock(
    server_clock: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], None]:
    """Return a function that sets the time, for arithmetic about any distance.

    What lies too far ahead to be booked is another promise.
    """
    text, head = script.source(), "local HOUR"
    assert head in text
    monkeypatch.setattr(script, "source", lambda: text.replace(head, f"local FAR = 1e15\n{head}"))
    return server_clock


@given(
    st.integers(1, 1_000_000_000),
    st.sampled_from([1, 7, 60, 3_600, 86_400, 400 * 86_400]),
    st.floats(0, 1),
)
def test_script_ticks_are_exact_or_on_the_safe_side(amount: int, per: int, share: float) -> None:
    limit = Limit("requests", amount, per=per, burst=max(1, int(amount * share)))
    meter = script._meter_config(limit)
    if "p" in meter:
        exact = Fraction(per * 1_000_000, amount)
        assert exact <= Fraction(meter["p"], meter["q"]) <= exact * Fraction(10_001, 10_000)
        assert meter["p"] * (amount + (limit.burst or 0)) < 1 << 53
        if exact.numerator * 2 * amount < 1 << 46:
            assert Fraction(meter["p"], meter["q"]) == exact


async def test_store_time_goes_on_when_server_clock_is_set_back(
    store: RedisStore, clock: Callable[[int], None]
) -> None:
    clock(START)
    limit = Limit("requests", 2, per=10, burst=2)
    ledger = await store.open("oracle", LimitConfig(limits=(limit,)))
    call = {"requests": 1}
    first = await ledger.commit(Batch(calls=(call, call)))
    clock(START - 3_600 * SECOND)
    second = await ledger.commit(Batch(calls=(call,)))
    assert second.now == first.now
    assert second.bookings[0].start >= first.now + 10 * SECOND
    clock(START - 3_589 * SECOND)
    assert (await peek(ledger)).now == first.now + 11 * SECOND
    await ledger.aclose()


async def test_memory_of_a_server_is_bounded(
    store: RedisStore, redis: Any, clock: Callable[[int], None]
) -> None:
    """Of a window, and of a bucket that is never full."""
    clock(START)
    ledger = await store.open("oracle", terms("2000/day burst 1000", "100000 tokens/s"))
    for booked in range(1, 701):
        clock(START + booked * 2_000 * MICROSECOND)
        await ledger.commit(Batch(calls=({"requests": 1, "tokens": 1},)))
    assert redis.hstrlen("asyncbucket:{oracle}:state", "state") < 9_300  # 18 bytes each
    assert redis.hlen("asyncbucket:{oracle}:state") < 40
    await ledger.aclose()
