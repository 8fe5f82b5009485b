"""Where a scenario runs: fresh limiters in the store under test, closed afterwards."""

import asyncio
import contextlib
import secrets
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Amounts
from asyncbucket.stores.store import (
    Batch,
    Booking,
    Ledger,
    LimitConfig,
    Receipt,
    Snapshot,
    Store,
)

MILLISECOND = 1_000_000
SECOND = 1_000_000_000
#: What is set when it is a worker's turn.
TURNS: weakref.WeakKeyDictionary[Ledger, asyncio.Event] = weakref.WeakKeyDictionary()


class Place:
    """Open workers of one limiter, each on a connection of its own, as processes would."""

    def __init__(self, make_store: Callable[[], Store]) -> None:
        self._make_store = make_store
        self._stores: list[Store] = []
        self._ledgers: list[Ledger] = []
        #: The limiter that the scenario is about.
        self.name = f"conformance-{secrets.token_hex(6)}"

    def store(self) -> Store:
        store = self._make_store()
        self._stores.append(store)
        return store

    async def worker(self, config: LimitConfig, *, name: str | None = None) -> Ledger:
        ledger = await self.store().open(name or self.name, config)
        TURNS[ledger] = asyncio.Event()
        ledger.on_turn = TURNS[ledger].set
        self._ledgers.append(ledger)
        return ledger

    async def workers(self, config: LimitConfig, count: int) -> list[Ledger]:
        return [await self.worker(config) for _ in range(count)]

    async def close(self) -> None:
        for ledger in self._ledgers:
            await ledger.aclose()
        for store in self._stores:
            await store.aclose()


Scenario: TypeAlias = Callable[[Any, Place], Coroutine[Any, Any, None]]


def scenario(play: Scenario) -> Callable[[Any], None]:
    """Turn a coroutine method that takes a `Place` into a test."""

    def test(self: Any) -> None:
        async def run() -> None:
            place = Place(self.make_store)
            try:
                await play(self, place)
            finally:
                await place.close()

        asyncio.run(run())

    test.__name__, test.__qualname__, test.__doc__ = play.__name__, play.__qualname__, play.__doc__
    return test


def config(*limits: Limit, concurrency: int | None = None) -> LimitConfig:
    return LimitConfig(limits=limits, concurrency=concurrency)


def amount_of(limit: str, amount: int, per: float, burst: int | None = None) -> Limit:
    """Return a limit that is paced only if a burst is given."""
    return Limit(limit, amount, per=per, burst=amount if burst is None else burst)


def terms(*limits: str, concurrency: int | None = None) -> LimitConfig:
    return config(*map(Limit.parse, limits), concurrency=concurrency)


def outcomes(receipt: Receipt) -> list[str]:
    return [
        "never" if each.exceeds else "booked" if each.start else "later"
        for each in receipt.bookings
    ]


def batch(*calls: Amounts) -> Batch:
    return Batch(calls=calls)


def booked(receipt: Receipt) -> list[Booking]:
    """Return the bookings of a receipt, after checking that every call was booked."""
    assert set(outcomes(receipt)) <= {"booked"}, f"not all calls were booked: {outcomes(receipt)}"
    return list(receipt.bookings)


async def peek_at(store: Store) -> Snapshot:
    """Look at the limiter ``openai`` from outside, and close the store."""
    snapshot = await store.peek("openai")
    await store.aclose()
    assert snapshot is not None, "there is no such limiter"
    return snapshot


async def peek(ledger: Ledger) -> Snapshot:
    """Look at the limiter of ``ledger``."""
    snapshot = await ledger.store.peek(ledger.name)
    assert snapshot is not None, "there is no such limiter"
    return snapshot


async def used(ledger: Ledger) -> int:
    """Return how much of the first limit is used."""
    return (await peek(ledger)).limits[0].used


async def turn(worker: Ledger, *, timeout: float) -> bool:
    """Wait until it is the turn of ``worker``; return whether that is so within ``timeout`` seconds."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(TURNS[worker].wait(), timeout)
    came = TURNS[worker].is_set()
    TURNS[worker].clear()
    return came


async def book(worker: Ledger, call: Amounts) -> Booking:
    """Ask like a session until ``call`` is booked."""
    while True:
        receipt = await worker.commit(batch(call))
        if receipt.bookings[0].start:
            return receipt.bookings[0]
        await turn(worker, timeout=max(0, receipt.ask_at - receipt.now) / SECOND)
