"""What the limiters of several processes do at one store, on virtual time: order, shares, changes, errors."""

import asyncio
import random
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, Cost, Limit, Limiter, Pool, StoreError, WouldBlock, agent
from asyncbucket.engine.events import Event, LimitChanged
from asyncbucket.http import OPENAI
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.testing import assert_never_over
from tests.stores.conftest import stop, take
from tests.stores.memory import MemoryStore


async def test_calls_of_agents_go_to_the_store_in_their_order(memory: MemoryStore) -> None:
    limiter = memory.limiter("60 requests/s burst 1")
    await take(limiter)
    limiter.pause(0.3)
    passed: list[str] = []

    async def call(name: str) -> None:
        async with limiter.acquire():
            passed.append(name)

    async def run(name: str, calls: int) -> None:
        with agent(name, expects=Cost(requests=calls)):
            await asyncio.gather(*(call(name) for _ in range(calls)))

    await asyncio.gather(run("a", 5), run("b", 2), run("c", 3))
    assert "".join(passed) == "bbcccaaaaa"


async def test_urgent_call_overtakes_calls_waiting_for_store(memory: MemoryStore) -> None:
    limiter = memory.limiter("20/s burst 1")
    waiting = [asyncio.ensure_future(take(limiter, priority=2)) for _ in range(60)]
    await asyncio.sleep(0.3)
    await take(limiter, priority=0)
    assert sum(each.done() for each in waiting) < 20
    await stop(*waiting)


@pytest.mark.parametrize(
    ("limits", "agents", "hold", "rate", "trips"),
    [
        (("200 requests/2s burst 20", "1M TPM"), 15, (0.05, 0.05), 100, 0.75),
        (("1000/s burst 1000",), 25, (0.15, 0.45), 50 / 0.3, 1.5),
    ],
    ids=["units", "slots"],
)
async def test_processes_use_the_limit_in_equal_parts_with_few_trips(
    memory: MemoryStore,
    limits: tuple[str, ...],
    agents: int,
    hold: tuple[float, float],
    rate: float,
    trips: float,
) -> None:
    chance, limiters = random.Random(0), memory.limiters(4, *limits, concurrency=50)
    went: list[list[tuple[float, int]]] = [[] for _ in limiters]

    async def work(number: int) -> None:
        while True:
            async with limiters[number].acquire(tokens=100) as lease:
                went[number].append((memory.seconds, 1))
                await asyncio.sleep(chance.uniform(*hold))
                lease.settle(tokens=50)

    tasks = [asyncio.ensure_future(work(number)) for number in range(4) for _ in range(agents)]
    await asyncio.sleep(12)
    await stop(*tasks)
    every = sorted(each for of_one in went for each in of_one)
    if rate == 100:
        late = Limit("requests", 202, per=2, burst=22)  # a call leaves up to 10 ms after its start
        assert_never_over(every, late)
    assert len(every) >= 0.97 * 12 * rate
    shares = [len(each) for each in went]
    assert max(shares) - min(shares) <= 0.1 * max(shares), shares
    assert memory.trips <= trips * len(every)


async def test_calls_that_are_booked_count_for_the_share_of_their_process_until_they_start(
    memory: MemoryStore,
) -> None:
    """Else who comes again while they wait stands behind those who have stayed in line."""
    limiters = memory.limiters(8, "100 requests/s burst 1")

    async def work(limiter: Limiter) -> None:
        while True:
            await take(limiter)

    tasks = [asyncio.ensure_future(work(each)) for each in limiters for _ in range(5)]
    for _ in range(20):
        await asyncio.sleep(0.1)
        workers = memory.states["openai"].workers.values()
        assert {each.weight for each in workers if each.need is not None} == {5}
    await stop(*tasks)


@pytest.mark.parametrize("late", [0.2, 0.75])
async def test_late_call_counts_from_then_on_and_once(memory: MemoryStore, late: float) -> None:
    """By less than a quarter of the window its booking is moved; by more it is booked again."""
    one, two = memory.limiters(2, "2 requests/s burst 2")
    await asyncio.gather(take(one), take(one))
    call = asyncio.ensure_future(take(one))
    await asyncio.sleep(0.95)
    memory.clock.advance(0.05 + late)
    await call
    assert memory.seconds == pytest.approx(1 + late, abs=0.05)
    await take(two)
    assert memory.seconds == pytest.approx(1 + late, abs=0.05)
    await take(two)
    assert memory.seconds == pytest.approx(2 + late, abs=0.05)


async def test_units_freed_at_once_are_shared_by_waiting_limiters(memory: MemoryStore) -> None:
    limiters = memory.limiters(3, "60 requests/s burst 60")
    await asyncio.gather(*(take(limiters[0]) for _ in range(60)))
    calls = [[asyncio.ensure_future(take(each)) for _ in range(40)] for each in limiters]
    await asyncio.sleep(1.5)
    shares = [sum(call.done() for call in of_one) for of_one in calls]
    assert sum(shares) == 60
    assert min(shares) >= 15, shares
    await stop(*(call for of_one in calls for call in of_one))


async def test_timed_out_call_does_not_hold_up_other_limiters(memory: MemoryStore) -> None:
    one, two = memory.limiters(2, "1000 tokens/minute", concurrency=5)
    lease = await one.acquire(tokens=900)
    with pytest.raises(AcquireTimeout, match=r"tokens bind for 60(\.\d)? s more") as error:
        await one.acquire(tokens=500, timeout=0.1)
    assert error.value.bound_by == "tokens"
    await take(two, tokens=50, timeout=0.1)
    lease.release()
    await one.aclose()
    await two.aclose()
    seen = await memory.peek()
    assert (seen.limits[0].used, seen.slots, seen.workers) == (950, 0, 0)


async def test_call_that_cannot_start_in_time_fails_at_once(memory: MemoryStore) -> None:
    """Unless a call is open whose refund may let it start; and also behind one that waits for ever."""
    one, two = memory.limiters(2, "10 tokens/day")
    lease = await one.acquire(tokens=10)
    hopeful = asyncio.ensure_future(two.acquire(tokens=5, timeout=9))
    patient = asyncio.ensure_future(two.acquire(tokens=5))
    await asyncio.sleep(5)
    lease.settle(tokens=5)
    lease.release()
    (await hopeful).release()
    await asyncio.sleep(2)
    now = memory.seconds
    for tokens, wait in ((5, 600), (6, 80_000)):
        with pytest.raises(AcquireTimeout, match=r"tokens bind for 86,\d+ s more") as error:
            await two.acquire(tokens=tokens, timeout=wait)
        assert error.value.retry_after == pytest.approx(86_400 + 506.25 - now, abs=6)
    assert memory.seconds < now + 0.01
    one.reconfigure("30 tokens/day")
    await asyncio.sleep(0.1)
    await take(two, tokens=6, timeout=5)
    assert patient.done()


async def test_slow_answer_refuses_no_call_that_can_start_in_time(memory: MemoryStore) -> None:
    limiter = memory.limiter("1 request/10s")
    await take(limiter)
    await asyncio.sleep(1.1)  # until the store has heard that it is over
    memory.late = 0.5
    call = asyncio.ensure_future(take(limiter, timeout=9.3))
    await asyncio.sleep(1)
    memory.late = 0
    await call


async def test_errors_say_when_other_limiters_hold_all_slots(memory: MemoryStore) -> None:
    one, two = memory.limiters(2, "1000 RPM", concurrency=1)
    with pytest.raises(WouldBlock, match="the store that keeps its limits has to be asked") as told:
        one.acquire_nowait()
    assert told.value.retry_after is None
    async with one.acquire():
        with pytest.raises(AcquireTimeout, match="all slots are taken") as error:
            await two.acquire(timeout=1)
    assert (error.value.bound_by, error.value.retry_after) == ("concurrency", None)


async def test_closing_fails_waiting_calls_with_store_error(memory: MemoryStore) -> None:
    limiter = memory.limiter("20/s burst 1")
    await take(limiter)
    calls = [asyncio.ensure_future(take(limiter)) for _ in range(60)]
    await asyncio.sleep(0.02)
    await limiter.aclose()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    told = [error for error in ended if error is not None]
    assert all(isinstance(error, StoreError) for error in told)
    assert "was closed while this call waited: close it when all calls" in str(told[0])
    seen = await memory.peek()
    assert (seen.limits[0].used, seen.workers) == (1 + len(calls) - len(told), 0)


async def test_statistics_after_closing_count_all_that_was_settled(memory: MemoryStore) -> None:
    limiter = memory.limiter("100 TPM")
    async with limiter.acquire(tokens=10) as lease:
        lease.settle(tokens=4)
    await limiter.aclose()
    assert limiter.statistics().limits[0].used == 4


async def test_call_that_comes_while_a_limiter_closes_lets_closing_end(memory: MemoryStore) -> None:
    memory.delay = 1
    limiter = memory.limiter("10 RPM")
    await take(limiter)
    closing = asyncio.ensure_future(limiter.aclose())
    await asyncio.sleep(0.5)
    await take(limiter)
    await asyncio.wait_for(closing, 10)


async def test_call_in_flight_when_its_limiter_is_closed_keeps_its_slot_and_gives_it_back(
    memory: MemoryStore,
) -> None:
    one, two = memory.limiters(2, "1000 TPM", concurrency=1, slot_ttl=0.3)
    lease = await one.acquire(tokens=800)
    await one.aclose()
    waiting = asyncio.ensure_future(take(two, tokens=800))
    await asyncio.sleep(3)
    assert not waiting.done()
    lease.settle(tokens=100)
    lease.release()
    await asyncio.wait_for(waiting, 0.5)
    lease.settle(tokens=50)  # when it has left; told when it is used again
    await take(one, tokens=10)
    for limiter in (one, two):
        await limiter.aclose()
    seen = await memory.peek()
    assert (seen.limits[0].used, seen.slots, seen.workers) == (860, 0, 0)


@pytest.mark.parametrize(("behind", "delay"), [(0, 0.001), (1, 0.001), (0, 0.15), (1, 0.15)])
@pytest.mark.parametrize(("limit", "slots"), [("1000 TPM", None), ("1M TPM", 1)])
async def test_cancelled_call_does_not_hold_up_calls_behind_it(
    memory: MemoryStore, limit: str, slots: int | None, behind: int, delay: float
) -> None:
    memory.delay = delay  # so long that it is cancelled while its batch is in flight
    limiter = memory.limiter(limit, concurrency=slots)
    lease = await limiter.acquire(tokens=900)
    costly = asyncio.ensure_future(limiter.acquire(tokens=500))
    await asyncio.sleep(0.1)
    calls = [asyncio.ensure_future(take(limiter, tokens=1)) for _ in range(behind)]
    await stop(costly)
    await asyncio.sleep(0.1 + 3 * delay)
    if slots is not None:
        lease.release()
    await asyncio.gather(*calls, take(limiter, tokens=1))
    assert memory.seconds < 2


async def test_pause_and_new_limits_apply_to_all_limiters_on_store(memory: MemoryStore) -> None:
    one, two = memory.limiters(2, "1000 RPM burst 100", concurrency=9)
    told: list[Event] = []
    two.observe(told.append)
    await asyncio.gather(take(one), take(two))
    one.pause(0.6, reason="429")
    await asyncio.sleep(0.1)
    lease = await two.acquire()
    lease.release()
    assert lease.waited == pytest.approx(0.5, abs=0.01)
    assert lease.bound_by == "paused"
    one.reconfigure("5 RPM burst 5", concurrency=5)
    await asyncio.sleep(11)  # two hears of it by a sign of life
    for _ in range(2):  # three were admitted before
        await take(two, timeout=0.5)
    with pytest.raises(AcquireTimeout):
        await two.acquire(timeout=0.5)
    assert two.limits == one.limits
    changes = [event.limit for event in told if isinstance(event, LimitChanged)]
    assert changes == ["5 requests per 60 s", "concurrency 5"]


async def test_limit_dropped_by_another_limiter_no_longer_applies(memory: MemoryStore) -> None:
    """A limiter that is given no limits drops none, not even if it is the first after a loss of data."""
    one = memory.limiter("100 RPM burst 100", "10 TPM", concurrency=2)
    await take(one)
    two = memory.limiter("100 RPM burst 100")
    for limiter in (two, one):
        await take(limiter)
    assert one.limits == two.limits == (Limit("requests", 100, burst=100),)
    assert one.concurrency is None
    await take(one, tokens=11)
    for _ in range(2):
        none = memory.limiter(concurrency=3)
        for limiter in (none, one):
            await take(limiter)
        await asyncio.sleep(11)
        assert none.limits == one.limits == (Limit("requests", 100, burst=100),)
        assert one.concurrency == 3
        memory.states.clear()


async def test_what_is_set_while_the_store_is_told_comes_next(memory: MemoryStore) -> None:
    memory.delay = 0.1
    limiter = memory.limiter("9 RPM burst 9")
    await take(limiter)
    for amount, pause in ((5, 2), (7, 3), (8, 1)):  # the last pause ends earlier
        limiter.reconfigure(f"{amount} RPM burst {amount}")
        limiter.pause(pause)
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    seen = await memory.peek()
    assert seen.config.limits == limiter.limits == (Limit("requests", 8, burst=8),)
    assert 2.2 < (seen.paused_until - seen.now) * 1e-9 < 2.8


async def test_remaining_headers_count_only_for_limits_of_a_child(memory: MemoryStore) -> None:
    limiter = memory.limiter("600 RPM burst 600")
    child = limiter.child("chat", "300 RPM burst 300")
    await take(child)
    for each, limit, binds in ((limiter, b"600", None), (child, b"300", "requests")):
        left = (b"x-ratelimit-remaining-requests", b"0"), (b"x-ratelimit-limit-requests", limit)
        HeaderReader(each).read([*left], OPENAI, since=limiter.now())
        assert child.explain().bound_by == binds
        assert limiter.explain().bound_by is None


async def test_call_above_a_learned_limit_goes_out_alone(memory: MemoryStore) -> None:
    """A newcomer keeps what was learned, any process corrects it, and limits that are given replace it."""
    one, two = memory.limiters(2)
    await asyncio.gather(take(one), take(two))
    one.learn(Limit("tokens", 100, per=60))
    await take(one, tokens=10)
    lease = await two.acquire(tokens=250)
    assert memory.seconds == pytest.approx(60, abs=1), "not alone"
    await asyncio.sleep(0.1)
    assert (await memory.peek()).limits[0].used == 250
    await take(one, tokens=100)
    assert memory.seconds == pytest.approx(210, abs=2), "the debt was not paid in full"
    lease.settle(tokens=10)
    three = memory.limiter(concurrency=9)
    await take(three, tokens=500, timeout=100)
    assert three.limits == two.limits == (Limit("tokens", 100, per=60),)
    three.learn(Limit("tokens", 5_000, per=60))
    await take(three, tokens=4_000)
    await asyncio.sleep(11)  # the others hear of it by a sign of life
    assert one.limits == two.limits == (Limit("tokens", 5_000, per=60),)
    await take(memory.limiter("900 TPM"))
    one.learn(Limit("tokens", 9_000, per=60))  # before it has heard that somebody gave a limit
    await asyncio.sleep(11)
    assert one.limits == two.limits == (Limit("tokens", 900, per=60),)
    assert memory.trips < 100


async def test_explanation_uses_last_answer_of_store(memory: MemoryStore) -> None:
    limiter = memory.limiter("9 RPM burst 9", "1000 TPM", concurrency=2)
    lease = await limiter.acquire(tokens=900)
    assert str(limiter.explain(tokens=100)).startswith("a call would pass at once; ")
    short = limiter.explain(tokens=101)
    assert (short.wait, short.bound_by) == (None, "tokens")
    other = await limiter.acquire(tokens=1)
    assert "concurrency 2/2" in repr(limiter)
    assert "would wait until a slot is given back" in str(limiter.explain(tokens=1))
    call = asyncio.create_task(take(limiter, tokens=200))
    for bound_by, wait in (("concurrency", None), ("tokens", pytest.approx(60, abs=1))):
        await asyncio.sleep(0.1)
        held = limiter.explain(tokens=1)
        assert (held.bound_by, held.wait) == (bound_by, wait)
        other.release()
    await stop(call)
    lease.release()


async def test_child_limits_hold_when_calls_leave_the_store_line(memory: MemoryStore) -> None:
    limiter = memory.limiter("100 tokens/s")
    await take(limiter, tokens=100)
    child = limiter.child("child", "10 requests/s burst 2")
    trace = child.trace(last=12)
    await asyncio.gather(*(take(child, tokens=1) for _ in range(12)))
    left = trace.amounts("requests")
    assert_never_over(left, "10 requests/s burst 2")
    assert left[-1][0] - left[0][0] < 1_100_000_000, "left idle"


async def test_last_settlement_determines_what_a_call_used(memory: MemoryStore) -> None:
    limits = ("100 tokens/minute", "9 images/minute")
    limiter = memory.limiter(*limits)

    async def available(*left: int) -> None:
        await asyncio.sleep(0.1)  # the store is told by and by
        assert tuple(use.available for use in limiter.statistics().limits) == left

    lease: Any = await limiter.acquire(tokens=10)
    lease.settle(tokens=130, images=4)
    await available(-30, 5)
    lease.settle(tokens=20)
    lease.settle(tokens=40, images=1)
    await available(60, 8)
    lease.settle(tokens=5)
    await available(95, 8)
    lease._undo()
    await available(100, 9)


async def test_pools_of_several_processes_share_the_members_in_a_store(memory: MemoryStore) -> None:
    """Two pools with members of the same names: the sum of the limits is used, and none is exceeded."""
    rates = {"a": 30, "b": 60}
    took: dict[str, list[tuple[float, int]]] = {name: [] for name in rates}

    async def call(pool: Pool) -> None:
        async with pool.acquire() as lease:
            took[lease.limiter.name].append((memory.seconds, 1))

    pools: list[Pool] = []
    for _ in range(2):
        limits = [(f"{rate} requests/s burst {rate // 10}", name) for name, rate in rates.items()]
        members = [memory.limiter(limit, name=name) for limit, name in limits]
        pools.append(Pool(*members))
    await asyncio.gather(*(call(pool) for pool in pools for _ in range(90)))
    assert memory.seconds < 1.1 * (180 - 9) / 90
    for name, rate in rates.items():
        assert len(took[name]) == pytest.approx(180 * rate / 90, rel=0.1)
        assert_never_over(took[name], Limit("requests", rate, per=1, burst=rate // 10 + 1))
    for pool in pools:
        assert (pool.statistics().waiting, pool.statistics().in_flight) == (0, 0)


@pytest.mark.parametrize("seconds", [(600, 13), (13, 600)])
async def test_call_at_two_stores_goes_to_the_first_with_units(
    memory: MemoryStore, seconds: tuple[int, int]
) -> None:
    members = [memory.limiter(f"1 request/{each}s", name=str(each)) for each in seconds]
    for member in members:
        await take(member)
    memory.trips = 0
    await take(Pool(*members))
    assert memory.seconds < 13.2
    assert memory.trips < 30, "it goes from one to the other again and again"


async def test_calls_of_a_pool_fail_only_with_what_happens_later(memory: MemoryStore) -> None:
    member = memory.limiter("1000 RPM burst 1000")
    for _ in range(3):
        await take(member)
    pool = Pool(member)
    await member.aclose()
    await take(pool)
    await member.aclose()
    memory.gone = True
    for _ in range(3):
        with pytest.raises(StoreError, match="the store is gone"):
            await take(pool, timeout=1)
