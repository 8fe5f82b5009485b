"""What came back to a worker and is not yet reported, corrections and slots; and when to report it."""

from dataclasses import replace
from typing import Final, TypeAlias

from asyncbucket.core.meters import NEVER
from asyncbucket.stores.store import Batch, Correction, Outcome, Receipt

#: For how long (ns) to gather while nobody is known to wait for it, and while somebody waits: less
#: than a round trip takes, so what comes back in between goes with it.
_GATHER: Final = 50_000_000
_GATHER_BRIEFLY: Final = 500_000

#: What a loop that has ended leaves: slots held by calls, and what the store may not have heard.
Leftover: TypeAlias = tuple[frozenset[str], Batch]


class Returns:
    """Gather what the next batch reports; all instants are ns of the worker's clock."""

    def __init__(self) -> None:
        self._corrections: list[Correction] = []
        self._released: list[str] = []
        #: Slots that went with the last batch, which may not have arrived.
        self._sent: tuple[str, ...] = ()
        #: When it must be reported, even if no call goes.
        self.report_at = NEVER

    def __bool__(self) -> bool:
        return bool(self._corrections or self._released)

    def correct(self, correction: Correction) -> None:
        """Add a change of a booking."""
        self._corrections.append(correction)

    def release(self, slot: str) -> None:
        """Give a slot back."""
        self._released.append(slot)

    def gather(self, now: int, *, awaited: bool, busy_until: int) -> None:
        """Schedule the report: very soon if a call waits for it, here or elsewhere, else soon.

        While starts lie ahead there is more time: no call that gets it would start before
        ``busy_until``.
        """
        soon, late = now + _GATHER_BRIEFLY, now + _GATHER
        self.report_at = min(self.report_at, min(late, max(soon, busy_until)) if awaited else late)

    def take(self) -> Batch:
        """Return it as a batch, and start gathering anew."""
        batch = Batch(corrections=tuple(self._corrections), released=tuple(self._released))
        self._corrections, self._released, self.report_at = [], [], NEVER
        self._sent = batch.released
        return batch

    def unreported(self) -> Batch:
        """Return what the store may not have heard, for another desk to report.

        A slot may be given back twice, a correction may not: corrections of a batch that was not
        answered are left out.
        """
        return Batch(corrections=tuple(self._corrections), released=(*self._sent, *self._released))


def reversal(batch: Batch, receipt: Receipt) -> Batch:
    """Return a batch that gives back everything booked for the calls of ``batch``, if any was."""
    calls = batch.calls if receipt.bookings else ()
    booked = [
        (call, booking)
        for call, booking in zip(calls, receipt.bookings, strict=True)
        if booking.outcome is Outcome.BOOKED
    ]
    return Batch(
        corrections=tuple(Correction.undo(call, booking.start) for call, booking in booked),
        released=tuple(booking.slot for _, booking in booked if booking.slot is not None),
    )


def merged(first: Batch, batch: Batch) -> Batch:
    """Return ``batch`` with the corrections and releases of ``first`` before its own."""
    return replace(
        batch,
        corrections=first.corrections + batch.corrections,
        released=first.released + batch.released,
    )
