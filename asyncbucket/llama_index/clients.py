"""A model's HTTP clients: nobody else retries, and a booking is dated when its request leaves.

The SDKs of OpenAI and Anthropic are made by one generator and alike where it matters: a client has
``max_retries``, ``with_options(...)`` returns a copy on the same connection pool, and every attempt
passes ``_prepare_request(request)``, there for subclasses to override, right before it is sent. So
nothing here imports an SDK, and nothing touches a client, an httpx client or a pool that is the
user's own: a copy of the client is made, and its class replaced by a subclass that reports. (An
httpx client with event hooks of our own would have cost openai's pool of 1,000 connections, and
hooks on the user's would have been seen by all that the user does with it.)

``_prepare_request`` comes before the client waits for a connection, which may take a handshake or
more. httpcore tells by its trace extension when the body goes out; where it is underneath, the
booking is dated once more by that. (Not when the headers do: a turn of the event loop comes between,
a long one where many calls leave at once, and no provider counts tokens before it has the body.)
The same extension shows the reply's headers, and so the limiter hears what the provider says is left:
of providers that are known by their host, since a gateway that only looks like one may mean something
else by the same names.
"""

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any, Final, Protocol, TypeVar

from asyncbucket.http.held import Held, current
from asyncbucket.http.profiles import GENERIC, profile_of
from asyncbucket.http.usage import usage_of
from asyncbucket.llama_index.held import HeldCall

C = TypeVar("C")

#: Marks the classes made here.
_REPORTS: Final = "__asyncbucket_reports__"
_GOES_OUT: Final = "send_request_body.started"
_ANSWERED: Final = "receive_response_headers.complete"


class _Request(Protocol):
    """What httpx and httpx2 requests have in common here."""

    extensions: dict[str, Any]
    url: Any


class _Trace:
    """Listen to one request on its way, by httpcore's trace extension."""

    __slots__ = ("_held", "_profile")

    def __init__(self, held: Held, request: _Request) -> None:
        self._held = held
        self._profile = profile_of(request.url.host)

    def hear(self, event: str, info: Mapping[str, Any]) -> None:
        """Take in what httpcore tells."""
        if event.endswith(_GOES_OUT):
            self._held.left()
        elif event.endswith(_ANSWERED) and self._profile is not GENERIC:
            parts = info["return_value"]  # HTTP/1.1 has more of them than HTTP/2
            status = next(each for each in parts if isinstance(each, int))
            headers = next((each for each in parts if isinstance(each, list)), [])
            self._held.answered(status, headers, self._profile)

    async def hear_async(self, event: str, info: Mapping[str, Any]) -> None:
        """Do so on an event loop."""
        self.hear(event, info)


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
        _know_platform(client)
        client.__class__ = _reporting_class(cls)
    return client


def _know_platform(client: Any) -> None:
    """Have ``client`` know its platform before it is asked for anything.

    An asynchronous one would find out in a thread of the event loop, with a slot held, while all of these
    threads may be waiting for slots: ``asyncio.to_thread(llm.chat, ...)`` does so.
    """
    find = getattr(sys.modules[type(client).request.__module__], "get_platform", None)
    if find is not None and getattr(client, "_platform", "") is None:
        client._platform = find()  # noqa: SLF001 - made for this


@functools.lru_cache(maxsize=64)
def _reporting_class(cls: type[Any]) -> type[Any]:
    """Return a subclass with one base, so that an instance can change over to it."""

    def prepare(self: Any, request: _Request) -> None:
        cls._prepare_request(self, request)
        if (held := current()) is not None:
            held.leaves()
            request.extensions = {"trace": _Trace(held, request).hear, **request.extensions}

    async def prepare_async(self: Any, request: _Request) -> None:
        await cls._prepare_request(self, request)
        if (held := current()) is not None:
            held.leaves()
            request.extensions = {"trace": _Trace(held, request).hear_async, **request.extensions}

    def request(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _seen(cls.request(self, *args, **kwargs), kwargs)

    async def request_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _seen(await cls.request(self, *args, **kwargs), kwargs)

    is_async = inspect.iscoroutinefunction(cls._prepare_request)
    names = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_prepare_request": prepare_async if is_async else prepare,
        "request": request_async if is_async else request,
        _REPORTS: True,
    }
    return type(cls.__name__, (cls,), names)


def _seen(reply: Any, arguments: Mapping[str, Any]) -> Any:
    """Return ``reply``; its usage is noted, and a stream, so that it can be hung up."""
    held = current()
    if isinstance(held, HeldCall):
        if not arguments.get("stream"):
            held.replied(usage_of(reply))
        elif hasattr(reply, "close"):
            held.streams(reply)
    return reply
