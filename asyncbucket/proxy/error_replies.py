"""How the proxy says no: in the provider's own format, so that its SDK raises the error it would.

A call that the limiter refuses is answered with 429 (503 if its store is out of reach); a provider
that cannot be reached with 502, one that does not answer with 504. ``retry-after`` says when there
would be room. An SDK is told not to try again where that is pointless: the call can never pass, or
the caller's own time was up.

Formats: platform.openai.com/docs/guides/error-codes and docs.anthropic.com/en/api/errors, read in
2026.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Final

import httpx

from asyncbucket.core.errors import (
    AcquireTimeout,
    AsyncBucketError,
    CostExceedsLimit,
    StoreError,
    UnknownPrice,
)
from asyncbucket.proxy.headers import Headers

#: Type and code at OpenAI, and type at Anthropic, by status.
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


class CallerError(Exception):
    """Say what is wrong with a call; it never reaches the provider."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """Say no to a caller.

    Attributes:
        status: the HTTP status, one of those above.
        message: what, the numbers and the remedy; no key and nothing of a prompt.
        retry_after: seconds until another attempt may pass, if that is known.
        retry: whether another attempt makes sense.
        bound_by: the resource that binds, if one does.
    """

    status: int
    message: str
    retry_after: float | None = None
    retry: bool = True
    bound_by: str | None = None

    @classmethod
    def of(cls, error: Exception) -> "ErrorReply":
        """Return how to report an error of a caller, of the limiter, or on the way to the provider."""
        if isinstance(error, CallerError):
            return cls(status=error.status, message=str(error), retry=False)
        if isinstance(error, StoreError):
            return cls(status=503, message=str(error), retry_after=_SOON)
        if isinstance(error, AsyncBucketError):
            retry = not isinstance(error, CostExceedsLimit | AcquireTimeout | UnknownPrice)
            seconds: float | None = getattr(error, "retry_after", None)
            return cls(
                status=429,
                message=str(error),
                retry_after=_SOON if seconds is None and retry else seconds,
                retry=retry,
                bound_by=getattr(error, "bound_by", None),
            )
        # What else an HTTP client's error says may hold the value of a header.
        kind, late = type(error).__name__, isinstance(error, httpx.TimeoutException)
        what = "did not answer in time" if late else "cannot be reached"
        return cls(status=504 if late else 502, message=f"the provider {what} ({kind})")

    def encoded(self, *, anthropic: bool) -> tuple[Headers, bytes]:
        """Return headers and body, in Anthropic's format or in OpenAI's."""
        kind, code, anthropic_kind = _TYPES[self.status]
        if anthropic:
            error: dict[str, Any] = {"type": anthropic_kind, "message": self.message}
            body = {"type": "error", "error": error, "request_id": None}
        else:
            if self.bound_by is not None and self.bound_by.endswith("tokens"):
                kind = "tokens"
            body = {"error": {"message": self.message, "type": kind, "param": None, "code": code}}
        content = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ]
        if not self.retry:
            headers.append((b"x-should-retry", b"false"))  # OpenAI's and Anthropic's SDKs obey it
        if self.retry_after is not None and math.isfinite(self.retry_after):
            headers += [
                (b"retry-after", str(math.ceil(self.retry_after)).encode()),
                (b"retry-after-ms", str(math.ceil(self.retry_after * 1_000)).encode()),
            ]
        return headers, content
