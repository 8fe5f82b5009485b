"""Scenarios of slots: leases that come back, and a line of workers that wait for them."""

import asyncio

from asyncbucket.stores.store import Batch, Ledger, Outcome

from .place import SECOND, Place, Suite, amount_of, batch, booked, config, outcomes, scenario

_CALL = {"requests": 1, "concurrency": 1}
_ROOMY = amount_of("requests", 10_000, 600)


async def _slots(worker: Ledger, count: int) -> None:
    assert all(booking.slot for booking in booked(await worker.commit(batch(*[_CALL] * count))))


async def _holding(place: Place, *held: int, concurrency: int = 1) -> list[Ledger]:
    """Open workers that hold so many slots each."""
    limits = config(_ROOMY, concurrency=concurrency)
    workers = [await place.worker(limits) for _ in held]
    for worker, count in zip(workers, held, strict=True):
        if count:
            await _slots(worker, count)
    return workers


async def _no_slot(*workers: Ledger) -> None:
    for worker in workers:
        assert (await worker.commit(batch(_CALL))).bookings[0].outcome is Outcome.FULL


class Slots(Suite):
    """Test who holds a slot, and who is next."""

    @scenario
    async def test_workers_share_the_slots(self, place: Place) -> None:
        first, second = await _holding(place, 2, 0, concurrency=3)
        receipt = await second.commit(batch(_CALL, _CALL, _CALL))
        assert outcomes(receipt) == ["booked", "full", "full"]
        assert receipt.bookings[1].bound_by == "concurrency"
        assert receipt.ask_at > receipt.now
        assert (await first.commit(Batch())).crowded, "another worker waits for slots"
        snapshot = await second.peek()
        assert (snapshot.slots, snapshot.limits[0].used) == (3, 3)

    @scenario
    async def test_released_slot_serves_a_call_of_the_same_batch(self, place: Place) -> None:
        worker = await place.worker(config(_ROOMY, concurrency=1))
        await _slots(worker, 1)
        (again,) = booked(await worker.commit(Batch(held=0, calls=(_CALL,))))
        assert again.slot
        receipt = await worker.commit(Batch(held=1, calls=(_CALL,)))
        assert receipt.bookings[0].outcome is Outcome.FULL

    @scenario
    async def test_call_that_needs_no_slot_passes_when_all_are_taken(self, place: Place) -> None:
        worker = await place.worker(config(_ROOMY, concurrency=1))
        await _slots(worker, 1)
        (booking,) = booked(await worker.commit(batch({"requests": 1})))
        assert not booking.slot
        unbound = await place.worker(config(_ROOMY), name=f"{place.name}-unbound")
        await _slots(unbound, 9)
        assert (await unbound.peek()).slots == 0, "they are not limited"

    @scenario
    async def test_slots_of_a_dead_worker_expire_on_time(self, place: Place) -> None:
        limits = config(_ROOMY, concurrency=1)
        dead = await place.worker(limits, slot_ttl=0.5)
        living = await place.worker(limits, slot_ttl=0.5)
        (booking,) = booked(await dead.commit(batch(_CALL)))
        receipt = await living.commit(batch(_CALL))
        assert receipt.ask_at == booking.start + SECOND // 2
        assert await _wait_for_slot(living) >= receipt.ask_at

    @scenario
    async def test_heartbeats_keep_slots_alive(self, place: Place) -> None:
        limits = config(_ROOMY, concurrency=1)
        worker = await place.worker(limits, slot_ttl=0.5)
        await _slots(worker, 1)
        for _ in range(4):
            await asyncio.sleep(0.2)
            assert (await worker.commit(Batch(calls=None, held=1))).workers == 1
        await _no_slot(worker)

    @scenario
    async def test_late_heartbeat_takes_an_expired_slot_again(self, place: Place) -> None:
        limits = config(_ROOMY, concurrency=1)
        late = await place.worker(limits, slot_ttl=0.1)
        other = await place.worker(limits, slot_ttl=5)
        await _slots(late, 1)
        await asyncio.sleep(0.2)
        await _slots(other, 1)
        await late.commit(Batch(calls=None, held=1))
        assert (await other.peek()).slots == 2

    @scenario
    async def test_released_slot_goes_to_the_worker_that_asked_first(self, place: Place) -> None:
        holder, first, second = await _holding(place, 1, 0, 0)
        await _no_slot(first, second)
        notified = asyncio.create_task(first.changed(timeout=30))
        await holder.commit(Batch(held=0))
        assert await notified
        (booking,) = booked(await first.commit(batch(_CALL)))
        assert booking.bound_by == "concurrency", "it waited for a slot"
        await _no_slot(second)
        await first.commit(Batch(held=0))
        assert await second.changed(timeout=5)
        await _slots(second, 1)

    @scenario
    async def test_slots_of_a_worker_that_leaves_go_to_the_next_at_once(self, place: Place) -> None:
        holder, waiting = await _holding(place, 1, 0)
        await _no_slot(waiting)
        assert not await waiting.changed(timeout=0.05)
        await holder.aclose()
        assert await waiting.changed(timeout=0.2)
        await _slots(waiting, 1)

    @scenario
    async def test_worker_without_waiting_calls_leaves_the_line(self, place: Place) -> None:
        holder, first, second = await _holding(place, 1, 0, 0)
        await _no_slot(first, second)
        await first.commit(Batch())
        await holder.commit(Batch(held=0))
        await _slots(second, 1)

    @scenario
    async def test_many_released_slots_are_shared_equally(self, place: Place) -> None:
        limits = config(_ROOMY, concurrency=12)
        workers = [await place.worker(limits) for _ in range(3)]
        await _slots(workers[0], 12)
        for worker in workers[1:]:
            await worker.commit(batch(*[_CALL] * 12))
        got: list[int] = []
        for worker in workers:
            receipt = await worker.commit(Batch(held=0, calls=(_CALL,) * 12))
            got.append(sum(booking.outcome is Outcome.BOOKED for booking in receipt.bookings))
        assert sum(got) == 12, got
        assert max(got) - min(got) <= 2, got

    @scenario
    async def test_slot_given_back_goes_to_another_that_has_waited(self, place: Place) -> None:
        busy, waiting, _ = await _holding(place, 2, 1, 1, concurrency=4)
        await _no_slot(waiting)
        await asyncio.sleep(0.03)
        receipt = await busy.commit(Batch(held=1, calls=(_CALL,)))
        assert receipt.bookings[0].outcome is Outcome.FULL
        await _slots(waiting, 1)

    @scenario
    async def test_worker_takes_back_what_it_gave_and_keeps_its_place(self, place: Place) -> None:
        first, busy, last, other = await _holding(place, 100, 100, 100, 101, concurrency=401)
        await _no_slot(first, busy, last)
        await other.commit(Batch(held=100, calls=None))
        receipt = await busy.commit(Batch(held=99, calls=(_CALL, _CALL)))
        assert outcomes(receipt) == ["booked", "full"]
        await _slots(first, 1)
        await busy.commit(Batch(held=99, calls=None))
        await _no_slot(last)
        await _slots(busy, 1)

    @scenario
    async def test_worker_that_reaches_its_share_comes_after_those_before_it_in_line(
        self, place: Place
    ) -> None:
        holder, first, second = await _holding(place, 3, 2, 1, concurrency=6)
        await _no_slot(first, second)
        await holder.commit(Batch(held=1, calls=None))
        assert outcomes(await second.commit(batch(_CALL, _CALL))) == ["booked", "full"]

    @scenario
    async def test_dead_worker_first_in_line_delays_a_slot_at_most_3_s(self, place: Place) -> None:
        holder, dead, living = await _holding(place, 1, 0, 0)
        await _no_slot(dead, living)
        freed = await holder.commit(Batch(held=0))
        receipt = await living.commit(batch(_CALL))
        assert receipt.ask_at <= freed.now + SECOND
        await _wait_for_slot(living)

    @scenario
    async def test_changed_does_not_miss_a_slot_released_before_it(self, place: Place) -> None:
        holder, waiting = await _holding(place, 1, 0)
        await waiting.commit(batch(_CALL))
        await holder.commit(Batch(held=0))
        await asyncio.sleep(0.05)
        assert await waiting.changed(timeout=30)

    @scenario
    async def test_live_workers_are_counted(self, place: Place) -> None:
        limits = config(_ROOMY)
        first = await place.worker(limits, slot_ttl=0.4)
        second = await place.worker(limits, slot_ttl=0.4)
        third = await place.worker(limits, slot_ttl=0.4)
        assert len({first.worker, second.worker, third.worker}) == 3
        assert (await first.commit(Batch(calls=None))).workers == 3
        await third.aclose()
        await third.aclose()
        assert (await first.commit(Batch(calls=None))).workers == 2
        await asyncio.sleep(0.25)
        await first.commit(Batch(calls=None))
        await asyncio.sleep(0.25)
        assert (await first.commit(Batch(calls=None))).workers == 1


async def _wait_for_slot(worker: Ledger) -> int:
    """Take a slot like a pacer; return when that was, by the store's clock."""
    while True:
        receipt = await worker.commit(batch(_CALL, horizon=0))
        if receipt.bookings[0].outcome is Outcome.BOOKED:
            return receipt.now
        await worker.changed(timeout=max(0, receipt.ask_at - receipt.now) / SECOND)
