"""Both stores give the same answers to the same histories: the script on a server, and the state in a file.

Histories are random, with several workers, limits, slots, pauses, expiries, losses, and changes of
limits. The tests set the time.
"""

import asyncio
import contextlib
from typing import Any

import pytest

from asyncbucket.stores import Batch, Store, open_store
from asyncbucket.stores.state import State
from asyncbucket.stores.store import FAR, Ledger
from tests.stores.conformance.history import CONFIGS, DAILY, History
from tests.stores.conformance.place import SECOND, peek

#: Instants are multiples of it (ns), so that the backlog of a bucket stays whole when the rate doubles.
TICK = 16_000
START = 1_795_000_000 * SECOND
LIFE = 2 * SECOND
ALL = (*CONFIGS, *DAILY)


class OnServer(History):
    """Do the same to a server, whose clock is set, and to the state."""

    def __init__(self, url: str, server: Any, clock: Any, seed: int) -> None:
        super().__init__(seed, ALL[seed % len(ALL)], START, life=LIFE)
        self._url, self._server, self._clock = url, server, clock
        self._now = START
        self._ledgers: dict[str, Ledger] = {}
        self._is_gone = False
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
            name, chance = self.random.choice("abcd"), self.random.random()
            if not self._is_gone:
                await self._compare(self._ledgers[name])
            if chance < 0.01:
                self._server.flushall()
                self._clock(self._now)
                self._is_gone = True
            elif chance < 0.03 and not self._is_gone:
                await self._ledgers[name].aclose(Batch(held=0))
                self.state.apply(name, Batch(held=0), self._now, life=LIFE)
                self.state.leave(name, self._now)
                await self._compare(self._ledgers[name])
                self._ledgers[name] = await self._open(store, name)
            await self._step(self._ledgers[name])
        self._now += 72 * 3_600 * SECOND
        self._clock(self._now)
        for ledger in self._ledgers.values():
            await ledger.commit(Batch())
        for ledger in self._ledgers.values():
            await ledger.aclose(Batch(held=0))
        kept = set(self._server.hkeys("asyncbucket:{oracle}:state"))
        assert kept == {"state", "config"}, "what is forgotten is deleted"

    async def _open(self, store: Store, name: str) -> Ledger:
        ledger = await store.open("oracle", self.state.config, worker=name, slot_ttl=LIFE / SECOND)
        self.state.apply(name, Batch(config=self.state.config, held=0), self._now, life=LIFE)
        self.held[name] = 0
        return ledger

    def _pass_time(self) -> None:
        random = self.random
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
        new = None
        if self.random.random() < 0.02 and not self._is_gone:
            self.forget_calls(self._now)
            new = self.random.choice(ALL)
        batch, limits = self.batch(ledger.worker, new=new), ledger.config
        receipt = await ledger.commit(batch)
        if self._is_gone:  # all begins again with nothing left, behind what was booked ahead
            self.state = State(limits, self._now)
            self.state.last_start = self._now + 2 * FAR
            for window in self.state.windows.values():
                window.fill(window.amount, self.state.last_start, self.state.last_start)
            self.forget_calls(self._now)
        self.check(ledger, batch, receipt)
        if self._is_gone:  # a worker that missed two losses would find all used up twice
            for other in self._ledgers.values():
                alive = Batch(held=self.held[other.worker])
                self.check(other, alive, await other.commit(alive))
            self._is_gone = False
        self._asks.append(receipt.ask_at)
        await self._compare(ledger)

    async def _compare(self, ledger: Ledger) -> None:
        copy = State.from_text(self.state.to_text())
        assert await peek(ledger) == copy.peek(self._now)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(11))
def test_stores_give_the_same_answers(url: str, redis: Any, server_clock: Any, seed: int) -> None:
    asyncio.run(OnServer(url, redis, server_clock, seed).play(260))
