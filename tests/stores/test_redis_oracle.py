"""The script and the live limiter's meters give the same answers to the same histories.

The tests set the server's time, so that every instant is exact.
"""

import asyncio
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncbucket.core.limits import Limit
from asyncbucket.stores import Batch, Correction, LimitConfig, Outcome, open_store
from asyncbucket.stores.redis import RedisStore, script
from tests.stores.conformance import Oracle

if TYPE_CHECKING:
    from asyncbucket.core.meters import Amounts
    from tests.stores.conftest import RunningServer

MICROSECOND = 1_000
SECOND = 1_000_000_000
#: When histories begin: an instant with as many digits as the server's own.
START = 1_795_000_000 * SECOND
RESOURCES: tuple[str, ...] = ("requests", "tokens")

limits = st.lists(
    st.builds(
        Limit,
        st.sampled_from(RESOURCES),
        st.integers(20, 60) | st.sampled_from([199_999, 1_000_003]),
        per=st.sampled_from([1, 7, 60, 86_400]),
        burst=st.none() | st.integers(1, 20),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda limit: (limit.resource, limit.per),
).map(tuple)

moves = st.lists(
    st.tuples(
        st.sampled_from(["calls", "calls", "calls", "undo", "less", "more"]),
        # How long after the last move, in microseconds: often at once, sometimes after a window.
        st.sampled_from([0, 0, 1]) | st.integers(0, 3_000_000) | st.integers(0, 90_000_000),
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), min_size=1, max_size=6),
        st.integers(0, 1_000),
    ),
    max_size=30,
)


@pytest.fixture
def clock(
    server_clock: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], None]:
    """Return a function that sets the time, for arithmetic about any distance.

    What lies too far ahead to be booked is another promise.
    """
    ours, text = "local FAR = 250000 ", script.source()
    assert ours in text
    monkeypatch.setattr(script, "source", lambda: text.replace(ours, "local FAR = 1e15 "))
    return server_clock


@pytest.mark.heavy
@settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(limits=limits, moves=moves)
def test_redis_script_gives_the_same_answers_as_the_meters(
    shared_server: "RunningServer", redis_sync: Any, clock: Any, limits: Any, moves: Any
) -> None:
    redis_sync.flushall()
    asyncio.run(replay(shared_server.url, clock, LimitConfig(limits=limits), moves))


async def replay(url: str, clock: Any, config: LimitConfig, moves: Any) -> None:
    """Do the same with the store and with the meters, and compare."""
    oracle = Oracle(config, grain=MICROSECOND, far=1 << 80)
    for window in oracle.windows:
        if window.pace is not None:
            ticks = script._meter_config(window.limit)
            window.pace.p, window.pace.q = ticks["p"] * MICROSECOND, ticks["q"]
            window.pace.depth = window.pace.burst * window.pace.p
    now = START
    clock(now)
    store = open_store(url)
    ledger = await store.open("oracle", config)
    now += (
        MICROSECOND  # what was booked by the instant in which a limiter begins gives nothing back
    )
    booked: list[tuple[Amounts, int]] = []
    for verb, delay, amounts, pick in moves:
        now += delay * MICROSECOND
        clock(now)
        if verb == "calls":
            calls = tuple(dict(zip(RESOURCES, amount, strict=True)) for amount in amounts)
            batch = Batch(calls=calls, horizon=1 << 60)
        elif booked:
            call, start = booked.pop(pick % len(booked))
            share = {"undo": 0, "less": 0.5, "more": 1.5}[verb]
            used = {name: int(amount * share) for name, amount in call.items()}
            batch = Batch(corrections=(Correction(start=start, booked=call, used=used),))
            booked.append((used, start))
        else:
            continue
        receipt = await ledger.commit(batch)
        assert receipt.now == now
        oracle.check(ledger.worker, batch, receipt)
        for call, booking in zip(batch.calls or (), receipt.bookings, strict=True):
            if booking.outcome is Outcome.BOOKED:
                booked.append((call, booking.start))
        left = (await ledger.commit(Batch(calls=None))).left
        uses = (await ledger.peek()).limits
        windows = {window.limit.key: window for window in oracle.windows}
        for limit, said, use in zip(ledger.config.limits, left, uses, strict=True):
            window = windows[limit.key]
            window.available(now)  # which makes it forget
            assert said <= window.amount - window.used
            available = window.available(max(now, receipt.now, oracle.last_start))
            assert use.available == (available if oracle.last_start <= now else min(0, available))
    await ledger.aclose()
    await store.aclose()


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
    second = await ledger.commit(Batch(calls=(call,), horizon=0))
    assert second.now == first.now
    assert second.bookings[0].start >= first.now + 10 * SECOND
    clock(START - 3_589 * SECOND)
    assert (await ledger.peek()).now == first.now + 11 * SECOND
    await ledger.aclose()


async def test_heartbeat_reports_what_is_left_while_idle(
    store: RedisStore, clock: Callable[[int], None]
) -> None:
    clock(START)
    limit = Limit("requests", 10, per=10, burst=10)
    ledger = await store.open("oracle", LimitConfig(limits=(limit,)))
    call = {"requests": 1}
    await ledger.commit(Batch(calls=(call,) * 2))
    clock(START + 5 * SECOND)
    await ledger.commit(Batch(calls=(call,) * 4))
    left = []
    for seconds in (5, 10, 11, 15, 16):
        clock(START + seconds * SECOND)
        left.append((await ledger.commit(Batch(calls=None))).left)
    assert left == [(4,), (4,), (6,), (6,), (10,)]
    await ledger.aclose()


async def test_bucket_that_is_never_full_remembers_a_bounded_number_of_bookings(
    store: RedisStore, redis: Any, clock: Callable[[int], None]
) -> None:
    clock(START)
    limit = Limit("requests", 2_000, per=86_400, burst=1_000)
    ledger = await store.open("oracle", LimitConfig(limits=(limit,)))
    for booked in range(1, 601):
        clock(START + booked * MICROSECOND)
        await ledger.commit(Batch(calls=({"requests": 1},)))
    assert await redis.hstrlen("asyncbucket:{oracle}:state", "state") < 9_000  # 18 bytes each
    await ledger.aclose()
