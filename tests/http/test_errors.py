"""Errors are judged by their shape, whichever library they come from."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, QueueFull
from asyncbucket.providers.errors import Verdict, classify

REQUEST = httpx.Request("POST", "http://provider.test/v1/chat/completions")


def status_error(status: int, code: str | None = None, **headers: str) -> Exception:
    raw = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    response = httpx.Response(status, headers=raw, request=REQUEST)
    body = {"code": code, "type": "requests"}
    return openai.APIStatusError("no", response=response, body=body)


def with_attributes(**attributes: Any) -> Exception:
    error = RuntimeError("no")
    vars(error).update(attributes)
    return error


def caused_by(cause: Exception) -> Exception:
    error = openai.APIConnectionError(request=REQUEST)
    error.__cause__ = cause
    return error


def event(body: Any) -> Exception:
    """Return an error event in a stream, whose status was 200."""
    return openai.APIError("no", REQUEST, body=body)


HEADERS_2 = httpx.Headers({"Retry-After": "2"})
RESPONSE_503 = httpx.Response(503, headers=HEADERS_2, request=REQUEST)
RATE = {"pause": "429", "overloaded": True}
BUSY = {"overloaded": True}
BUSY_FOR_ALL = {"overloaded": True, "pause": "overload"}
BUSY_FOR_2 = {**BUSY_FOR_ALL, "retry_after": 2.0}
SPENT = {"error_code": "enforced_spend_limit_reached"}
SPENT_LIMIT = {"type": "error", "error": {"type": "rate_limit_error", "details": SPENT}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error"}}
UNAVAILABLE = {"status": "UNAVAILABLE", "details": {"error": {"code": 503}}}


@pytest.mark.parametrize(
    ("error", "reason", "more"),
    [
        *((status_error(status), f"HTTP {status} (requests)", {}) for status in (409, 500, 502)),
        *((status_error(status), f"HTTP {status} (requests)", BUSY) for status in (408, 503, 504)),
        (with_attributes(status=529, body=OVERLOADED), "HTTP 529 (overloaded_error)", BUSY_FOR_ALL),
        # A wait of 0 names none: the call is retried after a back-off.
        (with_attributes(status=500, headers={"retry-after": "0"}), "HTTP 500", {}),
        (
            status_error(429, "rate_limit_exceeded", retry_after="7"),
            "HTTP 429 (rate_limit_exceeded)",
            {**RATE, "retry_after": 7.0},
        ),
        # Flex capacity: others go on, and this call is tried again.
        (status_error(429, "resource_unavailable"), "HTTP 429 (requests)", BUSY),
        (with_attributes(status_code=498), "HTTP 498", BUSY),
        # OpenRouter's budget for calls in flight.
        (status_error(402, "402", retry_after="3"), "HTTP 402 (402)", {**BUSY, "retry_after": 3.0}),
        # google-genai's
        (with_attributes(code=503, **UNAVAILABLE), "HTTP 503 (unavailable)", BUSY),
        (with_attributes(status=503, headers=HEADERS_2), "HTTP 503", BUSY_FOR_2),
        (with_attributes(response=RESPONSE_503), "HTTP 503", BUSY_FOR_2),
        (event({"code": "rate_limit_exceeded"}), "rate_limit_exceeded", RATE),
        (event({"error": {"type": "overloaded_error"}}), "overloaded_error", BUSY),
        (event({"error": {"type": "api_error"}}), "api_error", {}),
        (openai.APITimeoutError(request=REQUEST), "APITimeoutError", BUSY),
        (httpx.ConnectError("refused"), "ConnectError", {}),
        (httpx.ReadTimeout("slow"), "ReadTimeout", BUSY),
        (ConnectionResetError(), "ConnectionResetError", {}),
        (TimeoutError(), "TimeoutError", BUSY),
        # What is quoted from a reply is one word, or nothing: reasons are logged.
        (with_attributes(status=500, body={"code": "key sk-secret\n"}), "HTTP 500", {}),
        (with_attributes(status=500, body={"type": "x" * 65}), "HTTP 500", {}),
    ],
)
def test_temporary_error_means_what_its_status_code_or_class_says(
    error: Exception, reason: str, more: dict[str, Any]
) -> None:
    verdict = Verdict(retry=True, reason=reason, **more)
    assert replace(classify(error), member_failed=False) == verdict


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (status_error(429, "insufficient_quota"), "insufficient_quota"),
        (with_attributes(status_code=429, body=SPENT_LIMIT), "enforced_spend_limit_reached"),
    ],
)
def test_exhausted_account_is_for_good(error: Exception, code: str) -> None:
    verdict = Verdict(retry=False, reason=f"HTTP 429 ({code})", member_failed=True, exhausted=True)
    assert classify(error) == verdict


def test_member_of_a_pool_fails_by_its_key_its_account_or_its_server_but_not_by_its_calls() -> None:
    failures = [
        *(status_error(status) for status in (401, 402, 403, 500, 503, 529)),
        status_error(404, "DeploymentNotFound"),
        *(caused_by(httpx.ConnectTimeout("slow")), ConnectionRefusedError()),
    ]
    others = [
        *(status_error(status) for status in (400, 404, 408, 409, 422, 429)),
        status_error(500, x_should_retry="false"),  # the provider says that it is this call
        # It may have been sent, or the connections here are used up, or the caller is wrong.
        *(caused_by(httpx.ReadTimeout("no")), httpx.PoolTimeout("no")),
        *(httpx.UnsupportedProtocol("no"), caused_by(QueueFull("ours"))),
    ]
    assert all(classify(error).member_failed for error in failures)
    assert not any(classify(error).member_failed for error in others)


@pytest.mark.parametrize(
    "error",
    [
        *(status_error(status, retry_after="1") for status in (400, 401, 403, 404, 413, 422)),
        status_error(402),  # without a wait, there is no money
        status_error(429, x_should_retry="false"),
        status_error(400, x_should_retry="true"),
        event({"code": "invalid_prompt"}),
        # The SDK takes any error of a transport for a lost connection.
        *map(caused_by, (httpx.UnsupportedProtocol("no scheme"), CostExceedsLimit("ours"))),
        caused_by(caused_by(QueueFull("ours"))),
        *(ValueError("yours"), FileNotFoundError(), RuntimeError(), AcquireTimeout("ours")),
        *(asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(500), GeneratorExit()),
    ],
)
def test_errors_of_callers_limiters_and_exits_are_final(error: BaseException) -> None:
    assert not classify(error).retry


def test_call_that_fails_while_another_ones_refusal_is_handled_is_retried() -> None:
    error = status_error(503)
    error.__context__ = AcquireTimeout("of the model that was asked first")
    assert classify(error).retry


def test_circular_causes_are_followed_once() -> None:
    error = caused_by(httpx.ConnectError("refused"))
    assert error.__cause__ is not None
    error.__cause__.__cause__ = error
    assert classify(error).retry


def test_botocore_errors_are_judged_by_status_or_code() -> None:
    errors = pytest.importorskip("botocore.exceptions")

    def answered(status: int, code: str) -> Verdict:
        reply = {"HTTPStatusCode": status, "HTTPHeaders": {"retry-after": "3"}}
        response = {"Error": {"Code": code}, "ResponseMetadata": reply}
        return classify(errors.ClientError(response, "Converse"))

    reason = "HTTP 429 (throttlingexception)"
    throttled = Verdict(retry=True, reason=reason, retry_after=3.0, pause="429", overloaded=True)
    assert answered(429, "ThrottlingException") == throttled
    assert not answered(400, "ValidationException").retry
    broken = errors.EventStreamError({"Error": {"Code": "throttlingException"}}, "ConverseStream")
    assert classify(broken).rate_limited
    assert classify(errors.ConnectionClosedError(endpoint_url="https://bedrock.test")).retry
