"""Limits that reset by the calendar, shared by several processes: each period is given once."""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from asyncbucket import AcquireTimeout, Limit, Limiter
from asyncbucket.stores import Batch, LimitConfig, Store, open_store
from asyncbucket.stores.redis import RedisStore
from asyncbucket.stores.sqlite import MachineClock, SQLiteStore
from asyncbucket.stores.store import FAR, Ledger
from tests.stores.conformance.place import outcomes, peek

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
    taken = [await take(second, 6), await take(first, 5), await take(first, 4)]
    assert taken == [True, False, True]
    hands.wait(22.9999)  # this day has 23 hours
    assert not await take(second, 1)
    hands.wait(0.0001)
    assert (await peek(second)).limits[0].available == 10
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


async def test_limiter_says_when_it_resets(where: str, limited: Callable[..., Limiter]) -> None:
    hour = datetime.now(UTC) + timedelta(hours=12)
    limiter = limited(where, f"5 RPD resets {hour:%H:%M} UTC")
    for _ in range(5):
        (await limiter.acquire()).release()
    with pytest.raises(AcquireTimeout, match=r"requests bind for 43,\d+ s more"):
        await limiter.acquire(timeout=0.1)
    (use,) = limiter.statistics().limits
    assert (use.used, use.available) == (5, 0)
    assert use.resets_in == pytest.approx(12 * 3_600, abs=120)
