"""A worker's ledger on a Redis or Valkey server: one limiter, charged once whatever breaks.

*Charged once.* Nothing is sent again blindly. A batch carries a running number of its worker, and
the script keeps its last answer. So if an answer is lost, it can be asked for again, and nothing is
booked twice.

*In doubt.* A batch that got no answer may have been booked. The ledger raises `StoreError` and
keeps the batch. Before anything else is sent, it asks again with the same number, and gives back
whatever was booked for calls that have already failed. Cancellation of the caller is handled
likewise: the script runs in a task of the ledger's own, and what it books is given back.

*Lost.* The state has an epoch. If a worker knows an epoch that the server does not (because it was
flushed, or restarted without its data), everything counts as used up: a full window must pass.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from asyncbucket.core.errors import StoreError
from asyncbucket.feedback.pause import Pause
from asyncbucket.stores import about
from asyncbucket.stores.bell import Bell
from asyncbucket.stores.returns import merged, reversal
from asyncbucket.stores.script import GRAIN, Codec
from asyncbucket.stores.servers import PATIENCE, Server
from asyncbucket.stores.store import (
    Batch,
    Pulse,
    Receipt,
    Snapshot,
    Terms,
    Use,
)

#: Seconds that the first answer may take, including connecting and parsing the script.
_FIRST_PATIENCE: Final = 2.0


class RedisLedger:
    """Keep one limiter on a server; see `asyncbucket.stores.store.Ledger`."""

    def __init__(self, server: Server, name: str, worker: str, slot_ttl: float) -> None:
        self._server = server
        self._name = name
        self._worker = worker
        self._ttl = round(slot_ttl * 1_000_000)
        hash_tag = f"asyncbucket:{{{name}}}"
        self._keys = tuple(f"{hash_tag}:{part}" for part in ("state", "slots", "workers"))
        self._channel = f"{hash_tag}:wake:"
        self._codec = Codec(Terms(limits=()))
        #: The epoch that the worker knows, when it last heard of it, and how long it lives unused.
        self._epoch = ""
        self._epoch_heard_at = self._epoch_life = 0.0
        self._request_lock = asyncio.Lock()
        self._closed = False
        self._number = 0
        #: Slots that this worker was given and has not given back.
        self._held: set[str] = set()
        #: Slots given back since the last heartbeat began.
        self._released: set[str] = set()
        #: The last batch, if it is unknown whether it was booked.
        self._in_doubt: Batch | None = None
        #: Whether that batch found the store's state lost.
        self._lost = False
        #: What came back while the store could not be told.
        self._pending = Batch()
        self._tasks: set[asyncio.Task[Any]] = set()
        #: Whether the last batch left calls waiting.
        self._has_waiting_calls = False
        channels = (f"{self._channel}{worker}", f"{self._channel}*")
        self._bell = Bell(server, channels, self._missed_ring)

    @property
    def name(self) -> str:
        return self._name

    @property
    def worker(self) -> str:
        return self._worker

    @property
    def terms(self) -> Terms:
        return self._codec.terms

    async def commit(self, batch: Batch) -> Receipt:
        """See `asyncbucket.stores.store.Ledger.commit`."""
        task = self._spawn(self._commit(batch))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(functools.partial(self._abandon, batch))
            raise

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name="asyncbucket store")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _abandon(self, batch: Batch, task: asyncio.Task[Receipt]) -> None:
        """Give back what was booked for a caller that is gone."""
        if not task.cancelled() and task.exception() is None:
            self._undo(batch, task.result())
            self._spawn(self._flush())

    def _undo(self, batch: Batch, receipt: Receipt) -> None:
        self._pending = merged(self._pending, reversal(batch, receipt))

    async def _flush(self) -> None:
        """Report what came back, if possible now; otherwise it waits for the next batch."""
        with contextlib.suppress(StoreError):
            await self._commit(Batch())

    async def _commit(self, batch: Batch) -> Receipt:
        is_recorded = False
        try:
            async with asyncio.timeout(PATIENCE), self._request_lock:
                await self._resolve_in_doubt()
                batch, self._pending = merged(self._pending, batch), Batch()
                self._in_doubt, is_recorded = batch, True
                self._number += 1
                receipt = await self._send(batch)
                self._in_doubt = None
                lost, self._lost = self._lost or receipt.lost, False
                return dataclasses.replace(receipt, lost=lost)
        except TimeoutError as error:
            raise self._server.timeout_error() from error
        finally:
            if not is_recorded:  # nothing of it was sent
                self._pending = merged(self._pending, dataclasses.replace(batch, calls=()))

    async def _resolve_in_doubt(self) -> None:
        """Find out what became of a batch that got no answer; give back what was booked."""
        if self._in_doubt is not None:
            receipt = await self._send(self._in_doubt)
            self._undo(self._in_doubt, receipt)
            self._in_doubt = None
            self._lost |= receipt.lost

    async def _send(self, batch: Batch) -> Receipt:
        """Send ``batch`` under the current number; if the terms have changed, under the new ones."""
        self._bell.reset()
        changed = None
        while True:
            codec = self._codec
            reply = await self._run(
                "commit",
                self._number,
                batch.horizon // GRAIN,
                len(self._held.difference(batch.released)),
                codec.corrections(batch.corrections),
                json.dumps(batch.released) if batch.released else "",
                codec.calls(batch.calls),
            )
            if "bookings" in reply:
                slot_prefix = f"{self._worker}:{self._number}:"
                receipt = codec.receipt(reply, batch, slot_prefix, changed)
                self._has_waiting_calls = receipt.ask_at > 0
                self._held.difference_update(batch.released)
                self._released.update(batch.released)
                self._held.update(
                    booking.slot for booking in receipt.bookings if booking.slot is not None
                )
                return receipt
            changed = self._adopt(reply)

    async def join(self, terms: Terms) -> None:
        """Make or join the limiter, under ``terms``."""
        self._codec = Codec(terms)
        await self._ask("open", patience=_FIRST_PATIENCE)

    async def heartbeat(self, slots: Sequence[str]) -> Pulse:
        """See `asyncbucket.stores.store.Ledger.heartbeat`."""
        released = self._released = set()
        try:
            # Not while a batch is in flight: a slot that it gives back must not be taken again.
            async with asyncio.timeout(PATIENCE), self._request_lock:
                held = [slot for slot in slots if slot not in released]
                reply = await self._run("heartbeat", json.dumps(held))
        except TimeoutError as error:
            raise self._server.timeout_error() from error
        changed = self._adopt(reply) if "terms" in reply else None
        return Pulse(
            now=reply["now"] * GRAIN,
            workers=reply["workers"],
            changed=changed,
            left=tuple(reply["left"]),
        )

    async def changed(self, *, timeout: float) -> bool:
        """See `asyncbucket.stores.store.Ledger.changed`."""
        return await self._bell.wait(timeout)

    async def _missed_ring(self) -> int:
        reply = await self._ask("turn", int(self._has_waiting_calls))
        delay: int = reply["come"]
        return delay

    async def pause(self, span: int, *, gradually: bool = False) -> None:
        """See `asyncbucket.stores.store.Ledger.pause`."""
        local = Pause()
        local.begin(span, 0, gradually=gradually)
        step = local._step // GRAIN  # noqa: SLF001 - one rule for all slow starts
        await self._ask("pause", -(-span // GRAIN), step)

    async def configure(self, terms: Terms) -> None:
        """See `asyncbucket.stores.store.Ledger.configure`."""
        codec = Codec(terms)
        await self._ask("configure", codec.terms_text)
        self._codec = codec

    async def peek(self) -> Snapshot:
        """See `asyncbucket.stores.store.Ledger.peek`."""
        snapshot = await self.look()
        assert snapshot is not None
        return dataclasses.replace(snapshot, details=await about.details(self._server.client))

    async def look(self) -> Snapshot | None:
        """Return a snapshot; None if there is no such limiter."""
        reply = await self._ask("peek", patience=PATIENCE if self._worker else _FIRST_PATIENCE)
        if not reply:
            return None
        terms = Codec.from_config(reply["terms"]).terms
        uses = zip(terms.limits, reply["uses"][::2], reply["uses"][1::2], strict=True)
        return Snapshot(
            now=reply["now"] * GRAIN,
            terms=terms,
            limits=tuple(Use(limit=limit, used=used, available=left) for limit, used, left in uses),
            slots=reply["slots"],
            paused_until=reply["paused"] * GRAIN,
            last_start=reply["last"] * GRAIN,
            workers=reply["workers"],
        )

    async def aclose(self) -> None:
        """See `asyncbucket.stores.store.Ledger.aclose`."""
        if self._closed:
            return
        self._closed = True
        await self._bell.aclose()
        with contextlib.suppress(StoreError):
            if self._in_doubt or self._pending.corrections or self._pending.released:
                await self._commit(Batch())
            await self._ask("leave")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _adopt(self, reply: dict[str, Any]) -> Terms:
        self._codec = Codec.from_config(reply["terms"])
        return self._codec.terms

    async def _ask(self, verb: str, *args: str | int, patience: float = PATIENCE) -> dict[str, Any]:
        try:
            async with asyncio.timeout(patience):
                return await self._run(verb, *args)
        except TimeoutError as error:
            raise self._server.timeout_error(patience) from error

    async def _run(self, verb: str, *args: str | int) -> dict[str, Any]:
        # An epoch that may have expired by itself, with nothing left to remember, is not a loss.
        known_epoch = (
            self._epoch if time.monotonic() < self._epoch_heard_at + self._epoch_life else ""
        )
        sent = time.monotonic()
        reply = await self._server.run(
            self._keys,
            verb,
            self._worker,
            known_epoch,
            secrets.token_hex(8),
            self._codec.terms_text if self._worker else "",
            self._channel,
            self._ttl,
            *args,
        )
        self._epoch = reply.get("epoch", self._epoch)
        if "life" in reply:
            self._epoch_heard_at, self._epoch_life = sent, reply["life"] * 1e-3
        return reply

    def __repr__(self) -> str:
        return f"<RedisLedger {self._name!r} on {self._server.url}, worker {self._worker}>"
