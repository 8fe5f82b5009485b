"""Paced by its profile, a call is never refused by the provider's own rule, and little is left unused."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from asyncbucket import Limiter, deadline
from asyncbucket.engine.terms import Concurrency
from asyncbucket.providers.errors import judge_reply
from asyncbucket.providers.usage import Usage, usage_of
from asyncbucket.testing import RateLimitedProvider, VirtualTime, virtual_time
from asyncbucket.testing.enforcer import RULES

pytest.importorskip("stamina", reason="transports retry by it")

KEY = {"authorization": "Bearer any"}
#: Two minutes of calls, and a few more.
CALLS = 130
#: Tokens of a question, of a reply, and the most that a reply may have.
GIVEN, RECEIVED, MOST = 50, 60, 100

Body = Callable[[str], dict[str, Any]]


def openai_body(text: str) -> dict[str, Any]:
    return {"model": "m", "max_tokens": MOST, "messages": [{"role": "user", "content": text}]}


def gemini_body(text: str) -> dict[str, Any]:
    turn = {"role": "user", "parts": [{"text": text}]}
    return {"contents": [turn], "generationConfig": {"maxOutputTokens": MOST}}


@dataclass(frozen=True)
class Load:
    """What a provider allows, what its user tells the limiter, and what is sent."""

    allows: dict[str, Any]
    says: tuple[str, ...]
    path: str = "/v1/chat/completions"
    body: Body = openai_body
    concurrency: Concurrency | None = None


INVOKE = "/model/us.anthropic.claude-sonnet-4-5-20250929-v1:0/invoke"
GEMINI = "/v1beta/models/gemini-3-flash:generateContent"
BY_USE = Load({"tpm": 60 * (GIVEN + RECEIVED)}, ("6600 TPM",))
BY_SECOND = Load({"rpm": 60, "tpm": 20_000}, ("1 RPS", "20k TPM"))
BY_MINUTE = Load({"rpm": 60}, ("60 RPM",))
BY_OUTPUT = Load({"otpm": 60 * RECEIVED, "itpm": 9_000}, ("3600 OTPM", "9k ITPM"))
#: Each allows sixty such calls a minute.
LOADS: dict[str, Load] = {
    "openai": Load({"tpm": 60 * MOST}, ("6k TPM",)),
    "azure": BY_SECOND,
    "anthropic": Load(BY_OUTPUT.allows, BY_OUTPUT.says, "/v1/messages"),
    "groq": BY_USE,
    "bedrock": Load({"tpm": 60 * (GIVEN + 5 * RECEIVED)}, ("21k TPM",), INVOKE),
    "cerebras": BY_USE,
    "gemini": Load({"tpm": 60 * GIVEN}, ("3k TPM",), GEMINI, gemini_body),
    "mistral": BY_SECOND,
    "openrouter": BY_MINUTE,
    "cohere": BY_MINUTE,
    "xai": BY_SECOND,
    "together": BY_SECOND,
    "fireworks": BY_OUTPUT,
    "deepseek": Load({"concurrency": 1}, (), concurrency=1),
}


def play(name: str, load: Load) -> tuple[RateLimitedProvider, httpx.Headers]:
    """Send all calls at once, through a transport with this profile; return the last reply's headers."""
    with virtual_time() as time:
        provider = RateLimitedProvider(
            profile=name, reply_tokens=RECEIVED, latency=1.0, clock=time.clock, **load.allows
        )
        limiter = Limiter(*load.says, concurrency=load.concurrency, clock=time.clock)
        transport = limiter.transport(provider.mock_transport(), profile=name)

        async def main() -> httpx.Headers:
            async with httpx.AsyncClient(transport=transport, headers=KEY) as client:
                ask = client.post
                calls = (
                    ask(f"http://provider{load.path}", json=load.body(f"{number:0200}"))
                    for number in range(CALLS)
                )
                replies = await asyncio.gather(*calls)
            assert {reply.status_code for reply in replies} == {200}
            return replies[-1].headers

        return provider, time.run(main())


@pytest.mark.parametrize("name", LOADS)
def test_nothing_is_refused_and_95_percent_of_the_limit_is_used(name: str) -> None:
    allows = LOADS[name].allows
    provider, _ = play(name, LOADS[name])

    assert provider.statistics().refused == 0
    if allows.keys() == {"tpm"}:  # what the provider has charged in the end
        assert provider.statistics().tokens == CALLS * allows["tpm"] // 60
    first = provider.arrivals[0].time_ns
    seconds = [(arrival.time_ns - first) * 1e-9 for arrival in provider.arrivals]
    # A bucket holds a minute's worth more, which passes at once as soon as replies have proven it.
    assert sum(second < 120 for second in seconds) >= 60 + 57


def test_azures_limit_of_ten_seconds_is_taken_for_none_of_a_minute() -> None:
    """A deployment of 120 a minute announces 20: it takes a minute, not six."""
    provider, headers = play("azure", Load({"rpm": 120}, ("120 RPM",)))

    assert headers["x-ratelimit-limit-requests"] == "20"
    assert provider.arrivals[-1].time_ns - provider.arrivals[0].time_ns < 100_000_000_000
    assert provider.statistics().refused <= 3  # what shows that there are slices


def test_capacity_that_nobody_publishes_is_found() -> None:
    """Vertex shares it dynamically: the first refusals say how much there is."""
    load = Load({"concurrency": 8}, (), GEMINI, gemini_body, "auto")
    seen = play("vertex", load)[0].statistics()

    assert seen.admitted == CALLS
    assert seen.refused < CALLS // 8


def test_each_emulated_provider_is_tested_and_names_its_source() -> None:
    assert RULES.keys() == {*LOADS, "vertex"}
    assert all("." in rules.source for rules in RULES.values())


@pytest.mark.parametrize("name", RULES)
async def test_refusal_says_what_the_provider_says(name: str) -> None:
    """In the provider's own words, which are understood: it is for rate, and for how long if it says."""
    rules = RULES[name]
    provider = RateLimitedProvider(profile=name, rpm=1, policy="sliding_window")
    async with httpx.AsyncClient(transport=provider.mock_transport(), headers=KEY) as client:
        await client.post("http://p/v1/chat/completions", json=openai_body("Why?"))
        reply = await client.post("http://p/v1/chat/completions", json=openai_body("Why?"))
    verdict = judge_reply(reply.status_code, reply.json(), reply.headers)

    assert verdict.pause == "429"
    assert (verdict.retry_after is not None) is bool(rules.waits or rules.refusal)
    assert rules.refusal_headers.keys() <= reply.headers.keys()
    told = {header.format(part=part) for header in rules.headers.values() for part in rules.parts}
    sent = {header for header in reply.headers if "limit" in header} - {"x-ratelimit-reset"}
    assert sent <= told | {"x-trial-endpoint-call-remaining"}


@pytest.mark.parametrize(("path", "body"), [(GEMINI, gemini_body), (INVOKE, openai_body)])
async def test_native_formats_report_their_usage(path: str, body: Body) -> None:
    provider = RateLimitedProvider(reply_tokens=2 * MOST)
    async with httpx.AsyncClient(transport=provider.mock_transport(), headers=KEY) as client:
        reply = await client.post(f"http://p{path}", json=body(f"{0:0200}"))

    assert usage_of(reply.json()) == Usage(GIVEN, MOST, GIVEN + MOST)


async def test_used_up_day_is_noticed_once(virtual_time: VirtualTime) -> None:
    """The call that meets it gets the refusal; those behind wait no longer than they may."""
    clock = virtual_time.clock
    provider = RateLimitedProvider(profile="gemini", rpd=3, clock=clock)
    limiter = Limiter("600 RPM", concurrency=1, clock=clock)
    transport = limiter.transport(provider.mock_transport(), profile="gemini")
    client = httpx.AsyncClient(transport=transport, headers=KEY)

    async def call() -> int:
        with deadline(60):
            reply = await client.post(f"http://p{GEMINI}", json=gemini_body("Why?"))
        return reply.status_code

    ends = await asyncio.gather(*(call() for _ in range(6)), return_exceptions=True)
    assert ends[:4] == [200, 200, 200, 429]
    assert all("more (daily quota); raise the timeout" in str(end) for end in ends[4:])
    assert provider.statistics().requests == 4
