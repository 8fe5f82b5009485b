"""A model's HTTP clients: nobody else retries, and a booking is dated when its request leaves.

The SDKs of OpenAI and Anthropic come from one generator and are alike where it matters. A client
has ``max_retries``; ``with_options(...)`` returns a copy on the same connection pool; and every
attempt calls ``_prepare_request(request)``, which subclasses may override, right before it is sent.
So nothing here imports an SDK, and the user's own clients, httpx clients and pools are not touched:
the client is copied, and the copy's class replaced by a subclass that reports. (An httpx client of
our own with event hooks would lose openai's pool of 1,000 connections, and hooks on the user's
httpx client would see everything else that the user does with it.)

``_prepare_request`` runs before the client waits for a connection, which may take a handshake or
more. httpcore's trace extension reports when the body goes out; if httpcore is underneath, the
booking is dated once more then. (Not when the headers go out: an iteration of the event loop lies
in between, a long one if many calls leave at once, and no provider counts tokens before it has the
body.) The same extension shows the reply's headers, so the limiter hears what the provider says is
left, and learns how it counts, as it does behind a transport.

Connections belong to an event loop. On another one, a request would still go out, but its reply
would be lost: after a second `asyncio.run` every call would be made twice, and two threads with a
loop each would wait for ever. So an httpx client that the SDK made itself gets connections of its
own on each loop.

What retries beneath other models is switched off for each call where that is possible, and else a
warning names the remedy. (Retry decorators around a paced model's methods cannot be detected; the
docs mention them.)
"""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from asyncbucket.attempt import IN_PROGRESS, Attempt
from asyncbucket.engine.wording import warn_user
from asyncbucket.levels import amounts_of
from asyncbucket.llama_index.pacing import Pacing, Requests
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.profiles import profile_of
from asyncbucket.providers.usage import usage_of
from asyncbucket.waiting import ASYNC, SYNC, PerLoopTransport

T = TypeVar("T")

#: What switches off for one call the retries beneath these classes, by module. Of
#: llama-index-llms-litellm 0.8 with litellm 1.110, and llama-index-llms-cohere 0.9 with cohere 7.3.
_UNRETRIED: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama_index.llms.litellm": {"num_retries": 0},
    "llama_index.llms.cohere": {"request_options": {"max_retries": 0}},
}
#: What to do about the others.
_REMEDIES: Final[Mapping[str, str]] = {
    "llama_index.embeddings.cohere": (
        "pass httpx_client=limiter.http_client(sync=True) and "
        "httpx_async_client=limiter.http_client() instead of wrapping it"
    ),
    "llama_index.embeddings.litellm": (
        "set DEFAULT_MAX_RETRIES=0 in the environment before litellm is imported"
    ),
    "llama_index.embeddings.together": (
        'use OpenAILikeEmbedding(api_base="https://api.together.xyz/v1"), which does not'
    ),
}
_BOTOCORE_REMEDY: Final = 'make it with botocore_config=Config(retries={"total_max_attempts": 1})'
#: Marks the classes made here.
REPORTS: Final = "__asyncbucket_reports__"
_BODY_STARTED: Final = "send_request_body.started"
_HEADERS_RECEIVED: Final = "receive_response_headers.complete"


def _tracer(attempt: Attempt, host: str) -> Callable[..., Coroutine[Any, Any, None]]:
    """Return what follows one request to ``host`` on its way, as httpcore's trace extension."""
    requests: Requests = attempt.call
    profile = requests.profile = profile_of(host)
    reader = HeaderReader.of(requests.provider) if requests.learn else None

    async def trace(event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(_BODY_STARTED):
            requests.sent(attempt)
        elif event.endswith(_HEADERS_RECEIVED) and reader is not None:
            sent_at = requests.sent_at
            if sent_at is not None and reader.is_due(sent_at):
                parts = info["return_value"]  # HTTP/1.1 has more parts than HTTP/2
                headers = next((part for part in parts if isinstance(part, list)), [])
                own = {} if attempt.lease is None else amounts_of(attempt.lease)
                reader.read(headers, profile, since=sent_at, own=own)

    return trace


def _is_plain_client(value: object) -> bool:
    """Tell whether ``value`` is an SDK's client, judged by its class: mocks have every attribute."""
    cls = type(value)
    is_client = hasattr(cls, "with_options") and hasattr(cls, "_prepare_request")
    return is_client and not hasattr(cls, REPORTS)


def without_retries(value: Any) -> Any:
    """Return a copy of an SDK's client that does not retry, on the same connections; else ``value``."""
    if not _is_plain_client(value):
        return value
    copied = value.with_options(max_retries=0)
    _make_reporting(copied)
    return copied


def late_client(model: Any, client: Any) -> Any:
    """Return a copy without retries of a client that ``model`` has made or taken late; it keeps the copy."""
    copied = without_retries(client)
    if copied is not client:
        private: dict[str, Any] = model.__pydantic_private__
        private.update({name: copied for name, value in private.items() if value is client})
    return copied


def _make_reporting(client: Any) -> None:
    cls: Any = type(client)
    # The module has what all clients of the SDK share, and the class of those httpx clients that
    # the SDK makes itself; all others are the user's.
    sdk = sys.modules[cls.request.__module__]
    http_client = client._client  # noqa: SLF001 - there is no public way
    if type(http_client) is getattr(sdk, "AsyncHttpxClientWrapper", None):
        _connect_by_loop(http_client, client)
    if getattr(client, "_platform", ...) is None:
        # Or its first request, which holds a slot, would ask for it in a thread. But perhaps all
        # threads run synchronous calls that wait for a slot.
        client._platform = sdk.get_platform()  # noqa: SLF001 - as above
    client.__class__ = _reporting_class(cls)


def _connect_by_loop(http_client: Any, client: Any) -> None:
    """Give an httpx client that an SDK made for ``client`` connections of its own on each event loop."""
    make_client: Any = type(http_client).__base__  # it has no `__del__`, which would close them

    def per_loop(pattern: Any, first: Any) -> PerLoopTransport:
        def make() -> Any:
            new = make_client(base_url=client.base_url, timeout=client.timeout)
            return new._mounts.get(pattern, new._transport)  # noqa: SLF001 - as above

        return PerLoopTransport(make, first)

    transport, mounts = http_client._transport, http_client._mounts  # noqa: SLF001 - as above
    if not isinstance(transport, PerLoopTransport):  # another copy of the client may share it
        http_client._transport = per_loop(None, transport)  # noqa: SLF001 - as above
        for pattern, first in mounts.items():
            mounts[pattern] = first and per_loop(pattern, first)


@functools.lru_cache(maxsize=64)
def _reporting_class(cls: Any) -> type[Any]:
    """Return a subclass with one base, so that an instance's class can be replaced by it."""
    io = ASYNC if inspect.iscoroutinefunction(cls._prepare_request) else SYNC
    own_prepare, own_request = io.awaiting(cls._prepare_request), io.awaiting(cls.request)

    async def prepare(self: Any, request: Any) -> None:
        await own_prepare(self, request)
        attempt = IN_PROGRESS.get()
        if attempt is not None and isinstance(attempt.call, Requests):
            await attempt.call.prepared(attempt, io)
            tracer = _tracer(attempt, request.url.host)
            trace = tracer if io is ASYNC else io.function(tracer)
            request.extensions = {"trace": trace, **request.extensions}

    async def request(self: Any, *args: Any, **kwargs: Any) -> Any:
        reply = await own_request(self, *args, **kwargs)
        attempt = IN_PROGRESS.get()
        if attempt is not None and isinstance(requests := attempt.call, Requests):
            if not kwargs.get("stream"):
                requests.usages.append(usage_of(reply))
            elif hasattr(reply, "_iterator"):
                requests.stream = weakref.ref(reply)
                items, wanted = reply._iterator, _reader(requests)  # noqa: SLF001 - all its iterators read
                reply._iterator = (  # noqa: SLF001 - as above
                    (item async for item in items if wanted(item))
                    if io is ASYNC
                    else filter(wanted, items)
                )
        return reply

    names = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__qualname__")}
    methods = {"_prepare_request": io.function(prepare), "request": io.function(request)}
    return type(cls.__name__, (cls,), {**names, **methods, REPORTS: True})


def _reader(requests: Requests) -> Callable[[Any], bool]:
    """Return what notes the usage in an SDK's stream, and tells which chunks are for the caller.

    A chunk that is empty except for a usage that only we asked for is not: whoever looks at the last
    chunk expects the end of the answer there.
    """
    usages, index = requests.usages, len(requests.usages)
    usages.append(None)

    def is_for_caller(item: Any) -> bool:
        fields: dict[str, Any] = getattr(item, "__dict__", {})
        if not any(map(fields.get, ("usage", "response", "message"))):  # as most
            return True
        usage = usage_of(item)
        if usage is None:
            return True
        usages[index] = usage | usages[index]
        return bool(fields.get("choices", True)) or not requests.hides_usage

    return is_for_caller


def unretried_options(cls: type[Any]) -> Mapping[str, Any]:
    """Return the arguments that keep others from retrying a call of a model of class ``cls``."""
    return _known(_UNRETRIED, cls) or {}


def warn_of_misuse(model: Any, pacing: Pacing) -> None:
    """Warn of each thing that undoes the pacing of ``model``, at the line that called `wrap`."""
    name = type(model).__name__
    if getattr(model, "rate_limiter", None) is not None:
        warn_user(
            f"{name} has a rate_limiter of its own: each call would wait there, too, "
            f"with its slot held and as part of the model's latency; make it without rate_limiter="
        )
    of_class = _known(_REMEDIES, model.__class__)
    remedy = _BOTOCORE_REMEDY if _has_retrying_botocore(model) else of_class
    if remedy is not None and pacing.retrier.policy.attempts > 1:
        warn_user(
            f"{name} tries failed requests again by itself, unseen by the limiter: {remedy}; "
            f"or wrap with retry=False, so that only one layer retries"
        )


def _has_retrying_botocore(model: Any) -> bool:
    """Tell whether a Bedrock model's client or its settings let botocore retry, as it does by default."""
    private: dict[str, Any] = getattr(model, "__pydantic_private__", None) or {}
    client = next((v for v in private.values() if type(v).__module__ == "botocore.client"), None)
    if client is None:
        return False
    retries = client.meta.config.retries or {}
    return bool(retries.get("total_max_attempts", retries.get("max_attempts", 1) + 1) > 1)


def _known(table: Mapping[str, T], cls: Any) -> T | None:
    """Return what a table says of the integration that ``cls``, or a class above it, is from."""
    packages = {".".join(base.__module__.split(".")[:3]) for base in cls.__mro__}
    return next((known for package, known in table.items() if package in packages), None)
