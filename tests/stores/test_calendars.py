"""Limits that reset by the calendar, shared by several processes: each period is given once."""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from asyncbucket import AcquireTimeout, Limit, Limiter
from asyncbucket.stores import Batch, LimitConfig, Store, open_store
from asyncbucket.stores.outage import Record
from asyncbucket.stores.redis import RedisStore
from asyncbucket.stores.sqlite import MachineClock, SQLiteStore
from asyncbucket.stores.store import FAR, Correction, Ledger
from tests.stores.conformance.place import outcomes

SECOND = 1_000_000_000
HOUR = 3_600 * SECOND
#: Noon in Los Angeles, the day before its clocks go forward.
NOON = round(datetime(2027, 3, 13, 20, tzinfo=UTC).timestamp()) * SECOND


def daily(resets: str, amount: int = 10) -> LimitConfig:
    return LimitConfig(limits=(Limit("tokens", amount, per="day", resets=resets),))


class Hands:
    """Clocks of a store that are set by hand."""

    def __init__(self) -> None:
        self.steady = self.wall = NOON
        self.tell: Callable[[int], object] = int
        self.store: Store

    def wait(self, hours: float) -> None:
        self.steady += round(hours * HOUR)
        self.set(hours)

    def set(self, hours: float) -> None:
        """Set the wall clock."""
        self.wall += round(hours * HOUR)
        self.tell(self.wall)

    async def workers(self, config: LimitConfig) -> tuple[Ledger, Ledger]:
        first, second = [await self.store.open("oracle", config) for _ in range(2)]
        return first, second


@pytest.fixture(params=["sqlite", "redis"])
async def hands(request: pytest.FixtureRequest, path: Path) -> AsyncIterator[Hands]:
    """Give a store of either kind."""
    hands = Hands()
    if request.param == "sqlite":
        clock = MachineClock(lambda: hands.wall, lambda: hands.steady, "boot")
        hands.store = SQLiteStore(path, clock=clock)
    else:
        hands.tell = request.getfixturevalue("server_clock")
        hands.store = open_store(request.getfixturevalue("url"))
    hands.set(0)
    yield hands
    await hands.store.aclose()


async def take(ledger: Ledger, tokens: int) -> bool:
    """Ask for tokens once; return whether they were booked."""
    receipt = await ledger.commit(Batch(calls=({"tokens": tokens},)))
    await ledger.commit(Batch())  # leave the line
    return outcomes(receipt) == ["booked"]


async def test_period_is_given_once_to_all_processes(hands: Hands) -> None:
    first, second = await hands.workers(daily("00:00 America/Los_Angeles"))
    assert await take(first, 10)
    receipt = await second.commit(Batch(calls=({"tokens": 1},)))
    assert outcomes(receipt) == ["later"]
    assert receipt.ask_at + FAR - receipt.now == 12 * HOUR
    await second.commit(Batch())
    hands.wait(11.9999)
    assert not await take(first, 1)
    hands.wait(0.0001)
    assert [await take(second, 6), await take(first, 5), await take(first, 4)] == [
        True,
        False,
        True,
    ]
    hands.wait(22.9999)  # this day has 23 hours
    assert not await take(second, 1)
    hands.wait(0.0001)
    assert (await second.peek()).limits[0].available == 10
    assert [await take(second, 10), await take(first, 1)] == [True, False]
    hands.wait(24 * 10)
    assert [await take(second, 10), await take(first, 1)] == [True, False]


@pytest.mark.parametrize(
    ("steps", "passes"),
    [
        # Hours from 20:00 on the 13th, and by how many the clock is set; what it shows as calls pass.
        ([], ["13 20", "14 00", "15 00"]),
        ([(2, -1)], ["13 20", "14 00", "15 00"]),
        ([(3, +1), (6, -1)], ["13 20", "14 01 | 14 00", "15 00"]),
        ([(1, -48)], ["13 20", "13 00", "14 00"]),
    ],
)
async def test_clock_that_is_set_neither_gives_a_period_twice_nor_locks(
    hands: Hands, steps: list[tuple[float, float]], passes: list[str]
) -> None:
    """A server's clock is its wall clock: one that is set forward is believed at once."""
    first, second = await hands.workers(daily("00:00 UTC"))
    shown: list[str] = []
    for hour in range(60):
        for at, by in steps:
            if at == hour:
                hands.set(by)
        if await take(first, 10):
            shown.append(f"{datetime.fromtimestamp(hands.wall // SECOND, UTC):%d %H}")
            assert not await take(second, 1)
        hands.wait(1)
    kind = -1 if isinstance(hands.store, RedisStore) else 0
    assert shown[:3] == [each.split(" | ")[kind] for each in passes]


async def test_debt_stays_owed_for_one_period_and_refunds_only_count_in_their_own(
    hands: Hands,
) -> None:
    first, second = await hands.workers(daily("00:00 UTC", 100))
    hands.wait(1)
    start = (await first.commit(Batch(calls=({"tokens": 50},)))).bookings[0].start
    more = Correction(start=start, booked={"tokens": 50}, used={"tokens": 160})
    assert (await first.commit(Batch(corrections=(more,)))).left == (-60,)
    hands.wait(3)
    undo = Correction.undo({"tokens": 50}, start)
    assert (await second.commit(Batch())).left == (40,)
    assert (await second.commit(Batch(corrections=(undo,)))).left == (40,)
    now = (await second.commit(Batch(calls=({"tokens": 10},)))).bookings[0].start
    most = Correction(start=now, booked={"tokens": 10}, used={"tokens": 1_000})
    assert (await first.commit(Batch(corrections=(most,)))).left == (-960,)
    receipt = await first.commit(Batch(calls=({"tokens": 1},)))
    assert receipt.ask_at + FAR - receipt.now == 48 * HOUR
    hands.wait(24)
    assert (await second.commit(Batch(calls=None))).left == (0,)
    hands.wait(24)
    assert (await second.commit(Batch(calls=None))).left == (100,)


async def test_other_hour_gives_nothing_anew(hands: Hands) -> None:
    first, second = await hands.workers(LimitConfig(limits=(Limit("tokens", 10, per=86_400),)))
    assert await take(first, 8)
    for resets in ("23:00 UTC", "21:00 UTC"):
        await second.commit(Batch(config=daily(resets)))
        assert (await first.commit(Batch())).left == (2,)
    hands.wait(1)
    assert (await first.commit(Batch())).left == (10,)
    assert await take(first, 3)
    await second.commit(Batch(config=LimitConfig(limits=(Limit("tokens", 10, per=86_400),))))
    hands.wait(23)
    assert (await first.commit(Batch())).left == (7,)


async def test_lost_state_leaves_nothing_until_the_reset(hands: Hands) -> None:
    if isinstance(hands.store, RedisStore):
        first, second = await hands.workers(daily("00:00 UTC"))
        assert await take(first, 1)
        await hands.store.client.flushall()
        hands.set(0)
        assert [await take(first, 1), await take(second, 1)] == [False, False]
        hands.wait(4)
        assert [await take(first, 10), await take(second, 1)] == [True, False]


async def test_limiter_says_when_a_shared_limit_resets(
    where: str, limited: Callable[..., Limiter]
) -> None:
    hour = datetime.now(UTC) + timedelta(hours=12)
    limiter = limited(where, f"5 RPD resets {hour:%H:%M} UTC")
    for _ in range(5):
        (await limiter.acquire()).release()
    with pytest.raises(AcquireTimeout, match=r"requests bind for 43,\d+ s more"):
        await limiter.acquire(timeout=0.1)
    (use,) = limiter.statistics().limits
    assert (use.used, use.available) == (5, 0)
    assert use.resets_in == pytest.approx(12 * 3_600, abs=120)


def test_share_of_a_process_alone_comes_back_at_the_reset() -> None:
    record = Record(daily("00:00 UTC"))
    record.book({"tokens": 4}, NOON)
    record.share(2, (2,), NOON)
    assert record.earliest({"tokens": 1}, NOON) == NOON
    record.book({"tokens": 1}, NOON)
    assert record.earliest({"tokens": 1}, NOON) == NOON + 4 * HOUR
    record.book({"tokens": 5}, NOON + 4 * HOUR)
    assert record.earliest({"tokens": 1}, NOON + 4 * HOUR) == NOON + 28 * HOUR
