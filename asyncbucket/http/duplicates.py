"""Many similar limiters for one key: probably one is made for each request, and limits nothing."""

import asyncio
import threading
from typing import Final
from weakref import WeakKeyDictionary, WeakSet

from asyncbucket.core.limiter import Limiter

#: How many of them, on one event loop, cause a warning.
WARNING_THRESHOLD: Final = 10
_MAX_KEYS: Final = 1_000


class DuplicateLimiters:
    """Count, for each event loop, the limiters that were made for the same key and place.

    A loop is one program at work. Outside a loop nothing is counted: a test suite rightly makes
    many limiters, one after the other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[int, tuple[WeakSet[Limiter], list[int]]]
        ] = WeakKeyDictionary()

    def is_one_too_many(self, limiter: Limiter, key: object, *where: object) -> bool:
        """Count ``limiter``; return True once, when ``key`` at ``where`` has `WARNING_THRESHOLD`."""
        loop = asyncio._get_running_loop()  # noqa: SLF001 - None outside
        if loop is None or not isinstance(key, str) or not key or limiter.parent is not None:
            return False
        # Hashed, so that no key is kept.
        fingerprint = hash((where, key, limiter.name, limiter.limits, limiter.concurrency))
        with self._lock:
            seen = self._seen.setdefault(loop, {})
            if len(seen) > _MAX_KEYS:
                seen.clear()
            limiters, made = seen.setdefault(fingerprint, (WeakSet(), [0]))
            if limiter in limiters:
                return False
            limiters.add(limiter)
            made[0] += 1
            return made[0] == WARNING_THRESHOLD


#: For all models and transports of the process.
DUPLICATE_LIMITERS: Final = DuplicateLimiters()
