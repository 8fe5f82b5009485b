"""HTTP clients that are paced, and otherwise like those that the SDKs make."""

import functools
import importlib.util
import sys
from typing import Any, Final, Literal

from asyncbucket.engine.limiter import Limiter
from asyncbucket.http.exchange import FAMILIES, family_of, library_named
from asyncbucket.http.transport import POOL, PacedTransport, TransportOptions
from asyncbucket.waiting import PerLoopTransport

#: The time-outs (s) of the SDKs of OpenAI and Anthropic: a reply may take ten minutes.
_TIMEOUT: Final = 600.0
_CONNECT_TIMEOUT: Final = 5.0
#: SDKs that take a client of one of the two libraries, and show which one by their `DefaultHttpxClient`.
_SDKS: Final = ("openai", "anthropic")
#: What the transport takes; the rest is the client's.
_OURS: Final = TransportOptions.__annotations__.keys() | {"endpoints"}


class ClientOptions(TransportOptions, total=False):
    """What `Limiter.http_client` takes by keyword: its own options, and those of httpx's clients."""

    family: Literal["auto", "httpx", "httpx2"]
    sync: bool
    auth: Any
    base_url: Any
    cert: Any
    cookies: Any
    default_encoding: Any
    event_hooks: Any
    follow_redirects: bool
    headers: Any
    http1: bool
    http2: bool
    limits: Any
    max_redirects: int
    mounts: Any
    params: Any
    proxy: Any
    timeout: Any
    transport: Any
    trust_env: bool
    verify: Any


def http_client(
    limiter: Limiter,
    *,
    family: Literal["auto", "httpx", "httpx2"] = "auto",
    sync: bool = False,
    **options: Any,
) -> Any:
    """Return a paced ``AsyncClient`` or ``Client``: ``limiter`` admits each of its requests.

    Pool, timeouts and redirects are those of OpenAI's and Anthropic's SDKs; ``http2=``,
    ``verify=``, ``proxy=``, ``mounts=`` and the proxies of the environment work as usual.

    Args:
        limiter: what admits the requests.
        family: ``"httpx"`` (openai before 3, anthropic before 1) or ``"httpx2"``; ``"auto"`` takes
            the one that the imported SDK is built on, or else the first installed.
        sync: return a synchronous client.
        options: ``profile=``, ``learn=``, ``routes=``, ``retries=`` and ``endpoints=``, as in
            `asyncbucket.http.transport.PacedTransport`; and arguments for the client, ``timeout=``
            for example.

    Raises:
        ImportError: the library is not installed.
        ValueError: ``family`` or ``profile`` is not known, or imported SDKs are built on both.
    """
    if family not in ("auto", *FAMILIES):
        raise ValueError(f"family must be auto, httpx or httpx2, not {family!r}")
    library = library_named(_wanted_family() if family == "auto" else family)
    ours = {name: options.pop(name) for name in _OURS & options.keys()}
    paced = PacedTransport(limiter, **ours)
    defaults = {
        "base_url": paced.base_url,
        "timeout": library.Timeout(timeout=_TIMEOUT, connect=_CONNECT_TIMEOUT),
        "limits": library.Limits(**POOL),
        "follow_redirects": True,
    }
    cls = library.Client if sync else library.AsyncClient
    make_client: Any = functools.partial(cls, **(defaults | options))
    client = make_client()
    given = [options.get("transport"), *(options.get("mounts") or {}).values()]

    def inner(pattern: Any) -> Any:
        first = _transport_for(pattern, client)
        if sync or first in given:  # one that was given is the same on every loop
            return first
        return PerLoopTransport(lambda: _transport_for(pattern, make_client()), first)

    # Not `transport=`: a client that gets one makes no others, as for proxies, and these need its
    # options. There is no public way to wrap the transports that a client makes.
    client._transport = paced.above(inner(None))  # noqa: SLF001
    for pattern, mounted in client._mounts.items():  # noqa: SLF001
        if mounted is not None:
            client._mounts[pattern] = paced.above(inner(pattern))  # noqa: SLF001
    return client


def _transport_for(pattern: Any, client: Any) -> Any:
    """Return what ``client`` has mounted for ``pattern``, or its transport for everything else."""
    return client._mounts.get(pattern, client._transport)  # noqa: SLF001


def _wanted_family() -> str:
    """Return the library that the imported SDKs are built on, or else the first installed."""
    classes = (getattr(sys.modules.get(name), "DefaultHttpxClient", None) for name in _SDKS)
    wanted = {family_of(cls) for cls in classes if isinstance(cls, type)}
    if len(wanted) > 1:
        raise ValueError(
            "of the imported SDKs, one is built on httpx and one on httpx2: pass family='httpx' (openai "
            "before 3, anthropic before 1) or family='httpx2' (openai from 3, anthropic from 1)"
        )
    installed = (name for name in FAMILIES if importlib.util.find_spec(name) is not None)
    family = next(iter(wanted), None) or next(installed, None)
    if family is None:
        raise ImportError('no HTTP client is installed: pip install "asyncbucket[http]"')
    return family
