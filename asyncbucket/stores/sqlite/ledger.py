"""One worker's access to the books of a limiter; see `asyncbucket.stores.store.Ledger`."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from asyncbucket.core.errors import StoreError
from asyncbucket.core.process import reset_after_fork
from asyncbucket.stores.returns import merged, reversal
from asyncbucket.stores.sqlite.admission import SLOT
from asyncbucket.stores.sqlite.file_thread import Answer, FileThread, Job, ListNames, Watch
from asyncbucket.stores.sqlite.verbs import Commit, Configure, Heartbeat, Hold, Leave, Verb
from asyncbucket.stores.store import (
    Batch,
    Outcome,
    Pulse,
    Receipt,
    Snapshot,
    Terms,
)

#: How much longer (s) than for the lock to wait for the thread's report.
_GRACE: Final = 0.05
#: Seconds that opening may take at least: a new file is flushed to the disk.
_OPEN_PATIENCE: Final = 5.0


class SQLiteLedger:
    """Keep the meters of one limiter in a file; made by `SQLiteStore.open`."""

    def __init__(
        self,
        file_thread: FileThread,
        name: str,
        terms: Terms,
        *,
        worker: str,
        life: int,
        patience: float,
    ) -> None:
        self._file_thread = file_thread
        self._name = name
        self._terms = terms
        self._worker = worker
        self._life = life
        self._patience = patience
        self._edition = 0
        #: What failed batches wanted corrected and released.
        self._pending = Batch()
        #: Whether this worker stands in one of the store's lines.
        self._in_line = False
        self._is_open = True
        #: The store, which must not be garbage-collected while its ledger lives.
        self.store: object = None
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Go on as another worker in a child process."""
        self._worker += "'"
        self._pending = Batch()
        self._in_line = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def worker(self) -> str:
        return self._worker

    @property
    def terms(self) -> Terms:
        return self._terms

    async def join(self) -> None:
        """Make the limiter if necessary, and put the terms in force."""
        heartbeat = Heartbeat(self._worker, self._life)
        patience = max(self._patience, _OPEN_PATIENCE)
        answer = await self._ask(Configure(self._terms), heartbeat, patience=patience)
        self._edition = answer.edition

    async def commit(self, batch: Batch) -> Receipt:
        _check(batch)
        answer = await self._commit(batch)
        receipt: Receipt = answer.result
        if receipt.bookings:
            outcomes = {booking.outcome for booking in receipt.bookings}
            self._in_line = Outcome.FULL in outcomes or (
                Outcome.LATER in outcomes and Outcome.BOOKED not in outcomes
            )
        return replace(receipt, changed=self._changed_terms(answer))

    async def heartbeat(self, slots: Sequence[str]) -> Pulse:
        answer = await self._ask(Heartbeat(self._worker, self._life, tuple(slots)))
        pulse: Pulse = answer.result
        return replace(pulse, changed=self._changed_terms(answer))

    async def changed(self, *, timeout: float) -> bool:
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[bool] = loop.create_future()
        watch = Watch(self._name, self._worker, self._edition, self._in_line, changed)
        timer = loop.call_later(timeout, _give_up, changed)
        try:
            self._file_thread.put(watch)
            return await changed
        finally:
            timer.cancel()

    async def pause(self, span: int, *, gradually: bool = False) -> None:
        await self._ask(Hold(span, gradually))

    async def configure(self, terms: Terms) -> None:
        answer = await self._ask(Configure(terms))
        self._terms, self._edition = terms, answer.edition

    async def peek(self) -> Snapshot:
        snapshot = await self.look()
        assert snapshot is not None
        return snapshot

    async def look(self) -> Snapshot | None:
        """Return a snapshot of the limiter, joined or not; None if there is none."""
        snapshot: Snapshot | None = (await self._ask()).result
        return snapshot

    async def names(self) -> list[str]:
        """Return the names of all limiters in the file."""
        names: list[str] = (await self._ask(job_type=ListNames)).result
        return names

    async def aclose(self) -> None:
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(StoreError):  # the line and the count expire by themselves
                await self._ask(Leave(self._worker))

    def __repr__(self) -> str:
        return f"<SQLiteLedger {self._name!r}, worker {self._worker}>"

    def _changed_terms(self, answer: Answer) -> Terms | None:
        """Return the terms in force if they differ from those we knew."""
        if answer.edition == self._edition:
            return None
        self._edition = answer.edition
        ours, self._terms = self._terms, answer.terms
        return None if ours == answer.terms else answer.terms

    async def _commit(self, batch: Batch) -> Answer:
        """Apply ``batch`` after what failed batches have left; undo what nobody awaits any more."""
        pending, self._pending = self._pending, Batch()
        batch = merged(pending, batch)
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def verbs() -> tuple[Verb, ...]:
            to_apply = replace(batch, calls=()) if answered.done() else batch
            return (Commit(self._worker, self._life, to_apply),)

        def done(answer: Answer | None, error: StoreError | None) -> None:
            if answer is None:
                self._pending = merged(batch, self._pending)
            elif answered.done():
                self._undo(batch, answer.result)
            _resolve(answered, answer, error)

        job = Job(self._name, verbs, answered.get_loop(), done)
        try:
            return await self._wait(answered, job, self._patience)
        except asyncio.CancelledError:
            # The answer was there, but the caller was cancelled before it got it.
            if not answered.cancelled() and answered.exception() is None:
                self._undo(batch, answered.result().result)
            raise

    def _undo(self, batch: Batch, receipt: Receipt) -> None:
        """Give back what was booked for a caller that is gone."""
        undo = reversal(batch, receipt)
        self._pending = merged(self._pending, undo)
        if undo.corrections:
            self._flush()

    def _flush(self) -> None:
        """Send what is kept now; if that fails, keep it."""
        pending, self._pending = self._pending, Batch()

        def done(answer: Answer | None, _: StoreError | None) -> None:
            if answer is None:
                self._pending = merged(pending, self._pending)

        verb = Commit(self._worker, self._life, pending)
        with contextlib.suppress(StoreError):  # closed meanwhile: it stays counted, and expires
            self._file_thread.put(
                Job(self._name, lambda: (verb,), asyncio.get_running_loop(), done)
            )

    async def _ask(
        self, *verbs: Verb, job_type: type[Job] = Job, patience: float | None = None
    ) -> Answer:
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def done(answer: Answer | None, error: StoreError | None) -> None:
            _resolve(answered, answer, error)

        if self._pending.corrections or self._pending.released:
            self._flush()
        job = job_type(self._name, lambda: verbs, answered.get_loop(), done)
        return await self._wait(answered, job, patience or self._patience)

    async def _wait(self, answered: "asyncio.Future[Answer]", job: Job, patience: float) -> Answer:
        loop = answered.get_loop()
        timer = loop.call_later(patience + _GRACE, _time_out, answered, patience)
        try:
            self._file_thread.put(job)
            return await answered
        finally:
            timer.cancel()


def _time_out(answered: "asyncio.Future[Answer]", patience: float) -> None:
    error = StoreError(
        f"the disk has not answered for {patience:g} s: see what keeps it busy, or allow more with "
        f"?patience={max(5, patience * 4):g}"
    )
    _resolve(answered, None, error)


def _resolve(
    answered: "asyncio.Future[Answer]", answer: Answer | None, error: StoreError | None
) -> None:
    if answered.done():
        return
    if answer is not None:
        answered.set_result(answer)
    elif error is not None:
        answered.set_exception(error)


def _give_up(changed: "asyncio.Future[bool]") -> None:
    if not changed.done():
        changed.set_result(False)


def _check(batch: Batch) -> None:
    """Refuse amounts and instants that are not whole numbers from 0 on, before they are kept."""
    amounts: list[Mapping[str, Any]] = list(batch.calls)
    for correction in batch.corrections:
        amounts += [correction.booked, correction.used, {"start": correction.start}]
    for named_amounts in (*amounts, {"horizon": batch.horizon}):
        for name, amount in named_amounts.items():
            if type(amount) is not int or amount < 0:
                raise ValueError(f"{name} must be a whole number from 0 on, not {amount!r}")
        if named_amounts.get(SLOT, 0) > 1:
            raise ValueError(f"a call takes one slot, not {named_amounts[SLOT]:,}")
