"""What stamina sees of a retried call: no provider's error, and no argument.

stamina's time-out would count the time in the queue, so it gets ``timeout=None`` and the deadline
is ours. A back-off returned by a hook bypasses stamina's jitter and cap, so these are ours, too; a
NaN would hang. stamina's instrumentation reports the error that caused a retry, and a provider's
error may quote the prompt or the key, so stamina never sees it. What it catches and retries is a
`TryAgain` named like the error; the real error is kept in `Trial`. What it calls takes no
arguments, and is named like what is tried: the model's method. Everything else, cancellation above
all, passes through stamina untouched.
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

#: How the repr of our errors ends, so that stamina's log of them can be recognized.
_OURS: Final = "; tried again by asyncbucket>"


class TryAgain(Exception):  # noqa: N818 - a request, not an error that anybody sees
    """Ask stamina for another attempt after `wait` seconds."""

    def __init__(self, reason: str, wait: float) -> None:
        super().__init__(reason)
        self.wait = wait

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__}: {self}{_OURS}"


@functools.lru_cache(maxsize=64)
def try_again_class(module: str, name: str) -> type[TryAgain]:
    """Return a `TryAgain` class of another name: metrics name an error by its class."""
    return type(name, (TryAgain,), {"__module__": module, "__qualname__": name})


def named_like(once: Callable[[], T], tried: Callable[..., object]) -> Callable[[], T]:
    """Return ``once``, named like what is ``tried``, below partials and bound methods."""
    while isinstance(tried, functools.partial):
        tried = tried.func
    named = tried if hasattr(tried, "__qualname__") else type(tried)
    once.__module__, once.__qualname__ = named.__module__, str(named.__qualname__)
    return once


def _backoff_hook(error: BaseException) -> bool | float:
    """Tell stamina when to try again; it asks about everything raised, even cancellation."""
    if not isinstance(error, TryAgain):
        return False
    # Its frames hold what was tried, and lead back to it: a dropped stream would keep its slot.
    error.__traceback__ = None
    return error.wait


def is_not_ours(record: logging.LogRecord) -> bool:
    """Filter stamina's log of retries to those of other users of stamina in this process."""
    return not str(vars(record).get("stamina.caused_by")).endswith(_OURS)


def is_stamina_off() -> bool:
    """Tell whether the application has switched stamina off, and so all retries."""
    return not stamina.is_active()


def with_retries(once: Callable[[], T], *, attempts: int) -> Callable[[], T]:
    """Return ``once``, async or plain, called again whenever it raises a `TryAgain`."""
    return stamina.retry(on=_backoff_hook, attempts=attempts, timeout=None)(once)
