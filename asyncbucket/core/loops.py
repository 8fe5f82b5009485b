"""Loops, threads and processes: a loop for callers without one, forks, and one-process objects."""

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn, Protocol, Self, TypeVar

T = TypeVar("T")

#: CPython with the GIL switches threads only at calls and backward jumps, so a straight run of
#: loads, arithmetic and stores is atomic.
thread_switches_only_at_calls: Final[bool] = (
    sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
)


class OfThisProcess:
    """Belong to one process: a copy is the object itself, and it cannot be pickled.

    A real copy of something that holds a slot, or counts what passes, would do so twice.
    """

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be pickled: make a limiter in "
            f"each process, with store=... if they are to share limits"
        )


class Background:
    """Run coroutines for threads without a loop, on one loop in a daemon thread, made on demand."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: That loop, once it exists.
        self.loop: asyncio.AbstractEventLoop | None = None

    def call(self, start: Callable[[], Coroutine[Any, Any, T]], undo: Callable[[T], None]) -> T:
        """Return the result of ``start()``; if this thread is interrupted, cancel or undo it."""
        loop = self._running_loop()
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        task: concurrent.futures.Future[None] = asyncio.run_coroutine_threadsafe(
            _resolve(start, answer, undo), loop
        )
        try:
            return answer.result()
        except BaseException:
            if answer.cancel():
                task.cancel()
            elif answer.exception() is None:
                undo(answer.result())
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self.loop is None:
                loop = self.loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run, args=(loop,), name="asyncbucket background", daemon=True
                ).start()
                weakref.finalize(self, loop.call_soon_threadsafe, loop.stop).atexit = False
            return self.loop


async def _resolve(
    start: Callable[[], Coroutine[Any, Any, T]],
    answer: "concurrent.futures.Future[T]",
    undo: Callable[[T], None],
) -> None:
    try:
        result = await start()
    except BaseException as error:  # noqa: BLE001 - raised where it is awaited: here it may end the loop
        if answer.set_running_or_notify_cancel():
            answer.set_exception(error)
    else:
        if answer.set_running_or_notify_cancel():
            answer.set_result(result)
        else:
            undo(result)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


class _Forkable(Protocol):
    def after_fork(self) -> None: ...


#: Module state, because ``os.register_at_fork`` cannot be undone: so it is called once, and holds
#: only weak references.
_FORKABLE: Final["weakref.WeakSet[_Forkable]"] = weakref.WeakSet()


def reset_after_fork(obj: _Forkable) -> None:
    """Have ``obj.after_fork()`` called in a child process, for as long as ``obj`` lives."""
    _FORKABLE.add(obj)


def _after_fork() -> None:
    for obj in tuple(_FORKABLE):
        obj.after_fork()


with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)
