"""Who holds the slots that others wait for, and whether they can still give them back."""

import asyncio
import gc
import logging
import threading
import time
from typing import Final

from asyncbucket.core.meters import NEVER

#: How long (ns) a loop may take to answer before it counts as blocked.
_PATIENCE: Final = 1_000_000_000
#: How long (ns) nobody passes before the collector is run; doubled if that found nothing.
_STALL: Final = 10_000_000_000
_LONGEST_STALL: Final = 64 * _STALL

_log: Final = logging.getLogger("asyncbucket")


class Holder:
    """Count the leases held on one event loop or, if ``loop`` is None, by plain threads."""

    __slots__ = ("leases", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.leases = 0


class BlockedLoops:
    """Tell whether every slot is held on loops that do not run.

    Synchronous code on an event loop's thread may wait for a call on another loop (LlamaIndex's
    ``VectorStoreIndex(use_async=True)`` does), while tasks of the blocked loop hold all slots.
    These come back only after that wait: a deadlock, unless the call passes without a slot.
    """

    def __init__(self) -> None:
        #: All plain threads together.
        self.threads = Holder(None)
        self._holders = [self.threads]
        self._by_thread: dict[int, Holder] = {}
        #: Calls that passed without a slot, because the holders of all slots were blocked.
        self.overridden = 0
        self._asked_at: int | None = None
        self._silent: set[asyncio.AbstractEventLoop | None] = set()
        #: For slots that are held on loops that run, or on none.
        self.stall = Stall()

    def current_holder(self) -> Holder:
        """Return the holder for the loop that runs in this thread; called under a lock.

        asyncio makes a system call for each answer (to detect forks), so the answer is kept while
        that loop runs.
        """
        thread = threading.get_ident()
        holder = self._by_thread.get(thread)
        if holder is None or holder.loop is None or not holder.loop.is_running():
            loop = asyncio._get_running_loop()  # noqa: SLF001 - None in a plain thread
            if loop is None:
                return self.threads
            holder = self._by_thread[thread] = Holder(loop)
            self._holders = [each for each in self._holders if each.leases or not each.loop]
            self._holders.append(holder)
        return holder

    @property
    def leases(self) -> int:
        """How many leases are held; if `check` says so, all of them on blocked loops."""
        return sum(holder.leases for holder in self._holders)

    def check(self, own_loop: asyncio.AbstractEventLoop, now: int) -> int:
        """Return ``now`` if all holders are blocked, else when to check again, or `NEVER`."""
        holders = {holder.loop for holder in self._holders if holder.leases}
        if not holders or own_loop in holders or None in holders:
            return self.stall.check(self, own_loop, now)
        if self._asked_at is not None and now - self._asked_at < _PATIENCE:
            return self._asked_at + _PATIENCE
        if self._asked_at is not None and self._silent.issuperset(holders):
            return now
        self._asked_at = now
        self._silent = holders.copy()
        for loop in holders:
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._silent.discard, loop)
        return now + _PATIENCE

    def override(self, own_loop: asyncio.AbstractEventLoop) -> None:
        """Count a call that passes without a slot, and log a warning for the first."""
        self.overridden += 1
        if self.overridden == 1:
            own_loop.call_soon(
                _log.warning,
                "a call passed without a slot: every slot is held on an event loop that has been "
                "blocked for over 1 s; await on that loop instead of blocking it",
            )


class Stall:
    """Run the garbage collector if nobody passes for a while and it does not run by itself.

    An SDK's reply that was dropped unread is part of a reference cycle, and holds its slot until it
    is collected. A program that only waits for a slot creates no garbage, so the collector would
    never run.
    """

    def __init__(self) -> None:
        #: When a waiting call last passed.
        self.last_passed = 0
        #: How long to wait without an admission.
        self.span = _STALL
        #: The `last_passed` that is watched, until when, and how often the collector had run
        #: before.
        self._since, self._end, self._gc_runs = -1, 0, 0

    def check(self, holders: BlockedLoops, own_loop: asyncio.AbstractEventLoop, now: int) -> int:
        """Run the collector if it is time; return when that will be, or `NEVER`."""
        if abs(time.monotonic_ns() - now) > _STALL:  # on virtual time nobody really waits
            return NEVER
        if self._since != self.last_passed:
            self._since, self._end, self._gc_runs = self.last_passed, now + self.span, gc_runs()
        if now < self._end:
            return self._end
        if self._gc_runs == gc_runs():
            own_loop.call_soon(self._collect, holders)  # not with the lock held
        return NEVER

    def _collect(self, holders: BlockedLoops) -> None:
        before = holders.leases
        gc.collect()
        found = holders.leases < before
        self.span = _STALL if found else min(2 * self.span, _LONGEST_STALL)


def gc_runs() -> int:
    """Return how often the collector has made a full collection."""
    times: int = gc.get_stats()[-1]["collections"]
    return times
