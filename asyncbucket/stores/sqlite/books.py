"""The books of one limiter: its meters and slots, and what each batch of a worker does to them.

Nothing here waits, reads a clock or knows of files. Each verb gets ``now``, and its result depends
only on the earlier state of the books and on its arguments. So two processes that apply the same
verbs in the same order keep the same books: the journal in the file holds verbs.

Calls are booked at instants that may lie ahead, but never before the last one booked: dates in a
`Window` ascend, whoever books.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

from asyncbucket.core.gates import Gates
from asyncbucket.core.kept import Kept, keep
from asyncbucket.core.meters import NEVER, Amounts, Bucket, Meter, Window
from asyncbucket.feedback.pause import Pause
from asyncbucket.stores.sqlite.admission import SLOT, Admission
from asyncbucket.stores.sqlite.line import Line, Turns
from asyncbucket.stores.store import (
    FAR,
    Batch,
    Booking,
    Correction,
    Outcome,
    Pulse,
    Receipt,
    Snapshot,
    Terms,
    Use,
)

#: What identifies a limit: the resource, and the window in ns.
Key: TypeAlias = tuple[str, int]

#: Books are kept for at least this long (ns).
_MIN_LIFE: Final = 60_000_000_000
#: No instant in a file is later: a huge debt is practically never paid off.
_FOREVER: Final = (1 << 63) - 1


class Books:
    """Keep the meters and slots of one limiter; all instants are ns of one clock."""

    def __init__(self, terms: Terms) -> None:
        #: Counts the terms that have been in force.
        self.edition = 0
        self.terms = Terms(limits=())
        self.limits: dict[Key, Kept] = {}
        #: The meters of all limits.
        self.gates = Gates(())
        #: Slots that are taken, and until when they live without a heartbeat.
        self.slots: dict[str, int] = {}
        #: Workers that wait for slots, and those that wait for units.
        self.line = Line()
        self.turns = Turns()
        #: Workers, and until when they count without a sign of life.
        self.workers: dict[str, int] = {}
        self.pause = Pause()
        self.last_start = 0
        self.last_bound: str | None = None
        #: Counts the slots ever given, for their names.
        self.given = 0
        self.configure(terms, 0)

    def commit(self, worker: str, batch: Batch, now: int, *, life: int) -> Receipt:
        """See `asyncbucket.stores.store.Ledger.commit`; ``life`` (ns) is that of a slot."""
        self._expire(now)
        self.workers[worker] = now + life
        debts_at = max(now, self.last_start)
        for correction in batch.corrections:
            self._correct(correction, debts_at)
        for slot in batch.released:
            self.slots.pop(slot, None)
        bookings, ask_at = Admission(self, worker, batch, now, life=life).run()
        return Receipt(
            now=now,
            bookings=bookings,
            debts_at=debts_at,
            ask_at=ask_at,
            left=self._left(now),
            workers=len(self.workers),
            crowded=self.line.has_others(worker),
        )

    def heartbeat(self, worker: str, slots: tuple[str, ...], now: int, *, life: int) -> Pulse:
        """See `asyncbucket.stores.store.Ledger.heartbeat`."""
        self._expire(now)
        self.workers[worker] = now + life
        for slot in slots:
            self.slots[slot] = max(self.slots.get(slot, 0), now + life)
        return Pulse(now=now, workers=len(self.workers), left=self._left(now))

    def hold(self, span: int, now: int, *, gradually: bool) -> None:
        """Let nobody start before ``now + span``; see `asyncbucket.stores.store.Ledger.pause`."""
        self.pause.begin(now + span, now, gradually=gradually)

    def configure(self, terms: Terms, now: int) -> None:
        """Put ``terms`` in force, keeping what was booked under limits that stay."""
        if terms == self.terms:
            return
        before, self.limits = self.limits, {}
        began = max(now, self.last_start)
        for limit in terms.limits:
            key = (limit.resource, limit.window)
            self.limits[key] = keep(limit, before.get(key), now, began=began)
        self.gates = Gates((meter, name[0][0]) for name, meter, _ in self.named_meters())
        self.terms = terms
        self.edition += 1

    def leave(self, worker: str) -> None:
        """Forget ``worker``; its slots stay until they are released, or expire."""
        self.line.leave(worker)
        self.turns.leave(worker)
        self.workers.pop(worker, None)

    def absorb(self, ours: "Books", now: int, *, origin: "Books") -> None:
        """Charge what ``ours`` know of the past and these books do not.

        ``origin`` is what these were started from: an earlier copy of ours, or nothing.
        """
        when = max(now, self.last_start)
        before = {name: meter.available(now) for name, meter, _ in origin.named_meters()}
        after = {name: meter.available(now) for name, meter, _ in ours.named_meters()}
        for name, meter, full in self.named_meters():
            begun_with = before.get(name, full)
            lacking = begun_with - after.get(name, begun_with)
            if lacking > 0:
                meter.owe(lacking, when)
        self.slots = ours.slots | self.slots
        self.last_start = max(self.last_start, ours.last_start)
        self.given = max(self.given, ours.given)

    def named_meters(self) -> Iterator[tuple[tuple[Key, type], Meter, int]]:
        """Yield each meter with a name for it, and with its size."""
        for key, (limit, window, bucket) in self.limits.items():
            yield (key, Window), window, limit.amount
            if bucket is not None:
                yield (key, Bucket), bucket, bucket.burst

    def should_ask(self, worker: str, now: int) -> bool:
        """Return whether ``worker``, which waits, should ask again; change nothing."""
        place = self.turns.of(worker)
        if place is not None:
            start, _ = self.earliest(place.amounts, now, since=place.since)
            first = self.turns.first(now, self.workers)
            return start <= now + FAR and (first is None or first.worker == worker)
        size = self.terms.concurrency
        held = self.held(now)
        free = NEVER if size is None else size - held.total()
        return self.line.should_ask(worker, now, held, free=free)

    def peek(self, now: int) -> Snapshot:
        """See `asyncbucket.stores.store.Ledger.peek`."""
        self._expire(now)
        uses: list[Use] = []
        for limit, window, bucket in self.limits.values():
            available = window.available(now)
            if bucket is not None:
                available = min(available, bucket.available(now))
            if self.last_start > now:
                available = min(available, 0)
            uses.append(Use(limit=limit, used=window.used, available=available))
        return Snapshot(
            now=now,
            terms=self.terms,
            limits=tuple(uses),
            slots=len(self.slots) if self.terms.concurrency is not None else 0,
            paused_until=self.pause.until,
            last_start=self.last_start,
            workers=len(self.workers),
        )

    def expires_at(self, now: int) -> int:
        """Return from when on there is nothing left to remember, if nothing else happens."""
        ends = [now + _MIN_LIFE, self.pause.until, *self.slots.values(), *self.workers.values()]
        for _, window, bucket in self.limits.values():
            ends.append(max(now, self.last_start) + 2 * window.window)
            if bucket is not None:
                ends.append(bucket.tat // bucket.q + 1)
        return min(max(ends), _FOREVER)

    def checksum(self) -> int:
        """Return a checksum that is the same for two copies of the same books.

        What windows and slots forget is left out, because they forget only when they are looked at.
        """
        total = self.last_start + self.pause.until + self.given + self.edition
        for kept in self.limits.values():
            total += 0 if kept.bucket is None else kept.bucket.tat
        return total % (1 << 31)

    def held(self, now: int) -> Counter[str]:
        """Count the slots that each worker holds; their names begin with the worker's."""
        return Counter(slot.partition(":")[0] for slot, until in self.slots.items() if until > now)

    def has_no_slot_for(self, worker: str, now: int, held: Mapping[str, int]) -> bool:
        """Return whether there is no slot for a call of ``worker``."""
        size = self.terms.concurrency
        if size is None:
            return False
        return size - len(self.slots) <= self.line.reserved_for_others(worker, now, held)

    def exceeded(self, amounts: Amounts) -> str | None:
        """Return the resource of which ``amounts`` exceeds a limit."""
        for limit, *_ in self.limits.values():
            if amounts.get(limit.resource, 0) > limit.amount:
                return limit.resource
        return None

    def earliest(self, amounts: Amounts, now: int, *, since: int = 0) -> tuple[int, str | None]:
        """Return when a call may start, after all that is booked, and what it waits for.

        A call above a burst earns the excess while it is first in line: since ``since``, or else
        since now.
        """
        start = max(now, self.last_start)
        bound_by = self.last_bound if start > now else None
        due, binds = self.gates.earliest(amounts, since or start)
        if due > start:
            start, bound_by = due, binds
        if self.pause.until > start:
            return self.pause.until, "paused"
        return start, bound_by

    def book(
        self, worker: str, amounts: Amounts, start: int, bound_by: str | None, *, life: int
    ) -> Booking:
        """Book a call in all limits, and give it a slot."""
        self.gates.book(amounts, start)
        self.pause.book(1, start)
        self.last_start, self.last_bound = start, bound_by
        slot = None
        if self.terms.concurrency is not None and amounts.get(SLOT):
            self.given += 1
            slot = f"{worker}:{self.given}"
            self.slots[slot] = start + life
        return Booking(Outcome.BOOKED, start, bound_by, slot)

    def _expire(self, now: int) -> None:
        for expiring in (self.slots, self.workers):
            if expiring and min(expiring.values()) <= now:
                for name in [name for name, until in expiring.items() if until <= now]:
                    del expiring[name]
        self.line.expire(now)
        self.turns.expire(now, self.workers)

    def _left(self, now: int) -> tuple[int, ...]:
        return tuple(kept.window.available(now) for kept in self.limits.values())

    def _correct(self, correction: Correction, debts_at: int) -> None:
        for resource, used in correction.used.items():
            more = used - correction.booked.get(resource, 0)
            for meter, meter_resource in self.gates.meters if more else ():
                if meter_resource != resource:
                    continue
                if more > 0:
                    meter.owe(more, debts_at)
                else:
                    meter.unbook(-more, correction.start, left=used)
