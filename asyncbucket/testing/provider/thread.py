"""The provider in a thread of this process."""

from typing import TYPE_CHECKING, Any, Unpack

from asyncbucket.testing.provider.admission import Admission
from asyncbucket.testing.provider.app import make_app
from asyncbucket.testing.provider.mock import Family, mock_transport
from asyncbucket.testing.provider.running import Running
from asyncbucket.testing.provider.server import HOST, ThreadedServer
from asyncbucket.testing.provider.settings import Failure, Options, settings_of
from asyncbucket.testing.provider.statistics import Arrival, ProviderStatistics

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class RateLimitedProvider(Running):
    """An OpenAI-compatible provider on loopback that enforces its limits.

    A context manager, async or not; inside it answers at `base_url`::

        async with RateLimitedProvider(rpm=600, tpm=100_000) as provider:
            client = AsyncOpenAI(base_url=provider.base_url, api_key="any")

    It runs in a thread with an event loop of its own and shares the interpreter's lock with the
    caller; `ProviderProcess` doesn't. Its methods may be called from any thread, before, while and
    after it runs. Any API key is accepted; all keys share one budget.

    Args:
        options: See `Settings`: `rpm`, `tpm`, `policy`, `concurrency`, `latency`, `error_rate`, ...

    Raises:
        ValueError: For an option out of its range.
        TypeError: For an unknown option, or a clock that returns no integers.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        self._admission = Admission(settings_of(options))
        self._server: ThreadedServer | None = None
        self._port = 0
        self.app: ASGIApp = make_app(self._admission)
        """The application itself, for frameworks' test clients; see `mock_transport` too."""

    def __repr__(self) -> str:
        settings = self._admission.settings
        where = self.url if self._server else "not running"
        return (
            f"<RateLimitedProvider rpm={settings.rpm} tpm={settings.tpm} "
            f"policy={settings.policy} {where}>"
        )

    @property
    def url(self) -> str:
        """The root, such as ``http://127.0.0.1:8000``; what an Azure client calls its endpoint."""
        if not self._port:
            raise RuntimeError("the provider isn't running: enter it with `with` or `async with`")
        return f"http://{HOST}:{self._port}"

    @property
    def base_url(self) -> str:
        """What an OpenAI client calls its base URL, such as ``http://127.0.0.1:8000/v1``."""
        return f"{self.url}/v1"

    def mock_transport(self, *, family: Family = "httpx", sync: bool = False) -> Any:
        """Return a ``MockTransport`` with which this provider answers: no server, no sockets.

        It works without being started, and with `clock=time.clock` on virtual time::

            provider = RateLimitedProvider(rpm=600, latency=1.5, clock=time.clock)
            http = httpx.AsyncClient(transport=provider.mock_transport())
            client = AsyncOpenAI(http_client=http, api_key="any")

        Args:
            family: The library whose clients take it: "httpx" or "httpx2".
            sync: For ``Client`` instead of ``AsyncClient``; see `mock`.

        Raises:
            ImportError: The library isn't installed.
            ValueError: ``family`` is neither of the two.
        """
        return mock_transport(self.app, family=family, sync=sync)

    @property
    def arrivals(self) -> list[Arrival]:
        """The latest calls and whether they were admitted, oldest first."""
        return self._admission.arrivals()

    def statistics(self) -> ProviderStatistics:
        """Take a snapshot of what was seen since it was made."""
        return self._admission.statistics()

    def reconfigure(self, **options: Unpack[Options]) -> None:
        """Change limits, latency, error rate and the like; what was used stays used.

        Raises:
            ValueError: For a value out of range, or an option that is fixed at the start.
        """
        self._admission.reconfigure(**options)

    def fail_next(
        self,
        count: int = 1,
        *,
        status: int = 500,
        code: str | None = None,
        retry_after: float | None = None,
        after_chunks: int | None = None,
    ) -> None:
        """Let the next `count` calls fail, after those scripted before; 0 forgets all of them.

        Args:
            count: How many calls.
            status: See `Failure`, as for the others.
            code: Such as "insufficient_quota".
            retry_after: Seconds.
            after_chunks: Break streams off after this many chunks; other calls get `status`.
        """
        failure = Failure(status, code, retry_after, after_chunks)
        self._admission.fail_next(count, failure)

    def start(self) -> None:
        """Start answering. Done by entering the context."""
        if self._server is not None:
            raise RuntimeError(f"the provider runs already, at {self.url}")
        server = ThreadedServer(self.app, port=self._admission.settings.port)
        server.start()
        self._server, self._port = server, server.port

    def stop(self) -> None:
        """Stop; thread and sockets are gone afterwards. Done by leaving the context. Idempotent."""
        if self._server is not None:
            self._server.stop()
            self._server = None
