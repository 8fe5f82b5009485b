"""A store that goes and comes back, on virtual time, never lets the limit be exceeded."""

import asyncio
from collections.abc import Sequence

import pytest

from asyncbucket import AcquireTimeout, Limit, Limiter, StoreError
from asyncbucket.stores import Batch, Correction, Pulse, Receipt, Snapshot, Terms
from asyncbucket.stores.outage import Record
from asyncbucket.stores.sqlite.books import Books
from asyncbucket.testing import VirtualClock, VirtualTime, assert_never_over

LIFE = 30_000_000_000


class MemoryStore:
    """A store in memory that several limiters share, and that may be gone."""

    url = "memory"

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.books = Books(Terms(limits=()))
        self.workers = 0
        self.gone = False
        #: How long an answer takes (s).
        self.delay = 0.0

    def check(self, terms: Terms) -> None:
        """Accept all terms."""

    async def open(
        self, name: str, terms: Terms, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> "MemoryLedger":
        assert worker is None
        assert slot_ttl == LIFE / 1e9
        self.workers += 1
        desk = MemoryLedger(self, name, f"w{self.workers}")
        self.books.configure(terms, self.clock())
        await desk.heartbeat(())
        return desk

    async def peek(self, name: str) -> Snapshot | None:
        raise NotImplementedError(name)

    async def names(self) -> list[str]:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Leave it open."""


class MemoryLedger:
    """A ledger of a `MemoryStore`."""

    def __init__(self, place: MemoryStore, name: str, worker: str) -> None:
        self.place = place
        self.name = name
        self.worker = worker

    @property
    def terms(self) -> Terms:
        return self.place.books.terms

    async def _reach(self) -> int:
        await asyncio.sleep(self.place.delay)
        if self.place.gone:
            raise StoreError("the store is gone")
        return self.place.clock()

    async def commit(self, batch: Batch) -> Receipt:
        now = await self._reach()
        return self.place.books.commit(self.worker, batch, now, life=LIFE)

    async def heartbeat(self, slots: Sequence[str]) -> Pulse:
        now = await self._reach()
        return self.place.books.heartbeat(self.worker, tuple(slots), now, life=LIFE)

    async def changed(self, *, timeout: float) -> bool:
        await asyncio.sleep(min(timeout, 0.005))
        return self.place.books.should_ask(self.worker, self.place.clock())

    async def pause(self, span: int, *, gradually: bool = False) -> None:
        raise NotImplementedError(span, gradually)

    async def configure(self, terms: Terms) -> None:
        raise NotImplementedError(terms)

    async def peek(self) -> Snapshot:
        return self.place.books.peek(await self._reach())

    async def aclose(self) -> None:
        self.place.books.leave(self.worker)


@pytest.mark.parametrize("late", [0.05, 0.35, 0.8])
def test_limiters_returning_after_outage_together_keep_the_limit(
    virtual_time: VirtualTime, late: float
) -> None:
    """The store hears of that only when they return; until then nobody takes more than a share."""
    admitted: list[tuple[float, int]] = []

    async def main() -> None:
        place = MemoryStore(virtual_time.clock)
        limit = "100 requests/10s burst 100"
        both = [Limiter(limit, store=place, clock=virtual_time.clock) for _ in range(2)]

        async def agent(limiter: Limiter, start: float) -> None:
            await asyncio.sleep(start)
            while True:
                async with limiter.acquire():
                    admitted.append((virtual_time.clock() * 1e-9, 1))

        for limiter in both:
            (await limiter.acquire()).release()
            admitted.append((virtual_time.clock() * 1e-9, 1))
        await asyncio.sleep(22)
        place.gone = True
        agents = [asyncio.ensure_future(agent(both[0], 0)) for _ in range(3)]
        agents += [asyncio.ensure_future(agent(both[1], late)) for _ in range(3)]
        await asyncio.sleep(1)
        assert len(admitted) == 2 + 100, "the shares were not used"
        place.gone = False
        await asyncio.sleep(24)
        for each in agents:
            each.cancel()
        await asyncio.gather(*agents, return_exceptions=True)
        for limiter in both:
            await limiter.aclose()

    virtual_time.run(main())
    assert_never_over(admitted, "100 requests/10s burst 100")
    assert len(admitted) == 2 + 300, "not all was used afterwards"


def test_slots_taken_while_store_returns_are_reported_to_it(virtual_time: VirtualTime) -> None:
    """The heartbeat that finds the store reports slots given out before it was sent."""

    async def main() -> None:
        place = MemoryStore(virtual_time.clock)
        one, two = (
            Limiter(
                "1000/s burst 1000",
                concurrency=2,
                store=place,
                clock=virtual_time.clock,
            )
            for _ in range(2)
        )
        (await one.acquire()).release()
        await asyncio.sleep(22)
        place.gone = True
        leases = [await one.acquire()]
        place.gone, place.delay = False, 0.02
        await asyncio.sleep(0.11)  # the first heartbeat is under way
        leases.append(await one.acquire())
        place.delay = 0.0
        await asyncio.sleep(0.02)
        with pytest.raises(AcquireTimeout):
            await two.acquire(timeout=0.05)
        for lease in leases:
            lease.release()
        await one.aclose()
        await two.aclose()

    virtual_time.run(main())


def test_record_counts_for_new_limit_only_units_booked_after_it() -> None:
    """A refund of a call from before the limit makes no room in it."""
    requests, tokens = Limit("requests", 10, per=60), Limit("tokens", 100, per=60)
    record = Record(Terms(limits=(requests,)))
    record.book({"requests": 1, "tokens": 100}, 1_000)
    record.adopt(Terms(limits=(requests, tokens)))
    record.book({"requests": 1, "tokens": 90}, 2_000)
    record.correct(Correction(start=1_000, booked={"tokens": 100}, used={"tokens": 20}))
    assert (record.window(requests).used, record.window(tokens).used) == (2, 90)
