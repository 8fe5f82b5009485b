"""One batch's way through the books: which of its calls are booked, and when the rest ask again."""

from typing import TYPE_CHECKING, Final

from asyncbucket.core.meters import Amounts
from asyncbucket.stores.sqlite.line import ASK_AGAIN, Turn
from asyncbucket.stores.store import FAR, Batch, Booking, Outcome

if TYPE_CHECKING:
    from asyncbucket.stores.sqlite.books import Books

#: The resource of which a slot is one unit.
SLOT: Final = "concurrency"
#: The shortest time (ns) before a worker asks again on account of the clock alone.
_SOON: Final = 5_000_000


class Admission:
    """Book the calls of a batch in order, until one has to wait in a line."""

    def __init__(self, books: "Books", worker: str, batch: Batch, now: int, *, life: int) -> None:
        self._books = books
        self._worker = worker
        self._batch = batch
        self._now = now
        self._life = life
        self._held = books.held(now)
        #: What the worker waited for: slots for how many calls, and units for the first.
        self._slots_wanted = books.line.wanted(worker)
        self._turn = books.turns.of(worker)
        self._booked = 0
        #: Calls that would start later than this have to ask again.
        self._latest_start = 0
        self._ask_at = 0

    def run(self) -> tuple[tuple[Booking, ...], int]:
        """Return the answers, and when to ask again for calls that were not booked."""
        answers: list[Booking] = []
        stop: Booking | None = None
        for amounts in self._batch.calls:
            exceeded = self._books.exceeded(amounts)
            if exceeded is not None:
                answers.append(Booking(Outcome.NEVER, bound_by=exceeded))
                continue
            answer = stop or self._answer(amounts)
            if answer.outcome is not Outcome.BOOKED:
                stop = answer
            answers.append(answer)
        if stop is not None:
            self._stand_in_line(stop)
        elif not answers:  # nobody waits any more
            self._books.line.leave(self._worker)
            self._books.turns.leave(self._worker)
        return tuple(answers), self._ask_at

    def _answer(self, amounts: Amounts) -> Booking:
        """Book a call, or say what it has to wait for."""
        books, now = self._books, self._now
        if amounts.get(SLOT) and books.has_no_slot_for(self._worker, now, self._held):
            self._ask_at = min([now + ASK_AGAIN, *books.slots.values()])
            return Booking(Outcome.FULL, bound_by=SLOT)
        if not self._booked:
            return self._answer_first(amounts)
        start, bound_by = books.earliest(amounts, now)
        if start > self._latest_start:
            self._ask_at = max(now, books.last_start - self._batch.horizon)
            return Booking(Outcome.LATER, bound_by=bound_by)
        return self._book(amounts, start, bound_by)

    def _answer_first(self, amounts: Amounts) -> Booking:
        """Book the worker's next call if it may start soon and no other worker comes first."""
        books, now = self._books, self._now
        wanted = {name: amount for name, amount in amounts.items() if amount}
        since = self._turn.since if self._turn is not None and self._turn.amounts == wanted else 0
        start, bound_by = books.earliest(amounts, now, since=since)
        first = books.turns.first(now, books.workers)
        if first is not None and first.worker != self._worker:
            self._ask_at = max(first.ask_at, now) + ASK_AGAIN  # it is notified when it is the first
            since = 0
        elif start > now + FAR:
            self._ask_at = max(now + _SOON, start - FAR)
            since = since or max(now, books.last_start)
        else:
            return self._book(amounts, start, bound_by)
        books.turns.enter(Turn(self._worker, self._ask_at, wanted, bound_by, since))
        return Booking(Outcome.LATER, bound_by=bound_by)

    def _waited_for(self, amounts: Amounts) -> str | None:
        """Return what held up a call that may start at once now."""
        if amounts.get(SLOT) and self._booked < self._slots_wanted:
            return SLOT
        return self._turn.bound_by if self._turn is not None and not self._booked else None

    def _book(self, amounts: Amounts, start: int, bound_by: str | None) -> Booking:
        books = self._books
        bound_by = bound_by or self._waited_for(amounts)
        if not self._booked:
            self._latest_start = start + self._batch.horizon
        self._booked += 1
        self._held[self._worker] += 1
        books.line.leave(self._worker)
        books.turns.leave(self._worker)
        return books.book(self._worker, amounts, start, bound_by, life=self._life)

    def _stand_in_line(self, stop: Booking) -> None:
        """Wait for a slot, or no longer for one."""
        books = self._books
        if stop.outcome is Outcome.FULL:
            wanted = len(self._batch.calls) - self._booked
            books.turns.leave(self._worker)
            books.line.enter(self._worker, self._now, wanted=wanted)
        else:
            books.line.leave(self._worker)
