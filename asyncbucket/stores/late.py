"""What comes back after the limiter was closed: slots, and corrections of what calls used.

The desk and its connection are gone by then. So what comes back is gathered for a moment, and
reported to the store in a short visit. A visitor joins under the terms that it finds, so whatever
others have set since stays in force. If the store cannot be reached, slots expire by themselves.
"""

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

from asyncbucket.core.errors import StoreError
from asyncbucket.stores.returns import Leftover, Returns
from asyncbucket.stores.store import Correction, Store

#: For how many seconds to gather.
_GATHER: Final = 0.05

_log: Final = logging.getLogger("asyncbucket")


class LateReturns:
    """Take what comes back while there is no desk; belongs to one loop's thread."""

    def __init__(
        self,
        make_store: Callable[[], Store],
        name: str,
        *,
        slot_ttl: float,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        close: Callable[[Store], Awaitable[None]],
    ) -> None:
        self._make_store = make_store
        self._name = name
        self._slot_ttl = slot_ttl
        self._spawn = spawn
        self._close = close
        #: Slots of calls in flight whose desk is gone.
        self._held: set[str] = set()
        #: Slots that came back before their desk was completely closed.
        self._early: set[str] = set()
        self._returns = Returns()
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, slots: Iterable[str]) -> None:
        """Note which slots a closed desk leaves behind."""
        self._held |= set(slots) - self._early
        self._early.clear()

    def hand_over(self) -> set[str]:
        """Return the slots that are still held: another desk looks after them from now on."""
        held, self._held = self._held, set()
        return held

    def leftover(self) -> Leftover:
        """Return what is still held and what the store may not have heard: the loop has ended."""
        return frozenset(self.hand_over()), self._returns.unreported()

    async def take_over(self, leftovers: collections.deque[Leftover]) -> None:
        """Report to the store at once what was left behind elsewhere."""
        while leftovers:
            slots, unreported = leftovers.popleft()
            self._held |= slots - set(unreported.released)
            for correction in filter(_is_booked_at_store, unreported.corrections):
                self._returns.correct(correction)
            for slot in unreported.released:
                self._returns.release(slot)
        if self._returns:
            await self._report()

    def correct(self, correction: Correction) -> None:
        """Have a booking changed; corrections of calls admitted without the store are ignored."""
        if _is_booked_at_store(correction):
            self._returns.correct(correction)
            self._report_soon()

    def release(self, slot: str) -> None:
        """Give a slot back."""
        if slot not in self._held:
            self._early.add(slot)
        self._held.discard(slot)
        self._returns.release(slot)
        self._report_soon()

    def _report_soon(self) -> None:
        # With a timer, which a loop that ends drops; it would warn of a task made at its end.
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_GATHER, lambda: self._spawn(self._report()))

    async def _report(self) -> None:
        batch = self._returns.take()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        store = self._make_store()
        try:
            snapshot = await store.peek(self._name)
            if snapshot is not None:
                ledger = await store.open(self._name, snapshot.terms, slot_ttl=self._slot_ttl)
                await ledger.commit(batch)
                await ledger.aclose()
        except StoreError:
            _log.debug("the store is gone: slots expire by themselves")
        finally:
            await self._close(store)


def _is_booked_at_store(correction: Correction) -> bool:
    """Return whether it changes what was booked at the store; its ``start`` is 0 if nothing was."""
    return correction.start > 0
