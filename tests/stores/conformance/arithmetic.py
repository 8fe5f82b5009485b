"""Scenarios of limits: the store answers like the meters, whichever worker asks."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING

from asyncbucket.core.limits import Limit
from asyncbucket.stores.store import FAR, Batch, Correction, Ledger, Outcome
from asyncbucket.testing.assertions import assert_never_over

from .history import CONFIGS, History
from .place import (
    MILLISECOND,
    SECOND,
    Place,
    Suite,
    amount_of,
    batch,
    book_all,
    booked,
    config,
    outcomes,
    scenario,
)

if TYPE_CHECKING:
    from asyncbucket.core.meters import Amounts


class Arithmetic(Suite):
    """Test what is booked when."""

    @scenario
    async def test_random_history_matches_the_reference(self, place: Place) -> None:
        for seed, limits in enumerate(CONFIGS):
            name = f"{place.name}-{seed}"
            workers = [await place.worker(limits, name=name) for _ in range(3)]
            receipts = [await worker.commit(Batch(calls=None)) for worker in workers]
            history = History(seed, limits, receipts[0].now, life=30 * SECOND)
            for worker, receipt in zip(workers, receipts, strict=True):
                history.state.apply(
                    worker.worker, Batch(calls=None), receipt.now, life=history.life
                )
            for _ in range(60):
                worker = history.random.choice(workers)
                asked = history.batch(worker.worker)
                history.check(worker, asked, await worker.commit(asked))
                await asyncio.sleep(history.random.choice([0, 0, 0.001, 0.01]))

    @scenario
    async def test_workers_together_never_exceed_a_limit(self, place: Place) -> None:
        requests, tokens = amount_of("requests", 60, 0.5, 10), amount_of("tokens", 2_000, 0.3)
        limits = config(requests, tokens)
        trace: list[tuple[int, Amounts]] = []

        async def work(worker: Ledger, random: Random) -> None:
            for _ in range(15):
                calls = [{"requests": 1, "tokens": random.randint(1, 90)} for _ in range(4)]
                bookings = await book_all(worker, *calls)
                trace.extend(
                    (booking.start, call) for booking, call in zip(bookings, calls, strict=True)
                )

        workers = [await place.worker(limits) for _ in range(3)]
        await asyncio.gather(*(work(worker, Random(seed)) for seed, worker in enumerate(workers)))
        for limit in limits.limits:
            busiest = assert_never_over(
                [(when, amounts[limit.resource]) for when, amounts in trace], limit
            )
            assert busiest.amount > limit.amount // 2, f"hardly used: {busiest}"

    @scenario
    async def test_newcomer_does_not_pass_a_waiting_call(self, place: Place) -> None:
        limits = config(amount_of("requests", 100, 1), amount_of("tokens", 100, 0.8))
        first, second = [await place.worker(limits) for _ in range(2)]
        await first.commit(batch({"requests": 1, "tokens": 100}))
        receipt = await first.commit(batch({"requests": 1, "tokens": 50}))
        assert receipt.bookings[0].outcome is Outcome.LATER
        assert receipt.bookings[0].bound_by == "tokens"
        receipt = await second.commit(batch({"requests": 1}))
        assert receipt.bookings[0].outcome is Outcome.LATER
        then, behind = await asyncio.gather(
            book_all(first, {"requests": 1, "tokens": 50}), book_all(second, {"requests": 1})
        )
        assert then[0].start <= behind[0].start
        assert then[0].bound_by == "tokens"

    @scenario
    async def test_refund_is_told_to_waiting_worker_and_admits_its_call(self, place: Place) -> None:
        limits = config(amount_of("tokens", 1_000, 60))
        first, second = [await place.worker(limits) for _ in range(2)]
        start = booked(await first.commit(batch({"tokens": 900})))[0].start
        receipt = await second.commit(batch({"tokens": 800}))
        assert receipt.bookings[0].outcome is Outcome.LATER
        notified = asyncio.create_task(second.changed(timeout=30))
        used = Correction(start=start, booked={"tokens": 900}, used={"tokens": 100})
        await first.commit(Batch(corrections=(used,)))
        assert await notified
        receipt = await second.commit(batch({"tokens": 800}))
        assert booked(receipt)[0].start == receipt.now

    @scenario
    async def test_store_says_from_when_on_a_call_can_start_whatever_comes_back(
        self, place: Place
    ) -> None:
        limits = config(amount_of("tokens", 1_000, 60))
        first, second = [await place.worker(limits) for _ in range(2)]
        call = {"tokens": 900, "concurrency": 1}
        start = booked(await first.commit(batch(call)))[0].start
        for held in (1, 0):  # open, it may give all back
            await first.commit(Batch(held=held))
            receipt = await second.commit(batch(call))
            assert outcomes(receipt) == ["later"]
            assert receipt.soonest == (receipt.now if held else receipt.ask_at + FAR)
        assert 60 <= (receipt.soonest - start) / SECOND < 61
        await first.commit(Batch(held=1, pause=90 * SECOND))
        receipt = await second.commit(batch(call))
        assert 89 < (receipt.soonest - receipt.now) / SECOND <= 90

    @scenario
    async def test_limit_of_the_calendar_comes_back_when_it_resets(self, place: Place) -> None:
        at = datetime.now(UTC) + timedelta(hours=12)
        limit = Limit("tokens", 10, per="day", resets=f"{at:%H:%M} UTC")
        first, second = [await place.worker(config(limit)) for _ in range(2)]
        booked(await first.commit(batch({"tokens": 10})))
        receipt = await second.commit(batch({"tokens": 1}))
        assert receipt.bookings[0].outcome is Outcome.LATER
        left = limit.resets_in(time.time_ns())
        assert left is not None
        assert abs((receipt.ask_at + FAR - receipt.now) / SECOND - left) < 2

    @scenario
    async def test_call_above_the_burst_earns_the_rest_as_first_in_line(self, place: Place) -> None:
        worker = await place.worker(config(amount_of("requests", 500, 10, 10)))
        began = (await worker.commit(Batch())).now
        (booking,) = await book_all(worker, {"requests": 30})
        assert 400 * MILLISECOND <= booking.start - began < 800 * MILLISECOND
        assert booking.bound_by == "requests"

    @scenario
    async def test_several_dead_workers_in_line_delay_others_no_longer_than_one(
        self, place: Place
    ) -> None:
        limits = config(amount_of("tokens", 100, 0.5))
        *dead, living = [await place.worker(limits) for _ in range(5)]
        began = (await living.commit(batch({"tokens": 100}))).now
        for worker in dead:
            assert outcomes(await worker.commit(batch({"tokens": 1}))) == ["later"]
        receipt = await living.commit(batch({"tokens": 1}))
        assert receipt.ask_at < began + 3 * SECOND, "0.5 s for each"
        await book_all(living, {"tokens": 1})

    @scenario
    async def test_call_books_its_whole_cost_or_nothing(self, place: Place) -> None:
        limits = config(amount_of("requests", 10, 60), amount_of("tokens", 100, 60))
        worker = await place.worker(limits)
        calls: list[Amounts] = [
            {"requests": 1, "tokens": 101},
            {"requests": 1, "tokens": 100},
            {"requests": 1, "tokens": 1},
            {"requests": 11},
        ]
        receipt = await worker.commit(batch(*calls, horizon=0))
        outcomes = [booking.outcome for booking in receipt.bookings]
        assert outcomes == [Outcome.NEVER, Outcome.BOOKED, Outcome.LATER, Outcome.NEVER]
        assert [receipt.bookings[0].bound_by, receipt.bookings[3].bound_by] == [
            "tokens",
            "requests",
        ]
        used = {use.limit.resource: use.used for use in (await worker.peek()).limits}
        assert used == {"requests": 1, "tokens": 100}

    @scenario
    async def test_calls_beyond_the_horizon_must_ask_again(self, place: Place) -> None:
        worker = await place.worker(config(amount_of("requests", 1_000, 10, 1)))
        horizon = 30 * MILLISECOND
        receipt = await worker.commit(batch(*[{"requests": 1}] * 9, horizon=horizon))
        starts = [
            booking.start for booking in receipt.bookings if booking.outcome is Outcome.BOOKED
        ]
        assert [start - starts[0] for start in starts] == [0, *range(10**7, 31 * 10**6, 10**7)]
        assert receipt.now <= receipt.ask_at <= starts[-1]
        (use,) = (await worker.peek()).limits
        assert use.available <= 0, "nothing passes before the last start"

    @scenario
    async def test_enormous_debt_or_pause_does_not_break_the_store(self, place: Place) -> None:
        for power in (15, 20, 400):
            name = f"{place.name}-{power}"
            worker = await place.worker(config(amount_of("tokens", 100, 86_400, 1)), name=name)
            start = booked(await worker.commit(batch({"tokens": 1})))[0].start
            debt = Correction(start=start, booked={"tokens": 1}, used={"tokens": 10**power})
            await worker.commit(Batch(corrections=(debt,)))
            await worker.commit(Batch(calls=None, pause=10 ** min(power, 25)))
            for _ in range(2):
                receipt = await worker.commit(batch({"tokens": 1}))
                assert receipt.bookings[0].outcome is Outcome.LATER
                assert receipt.ask_at > receipt.now + 86_400 * SECOND

    @scenario
    async def test_cancelled_commit_leaves_nothing_booked(self, place: Place) -> None:
        worker = await place.worker(config(amount_of("requests", 1_000, 600), concurrency=1_000))
        held = 0
        for steps in range(30):
            call = batch({"requests": 1, "concurrency": 1})
            task = asyncio.create_task(worker.commit(call))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            (answer,) = await asyncio.gather(task, return_exceptions=True)
            held += not isinstance(answer, BaseException)
        await worker.commit(Batch(calls=None))
        snapshot = await worker.peek()
        assert (snapshot.limits[0].used, snapshot.slots) == (held, held)
