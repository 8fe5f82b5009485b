"""Stores: limits that several processes share, in a file or on a server.

`open_store` makes one from a URL; `asyncbucket.stores.store` says what every store does.
"""

import importlib
import re
from typing import Final
from urllib.parse import urlsplit

from asyncbucket.core.errors import StoreError
from asyncbucket.stores.store import (
    Batch,
    Booking,
    Correction,
    Ledger,
    LimitConfig,
    Outcome,
    Receipt,
    Snapshot,
    Store,
)

__all__ = [
    "Batch",
    "Booking",
    "Correction",
    "Ledger",
    "LimitConfig",
    "Outcome",
    "Receipt",
    "Snapshot",
    "Store",
    "StoreError",
    "open_store",
    "without_password",
]

#: The usual cause of URLs that cannot be parsed.
ESCAPES: Final = (
    "write special characters of a password as %2F for /, %5B for [, %40 for @ and so on"
)
#: What follows a host's colon and is not a port.
_INVALID_PORT: Final = re.compile(r"(?<=:)(?!\d+(?:,|$))[^:\[\],]+(?=,|$)")
#: Which module serves a scheme; each has ``from_url(url) -> Store``.
_MODULES: Final = {
    "sqlite": "asyncbucket.stores.sqlite",
    "redis": "asyncbucket.stores.redis",
    "rediss": "asyncbucket.stores.redis",
    "valkey": "asyncbucket.stores.redis",
    "valkeys": "asyncbucket.stores.redis",
    "unix": "asyncbucket.stores.redis",
    "redis+sentinel": "asyncbucket.stores.redis",
    "rediss+sentinel": "asyncbucket.stores.redis",
    "redis+cluster": "asyncbucket.stores.redis",
    "rediss+cluster": "asyncbucket.stores.redis",
}


def open_store(url: str) -> Store:
    """Return the store at ``url``; nothing is connected yet.

    >>> open_store("sqlite:///limits.db")
    >>> open_store("redis://127.0.0.1:6379/0")

    Raises:
        ValueError: the URL is not understood.
        TypeError: it is not a URL.
        ImportError: the extra for this store is not installed; the message names it.
    """
    if not isinstance(url, str):
        raise TypeError(
            f"a store must be a URL such as sqlite:///limits.db, or made by RedisStore.of(client), not "
            f"{type(url).__name__}"
        )
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # which might quote a password
        raise ValueError(f"{without_password(url)!r} is not a URL: {ESCAPES}") from None
    if scheme not in _MODULES or "://" not in url:
        raise ValueError(
            f"{without_password(url)!r} is not a store: write sqlite:///limits.db, "
            f"redis://host:6379/0 or one of {', '.join(sorted(_MODULES))}"
        )
    store: Store = importlib.import_module(_MODULES[scheme]).from_url(url)
    return store


def without_password(url: str) -> str:
    """Return ``url`` in a form that may be shown: without its query, and without any password.

    A login without a user may be a password, and so may what stands where a port belongs.
    """
    without_query = url.partition("?")[0]
    if url.startswith("sqlite:///"):  # a path may contain an @
        return without_query
    head, at, hosts = url.rpartition("@")
    if not at:
        scheme, slashes, rest = without_query.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}{slashes}{_INVALID_PORT.sub('***', host)}{slash}{path}"
    scheme, slashes, login = head.partition("://")
    user, colon, _ = login.partition(":")
    shown = f"{scheme}{slashes}{user}:***" if colon else f"{scheme}{slashes}***"
    return f"{shown if slashes else '***'}@{hosts.partition('?')[0]}"
