"""Scenarios of what concerns all workers: config, pauses, and what outlives a process."""

import asyncio

from asyncbucket.stores.store import Batch, Correction, Outcome

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
    scenario,
)


class Steering(Suite):
    """Test what concerns all workers at once."""

    @scenario
    async def test_pause_by_one_worker_holds_for_all(self, place: Place) -> None:
        limits = config(amount_of("requests", 100, 1))
        first, second = [await place.worker(limits) for _ in range(2)]
        await first.commit(Batch(calls=None, pause=800 * MILLISECOND))
        await first.commit(Batch(calls=None, pause=100 * MILLISECOND))
        receipt = await second.commit(batch({"requests": 1}))
        assert receipt.bookings[0].outcome is Outcome.LATER
        assert receipt.bookings[0].bound_by == "paused"
        snapshot = await second.peek()
        assert 150 * MILLISECOND < snapshot.paused_until - snapshot.now <= 800 * MILLISECOND
        (booking,) = await book_all(second, {"requests": 1})
        assert booking.start >= snapshot.paused_until

    @scenario
    async def test_gradual_pause_ends_in_a_slow_start(self, place: Place) -> None:
        limits = config(amount_of("requests", 1_000, 1))
        worker = await place.worker(limits)
        await worker.commit(Batch(calls=None, pause=160 * MILLISECOND, gradually=True))
        starts = [
            booking.start
            for booking in booked(await worker.commit(batch(*[{"requests": 1}] * 300)))
        ]
        since = [(start - starts[0]) / (10 * MILLISECOND) for start in starts]
        assert [round(since[n - 1], 2) for n in (1, 2, 4, 8, 16)] == [0, 1, 2, 3, 4], since
        assert [round(since[n - 1], 2) for n in (255, 256, 257, 300)] == [7.99, 8, 8, 8], since

    @scenario
    async def test_latest_terms_apply_to_all_workers(self, place: Place) -> None:
        old, new = config(amount_of("requests", 10, 60)), config(amount_of("requests", 3, 60))
        first = await place.worker(old)
        await first.commit(batch(*[{"requests": 1}] * 3))
        second = await place.worker(new)
        receipt = await first.commit(batch({"requests": 1}, {"requests": 4}))
        assert receipt.changed == new == first.config
        held, never = receipt.bookings
        assert held.outcome is Outcome.LATER, "what was booked stays booked"
        assert never.outcome is Outcome.NEVER
        assert (await first.commit(Batch(calls=None))).changed is None
        await second.commit(Batch(calls=None, config=old))
        assert (await first.commit(Batch(calls=None))).changed == old == first.config

    @scenario
    async def test_waiting_worker_is_told_of_changed_terms(self, place: Place) -> None:
        few, more = [config(amount_of("requests", 10, 60), concurrency=n) for n in (1, 2)]
        first, second = [await place.worker(few) for _ in range(2)]
        await first.commit(batch({"requests": 1, "concurrency": 1}))
        await second.commit(batch({"requests": 1, "concurrency": 1}))
        notified = asyncio.create_task(second.changed(timeout=5))
        await asyncio.sleep(0.02)
        await first.commit(Batch(calls=None, config=more))
        assert await notified
        receipt = await second.commit(batch({"requests": 1, "concurrency": 1}))
        assert receipt.changed == more
        booked(receipt)

    @scenario
    async def test_worker_is_told_of_terms_changed_before_it_listens(self, place: Place) -> None:
        few, more = [config(amount_of("requests", 10, 60), concurrency=n) for n in (1, 2)]
        first, second = [await place.worker(few) for _ in range(2)]
        await first.commit(batch({"requests": 1, "concurrency": 1}))
        await second.commit(batch({"requests": 1, "concurrency": 1}))
        await first.commit(Batch(calls=None, config=more))
        assert await second.changed(timeout=0.2)

    @scenario
    async def test_changed_terms_keep_bookings_of_remaining_limits(self, place: Place) -> None:
        requests, tokens = amount_of("requests", 10, 60), amount_of("tokens", 100, 60)
        worker = await place.worker(config(requests))
        await worker.commit(batch({"requests": 4, "tokens": 50}))
        await worker.commit(Batch(calls=None, config=config(amount_of("requests", 5, 60), tokens)))
        uses = {use.limit.resource: use for use in (await worker.peek()).limits}
        assert (uses["requests"].used, uses["requests"].available) == (4, 1)
        assert (uses["tokens"].used, uses["tokens"].available) == (0, 100)
        await worker.commit(Batch(calls=None, config=config(tokens)))
        assert [use.limit.resource for use in (await worker.peek()).limits] == ["tokens"]

    @scenario
    async def test_call_older_than_a_limit_refunds_nothing_to_it(self, place: Place) -> None:
        worker = await place.worker(config(amount_of("requests", 10, 60)))
        (before,) = booked(await worker.commit(batch({"requests": 1, "tokens": 100})))
        await worker.commit(
            Batch(
                calls=None,
                config=config(amount_of("requests", 10, 60), amount_of("tokens", 100, 60)),
            )
        )
        await worker.commit(batch({"requests": 1, "tokens": 90}))
        refund = Correction(start=before.start, booked={"tokens": 100}, used={"tokens": 20})
        await worker.commit(Batch(corrections=(refund,)))
        used = {use.limit.resource: use.used for use in (await worker.peek()).limits}
        assert used == {"requests": 2, "tokens": 90}

    @scenario
    async def test_bookings_outlive_the_process(self, place: Place) -> None:
        limits = config(amount_of("requests", 10, 86_400))
        store = place.store()
        worker = await store.open(place.name, limits)
        await worker.commit(batch({"requests": 7}))
        await worker.aclose()
        await store.aclose()
        again = await place.worker(limits)
        (use,) = (await again.peek()).limits
        assert (use.used, use.available) == (7, 3)

    @scenario
    async def test_limiters_of_different_names_are_independent(self, place: Place) -> None:
        limits = config(amount_of("requests", 10, 60), concurrency=1)
        one = await place.worker(limits)
        other = await place.worker(limits, name=f"{place.name}/other: ä b")
        await one.commit(batch({"requests": 10, "concurrency": 1}))
        await one.commit(Batch(calls=None, pause=10 * SECOND))
        receipt = await other.commit(batch({"requests": 1, "concurrency": 1}))
        assert booked(receipt)[0].start == receipt.now
        assert (one.name, other.name) == (place.name, f"{place.name}/other: ä b")

    @scenario
    async def test_peeking_at_a_store_adds_no_worker(self, place: Place) -> None:
        limits = config(amount_of("requests", 10, 60))
        store = place.store()
        assert await store.peek(place.name) is None
        assert place.name not in await store.names()
        worker = await place.worker(limits)
        await worker.commit(batch({"requests": 3}))
        assert place.name in await store.names()
        snapshot = await store.peek(place.name)
        assert snapshot is not None
        assert (snapshot.config, snapshot.limits[0].used, snapshot.workers) == (limits, 3, 1)
        assert await store.peek(f"{place.name}-unknown") is None
        assert f"{place.name}-unknown" not in await store.names()

    @scenario
    async def test_invalid_names_and_times_to_live_are_refused(self, place: Place) -> None:
        limits = config(amount_of("requests", 10, 60))
        for name, life in (("", 30.0), ("a{b}", 30.0), ("a\nb", 30.0), ("a" * 201, 30.0), ("a", 0)):
            try:
                await place.worker(limits, name=name or "\0", slot_ttl=life)
            except ValueError:
                continue
            raise AssertionError(f"{name!r} with a time to live of {life} s was taken")
