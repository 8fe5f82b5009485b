"""Prompts that are in a provider's cache: what a call that sends one costs, and who waits for whom."""

import asyncio
import itertools
import logging
import threading
import tracemalloc
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest

from asyncbucket import CostExceedsLimit, Limiter, events
from asyncbucket.providers.prefixes import MOST, PATIENCE, Prefixes, Prompt, cuts_of
from asyncbucket.providers.profiles import ANTHROPIC
from asyncbucket.providers.usage import Usage
from asyncbucket.testing import RateLimitedProvider, VirtualClock, VirtualTime, VirtualTimeLoop
from asyncbucket.testing.prompt_cache import Cache
from asyncbucket.waiting import SYNC, SyncIO, run

URL = "https://api.anthropic.com/v1/messages"
MARK = {"cache_control": {"type": "ephemeral"}}
#: Tokens of the system prompt, which all calls share, and of a call's own message.
SHARED, OWN = 20_000, 1_000
SECONDS = 10.0


@pytest.fixture(name="time")
def time_of_test(virtual_time: VirtualTime) -> VirtualTime:
    return virtual_time


def text(tokens: int, seed: object) -> str:
    return (f"{seed} " * 4 * tokens)[: 4 * tokens]


def prompt(own: object = "own", *, stream: bool = True, **body: Any) -> dict[str, Any]:
    """Return a call with a system prompt that is marked, and a message that is not."""
    return {
        "model": "claude",
        "max_tokens": 50,
        "stream": stream,
        "system": [{"type": "text", "text": text(SHARED, "shared"), **MARK}],
        "messages": [{"role": "user", "content": text(OWN, own)}],
        **body,
    }


def provider_of(time: VirtualTime, *, least: int = 0) -> RateLimitedProvider:
    """Return one whose replies begin after one second and end after ten."""
    cache, clock = Cache(least=least), time.clock
    return RateLimitedProvider(latency=SECONDS, begins=1 / SECONDS, cache=cache, clock=clock)


def forget(provider: RateLimitedProvider) -> None:
    """Forget all prompts, as if they had been written to the cache of another account."""
    assert provider.enforcer.cache is not None
    provider.enforcer.cache._until.clear()


def came(provider: RateLimitedProvider) -> list[float]:
    """Return when calls came."""
    return [each.time_ns / 1e9 for each in provider.arrivals]


def client_of(limiter: Limiter, provider: RateLimitedProvider, **options: Any) -> httpx.AsyncClient:
    transport = limiter.transport(provider.mock_transport(), learn=False, **options)
    return httpx.AsyncClient(transport=transport, headers={"x-api-key": "any"})


async def start(*calls: Coroutine[Any, Any, httpx.Response]) -> "list[asyncio.Task[Any]]":
    """Start calls in this order, and let them run until all wait."""
    tasks = [asyncio.create_task(call) for call in calls]
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    await loop.all_blocked()
    return tasks


def used(limiter: Limiter) -> int:
    return limiter.statistics().limits[0].used


async def test_call_is_charged_what_is_left_once_a_reply_has_begun(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=1_000_000, clock=time.clock), provider_of(time)
    heard: list[events.Event] = []
    limiter.observe(heard.append)
    async with client_of(limiter, provider) as client:
        first = await start(client.post(URL, json=prompt("a")))
        assert used(limiter) == SHARED + OWN
        await asyncio.sleep(1)
        second = await start(client.post(URL, json=prompt("b")))
        assert used(limiter) == SHARED + 2 * OWN
        await asyncio.gather(*first, *second)
    assert used(limiter) == SHARED + 2 * OWN
    cache = limiter.statistics().cache
    assert (cache.reads, cache.writes, cache.saved_tokens) == (1, 1, SHARED)
    assert f"{SHARED:,} tokens read from the prompt cache" in str(limiter.statistics())
    told = [each.written for each in heard if isinstance(each, events.PromptCached)]
    assert told == [True, False]


@pytest.mark.parametrize("stream", [True, False])
async def test_calls_in_line_are_repriced_in_order(time: VirtualTime, *, stream: bool) -> None:
    limiter, provider = Limiter(itpm=SHARED + 5 * OWN, clock=time.clock), provider_of(time)
    async with client_of(limiter, provider) as client:
        calls = (client.post(URL, json=prompt(n, stream=stream)) for n in range(5))
        await asyncio.gather(*calls)
    began = 1.0 if stream else SECONDS
    # The second call finds out whether what was written is read, before the others rely on it.
    assert came(provider) == [0.0, began, *[2 * began] * 3]
    assert provider.statistics().cache_writes == 1


async def test_provider_that_reads_nothing_misleads_us_for_one_call(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=10 * SHARED, clock=time.clock), provider_of(time)
    async with client_of(limiter, provider) as client:
        await client.post(URL, json=prompt("a"))
        forget(provider)  # as if written to the cache of another account
        before = used(limiter)
        calls = await start(*(client.post(URL, json=prompt(each)) for each in "bcd"))
        assert used(limiter) - before == OWN + 2 * (SHARED + OWN)
        await asyncio.gather(*calls)
        forget(provider)
        calls = await start(client.post(URL, json=prompt("e")))
        assert used(limiter) == 5 * (SHARED + OWN)
        await asyncio.gather(*calls)
        assert used(limiter) == 5 * (SHARED + OWN)
        await client.post(URL, json=prompt("f"))  # nobody relied on that, but it read
        await start(*(client.post(URL, json=prompt(each)) for each in "gh"))
        assert used(limiter) == 6 * (SHARED + OWN) + 2 * OWN  # one tries first


async def test_another_call_tries_if_the_one_that_was_to_try_gives_up(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=10 * SHARED, clock=time.clock), provider_of(time)
    async with client_of(limiter, provider) as client:
        await client.post(URL, json=prompt("a"))
        limiter.pause(5)
        calls = await start(*(client.post(URL, json=prompt(each)) for each in "bcd"))
        calls[0].cancel()
        await asyncio.sleep(5)
        assert used(limiter) == 2 * (SHARED + OWN) + OWN
        await asyncio.gather(*calls, return_exceptions=True)


async def test_nothing_is_expected_of_a_provider_that_caches_nothing(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=10 * SHARED, clock=time.clock), provider_of(time, least=10**6)
    async with client_of(limiter, provider, cache="lead") as client:
        await client.post(URL, json=prompt("a"))
        await start(client.post(URL, json=prompt("b")), client.post(URL, json=prompt("c")))
    assert used(limiter) == 3 * (SHARED + OWN)
    assert came(provider) == [0.0, SECONDS, SECONDS]  # nobody leads in vain


@pytest.mark.parametrize("as_text", [True, False])
async def test_prefix_is_found_however_it_is_written(time: VirtualTime, *, as_text: bool) -> None:
    """And wherever its mark was."""
    limiter, provider = Limiter(itpm=1_000_000, clock=time.clock), provider_of(time)
    block = {"type": "text", "text": text(5_000, "question")}
    reply = {"role": "assistant", "content": "Yes."}
    more = {"role": "user", "content": [{"type": "text", "text": text(OWN, "more"), **MARK}]}
    async with client_of(limiter, provider) as client:
        first = prompt(messages=[{"role": "user", "content": [{**block, **MARK}]}])
        await client.post(URL, json=first)
        before = used(limiter)
        question = {"role": "user", "content": block["text"] if as_text else [block]}
        await start(client.post(URL, json=prompt(messages=[question, reply, more])))
        assert used(limiter) - before == OWN + 1


async def test_prompt_above_a_limit_goes_alone_only_if_cold(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=SHARED - OWN, clock=time.clock), provider_of(time)
    async with client_of(limiter, provider) as client:
        (await limiter.acquire(input_tokens=1)).release()
        calls = await start(*(client.post(URL, json=prompt(each)) for each in "ab"))
        assert came(provider) == []
        await asyncio.gather(*calls)
        with pytest.raises(CostExceedsLimit, match="input tokens exceeds the limit of 19,000"):
            await client.post(
                URL, json=prompt(messages=[{"role": "user", "content": "x" * 80_000}])
            )
    cold, warm = came(provider)
    assert provider.statistics().cache_writes == 1
    assert 60 < cold < 61 < warm


async def test_prefix_expires_also_for_calls_in_line(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=10 * SHARED, clock=time.clock), provider_of(time)
    async with client_of(limiter, provider) as client:
        await client.post(URL, json=prompt("a"))
        limiter.pause(400)
        await start(client.post(URL, json=prompt("b")))
        (waiting,) = {each for calls in Prefixes.of(limiter)._waiting.values() for each in calls}
        lease = waiting.lease
        assert lease is not None
        assert lease.cost["input_tokens"] == OWN
        await asyncio.sleep(300)
        assert lease.cost["input_tokens"] == SHARED + OWN
        before = used(limiter)
        calls = await start(client.post(URL, json=prompt("c")))
        await asyncio.sleep(100)
        assert used(limiter) - before == 2 * (SHARED + OWN)
        await asyncio.gather(*calls)
        mark = {"cache_control": {"ttl": "1h"}}
        hour = prompt(system=[{"type": "text", "text": "x" * 80_000, **mark}])
        await client.post(URL, json=hour)
        await asyncio.sleep(3_500)
        before = used(limiter)
        await start(client.post(URL, json=hour))
        assert used(limiter) - before == OWN


@pytest.mark.parametrize("stream", [True, False])
async def test_one_call_leads_until_its_reply_begins(time: VirtualTime, *, stream: bool) -> None:
    limiter, provider = Limiter(itpm=1_000_000, clock=time.clock), provider_of(time)
    async with client_of(limiter, provider, cache="lead") as client:
        calls = (client.post(URL, json=prompt(n, stream=stream)) for n in range(5))
        await asyncio.gather(*calls)
    assert came(provider) == [0.0, *[1.0 if stream else PATIENCE] * 4]
    assert provider.statistics().cache_writes == 1


async def test_leader_that_fails_or_gives_up_hands_over_to_the_next(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=1_000_000, clock=time.clock), provider_of(time)
    provider.fail_next(status=400)
    async with client_of(limiter, provider, cache="lead") as client:
        calls = await start(*(client.post(URL, json=prompt(each)) for each in range(4)))
        await asyncio.sleep(0.5)
        calls[1].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert came(provider) == [0.0, 0.0, 0.5, 1.5]
    assert provider.statistics().cache_writes == 1


def test_thread_waits_for_the_reply_to_a_leader_too(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, wait = threading.Event(), SyncIO.wait

    async def tell_and_wait(io: SyncIO, *args: Any) -> None:
        waits.set()
        await wait(io, *args)

    def answer(_: httpx.Request) -> httpx.Response:
        if not calls:
            calls.append("first")
            follower.start()
            waits.wait()
        calls.append("answered")
        usage = {"input_tokens": OWN, "output_tokens": 10, "cache_creation_input_tokens": SHARED}
        return httpx.Response(200, json={"usage": usage})

    def call(own: str) -> None:
        client.post(URL, json=prompt(own, stream=False))

    monkeypatch.setattr(SyncIO, "wait", tell_and_wait)
    follower, calls = threading.Thread(target=call, args=("b",)), list[str]()
    inner = httpx.MockTransport(answer)
    transport = Limiter(itpm=1_000_000).transport(inner, learn=False, cache="lead")
    with httpx.Client(transport=transport) as client:
        call("a")
        follower.join()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("profile", "charged"), [("fireworks", OWN), ("groq", 21_000), ("openai", 21_000)]
)
async def test_profile_says_what_is_charged_before_the_reply(
    time: VirtualTime, profile: str, charged: int
) -> None:
    async def answer(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(1)
        details = {"cached_tokens": SHARED}
        usage = {"prompt_tokens": 21_000, "prompt_tokens_details": details, "total_tokens": 21_010}
        return httpx.Response(200, json={"usage": usage})

    limiter = Limiter(itpm=1_000_000, clock=time.clock)
    transport = limiter.transport(httpx.MockTransport(answer), profile=profile, learn=False)

    def body(own: str) -> dict[str, Any]:
        system = {"role": "system", "content": text(SHARED, "shared")}
        return {"messages": [system, {"role": "user", "content": text(OWN, own)}]}

    async with httpx.AsyncClient(transport=transport, base_url="http://llm.example") as client:
        await client.post("/v1/chat/completions", json=body("a"))
        before = used(limiter)
        calls = await start(client.post("/v1/chat/completions", json=body("b")))
        assert used(limiter) - before == pytest.approx(charged, abs=30)
        await asyncio.gather(*calls)


def test_ten_thousand_conversations_take_bounded_memory_and_no_text_is_kept(
    clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    limiter, told = Limiter(itpm=10**9, clock=clock), list[events.Event]()
    table, usage = Prefixes.of(limiter), Usage(20, 10, 30, written_tokens=19)

    def converse(number: int, turn: int) -> None:
        content = [{"type": "text", "text": f"secret {number} {turn}", **MARK}]
        body = {"model": "claude", "messages": [{"role": "user", "content": content}]}
        sent = Prompt(table, ANTHROPIC, cuts_of(body, "claude"))
        lease: Any = limiter.acquire(input_tokens=20)
        run(sent.admit(lease, SYNC))
        sent.replied(usage, lease)
        lease.release()

    off = limiter.observe(told.append)
    converse(-1, 0)
    off()
    tracemalloc.start()
    for number, turn in itertools.product(range(10_000), range(2)):
        converse(number, turn)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.9 * MOST < len(table._entries) <= MOST
    assert size < 4_500_000
    kept: list[object] = [table._entries, table._who_relies, table._waiting, *told]
    kept.append(str(limiter.statistics()))
    assert "secret" not in " ".join([*map(repr, kept), caplog.text])


def test_other_modes_are_refused() -> None:
    wrong: Any = "follow"
    with pytest.raises(ValueError, match=r"cache must be .count. or .lead., not 'follow'"):
        Limiter("10 RPM").transport(cache=wrong)


async def test_statistics_say_what_a_provider_that_counts_reads_has_read(time: VirtualTime) -> None:
    details = {"cached_tokens": SHARED}
    usage = {"prompt_tokens": 21_000, "prompt_tokens_details": details, "total_tokens": 21_010}
    inner = httpx.MockTransport(lambda _: httpx.Response(200, json={"usage": usage}))
    limiter = Limiter(itpm=1_000_000, clock=time.clock)
    body = {"model": "m", "messages": [{"role": "user", "content": text(SHARED + OWN, "a")}]}
    async with httpx.AsyncClient(transport=limiter.transport(inner)) as client:
        await client.post("https://api.openai.com/v1/chat/completions", json=body)
    cache = limiter.statistics().cache
    assert (cache.reads, cache.writes, cache.saved_tokens) == (1, 0, 0)
