"""Send requests to the provider: paced, and retried as long as that makes sense."""

import functools
import json
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import anyio
import httpx

from asyncbucket.cli.run.job import Job
from asyncbucket.cli.run.ledger import Ledger
from asyncbucket.cli.run.request import Request
from asyncbucket.cli.run.tally import Tally
from asyncbucket.core.events import Admitted, Event
from asyncbucket.core.limiter import Limiter
from asyncbucket.providers.errors import FIRST_ERROR, RATE_LIMITED
from asyncbucket.providers.usage import read_usage
from asyncbucket.retry import Retrier, Retry, Sent

_MAX_MESSAGE: Final = 500
#: What parsing an unreadable reply raises; too deep nesting raises the latter.
_JSON_ERRORS: Final = (ValueError, RecursionError)
#: Nobody could be reached, so nothing was sent.
UNREACHABLE: Final = (httpx.ConnectError, httpx.ConnectTimeout)
#: Connections kept for the next request. For each request httpcore compares idle ones in pairs: a
#: hundred of them would take more time than everything else together.
_MAX_IDLE: Final = 32


def request_id(response: httpx.Response) -> str:
    """Return the provider's id of the request, which its support asks for."""
    return str(response.headers.get("x-request-id", ""))


class HTTPFailure(Exception):  # noqa: N818 - a reply that is an error
    """Carry a reply that is an error, or not JSON, in a form that `asyncbucket.retry` reads."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.status_code: int = response.status_code
        self.request_id = request_id(response)
        try:
            self.body: Any = response.json()
        except _JSON_ERRORS:
            self.body = response.text[:_MAX_MESSAGE]
        super().__init__(f"HTTP {self.status_code}: {self.message}")

    @property
    def is_from_another_server(self) -> bool:
        """Whether a success did not come from the API, which would have answered in JSON."""
        return self.status_code < FIRST_ERROR

    @property
    def error(self) -> Mapping[str, Any]:
        """The error object in the reply."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return error if isinstance(error, dict) else {}

    @property
    def message(self) -> str:
        """The error's message, for people."""
        text = self.error.get("message") or self.body
        if self.is_from_another_server:
            text = f"the reply is not JSON: {text or 'it is empty'}"
        return str(text or "no reason given")[:_MAX_MESSAGE]

    @property
    def code(self) -> str:
        """The error's code, for programs."""
        if self.is_from_another_server:
            return "no_json"
        return str(self.error.get("code") or self.error.get("type") or f"http_{self.status_code}")


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Say that a request was not sent, because the run is ending."""


@dataclass(slots=True)
class Reply:
    """The result of one request."""

    attempts: int = 0
    #: Seconds in line, over all attempts.
    waited: float = 0.0
    status: int = 0
    request_id: str = ""
    body: Any = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    sent: Sent = field(default_factory=Sent)

    @property
    def usage(self) -> Mapping[str, Any] | None:
        """The tokens as the provider counts them."""
        usage = self.body.get("usage") if isinstance(self.body, dict) else None
        return usage if isinstance(usage, dict) else None

    def tokens(self) -> tuple[int, int]:
        """Return the tokens sent and received."""
        usage = read_usage(self.usage)
        return (0, 0) if usage is None else (usage.input_tokens, usage.output_tokens)


#: The reply that this task waits for.
_CURRENT: Final[ContextVar[Reply | None]] = ContextVar("asyncbucket_run", default=None)


class Sender:
    """Send requests through a paced client; an async context manager."""

    def __init__(self, job: Job, limiter: Limiter, ledger: Ledger, tally: Tally) -> None:
        self._ledger = ledger
        self._tally = tally
        self._retrier = Retrier(Retry(attempts=job.attempts), limiter)
        base, mark, query = job.api_base.partition("?")
        self._base = base.rstrip("/")
        #: Appended to each path, such as the version of Azure's API.
        self._query = mark + query
        self._client: httpx.AsyncClient = limiter.http_client(
            family="httpx",
            profile=job.profile,
            timeout=job.timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_IDLE),
            headers=_headers(job),
        )
        #: Requests that wait in line or in a back-off.
        self._unsent: dict[int, Reply] = {}
        self._begun = 0
        #: Set, and replaced, whenever a request is over.
        self.request_ended = anyio.Event()
        self._stop_observing = limiter.observe(self._on_event)

    async def send(self, request: Request, reply: Reply) -> None:
        """Send ``request``, and put the result into ``reply``.

        Raises:
            HTTPFailure: the final reply is an error.
            httpx.HTTPError: there was no reply.
            Stopped: it was not sent.
            AsyncBucketError: it can never be admitted.
        """
        _CURRENT.set(reply)
        content = json.dumps(request.body, ensure_ascii=False).encode("utf-8", "backslashreplace")
        with reply.scope:
            self._begun += 1
            self._mark_unsent(reply)
            try:
                await self._retrier.call(
                    functools.partial(self._attempt, reply, request.path, content), sent=reply.sent
                )
            finally:
                self._begun -= 1
                self._unsent.pop(id(reply), None)
                self.request_ended.set()
                self.request_ended = anyio.Event()
        if reply.scope.cancelled_caught:
            raise Stopped

    @property
    def under_way(self) -> int:
        """Requests that were sent and are not answered yet."""
        return self._begun - len(self._unsent)

    def stop(self) -> None:
        """Send no more requests; those in flight go on."""
        for reply in self._unsent.values():
            reply.scope.cancel()

    def _mark_unsent(self, reply: Reply) -> None:
        self._unsent[id(reply)] = reply
        if self._tally.stopping:
            reply.scope.cancel()

    def _on_event(self, event: Event) -> None:
        """Note an admission, first in the ledger; the request leaves after that."""
        if isinstance(event, Admitted):
            cost = {name: units for name, units in event.cost.items() if name != "concurrency"}
            self._ledger.note_admission(cost)
            self._tally.admitted.update(cost)
            reply = _CURRENT.get()
            if reply is not None:
                reply.waited += event.waited
                reply.sent.at = event.at
                self._unsent.pop(id(reply), None)

    async def _attempt(self, reply: Reply, path: str, content: bytes) -> None:
        reply.attempts += 1
        try:
            response = await self._client.post(
                self._base + path.removeprefix("/v1") + self._query, content=content
            )
        except httpx.HTTPError as error:
            self._tally.sent += not isinstance(error, UNREACHABLE)
            self._mark_unsent(reply)
            raise
        except BaseException:  # cancelled, in line or in flight
            self._tally.sent += id(reply) not in self._unsent
            raise
        self._tally.sent += 1
        if response.status_code >= FIRST_ERROR:
            self._tally.refused += response.status_code == RATE_LIMITED
            self._mark_unsent(reply)
            raise HTTPFailure(response)
        reply.status = response.status_code
        reply.request_id = request_id(response)
        try:
            reply.body = response.json()
        except _JSON_ERRORS:
            raise HTTPFailure(response) from None

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_observing()
        await self._client.__aexit__(error_type, error, trace)


def _headers(job: Job) -> dict[str, str]:
    headers = {"content-type": "application/json", "user-agent": "asyncbucket-run"}
    if job.api_key is not None:
        azure = (urlsplit(job.api_base).hostname or "").endswith(".azure.com")
        name, prefix = ("api-key", "") if azure else ("authorization", "Bearer ")
        headers[name] = prefix + job.api_key
    return headers
