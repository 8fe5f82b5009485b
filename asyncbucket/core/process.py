"""What belongs to one process: objects that are neither copied nor pickled, and what a fork resets."""

import contextlib
import os
import sys
import weakref
from typing import Final, NoReturn, Protocol, Self

#: CPython with the GIL switches threads only at calls and backward jumps, so a straight run of
#: loads, arithmetic and stores is atomic.
ATOMIC: Final[bool] = (
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


class Forkable(Protocol):
    """Know how to start afresh in a child process."""

    def after_fork(self) -> None:
        """Replace locks, which the parent may have held, and forget what is the parent's."""
        ...


#: Module state, because ``os.register_at_fork`` cannot be undone: so it is called once, and holds
#: only weak references.
_FORKABLE: Final["weakref.WeakSet[Forkable]"] = weakref.WeakSet()


def reset_after_fork(obj: Forkable) -> None:
    """Have ``obj.after_fork()`` called in a child process, for as long as ``obj`` lives."""
    _FORKABLE.add(obj)


def _after_fork() -> None:
    for obj in tuple(_FORKABLE):
        obj.after_fork()


with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)
