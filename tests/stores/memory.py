"""A store in memory that several limiters share, on virtual time, and that may be gone."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from asyncbucket import Limiter, StoreError
from asyncbucket.stores import Batch, LimitConfig
from asyncbucket.stores.state import State
from asyncbucket.stores.store import Receipt, is_tenant
from asyncbucket.testing import VirtualClock


@dataclass
class MemoryStore:
    """Keep the states of limiters as a file does; it belongs to whoever made it."""

    clock: VirtualClock
    #: Runs a test on virtual time.
    run: Callable[..., Any]
    states: dict[str, State] = field(default_factory=dict)
    gone: bool = False
    #: How long an answer takes (s), and how many there were.
    delay: float = 0.001
    #: How much longer the answer is on its way back.
    late: float = 0
    trips: int = 0
    url: str = "memory"

    def now(self) -> int:
        """Return the instant by the store's own clock."""
        return self.clock() + 1_795_000_000_000_000_000

    @property
    def seconds(self) -> float:
        return self.clock() * 1e-9

    def limiter(self, *limits: str, **options: Any) -> Limiter:
        """Return a limiter of a process of its own."""
        usual: dict[str, Any] = {"store": self, "clock": self.clock, "name": "openai"}
        return Limiter(*limits, **{**usual, **options})

    def limiters(self, number: int, *limits: str, **options: Any) -> list[Limiter]:
        return [self.limiter(*limits, **options) for _ in range(number)]

    async def open(
        self, name: str, config: LimitConfig, *, worker: str, slot_ttl: float
    ) -> "MemoryLedger":
        ledger = MemoryLedger(self, name, worker, round(slot_ttl * 1e9), config)
        if not is_tenant(name):
            await ledger.commit(Batch(config=config))
        return ledger

    async def peek(self, name: str = "openai") -> Any:
        return self.states[name].peek(self.now()) if name in self.states else None

    async def aclose(self) -> None:
        """Leave it open."""


@dataclass
class MemoryLedger:
    """A ledger of a `MemoryStore`."""

    store: MemoryStore
    name: str
    worker: str
    life: int
    config: LimitConfig
    #: What could not be told, as a ledger keeps it.
    owed: Batch = field(default_factory=Batch)
    on_turn: Callable[[], object] = int
    watcher: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        new = State(self.config, self.store.now())
        return self.store.states.setdefault(self.name, new)

    async def commit(self, batch: Batch) -> Receipt:
        self.owed = self.owed.then(batch)
        await asyncio.sleep(self.store.delay)
        if self.store.gone:
            raise StoreError("the store is gone")
        self.store.trips += 1
        owed, self.owed = self.owed, Batch()
        batch = replace(owed, held=batch.held, calls=batch.calls, waiting=batch.waiting)
        receipt = self.state.apply(self.worker, batch, self.store.now(), life=self.life)
        await asyncio.sleep(self.store.late)
        self.config = self.state.config
        if self.watcher is not None:
            self.watcher.cancel()
        self.watcher = asyncio.create_task(self._watch()) if receipt.in_line else None
        return receipt

    async def _watch(self) -> None:
        while self.config == self.state.config and self.state.due(self.worker) > self.store.now():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self.on_turn()

    async def aclose(self, last: Batch) -> None:
        if self.watcher is not None:
            self.watcher.cancel()
        with contextlib.suppress(StoreError):  # as a ledger does
            await self.commit(last)
        if not last.held:
            self.state.leave(self.worker, self.store.now())
