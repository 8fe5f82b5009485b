"""See before you pace: which calls to model providers pass no limiter.

People set a limit, and some calls never meet it: a framework has its own client, a second SDK was
forgotten, a tool calls a model by itself. While an `Audit` is on, it watches the places where HTTP
calls leave a process: the transports of httpx and httpx2, aiohttp's session, and urllib3's pool,
which requests and boto3 use. A call to a model provider is *paced* if its context holds an open
lease; else it is reported with the line of your code that led to it. So that nothing else is missed,
name look-ups of providers are watched, too, by Python's audit hook: a look-up that no watched call
explains is reported with its host alone.

A lease is found by a context variable, which tasks inherit. Executors inherit none, so work that is
handed to one takes it along. Tasks have no caller's frames, so each remembers the line that started
it. Nothing is patched before an audit begins, and everything is put back when it ends; only the
audit hook stays, because Python cannot remove one, and does nothing then.
"""

import asyncio
import atexit
import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from asyncbucket.engine.lease import ASKED, HELD, OVER, Lease
from asyncbucket.providers.profiles import GENERIC, profile_of

if TYPE_CHECKING:
    from types import FrameType

_Leases = tuple["weakref.ref[Lease]", ...]
#: The leases of this context, whether a watched call is on its way, and the line that started this task.
_LEASES: ContextVar[_Leases] = ContextVar("asyncbucket_leases", default=())
_WATCHED: ContextVar[bool] = ContextVar("asyncbucket_watched", default=False)
_ORIGIN: ContextVar[str] = ContextVar("asyncbucket_origin", default="")
_CALLBACK: Final = asyncio.Handle._run.__code__  # noqa: SLF001
#: Where code is that isn't the user's.
_STANDARD: Final = (str(Path(os.__file__).parent) + os.sep, "<frozen ")
_INSTALLED: Final = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)
_OWN: Final = str(Path(__file__).parent) + os.sep
_NOT_SEEN: Final = (
    "Not seen: connections that were open before the audit began, and gRPC's own resolver."
)


@dataclass(frozen=True, slots=True, order=True)
class Unpaced:
    """Say which calls passed no limiter.

    Attributes:
        host: the provider's host.
        path: the path of the URL, without its query; empty if only a name look-up was seen.
        where: file and line of the first frame that is neither an installed package nor the standard
            library, such as ``"app.py:31"``; empty if there was none.
        count: how many.
    """

    host: str
    path: str
    where: str
    count: int


class Audit:
    """Report calls to model providers that no limiter of this process admitted; made by `audit`.

    It is a context manager. It changes no call, and costs each some 10 microseconds while it is on.
    """

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        if isinstance(hosts, str):
            raise TypeError(f"hosts must be a list of names, such as [{hosts!r}]")
        self._hosts = tuple(host.lower() for host in hosts)
        self._lock = threading.Lock()
        self._found: Counter[tuple[str, str, str]] = Counter()
        self._patched = contextlib.ExitStack()
        #: How many calls to model providers a limiter admitted.
        self.paced = 0

    @property
    def unpaced(self) -> list[Unpaced]:
        """The calls that no limiter admitted, by host, path and line."""
        with self._lock:
            return sorted(Unpaced(*key, count) for key, count in self._found.items())

    def __enter__(self) -> Self:
        if _ON:
            raise RuntimeError("another audit is on in this process: end that one first")
        _ON.append(self)
        _add_hook()
        for module, name, wrap in _PATCHES:
            with contextlib.suppress(ModuleNotFoundError):
                *owner, method = name.split(".")
                cls = functools.reduce(getattr, owner, importlib.import_module(module))
                original = vars(cls)[method]
                setattr(cls, method, functools.wraps(original)(wrap(original)))
                self._patched.callback(setattr, cls, method, original)
        return self

    def __exit__(self, *_: object) -> None:
        self._patched.close()
        _ON.clear()

    def note(self, url: Any) -> None:
        """Count a call to ``url``, which has a host and a path, if it goes to a provider."""
        host: str = url.host or ""
        if profile_of(host) is GENERIC and not any(fnmatchcase(host, each) for each in self._hosts):
            return
        if _alive(_LEASES.get(), HELD) or _alive(_JOB.leases, HELD):
            with self._lock:
                self.paced += 1
        else:
            key = host, url.path, _where()
            with self._lock:
                self._found[key] += 1

    def save(self, folder: str) -> None:
        """Write what was found into a file of this process."""
        report = json.dumps([self.paced, [[*key, count] for key, count in self._found.items()]])
        Path(folder, f"{os.getpid()}.json").write_text(report, "utf-8")

    def add(self, report: str) -> None:
        """Add what another process has written."""
        paced, unpaced = json.loads(report)
        self.paced += paced
        for *key, count in unpaced:
            self._found[tuple(key)] += count

    def __str__(self) -> str:
        found = self.unpaced
        total = f"{sum(each.count for each in found):,}" if found else "none"
        rows = [(f"{each.count:,}", each.host, each.path, each.where) for each in found]
        rows = [("calls", "host", "path", "where"), *rows] if rows else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        told = f"Calls to model providers: {total} unpaced, {self.paced:,} paced."
        if not (found or self.paced):
            told = "No call to a known model provider was seen; name others by hosts= or --host."
        return "\n".join([told, *lines, _NOT_SEEN])

    def __repr__(self) -> str:
        return f"<Audit of {self.paced:,} paced and {sum(self._found.values()):,} unpaced calls>"


def audit(*, hosts: Iterable[str] = ()) -> Audit:
    """Report each call to a model provider that no limiter admits, while the block runs.

    >>> with audit(hosts=["llm.corp.example"]) as seen:
    ...     main()
    >>> print(seen)
    >>> assert not seen.unpaced

    One audit at a time watches the process, all its threads and event loops. A call is paced if the
    context that sends it holds an open lease, whatever limiter gave it. `TokenBucket` gives none, so
    calls that wait at a bare bucket are reported.

    Args:
        hosts: names of providers that asyncbucket doesn't know, perhaps with ``*``.

    Raises:
        RuntimeError: on entering: another audit is on.
    """
    return Audit(hosts)


def audit_process(folder: str, hosts: Iterable[str]) -> None:
    """Audit this process to its end, and write what was found into ``folder``."""
    atexit.register(audit(hosts=hosts).__enter__().save, folder)


#: The audit that is on, if any.
_ON: Final[list[Audit]] = []


@functools.cache
def _add_hook() -> None:
    """Install the hook, once: Python cannot remove it."""
    sys.addaudithook(_on_event)


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" and _ON and not (_WATCHED.get() or _JOB.watched):
        host = args[0].decode("ascii", "replace") if isinstance(args[0], bytes) else str(args[0])
        _ON[0].note(_Url(host.lower(), ""))


class _Job(threading.local):
    """What the job of an executor's thread took along; its context may be another's."""

    leases: _Leases = ()
    watched = False
    where = ""


_JOB: Final = _Job()


def _alive(leases: _Leases, state: int) -> list["weakref.ref[Lease]"]:
    """Return those that are in this state or a later one, and are not over."""
    return [each for each in leases if (held := each()) and state <= held._state < OVER]  # noqa: SLF001


def _where() -> str:
    """Return file and line of the user's code that led here, or that started this task."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    # Beyond a loop's callback is what runs the loop, not what started this task.
    while frame is not None and frame.f_code is not _CALLBACK:
        file = _shown_file(frame.f_code.co_filename)
        if file is not None:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return _JOB.where or _ORIGIN.get()


@functools.cache
def _shown_file(file: str) -> str | None:
    """Return how to show a file of the user's, relative if it lies below; None if it is installed."""
    if file.startswith((*_STANDARD, _OWN)) or any(part in file for part in _INSTALLED):
        return None
    with contextlib.suppress(ValueError, OSError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


# --- what replaces methods while an audit is on; each takes the original ---


def _noted(original: Any) -> Any:
    """Return ``Lease.__init__`` that notes the lease in its context."""

    def __init__(self: Lease, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        _LEASES.set((*_alive(_LEASES.get(), ASKED), weakref.ref(self)))

    return __init__


def _with_origin(original: Any) -> Any:
    """Return ``create_task`` whose task, which copies this context, knows the line that started it."""

    def create_task(*args: Any, **kwargs: Any) -> Any:
        _ORIGIN.set(_where())
        return original(*args, **kwargs)

    return create_task


def _with_context(original: Any) -> Any:
    """Return ``submit`` whose job, on another thread, knows its leases and the line that led to it."""

    def submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        leases = (*_LEASES.get(), *_JOB.leases)
        watched, where = _WATCHED.get() or _JOB.watched, _where()

        def job() -> Any:
            vars(_JOB).update(leases=leases, watched=watched, where=where)
            try:
                return fn(*args, **kwargs)
            finally:
                vars(_JOB).clear()

        return original(self, job)

    return submit


def _watched(url_of: Callable[..., Any], original: Any) -> Any:
    """Return what sends a call, watched; ``url_of`` returns the URL of its arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for seen in _ON:
            seen.note(url_of(*args, **kwargs))
        _WATCHED.set(True)
        try:
            return original(*args, **kwargs)
        finally:
            _WATCHED.set(False)

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        for seen in _ON:
            seen.note(url_of(*args, **kwargs))
        _WATCHED.set(True)
        try:
            return await original(*args, **kwargs)
        finally:
            _WATCHED.set(False)

    return call_async if inspect.iscoroutinefunction(original) else call


class _Url(NamedTuple):
    host: str
    path: str


def _of_httpx(_: Any, request: Any) -> Any:
    return request.url


def _of_urllib3(pool: Any, method: str, url: str, *_: Any, **__: Any) -> _Url:  # noqa: ARG001
    return _Url(pool.host, url.partition("?")[0])


def _of_aiohttp(session: Any, _: str, str_or_url: Any, **__: Any) -> Any:
    return session._build_url(str_or_url)  # noqa: SLF001 - with the session's base URL


_HTTPX: Final = functools.partial(_watched, _of_httpx)
_AIOHTTP: Final = functools.partial(_watched, _of_aiohttp)
_URLLIB3: Final = functools.partial(_watched, _of_urllib3)
#: What is replaced: module, method, and by what.
_PATCHES: Final[tuple[tuple[str, str, Callable[[Any], Any]], ...]] = (
    ("asyncbucket.engine.lease", "Lease.__init__", _noted),
    ("asyncio", "BaseEventLoop.create_task", _with_origin),
    ("concurrent.futures", "ThreadPoolExecutor.submit", _with_context),
    ("httpx", "AsyncHTTPTransport.handle_async_request", _HTTPX),
    ("httpx", "HTTPTransport.handle_request", _HTTPX),
    ("httpx2", "AsyncHTTPTransport.handle_async_request", _HTTPX),
    ("httpx2", "HTTPTransport.handle_request", _HTTPX),
    ("aiohttp", "ClientSession._request", _AIOHTTP),
    ("urllib3", "connectionpool.HTTPConnectionPool.urlopen", _URLLIB3),
)
