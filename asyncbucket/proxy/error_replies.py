"""How the proxy says no: in the provider's own format, so that its SDK raises the error it would.

A call that the limiter refuses is answered with 429 (503 if its store is out of reach); a provider
that cannot be reached with 502, one that does not answer with 504. ``retry-after`` says when there
would be room. An SDK is told not to try again where that is pointless: the call can never pass, or
the caller's own time was up.

Formats: platform.openai.com/docs/guides/error-codes and docs.anthropic.com/en/api/errors, read in
2026.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import httpx
from starlette.responses import JSONResponse

from asyncbucket.core.errors import (
    AcquireTimeout,
    AsyncBucketError,
    CostExceedsLimit,
    StoreError,
    UnknownPrice,
)
from asyncbucket.proxy.headers import is_anthropic

if TYPE_CHECKING:
    from starlette.types import Scope

#: Type and code at OpenAI, and type at Anthropic, by status; others are as 400.
_TYPES: Final = {
    400: ("invalid_request_error", None, "invalid_request_error"),
    403: ("invalid_request_error", "forbidden", "permission_error"),
    429: ("requests", "rate_limit_exceeded", "rate_limit_error"),
    502: ("server_error", "provider_unreachable", "api_error"),
    503: ("server_error", "overloaded", "overloaded_error"),
    504: ("server_error", "provider_timeout", "timeout_error"),
}
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
    if seconds is not None and math.isfinite(seconds):
        headers["retry-after"] = str(math.ceil(seconds))
        headers["retry-after-ms"] = str(math.ceil(seconds * 1_000))
    body = _body(scope, status, message, bound_by=getattr(error, "bound_by", None))
    return JSONResponse(body, status, headers)


def _body(scope: "Scope", status: int, message: str, *, bound_by: str | None) -> Mapping[str, Any]:
    kind, code, anthropic_kind = _TYPES.get(status, _TYPES[400])
    if is_anthropic(scope):
        told = {"type": anthropic_kind, "message": message}
        return {"type": "error", "error": told, "request_id": None}
    if bound_by is not None and bound_by.endswith("tokens"):
        kind = "tokens"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
