"""A stream holds its slot from its first item until it ends, however it ends."""

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, Generator
from typing import Any

import httpx
import pytest
from llama_index.core.llms import MockLLM
from llama_index.llms.openai import OpenAI
from llama_index_instrumentation.dispatcher import instrument_tags
from llama_index_instrumentation.span import active_span_id
from pydantic import PrivateAttr

from asyncbucket import Limiter
from asyncbucket.llama_index import Retry
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import (
    API_BASE,
    MESSAGES,
    FakeAPI,
    Instrumentation,
    Reader,
    admitted,
    charged,
    in_flight,
    make_openai,
)


async def test_stream_holds_its_slot_while_it_is_read(limiter: Limiter, reader: Reader) -> None:
    llm = limiter.wrap(MockLLM(max_tokens=1))
    await reader.close(await reader.begin(llm))
    stream = await reader.begin(llm)
    assert admitted(limiter) == 0
    assert [bool(await reader.next(stream)), in_flight(limiter)] == [True, 1]
    assert [await reader.next(stream), in_flight(limiter)] == [None, 0]
    assert [await reader.rest(stream), admitted(limiter)] == [[], 1]


async def numbers() -> AsyncGenerator[int, None]:
    yield 1
    yield 0


def test_stream_begun_on_a_loop_goes_on_when_that_has_ended(limiter: Limiter) -> None:
    async def begin() -> Any:
        stream = limiter.wrap(MockLLM(max_tokens=3)).stream_complete("one two three")
        next(stream)
        return stream

    assert [len(list(asyncio.run(begin()))), in_flight(limiter)] == [2, 0]


class Breaking(MockLLM):
    """A model whose streams break after the first item."""

    _stream: Any = PrivateAttr(None)

    async def astream_chat(self, *_: Any, **__: Any) -> Any:
        self._stream = (1 / number async for number in numbers())
        return self._stream

    def stream_chat(self, *_: Any, **__: Any) -> Any:
        self._stream = (1 / number for number in (1, 0))
        return self._stream


@pytest.mark.parametrize("end", ["closed twice", "broken", "thrown"])
async def test_ended_stream_gives_its_slot_back(limiter: Limiter, reader: Reader, end: str) -> None:
    llm: Any = limiter.wrap(Breaking(max_tokens=None))
    stream = await reader.begin(llm)
    await reader.next(stream)
    assert in_flight(limiter) == 1
    reserved = charged(limiter)
    if end == "closed twice":
        await reader.close(stream)
        await reader.close(stream)
    elif end == "broken":
        with pytest.raises(ZeroDivisionError):
            await reader.next(stream)
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError("x")) if reader.is_sync else await stream.athrow(KeyError("x"))
    assert (admitted(limiter), in_flight(limiter), charged(limiter)) == (1, 0, reserved)
    assert await reader.rest(stream) == await reader.rest(llm._stream) == []


class Wire(httpx.AsyncByteStream, httpx.SyncByteStream):
    """A reply that never ends, and knows whether the client has hung up."""

    is_open = True

    def __iter__(self) -> Generator[bytes, None, None]:
        delta = {"role": "assistant", "content": "more"}
        choice = {"index": 0, "finish_reason": None, "delta": delta}
        kind = "chat.completion.chunk"
        chunk = {"id": "1", "created": 1, "model": "m", "object": kind, "choices": [choice]}
        while True:
            yield f"data: {json.dumps(chunk)}\n\n".encode()

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.is_open = False

    async def aclose(self) -> None:
        self.close()


@pytest.fixture
def wire(api: FakeAPI) -> Generator[Wire]:
    """Answer a second attempt at a stream."""
    wire = Wire()
    api.refuse(429, {"retry-after-ms": "1"})
    headers = {"content-type": "text/event-stream"}
    api.script.append(httpx.Response(200, headers=headers, stream=wire))
    gc.disable()
    yield wire
    gc.enable()


@pytest.mark.parametrize("dropped", [False, True])
async def test_closed_or_dropped_stream_hangs_up_without_the_collector(
    limiter: Limiter, wire: Wire, reader: Reader, *, dropped: bool
) -> None:
    stream = await reader.begin(limiter.wrap(make_openai(), retry=Retry(backoff=0.001)))
    await reader.next(stream)
    assert (wire.is_open, in_flight(limiter), admitted(limiter)) == (True, 1, 2)
    if dropped:
        del stream
        assert in_flight(limiter) == 0
        for _ in range(5):
            await asyncio.sleep(0)
    else:
        await reader.close(stream)
    assert (wire.is_open, in_flight(limiter)) == (False, 0)


class Censored(OpenAI):
    """A model that ends its reply before the provider does."""

    async def astream_chat(self, *args: Any, **kwargs: Any) -> Any:
        async def stream() -> AsyncGenerator[Any, None]:
            async for item in await super(Censored, self).astream_chat(*args, **kwargs):
                yield item
                return

        return stream()

    def stream_chat(self, *args: Any, **kwargs: Any) -> Any:
        yield next(super().stream_chat(*args, **kwargs))


async def test_stream_ended_by_model_hangs_up(limiter: Limiter, wire: Wire, reader: Reader) -> None:
    llm = limiter.wrap(Censored(api_key="k", api_base=API_BASE), retry=Retry(backoff=0.001))
    assert len(await reader.read(llm)) == 1
    assert (wire.is_open, in_flight(limiter)) == (False, 0)


class Slow(MockLLM):
    """A model that says nothing for an hour."""

    async def astream_chat(self, *_: Any, **__: Any) -> Any:
        async def stream() -> AsyncGenerator[str, None]:
            await asyncio.sleep(3600)
            yield "late"

        return stream()

    async def acomplete(self, *_: Any, **__: Any) -> Any:
        await asyncio.sleep(3600)


@pytest.mark.parametrize("streaming", [True, False])
async def test_cancelled_call_or_stream_frees_slot(limiter: Limiter, *, streaming: bool) -> None:
    llm = limiter.wrap(Slow(max_tokens=None))

    async def read() -> None:
        async for _ in await llm.astream_chat(MESSAGES):
            pass

    task = asyncio.ensure_future(read() if streaming else llm.acomplete("hi"))
    for _ in range(5):  # to the sleep inside
        await asyncio.sleep(0)
    assert in_flight(limiter) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert in_flight(limiter) == 0


async def test_consumers_calls_between_stream_items_in_any_task_are_charged() -> None:
    limiter = Limiter("1000 RPM", concurrency=2)
    llm = limiter.wrap(MockLLM(max_tokens=2))
    stream = await llm.astream_chat(MESSAGES)
    for _ in range(2):
        assert await asyncio.create_task(anext(stream))
        await llm.acomplete("aside")
    assert admitted(limiter) == 1 + 2


async def test_stream_events_carry_tags_and_span_of_caller(
    instrumentation: Instrumentation, virtual_time: VirtualTime
) -> None:
    limiter = Limiter("1/s burst 1", clock=virtual_time.clock)
    llm = limiter.wrap(MockLLM(max_tokens=2))

    limiter.acquire_nowait().release()
    token = active_span_id.set("the caller")
    with instrument_tags({"user": "ada"}):
        stream = await llm.astream_chat(MESSAGES)
    active_span_id.reset(token)
    with instrument_tags({"user": "bob"}):
        assert len([item async for item in stream]) == 2
    names = [event.class_name() for event in instrumentation.objects]
    assert names[:2] == ["RateLimitWaitEvent", "LLMChatStartEvent"]
    assert instrumentation.objects[0].span_id == "the caller"
    assert [event.tags for event in instrumentation.objects] == [{"user": "ada"}] * len(names)


@pytest.mark.parametrize(
    ("of_call", "of_model", "sent", "is_seen"),
    [
        ({}, {}, {"include_usage": True}, False),
        ({"stream_options": {"include_usage": True}}, {}, {"include_usage": True}, True),
        ({}, {"stream_options": {"include_usage": True}}, {"include_usage": True}, True),
        ({}, {"stream_options": {}}, {}, False),
    ],
    ids=["by us", "by the call", "by the model", "declined by the model"],
)
async def test_stream_is_settled_by_its_usage_which_is_seen_only_if_the_user_asks_for_it(
    api: FakeAPI,
    instrumentation: Instrumentation,
    of_call: Any,
    of_model: Any,
    sent: Any,
    *,
    is_seen: bool,
) -> None:
    limiter = Limiter("100k TPM")
    llm = limiter.wrap(make_openai(additional_kwargs=of_model))
    chunks: list[Any] = [chunk async for chunk in await llm.astream_chat(MESSAGES, **of_call)]
    assert api.bodies[0]["stream_options"] == sent
    assert instrumentation.events.count("LLMChatInProgressEvent") == len(chunks)
    assert bool(chunks[-1].raw.usage) == is_seen
    assert bool(chunks[-1].raw.choices) != is_seen
    assert (charged(limiter) == [api.tokens]) == bool(sent)


async def test_refused_option_is_sent_once(limiter: Limiter, api: FakeAPI, reader: Reader) -> None:
    llm = limiter.wrap(make_openai())
    api.refuse(400, message="Unrecognized request argument: stream_options")
    for _ in range(2):
        assert await reader.read(llm)
    assert ["stream_options" in body for body in api.bodies] == [True, False, False]
    assert (admitted(limiter), in_flight(limiter)) == (3, 0)


async def test_call_collecting_a_stream_is_settled_by_its_usage(api: FakeAPI) -> None:
    class Within(OpenAI):
        async def achat(self, messages: Any, **_: Any) -> Any:
            return [part async for part in await self.astream_chat(messages)][-1]

        def chat(self, messages: Any, **_: Any) -> Any:
            return list(self.stream_chat(messages))[-1]

    limiter = Limiter("100k TPM", concurrency=1)
    llm = limiter.wrap(Within(api_key="k", api_base=API_BASE))
    await llm.achat(MESSAGES)
    await asyncio.to_thread(llm.chat, MESSAGES)
    assert len(api.requests) == admitted(limiter) == 2
    assert (in_flight(limiter), charged(limiter)) == (0, [api.tokens])
