"""Limits that reset by the calendar: when, how much comes back, and what a wrong wall clock does."""

import asyncio
import copy
import json
from collections import Counter
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, time
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from asyncbucket import AcquireTimeout, Cost, Limit, Limiter, LimitSyntaxError, Pool, WouldBlock
from asyncbucket.engine.meters import NEVER, Window
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import available, refused, start, take, used

SECOND = 1_000_000_000
HOUR = 3_600 * SECOND
DAY = 24 * HOUR
ZONES = ("America/Los_Angeles", "Europe/Berlin", "Asia/Kolkata", "Australia/Lord_Howe")


def ns(text: str, zone: str = "UTC") -> int:
    """Return an instant in ns since 1970; where a time exists twice, a "*" means the second."""
    at = datetime.fromisoformat(text.rstrip("*"))
    moment = at.replace(tzinfo=ZoneInfo(zone), fold=int(text.endswith("*")))
    return round(moment.timestamp()) * SECOND


class Wall:
    """A wall clock that shows ``text`` when virtual time begins, and may be set."""

    def __init__(self, time: VirtualTime, text: str, zone: str = "UTC") -> None:
        self._time, self.ahead = time, ns(text, zone)

    def __call__(self) -> int:
        return self._time.clock() + self.ahead

    def step(self, hours: float) -> None:
        self.ahead += round(hours * HOUR)

    def reads(self, zone: str = "UTC") -> str:
        return datetime.fromtimestamp(self() // SECOND, ZoneInfo(zone)).strftime("%m-%d %H:%M:%S")


def limiter_of(time: VirtualTime, wall: Wall, *limits: Limit | str, **terms: Any) -> Limiter:
    return Limiter(*limits, clock=time.clock, wall_clock=wall, **terms)


# --- when periods begin ---


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("at", ["00:00", "02:30"])
def test_days_of_ten_years_begin_when_the_clock_shows_their_time(zone: str, at: str) -> None:
    """On the few days on which it skips that time, it shows an hour more."""
    calendar = Limit("requests", 1, per="day", resets=f"{at} {zone}").calendar
    assert calendar is not None
    first, shown_late = date(2024, 1, 1).toordinal(), 0
    for number in range(first, first + 3_653):
        start = calendar.start(number)
        assert calendar.number(start) == calendar.number(calendar.start(number + 1) - 1) == number
        shown = datetime.fromtimestamp(start // SECOND, ZoneInfo(zone))
        assert (shown.toordinal(), shown.fold) == (number, 0)
        if shown.time() != time.fromisoformat(at):
            assert shown.time() == time(3, 30)
            shown_late += 1
    assert shown_late == (10 if at == "02:30" and zone in ZONES[:2] else 0)


@pytest.mark.parametrize(
    ("resets", "period", "moments"),
    [
        # Skipped: 02:30 begins when the clock shows 03:30; then 01:30 comes twice.
        ("02:30 America/Los_Angeles", "day", "2026-03-07T10:30 2026-03-08T10:30 2026-03-09T09:30"),
        ("01:30 America/Los_Angeles", "day", "2026-10-31T08:30 2026-11-01T08:30 2026-11-02T09:30"),
        ("00:00 Europe/Berlin", "day", "2026-03-28T23:00 2026-03-29T22:00"),
        ("00:00 Europe/Berlin", "day", "2026-10-24T22:00 2026-10-25T23:00"),
        ("00:00 Asia/Kolkata", "day", "2028-02-27T18:30 2028-02-28T18:30 2028-02-29T18:30"),
        ("00:00 Australia/Lord_Howe", "day", "2026-04-04T13:00 2026-04-05T13:30"),
        (
            "00:00 UTC",
            "month",
            "2027-12-01T00:00 2028-01-01T00:00 2028-02-01T00:00 2028-03-01T00:00",
        ),
        ("00:00 Europe/Berlin", "month", "2026-02-28T23:00 2026-03-31T22:00"),
        ("03:00 UTC", "week", "2026-12-28T03:00 2027-01-04T03:00"),
        # A zone that left out a day; and one whose clocks went back over midnight.
        ("00:00 Pacific/Apia", "day", "2011-12-29T10:00 2011-12-30T10:00 2011-12-31T10:00"),
        ("00:00 America/St_Johns", "day", "2010-11-07T02:30 2010-11-08T03:30"),
    ],
)
def test_clock_changes_leap_days_and_ends_of_months(resets: str, period: Any, moments: str) -> None:
    calendar = Limit("requests", 1, per=period, resets=resets).calendar
    assert calendar is not None
    starts = [ns(each) for each in moments.split()]
    numbers = [calendar.number(each) for each in starts]
    assert [calendar.start(each) for each in numbers] == starts
    assert [calendar.number(each - 1) for each in starts[1:]] == numbers[:-1]


# --- what comes back then ---


@pytest.mark.parametrize("period", ["day", "week", "month"])
@pytest.mark.parametrize("zone", ZONES)
def test_meter_promises_each_instant_of_ten_years_exactly(zone: str, period: Any) -> None:
    """It fails at every step before, and succeeds exactly at, the promised time."""
    base, random = ns("2024-01-01T12:34"), Random(1)
    limit = Limit("tokens", 10, per=period, resets=f"02:30 {zone}")
    window, calendar, now = Window(limit, wall=lambda now: now + base), limit.calendar, 0
    assert calendar is not None
    while now < 3_653 * DAY:
        assert take(window, 10, now)
        due = window.earliest(1, now)
        assert due + base == calendar.start(calendar.number(now + base) + 1)
        assert not take(window, 1, random.randrange(now, due))
        assert not take(window, 1, due - 1)
        assert window.available(due) == 10
        now = random.choice([due, due + random.randrange(20 * HOUR)])


async def test_whole_limit_comes_back_at_once_and_is_not_paced(time: VirtualTime) -> None:
    """At any concurrency, no day has more calls than the limit, nor fewer while calls wait."""
    wall = Wall(time, "2026-03-28T12:00", "Europe/Berlin")
    limiter = limiter_of(time, wall, "100 RPD resets 00:00 Europe/Berlin", concurrency=7)
    random, days = Random(2), Counter[str]()

    async def call() -> None:
        async with limiter.acquire():
            days[wall.reads("Europe/Berlin")[:5]] += 1
            await asyncio.sleep(random.random() * 600)

    await asyncio.gather(*(call() for _ in range(350)))
    assert days == {"03-28": 100, "03-29": 100, "03-30": 100, "03-31": 50}


async def test_burst_paces_it_all_the_same(time: VirtualTime) -> None:
    wall = Wall(time, "2026-06-01T23:59:00")
    limiter = limiter_of(time, wall, "86,400 RPD burst 2 resets 00:00 UTC")
    for _ in range(122):
        (await limiter.acquire()).release()
    assert time.now == 120.0  # one a second, over midnight
    assert used(limiter) == [61]


@pytest.mark.parametrize("seed", range(10))
def test_random_history_agrees_with_a_model_that_keeps_every_booking(seed: int) -> None:
    random = Random(seed)
    limit = Limit("tokens", 50, per="day", resets="02:30 America/Los_Angeles")
    base, calendar, now = ns("2026-03-06T20:00"), limit.calendar, 0
    assert calendar is not None
    window = Window(limit, wall=lambda now: now + base)
    booked: list[list[int]] = []  # period, date, units left
    owed, today = 0, calendar.number(base)

    def model() -> int:
        return owed + sum(units for period, _, units in booked if period == today)

    for _ in range(400):
        now += random.choice([0, random.randrange(3 * HOUR)])
        while calendar.start(today + 1) <= now + base:
            owed, today = min(max(0, model() - 50), 50), today + 1
        window.available(now)  # a refund that comes before it has noticed lessens what is owed
        units, kind = random.randint(1, 40), random.random()
        if kind < 0.4:
            fits, due = model() + units <= 50, window.earliest(units, now)
            assert take(copy.deepcopy(window), units, due)
            assert (due <= now) == fits == take(window, units, now)
            booked += [[today, now, units]] if fits else []
        elif kind < 0.6:
            window.owe(units, now)
            booked.append([today, now, units])
        elif booked:
            booking = random.choice(booked[-6:])
            back = random.randint(0, booking[2])
            booking[2] -= back
            if kind < 0.9:
                window.unbook(back, booking[1], left=booking[2])
            else:
                window.redate(back, booking[1], now)
                booked.append([today, now, back])
        if random.random() < 0.1:  # as a store keeps it
            kept, window = window, Window(limit, wall=lambda now: now + base)
            window.restore(json.loads(json.dumps(kept.state())))
        assert window.available(now) == 50 - model()


# --- a wall clock that is set ---


@pytest.mark.parametrize(
    ("steps", "passes"),
    [
        # Hours from 12:00 on the 1st, and by how many the clock is set; what it shows as calls pass.
        ([], ["01 12:00", "02 00:00", "03 00:00"]),
        ([(2, -1)], ["01 12:00", "02 00:00", "03 00:00"]),
        ([(2, +1)], ["01 12:00", "02 01:00", "03 00:00"]),
        ([(11.5, +1), (13, -1)], ["01 12:00", "02 01:00", "03 00:00"]),
        ([(12.5, -1)], ["01 12:00", "02 00:00", "03 00:00"]),
        ([(2, +1), (3, -1)], ["01 12:00", "02 00:00", "03 00:00"]),
        ([(2, -1), (3, +1)], ["01 12:00", "02 00:00", "03 00:00"]),
        # Wrong by ten days when the first period was opened, or for a while.
        ([(0, +240), (1, -240)], ["11 12:00", "03 00:00", "04 00:00"]),
        ([(1, +240), (13, -240)], ["01 12:00", "12 00:00", "04 00:00"]),
        ([(1, -240)], ["01 12:00", "24 00:00", "25 00:00"]),
    ],
)
async def test_clock_that_is_set_neither_gives_a_period_twice_nor_locks(
    time: VirtualTime, steps: list[tuple[float, float]], passes: list[str]
) -> None:
    wall = Wall(time, "2026-06-01T12:00")
    limiter = limiter_of(time, wall, "10 RPD resets 00:00 UTC")

    def step(by: float) -> None:
        wall.step(by)
        assert available(limiter) == 0

    for at, by in steps:
        if at:
            asyncio.get_running_loop().call_later(at * 3_600, step, by)
        else:
            wall.step(by)
    shown: list[str] = []
    for _ in passes:
        await limiter.acquire(requests=10)
        shown.append(wall.reads()[3:11])
        with pytest.raises(WouldBlock):
            limiter.acquire_nowait()
    assert shown == passes


# --- terms ---


@pytest.mark.parametrize(
    "text",
    [
        "10k RPD resets 00:00 America/Los_Angeles",
        "10,000 requests/day RESET AT 0:00 America/Los_Angeles",
        "10k calls per day, reset at 00:00 America/Los_Angeles",
    ],
)
def test_limit_is_read_compared_and_written(text: str) -> None:
    limit = Limit("requests", 10_000, per="day", resets="00:00 America/Los_Angeles")
    assert Limit.parse(text) == Limit.parse(str(limit)) == limit != Limit.parse("10k RPD")
    assert Limit(**asdict(limit)) == replace(limit) == copy.deepcopy(limit) == limit
    assert (limit.per, limit.burst, limit.keyword, limit.label) == (86_400, None, "rpd", "rpd")
    assert str(limit) == "10,000 requests per day, reset at 00:00 America/Los_Angeles"
    monthly = Limit.parse("1M tokens/month resets 06:30 UTC")
    assert (monthly.label, monthly.per) == ("tokens/month", 30 * 86_400)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"resets": "00:00 UTC", "per": 60}, 'has per="day", "week" or "month", not 60 seconds'),
        ({"per": "month"}, 'say when they begin, e.g. resets="00:00 UTC"'),
        ({"resets": "24:00 UTC"}, "does not begin with a time of day from 00:00 to 23:59"),
        ({"resets": "midnight Pacific"}, 'write e.g. resets="00:00 America/Los_Angeles"'),
        ({"resets": "00:00"}, "does not say in which time zone"),
        ({"resets": "00:00 PST"}, "'PST' is not a time zone: write e.g. resets="),
        ({"resets": "00:00 ../etc"}, "is not a time zone"),
        ({"resets": 0}, "0 does not begin with a time of day"),
        ({"resets": "00:00 UTC", "burst": 11}, "limit of 10 requests per day, reset at 00:00 UTC:"),
    ],
)
def test_wrong_hour_or_zone_is_refused(terms: dict[str, Any], says: str) -> None:
    limit: Any = Limit
    with pytest.raises(LimitSyntaxError) as error:
        limit("requests", 10, **{"per": "day", **terms})
    assert says in str(error.value)


async def test_refusals_and_statistics_say_when_it_resets(time: VirtualTime) -> None:
    wall = Wall(time, "2026-06-01T15:00", "America/Los_Angeles")
    limiter = limiter_of(time, wall, "2 RPD resets 00:00 America/Los_Angeles", "60 TPM")
    (await limiter.acquire(requests=2)).release()
    says = "requests bind for 32,400 s more, until the limit resets at 00:00 America/Los_Angeles; "
    with refused(AcquireTimeout, says, retry_after=pytest.approx(32_400), bound_by="requests"):
        await limiter.acquire(timeout=3_600)
    assert time.now == 0.0
    assert [use.resets_in for use in limiter.statistics().limits] == [pytest.approx(32_400), None]
    explanation = limiter.explain()
    assert explanation.wait == pytest.approx(32_400)
    assert explanation.bound_by == "requests"
    assert "per day, reset at 00:00 America/Los_Angeles" in str(explanation)
    await limiter.acquire(requests=1, tokens=60, timeout=40_000)
    with refused(WouldBlock, "tokens bind for 60.4 s more; wait", bound_by="tokens"):
        limiter.acquire_nowait(tokens=60)


async def test_other_hour_or_a_sliding_window_gives_nothing_anew(time: VirtualTime) -> None:
    limiter = limiter_of(time, Wall(time, "2026-06-01T12:00"), "10 RPD")
    await limiter.acquire(requests=3)
    await asyncio.sleep(600)
    lease = await limiter.acquire(requests=5)
    limiter.reconfigure("10 RPD resets 18:00 UTC")
    lease.settle(requests=4)
    assert used(limiter) == [7]
    limiter.reconfigure("12 RPD resets 14:00 UTC")
    assert available(limiter) == 5
    await asyncio.sleep(2 * 3_600)
    assert available(limiter) == 12
    lease = await limiter.acquire(requests=3)
    lease.settle(requests=2)
    limiter.reconfigure(rpd=12)
    assert available(limiter) == 10
    await asyncio.sleep(24 * 3_600 + 600)
    assert available(limiter) == 12


async def test_limit_lowered_below_the_days_use_owes_no_next_day(time: VirtualTime) -> None:
    limiter = limiter_of(time, Wall(time, "2026-06-01T12:00"), "10 RPD resets 18:00 UTC")
    lease = await limiter.acquire(requests=8)
    limiter.reconfigure("3 RPD resets 18:00 UTC")
    (await limiter.acquire(timeout=30_000)).release()
    assert time.now == pytest.approx(6 * 3_600)
    assert available(limiter) == 2
    lease.settle(requests=9)
    assert available(limiter) == 1


@pytest.mark.parametrize("kind", [Limiter, Pool])
async def test_returning_tenant_gets_nothing_anew(time: VirtualTime, kind: type[Limiter]) -> None:
    """A pool goes by the wall clock of its members."""
    wall = Wall(time, "2026-06-01T12:00")
    limiter = limiter_of(time, wall, "100 RPD", name="a")
    limiter = Pool(limiter) if kind is Pool else limiter
    limiter.per_key("5 RPD resets 00:00 UTC", alive=1)
    (await limiter.acquire(tenant="x", requests=5)).release()
    for name in "yzxyz":
        limiter.key(name)
    late = await start(limiter.acquire(tenant="x"))
    assert (await late).waited == pytest.approx(12 * 3_600)


def test_other_clocks_are_the_wall_clock_set_to_now(time: VirtualTime) -> None:
    limiter = Limiter("5 RPD resets 00:00 UTC", clock=time.clock)
    (use,) = limiter.statistics().limits
    assert use.resets_in is not None
    assert (datetime.now(UTC).timestamp() + use.resets_in + 60) % 86_400 < 120
    limiter.acquire_nowait(Cost(requests=5))
    time.advance(use.resets_in)
    limiter.acquire_nowait(Cost(requests=5))
    (now,) = Limiter("5 RPD resets 00:00 UTC").statistics().limits
    assert now.resets_in is not None
    with pytest.raises(TypeError, match=r"wall_clock must be a callable .* such as time\.time_ns"):
        Limiter(wall_clock=0)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("resets", [None, "00:00 UTC"])
def test_cost_above_a_learned_limit_waits_for_the_whole_of_it(resets: str | None) -> None:
    window = Window(Limit("tokens", 5, per="day", resets=resets))
    assert window.earliest(6, 0) == NEVER
    window.refuses = False
    assert window.earliest(6, 0) == 0
