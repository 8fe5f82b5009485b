"""A model's HTTP clients: nobody else retries, and a booking is dated when its request leaves.

The SDKs of OpenAI and Anthropic are made by one generator and alike where it matters: a client has
``max_retries``, ``with_options(...)`` returns a copy on the same connection pool, and every attempt
passes ``_prepare_request(request)``, there for subclasses to override, right before it is sent. So
nothing here imports an SDK, and nothing touches a client, an httpx client or a pool that is the
user's own: a copy of the client is made, and its class replaced by a subclass that reports. (An
httpx client with event hooks of our own would have cost openai's pool of 1,000 connections, and
hooks on the user's would have been seen by all that the user does with it.)

``_prepare_request`` comes before the client waits for a connection, which may take a handshake or
more. httpcore tells by its trace extension when the first byte goes out; where it is underneath,
the booking is dated once more by that.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

from asyncbucket.http.held import Held, current

C = TypeVar("C")

#: Marks the classes made here.
_REPORTS: Final = "__asyncbucket_reports__"
_GOES_OUT: Final = "send_request_headers.started"


class _Request(Protocol):
    """What httpx and httpx2 requests have in common here."""

    extensions: dict[str, Any]


def _tracer(held: Held) -> Callable[[str, object], None]:
    def trace(event: str, _: object) -> None:
        if event.endswith(_GOES_OUT):
            held.left()

    return trace


def _async_tracer(held: Held) -> Callable[[str, object], Awaitable[None]]:
    async def trace(event: str, _: object) -> None:
        if event.endswith(_GOES_OUT):
            held.left()

    return trace


def is_client(value: object) -> bool:
    """Tell whether ``value`` is an SDK's client, by the class's own word: mocks have everything."""
    return all(hasattr(type(value), name) for name in ("with_options", "_prepare_request"))


def without_retries(client: C) -> C:
    """Return a copy of ``client`` that sends a request once, on the same connections."""
    theirs: Any = client
    ours: C = theirs.with_options(max_retries=0)
    return reporting(ours)


def reporting(client: C) -> C:
    """Make ``client``, which must not be the user's own, report its requests; return it."""
    cls: Any = type(client)
    if is_client(client) and _REPORTS not in vars(cls):
        client.__class__ = _reporting_class(cls)
    return client


@functools.lru_cache(maxsize=64)
def _reporting_class(cls: type[Any]) -> type[Any]:
    """Return a subclass with one base, so that an instance can change over to it."""

    def prepare(self: Any, request: _Request) -> None:
        cls._prepare_request(self, request)
        if (held := current()) is not None:
            held.leaves()
            request.extensions = {"trace": _tracer(held), **request.extensions}

    async def prepare_async(self: Any, request: _Request) -> None:
        await cls._prepare_request(self, request)
        if (held := current()) is not None:
            held.leaves()
            request.extensions = {"trace": _async_tracer(held), **request.extensions}

    is_async = inspect.iscoroutinefunction(cls._prepare_request)
    names = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_prepare_request": prepare_async if is_async else prepare,
        _REPORTS: True,
    }
    return type(cls.__name__, (cls,), names)
