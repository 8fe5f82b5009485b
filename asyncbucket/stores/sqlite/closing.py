"""When files must be closed, by whatever uses them: when the interpreter ends, and when it forks.

What SQLite knows about locks on a file belongs to a process. A child that inherits it believes that
it holds the locks, and holds none: the next process to close the file removes the log while the
child still uses it. So before a fork all files are closed for a moment, and parent and child open
their own again.
"""

import atexit
import contextlib
import os
import threading
import weakref
from typing import Final, Protocol


class Closable(Protocol):
    """Use a file on a thread of its own."""

    def stop(self) -> threading.Thread | None:
        """End the thread when it has done its jobs; return it, to be joined."""
        ...

    def suspend(self) -> bool:
        """Close the file, and keep it closed until `resume`; return whether that succeeded in time."""
        ...

    def resume(self) -> None:
        """Use the file again; a forked child has started afresh instead."""
        ...


#: Neither hook can be undone, so there is one of each for all, which keeps none of them alive.
_CLOSABLES: Final["weakref.WeakSet[Closable]"] = weakref.WeakSet()
#: Those that stand still because a thread forks, one at a time.
_SUSPENDED: Final[list[Closable]] = []
_FORK_LOCK: Final = threading.Lock()


def register_closable(closable: Closable) -> None:
    """Have the file of ``closable`` closed in time, for as long as ``closable`` lives."""
    _CLOSABLES.add(closable)


@atexit.register
def _stop_all() -> None:
    for closable in tuple(_CLOSABLES):
        thread = closable.stop()
        if thread is not None:
            thread.join(timeout=1)


def _before_fork() -> None:
    _FORK_LOCK.acquire()
    _SUSPENDED.extend(closable for closable in tuple(_CLOSABLES) if closable.suspend())


def _after_fork_in_parent() -> None:
    for closable in _SUSPENDED:
        closable.resume()
    _after_fork_in_child()


def _after_fork_in_child() -> None:
    _SUSPENDED.clear()
    _FORK_LOCK.release()


with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
