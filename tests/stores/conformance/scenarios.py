"""The scenarios: what is booked when, who holds a slot and is next, and what concerns all workers."""

import asyncio
from dataclasses import replace

from asyncbucket.stores.store import Batch, Correction, Ledger, LimitConfig, Store

from .history import CONFIGS, History
from .place import (
    MILLISECOND,
    SECOND,
    Place,
    amount_of,
    batch,
    book,
    booked,
    config,
    outcomes,
    peek,
    scenario,
    turn,
)

_REQUEST = {"requests": 1}
_CALL = {"requests": 1, "concurrency": 1}
_ROOMY = amount_of("requests", 10_000, 600)


async def _take_slots(worker: Ledger, count: int) -> None:
    assert len(booked(await worker.commit(batch(*[_CALL] * count)))) == count


async def _holding(place: Place, *held: int, concurrency: int = 1) -> list[Ledger]:
    """Open workers that hold so many slots each."""
    workers = await place.workers(config(_ROOMY, concurrency=concurrency), len(held))
    for worker, count in zip(workers, held, strict=True):
        await _take_slots(worker, count)
    return workers


async def _find_no_slot(*workers: Ledger) -> None:
    for worker in workers:
        assert outcomes(await worker.commit(batch(_CALL))) == ["later"]


class StoreConformance:
    """Test a store: override `make_store`."""

    def make_store(self) -> Store:
        raise NotImplementedError("say which store is tested: override make_store()")

    # --- what is booked when ---

    @scenario
    async def test_random_history_matches_the_reference(self, place: Place) -> None:
        for seed, limits in enumerate(CONFIGS):
            workers = [await place.worker(limits, name=f"{place.name}-{seed}") for _ in range(3)]
            receipts = [await worker.commit(Batch()) for worker in workers]
            history = History(seed, limits, receipts[0].now, life=30 * SECOND)
            joined = receipts[-1].now - receipts[-1].steady
            for worker, receipt in zip(workers, receipts, strict=True):
                history.state.apply(worker.worker, Batch(), receipt.now, life=history.life)
            history.state.grown = joined
            for _ in range(60):
                worker = history.random.choice(workers)
                asked = history.batch(worker.worker)
                history.check(worker, asked, await worker.commit(asked))
                await asyncio.sleep(history.random.choice([0, 0, 0.001, 0.01]))

    @scenario
    async def test_newcomer_does_not_pass_a_waiting_call(self, place: Place) -> None:
        limits = config(amount_of("requests", 100, 1), amount_of("tokens", 100, 0.8))
        first, second = await place.workers(limits, 2)
        await first.commit(batch({"requests": 1, "tokens": 100}))
        receipt = await first.commit(batch({"requests": 1, "tokens": 50}))
        assert (outcomes(receipt), receipt.bookings[0].bound_by) == (["later"], "tokens")
        assert outcomes(await second.commit(batch(_REQUEST))) == ["later"]
        calls = book(first, {"requests": 1, "tokens": 50}), book(second, _REQUEST)
        then, behind = await asyncio.gather(*calls)
        assert then.start <= behind.start
        assert then.bound_by == "tokens"

    @scenario
    async def test_refund_admits_the_call_of_a_waiting_worker(self, place: Place) -> None:
        first, second = await place.workers(config(amount_of("tokens", 1_000, 60)), 2)
        start = booked(await first.commit(batch({"tokens": 900})))[0].start
        waiting = asyncio.create_task(book(second, {"tokens": 800}))
        await asyncio.sleep(0.1)
        used = Correction(start=start, booked={"tokens": 900}, used={"tokens": 100})
        now = (await first.commit(Batch(corrections=(used,)))).now
        assert (await waiting).start - now < SECOND

    @scenario
    async def test_call_above_the_burst_earns_the_rest_as_first_in_line(self, place: Place) -> None:
        worker = await place.worker(config(amount_of("requests", 500, 10, 10)))
        began = (await worker.commit(Batch())).now
        booking = await book(worker, {"requests": 30})
        assert 400 * MILLISECOND <= booking.start - began < 800 * MILLISECOND
        assert booking.bound_by == "requests"

    @scenario
    async def test_several_dead_workers_in_line_delay_others_no_longer_than_one(
        self, place: Place
    ) -> None:
        *dead, living = await place.workers(config(amount_of("tokens", 100, 0.5)), 5)
        began = (await living.commit(batch({"tokens": 100}))).now
        for worker in dead:
            assert outcomes(await worker.commit(batch({"tokens": 1}))) == ["later"]
        receipt = await living.commit(batch({"tokens": 1}))
        assert receipt.ask_at < began + 3 * SECOND, "0.5 s for each"
        await book(living, {"tokens": 1})

    @scenario
    async def test_call_books_its_whole_cost_or_nothing(self, place: Place) -> None:
        limits = config(amount_of("requests", 10, 60), amount_of("tokens", 100, 60))
        worker = await place.worker(limits)
        costs = ((1, 101), (1, 100), (1, 1), (11, 0))
        calls = [{"requests": requests, "tokens": tokens} for requests, tokens in costs]
        receipt = await worker.commit(batch(*calls))
        assert outcomes(receipt) == ["never", "booked", "later", "later"]
        assert receipt.bookings[0].bound_by == "tokens"
        assert [use.used for use in (await peek(worker)).limits] == [1, 100]

    @scenario
    async def test_debt_above_a_whole_window_is_paid_in_full(self, place: Place) -> None:
        worker = await place.worker(config(amount_of("tokens", 100, 0.5)))
        start = booked(await worker.commit(batch({"tokens": 10})))[0].start
        debt = Correction(start=start, booked={"tokens": 10}, used={"tokens": 300})
        await worker.commit(Batch(corrections=(debt,)))
        last = [(await book(worker, {"tokens": 50})).start for _ in range(3)][-1]
        assert 0 <= last - start - (300 + 150 - 100) * 5 * MILLISECOND < SECOND // 5

    @scenario
    async def test_enormous_debt_or_pause_does_not_break_the_store(self, place: Place) -> None:
        for power in (15, 20, 400):
            name = f"{place.name}-{power}"
            worker = await place.worker(config(amount_of("tokens", 100, 86_400, 1)), name=name)
            start = booked(await worker.commit(batch({"tokens": 1})))[0].start
            debt = Correction(start=start, booked={"tokens": 1}, used={"tokens": 10**power})
            await worker.commit(Batch(corrections=(debt,), pause=10 ** min(power, 25)))
            for _ in range(2):
                receipt = await worker.commit(batch({"tokens": 1}))
                assert outcomes(receipt) == ["later"]
                assert receipt.ask_at > receipt.now + 86_400 * SECOND

    @scenario
    async def test_cancelled_commit_leaves_nothing_booked(self, place: Place) -> None:
        worker = await place.worker(config(amount_of("requests", 1_000, 600), concurrency=1_000))
        held = 0
        for steps in range(30):
            task = asyncio.create_task(worker.commit(batch(_CALL)))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            (answer,) = await asyncio.gather(task, return_exceptions=True)
            held += not isinstance(answer, BaseException)
        await worker.commit(Batch())
        snapshot = await peek(worker)
        assert (snapshot.limits[0].used, snapshot.slots) == (held, held)

    # --- who holds a slot, and who is next ---

    @scenario
    async def test_workers_share_the_slots(self, place: Place) -> None:
        first, second = await _holding(place, 2, 0, concurrency=3)
        receipt = await second.commit(batch(_CALL, _CALL, _CALL))
        assert outcomes(receipt) == ["booked", "later", "later"]
        assert receipt.bookings[1].bound_by == "concurrency"
        assert receipt.ask_at > receipt.now
        assert (await first.commit(Batch())).crowded, "another worker waits for slots"
        snapshot = await peek(second)
        assert (snapshot.slots, snapshot.limits[0].used) == (3, 3)

    @scenario
    async def test_released_slot_goes_to_the_worker_that_asked_first(self, place: Place) -> None:
        holder, first, second = await _holding(place, 1, 0, 0)
        waiting = asyncio.create_task(book(first, _CALL))
        await asyncio.sleep(0.1)
        await _find_no_slot(second)
        now = (await holder.commit(Batch(held=0))).now
        assert (await waiting).start - now < SECOND // 2
        await _find_no_slot(second)
        await first.commit(Batch(held=0))
        await asyncio.sleep(0.05)
        assert await turn(second, timeout=30), "it was called before"
        await _take_slots(second, 1)

    @scenario
    async def test_slot_given_back_goes_to_another_that_has_waited(self, place: Place) -> None:
        busy, waiting, _ = await _holding(place, 2, 1, 1, concurrency=4)
        await _find_no_slot(waiting)
        await asyncio.sleep(0.03)
        assert outcomes(await busy.commit(Batch(held=1, calls=(_CALL,)))) == ["later"]
        await _take_slots(waiting, 1)

    @scenario
    async def test_dead_worker_first_in_line_delays_a_slot_at_most_3_s(self, place: Place) -> None:
        holder, dead, living = await _holding(place, 1, 0, 0)
        await _find_no_slot(dead, living)
        freed = await holder.commit(Batch(held=0))
        receipt = await living.commit(batch(_CALL))
        if not receipt.bookings[
            0
        ].start:  # else this process was so slow that the dead one is late already
            assert receipt.ask_at <= freed.now + SECOND
            await book(living, _CALL)

    # --- what concerns all workers ---

    @scenario
    async def test_pause_by_one_worker_holds_for_all(self, place: Place) -> None:
        first, second = await place.workers(config(amount_of("requests", 100, 1)), 2)
        await first.commit(Batch(pause=800 * MILLISECOND))
        await first.commit(Batch(pause=100 * MILLISECOND))
        receipt = await second.commit(batch(_REQUEST))
        assert (outcomes(receipt), receipt.bookings[0].bound_by) == (["later"], "paused")
        snapshot = await peek(second)
        assert 150 * MILLISECOND < snapshot.paused_until - snapshot.now <= 800 * MILLISECOND
        assert (await book(second, _REQUEST)).start >= snapshot.paused_until

    @scenario
    async def test_latest_limits_apply_to_all_workers(self, place: Place) -> None:
        old, new = (config(amount_of("requests", amount, 60)) for amount in (10, 3))
        old = replace(old, learned=True)
        first = await place.worker(old)
        await first.commit(batch(*[_REQUEST] * 3))
        second = await place.worker(new)
        receipt = await first.commit(batch({"requests": 4}, _REQUEST))
        assert first.config == new
        assert outcomes(receipt) == ["never", "later"], "what was booked stays booked"
        for lower in (old, config(concurrency=2), config()):  # given limits yield to no such
            await second.commit(Batch(config=lower))
        await first.commit(Batch())
        assert first.config == second.config == replace(new, concurrency=2)
        assert config().after(config(concurrency=2)) == config(concurrency=2)

    @scenario
    async def test_waiting_worker_is_told_of_changed_limits(self, place: Place) -> None:
        few, more = [config(amount_of("requests", 10, 60), concurrency=n) for n in (1, 2)]
        first, second = await place.workers(few, 2)
        await _take_slots(first, 1)
        waiting = asyncio.create_task(book(second, _CALL))
        await asyncio.sleep(0.1)
        now = (await first.commit(Batch(config=more))).now
        assert (await waiting).start - now < SECOND // 2
        assert second.config == more

    @scenario
    async def test_changed_limits_keep_the_bookings_of_those_that_stay(self, place: Place) -> None:
        requests, tokens = amount_of("requests", 10, 60), amount_of("tokens", 100, 60)
        worker = await place.worker(config(requests))
        (before,) = booked(await worker.commit(batch({"requests": 4, "tokens": 50})))

        async def change(limits: LimitConfig, *corrections: Correction) -> list[tuple[int, int]]:
            await worker.commit(Batch(config=limits, corrections=corrections))
            return [(use.used, use.available) for use in (await peek(worker)).limits]

        assert await change(config(amount_of("requests", 5, 60), tokens)) == [(4, 1), (0, 100)]
        booked(await worker.commit(batch({"tokens": 90})))
        older = Correction(start=before.start, booked={"tokens": 50}, used={"tokens": 20})
        alone = replace(older, start=0)  # that was admitted without the store
        refunds = await change(worker.config, older, alone)
        assert refunds == [(4, 1), (90, 10)], "they refund nothing to it"
        assert await change(config(tokens)) == [(90, 10)]

    @scenario
    async def test_limiters_are_kept_by_name_and_outlive_processes(self, place: Place) -> None:
        limits = config(amount_of("requests", 10, 86_400), concurrency=1)
        store, other = place.store(), f"{place.name}/other: ä b"
        assert await store.peek(place.name) is None
        worker = await store.open(place.name, limits)
        await worker.commit(batch({"requests": 7}))
        await worker.commit(Batch(pause=10 * SECOND))
        await worker.aclose()
        await store.aclose()
        alone = await place.worker(limits, name=other)
        receipt = await alone.commit(batch({"requests": 1, "concurrency": 1}))
        assert booked(receipt)[0].start == receipt.now
        looking = place.store()
        snapshot = await looking.peek(place.name)
        assert snapshot is not None
        assert (snapshot.config, snapshot.workers) == (limits, 0)
        assert (snapshot.limits[0].used, snapshot.limits[0].available) == (7, 3)
        assert {place.name, other} <= set(await looking.names())
