"""On which terms callers wait, and what they are told when something goes wrong."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, QueueFull, StoreError, UnknownPrice
from asyncbucket.cli.proxy.callers import CallerTerms, ProxyError, error_response, protocol_of
from asyncbucket.engine.context import inherited
from asyncbucket.testing import VirtualTime


def inherited_by(terms: CallerTerms, *, by_key: bool = False, **headers: str) -> Any:
    """Return what a call with these headers inherits."""
    named = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    with terms.applied(named, tenants_by_key=by_key):
        return inherited.get()


async def test_headers_say_what_a_call_inherits() -> None:
    found = inherited_by(
        CallerTerms(),
        asyncbucket_tenant="acme",
        asyncbucket_priority="batch",
        asyncbucket_agent="research/a17",
        asyncbucket_timeout="30",
    )
    assert (found.tenant, found.priority) == ("acme", -1)
    assert (found.payers[0].name, found.payers[0].kind) == ("a17", "research")
    assert 29 < found.seconds_left() <= 30
    assert inherited.get() is None


def test_priority_is_normal_or_below_and_in_plain_digits() -> None:
    for urgent in "interactive", "7":
        with pytest.raises(ProxyError, match="normal and below; start the proxy with --trust-prio"):
            inherited_by(CallerTerms(), asyncbucket_priority=urgent)
        trusted = CallerTerms().applied(
            [(b"asyncbucket-priority", urgent.encode())], tenants_by_key=False, trust_priority=True
        )
        with trusted:
            assert inherited.get() is not None
    with pytest.raises(ProxyError, match="priority must be"):
        inherited_by(CallerTerms(), asyncbucket_priority="\u0661")


async def test_agent_is_over_after_a_minute_without_a_call(virtual_time: VirtualTime) -> None:
    def agent_of(terms: CallerTerms, tenant: str = "acme") -> Any:
        return inherited_by(terms, asyncbucket_agent="a17", asyncbucket_tenant=tenant).payers[0]

    terms = CallerTerms()
    first = agent_of(terms)
    await asyncio.sleep(59)
    assert agent_of(terms) is first
    assert agent_of(terms, "other") is not first
    await asyncio.sleep(59)
    assert not first.is_over
    await asyncio.sleep(1)
    assert (first.is_over, virtual_time.now) == (True, 119)

    with terms.applied([(b"asyncbucket-agent", b"a17")], tenants_by_key=False):
        found: Any = inherited.get()
        assert found.payers[0] is not first
        await asyncio.sleep(3_600)  # an agent with an open call is not over
        assert not found.payers[0].is_over


async def test_callers_cannot_make_up_any_number_of_kinds() -> None:
    """Each is a label of metrics, for good."""
    terms = CallerTerms()
    kinds = [inherited_by(terms, asyncbucket_agent=f"k{n}/a").payers[0].kind for n in range(150)]
    assert kinds == [f"k{number}" for number in range(100)] + [None] * 50
    assert inherited_by(terms, asyncbucket_agent="k99/b").payers[0].kind == "k99"


def test_tenant_of_a_key_is_the_same_for_each_of_its_calls_and_is_not_the_key() -> None:
    terms = CallerTerms()
    seen = [
        inherited_by(terms, by_key=True, **{header: key}).tenant
        for header, key in [
            *(("authorization", "Bearer sk-one"), ("x_api_key", "sk-one")),
            ("authorization", "Bearer sk-two"),
        ]
    ]
    assert seen[0] == seen[1] != seen[2]
    assert "sk-one" not in str(seen)
    elsewhere = inherited_by(CallerTerms(), by_key=True, authorization="Bearer sk-one")
    assert elsewhere.tenant != seen[0]


def scope(path: str, *headers: bytes) -> dict[str, Any]:
    return {"path": path, "headers": [(name, b"x") for name in headers]}


PATHS = ("/v1/chat/completions", "/v1/messages", "/v1beta/models/gemini:generateContent")
CALLERS = [scope(path) for path in PATHS]
TYPES = {
    400: ("invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT"),
    429: ("requests", "rate_limit_error", "RESOURCE_EXHAUSTED"),
    502: ("server_error", "api_error", "UNAVAILABLE"),
    503: ("server_error", "overloaded_error", "UNAVAILABLE"),
    504: ("server_error", "timeout_error", "DEADLINE_EXCEEDED"),
}


@pytest.mark.parametrize(
    ("error", "status", "after", "may_retry"),
    [
        (QueueFull("full"), 429, 1, True),
        (QueueFull("full", retry_after=2.1), 429, 3, True),
        # The caller's own time is up, or it can never pass: nobody is to try again.
        (AcquireTimeout("late", retry_after=2.1), 429, 3, False),
        (CostExceedsLimit("much"), 429, None, False),
        (UnknownPrice("?"), 429, None, False),
        (StoreError("gone"), 503, 1, True),
        (httpx.ConnectError("sk-x"), 502, None, True),
        (httpx.ReadTimeout("sk-x"), 504, None, True),
        (ProxyError("so"), 400, None, False),
    ],
)
def test_error_has_the_providers_format(
    error: Exception, status: int, after: int | None, *, may_retry: bool
) -> None:
    replies = [error_response(error, caller) for caller in CALLERS]
    openai, anthropic, google = (json.loads(bytes(reply.body))["error"] for reply in replies)
    assert {reply.status_code for reply in replies} == {status}
    assert (openai["type"], anthropic["type"], google["status"]) == TYPES[status]
    assert google["code"] == status
    assert [each["retryDelay"] for each in google["details"]] == ([f"{after}s"] if after else [])
    for reply in replies:
        assert reply.headers.get("x-should-retry") == (None if may_retry else "false")
        assert reply.headers.get("retry-after") == (str(after) if after else None)
        assert b"sk-" not in bytes(reply.body)


def test_openais_error_tells_tokens_from_requests() -> None:
    reply = error_response(QueueFull("full", bound_by="input_tokens"), CALLERS[0])
    assert json.loads(bytes(reply.body))["error"]["type"] == "tokens"


@pytest.mark.parametrize(
    ("caller", "protocol"),
    [
        (scope("/x", b"anthropic-version"), "anthropic"),
        (scope("/v1beta/openai/chat/completions"), "openai"),
        (scope("/v1/projects/p/locations/l/publishers/google/models/m:rawPredict"), "google"),
        (scope("/v1/models/ft:gpt-4o-mini:acme::id"), "openai"),
        (scope("/model/anthropic.claude-v2:1/converse"), "openai"),
    ],
)
def test_protocol_is_told_by_headers_and_path(caller: dict[str, Any], protocol: str) -> None:
    assert protocol_of(caller) == protocol
