"""Misuse that undoes pacing and can be seen for certain: a warning says so, with the remedy.

Not seen, and so not here: retry decorators around a paced model's methods, and a workflow whose
time-out is shorter than the queue. The docs speak of them.
"""

import asyncio
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import asyncbucket
from asyncbucket.limiter import Limiter
from asyncbucket.llama_index.clients import is_client

#: So many limiters, all alike, for one key on one event loop, are one made for each request.
_MANY: Final = 10
_MOST_KEYS: Final = 1_000
_PACKAGE: Final = str(Path(asyncbucket.__file__).parent)


def warn_of_misuse(model: Any, limiter: Limiter, *, attempts: int) -> None:
    """Warn of what undoes the pacing of ``model``, each in its own words."""
    if getattr(model, "rate_limiter", None) is not None:
        _warn(
            f"{type(model).__name__} has a rate_limiter of its own: each call would wait there, too, "
            f"with its slot held and as part of the model's latency; make it without rate_limiter="
        )
    for name, retries in _other_retries(model) if attempts > 1 else ():
        _warn(
            f"{type(model).__name__}.{name} tries again by itself (max_retries={retries}): one call "
            f"may become {attempts} x {retries + 1} requests, of which the limiter sees {attempts}; "
            f"make it with max_retries=0, or wrap with retry=False"
        )
    if _COUNT.is_one_too_many(model, limiter):
        _warn(
            f"{_MANY} limiters like {limiter!r} were made for the same model and key: one that is "
            f"made for each request remembers nothing, and limits nothing; make it once, when the "
            f"program starts, and wrap with that"
        )


def _other_retries(model: Any) -> Iterator[tuple[str, int]]:
    """Yield what retries inside ``model`` and is not ours to change: the user's own fields."""
    private: dict[str, Any] = getattr(model, "__pydantic_private__", None) or {}
    replaced = {name for name, value in private.items() if is_client(value)}
    for name, value in {**vars(model), **private}.items():
        # Nothing of an unknown object is run: its properties may open connections.
        retries = inspect.getattr_static(value, "max_retries", None)
        if type(retries) is int and retries > 0 and name not in replaced:
            yield name, retries


class _Count:
    """Count on each event loop the limiters that were made for one model and key.

    A loop is one program at work. Where there is none nothing is counted: a test suite makes many
    limiters, one after the other, and is right to.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[int, tuple[WeakSet[Limiter], list[int]]]
        ] = WeakKeyDictionary()

    def is_one_too_many(self, model: Any, limiter: Limiter) -> bool:
        """Count ``limiter``; tell whether it makes them `_MANY`, which is said once."""
        loop, key = asyncio._get_running_loop(), getattr(model, "api_key", None)  # noqa: SLF001 - None outside
        if loop is None or not isinstance(key, str) or not key or limiter.parent is not None:
            return False
        # Hashed, so that no key is kept.
        asked = tuple(str(getattr(model, name, "")) for name in ("model", "model_name", "api_base"))
        what = hash((type(model), asked, key, limiter.name, limiter.limits, limiter.concurrency))
        with self._lock:
            seen = self._seen.setdefault(loop, {})
            if len(seen) > _MOST_KEYS:
                seen.clear()
            limiters, made = seen.setdefault(what, (WeakSet(), [0]))
            if limiter in limiters:
                return False
            limiters.add(limiter)
            made[0] += 1
            return made[0] == _MANY


_COUNT: Final = _Count()


def _warn(message: str) -> None:
    """Warn at the line that called asyncbucket."""
    frame, level = sys._getframe(), 1  # noqa: SLF001 - skip_file_prefixes is there from 3.12 on
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
