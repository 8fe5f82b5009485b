"""The proxy at work: its two addresses, what signals mean, and what its status pages show.

Calls and status pages have addresses of their own. So every path of a provider can be called, also
its ``/metrics``; and in a pod, calls may stay on loopback while probes and scrapes come from outside.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, cast

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, Response

from asyncbucket.core.limiter import Limiter
from asyncbucket.http.pool_file import read_pool
from asyncbucket.http_server import configured, listen
from asyncbucket.proxy.app import Proxy
from asyncbucket.proxy.error_replies import ProxyError, error_response
from asyncbucket.proxy.options import Address, ProxyOptions
from asyncbucket.telemetry import prometheus, report
from asyncbucket.telemetry.stats import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from asyncbucket.http.endpoints import Endpoints

#: Seconds that open calls get when the proxy is stopped: Kubernetes kills after 30.
_GRACE: Final = 25
#: A caller takes two descriptors, one on each side; many systems allow 1,024.
_DESCRIPTORS: Final = 65_536

_log: Final = logging.getLogger("asyncbucket.proxy")


class Serving:
    """A proxy that is about to serve: it listens already.

    Args:
        options: what it is made of.

    Raises:
        ValueError: an address is taken or not available, or an argument of the limiter is wrong.
    """

    def __init__(self, options: ProxyOptions) -> None:
        #: What it began with: what a reload cannot change stays as it is here.
        self._options = options
        endpoints: Endpoints | None = None
        self.limiter: Limiter
        if options.pool is None:
            self.limiter = Limiter(*options.limits, **options.terms)
        else:
            self.limiter, endpoints = read_pool(options.pool)
        self._proxy = Proxy(self.limiter, options, endpoints)
        self._sockets: list[socket.socket] = []
        try:
            for address in (options.listen, options.status):
                self._sockets.append(listen(*Address.read(address)))
        except OSError as error:
            for each in self._sockets:
                each.close()
            raise ValueError(f"{error.strerror}: change listen or status") from error
        #: Where calls come in, and where the status pages are.
        self.address, self.status_address = (
            Address(*each.getsockname()[:2]) for each in self._sockets
        )
        self._registry = CollectorRegistry()
        prometheus(self.limiter, registry=self._registry)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request at either address; at one on loopback, only programs on this machine."""
        address, app = self.address, cast("ASGIApp", self._proxy)
        if scope["server"][1] == self.status_address.port:
            address = self.status_address
            app = _status_page(self.limiter, self._registry, scope["path"])
        if address.is_local and not _is_from_here(Headers(scope=scope)):
            error = ProxyError("this proxy serves only programs on its own machine", status=403)
            app = error_response(error, scope)
        await app(scope, receive, send)

    def run(self, reread: Callable[[], ProxyOptions] | None = None) -> None:
        """Serve until SIGINT or SIGTERM; then finish what is open, or drop it after a while.

        Args:
            reread: returns new options on SIGHUP; by default that signal is not taken.
        """
        _allow_many_connections()
        asyncio.run(self._run(reread))

    async def _run(self, reread: Callable[[], ProxyOptions] | None) -> None:
        server, loop = _Server(self), asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # Windows, where Ctrl-C ends it at once
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, server.handle_exit, number, None)
            if reread is not None:
                loop.add_signal_handler(signal.SIGHUP, self.reload, reread)
        try:
            await server.serve(self._sockets)
        finally:
            await self._proxy.aclose()
            await self.limiter.aclose()

    def reload(self, reread: Callable[[], ProxyOptions]) -> None:
        """Put new options in force; open calls go on. What cannot be read changes nothing."""
        try:
            options = reread()
            if options.pool != self._options.pool:
                raise ValueError("only a restart can change pool")  # noqa: TRY301
            if options.pool is None:
                concurrency = options.terms.get("concurrency")
                self.limiter.reconfigure(*options.limits, concurrency=concurrency)
        except (OSError, TypeError, ValueError) as error:
            _log.error("the settings stay as they are: %s", error)
            return
        self._proxy.options = options
        _log.info("new settings are in force")
        waiting = self._options.restarts(options)
        if options.pool is not None:
            waiting.append(f"what is in {options.pool}")
        if waiting:
            _log.warning("a restart is needed to change %s", ", ".join(waiting))


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to us, and says nothing of its own."""

    def __init__(self, app: Any) -> None:
        # It would warn of each upgrade that is offered, and Java's client always offers one.
        super().__init__(configured(app, log_level="error", timeout_graceful_shutdown=_GRACE))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.server_state.tasks:  # they are told that the proxy stops
            await asyncio.wait(self.server_state.tasks)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _is_from_here(headers: Headers) -> bool:
    """Tell whether a request comes from a program on this machine.

    A browser that was directed here under a foreign name (DNS rebinding) shows that name in ``Host``;
    one that a foreign page has send something shows the page in ``Origin``.
    """
    origin = headers.get("origin")
    is_own = origin is None or is_loopback(origin.partition("://")[2])
    return is_own and is_loopback(headers.get("host", ""))


def _status_page(limiter: Limiter, registry: CollectorRegistry, path: str) -> Response:
    match path:
        case "/healthz":
            return PlainTextResponse("ok")
        case "/" | "/stats":
            return JSONResponse(report([limiter]), headers={"cache-control": "no-store"})
        case "/metrics":
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
        case _:
            return PlainTextResponse("there are /stats, /metrics and /healthz", 404)


def _allow_many_connections() -> None:
    """Raise this process's bound on open descriptors as far as it may."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such bound
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
