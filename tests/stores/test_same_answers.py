"""Both stores give the same answers to the same histories: the script on a server, and the state in a file.

Histories are random, with several workers, limits, slots, pauses, expiries, losses, and changes of
limits. The tests set the time, and limits whose instants are whole microseconds, so answers are equal.
"""

import asyncio
import contextlib
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Amounts
from asyncbucket.stores import Batch, Correction, Outcome, Store, open_store
from asyncbucket.stores.sqlite.state import State
from asyncbucket.stores.store import Ledger
from tests.stores.conformance.place import MILLISECOND, SECOND, amount_of, config

#: Instants are multiples of it (ns), so that the backlog of a bucket stays whole when the rate doubles.
TICK = 16_000
START = 1_795_000_000 * SECOND
LIFE = 2 * SECOND
_WINDOW = 0.512
_REQUESTS = amount_of("requests", 64, _WINDOW, 8)
_TOKENS = amount_of("tokens", 500, _WINDOW)
_SLOW = amount_of("tokens", 2_048, 5.12, 100)
CONFIGS = (
    config(_REQUESTS, concurrency=6),
    config(_REQUESTS, _TOKENS),
    config(_TOKENS, concurrency=3),
    config(_REQUESTS, _TOKENS, _SLOW, concurrency=9),
    config(amount_of("requests", 32, _WINDOW, 4), _SLOW, concurrency=4),
    config(amount_of("tokens", 4_096, 10.24, 1_000)),
    config(concurrency=5),
    config(_TOKENS, Limit("tokens", 2_000, per="day", resets="11:07 UTC")),  # 20 s from the start
    config(Limit("tokens", 900, per="day", burst=300, resets="11:07 UTC"), concurrency=4),
    config(Limit("tokens", 1_500, per="day", resets="11:06 UTC"), concurrency=4),
    config(amount_of("tokens", 1_500, 86_400)),
)


class History:
    """Do the same to both, and compare."""

    def __init__(self, url: str, server: Any, clock: Any, seed: int) -> None:
        self._random, self._server, self._clock = Random(seed), server, clock
        self._url = url
        self._now = START
        self._state = State(self._random.choice(CONFIGS), START)
        self._ledgers: dict[str, Ledger] = {}
        self._held: dict[str, int] = {}
        self._booked: list[tuple[int, Amounts]] = []
        self._is_gone = False
        self._changed = START
        self._asks = [START]

    async def play(self, steps: int) -> None:
        async with contextlib.aclosing(open_store(self._url)) as store:
            await self._play(store, steps)

    async def _play(self, store: Store, steps: int) -> None:
        self._clock(self._now)
        for name in "abcd":
            self._ledgers[name] = await self._open(store, name)
        for _ in range(steps):
            self._pass_time()
            name, chance = self._random.choice("abcd"), self._random.random()
            if not self._is_gone:
                await self._compare(self._ledgers[name])
            if chance < 0.01:
                self._server.flushall()
                self._clock(self._now)
                self._is_gone = True
            elif chance < 0.03 and not self._is_gone:
                await self._ledgers[name].aclose()
                self._state.leave(name, self._now)
                await self._compare(self._ledgers[name])
                self._ledgers[name] = await self._open(store, name)
            await self._step(self._ledgers[name])
        self._now += 72 * 3_600 * SECOND
        self._clock(self._now)
        for ledger in self._ledgers.values():
            await ledger.commit(Batch(calls=None))
        for ledger in self._ledgers.values():
            await ledger.aclose()
        kept = set(self._server.hkeys("asyncbucket:{oracle}:state"))
        assert kept == {"state", "config"}, "what is forgotten is deleted"

    async def _open(self, store: Store, name: str) -> Ledger:
        ledger = await store.open("oracle", self._state.config, worker=name, slot_ttl=LIFE / SECOND)
        self._state.apply(name, Batch(config=self._state.config, held=0), self._now, life=LIFE)
        self._held[name] = 0
        return ledger

    def _pass_time(self) -> None:
        random = self._random
        ahead = [each for each in self._asks if each > self._now]
        if ahead and random.random() < 0.4:  # somebody comes when asked to
            self._now = min(*ahead, self._now + LIFE)
        else:
            longest = random.choice([1, 60, 300, 600, 1_200, 6_000, 40_000, 200_000])
            self._now += random.randint(1, longest) * TICK
        if random.random() < 0.02:  # about the time when a day begins anew
            day = 86_400 * SECOND
            self._now += -(self._now - START) % day + random.randint(1, 2_000_000) * TICK
        self._clock(self._now)

    async def _step(self, ledger: Ledger) -> None:
        batch, limits = self._batch(ledger.worker), ledger.config
        receipt = await ledger.commit(batch)
        if self._is_gone:
            assert receipt.lost
            self._state = State(limits, self._now)
            self._is_gone = False
        state = self._state
        if receipt.lost:
            state.drain(self._now)
            self._forget_calls()
        expected = state.apply(ledger.worker, batch, self._now, life=LIFE)
        assert replace(receipt, lost=False, changed=None) == expected, (ledger.worker, batch)
        self._asks.append(receipt.ask_at)
        for call, booking in zip(batch.calls or (), receipt.bookings, strict=True):
            if booking.outcome is Outcome.BOOKED and booking.start > self._changed:
                self._booked.append((booking.start, call))
            self._held[ledger.worker] += booking.slot
        await self._compare(ledger)

    async def _compare(self, ledger: Ledger) -> None:
        state, snapshot = self._state, await ledger.peek()
        copy = State.from_text(state.to_text())
        assert replace(snapshot, details={}) == copy.peek(self._now)

    def _batch(self, worker: str) -> Batch:
        random = self._random
        held = self._held[worker]
        if random.random() < 0.5:
            held = random.randint(0, held)
        self._held[worker] = held
        changes = random.random() < 0.02 and not self._is_gone
        if changes:  # a bucket on a server forgoes refunds of calls under earlier limits
            self._forget_calls()
        return Batch(
            config=random.choice(CONFIGS) if changes else None,
            pause=random.choice([0] * 30 + [1, 200, 900]) * MILLISECOND,
            corrections=tuple(self._correction() for _ in range(random.choice([0, 0, 1, 4]))),
            held=held,
            calls=random.choice(
                [None, (), *[tuple(map(self._call, range(n))) for n in (1, 1, 2, 4, 8)]]
            ),
            horizon=random.choice([0, 20 * MILLISECOND, SECOND]),
        )

    def _forget_calls(self) -> None:
        self._booked.clear()
        self._changed = max(self._now, self._state.last_start)

    def _call(self, _: int) -> Amounts:
        random = self._random
        call = {
            "requests": random.choice([0, 1, 1, 1, 1, 12, 65]),
            "tokens": random.choice([1, 20, 100, 400]),
            "concurrency": random.choice([0, 1, 1, 1]),
        }
        return {name: amount for name, amount in call.items() if amount or random.random() < 0.5}

    def _correction(self) -> Correction:
        if not self._booked:
            return Correction(start=0, booked={}, used={})
        index = self._random.randrange(max(0, len(self._booked) - 12), len(self._booked))
        start, amounts = self._booked[index]
        factor = self._random.choice([0, 0, 0.5, 1, 1.5])
        used = {name: int(amount * factor) for name, amount in amounts.items()}
        self._booked[index] = (start, used)
        return Correction(start=start, booked=amounts, used=used)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(8))
def test_stores_give_the_same_answers(
    url: str, redis_sync: Any, server_clock: Any, seed: int
) -> None:
    asyncio.run(History(url, redis_sync, server_clock, seed).play(300))
