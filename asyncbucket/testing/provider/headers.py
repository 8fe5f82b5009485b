"""What the provider says about its limits: headers on every reply, and the bodies of errors."""

from collections.abc import Sequence
from typing import TypeAlias

from asyncbucket.testing.provider.admission import Refusal
from asyncbucket.testing.provider.settings import Failure
from asyncbucket.testing.provider.wire import encode

Headers: TypeAlias = list[tuple[bytes, bytes]]

MILLISECOND = 1_000_000
SECOND = 1_000_000_000

_QUOTA = (
    "You exceeded your current quota, please check your plan and billing details.",
    "insufficient_quota",
)
_ERROR_TYPES = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "unknown_url"),
    429: ("requests", "rate_limit_exceeded"),
    503: ("server_error", "overloaded"),
}
_UNITS = {
    "requests": "requests per min (RPM)",
    "tokens": "tokens per min (TPM)",
    "concurrency": "concurrent requests",
}


def go_duration(nanoseconds: int) -> str:
    """Return a duration in Go's format, in whole milliseconds rounded up: 120ms, 1s, 8.64s, 6m0s."""
    milliseconds = -(-nanoseconds // MILLISECOND)
    if milliseconds < 1000:  # noqa: PLR2004 - a second
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest / 1000:g}s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds


def limit_headers(budget: Sequence[tuple[str, int, int, int]]) -> Headers:
    """Return `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` for the limits that are set."""
    headers: Headers = []
    for name, limit, remaining, reset in budget:
        for part, value in (
            ("limit", str(limit)),
            ("remaining", str(remaining)),
            ("reset", go_duration(reset)),
        ):
            headers.append((f"x-ratelimit-{part}-{name}".encode(), value.encode()))
    return headers


def retry_headers(nanoseconds: int | None) -> Headers:
    """Return `retry-after` (whole seconds, rounded up) and `retry-after-ms`; nothing for None."""
    if nanoseconds is None:
        return []
    return [
        (b"retry-after", b"%d" % -(-nanoseconds // SECOND)),
        (b"retry-after-ms", b"%d" % -(-nanoseconds // MILLISECOND)),
    ]


def error_body(
    status: int,
    message: str,
    *,
    error_type: str | None = None,
    code: str | None = None,
    parameter: str | None = None,
) -> bytes:
    """Return an error in OpenAI's format; `error_type` and `code` default to those of the status."""
    usual_type, usual_code = _ERROR_TYPES.get(status, ("server_error", None))
    return encode(
        {
            "error": {
                "message": message,
                "type": error_type or usual_type,
                "param": parameter,
                "code": code or usual_code,
            }
        }
    )


def refusal_reply(refusal: Refusal, model: str) -> tuple[bytes, Headers]:
    """Return body and headers of a 429 for rate."""
    numbers = f"Limit {refusal.limit}, Used {refusal.used}, Requested {refusal.requested}."
    units = _UNITS[refusal.reason]
    if refusal.wait is not None:
        advice = f"Please try again in {go_duration(refusal.wait)}."
    elif refusal.reason == "concurrency":
        advice = "Please try again when one of them is done."
    else:
        advice = "It is larger than the limit and can never pass."
    message = f"Rate limit reached for {model} on {units}: {numbers} {advice}"
    error_type = "tokens" if refusal.reason == "tokens" else "requests"
    return error_body(429, message, error_type=error_type), retry_headers(refusal.wait)


def failure_reply(failure: Failure) -> tuple[bytes, Headers]:
    """Return body and headers of a failure that was scripted or drawn."""
    after = failure.retry_after
    headers = retry_headers(None if after is None else round(after * SECOND))
    if failure.code == "insufficient_quota":
        message, error_type = _QUOTA
        return error_body(failure.status, message, error_type=error_type, code=error_type), headers
    message = f"The provider was told to answer with {failure.status}."
    return error_body(failure.status, message, code=failure.code), headers
