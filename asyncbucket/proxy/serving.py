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
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from asyncbucket.core.limiter import Limiter
from asyncbucket.http_server import configured, listen
from asyncbucket.proxy.app import Proxy
from asyncbucket.proxy.options import DEFAULT_STATUS, Address, ProxyOptions, ProxySettings
from asyncbucket.telemetry import prometheus, report
from asyncbucket.telemetry.stats import is_loopback

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

#: Seconds that open calls get when the proxy is stopped: Kubernetes kills after 30.
_GRACE: Final = 25
#: A caller takes two descriptors, one on each side; many systems allow 1,024.
_DESCRIPTORS: Final = 65_536

_log: Final = logging.getLogger("asyncbucket.proxy")


class Serving:
    """A proxy that is about to serve: it listens already.

    Args:
        settings: what it is made of.

    Raises:
        ValueError: an address is taken or not available, or an argument of the limiter is wrong.
    """

    def __init__(self, settings: ProxySettings) -> None:
        self._settings, options = settings, settings.options
        self.limiter = Limiter(*settings.limits, **settings.terms)
        self._proxy = Proxy(self.limiter, options)
        self._calls = _listen(options.address)
        try:
            self._status = _listen_for_status(options)
        except ValueError:
            self._calls.close()
            raise
        #: Where calls come in, and where the status pages are.
        self.address = Address(*self._calls.getsockname()[:2])
        self.status_address = Address(*self._status.getsockname()[:2])
        self._status_pages = _status_pages(self.limiter, only_here=options.status_address.is_local)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request at either address."""
        is_status = scope["server"][1] == self.status_address.port
        await (self._status_pages if is_status else self._proxy)(scope, receive, send)

    def run(self, reread: Callable[[], ProxySettings] | None = None) -> None:
        """Serve until SIGINT or SIGTERM; then finish what is open, or drop it after a while.

        Args:
            reread: returns new settings on SIGHUP; by default that signal is not taken.
        """
        _allow_many_connections()
        asyncio.run(self._run(reread))

    async def _run(self, reread: Callable[[], ProxySettings] | None) -> None:
        server, loop = _Server(self), asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # Windows, where Ctrl-C ends it at once
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, server.handle_exit, number, None)
            if reread is not None:
                loop.add_signal_handler(signal.SIGHUP, self.reload, reread)
        try:
            await server.serve([self._calls, self._status])
        finally:
            await self._proxy.aclose()
            await self.limiter.aclose()

    def reload(self, reread: Callable[[], ProxySettings]) -> None:
        """Put new settings in force; open calls go on. What cannot be read changes nothing."""
        before = self._settings
        try:
            settings = reread()
            concurrency = settings.terms.get("concurrency")
            self.limiter.reconfigure(*settings.limits, concurrency=concurrency)
        except (OSError, ValueError) as error:
            _log.error("the settings stay as they are: %s", error)
            return
        self._settings, self._proxy.options = settings, settings.options
        _log.info("new settings are in force")
        if waiting := before.restarts(settings):
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


def _listen(address: Address) -> socket.socket:
    try:
        return listen(*address)
    except OSError as error:
        raise ValueError(f"{error.strerror}: give another address") from error


def _listen_for_status(options: ProxyOptions) -> socket.socket:
    """Listen where the status pages are to be; if their default port is taken, at any free one."""
    try:
        return _listen(options.status_address)
    except ValueError:
        if options.status != DEFAULT_STATUS:
            raise
        return _listen(Address(options.status_address.host, 0))


def _status_pages(limiter: Limiter, *, only_here: bool) -> Starlette:
    registry = CollectorRegistry()
    prometheus(limiter, registry=registry)

    def page(show: Callable[[], Response]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            if only_here and not is_loopback(request.headers.get("host", "")):
                return PlainTextResponse("Only for this machine", 403)
            return show()

        return answer

    def healthz() -> Response:
        return PlainTextResponse("ok")

    def stats() -> Response:
        return JSONResponse(report([limiter]), headers={"cache-control": "no-store"})

    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    pages = {"/": stats, "/stats": stats, "/healthz": healthz, "/metrics": metrics}
    return Starlette(routes=[Route(path, page(show)) for path, show in pages.items()])


def _allow_many_connections() -> None:
    """Raise this process's bound on open descriptors as far as it may."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such bound
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
