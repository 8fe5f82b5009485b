"""The script and the live limiter's meters give the same answers to the same histories.

The test sets the server's time, so that every instant is exact.
"""

import asyncio
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Window
from asyncbucket.stores import Batch, Correction, LimitConfig, Outcome, open_store
from asyncbucket.stores.redis import script

if TYPE_CHECKING:
    from tests.stores.conftest import RunningServer

MICROSECOND = 1_000
SECOND = 1_000_000_000
#: When histories begin: an instant with as many digits as the server's own.
START = 1_795_000_000 * SECOND
RESOURCES: tuple[str, ...] = ("requests", "tokens")

moderate = settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ceil_to_grain(instant: int) -> int:
    """Round up to the precision of the script."""
    return -(-instant // MICROSECOND) * MICROSECOND


class Oracle:
    """Answer as the live limiter's meters do, given what the store has booked."""

    def __init__(self, limits: tuple[Limit, ...]) -> None:
        self.last = 0
        self.windows = [Window(limit) for limit in limits]
        for window in self.windows:
            if window.pace is not None:
                ticks = script._meter_config(window.limit)
                window.pace.p, window.pace.q = ticks["p"] * MICROSECOND, ticks["q"]
                window.pace.depth = window.pace.burst * window.pace.p

    def start(self, call: dict[str, int], now: int) -> int:
        now = max(now, self.last)
        amounts = [(window, call[window.limit.resource]) for window in self.windows]
        return max([now, *(window.earliest(n, now) for window, n in amounts if n)])

    def book(self, call: dict[str, int], start: int) -> None:
        for window in self.windows:
            if call[window.limit.resource]:
                window.book(call[window.limit.resource], start)
        self.last = start

    def correct(self, correction: Correction, now: int) -> None:
        for window in self.windows:
            used = correction.used.get(window.limit.resource, 0)
            more = used - correction.booked.get(window.limit.resource, 0)
            if more > 0:
                window.owe(more, max(now, self.last))
            elif more < 0:
                window.unbook(-more, correction.start, left=used)

    def available(self, limit: Limit, now: int) -> tuple[int, int]:
        """Return what the window of a limit has left, and how much of that may pass at once."""
        (window,) = (window for window in self.windows if window.limit == limit)
        available = window.available(now)
        return window.amount - window.used, available


@pytest.fixture
def clock(redis_sync: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the time that the script reads."""
    text = script.source()
    mine = text.replace("redis.call('TIME')", "redis.call('HMGET', KEYS[1] .. ':test', 's', 'us')")
    assert mine != text
    # Arithmetic is about any distance; what lies too far ahead is another promise.
    far = mine.replace("local FAR = 250000 ", "local FAR = 1e15 ")
    assert far != mine
    mine = far
    monkeypatch.setattr(script, "source", lambda: mine)
    monkeypatch.setattr(script, "digest", lambda: "0" * 40)

    def set_to(instant: int) -> None:
        seconds, rest = divmod(instant // MICROSECOND, 1_000_000)
        key = "asyncbucket:{oracle}:state:test"
        redis_sync.hset(key, mapping={"s": seconds, "us": rest})

    return set_to


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


@pytest.mark.heavy
@moderate
@given(limits=limits, moves=moves)
def test_redis_script_gives_the_same_answers_as_the_meters(
    shared_server: "RunningServer", redis_sync: Any, clock: Any, limits: Any, moves: Any
) -> None:
    redis_sync.flushall()
    asyncio.run(replay(shared_server.url, clock, limits, moves))


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


async def replay(url: str, clock: Any, limits: tuple[Limit, ...], moves: Any) -> None:
    """Do the same with the store and with the meters, and compare."""
    oracle = Oracle(limits)
    now = START
    clock(now)
    store = open_store(url)
    ledger = await store.open("oracle", LimitConfig(limits=limits))
    booked: list[tuple[dict[str, int], int]] = []
    for verb, delay, amounts, pick in moves:
        now += delay * MICROSECOND
        clock(now)
        if verb == "calls":
            calls = tuple(dict(zip(RESOURCES, amount, strict=True)) for amount in amounts)
            receipt = await ledger.commit(Batch(calls=calls, horizon=1 << 60))
            assert receipt.now == now
            for call, booking in zip(calls, receipt.bookings, strict=True):
                if booking.outcome is Outcome.NEVER:
                    assert any(call[limit.resource] > limit.amount for limit in limits)
                    continue
                assert booking.start == ceil_to_grain(oracle.start(call, now))
                oracle.book(call, booking.start)
                booked.append((call, booking.start))
        elif booked:
            call, start = booked.pop(pick % len(booked))
            share = {"undo": 0, "less": 0.5, "more": 1.5}[verb]
            used = {name: int(amount * share) for name, amount in call.items()}
            correction = Correction(start=start, booked=call, used=used)
            await ledger.commit(Batch(corrections=(correction,)))
            oracle.correct(correction, now)
            booked.append((used, start))
        receipt = await ledger.commit(Batch(calls=None))
        for limit, said in zip(ledger.config.limits, receipt.left, strict=True):
            assert said <= oracle.available(limit, now)[0]
        for use in (await ledger.peek()).limits:
            _, available = oracle.available(use.limit, max(now, oracle.last))
            assert use.available == (available if oracle.last <= now else min(0, available))
    await ledger.aclose()
    await store.aclose()


def test_store_time_goes_on_when_server_clock_is_set_back(
    shared_server: "RunningServer", redis_sync: Any, clock: Any
) -> None:
    asyncio.run(set_back(shared_server.url, clock))
    assert redis_sync.dbsize() > 0


async def set_back(url: str, clock: Any) -> None:
    """Set the server's clock back by an hour between two batches."""
    store = open_store(url)
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
    await store.aclose()


def test_heartbeat_reports_what_is_left_while_idle(
    shared_server: "RunningServer", redis_sync: Any, clock: Any
) -> None:
    assert redis_sync.dbsize() == 0
    asyncio.run(fall_silent(shared_server.url, clock))


async def fall_silent(url: str, clock: Any) -> None:
    """Make six calls, four of them later, and only send heartbeats for a while."""
    store = open_store(url)
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
    await store.aclose()
