"""How the proxy says no: in the provider's own format, so that its SDK raises the error it would.

A call that the limiter refuses is answered with 429 (503 if its store is out of reach); a provider
that cannot be reached with 502, one that does not answer with 504. ``retry-after`` says when there
would be room. An SDK is told not to try again where that is pointless: the call can never pass, or
the caller's own time was up.

Formats: platform.openai.com/docs/guides/error-codes, docs.anthropic.com/en/api/errors and
cloud.google.com/apis/design/errors, read in 2026.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import httpx
from starlette.responses import JSONResponse

from asyncbucket.core.errors import (
    AcquireTimeout,
    AsyncBucketError,
    CostExceedsLimit,
    StoreError,
    UnknownPrice,
)

if TYPE_CHECKING:
    from starlette.types import Scope

#: Type and code at OpenAI, type at Anthropic, and status at Google, by status; others are as 400.
_TYPES: Final = {
    400: ("invalid_request_error", None, "invalid_request_error", "INVALID_ARGUMENT"),
    403: ("invalid_request_error", "forbidden", "permission_error", "PERMISSION_DENIED"),
    429: ("requests", "rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"),
    502: ("server_error", "provider_unreachable", "api_error", "UNAVAILABLE"),
    503: ("server_error", "overloaded", "overloaded_error", "UNAVAILABLE"),
    504: ("server_error", "provider_timeout", "timeout_error", "DEADLINE_EXCEEDED"),
}
#: The paths of Google's own protocol, and the type of what says when to come back.
_GOOGLES_PATH: Final = re.compile(r"/v1(alpha|beta)/(?!openai/)|:\w*(Contents?|[pP]redict|Tokens)$")
_RETRY_INFO: Final = "type.googleapis.com/google.rpc.RetryInfo"
#: Seconds after which a caller may try again if nobody knows when there is room.
_SOON: Final = 1.0


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


def error_response(error: Exception, scope: "Scope") -> JSONResponse:
    """Return how a caller is told of an error: the proxy's, the limiter's, or one on the way.

    It holds no key, and nothing of a prompt.
    """
    seconds: float | None = getattr(error, "retry_after", None)
    message, is_pointless = str(error), False
    if isinstance(error, ProxyError):
        status, is_pointless = error.status, seconds is None
    elif isinstance(error, StoreError):
        status, seconds = 503, _SOON
    elif isinstance(error, AsyncBucketError):
        status = 429
        is_pointless = isinstance(error, CostExceedsLimit | AcquireTimeout | UnknownPrice)
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
        headers["retry-after-ms"] = str(math.ceil(seconds * 1_000))
    bound_by: str | None = getattr(error, "bound_by", None)
    body = _body(scope, status, message, seconds=seconds, bound_by=bound_by)
    return JSONResponse(body, status, headers)


def protocol_of(scope: "Scope") -> Literal["anthropic", "google", "openai"]:
    """Return whose protocol a caller speaks; OpenAI's is most others', too."""
    names = {name for name, _ in scope["headers"]}
    if b"anthropic-version" in names or "/v1/messages" in scope["path"]:
        return "anthropic"
    is_google = b"x-goog-api-key" in names or _GOOGLES_PATH.search(scope["path"])
    return "google" if is_google else "openai"


def _body(
    scope: "Scope", status: int, message: str, *, seconds: float | None, bound_by: str | None
) -> Mapping[str, Any]:
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
            is_of_tokens = bound_by is not None and bound_by.endswith("tokens")
            kind = "tokens" if is_of_tokens else kind
            return {"error": {"message": message, "type": kind, "param": None, "code": code}}
