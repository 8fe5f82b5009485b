"""Where to read: a program's own endpoint, or a store that several programs share."""

import asyncio
import http.client
import json
import socket
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from asyncbucket.core.errors import StoreError
from asyncbucket.stats.report import row_of
from asyncbucket.stores import Snapshot, open_store, without_password

#: What one reading returns: the JSON of `asyncbucket.stats.report`.
Reader = Callable[[], dict[str, Any]]

_PATIENCE: Final = 5.0
_OK: Final = 200
#: Members that every limiter has, a program's or a store's.
_REQUIRED_MEMBERS: Final = frozenset({"name", "limits", "paused", "in_flight"})


class SourceError(Exception):
    """Say why nothing can be read, and what to do about it."""


def source(url: str) -> Reader:
    """Return a function that reads ``url``.

    Raises:
        ValueError: the URL is of an unknown kind.
    """
    scheme, separator, _ = url.partition("://")
    shown = without_password(url)
    if scheme == "http":
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "127.0.0.1", parts.port or 80
        except ValueError:  # which might quote a password
            raise ValueError(f"{shown!r} names no port: give one up to 65535") from None
        return lambda: _fetch(http.client.HTTPConnection(host, port, timeout=_PATIENCE), shown)
    if scheme == "unix" and "?" not in url:
        return lambda: _fetch(_UnixConnection(unquote(urlsplit(url).path)), shown)
    if not separator or scheme == "https":
        raise ValueError(
            f"{shown!r} is not a limiter to watch: give the URL that limiter.serve_stats() returns "
            f"(http://127.0.0.1:4294, unix:///run/limits.sock) or a store's (redis://host:6379/0)"
        )
    open_store(url)
    return lambda: asyncio.run(_peek(url))


class _UnixConnection(http.client.HTTPConnection):
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
        reply_data: Any = json.loads(reply.read())
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise SourceError(
            f"nobody serves statistics at {url} ({str(error) or type(error).__name__}): does the "
            f"program run, and did it call limiter.serve_stats()?"
        ) from error
    finally:
        connection.close()
    if not _is_report(reply_data):
        raise SourceError(f"{url} answers something else: is that limiter.serve_stats()?")
    report: dict[str, Any] = reply_data
    return report


def _is_report(reply_data: object) -> bool:
    """Tell whether ``reply_data`` reports limiters, and is not the JSON of another server."""
    limiters = reply_data.get("limiters") if isinstance(reply_data, dict) else None
    return isinstance(limiters, list) and all(
        isinstance(limiter, dict) and limiter.keys() >= _REQUIRED_MEMBERS for limiter in limiters
    )


async def _peek(url: str) -> dict[str, Any]:
    """Read all limiters of a store."""
    store = open_store(url)
    try:
        names = await store.names()
        snapshots = [(name, await store.peek(name)) for name in names]
    except StoreError as error:
        raise SourceError(str(error)) from error
    finally:
        await store.aclose()
    if not names:
        raise SourceError(f"no limiter is kept in {without_password(url)} yet")
    return {
        "limiters": [
            _limiter(name, snapshot) for name, snapshot in snapshots if snapshot is not None
        ]
    }


def _limiter(name: str, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": name,
        "in_flight": snapshot.slots,
        "concurrency": snapshot.config.concurrency,
        "paused": max(0, snapshot.paused_until - snapshot.now) * 1e-9,
        "ahead": max(0, snapshot.last_start - snapshot.now) * 1e-9,
        "workers": snapshot.workers,
        "limits": [
            row_of(use.limit, used=use.used, available=use.available) for use in snapshot.limits
        ],
    }
