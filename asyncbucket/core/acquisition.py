"""What `Limiter.acquire` returns: await it, or enter it, to get a lease."""

import inspect
import warnings
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, NoReturn

from asyncbucket.core.cost import Cost
from asyncbucket.core.door import Door
from asyncbucket.core.lease import Lease


class Acquisition(Coroutine[Any, Any, Lease]):
    """Wait for a lease: ``await`` it, or enter it for a lease that is released on leaving.

    Nothing is taken before that, and ``timeout`` counts from then. For ``asyncio.create_task`` and
    the like it is a coroutine. It may be entered again after it was left, but not by several tasks
    at a time.
    """

    __name__ = "acquire"  # shown in the task's repr

    __slots__ = ("_amounts", "_coroutine", "_deadline", "_door", "_entered", "_lease", "_priority")

    def __init__(
        self,
        door: Door,
        amounts: dict[str, int],
        deadline: Callable[[], int | None] | None,
        priority: int,
    ) -> None:
        self._door = door
        self._amounts = amounts
        self._deadline = deadline
        self._priority = priority
        self._entered = False
        self._lease: Lease | None = None
        self._coroutine: Generator[Any, Any, Lease] | None = None

    def __await__(self) -> Generator[Any, Any, Lease]:
        lease = self._door.try_now(self._amounts)
        if lease is None:
            lease = yield from self._wait().__await__()
        return lease

    def _wait(self) -> Coroutine[Any, Any, Lease]:
        deadline = None if self._deadline is None else self._deadline()
        return self._door.wait(self._amounts, deadline, self._priority)

    async def __aenter__(self) -> Lease:
        if self._entered:  # it could not tell which lease to release on leaving
            raise RuntimeError(
                "this acquisition is entered already: call acquire() for another lease"
            )
        self._entered = True
        try:
            lease = self._door.try_now(self._amounts)
            if lease is None:
                lease = await self._wait()
        except BaseException:
            self._entered = False
            raise
        self._lease = lease
        return lease

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        lease, self._lease = self._lease, None
        self._entered = False
        if lease is not None:
            if error is None:
                lease.release()
            else:
                lease.broken(error)

    def __enter__(self) -> NoReturn:
        """Refuse, and say what to write.

        Raises:
            TypeError: always.
        """
        self.close()
        raise TypeError(
            "write `async with limiter.acquire():`, or `with limiter.acquire_sync():` where there "
            "is no event loop"
        )

    def __exit__(self, *_: object) -> None:
        """Satisfy the protocol; never reached."""

    def __repr__(self) -> str:
        return f"<Acquisition {Cost.of(self._amounts)}: await it, or enter it by async with>"

    def _get_coroutine(self) -> Generator[Any, Any, Lease]:
        if self._coroutine is None:
            self._coroutine = self.__await__()
        return self._coroutine

    def _get_open_coroutine(self) -> Generator[Any, Any, Lease]:
        coroutine = self._get_coroutine()
        if inspect.getgeneratorstate(coroutine) == inspect.GEN_CLOSED:
            raise RuntimeError(
                "this acquisition has been awaited: call acquire() for another lease"
            )
        return coroutine

    def send(self, value: Any) -> Any:
        """Run as a coroutine."""
        return self._get_open_coroutine().send(value)

    def throw(self, *args: Any) -> Any:
        """Raise an exception inside, as in a coroutine."""
        return self._get_open_coroutine().throw(*args)

    def close(self) -> None:
        """Close it, as a coroutine: it counts as awaited, so there is no warning."""
        self._get_coroutine().close()


class FirstAcquisition(Acquisition):
    """Warn if it is never awaited.

    Whoever forgets to await does so from the first call on. So only the acquisitions of a limiter
    that nobody has used yet are watched, because a finalizer on all of them would take time.
    """

    __slots__ = ()

    def __del__(self) -> None:
        if not self._door.was_called() and self._coroutine is None:
            warnings.warn(
                "an acquisition was never awaited, so that nothing was paced: write "
                "`await limiter.acquire(...)` or `async with limiter.acquire(...):`",
                RuntimeWarning,
                stacklevel=2,
            )
