"""Where to read: a program's own endpoint, or a store that several programs share."""

import asyncio
import http.client
import json
import socket
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from asyncbucket.errors import StoreError
from asyncbucket.stats.report import row_of
from asyncbucket.stores import Snapshot, open_store, without_password

#: What one reading returns: the JSON of `asyncbucket.stats.report`.
Look = Callable[[], dict[str, Any]]

_PATIENCE: Final = 5.0
_OK: Final = 200
#: Members that every limiter has, a program's or a store's.
_ALWAYS: Final = frozenset({"name", "limits", "paused", "in_flight"})


class SourceError(Exception):
    """Say why nothing can be read, and what to do about it."""


def source(url: str) -> Look:
    """Return a function that reads ``url``.

    Raises:
        ValueError: the URL is of an unknown kind.
    """
    scheme, known, _ = url.partition("://")
    shown = without_password(url)
    if scheme == "http":
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "127.0.0.1", parts.port or 80
        except ValueError:  # which might quote a password
            raise ValueError(f"{shown!r} names no port: give one up to 65535") from None
        return lambda: _fetch(http.client.HTTPConnection(host, port, timeout=_PATIENCE), shown)
    if scheme == "unix" and "?" not in url:
        return lambda: _fetch(_Unix(unquote(urlsplit(url).path)), shown)
    if not known or scheme == "https":
        raise ValueError(
            f"{shown!r} is not a limiter to watch: give the URL that limiter.serve_stats() returns "
            f"(http://127.0.0.1:4294, unix:///run/limits.sock) or a store's (redis://host:6379/0)"
        )
    open_store(url)
    return lambda: asyncio.run(_peek(url))


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _fetch(connection: http.client.HTTPConnection, url: str) -> dict[str, Any]:
    try:
        connection.request("GET", "/")
        reply = connection.getresponse()
        if reply.status != _OK:
            raise SourceError(f"{url} answers {reply.status}: is that limiter.serve_stats()?")
        seen: Any = json.loads(reply.read())
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise SourceError(
            f"nobody serves statistics at {url} ({str(error) or type(error).__name__}): does the "
            f"program run, and did it call limiter.serve_stats()?"
        ) from error
    finally:
        connection.close()
    if not _is_report(seen):
        raise SourceError(f"{url} answers something else: is that limiter.serve_stats()?")
    report: dict[str, Any] = seen
    return report


def _is_report(seen: object) -> bool:
    """Tell whether ``seen`` reports limiters, and is not the JSON of another server."""
    limiters = seen.get("limiters") if isinstance(seen, dict) else None
    return isinstance(limiters, list) and all(
        isinstance(each, dict) and each.keys() >= _ALWAYS for each in limiters
    )


async def _peek(url: str) -> dict[str, Any]:
    """Read all limiters of a store."""
    store = open_store(url)
    try:
        names = await store.names()
        looks = [(name, await store.peek(name)) for name in names]
    except StoreError as error:
        raise SourceError(str(error)) from error
    finally:
        await store.aclose()
    if not names:
        raise SourceError(f"no limiter is kept in {without_password(url)} yet")
    return {"limiters": [_limiter(name, look) for name, look in looks if look is not None]}


def _limiter(name: str, look: Snapshot) -> dict[str, Any]:
    return {
        "name": name,
        "in_flight": look.slots,
        "concurrency": look.terms.concurrency,
        "paused": max(0, look.paused_until - look.now) * 1e-9,
        "ahead": max(0, look.last_start - look.now) * 1e-9,
        "workers": look.workers,
        "limits": [
            row_of(use.limit, used=use.used, available=use.available) for use in look.limits
        ],
    }
