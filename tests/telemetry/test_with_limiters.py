"""Real limiters and agents, and a provider that counts for itself."""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from llama_index.llms.openai import OpenAI
from prometheus_client import CollectorRegistry, generate_latest

from asyncbucket import (
    AcquireTimeout,
    BudgetExceeded,
    CostExceedsLimit,
    Limiter,
    Pool,
    QueueFull,
    WouldBlock,
    budget,
    telemetry,
)
from asyncbucket.telemetry import report
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from tests.telemetry.conftest import Telemetry, scrape

if TYPE_CHECKING:
    from asyncbucket.engine.events import Event

#: What must never be shown: a key, a prompt, the password of a URL, the name of a tenant.
CANARIES = ("sk-canary-key", "canary-prompt", "canary-password", "canary-tenant")


def model(provider: RateLimitedProvider, client: httpx.AsyncClient, **options: Any) -> OpenAI:
    options |= {"api_base": provider.base_url, "async_http_client": client}
    return OpenAI(model="gpt-4o-mini", **options)


async def test_counters_match_what_the_provider_saw(registry: CollectorRegistry) -> None:
    """They agree to the call and the token, with refusals and retries.

    This uses the machine's clock: the provider is a server.
    """
    async with (
        RateLimitedProvider(latency=0.01, charge="usage", reply_tokens=40) as provider,
        httpx.AsyncClient() as client,
    ):
        limiter = Limiter("6k RPM burst 6k", "600k TPM", concurrency=8, name="openai")
        telemetry.prometheus(limiter, registry=registry)
        chat = limiter.child("chat").wrap(model(provider, client, api_key="any", max_tokens=50))
        provider.fail_next(2, status=429, retry_after=0.05)
        await asyncio.gather(*(chat.acomplete(f"What is {n} plus 1?") for n in range(20)))
        await asyncio.sleep(0)
        saw, seen, ours = provider.statistics(), scrape(registry), limiter.statistics()
    outcomes = ("ok", "overloaded", "failed")
    ended = {each: seen["requests_total", "openai/chat", each] for each in outcomes}
    assert ended == {"ok": saw.admitted, "overloaded": saw.refused, "failed": 0}
    assert sum(ended.values()) == saw.requests == ours.admitted == 22
    assert seen["tokens_total", "used", "openai/chat"] == saw.tokens > 20 * 40
    assert seen["tokens_total", "refunded", "openai/chat"] == ours.refunded["tokens"]
    assert seen["upstream_429_total", "openai"] == seen["retries_total", "openai"] == saw.refused
    waits = [n for key, n in seen.items() if key[::2] == ("wait_seconds_count", "openai")]
    assert sum(waits) == saw.requests
    assert seen["in_flight_requests", "openai"] == seen["queued_requests", "openai"] == 0


async def test_each_outcome_counts(virtual_time: VirtualTime, registry: CollectorRegistry) -> None:
    limiter = Limiter("100 TPM", concurrency=1, max_queue=2, clock=virtual_time.clock, name="mine")
    telemetry.prometheus(limiter, registry=registry)
    lease = await limiter.acquire(tokens=10)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=10))
    late = asyncio.ensure_future(limiter.acquire(tokens=10, timeout=1))
    await asyncio.sleep(0)
    assert scrape(registry)["queued_requests", "mine"] == 2
    with pytest.raises(QueueFull):
        await limiter.acquire(tokens=10)
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait(tokens=10)
    with pytest.raises(CostExceedsLimit):
        await limiter.acquire(tokens=101)
    with budget(tokens=9), pytest.raises(BudgetExceeded):
        await limiter.acquire(tokens=10)
    with pytest.raises(AcquireTimeout):
        await late
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for used in 4, 6, 5:
        lease.settle(requests=2, tokens=used)
    assert scrape(registry)["limit_used_ratio", "tpm", "mine"] == 0.05
    lease.release()
    with pytest.raises(RuntimeError, match="broken"):
        async with limiter.acquire(tokens=10):
            raise RuntimeError("broken")
    (await limiter.acquire(requests=2)).overloaded()
    seen = scrape(registry)
    outcomes = "ok failed overloaded cancelled timeout queue_full would_block budget too_costly"
    counted = {key[2]: count for key, count in seen.items() if key[0].endswith("requests_total")}
    assert counted == dict.fromkeys(outcomes.split(), 1)
    assert seen["tokens_total", "reserved", "mine"] == 20
    assert seen["tokens_total", "used", "mine"] == 6  # a counter never falls
    assert seen["tokens_total", "refunded", "mine"] == 6 + 1


async def test_wait_span_is_in_callers_trace(virtual_time: VirtualTime, otel: Telemetry) -> None:
    limiter = Limiter(concurrency=1, name="openai", clock=virtual_time.clock)
    otel.watch(limiter)

    async def ask(number: int) -> None:
        with otel.tracers.get_tracer("mine").start_as_current_span(f"agent {number}"):
            async with limiter.acquire(timeout=2 if number == 3 else None):
                await asyncio.sleep(5)

    *_, late = await asyncio.gather(*map(ask, range(4)), return_exceptions=True)
    assert isinstance(late, AcquireTimeout)
    agents = {span.context.span_id: span.name for span in otel.spans if span.context}
    assert {
        agents[span.parent.span_id]: (span.attributes or {})["asyncbucket.result"]
        for span in otel.spans
        if span.name == "wait openai" and span.parent
    } == {"agent 1": "admitted", "agent 2": "admitted", "agent 3": "timeout"}


def watched_in_every_way(limiter: Limiter, otel: Telemetry) -> Callable[[], list[Any]]:
    """Watch a limiter; return a function that returns all that can be seen, but for the log."""
    registry = CollectorRegistry()
    seen: list[Event] = []
    telemetry.prometheus(limiter, registry=registry)
    otel.watch(limiter)
    telemetry.logging(limiter, threshold=0.0, logger="asyncbucket.canary")
    telemetry.llama_index(limiter)
    limiter.observe(seen.append)
    return lambda: [
        generate_latest(registry),
        otel.metrics(),
        [span.to_json() for span in otel.spans],
        seen,
    ]


async def test_telemetry_shows_no_secret(caplog: pytest.LogCaptureFixture, otel: Telemetry) -> None:
    """No key, prompt, password or tenant in an event, a log, a label, a span or an error.

    This uses the machine's clock, with refusals, errors and a caller that gives up.
    """
    key, prompt, password, tenant = CANARIES
    async with RateLimitedProvider(latency=0.01) as provider, httpx.AsyncClient() as client:
        limiter = Limiter("6k RPM burst 6k", concurrency=1, name="openai")
        shown = watched_in_every_way(limiter, otel)
        own = limiter.key(tenant)
        llm = own.wrap(model(provider, client, api_key=key))
        with caplog.at_level(logging.DEBUG, "asyncbucket"):
            provider.fail_next(1, status=429, retry_after=0.05)
            await asyncio.gather(*(llm.acomplete(prompt) for _ in range(3)))
            provider.fail_next(5, status=400)
            with pytest.raises(openai.BadRequestError):
                await llm.acomplete(prompt)
            with own.acquire_nowait(), pytest.raises(AcquireTimeout) as caught:
                await limiter.acquire(timeout=0.001, tenant=tenant)
            async with httpx.AsyncClient(transport=limiter.transport(retries=0)) as paced:
                with pytest.raises(httpx.ConnectError):
                    await paced.get(f"http://user:{password}@127.0.0.1:1/{prompt}")
        seen = [*shown(), [(record.getMessage(), vars(record)) for record in caplog.records]]
    assert all(seen)
    seen += [str(caught.value), caught.value, own, limiter.statistics()]
    assert "openai/*" in repr(seen)
    assert [canary for canary in CANARIES if canary in repr(seen)] == []


async def test_number_means_the_same_in_telemetry_and_in_serve_stats(
    virtual_time: VirtualTime, registry: CollectorRegistry
) -> None:
    limiter = Limiter("60 RPM burst 1", concurrency=4, clock=virtual_time.clock, name="openai")
    chat = limiter.child("chat", rpm=30)
    telemetry.prometheus(limiter, registry=registry)

    waiting = asyncio.gather(chat.acquire(), chat.acquire(), chat.key("acme").acquire())
    await virtual_time.all_blocked()
    chat.pause(0.5, reason="429")
    limiter.pause(0.5, reason="429")
    told = scrape(registry)
    names = ("queued_requests", "in_flight_requests", "upstream_429_total")
    for row, expected in zip(report([limiter])["limiters"], [(2, 1, 2), (2, 1, 1)], strict=True):
        assert tuple(told[name, row["name"]] for name in names) == expected
        assert (row["waiting"], row["in_flight"], row["upstream_429"]) == expected
        share = told["limit_used_ratio", "rpm", row["name"]]
        assert share == row["limits"][0]["used"] / row["limits"][0]["amount"] > 0
    assert told["limit_used_ratio", "concurrency", "openai"] == 0.25
    for lease in await waiting:
        lease.release()
    seen = scrape(registry)
    for name, calls in (("openai", 3), ("openai/chat", 3), ("openai/chat/*", 1)):  # of tenants
        assert seen["requests_total", name, "ok"] == calls
    assert not any("acme" in label for key in seen for label in key)


def test_calls_of_a_child_do_not_count_twice_beside_its_pool(registry: CollectorRegistry) -> None:
    parent = Limiter("5 RPM", name="key-1")
    child = parent.child("chat")
    telemetry.prometheus(child, registry=registry)
    telemetry.prometheus(Pool(parent, Limiter("5 RPM", name="key-2")), registry=registry)
    child.acquire_nowait().release()
    assert scrape(registry)["requests_total", "key-1/chat", "ok"] == 1


async def test_pool_shows_members(virtual_time: VirtualTime, registry: CollectorRegistry) -> None:
    a, b = (Limiter(f"{n} RPM", name=f"key-{n}", clock=virtual_time.clock) for n in (100, 300))
    pool = Pool(a, b, name="key-300-and-100")
    off = telemetry.prometheus(pool, registry=registry)
    for each in a, b, pool, pool.child("chat"):
        async with each.acquire():
            pass
    assert pool.statistics().admitted == 2
    told = scrape(registry).items()
    ended = {key[1]: n for key, n in told if key[::2] == ("requests_total", "ok")}
    at_b = 2 - a.children[pool.name].statistics().admitted
    assert ended == {
        pool.name: 2, f"{pool.name}/chat": 1,
        "key-100": 3 - at_b, f"key-100/{pool.name}": 2 - at_b,
        "key-300": 1 + at_b, f"key-300/{pool.name}": at_b,
    }  # fmt: skip
    used = {key[2]: n for key, n in scrape(registry).items() if key[0].endswith("used_ratio")}
    assert used[pool.name] == pytest.approx(4 / 400)
    assert used["key-100"] == pytest.approx((3 - at_b) / 100)
    names = [each["name"] for each in report([pool, a, *a.children.values()])["limiters"]]
    assert sorted(names) == sorted(ended)
    off()
    telemetry.prometheus(a, registry=registry)
