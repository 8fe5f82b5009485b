"""What goes in: items one after the other, from any iterable, and whether they are done already."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio
from anyio import to_thread

from asyncbucket.batch.item import Entry

if TYPE_CHECKING:
    from asyncbucket.batch.checkpoint import Ledger

T = TypeVar("T")

#: How many items of a plain iterable are looked up in a checkpoint at a time.
_LOOK_AHEAD: Final = 64


class Source(Generic[T]):
    """Hand out items, to one worker at a time. At most `_LOOK_AHEAD` are taken before they are wanted.

    A plain iterable is iterated on the event loop's thread, so one that blocks would block the
    loop.

    Raises:
        TypeError: ``items`` is a text, or cannot be iterated.
    """

    def __init__(self, items: Iterable[T] | AsyncIterable[T]) -> None:
        self._iterator: Iterator[T] | None = None
        self._async_iterator: AsyncIterator[T] | None = None
        if isinstance(items, (str, bytes)):
            raise TypeError(
                f"items is one string, which would be a call for each of its {len(items):,} characters: "
                f"give a list of strings, or the open file if this is its name"
            )
        if isinstance(items, AsyncIterable):
            self._async_iterator = aiter(items)
        else:
            self._iterator = iter(items)
        #: How many items there are, if known.
        self.total = len(items) if isinstance(items, Sized) else None
        #: Knows which items are done; set before the first is requested.
        self.ledger: Ledger | None = None
        self._lock = anyio.Lock(fast_acquire=True)
        self._ready: list[Entry] = []
        self._number = 0
        self._is_done = False
        self._failure: Exception | None = None

    def stop(self) -> None:
        """Hand out no more items."""
        self._is_done = True

    async def next(self) -> Entry | None:
        """Return the next item, or None after the last.

        Raises:
            Exception: the iterable's own error, after all earlier items were handed out.
        """
        if self._iterator is not None and self.ledger is None:  # the usual case: a short cut
            if self._is_done:
                return None
            for item in self._iterator:
                return self._entry(item)
            self._is_done = True
            return None
        async with self._lock:
            if not self._ready and not self._is_done:
                await self._fetch()
            return None if self._is_done or not self._ready else self._ready.pop()

    def _entry(self, item: Any) -> Entry:
        index = self._number
        self._number = index + 1
        return Entry(index, item)

    async def _fetch(self) -> None:
        """Take some items and find out which of them are done."""
        if self._failure is not None:
            raise self._failure
        entries: list[Entry] = []
        try:
            if self._async_iterator is None:
                assert self._iterator is not None
                for item in islice(self._iterator, _LOOK_AHEAD):
                    entries.append(self._entry(item))  # noqa: PERF401 - kept if the next one raises
            else:
                async for item in self._async_iterator:
                    entries.append(self._entry(item))
                    break
        except Exception as error:
            if not entries:
                raise
            self._failure = error
        self._is_done = not entries
        if entries and self.ledger is not None:
            entries = await to_thread.run_sync(self.ledger.look_up, entries)
        self._ready = entries[::-1]

    async def aclose(self) -> None:
        """Close an async generator, because nobody else would in time."""
        close = getattr(self._async_iterator, "aclose", None)
        if close is not None:
            with anyio.CancelScope(shield=True):
                await close()
