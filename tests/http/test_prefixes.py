"""Prompts that are in a provider's cache: what a call that sends one costs, and who waits for whom."""

import asyncio
import itertools
import json
import logging
import threading
import tracemalloc
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

import httpx
import pytest

from asyncbucket import CostExceedsLimit, Limiter, events
from asyncbucket.providers.prefixes import MOST, PATIENCE, Prefixes, Prompt
from asyncbucket.providers.profiles import ANTHROPIC
from asyncbucket.providers.usage import Usage
from asyncbucket.testing import VirtualClock, VirtualTime, VirtualTimeLoop
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


class Cache(httpx.AsyncBaseTransport, httpx.BaseTransport):
    """Answer as Anthropic does; the reply begins after one second and ends after ten."""

    def __init__(self, time: VirtualTime | None = None, *, caches: bool = True) -> None:
        self.time, self.caches = time, caches
        #: Since when prompts are readable, up to their marks.
        self.known: dict[str, float] = {}
        #: When each call came, and its usage.
        self.calls: list[tuple[float, dict[str, int]]] = []
        self.fails = 0

    def usage(self, body: Mapping[str, Any]) -> dict[str, int]:
        now = 0.0 if self.time is None else self.time.now
        parts, read, last = "", 0, 0
        blocks = [*body.get("system", ())]
        for message in body["messages"]:
            content = message["content"]
            blocks += [{"text": content}] if isinstance(content, str) else content
        for block in blocks:
            parts += block["text"]
            read = len(parts) // 4 if self.known.get(parts, now + 1) <= now else read
            last = len(parts) // 4 if "cache_control" in block else last
            if self.caches and "cache_control" in block:
                self.known.setdefault(parts, now + (self.time is not None))
        written = max(0, last - read) if self.caches else 0
        counts = {
            "input_tokens": len(parts) // 4 - read - written,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": read,
            "output_tokens": 10,
        }
        self.calls.append((now, counts))
        return counts

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.fails:
            self.fails -= 1
            await asyncio.sleep(1)
            return httpx.Response(400, json={"error": {"message": "no"}})
        body = json.loads(request.content)
        usage = self.usage(body)
        if not body["stream"]:
            await asyncio.sleep(SECONDS)
            return httpx.Response(200, json={"usage": usage})
        headers = {"content-type": "text/event-stream"}
        return httpx.Response(200, headers=headers, stream=_Events(usage))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"usage": self.usage(json.loads(request.content))})

    @property
    def written(self) -> int:
        return sum(counts["cache_creation_input_tokens"] > 0 for _, counts in self.calls)


class _Events(httpx.AsyncByteStream):
    def __init__(self, usage: dict[str, int]) -> None:
        self.usage = usage

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await asyncio.sleep(1)
        yield b"data: " + json.dumps({"message": {"usage": self.usage}}).encode() + b"\n\n"
        await asyncio.sleep(SECONDS - 1)
        yield b'data: {"type":"message_stop"}\n\n'


def client_of(limiter: Limiter, provider: Cache, **options: Any) -> httpx.AsyncClient:
    transport = limiter.transport(provider, learn=False, **options)
    return httpx.AsyncClient(transport=transport)


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
    limiter, provider = Limiter(itpm=1_000_000, clock=time.clock), Cache(time)
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
    limiter, provider = Limiter(itpm=SHARED + 5 * OWN, clock=time.clock), Cache(time)
    async with client_of(limiter, provider) as client:
        calls = (client.post(URL, json=prompt(n, stream=stream)) for n in range(5))
        await asyncio.gather(*calls)
    began = 1.0 if stream else SECONDS
    # The second call finds out whether what was written is read, before the others rely on it.
    assert [at for at, _ in provider.calls] == [0.0, began, *[2 * began] * 3]
    assert provider.written == 1


async def test_provider_that_reads_nothing_misleads_us_for_one_call(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=10 * SHARED, clock=time.clock), Cache(time)
    async with client_of(limiter, provider) as client:
        await client.post(URL, json=prompt("a"))
        provider.known.clear()  # as if written to the cache of another account
        before = used(limiter)
        calls = await start(*(client.post(URL, json=prompt(each)) for each in "bcd"))
        assert used(limiter) - before == OWN + 2 * (SHARED + OWN)
        await asyncio.gather(*calls)
        provider.known.clear()
        calls = await start(client.post(URL, json=prompt("e")))
        assert used(limiter) == 5 * (SHARED + OWN)
        await asyncio.gather(*calls)


async def test_nothing_is_expected_of_a_provider_that_caches_nothing(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=10 * SHARED, clock=time.clock), Cache(time, caches=False)
    async with client_of(limiter, provider, cache="lead") as client:
        await client.post(URL, json=prompt("a"))
        await start(client.post(URL, json=prompt("b")), client.post(URL, json=prompt("c")))
    assert used(limiter) == 3 * (SHARED + OWN)
    assert [at for at, _ in provider.calls] == [0.0, SECONDS, SECONDS]  # nobody leads in vain


async def test_prefix_is_found_wherever_its_mark_is_however_written(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=1_000_000, clock=time.clock), Cache(time)
    block = {"type": "text", "text": text(5_000, "question")}
    reply = {"role": "assistant", "content": "Yes."}
    async with client_of(limiter, provider) as client:
        first = prompt(messages=[{"role": "user", "content": [{**block, **MARK}]}])
        await client.post(URL, json=first)
        more = {"role": "user", "content": [{"type": "text", "text": text(OWN, "more"), **MARK}]}
        for written in (block["text"], [block]):
            before = used(limiter)
            messages = [{"role": "user", "content": written}, reply, more]
            calls = await start(client.post(URL, json=prompt(messages=messages)))
            assert used(limiter) - before == (OWN + 1 if isinstance(written, str) else 0)
            await asyncio.gather(*calls)


async def test_prompt_above_a_limit_goes_alone_only_if_cold(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=SHARED - OWN, clock=time.clock), Cache(time)
    async with client_of(limiter, provider) as client:
        (await limiter.acquire(input_tokens=1)).release()
        calls = await start(*(client.post(URL, json=prompt(each)) for each in "ab"))
        assert provider.calls == []
        await asyncio.gather(*calls)
        with pytest.raises(CostExceedsLimit, match="input tokens exceeds the limit of 19,000"):
            await client.post(
                URL, json=prompt(messages=[{"role": "user", "content": "x" * 80_000}])
            )
    (cold, counts), (warm, _) = provider.calls
    assert (counts["cache_read_input_tokens"], provider.written) == (0, 1)
    assert 60 < cold < 61 < warm


async def test_prefix_expires_also_for_calls_in_line(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=10 * SHARED, clock=time.clock), Cache(time)
    async with client_of(limiter, provider) as client:
        await client.post(URL, json=prompt("a"))
        limiter.pause(400)
        await start(client.post(URL, json=prompt("b")))
        (waiting,) = Prefixes.of(limiter)._entered
        lease = waiting._lease
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
    limiter, provider = Limiter(itpm=1_000_000, clock=time.clock), Cache(time)
    async with client_of(limiter, provider, cache="lead") as client:
        calls = (client.post(URL, json=prompt(n, stream=stream)) for n in range(5))
        await asyncio.gather(*calls)
    assert [at for at, _ in provider.calls] == [0.0, *[1.0 if stream else PATIENCE] * 4]
    assert provider.written == 1


async def test_leader_that_fails_or_gives_up_hands_over_to_the_next(time: VirtualTime) -> None:
    limiter, provider = Limiter(itpm=1_000_000, clock=time.clock), Cache(time)
    provider.fails = 1
    async with client_of(limiter, provider, cache="lead") as client:
        calls = await start(*(client.post(URL, json=prompt(each)) for each in range(4)))
        await asyncio.sleep(1.5)
        calls[1].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert [at for at, _ in provider.calls] == [1.0, 1.5, 2.5]
    assert provider.written == 2


def test_thread_waits_for_the_reply_to_a_leader_too(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, wait = threading.Event(), SyncIO.wait

    async def tell_and_wait(io: SyncIO, *args: Any) -> None:
        waits.set()
        await wait(io, *args)

    class Slow(Cache):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if not self.calls and not follower.is_alive():
                follower.start()
                waits.wait()
            return super().handle_request(request)

    def call(own: str) -> None:
        client.post(URL, json=prompt(own, stream=False))

    monkeypatch.setattr(SyncIO, "wait", tell_and_wait)
    follower, provider = threading.Thread(target=call, args=("b",)), Slow()
    transport = Limiter(itpm=1_000_000).transport(provider, learn=False, cache="lead")
    with httpx.Client(transport=transport) as client:
        call("a")
        follower.join()
    assert [counts["cache_read_input_tokens"] for _, counts in provider.calls] == [0, SHARED]


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
        sent = Prompt(table, ANTHROPIC, "claude", body, [], leads=False)
        lease: Any = limiter.acquire(input_tokens=20)
        run(sent.admit(lease, SYNC))
        sent.replied(usage, lease, sent_at=limiter.now())
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
    kept = [table._entries, table._sites, table._waiting, table._entered, *told]
    kept.append(str(limiter.statistics()))
    assert "secret" not in " ".join([*map(repr, kept), caplog.text])


def test_other_modes_are_refused() -> None:
    wrong: Any = "follow"
    with pytest.raises(ValueError, match=r"cache must be .count. or .lead., not 'follow'"):
        Limiter("10 RPM").transport(cache=wrong)
