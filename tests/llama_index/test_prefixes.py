"""Chats that ask the provider to cache their beginning: the next one is charged for the rest."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from llama_index.core.base.llms.types import CacheControl, CachePoint, TextBlock
from llama_index.core.llms import ChatMessage, ChatResponse, MockLLM

from asyncbucket import Limiter, Pool
from asyncbucket.llama_index.estimate import prompt_to_cache
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import make_anthropic

SHARED, OWN = 20_000, 1_000
POINT = CachePoint(cache_control=CacheControl(type="ephemeral", ttl="5m"))


def chat(own: str) -> list[ChatMessage]:
    system = [TextBlock(text="shared " * (4 * SHARED // 7)), POINT]
    return [
        ChatMessage(role="system", blocks=system),
        ChatMessage(role="user", content=f"{own} " * (4 * OWN // (len(own) + 1))),
    ]


class Cached(MockLLM):
    """Answer after ten seconds, a stream from the first on; read what was sent a second before."""

    readable: float = float("inf")
    sent: list[tuple[float, int]] = []  # noqa: RUF012 - pydantic copies it

    def usage(self) -> dict[str, Any]:
        now = asyncio.get_running_loop().time()
        read = SHARED if now >= self.readable else 0
        self.readable = min(self.readable, now + 1)
        self.sent.append((now, read))
        counts = {"cache_creation_input_tokens": SHARED - read, "cache_read_input_tokens": read}
        return {"usage": {"input_tokens": OWN, "output_tokens": 10, **counts}}

    async def achat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:
        usage = self.usage()
        await asyncio.sleep(10)
        return ChatResponse(message=messages[-1], raw=usage)

    async def astream_chat(
        self, messages: Sequence[ChatMessage], **_: Any
    ) -> AsyncGenerator[ChatResponse]:
        async def stream() -> AsyncGenerator[ChatResponse]:
            usage = self.usage()
            await asyncio.sleep(1)
            yield ChatResponse(message=messages[-1], raw=usage)
            await asyncio.sleep(9)

        return stream()


async def read(llm: Any, own: str, *, stream: bool) -> None:
    if stream:
        async for _ in await llm.astream_chat(chat(own)):
            pass
    else:
        await llm.achat(chat(own))


@pytest.mark.parametrize("stream", [True, False])
async def test_chat_is_charged_what_is_left(virtual_time: VirtualTime, *, stream: bool) -> None:
    limiter = Limiter(itpm=1_000_000, clock=virtual_time.clock)
    llm = limiter.wrap(Cached(max_tokens=None))
    first = asyncio.create_task(read(llm, "a", stream=stream))
    await asyncio.sleep(1.5 if stream else 10.5)
    (use,) = limiter.statistics().limits
    second = asyncio.create_task(read(llm, "b", stream=stream))
    await virtual_time.all_blocked()
    assert limiter.statistics().limits[0].used - use.used == pytest.approx(OWN, rel=0.1)
    await asyncio.gather(first, second)
    cache = limiter.statistics().cache
    assert (cache.reads, cache.writes, cache.saved_tokens) == (1, 1, SHARED)


async def test_one_chat_leads_and_one_that_breaks_off_hands_over(virtual_time: VirtualTime) -> None:
    limiter = Limiter(itpm=1_000_000, clock=virtual_time.clock)
    llm = limiter.wrap(Cached(max_tokens=None), cache="lead")
    chats = [asyncio.create_task(read(llm, own, stream=True)) for own in "abc"]
    await asyncio.sleep(0.5)
    chats[0].cancel()
    await asyncio.gather(*chats, return_exceptions=True)
    assert llm.sent == [(0.0, 0), (0.5, 0), (1.5, SHARED)]


def test_chat_asks_for_the_cache_by_points_by_arguments_and_by_the_model() -> None:
    llm, messages = make_anthropic(), [ChatMessage("a"), ChatMessage("b")]
    assert prompt_to_cache(llm, messages, {}) is None
    strange: Any = ["no message"]
    assert prompt_to_cache(llm, strange, {"cache_control": {}}) is None
    whole = prompt_to_cache(llm, messages, {"cache_control": {"type": "ephemeral"}, "tools": [{}]})
    assert whole is not None
    assert whole.keys() == {"cache_control", "tools", "messages"}
    for index, marks in ((0, [True, False]), (-1, [True, True])):
        body = prompt_to_cache(make_anthropic(cache_idx=index), messages, {})
        assert body is not None
        assert ["cache_control" in message for message in body["messages"]] == marks
    body = prompt_to_cache(llm, chat("own"), {})
    assert body is not None
    assert body["messages"][0]["content"][1]["cachePoint"]["ttl"] == "5m"


async def test_conversation_stays_at_the_member_that_served_it(virtual_time: VirtualTime) -> None:
    members = [Limiter("600 RPM", name=name, clock=virtual_time.clock) for name in ("one", "two")]
    llm = Pool(*members).wrap([Cached(max_tokens=None), Cached(max_tokens=None)])

    async def say(*words: str) -> None:
        roles = ("user", "assistant", "user")
        turns = [ChatMessage(word, role=role) for role, word in zip(roles, words, strict=False)]
        await llm.achat([*chat("own")[:1], *turns])

    def taken() -> list[int]:
        return [member.statistics().admitted for member in members]

    await say("hi")
    await say("salve")
    assert taken() == [1, 1]
    for each in "abc":
        await say("hi", "yes?", each)
    assert taken() == [4, 1]
    await say("salve", "quid?", "a")
    assert taken() == [4, 2]
