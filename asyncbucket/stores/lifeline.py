"""Signs of life: what a worker regularly tells the store, and how it notices an outage.

One task sends heartbeats, which keep the worker's slots and tell how many workers there are. If the
store does not answer, a heartbeat or a batch, the worker goes on alone, logs that once, and tries
the store again at growing intervals. When the store is back it is told what was admitted meanwhile,
as debts; slots that were given out meanwhile are registered by the heartbeat itself. Until the
other workers have reported as well, the worker keeps to its share, though through the store.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from asyncbucket.core.errors import StoreError
from asyncbucket.core.events import Event, StoreLost, StoreRecovered
from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.terms import OnOutage
from asyncbucket.core.wording import in_seconds
from asyncbucket.stores.outage import MAX_RETRY_INTERVAL, RECOVERY_TIME, Outage, PricedCall, Record
from asyncbucket.stores.store import Correction, Ledger, Pulse, Receipt, Terms

#: The most seconds between heartbeats.
_MAX_HEARTBEAT_INTERVAL: Final = 5.0
#: Seconds until the next heartbeat if there is more to tell.
_AT_ONCE: Final = 0.001
#: Seconds between the first attempts to reach a store that is gone.
_RETRY_INTERVAL: Final = 0.1

_log: Final = logging.getLogger("asyncbucket")

C = TypeVar("C", bound=PricedCall)


class Lifeline:
    """Keep a worker alive at its ledger, and going while the ledger is gone."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        slot_ttl: float,
        on_outage: OnOutage,
        clock: Callable[[], int],
        emit: Callable[[Event], None] | None,
        on_change: Callable[[Correction | None], None],
        on_terms: Callable[[Terms], None] | None,
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Start; needs a running loop.

        Args:
            ledger: where the meters are.
            slot_ttl: as the ledger was opened with.
            on_outage: what to do while the ledger is gone.
            clock: monotonic integer nanoseconds.
            emit: called when the store is lost and when it is back.
            on_change: called then, with what the store has to be told.
            on_terms: called with terms that another worker has set.
            on_failure: called with an unexpected error; there are no signs of life after it.
        """
        self.ledger = ledger
        #: Slots held by calls in flight.
        self.slots: set[str] = set()
        self.record = Record(ledger.terms)
        self.outage: Outage | None = None
        #: The worker's share, while others may still have to report what they admitted alone.
        self._share: Outage | None = None
        self._share_until = 0
        self.workers = 1
        self._on_outage: OnOutage = on_outage
        self._clock = clock
        self._emit = emit
        self._on_change = on_change
        self._on_terms = on_terms
        self._heartbeat_interval = min(_MAX_HEARTBEAT_INTERVAL, slot_ttl / 3)
        #: What the store has left of each limit, as last heard.
        self.left: tuple[int, ...] = ()
        #: The store's clock minus this one.
        self._offset = 0
        self._lost_at = 0
        self._outages = 0
        self._store_lost = asyncio.Event()
        self._task = asyncio.create_task(
            run_guarded(self._send_heartbeats, on_failure), name="asyncbucket heartbeat"
        )

    def note_answer(self, answer: Receipt | Pulse) -> None:
        """Note what else an answer says."""
        self._offset = answer.now - self._clock()
        self.left = answer.left
        # The store may have lost some workers: only a heartbeat tells that there are fewer.
        self.workers = max(self.workers, answer.workers)
        if self.record.terms != self.ledger.terms:
            self.record.adopt(self.ledger.terms)
        if answer.changed is not None and self._on_terms is not None:
            self._on_terms(answer.changed)

    def begin_outage(self, error: StoreError) -> None:
        """Go on alone from now on."""
        if self.outage is not None:
            return
        self._outages += 1
        self._lost_at = self._clock()
        self._share = None
        self.outage = Outage(
            self._on_outage,
            self.record,
            workers=self.workers,
            left=self.left,
            now=self._lost_at + self._offset,
        )
        manner = {
            "share": f"with its share, 1 of {self.workers}",
            "open": "admitting everybody",
            "closed": "admitting nobody",
        }[self._on_outage]
        _log.warning("%s; limiter %s goes on %s", error, self.ledger.name, manner)
        self._emit_event(
            StoreLost(limiter=self.ledger.name, at=self._lost_at * 1e-9, reason=str(error))
        )
        self._store_lost.set()
        self._on_change(None)

    def admit(self, amounts: Amounts, now: int) -> tuple[int, str | None]:
        """Admit a call without the store, if allowed; return when, and its slot."""
        assert self.outage is not None
        due = self.outage.earliest(amounts, now + self._offset, held=len(self.slots))
        if due > now + self._offset:
            return due - self._offset, None
        self.outage.book(amounts, due)
        slot = None
        if self.ledger.terms.concurrency is not None and amounts.get("concurrency"):
            slot = f"{self.ledger.worker}:alone:{self._outages}:{now}:{len(self.slots)}"
            self.slots.add(slot)
        return now, slot

    def within_share(self, heads: Sequence[C], now: int) -> tuple[Sequence[C], int]:
        """Return the ``heads`` that the store may be asked for, and when to look for more."""
        if self._share is None or now >= self._share_until:
            self._share = None
            return heads, NEVER
        number, due = self._share.fitting(heads, now + self._offset, held=len(self.slots))
        return heads[:number], min(due - self._offset, self._share_until)

    async def aclose(self) -> None:
        """Stop the signs of life."""
        await cancel_and_wait(self._task)

    async def _send_heartbeats(self) -> None:
        pause = self._heartbeat_interval
        while not is_cancelling():
            if await wait_for_ring(self._store_lost, pause):
                pause = _RETRY_INTERVAL
                continue
            reported = frozenset(self.slots)
            try:
                pulse = await self.ledger.heartbeat(tuple(reported))
            except StoreError as error:
                pause = min(MAX_RETRY_INTERVAL, 2 * pause)
                self.begin_outage(error)
                continue
            # Slots given out alone while the heartbeat was under way have to be reported, too.
            pause = (
                self._heartbeat_interval
                if self.outage is None or self.slots <= reported
                else _AT_ONCE
            )
            # Soon after an outage some workers are still away.
            if self.outage is None and self._clock() >= self._share_until:
                self.workers = pulse.workers
            self.note_answer(pulse)
            self._recover()

    def _recover(self) -> None:
        """Go on with the store, and tell it what was admitted meanwhile."""
        if self.outage is None:
            return
        outage, self.outage = self.outage, None
        if outage.policy == "share":
            self._share = outage
            self._share_until = self._clock() + round(RECOVERY_TIME * 1e9)
        seconds = (self._clock() - self._lost_at) * 1e-9
        _log.warning(
            "the store of limiter %s is back after %s; admitted without it: %s",
            self.ledger.name,
            in_seconds(seconds),
            ", ".join(f"{n:,} {name}" for name, n in outage.admitted.items()) or "nothing",
        )
        self._emit_event(
            StoreRecovered(limiter=self.ledger.name, at=self._clock() * 1e-9, seconds=seconds)
        )
        debts = any(outage.admitted.values())
        self._on_change(Correction(start=0, booked={}, used=outage.admitted) if debts else None)

    def _emit_event(self, event: Event) -> None:
        if self._emit is not None:
            self._emit(event)


def is_cancelling() -> bool:
    """Return whether the running task has been asked to end.

    redis-py sometimes swallows a cancellation that comes while it connects, so loops check this.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def run_guarded(
    work: Callable[[], Awaitable[None]], on_failure: Callable[[Exception], None]
) -> None:
    """Do ``work``; if it fails, call ``on_failure``, because nobody awaits it."""
    try:
        await work()
    except Exception as error:  # noqa: BLE001 - whatever it is, those that wait must not wait on
        on_failure(error)


async def cancel_and_wait(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel ``tasks`` until they have ended: see `is_cancelling`."""
    running = {task for task in tasks if task is not None and not task.done()}
    while running:
        for task in running:
            task.cancel()
        ended, running = await asyncio.wait(running, timeout=_RETRY_INTERVAL)
        await asyncio.gather(*ended, return_exceptions=True)


async def wait_for_ring(bell: asyncio.Event, seconds: float | None) -> bool:
    """Wait until ``bell`` rings, for ``seconds`` at most; clear it, and return whether it rang."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await bell.wait()
    was_rung = bell.is_set()
    bell.clear()
    return was_rung
