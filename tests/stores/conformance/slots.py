"""Scenarios of slots: leases that come back, and a line of workers that wait for them."""

import asyncio
import time

from asyncbucket.stores.store import Batch, Ledger, Outcome
from conformance.place import (
    MILLISECOND,
    SECOND,
    Place,
    Suite,
    amount_of,
    batch,
    booked,
    scenario,
    terms,
)

_CALL = {"requests": 1, "concurrency": 1}
_ROOMY = amount_of("requests", 10_000, 600)


async def _slots(worker: Ledger, count: int) -> tuple[str, ...]:
    """Take ``count`` slots and return their names."""
    bookings = booked(await worker.commit(batch(*[_CALL] * count)))
    names = tuple(booking.slot for booking in bookings if booking.slot is not None)
    assert len(set(names)) == count, names
    return names


async def _no_slot(*workers: Ledger) -> None:
    """Have all these workers ask for a slot in vain, and stand in line."""
    for worker in workers:
        assert (await worker.commit(batch(_CALL))).bookings[0].outcome is Outcome.FULL


class Slots(Suite):
    """Test who holds a slot, and who is next."""

    @scenario
    async def test_workers_share_the_slots(self, place: Place) -> None:
        """Of three slots, two are taken by one worker: another gets one, and then none."""
        limiter_terms = terms(_ROOMY, concurrency=3)
        first, second = [await place.worker(limiter_terms) for _ in range(2)]
        await _slots(first, 2)
        receipt = await second.commit(batch(_CALL, _CALL, _CALL))
        assert [booking.outcome for booking in receipt.bookings] == [
            Outcome.BOOKED,
            Outcome.FULL,
            Outcome.FULL,
        ]
        assert receipt.bookings[1].bound_by == "concurrency"
        assert receipt.ask_at > receipt.now
        assert not receipt.crowded
        assert (await first.commit(Batch())).crowded, "another worker waits for slots"
        snapshot = await second.peek()
        assert (snapshot.slots, snapshot.limits[0].used) == (3, 3)

    @scenario
    async def test_released_slot_serves_a_call_of_the_same_batch(self, place: Place) -> None:
        """Releases count before calls; a slot given back twice, or never held, is ignored."""
        worker = await place.worker(terms(_ROOMY, concurrency=1))
        (slot,) = await _slots(worker, 1)
        receipt = await worker.commit(Batch(released=(slot, "unknown"), calls=(_CALL,)))
        (again,) = booked(receipt)
        assert again.slot not in (None, slot)
        receipt = await worker.commit(Batch(released=(slot,), calls=(_CALL,)))
        assert receipt.bookings[0].outcome is Outcome.FULL

    @scenario
    async def test_call_that_needs_no_slot_passes_when_all_are_taken(self, place: Place) -> None:
        """Only a call that needs a slot waits for one; if none are counted, none are given."""
        worker = await place.worker(terms(_ROOMY, concurrency=1))
        await _slots(worker, 1)
        (booking,) = booked(await worker.commit(batch({"requests": 1})))
        assert booking.slot is None
        unbound = await place.worker(terms(_ROOMY), name=f"{place.name}-unbound")
        (booking,) = booked(await unbound.commit(batch(_CALL)))
        assert booking.slot is None

    @scenario
    async def test_slot_is_held_from_booking_to_beyond_the_start(self, place: Place) -> None:
        """A call that starts later already has its slot, which lives on after the start."""
        limiter_terms = terms(amount_of("requests", 1, 0.24), concurrency=2)
        worker = await place.worker(limiter_terms, slot_ttl=0.2)
        receipt = await worker.commit(batch(_CALL, _CALL, _CALL))
        assert [booking.outcome for booking in receipt.bookings] == [
            Outcome.BOOKED,
            Outcome.BOOKED,
            Outcome.FULL,
        ]
        assert receipt.bookings[1].start - receipt.now > 200 * MILLISECOND
        await asyncio.sleep(0.3)
        assert (await worker.peek()).slots == 1

    @scenario
    async def test_slots_of_a_dead_worker_expire_on_time(self, place: Place) -> None:
        """Without a heartbeat for its time to live, a slot is free within 0.1 s, and not before."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        dead = await place.worker(limiter_terms, slot_ttl=0.5)
        living = await place.worker(limiter_terms, slot_ttl=0.5)
        began = time.monotonic()
        await _slots(dead, 1)
        freed = await _wait_for_slot(living)
        assert 0.45 < freed - began < 0.8, f"after {freed - began:.3f} s"

    @scenario
    async def test_heartbeats_keep_slots_alive(self, place: Place) -> None:
        """With heartbeats in time, a slot outlives its first life by far."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        worker = await place.worker(limiter_terms, slot_ttl=0.3)
        slots = await _slots(worker, 1)
        for _ in range(6):
            await asyncio.sleep(0.1)
            assert (await worker.heartbeat(slots)).workers == 1
        await _no_slot(worker)

    @scenario
    async def test_late_heartbeat_takes_an_expired_slot_again(self, place: Place) -> None:
        """The call is still running: it counts, even if others have its place by now."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        late = await place.worker(limiter_terms, slot_ttl=0.1)
        other = await place.worker(limiter_terms, slot_ttl=5)
        slots = await _slots(late, 1)
        await asyncio.sleep(0.2)
        await _slots(other, 1)
        await late.heartbeat(slots)
        assert (await other.peek()).slots == 2

    @scenario
    async def test_released_slot_goes_to_the_worker_that_asked_first(self, place: Place) -> None:
        """A slot that comes back is kept for the first in line, even if another asks before it."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        holder, first, second = [await place.worker(limiter_terms) for _ in range(3)]
        slots = await _slots(holder, 1)
        await _no_slot(first, second)
        notified = asyncio.create_task(first.changed(timeout=5))
        await holder.commit(Batch(released=slots))
        began = time.monotonic()
        assert await notified
        assert time.monotonic() - began < 0.5
        (booking,) = booked(await first.commit(batch(_CALL)))
        assert booking.bound_by == "concurrency", "it waited for a slot"
        assert booking.slot is not None
        await _no_slot(second)
        await first.commit(Batch(released=(booking.slot,)))
        assert await second.changed(timeout=5)
        await _slots(second, 1)

    @scenario
    async def test_newcomer_does_not_take_the_slot_of_the_first_in_line(self, place: Place) -> None:
        """Asking at the instant when it comes back does not get past those who wait."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        holder, first, newcomer = [await place.worker(limiter_terms) for _ in range(3)]
        slots = await _slots(holder, 1)
        await _no_slot(first)
        await holder.commit(Batch(released=slots))
        await _no_slot(newcomer)
        await _slots(first, 1)

    @scenario
    async def test_worker_without_waiting_calls_leaves_the_line(self, place: Place) -> None:
        """A batch without calls does that: the slot that comes back goes to the next worker at once."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        holder, first, second = [await place.worker(limiter_terms) for _ in range(3)]
        slots = await _slots(holder, 1)
        await _no_slot(first, second)
        await first.commit(Batch())
        await holder.commit(Batch(released=slots))
        await _slots(second, 1)

    @scenario
    async def test_many_released_slots_are_shared_equally(self, place: Place) -> None:
        """A worker that gives back a dozen and asks for a dozen gets no more than others that wait."""
        limiter_terms = terms(_ROOMY, concurrency=12)
        workers = [await place.worker(limiter_terms) for _ in range(3)]
        slots = await _slots(workers[0], 12)
        for worker in workers[1:]:
            await worker.commit(batch(*[_CALL] * 12))
        got: list[int] = []
        for worker in workers:
            released = slots if worker is workers[0] else ()
            receipt = await worker.commit(Batch(released=released, calls=(_CALL,) * 12))
            got.append(sum(booking.outcome is Outcome.BOOKED for booking in receipt.bookings))
        assert sum(got) == 12, got
        assert max(got) - min(got) <= 2, got

    @scenario
    async def test_dead_worker_first_in_line_delays_a_slot_at_most_3_s(self, place: Place) -> None:
        """If the first in line has died, the next one is served within 3 s."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        holder, dead, living = [await place.worker(limiter_terms) for _ in range(3)]
        slots = await _slots(holder, 1)
        await _no_slot(dead, living)
        await holder.commit(Batch(released=slots))
        began = time.monotonic()
        assert await _wait_for_slot(living) - began < 3

    @scenario
    async def test_changed_returns_false_after_its_timeout(self, place: Place) -> None:
        """If nothing happens, it says so after the given time."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        holder, waiting = [await place.worker(limiter_terms) for _ in range(2)]
        await _slots(holder, 1)
        await waiting.commit(batch(_CALL))
        began = time.monotonic()
        assert not await waiting.changed(timeout=0.2)
        assert 0.19 < time.monotonic() - began < 0.6

    @scenario
    async def test_changed_does_not_miss_a_slot_released_before_it(self, place: Place) -> None:
        """A slot that came back between the answer and the question is not missed."""
        limiter_terms = terms(_ROOMY, concurrency=1)
        holder, waiting = [await place.worker(limiter_terms) for _ in range(2)]
        slots = await _slots(holder, 1)
        await waiting.commit(batch(_CALL))
        await holder.commit(Batch(released=slots))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        assert await waiting.changed(timeout=2)
        assert time.monotonic() - began < 0.5

    @scenario
    async def test_live_workers_are_counted(self, place: Place) -> None:
        """Workers count from opening on, for one time to live after each sign of life."""
        limiter_terms = terms(_ROOMY)
        first = await place.worker(limiter_terms, slot_ttl=0.4)
        second = await place.worker(limiter_terms, slot_ttl=0.4)
        third = await place.worker(limiter_terms, slot_ttl=0.4)
        assert len({first.worker, second.worker, third.worker}) == 3
        assert (await first.heartbeat(())).workers == 3
        await third.aclose()
        await third.aclose()
        assert (await first.heartbeat(())).workers == 2
        await asyncio.sleep(0.25)
        await first.heartbeat(())
        await asyncio.sleep(0.25)
        assert (await first.heartbeat(())).workers == 1


async def _wait_for_slot(worker: Ledger) -> float:
    """Take a slot like a pacer; return when that was."""
    while True:
        receipt = await worker.commit(batch(_CALL, horizon=0))
        if receipt.bookings[0].outcome is Outcome.BOOKED:
            return time.monotonic()
        await worker.changed(timeout=max(0, receipt.ask_at - receipt.now) / SECOND)
