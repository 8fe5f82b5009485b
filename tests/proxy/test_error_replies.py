"""What callers are told when something goes wrong, in the formats of two providers."""

import json

import httpx
import pytest

from asyncbucket import QueueFull, StoreError, UnknownPrice
from asyncbucket.proxy.error_replies import CallerError, ErrorReply


@pytest.mark.parametrize(
    ("error", "status", "ours", "theirs", "after"),
    [
        (QueueFull("full", bound_by="tokens"), 429, "tokens", "rate_limit_error", b"1"),
        (QueueFull("full", retry_after=2.1), 429, "requests", "rate_limit_error", b"3"),
        (UnknownPrice("what?"), 429, "requests", "rate_limit_error", None),
        (StoreError("gone"), 503, "server_error", "overloaded_error", b"1"),
        (httpx.ConnectError("Bearer sk-x"), 502, "server_error", "api_error", None),
        (httpx.ReadTimeout("Bearer sk-x"), 504, "server_error", "timeout_error", None),
        (CallerError("so"), 400, "invalid_request_error", "invalid_request_error", None),
    ],
)
def test_error_has_the_providers_format_and_no_key(
    error: Exception, status: int, ours: str, theirs: str, after: bytes | None
) -> None:
    reply = ErrorReply.of(error)
    headers, content = reply.encoded(anthropic=False)
    _, other = reply.encoded(anthropic=True)

    assert reply.status == status
    assert json.loads(content)["error"]["type"] == ours
    assert json.loads(other)["error"]["type"] == theirs
    assert dict(headers).get(b"retry-after") == after
    assert b"sk-" not in content + other
