"""Who holds the slots that others wait for, and whether they can still give them back."""

import asyncio
import gc
import logging
import threading
import time
from typing import Final

from asyncbucket.meters import NEVER

#: How long (ns) the loops that hold all slots may leave a question unanswered.
_PATIENCE: Final = 1_000_000_000
#: For how long (ns) nobody passes until the collector is called; twice as long when it found nothing.
_STALL: Final = 10_000_000_000
_LONGEST_STALL: Final = 64 * _STALL

_log: Final = logging.getLogger("asyncbucket")


class Holder:
    """Count the leases held on one event loop or, where ``loop`` is None, by plain threads."""

    __slots__ = ("leases", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.leases = 0


class BlockedLoops:
    """Tell whether every slot is held on loops that do not run.

    Synchronous code on an event loop's thread may wait for a call on another loop (LlamaIndex's
    ``VectorStoreIndex(use_async=True)`` does), while tasks of the blocked loop hold all slots. They
    can be given back only after that wait: a deadlock, unless the call passes without a slot.
    """

    def __init__(self) -> None:
        #: Plain threads, all of them.
        self.threads = Holder(None)
        self._holders = [self.threads]
        self._here: dict[int, Holder] = {}
        #: Calls that passed without a slot, because each slot's holder was blocked.
        self.overridden = 0
        self._asked: int | None = None
        self._silent: set[asyncio.AbstractEventLoop | None] = set()
        #: For slots that are held on loops which run, or on none.
        self.stall = Stall()

    def here(self) -> Holder:
        """Return the holder for the loop that runs in this thread; called under a lock.

        asyncio answers that by a system call (it looks out for forks), so an answer is kept for as
        long as its loop runs.
        """
        thread = threading.get_ident()
        holder = self._here.get(thread)
        if holder is None or holder.loop is None or not holder.loop.is_running():
            loop = asyncio._get_running_loop()  # noqa: SLF001 - None in a plain thread
            if loop is None:
                return self.threads
            holder = self._here[thread] = Holder(loop)
            self._holders = [each for each in self._holders if each.leases or not each.loop]
            self._holders.append(holder)
        return holder

    @property
    def leases(self) -> int:
        """How many leases are held; all of them on blocked loops, where `check` says so."""
        return sum(holder.leases for holder in self._holders)

    def check(self, mine: asyncio.AbstractEventLoop, now: int) -> int:
        """Return ``now`` if all holders are blocked, else when to check again, or `NEVER`."""
        holders = {holder.loop for holder in self._holders if holder.leases}
        if not holders or mine in holders or None in holders:
            return self.stall.check(self, mine, now)
        if self._asked is not None and now - self._asked < _PATIENCE:
            return self._asked + _PATIENCE
        if self._asked is not None and self._silent.issuperset(holders):
            return now
        self._asked = now
        self._silent = holders.copy()
        for loop in holders:
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._silent.discard, loop)
        return now + _PATIENCE

    def override(self, mine: asyncio.AbstractEventLoop) -> None:
        """Count a call that passes without a slot, and warn of the first."""
        self.overridden += 1
        if self.overridden == 1:
            mine.call_soon(
                _log.warning,
                "a call passed without a slot: every slot is held on an event loop that has been "
                "blocked for over 1 s; await on that loop instead of blocking it",
            )


class Stall:
    """Call the collector where nobody passes for a while, and it does not come by itself.

    A reply of an SDK that was dropped unread refers to itself, and holds its slot until it is
    collected. A program that does nothing but wait for a slot makes no garbage, so the collector
    would never come.
    """

    def __init__(self) -> None:
        #: When one of those who wait passed last.
        self.passed = 0
        #: For how long to be patient.
        self.span = _STALL
        #: For which `passed`, until when, and how often the collector had come by before.
        self._since, self._end, self._visits = -1, 0, 0

    def check(self, holders: BlockedLoops, mine: asyncio.AbstractEventLoop, now: int) -> int:
        """Call the collector if it is time for it; return when that will be, or `NEVER`."""
        if abs(time.monotonic_ns() - now) > _STALL:  # on virtual time nobody really waits
            return NEVER
        if self._since != self.passed:
            self._since, self._end, self._visits = self.passed, now + self.span, visits()
        if now < self._end:
            return self._end
        if self._visits == visits():
            mine.call_soon(self._collect, holders)  # not with the lock held
        return NEVER

    def _collect(self, holders: BlockedLoops) -> None:
        before = holders.leases
        gc.collect()
        found = holders.leases < before
        self.span = _STALL if found else min(2 * self.span, _LONGEST_STALL)


def visits() -> int:
    """Return how often the collector has looked at everything."""
    times: int = gc.get_stats()[-1]["collections"]
    return times
