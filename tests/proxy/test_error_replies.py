"""What callers are told when something goes wrong, in the formats of three providers."""

import json
from typing import Any

import httpx
import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, QueueFull, StoreError, UnknownPrice
from asyncbucket.proxy.error_replies import ProxyError, error_response, protocol_of


def scope(path: str, *headers: bytes) -> dict[str, Any]:
    return {"path": path, "headers": [(name, b"x") for name in headers]}


CALLERS = (
    scope("/v1/chat/completions"),
    scope("/v1/messages"),
    scope("/v1beta/models/gemini:generateContent"),
)


@pytest.mark.parametrize(
    ("error", "status", "types", "after"),
    [
        (
            QueueFull("full", bound_by="tokens"),
            429,
            ("tokens", "rate_limit_error", "RESOURCE_EXHAUSTED"),
            1,
        ),
        (
            QueueFull("full", retry_after=2.1),
            429,
            ("requests", "rate_limit_error", "RESOURCE_EXHAUSTED"),
            3,
        ),
        # The caller's own time is up, or it can never pass: nobody is to try again.
        (
            AcquireTimeout("late", retry_after=2.1),
            429,
            ("requests", "rate_limit_error", "RESOURCE_EXHAUSTED"),
            3,
        ),
        (
            CostExceedsLimit("much"),
            429,
            ("requests", "rate_limit_error", "RESOURCE_EXHAUSTED"),
            None,
        ),
        (UnknownPrice("?"), 429, ("requests", "rate_limit_error", "RESOURCE_EXHAUSTED"), None),
        (StoreError("gone"), 503, ("server_error", "overloaded_error", "UNAVAILABLE"), 1),
        (httpx.ConnectError("sk-x"), 502, ("server_error", "api_error", "UNAVAILABLE"), None),
        (
            httpx.ReadTimeout("sk-x"),
            504,
            ("server_error", "timeout_error", "DEADLINE_EXCEEDED"),
            None,
        ),
        (ProxyError("so"), 400, (*["invalid_request_error"] * 2, "INVALID_ARGUMENT"), None),
    ],
)
def test_error_has_the_providers_format_and_no_key(
    error: Exception, status: int, types: tuple[str, ...], after: int | None
) -> None:
    replies = [error_response(error, caller) for caller in CALLERS]
    openai, anthropic, google = (json.loads(bytes(reply.body))["error"] for reply in replies)

    assert {reply.status_code for reply in replies} == {status}
    assert (openai["type"], anthropic["type"], google["status"]) == types
    assert google["code"] == status
    assert [each["retryDelay"] for each in google["details"]] == ([f"{after}s"] if after else [])
    may_retry = isinstance(error, QueueFull | StoreError | httpx.HTTPError)
    for reply in replies:
        assert reply.headers.get("x-should-retry") == (None if may_retry else "false")
        assert reply.headers.get("retry-after") == (str(after) if after else None)
        assert b"sk-" not in bytes(reply.body)


@pytest.mark.parametrize(
    ("caller", "protocol"),
    [
        (scope("/x", b"anthropic-version"), "anthropic"),
        (scope("/x", b"x-goog-api-key"), "google"),
        (scope("/v1beta/openai/chat/completions"), "openai"),
        (scope("/v1/projects/p/locations/l/publishers/google/models/m:rawPredict"), "google"),
        (scope("/v1/models/ft:gpt-4o-mini:acme::id"), "openai"),
        (scope("/model/anthropic.claude-v2:1/converse"), "openai"),
    ],
)
def test_protocol_is_told_by_headers_and_path(caller: dict[str, Any], protocol: str) -> None:
    assert protocol_of(caller) == protocol
