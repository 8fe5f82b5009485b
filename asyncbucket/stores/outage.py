"""Going on alone while the store is gone, and coming back to it.

``"share"`` gives each worker its part of every limit: with N units and w workers, as the store
last said, N / w, rounded down. But a window does not begin anew when the store goes: what all
workers took before still counts. So each worker keeps a record of its own calls. Until a window has
passed, it may only take as much as leaves the window in its own record, plus its part of what the
store was last known to have left, and never more than its share. Summed over all workers, what was
taken before, minus what has left the window, grows by at most that and by what was left, and so
never exceeds N. After a window, everything that counts was taken alone, and the shares add up to N
again.

A worker that finds the store again tells it what it took and when, as debts that fill a limit, but no
further. It asks for nothing at once: the store learns what the others took alone only when they have
found it, too (`RECOVERY_TIME`).

In a mass start, workers that come later divide by a larger number. So a share means nothing before the
number has been steady (`STEADY`): until then nobody is admitted alone.

What remains is what others took since this worker last heard from the store: by that much an outage
may exceed a limit. ``"closed"`` admits nobody, ``"open"`` everybody.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from asyncbucket.engine.errors import StoreError
from asyncbucket.engine.events import StoreLost, StoreRecovered
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import NEVER, Amounts, Bucket
from asyncbucket.engine.wording import counted, in_seconds
from asyncbucket.stores.state import State
from asyncbucket.stores.store import SLOT, Correction, LimitConfig, Receipt

if TYPE_CHECKING:
    from asyncbucket.stores.place import StorePlace

#: How long (ns) to wait between attempts to reach a store that is gone.
_RETRY_INTERVAL: Final = 250_000_000
#: After this long (ns) all workers have found the store again and reported what they took, which
#: costs one trip that fails and one that does not.
RECOVERY_TIME: Final = _RETRY_INTERVAL + 250_000_000
#: For how long (ns) no worker may have come before a share means anything.
STEADY: Final = 1_000_000_000
#: What was admitted alone is remembered by instants this far apart (ns), and for this many of them.
_GRAIN: Final = 100_000_000
_MOST: Final = 1_024

_log: Final = logging.getLogger("asyncbucket")


def take_share(record: State, workers: int, left: Sequence[int], now: int) -> None:
    """Have ``record`` allow one of ``workers`` its part, of which it may have taken some already.

    ``left`` is what the store had left of each limit when last heard; nothing if empty.
    """
    date = record.last_start = max(now, record.last_start)
    windows = record.windows.values()
    for window, known in zip(windows, left or [0] * len(windows), strict=True):
        limit = window.limit
        window.amount, window.pace = limit.units // workers, None
        own = window.amount - window.available(date)
        window.book(max(0, window.amount - own - max(0, known) // workers), date)
        burst = limit.burst_units
        if burst is not None and burst != limit.units:
            rate = Fraction(limit.units * 1_000_000_000, limit.window * workers)
            window.pace = Bucket(rate=rate, burst=max(1, burst // workers))
            window.pace.book(window.pace.burst, date)


class StoreHealth:
    """Know whether the store of a limiter answers, and what may pass while it does not.

    Instants are ns of the worker's own clock.
    """

    def __init__(self, place: "StorePlace", config: LimitConfig) -> None:
        #: What this worker took of every limit; its instants are ns of the store's clock.
        self.record = State(config)
        self.is_gone = False
        #: When to try a store again that is gone.
        self.retry_at = NEVER
        #: Since when not.
        self._lost_at = 0
        #: What was admitted alone, and when by the store's clock; it is reported to the store afterwards.
        self._admitted: list[tuple[int, Counter[str]]] = []
        #: Until when no call is sent after an outage, as others may still have to report theirs.
        self.resume_at = 0
        #: What the store said last.
        self.heard = Receipt(now=0)
        #: The store's clock minus this one.
        self.offset = 0
        self._place = place
        self._clock = place.clock

    def note_answer(self, receipt: Receipt, config: LimitConfig) -> list[Correction]:
        """Note what an answer says; ``config`` is in force.

        Return what was admitted while the store was gone, as debts.
        """
        now = self._clock()
        debts = self._recover(now) if self.is_gone else []
        self.offset, self.heard = receipt.now - now, receipt
        self.record.configure(config, receipt.now)
        return debts

    def left(self) -> dict[Limit, int]:
        """Return what the store had left of each limit when last heard."""
        return dict(zip(self.record.config.limits, self.heard.left, strict=False))

    def fail(self, error: StoreError) -> None:
        """Note that the store did not answer: go on alone from now on, and try again later."""
        place, now = self._place, self._clock()
        self.retry_at = now + _RETRY_INTERVAL
        if self.is_gone:
            return
        self.is_gone, self._lost_at = True, now
        self.heard = replace(self.heard, in_line=False, crowded=False)
        if (root := place.root) is not None:  # any of its processes may have calls of the tenant
            known = root.health
            self.offset = self.offset if self.heard.now else known.offset
            self.heard = replace(self.heard, workers=known.heard.workers, steady=known.heard.steady)
        workers = self.heard.workers
        if place.on_outage == "share":
            take_share(self.record, workers, self.heard.left, now + self.offset)
        if root is not None:  # it says the same
            return
        how = place.name, place.on_outage, workers
        says = "%s; limiter %s goes on alone (%s), as 1 of %d"
        if place.on_outage == "share" and not self._is_steady():
            says += ", once it is back: they had only just come, so no share is known"
        _log.warning(says, error, *how)
        place.notify(StoreLost, reason=str(error))

    def earliest_alone(self, amounts: Amounts, now: int, *, held: int) -> int:
        """Book a call without the store if it may pass now; return when it may.

        `NEVER` means that it depends on the store, or on a slot being given back.
        """
        slots, policy = self.record.config.concurrency, self._place.on_outage
        is_short = slots is not None and held + 1 > slots // self.heard.workers
        if policy == "closed" or (policy == "share" and (is_short or not self._is_steady())):
            return NEVER
        date = max(now + self.offset, self.record.last_start)
        due, _ = (date, None) if policy == "open" else self.record.earliest(amounts, date)
        if due > date:
            return due - self.offset
        self.record.book(amounts, date)
        self._note_admitted(date, amounts)
        return now

    def _is_steady(self) -> bool:
        return self.heard.steady >= STEADY

    def _note_admitted(self, date: int, amounts: Amounts) -> None:
        noted = self._admitted
        units = Counter({n: units for n, units in amounts.items() if units and n != SLOT})
        if noted and date < noted[-1][0] + _GRAIN:
            noted[-1][1].update(units)
        else:
            noted.append((date, units))
        if len(noted) > _MOST:  # neighbors become one, at the later instant
            pairs = zip(noted[::2], noted[1::2], strict=False)
            noted[: len(noted) // 2 * 2] = [(when, old + new) for (_, old), (when, new) in pairs]

    def _recover(self, now: int) -> list[Correction]:
        """Go on with the store; return what was admitted without it, as debts."""
        place = self._place
        self.is_gone, self.retry_at = False, NEVER
        if place.on_outage == "share":
            self.resume_at = now + RECOVERY_TIME
        admitted, self._admitted = self._admitted, []
        debts = [
            Correction(start=when, booked={}, used=dict(units), dated=True)
            for when, units in admitted
        ]
        if place.root is not None:
            return debts
        in_all: Counter[str] = sum((units for _, units in admitted), Counter())
        seconds = (now - self._lost_at) * 1e-9
        _log.warning(
            "the store of limiter %s is back after %s; admitted without it: %s",
            place.name,
            in_seconds(seconds),
            ", ".join(counted(units, name) for name, units in in_all.items()) or "nothing",
        )
        place.notify(StoreRecovered, seconds=seconds)
        return debts
