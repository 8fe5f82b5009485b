"""When files must be closed, whoever uses them: as the interpreter ends, and as it forks.

What SQLite knows of the locks on a file belongs to a process. A child that inherits it takes itself
for their holder, and holds none: whoever closes the file next takes the log away from under it. So
who forks closes all files for that moment, and parent and child open their own again.
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
        """End the thread when it has done what there is; return it, to be waited for."""
        ...

    def stand_still(self) -> bool:
        """Close the file, and leave it so until `go_on`; return whether that could be had in time."""
        ...

    def go_on(self) -> None:
        """Use the file again; in a forked child it has begun anew instead."""
        ...


#: Neither hook can be undone, so there is one of each for all, and it keeps none of them alive.
_ALL: Final["weakref.WeakSet[Closable]"] = weakref.WeakSet()
#: Those that stand still because a thread forks, one at a time.
_STANDING: Final[list[Closable]] = []
_FORKING: Final = threading.Lock()


def look_after(each: Closable) -> None:
    """Have the file of ``each`` closed in time, while ``each`` lives."""
    _ALL.add(each)


@atexit.register
def _finish() -> None:
    for each in tuple(_ALL):
        thread = each.stop()
        if thread is not None:
            thread.join(timeout=1)


def _before_fork() -> None:
    _FORKING.acquire()
    _STANDING.extend(each for each in tuple(_ALL) if each.stand_still())


def _after_fork_in_parent() -> None:
    for each in _STANDING:
        each.go_on()
    _after_fork_in_child()


def _after_fork_in_child() -> None:
    _STANDING.clear()
    _FORKING.release()


with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
