"""What stamina sees of a call that is tried again: no error of a provider, and no argument.

Its time-out would count the time in the queue (``timeout=None``; the deadline is ours), and a
back-off that a hook returns goes past its own jitter and cap (ours too), even if it is NaN, which
would hang. Its instrumentation reports the error that caused a retry, and a provider's error may
quote the prompt or the key. So stamina never sees it: what it catches and retries is a `TryAgain`
that goes by the error's name, and the real error waits in `Trial`. What it calls has no arguments,
and goes by the name of what is tried: the model's method. Everything else, cancellation first of
all, passes through stamina as through no hands at all.
"""

import functools
import logging
from collections.abc import Callable
from typing import Final, TypeVar

try:
    import stamina
except ModuleNotFoundError as error:
    raise ImportError('retrying needs stamina: pip install "asyncbucket[llama-index]"') from error

T = TypeVar("T")

#: How what stamina is told of an error ends, so that its log can be told from others'.
_OURS: Final = "; tried again by asyncbucket>"


class TryAgain(Exception):  # noqa: N818 - a request, not an error that anybody gets to see
    """Ask stamina for another attempt after `wait` seconds."""

    def __init__(self, reason: str, wait: float) -> None:
        super().__init__(reason)
        self.wait = wait

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__}: {self}{_OURS}"


@functools.lru_cache(maxsize=64)
def by_the_name(module: str, name: str) -> type[TryAgain]:
    """Return a `TryAgain` of another name: by that of its class an error is told in metrics."""
    return type(name, (TryAgain,), {"__module__": module, "__qualname__": name})


def renamed(once: Callable[[], T], tried: Callable[..., object]) -> Callable[[], T]:
    """Return ``once`` by the name of what is ``tried``, below partials and bound methods."""
    while isinstance(tried, functools.partial):
        tried = tried.func
    named = tried if hasattr(tried, "__qualname__") else type(tried)
    once.__module__, once.__qualname__ = named.__module__, str(named.__qualname__)
    return once


def _wait_of(error: BaseException) -> bool | float:
    """Tell stamina when to try again; it asks about everything raised, cancellation too."""
    if not isinstance(error, TryAgain):
        return False
    # Its frames hold what was tried and lead back to it: a dropped stream would keep its slot.
    error.__traceback__ = None
    return error.wait


def not_ours(record: logging.LogRecord) -> bool:
    """Keep stamina's log of retries to those of other users of stamina in this process."""
    return not str(vars(record).get("stamina.caused_by")).endswith(_OURS)


def is_off() -> bool:
    """Tell whether the application has switched stamina off, and with it all that it would try again."""
    return not stamina.is_active()


def again(once: Callable[[], T], *, attempts: int) -> Callable[[], T]:
    """Return ``once``, async or plain, called again whenever it raises a `TryAgain`."""
    return stamina.retry(on=_wait_of, attempts=attempts, timeout=None)(once)
