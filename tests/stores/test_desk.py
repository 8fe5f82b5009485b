"""The desk between a line of calls and the store: few round trips, and what an outage does."""

import asyncio
import collections
import gc
import itertools
import logging
import random
import time
import warnings
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from asyncbucket.core.events import Event, StoreLost, StoreRecovered
from asyncbucket.core.limits import Limit
from asyncbucket.stores import Batch, Correction, Receipt, Terms, open_store
from asyncbucket.stores.desk import Desk
from asyncbucket.stores.orders import Orders
from asyncbucket.stores.starts import Reservation

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.stores.conftest import RunningServer

CALL = {"requests": 1, "concurrency": 1}


def terms(*limits: str, concurrency: int | None = None) -> Terms:
    """Read limits as people write them."""
    return Terms(limits=tuple(map(Limit.parse, limits)), concurrency=concurrency)


class Call:
    """A call that waits in a line."""

    def __init__(self, amounts: dict[str, int]) -> None:
        self.amounts = amounts
        self.admission: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        self.reservation: Reservation | None = None


class Fifo:
    """The simplest line."""

    def __init__(self) -> None:
        self.calls: collections.deque[Call] = collections.deque()
        #: The most calls that it shows at a time.
        self.most = 512

    def heads(self, most: int) -> Sequence[Call]:
        return tuple(itertools.islice(self.calls, min(most, self.most)))

    def book(self, waiter: Call, reservation: Reservation) -> None:
        self.calls.remove(waiter)
        waiter.reservation = reservation

    def admit(self, waiter: Call, reservation: Reservation) -> None:
        if not waiter.admission.done():
            waiter.admission.set_result(reservation)

    def refuse(self, waiter: Call, bound_by: str) -> None:
        self.calls.remove(waiter)
        waiter.admission.set_exception(ValueError(bound_by))

    def abandon(self, error: Exception) -> None:
        raise AssertionError from error


class Worker:
    """One worker: a desk, its line, and calls."""

    def __init__(self, desk: Desk[Call], line: Fifo, events: list[Event]) -> None:
        self.desk = desk
        self.line = line
        self.events = events

    def ask(self, amounts: dict[str, int] | None = None) -> Call:
        call = Call(dict(CALL if amounts is None else amounts))
        self.line.calls.append(call)
        self.desk.ring()
        return call

    async def acquire(self, amounts: dict[str, int] | None = None) -> Reservation:
        return await self.ask(amounts).admission

    def release(self, reservation: Reservation) -> None:
        if reservation.slot is not None:
            self.desk.release(reservation.slot)


@pytest.fixture
async def hire() -> AsyncIterator[Any]:
    """Open workers at a URL, and close all of them at the end."""
    workers: list[tuple[Worker, Any]] = []

    async def hire(url: str, terms: Terms, **options: Any) -> Worker:
        store = open_store(url)
        ledger = await store.open("desk", terms, slot_ttl=options.get("slot_ttl", 30.0))
        line, events = Fifo(), list[Event]()
        worker = Worker(Desk(ledger, line, emit=events.append, **options), line, events)
        workers.append((worker, store))
        return worker

    yield hire
    for worker, store in workers:
        await worker.desk.aclose()
        await store.aclose()


@pytest.fixture
async def url(shared_server: "RunningServer", redis: Any) -> str:
    """Return the URL of an empty server."""
    assert await redis.dbsize() == 0
    return shared_server.url


async def until(holds: "Callable[[], object]") -> None:
    """Wait for a condition, for some seconds."""
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - nothing signals this
            await asyncio.sleep(0.005)


async def scripts_run(redis: Any) -> int:
    """Return how many scripts the server has run, by its own count."""
    stats = await redis.info("commandstats")
    return sum(stats.get(f"cmdstat_{verb}", {"calls": 0})["calls"] for verb in ("evalsha", "eval"))


@pytest.mark.real_clock
@pytest.mark.parametrize("concurrency", [None, 60])
async def test_fifty_waiters_cost_at_most_one_round_trip_per_call(
    url: str, redis: Any, hire: Any, concurrency: int | None
) -> None:
    """This includes reservations, settlements and releases, by the server's own count."""
    worker = await hire(url, terms("100/s burst 10", concurrency=concurrency))
    admitted = 0

    async def agent() -> None:
        nonlocal admitted
        for _ in range(3):
            reservation = await worker.acquire()
            admitted += 1
            await asyncio.sleep(0.01)
            worker.desk.correct(Correction(start=reservation.booked_at, booked=CALL, used=CALL))
            worker.release(reservation)

    before = await scripts_run(redis)
    await asyncio.gather(*(agent() for _ in range(50)))
    assert admitted == 150
    assert await scripts_run(redis) - before <= admitted


@pytest.mark.real_clock
@pytest.mark.parametrize(("limit", "least"), [("1000/s", 500), ("100/s", 360)])
async def test_workers_short_of_slots_cost_at_most_one_round_trip_per_call(
    url: str, redis: Any, hire: Any, limit: str, least: int
) -> None:
    """Four workers share 50 slots among 100 agents, whether slots or the limit bind."""
    workers = [await hire(url, terms(f"{limit} burst 10", concurrency=50)) for _ in range(4)]
    chance = random.Random(1)
    end, admitted = time.monotonic() + 4, 0

    async def agent(worker: Worker) -> None:
        nonlocal admitted
        while time.monotonic() < end:
            reservation = await worker.acquire()
            admitted += 1
            await asyncio.sleep(chance.uniform(0.15, 0.45))
            worker.release(reservation)

    before = await scripts_run(redis)
    await asyncio.gather(*(agent(worker) for worker in workers * 25))
    assert admitted >= least
    assert await scripts_run(redis) - before <= admitted


@pytest.mark.real_clock
@pytest.mark.parametrize("kind", ["server", "file"])
async def test_workers_competing_for_a_limit_take_turns(
    kind: str, url: str, hire: Any, tmp_path: Path
) -> None:
    """A worker that was served goes behind those that wait, so none is served twice in a row."""
    where = url if kind == "server" else f"sqlite:///{tmp_path / 'limits.db'}?patience=5"
    workers = [await hire(where, terms("10/s burst 1", concurrency=50)) for _ in range(3)]
    went: list[tuple[int, Worker]] = []

    async def agent(worker: Worker) -> None:
        for _ in range(4):
            reservation = await worker.acquire()
            went.append((reservation.booked_at, worker))
            await asyncio.sleep(0.03)
            worker.release(reservation)

    await asyncio.gather(*(agent(worker) for worker in workers * 4))
    order = [worker for _, worker in sorted(went, key=lambda each: each[0])][3:]
    assert [one for one, next_one in itertools.pairwise(order) if one is next_one] == []


@pytest.mark.real_clock
async def test_worker_with_booked_calls_leaves_others_half_of_the_time_to_ask(
    tmp_path: Path, hire: Any
) -> None:
    """A worker that is some milliseconds late still finds units that are freed at once.

    Only a worker with a slow store asks earlier, so that its next calls are booked in time.
    """
    worker = await hire(f"sqlite:///{tmp_path / 'limits.db'}", terms("30 requests/s burst 30"))
    worker.line.most = 5
    trips: list[tuple[int, Receipt]] = []
    commit = worker.desk.ledger.commit

    async def timed(batch: Batch) -> Receipt:
        asked_at = time.monotonic_ns()
        receipt: Receipt = await commit(batch)
        trips.append((time.monotonic_ns() - asked_at, receipt))
        return receipt

    worker.desk.ledger.commit = timed
    await asyncio.gather(*(worker.acquire() for _ in range(60)))
    ahead = 0
    for (trip, receipt), (_, next_receipt) in itertools.pairwise(trips):
        left = max((booking.start for booking in receipt.bookings), default=0) - receipt.now
        ahead += left > 20_000_000
        margin = 10_000_000 + 2 * trip
        assert next_receipt.now - receipt.now >= min(left // 2, left - margin)
    assert ahead >= 2, "nothing was booked ahead"


@pytest.mark.real_clock
async def test_idle_acquire_takes_less_than_5_ms(url: str, hire: Any) -> None:
    """A lone call is sent at once, and its release does not delay the next."""
    worker = await hire(url, terms("10000/s burst 10000", concurrency=10))
    times: list[float] = []
    for _ in range(200):
        begun = time.perf_counter()
        reservation = await worker.acquire()
        times.append(time.perf_counter() - begun)
        worker.release(reservation)
    # The median is below 1 ms on a quiet machine; a busy one is allowed five times that.
    assert sorted(times)[100] < 0.005


async def test_released_slot_admits_call_of_another_worker(url: str, redis: Any, hire: Any) -> None:
    """A release in one worker admits the call that waits in another, without polling."""
    one = await hire(url, terms("1000/s", concurrency=1))
    two = await hire(url, terms("1000/s", concurrency=1))
    held = await one.acquire()
    waiting = two.ask()
    await asyncio.sleep(0.1)
    assert not waiting.admission.done()
    before = await scripts_run(redis)
    one.release(held)
    async with asyncio.timeout(0.5):
        two.release(await waiting.admission)
    assert await scripts_run(redis) - before <= 3


async def test_call_above_limit_is_refused_without_holding_up_the_next(url: str, hire: Any) -> None:
    """It learns which limit, and does not hold up the next."""
    worker = await hire(url, terms("10/s"))
    never, soon = worker.ask({"requests": 11}), worker.ask()
    with pytest.raises(ValueError, match="requests"):
        await never.admission
    await soon.admission


async def test_cancelled_call_returns_units_and_slot_booked_ahead(url: str, hire: Any) -> None:
    """A call given up between booking and start returns its units and its slot."""
    worker = await hire(url, terms("100 requests/minute burst 1", concurrency=5))
    await worker.acquire()
    late = worker.ask()
    await until(lambda: late.reservation)
    assert late.reservation is not None
    worker.desk.cancel(late, late.reservation)
    await asyncio.sleep(0.15)
    seen = await worker.desk.ledger.peek()
    assert (seen.limits[0].used, seen.slots) == (1, 1)


async def test_closing_desk_returns_bookings_that_have_not_started(url: str, hire: Any) -> None:
    """A worker that closes costs the others nothing."""
    one = await hire(url, terms("100 requests/minute burst 1", concurrency=5))
    two = await hire(url, one.desk.ledger.terms)
    await one.acquire()
    late = one.ask()
    await until(lambda: late.reservation)
    assert late.reservation is not None
    await one.desk.aclose()
    seen = await two.desk.ledger.peek()
    assert (seen.limits[0].used, seen.slots, seen.workers) == (1, 1, 1)


async def test_desk_takes_over_slots_and_bookings_of_closed_desk(url: str, hire: Any) -> None:
    """After its loop ended, what was booked ahead comes back, and held slots are kept alive."""
    one = await hire(url, terms("100 requests/minute burst 1", concurrency=5), slot_ttl=0.3)
    two = await hire(url, one.desk.ledger.terms, slot_ttl=0.3)
    held = await one.acquire()
    late = one.ask()
    await until(lambda: late.reservation)
    leftover = one.desk.leftover()
    await one.desk.aclose()

    two.desk.take_over(leftover)
    await asyncio.sleep(0.6)
    seen = await two.desk.ledger.peek()
    assert (seen.limits[0].used, seen.slots, seen.workers) == (1, 1, 1)
    two.release(held)
    await until(lambda: not two.desk.slots)
    await asyncio.sleep(0.1)
    assert (await two.desk.ledger.peek()).slots == 0


async def test_closing_desk_does_not_return_cancelled_booking_twice(url: str, hire: Any) -> None:
    """Otherwise the booking of another worker for the same instant would come back with it."""
    one = await hire(url, terms("3 requests/s burst 3"))
    two = await hire(url, one.desk.ledger.terms)
    for call in [
        two.ask() for _ in range(3)
    ]:  # in one batch, so that they come back at one instant
        await call.admission
    late, other = one.ask(), two.ask()
    await until(lambda: late.reservation and other.reservation)
    assert late.reservation is not None
    assert not late.admission.done()

    one.desk.cancel(late, late.reservation)
    await one.desk.aclose()

    await other.admission
    assert (await two.desk.ledger.peek()).limits[0].used == 1


async def test_terms_set_by_another_worker_are_reported(url: str, hire: Any) -> None:
    """The limiter above hears of limits that it did not set itself."""
    heard: list[Terms] = []
    one = await hire(url, terms("10/s"), orders=Orders(heard.append))
    two = await hire(url, terms("20/s"))
    await one.acquire()
    assert heard == [two.desk.ledger.terms]


async def test_only_the_longest_pause_is_sent_with_its_remaining_time(hire: Any, url: str) -> None:
    """Only what is left of the longest is sent; a shorter one afterwards is not."""
    worker = await hire(url, terms("10/s"))
    now = time.monotonic_ns()
    orders = Orders()
    for seconds in (1, 30, 2):
        orders.pause(now + seconds * 1_000_000_000, gradually=False)
    await orders.report(worker.desk.ledger, lambda: now + 10_000_000_000)
    orders.pause(now + 29_000_000_000, gradually=False)
    assert not orders
    snapshot = await worker.desk.ledger.peek()
    assert 19e9 < snapshot.paused_until - snapshot.now <= 20e9


@pytest.mark.real_clock
@pytest.mark.parametrize("fault", ["freeze", "kill"])
async def test_worker_goes_on_with_its_share_when_store_is_lost(
    start_server: "Callable[..., RunningServer]",
    hire: Any,
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker goes on with its share; each change is logged once and is one event."""
    caplog.set_level(logging.WARNING, logger="asyncbucket")
    server = start_server()
    workers = [await hire(server.url, terms("100/s burst 100", concurrency=8)) for _ in range(2)]
    await workers[0].desk.ledger.heartbeat([])
    for worker in workers:
        await worker.acquire()
        worker.desk._lifeline.workers = 2  # as the next heartbeat would tell
    getattr(server, fault)()
    begun = time.perf_counter()
    call = workers[0].ask()
    await call.admission
    assert time.perf_counter() - begun < 1.0
    assert call.reservation is not None
    assert call.reservation.booked_at == 0
    assert workers[0].desk.is_store_gone
    server.thaw() if fault == "freeze" else server.start()
    await until(lambda: not workers[0].desk.is_store_gone)
    kinds = [type(event) for event in workers[0].events]
    assert kinds == [StoreLost, StoreRecovered]
    lines = [record.getMessage() for record in caplog.records]
    assert sum("goes on with its share, 1 of 2" in line for line in lines) == 1
    assert (
        sum("is back after" in line and line.endswith("without it: 1 requests") for line in lines)
        == 1
    )
    seen = await workers[0].desk.ledger.peek()
    assert seen.slots >= 1, "the slot given out meanwhile was not registered"


@pytest.mark.real_clock
async def test_worker_shares_without_store_together_keep_the_limit(
    start_server: "Callable[..., RunningServer]", hire: Any
) -> None:
    """Without the store two workers admit half of the limit each, and a full window stays full.

    Each knows of the other, though both have only just begun.
    """
    server = start_server()
    both = [await hire(server.url, terms("40 tokens/s")) for _ in range(2)]
    call = {"tokens": 1}
    times: list[float] = []

    async def agent(worker: Worker) -> None:
        while True:
            await worker.acquire(call)
            times.append(time.perf_counter())

    agents = [asyncio.create_task(agent(worker)) for worker in both for _ in range(30)]
    await asyncio.sleep(0.6)
    server.kill()
    await asyncio.sleep(2.6)
    for task in agents:
        task.cancel()
    await asyncio.gather(*agents, return_exceptions=True)
    busiest = max(sum(first <= each < first + 0.99 for each in times) for first in times)
    assert busiest <= 40
    assert len(times) >= 40 + 40, "the shares were not used"


@pytest.mark.parametrize(("policy", "passing"), [("open", 30), ("closed", 0)])
async def test_open_outage_policy_admits_all_and_closed_admits_none(
    start_server: "Callable[..., RunningServer]", hire: Any, policy: str, passing: int
) -> None:
    """Which is right depends on whom a refusal hurts, so the user chooses."""
    server = start_server()
    worker = await hire(server.url, terms("10/minute burst 2"), on_outage=policy)
    await worker.acquire()
    server.kill()
    calls = [worker.ask() for _ in range(30)]
    await asyncio.sleep(0.4)
    assert sum(call.admission.done() for call in calls) == passing
    server.start()
    await until(lambda: not worker.desk.is_store_gone)
    if passing:
        await asyncio.sleep(0.1)
        assert (await worker.desk.ledger.peek()).limits[0].available <= -20, "no debt was told"


async def test_desk_closed_before_it_starts_gives_no_warning(tmp_path: Path) -> None:
    """Its tasks are cancelled before they start, without a warning of coroutines never awaited."""
    store = open_store(f"sqlite:///{tmp_path / 'limits.db'}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        desk = Desk(await store.open("desk", terms("3 requests/s"), slot_ttl=30.0), Fifo())
        await desk.aclose()
        del desk
        gc.collect()
    await store.aclose()
    assert not told
