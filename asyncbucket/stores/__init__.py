"""Stores: limits that several processes share, in a file or on a server.

`open_store` makes one from a URL; `asyncbucket.stores.store` says what every store does.
"""

import importlib
import re
from typing import Final

from asyncbucket.stores.store import Batch, LimitConfig, Snapshot, Store

__all__ = ["Batch", "LimitConfig", "Snapshot", "Store", "open_store", "without_password"]

_SCHEME: Final = re.compile(r"[a-z+]+://")
#: What may be shown of an address: hosts, ports, and a path.
_HOST: Final = r"([\w.-]*|\[[\da-fA-F:.]+\])(:\d+)?"
_ADDRESS: Final = re.compile(rf"{_HOST}(,{_HOST})*(/.*)?")
#: Several servers behind one URL.
_KINDS: Final = ("", "+sentinel", "+cluster")
#: Which module serves a scheme; each has ``from_url(url) -> Store``.
_MODULES: Final = {"sqlite": "asyncbucket.stores.sqlite"} | dict.fromkeys(
    (
        "unix",
        *(
            f"{scheme}{kind}"
            for scheme in ("redis", "rediss", "valkey", "valkeys")
            for kind in _KINDS
        ),
    ),
    "asyncbucket.stores.redis",
)


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
    scheme, slashes, _ = url.partition("://")
    if scheme not in _MODULES or not slashes:
        raise ValueError(
            f"{without_password(url)!r} is not a store: write sqlite:///limits.db, "
            f"redis://host:6379/0 or one of {', '.join(sorted(_MODULES))}"
        )
    store: Store = importlib.import_module(_MODULES[scheme]).from_url(url)
    return store


def without_password(url: str) -> str:
    """Return ``url`` in a form that may be shown: without its query, and without any login.

    What stands where a host and a port belong may be a password, too.
    """
    if url.startswith("sqlite:///"):  # a path may contain an @
        return url.partition("?")[0]
    scheme = match[0] if (match := _SCHEME.match(url)) else ""
    _, at, address = url.removeprefix(scheme).rpartition("@")
    address = address.partition("?")[0]
    shown = address if _ADDRESS.fullmatch(address) else "***"
    return f"{scheme}{'***@' if at else ''}{shown}"
