"""See before you pace: which calls to model providers pass no limiter.

People set a limit, and some calls never meet it: a framework has its own client, a second SDK was
forgotten, a tool calls a model by itself. While an `Audit` is on, it watches the places where HTTP
calls leave a process: the transports of httpx and httpx2, aiohttp's session, and urllib3's pool,
which requests and boto3 use. A call to a model provider is *paced* if its context holds an open
lease; else it is reported with the line of your code that led to it. So that nothing else is missed,
name look-ups of providers are watched, too, by Python's audit hook: a look-up that none of these
libraries makes is reported with its host alone.

What led to a call is on the stack, but only back to the start of its task, or of its job on another
thread. Each of them therefore gets an `_Origin` from the code that starts it: a task in its context; a
job, whose context may be anybody's, in the frame of `_run`. Nothing is patched before an audit begins,
and everything is put back when it ends; only the audit hook stays, because Python cannot remove one,
and does nothing then.
"""

import asyncio
import functools
import os
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from asyncbucket.engine.lease import OPEN, Lease
from asyncbucket.providers.profiles import GENERIC, profile_of

_CALLBACK: Final = asyncio.Handle._run.__code__  # noqa: SLF001
#: Where code is that isn't the user's.
_PYTHON: Final = (str(Path(os.__file__).parent), str(Path(__file__).parent), "<frozen ")
_INSTALLED: Final = re.compile(r".*[/\\](?:site|dist)-packages[/\\](\w+)")
_NOT_SEEN: Final = (
    "Not seen: hosts that are neither known providers nor named by hosts= or --host, child processes, "
    "connections that were open before the audit began, and gRPC's own resolver."
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
    """Show what was seen of calls to model providers; made by `audit`."""

    def __init__(self, hosts: Iterable[str]) -> None:
        names = [hosts] if isinstance(hosts, str) else hosts
        self._hosts = tuple(name.lower() for name in names)
        self._here = f"{Path.cwd()}{os.sep}"
        self._lock = threading.Lock()
        self._found: Counter[tuple[str, str, str]] = Counter()
        #: How many calls to model providers a limiter admitted.
        self.paced = 0

    @property
    def unpaced(self) -> list[Unpaced]:
        """The calls that no limiter admitted, by host, path and line."""
        with self._lock:
            return sorted(Unpaced(*key, count) for key, count in self._found.items())

    def note(self, host: str, path: str) -> None:
        """Count a call that is about to be made, if it goes to a provider."""
        if profile_of(host) is GENERIC and not any(fnmatchcase(host, each) for each in self._hosts):
            return
        leases = [each() for each in _LEASES.get()]
        is_paced = any(lease and lease._state in OPEN for lease in leases)  # noqa: SLF001
        where = "" if is_paced else _origin().where.removeprefix(self._here)
        with self._lock:
            if is_paced:
                self.paced += 1
            else:
                self._found[host, path, where] += 1

    def __str__(self) -> str:
        found = self.unpaced
        total = sum(each.count for each in found)
        width = max((len(each.host + each.path) for each in found), default=0)
        rows = [f"{each.count:7,}  {each.host + each.path:{width}}  {each.where}" for each in found]
        told = f"Calls to model providers: {total:,} unpaced, {self.paced:,} paced."
        return "\n".join([told, *rows, _NOT_SEEN])


#: The audit that is on, if any.
_ON: Final[list[Audit]] = []


@contextmanager
def audit(*, hosts: Iterable[str] = ()) -> Generator[Audit]:
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
    if _ON:
        raise RuntimeError("another audit is on in this process: end that one first")
    with ExitStack() as at_end:
        _ON.append(Audit(hosts))
        at_end.callback(_ON.clear)
        _add_hook(_on_event)
        for module, owner, method, patch in _PATCHES:
            with suppress(ModuleNotFoundError):
                cls = getattr(import_module(module), owner)
                original = vars(cls)[method]
                setattr(cls, method, _replacing(original, patch))
                at_end.callback(setattr, cls, method, original)
        yield _ON[0]


def _replacing(original: Any, patch: Callable[..., Any]) -> Any:
    # A `functools.partialmethod` would take 4 us for each call.
    def method(self: Any, /, *args: Any, **options: Any) -> Any:
        return patch(self, original, *args, **options)

    return method


#: It installs a hook once: Python cannot remove it.
_add_hook: Final = functools.cache(sys.addaudithook)


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" and _ON and not _origin().is_watched:
        _note(os.fsdecode(args[0] or "").lower(), "")


def _note(host: str, path: str) -> None:
    for seen in _ON:
        seen.note(host, path)


# --- what led to a call ---


class _Origin(NamedTuple):
    """What led to a task, or to a job on another thread."""

    #: The user's line; and whether a library that is watched lies between it and here.
    where: str = ""
    is_watched: bool = False


_TASK: Final = ContextVar("asyncbucket_origin", default=_Origin())  # noqa: B039 - it is a tuple
#: References to the leases that were made in a context.
_LEASES: Final = ContextVar[tuple["weakref.ref[Lease]", ...]]("asyncbucket_leases", default=())


def _origin() -> _Origin:
    """Return what is on the stack, back to the user's line or to what led to this task or job."""
    is_watched, frame = False, cast("Any", sys._getframe(1))  # noqa: SLF001
    # Beyond a loop's callback is what runs the loop, not what started this task.
    while frame is not None and (code := frame.f_code) is not _CALLBACK and code is not _JOB:
        package = _package(code.co_filename)
        if not package:
            return _Origin(f"{code.co_filename}:{frame.f_lineno}", is_watched)
        is_watched = is_watched or package in _LIBRARIES
        frame = frame.f_back
    before: _Origin = (frame and frame.f_locals.get("origin")) or _TASK.get()
    return _Origin(before.where, is_watched or before.is_watched)


@functools.cache
def _package(file: str) -> str:
    """Return which package has a file; "" if it is the user's own."""
    installed = _INSTALLED.match(file)
    return installed[1] if installed else "python" if file.startswith(_PYTHON) else ""


# --- what is called instead of a method while an audit is on ---


def _make_lease(lease: Lease, init: Any, *args: Any) -> None:
    init(lease, *args)
    _LEASES.set((*[each for each in _LEASES.get() if each()], weakref.ref(lease)))


def _create_task(loop: Any, create_task: Any, *args: Any, **kwargs: Any) -> Any:
    _TASK.set(_origin())  # in the context that the task copies
    return create_task(loop, *args, **kwargs)


def _submit(executor: Any, submit: Any, job: Any, /, *args: Any, **kwargs: Any) -> Any:
    return submit(executor, _run, _origin(), _LEASES.get(), job, *args, **kwargs)


def _run(origin: _Origin, leases: Any, job: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
    """Run a job on another thread; `_origin` finds ``origin`` in this frame."""
    _LEASES.set(leases)  # in the thread's own context, until its next job
    return job(*args, **kwargs)


def _send_httpx(transport: Any, send: Any, request: Any) -> Any:
    _note(request.url.host, request.url.path)
    return send(transport, request)


def _send_aiohttp(session: Any, send: Any, method: str, str_or_url: Any, **options: Any) -> Any:
    url = session._build_url(str_or_url)  # noqa: SLF001 - with the session's base URL
    _note(url.host or "", url.path)
    return send(session, method, str_or_url, **options)


def _send_urllib3(pool: Any, send: Any, method: str, url: str, *args: Any, **options: Any) -> Any:
    _note(pool.host, url.partition("?")[0])
    return send(pool, method, url, *args, **options)


_JOB: Final = _run.__code__
#: What is replaced: module, class, method, and by what; and the libraries among these.
_PATCHES: Final[tuple[tuple[str, str, str, Callable[..., Any]], ...]] = (
    ("asyncbucket.engine.lease", "Lease", "__init__", _make_lease),
    ("asyncio", "BaseEventLoop", "create_task", _create_task),
    ("concurrent.futures", "ThreadPoolExecutor", "submit", _submit),
    ("httpx", "AsyncHTTPTransport", "handle_async_request", _send_httpx),
    ("httpx", "HTTPTransport", "handle_request", _send_httpx),
    ("httpx2", "AsyncHTTPTransport", "handle_async_request", _send_httpx),
    ("httpx2", "HTTPTransport", "handle_request", _send_httpx),
    ("aiohttp", "ClientSession", "_request", _send_aiohttp),
    ("urllib3.connectionpool", "HTTPConnectionPool", "urlopen", _send_urllib3),
)
_LIBRARIES: Final = ("httpx", "httpx2", "aiohttp", "urllib3")
