"""What `asyncbucket watch` and `asyncbucket plot` read: statistics at an endpoint, and traces.

The endpoint is for scripts, too. It listens only on loopback, and has its own thread, so it answers
even while the event loop is busy. A browser that was directed to it under a foreign host name gets
nothing (DNS rebinding). It is read-only unless the program asks for control: then a POST of a line,
with the token that the program printed, changes a limiter, if no web page sends it.

A limiter's numbers include those of the limiters below it. Tenants are private: they count in the
numbers of the limiter above, and are not listed.
"""

import collections
import contextlib
import dataclasses
import functools
import http.server
import ipaddress
import json
import secrets
import socketserver
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

from asyncbucket.engine.dispatchers import reset_after_fork
from asyncbucket.engine.errors import AsyncBucketError
from asyncbucket.engine.events import Admitted, Cancelled, Event, Paused, Queued, Refused
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.limits import read_amount
from asyncbucket.engine.statistics import LimitUse
from asyncbucket.engine.wording import read_count
from asyncbucket.levels import members_of
from asyncbucket.telemetry.metrics import with_children

_HOST: Final = "127.0.0.1"
#: Where `asyncbucket watch` looks.
DEFAULT_PORT: Final = 4294
#: What a trace keeps.
_KEPT: Final = (Admitted, Cancelled, Paused, Queued, Refused)


def report(limiters: Iterable[Limiter]) -> dict[str, Any]:
    """Return what can be seen of ``limiters`` and their children, in values that JSON can hold.

    The members of pools are shown, too, and each limiter once. Shape:
    ``{"time": Unix seconds, "limiters": [{"name", "admitted", "waiting", "limits": [...]}]}``.
    Times are seconds, amounts whole units.
    """
    rows: list[dict[str, Any]] = []
    for each in _all(limiters):
        now = each.statistics()
        row = dataclasses.asdict(dataclasses.replace(now, members=()))  # which have their own rows
        rows.append(row | {"limits": list(map(row_of, now.limits))})
    return {"time": time.time(), "limiters": rows}


def _all(limiters: Iterable[Limiter]) -> Iterable[Limiter]:
    """Return ``limiters``, members of pools, and all below them, each once."""
    tops = [each for limiter in limiters for each in (limiter, *members_of(limiter))]
    return dict.fromkeys(below for top in tops for below in with_children(top))


def row_of(use: LimitUse) -> dict[str, Any]:
    """Return how much of a limit is used, in values that JSON can hold."""
    limit = use.limit
    return {
        "limit": str(limit),
        "label": limit.label,
        "resource": limit.resource,
        "amount": limit.units,
        "per": limit.per,
        "used": use.used,
        "available": use.available,
        "belief": None if use.belief is None else use.belief.words(limit),
    }


class StatsServer:
    """Serve the statistics of limiters; made by `Limiter.serve_stats`.

    A GET of any path returns JSON; see `report`. With control, a POST of a line with the token
    changes a limiter; see `change`. It is a context manager that closes on leaving.
    """

    def __init__(self, limiters: Sequence[Limiter], port: int, *, control: bool = False) -> None:
        #: What a POST must carry; None if nothing can be changed.
        self.token = secrets.token_urlsafe(16) if control else None
        handler = functools.partial(_Handler, limiters, self.token)
        try:
            self._server = _Server((_HOST, port), handler)
        except OSError as error:  # which says neither host nor port
            raise OSError(error.errno, error.strerror, f"{_HOST}:{port}") from error
        self._is_copy = False
        #: Its address, such as ``"http://127.0.0.1:4294"``.
        self.url = f"http://{_HOST}:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, name="asyncbucket stats", daemon=True, args=(0.1,)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<StatsServer at {self.url}>"


def serve_stats(
    limiters: Limiter | Sequence[Limiter], *, port: int | None = None, control: bool = False
) -> StatsServer:
    """Serve the statistics of ``limiters`` and their children at 127.0.0.1.

    Args:
        limiters: one, or several that are shown together.
        port: 0 for any free one; default: 4294, or any free one if that is taken.
            `StatsServer.url` shows which.
        control: whether `asyncbucket watch` may change limits, pause and resume. The command with its
            token is printed on standard error.

    Raises:
        OverflowError: a port is from 0 to 65535.
        OSError: the port is taken, or not available; the message says which.
    """
    served = [limiters] if isinstance(limiters, Limiter) else limiters
    try:
        server = StatsServer(served, DEFAULT_PORT if port is None else port, control=control)
    except OSError:
        if port is not None:
            raise
        server = StatsServer(served, 0, control=control)
    if server.token is not None:
        sys.stderr.write(f"asyncbucket watch {server.url} --token {server.token}\n")
    return server


def change(limiters: Iterable[Limiter], line: str) -> None:
    """Change one of ``limiters`` or their children as a line says: ``openai/chat: 600 RPM, 200k TPM``.

    After the name come limits, or ``concurrency 8``, ``pause 60`` (seconds), ``resume``, or
    ``shadow off``. Without a name, the first limiter is meant.

    Raises:
        ValueError: it cannot be understood; nothing is changed then.
    """
    name, _, wanted = line.strip().rpartition(": ")
    known = [*_all(limiters)]
    found = [each for each in known if name in ("", each.name)]
    if not found:
        names = ", ".join(each.name for each in known)
        raise ValueError(f"no limiter is called {name!r}: there are {names}")
    match wanted.split():
        case ["concurrency", slots]:
            found[0].reconfigure(concurrency=read_amount(slots))
        case ["pause", seconds]:
            found[0].pause(read_amount(seconds), reason="by hand")
        case ["resume"]:
            found[0].resume()
        case ["shadow", "off"]:
            found[0].leave_shadow()
        case _:
            found[0].reconfigure(*wanted.split(", "))


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # where it would share the port of another


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 5.0

    def __init__(self, limiters: Sequence[Limiter], token: str | None, *request: Any) -> None:
        self.limiters, self.token = limiters, token
        super().__init__(*request)

    def handle(self) -> None:
        """Answer; if the client goes away meanwhile, print no traceback on somebody else's terminal."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """Answer."""
        if not is_loopback(self.headers.get("Host") or "localhost"):
            self.send_error(403, "Only for this machine")
        else:
            self._answer(200)

    def do_POST(self) -> None:
        """Change a limiter as the line that was sent says."""
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if "Origin" in self.headers or not is_loopback(self.headers.get("Host") or "localhost"):
            self.send_error(403, "Only for programs on this machine")
        elif not (self.token and secrets.compare_digest(given.encode(), self.token.encode())):
            self._answer(401, error="it takes the token that serve_stats(control=True) prints")
        else:
            try:
                line = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                change(self.limiters, line.decode())
                self._answer(200)
            except (AsyncBucketError, ValueError) as error:
                self._answer(400, error=str(error))

    def _answer(self, status: int, **told: str) -> None:
        """Answer with how all limiters are now."""
        body = json.dumps({**told, **report(self.limiters)}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server calls it so
        """Print nothing: this is somebody else's terminal."""


def is_loopback(host: str) -> bool:
    """Tell whether a host, with or without a port, names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Trace:
    """Keep the latest events of a limiter and those below it: admissions, and what explains them.

    >>> trace = limiter.trace()
    >>> ...
    >>> trace.save("trace.jsonl")  # for: asyncbucket plot trace.jsonl -o out.png

    It may be read from any thread while it records. Call `stop` when you have seen enough.

    Args:
        limiter: the limiter to record.
        last: how many events are kept, at about 300 bytes each.

    Raises:
        ValueError: ``last`` is not a whole number from 1 on.
    """

    def __init__(self, limiter: Limiter, *, last: int) -> None:
        self._limiter = limiter
        #: A deque's `append` and `copy` are atomic, so no lock is needed.
        self._events = collections.deque[Event](maxlen=read_count(last, "last", least=1))
        self._unobserve = limiter.observe(self._record)

    def _record(self, event: Event) -> None:
        if isinstance(event, _KEPT):
            self._events.append(event)

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events.copy())

    def amounts(self, resource: str) -> list[tuple[int, int]]:
        """Return each admission's instant (ns of the limiter's clock) and units of ``resource``.

        This is what `asyncbucket.testing.assert_never_over` takes.
        """
        return [
            (round(event.at * 1_000_000_000), event.cost[resource])
            for event in self
            if isinstance(event, Admitted) and event.cost.get(resource)
        ]

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON lines: first the limits, then one event per line."""
        limiter, named = self._limiter, ("resource", "amount", "per", "burst")
        limits = [{name: getattr(limit, name) for name in named} for limit in limiter.limits]
        head = {"limiter": limiter.name, "limits": limits, "concurrency": limiter.concurrency}
        told = ({"event": type(each).__name__.lower()} | dataclasses.asdict(each) for each in self)
        lines = (json.dumps(line, separators=(",", ":"), default=dict) for line in (head, *told))
        Path(path).write_text("".join(f"{line}\n" for line in lines), "utf-8")

    def stop(self) -> None:
        """Stop recording; what was kept stays."""
        self._unobserve()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Trace of {self._limiter.name!r}, {len(self):,} events>"
