"""A store that goes and comes back, on virtual time, never lets the limit be exceeded."""

import asyncio
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, Limit, Limiter, Pool
from asyncbucket.stores import LimitConfig
from asyncbucket.stores.outage import take_share
from asyncbucket.stores.state import State
from asyncbucket.testing import assert_never_over
from tests.stores.conftest import stop, take
from tests.stores.memory import MemoryStore

HOUR = 3_600_000_000_000
NOON = 12 * HOUR


@pytest.mark.parametrize("late", [0.05, 0.35, 0.8])
async def test_limiters_returning_after_outage_together_keep_the_limit(
    memory: MemoryStore, late: float
) -> None:
    admitted: list[tuple[float, int]] = []
    limit = "100 requests/10s burst 100"
    both = memory.limiters(2, limit)

    async def agent(limiter: Limiter, start: float) -> None:
        await asyncio.sleep(start)
        while True:
            async with limiter.acquire():
                admitted.append((memory.seconds, 1))

    for limiter in both:
        (await limiter.acquire()).release()
        admitted.append((memory.seconds, 1))
    await asyncio.sleep(22)
    memory.gone = True
    agents = [asyncio.ensure_future(agent(both[0], 0)) for _ in range(3)]
    agents += [asyncio.ensure_future(agent(both[1], late)) for _ in range(3)]
    await asyncio.sleep(1)
    assert len(admitted) == 2 + 100, "the shares were not used"
    memory.gone = False
    await asyncio.sleep(24)
    await stop(*agents)
    for limiter in both:
        await limiter.aclose()
    assert_never_over(admitted, "100 requests/10s burst 100")
    assert len(admitted) == 2 + 300, "not all was used afterwards"


@pytest.mark.parametrize(("policy", "passing"), [("open", 30), ("closed", 0)])
async def test_open_outage_policy_admits_all_and_closed_admits_none(
    memory: MemoryStore, policy: Any, passing: int
) -> None:
    limiter = memory.limiter("10/minute burst 2", on_outage=policy)
    (await limiter.acquire()).release()
    memory.gone = True
    calls = [asyncio.ensure_future(take(limiter)) for _ in range(30)]
    await asyncio.sleep(0.4)
    assert sum(each.done() for each in calls) == passing
    if policy == "closed":
        with pytest.raises(AcquireTimeout):
            await limiter.acquire(timeout=0.5)
    for each in calls:
        each.cancel()
    memory.gone = False
    await asyncio.sleep(3)
    assert (await memory.peek()).limits[0].used == min(1 + passing, 10), "it is full, no fuller"
    await limiter.aclose()


@pytest.mark.parametrize("policy", ["share", "closed"])
async def test_another_member_takes_what_a_lost_store_holds_up(
    memory: MemoryStore, policy: Any
) -> None:
    shared = memory.limiter("3 requests/9s burst 3", on_outage=policy)
    own = Limiter("99 RPM burst 99", name="own", concurrency=1, clock=memory.clock)
    pool = Pool(shared, own, prefer="first")
    for _ in range(3):
        await take(shared)
    await asyncio.sleep(2)
    memory.gone = True
    kept = await own.acquire()
    calls = [asyncio.ensure_future(take(pool)) for _ in range(9)]
    await asyncio.sleep(1)
    kept.release()
    await asyncio.wait_for(asyncio.gather(*calls), 1)
    memory.gone, kept = False, await own.acquire()
    await asyncio.wait_for(take(pool), 12)
    kept.release()
    await pool.aclose()


@pytest.mark.parametrize("limit", ["40 tokens/s", "40 tokens/s burst 4"])
async def test_shares_in_a_long_outage_together_keep_and_use_the_limit(
    memory: MemoryStore, limit: str
) -> None:
    admitted: list[tuple[float, int]] = []
    both = memory.limiters(2, limit)

    async def agent(limiter: Limiter) -> None:
        while True:
            async with limiter.acquire(tokens=1):
                admitted.append((memory.seconds, 1))
                await asyncio.sleep(0.01)

    agents = [asyncio.ensure_future(agent(limiter)) for limiter in both for _ in range(20)]
    await asyncio.sleep(1.6)
    memory.gone = True
    await asyncio.sleep(5)
    await stop(*agents)
    for limiter in both:
        await limiter.aclose()
    if "burst" not in limit:  # else the other took something since the store was last heard of
        assert_never_over(admitted, limit)
    assert_never_over([(when, units) for when, units in admitted if when > 1.7], limit)
    assert len(admitted) >= 5 * 40


def test_share_of_a_process_alone_counts_what_it_took_and_comes_back_at_the_reset() -> None:
    record = State(LimitConfig(limits=(Limit("tokens", 10, per="day", resets="00:00 UTC"),)))

    def earliest(tokens: int) -> int:
        return record.earliest({"tokens": tokens}, record.last_start)[0]

    record.book({"tokens": 1}, NOON)
    take_share(record, 2, (4,), NOON)
    assert earliest(2) == NOON
    assert earliest(3) == NOON + 12 * HOUR
    record.book({"tokens": 5}, NOON + 12 * HOUR)
    assert earliest(1) == NOON + 36 * HOUR
