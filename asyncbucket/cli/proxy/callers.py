"""What a caller may ask of the proxy, and how the proxy says no.

The terms on which a call waits come in headers, such as ``asyncbucket-tenant: acme``. Or a caller's
key is its tenant: of a key the proxy keeps a hash, keyed by random bytes that last as long as the
process. Nobody says when an agent is over. So it is once it has had no open call for a minute.

Errors have the provider's own format, so that its SDK raises the error it would. A call that the
limiter refuses is answered with 429 (503 if its store is out of reach); a provider that cannot be
reached with 502, one that does not answer with 504. ``retry-after`` says when there would be room.
An SDK is told not to try again where that is pointless: the call can never pass, or the caller's own
time was up. Formats: platform.openai.com/docs/guides/error-codes, docs.anthropic.com/en/api/errors
and cloud.google.com/apis/design/errors, read in 2026.
"""

import asyncio
import contextlib
import hashlib
import math
import re
import secrets
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import httpx
from starlette.responses import JSONResponse

from asyncbucket.agents import Agent
from asyncbucket.engine import errors
from asyncbucket.engine.context import InheritedScope, deadline, read_priority, read_text

if TYPE_CHECKING:
    from starlette.types import Scope

Headers: TypeAlias = list[tuple[bytes, bytes]]

#: The headers that are the proxy's own begin like this; the provider gets none of them.
OWN: Final = b"asyncbucket-"
#: Where SDKs put the key: OpenAI's and most others, Anthropic's, Azure's, Google's.
_KEYS: Final = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key")
#: Where a provider expects it, by the protocol.
_EXPECTED: Final = {"anthropic": b"x-api-key", "google": b"x-goog-api-key"}
_BEARER: Final = b"Bearer "
#: An agent that has no open call for so many seconds is over.
_AGENT_IDLE: Final = 60.0
#: Metrics are kept by kind, and callers make them up: so many are told apart, others count as none.
_KINDS: Final = 100
#: Type and code at OpenAI, type at Anthropic, and status at Google, by status; others are as 400.
_TYPES: Final = {
    400: ("invalid_request_error", None, "invalid_request_error", "INVALID_ARGUMENT"),
    429: ("requests", "rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"),
    502: ("server_error", "provider_unreachable", "api_error", "UNAVAILABLE"),
    503: ("server_error", "overloaded", "overloaded_error", "UNAVAILABLE"),
    504: ("server_error", "provider_timeout", "timeout_error", "DEADLINE_EXCEEDED"),
}
#: The paths of Google's own protocol, and the type of what says when to come back.
_GOOGLES_PATH: Final = re.compile(r"/v1(alpha|beta)/(?!openai/)|:\w*(Contents?|[pP]redict|Tokens)$")
_WHOLE: Final = re.compile(r"-?[0-9]{1,9}")
_RETRY_INFO: Final = "type.googleapis.com/google.rpc.RetryInfo"
#: Errors of a call that is not to be tried again: it can never pass, or its caller's time was up.
_POINTLESS: Final = (errors.CostExceedsLimit, errors.AcquireTimeout, errors.UnknownPrice)
#: Seconds after which a caller may try again if nobody knows when there is room.
_SOON: Final = 1.0

#: Tenant, kind and name of an agent.
_AgentKey: TypeAlias = tuple[str | None, str | None, str]


class ProxyError(Exception):
    """Say why the proxy itself refuses a call; it never reaches the provider.

    Args:
        message: what is wrong, and the remedy.
        status: the HTTP status.
        retry_after: seconds until another attempt makes sense; None if it never does.
    """

    def __init__(
        self, message: str, *, status: int = 400, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(slots=True)
class _RunningAgent:
    """An agent, how many of its calls are open, and what ends it if none is."""

    agent: Agent
    calls: int = 0
    end: asyncio.TimerHandle | None = None


class CallerTerms:
    """Put calls on the terms that their headers ask for."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._agents: dict[_AgentKey, _RunningAgent] = {}
        self._kinds: set[str] = set()

    @contextlib.contextmanager
    def applied(
        self, headers: Headers, *, tenants_by_key: bool | None, trust_priority: bool | None = None
    ) -> Generator[None]:
        """Put what is called inside on the terms in ``headers``, whose names are in lower case.

        Priorities go before tenants' shares, so urgent ones need ``trust_priority``.

        Raises:
            ProxyError: a header cannot be read; the message names it.
        """
        terms = _own(headers)
        if terms.get("priority", 0) > 0 and not trust_priority:
            raise ProxyError(
                "asyncbucket-priority: callers may ask for normal and below; start the proxy with "
                "--trust-priority to let them go before others"
            )
        if tenants_by_key:  # whatever a header says
            terms["tenant"] = hashlib.blake2b(key_in(headers), key=self._salt).hexdigest()
        with contextlib.ExitStack() as scopes:
            if "timeout" in terms:
                scopes.enter_context(terms.pop("timeout"))
            if "agent" in terms:
                call = self._agent_calling(terms.get("tenant"), *terms.pop("agent"))
                terms["payers"] = (scopes.enter_context(call),)
            scopes.enter_context(InheritedScope(**terms))
            yield

    @contextlib.contextmanager
    def _agent_calling(self, tenant: str | None, kind: str | None, name: str) -> Generator[Agent]:
        """Yield the agent of a tenant with this kind and name, while a call of it is open."""
        if kind is not None and len(self._kinds) < _KINDS:
            self._kinds.add(kind)
        kind = kind if kind in self._kinds else None
        key = (tenant, kind, name)
        run = self._agents.setdefault(key, _RunningAgent(Agent(name, kind, None)))
        if run.end is not None:
            run.end.cancel()
        run.calls += 1
        try:
            yield run.agent
        finally:
            run.calls -= 1
            if not run.calls:
                loop = asyncio.get_running_loop()
                run.end = loop.call_later(_AGENT_IDLE, self._end_agent, key)

    def _end_agent(self, key: _AgentKey) -> None:
        self._agents.pop(key).agent.end(ended_well=True)


def key_in(headers: Headers) -> bytes:
    """Return the caller's key; empty if there is none. ``headers`` are in lower case."""
    found = dict(reversed(headers))
    return next((found[name].removeprefix(_BEARER) for name in _KEYS if name in found), b"")


def with_key(headers: Headers, key: str, protocol: str) -> Headers:
    """Return ``headers`` with ``key`` wherever the caller's was, or where the provider expects it."""
    names = dict.fromkeys(name for name, _ in headers if name in _KEYS)
    names = names or {_EXPECTED.get(protocol, b"authorization"): None}
    keys = [(name, (_BEARER if name == b"authorization" else b"") + key.encode()) for name in names]
    return [(name, value) for name, value in headers if name not in _KEYS] + keys


def _own(headers: Headers) -> dict[str, Any]:
    """Return what the proxy's own headers say, as `InheritedScope` takes it; ``timeout`` is a scope."""
    found: dict[str, Any] = {}
    for name, value in headers:
        if name.startswith(OWN):
            what = name.removeprefix(OWN).decode("latin-1")
            if what not in _READERS:
                known = ", ".join(f"asyncbucket-{each}" for each in _READERS)
                raise ProxyError(f"asyncbucket-{what} is not a header of the proxy; known: {known}")
            try:
                found[what] = _READERS[what](value.decode("utf-8", "replace").strip())
            except ValueError as error:
                raise ProxyError(f"asyncbucket-{what}: {error}") from None
    return found


def _priority(text: str) -> int:
    value: Any = int(text) if _WHOLE.fullmatch(text) else text
    return read_priority(value)


def _agent(text: str) -> tuple[str | None, str]:
    kind, _, name = text.rpartition("/")
    return kind or None, read_text(name, "the name in NAME or KIND/NAME, such as research/a17,")


_READERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "tenant": partial(read_text, what="a tenant"),
    "priority": _priority,
    "agent": _agent,
    "timeout": lambda text: deadline(float(text)),
}


def error_response(error: Exception, scope: "Scope") -> JSONResponse:
    """Return how a caller is told of an error: the proxy's, the limiter's, or one on the way.

    It holds no key, and nothing of a prompt.
    """
    seconds: float | None = getattr(error, "retry_after", None)
    message, is_pointless = str(error), False
    if isinstance(error, ProxyError):
        status, is_pointless = error.status, seconds is None
    elif isinstance(error, errors.StoreError):
        status, seconds = 503, _SOON
    elif isinstance(error, errors.AsyncBucketError):
        status, is_pointless = 429, isinstance(error, _POINTLESS)
        if seconds is None and not is_pointless:
            seconds = _SOON
    else:  # what else an HTTP client's error says may hold the value of a header
        is_late = isinstance(error, httpx.TimeoutException)
        status, what = (504, "did not answer in time") if is_late else (502, "cannot be reached")
        message = f"the provider {what} ({type(error).__name__})"
    headers: dict[str, str] = {}
    if is_pointless:
        headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's SDKs obey it
    if seconds is not None:
        headers["retry-after"] = str(math.ceil(seconds))
    is_of_tokens = str(getattr(error, "bound_by", "")).endswith("tokens")
    body = _body(scope, status, message, seconds=seconds, is_of_tokens=is_of_tokens)
    return JSONResponse(body, status, headers)


def protocol_of(scope: "Scope") -> Literal["anthropic", "google", "openai"]:
    """Return whose protocol a caller speaks; OpenAI's is most others', too."""
    names = {name for name, _ in scope["headers"]}
    if b"anthropic-version" in names or "/v1/messages" in scope["path"]:
        return "anthropic"
    is_google = b"x-goog-api-key" in names or _GOOGLES_PATH.search(scope["path"])
    return "google" if is_google else "openai"


def _body(
    scope: "Scope", status: int, message: str, *, seconds: float | None, is_of_tokens: bool
) -> dict[str, Any]:
    kind, code, anthropic_kind, google_status = _TYPES.get(status, _TYPES[400])
    match protocol_of(scope):
        case "anthropic":
            told = {"type": anthropic_kind, "message": message}
            return {"type": "error", "error": told, "request_id": None}
        case "google":
            delays = () if seconds is None else (f"{math.ceil(seconds)}s",)
            details = [{"@type": _RETRY_INFO, "retryDelay": delay} for delay in delays]
            google = {"code": status, "message": message, "status": google_status}
            return {"error": {**google, "details": details}}
        case _:
            kind = "tokens" if is_of_tokens else kind
            return {"error": {"message": message, "type": kind, "param": None, "code": code}}
