"""What can be seen of limiters from outside: plain values, and the endpoint that serves them.

The endpoint is for `asyncbucket watch` and for scripts. It is read-only, listens only on loopback or
on a unix socket, and has its own thread, so it answers even while the event loop is busy. A browser
that was directed to it under a foreign host name gets nothing (DNS rebinding).

A limiter's numbers include those of the limiters below it. Tenants are private: they count in the
numbers of the limiter above, and are not listed.
"""

import contextlib
import errno
import functools
import http.server
import ipaddress
import json
import os
import socket
import socketserver
import stat
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

from asyncbucket.core.limiter import Limiter
from asyncbucket.core.process import reset_after_fork
from asyncbucket.core.statistics import LimitUse, Statistics
from asyncbucket.core.wording import is_integer
from asyncbucket.telemetry.metrics import with_children

_LAST_PORT: Final = 65_535
_NOT_FOUND: Final = (
    "nothing here; see / for limiters, asyncbucket.telemetry.prometheus for metrics\n"
)


def report(limiters: Sequence[Limiter]) -> dict[str, Any]:
    """Return what can be seen of ``limiters`` and their children, in values that JSON can hold.

    Shape: ``{"time": Unix seconds, "limiters": [{"name", "admitted", "waiting", "limits": [...]}]}``.
    Times are seconds, amounts whole units.
    """
    rows = [_row(each.statistics()) for limiter in limiters for each in with_children(limiter)]
    return {"time": time.time(), "limiters": rows}


def row_of(use: LimitUse) -> dict[str, Any]:
    """Return how much of a limit is used, in values that JSON can hold."""
    limit = use.limit
    return {
        "limit": str(limit),
        "label": limit.label,
        "resource": limit.resource,
        "amount": limit.amount,
        "per": limit.per,
        "used": use.used,
        "available": use.available,
    }


class StatsServer:
    """Serve the statistics of limiters; made by `Limiter.serve_stats`.

    ``GET /`` returns JSON; see `report`. It is a context manager that closes on leaving.
    """

    def __init__(self, server: socketserver.BaseServer, url: str, path: Path | None) -> None:
        self._server = server
        self._path = path
        self._is_copy = False
        #: Its address: ``"http://127.0.0.1:4294"`` or ``"unix:///run/limits.sock"``.
        self.url = url
        threading.Thread(
            target=server.serve_forever, name="asyncbucket stats", daemon=True, args=(0.1,)
        ).start()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Drop what a child process inherited of the socket; the parent serves on."""
        self._is_copy = True
        self._server.server_close()

    def close(self) -> None:
        """Stop. Closing twice is fine; in a forked child there is nothing to close."""
        if not self._is_copy:
            self._server.shutdown()
            self._server.server_close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<StatsServer at {self.url}>"


def serve_stats(
    limiters: Limiter | Sequence[Limiter],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    path: str | PathLike[str] | None = None,
) -> StatsServer:
    """Serve the statistics of ``limiters`` and their children, on this machine only.

    Args:
        limiters: one, or several that are shown together.
        host: a loopback address.
        port: 0 for any free one; `StatsServer.url` shows which.
        path: a unix socket, instead of host and port; only its owner may connect.

    Raises:
        ValueError: ``host`` is not a loopback address, there is no such port, or two limiters have
            the same name.
        TypeError: one of ``limiters`` is not a `Limiter`.
        OSError: the port or the path is taken, or not available; the message says which.
    """
    served = [limiters] if isinstance(limiters, Limiter) else list(limiters)
    for member in served:
        if not isinstance(member, Limiter):
            raise TypeError(f"serve_stats() shows limiters, not {type(member).__name__}")
    _check_names(served)
    if path is not None:
        where = Path(path).resolve()  # the program may change directories
        with _adding_address(str(where)):
            _remove_stale_socket(where)
            unix = _UnixServer(where, served)
        return StatsServer(unix, f"unix://{quote(str(where))}", where)
    name = f"[{host}]" if ":" in host else host
    if not _is_here(name):
        raise ValueError(
            f"statistics are served on this machine alone: host must be a loopback address such as "
            f"127.0.0.1, not {host!r}"
        )
    if not is_integer(port) or not 0 <= port <= _LAST_PORT:
        raise ValueError(
            f"port must be a whole number from 0 (any that is free) to {_LAST_PORT}, not {port!r}"
        )
    with _adding_address(f"{name}:{port}"):
        server = _TcpServer(host, int(port), served)
    return StatsServer(server, f"http://{name}:{server.server_address[1]}", None)


def _check_names(limiters: Sequence[Limiter]) -> None:
    """Refuse limiters of the same name, whose numbers could not be told apart."""
    seen: set[str] = set()
    for name in (member.name for limiter in limiters for member in with_children(limiter)):
        if name in seen:
            raise ValueError(
                f"two limiters to be shown are called {name!r}: give each a name= of its own, and "
                f"leave out children, which are seen with their parents"
            )
        seen.add(name)


def _row(snapshot: Statistics) -> dict[str, Any]:
    plain = asdict(replace(snapshot, limits=()))
    rows = list(map(row_of, snapshot.limits))
    return {**plain, "paused": round(snapshot.paused, 3), "limits": rows}


@contextlib.contextmanager
def _adding_address(where: str) -> Generator[None]:
    """Add the address to an error; sockets' own errors lack it."""
    try:
        yield
    except OSError as error:
        number = error.errno or errno.ENAMETOOLONG  # Python's own error has no number
        raise OSError(number, error.strerror or str(error), where) from error


def _is_here(host: str) -> bool:
    """Tell whether a host, with or without a port, names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _remove_stale_socket(path: Path) -> None:
    """Remove a socket on which nobody listens any more."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


class _Handler(http.server.BaseHTTPRequestHandler):
    server_version = "asyncbucket"
    sys_version = ""
    timeout = 5.0

    def __init__(self, limiters: Sequence[Limiter], *request: Any) -> None:
        self.limiters = limiters
        super().__init__(*request)

    def handle(self) -> None:
        """Answer; if the client goes away meanwhile, print no traceback on somebody else's terminal."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """Answer."""
        path = self.path.partition("?")[0]
        if not _is_here(self.headers.get("Host") or "localhost"):
            self._reply(403, "text/plain", "this is for this machine alone\n")
        elif path == "/":
            self._reply(200, "application/json", json.dumps(report(self.limiters)))
        else:
            self._reply(404, "text/plain", _NOT_FOUND)

    def _reply(self, status: int, content_type: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server calls it so
        """Print nothing: this is somebody else's terminal."""


class _TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, limiters: Sequence[Limiter]) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), functools.partial(_Handler, limiters))


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path, limiters: Sequence[Limiter]) -> None:
        old_umask = os.umask(0o177)
        try:
            super().__init__(str(path), functools.partial(_Handler, limiters))
        finally:
            os.umask(old_umask)

    def get_request(self) -> tuple[Any, Any]:
        """Give the peer a name: http.server needs one, and a unix socket has none."""
        request, _ = super().get_request()
        return request, ("unix", 0)
