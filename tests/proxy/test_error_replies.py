"""What callers are told when something goes wrong, in the formats of two providers."""

import json

import httpx
import pytest

from asyncbucket import QueueFull, StoreError, UnknownPrice
from asyncbucket.proxy.error_replies import ProxyError, error_response


@pytest.mark.parametrize(
    ("error", "status", "ours", "theirs", "after"),
    [
        (QueueFull("full", bound_by="tokens"), 429, "tokens", "rate_limit_error", "1"),
        (QueueFull("full", retry_after=2.1), 429, "requests", "rate_limit_error", "3"),
        (UnknownPrice("what?"), 429, "requests", "rate_limit_error", None),
        (StoreError("gone"), 503, "server_error", "overloaded_error", "1"),
        (httpx.ConnectError("Bearer sk-x"), 502, "server_error", "api_error", None),
        (httpx.ReadTimeout("Bearer sk-x"), 504, "server_error", "timeout_error", None),
        (ProxyError("so"), 400, "invalid_request_error", "invalid_request_error", None),
    ],
)
def test_error_has_the_providers_format_and_no_key(
    error: Exception, status: int, ours: str, theirs: str, after: str | None
) -> None:
    ours_told = error_response(error, {"path": "/v1/chat/completions", "headers": []})
    theirs_told = error_response(error, {"path": "/v1/messages", "headers": []})

    assert ours_told.status_code == theirs_told.status_code == status
    assert json.loads(bytes(ours_told.body))["error"]["type"] == ours
    assert json.loads(bytes(theirs_told.body))["error"]["type"] == theirs
    assert ours_told.headers.get("retry-after") == after
    assert b"sk-" not in bytes(ours_told.body) + bytes(theirs_told.body)
