"""A stream holds its slot from its first item until it ends, however it ends."""

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncGenerator, Generator
from contextvars import copy_context
from typing import Any

import httpx
import openai
import pytest
from llama_index.core.base.llms.types import ChatResponse
from llama_index.core.llms import MockLLM
from llama_index.llms.openai import OpenAI
from llama_index_instrumentation.dispatcher import instrument_tags
from llama_index_instrumentation.span import active_span_id

from asyncbucket import Limiter
from asyncbucket.llama_index import Estimate, Retry
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import (
    API_BASE,
    MESSAGES,
    Estimating,
    Instrumentation,
    Reader,
    ScriptedOpenAI,
    admitted,
    in_flight,
    make_openai,
)


@pytest.fixture
def limiter() -> Limiter:
    return Limiter("1000 RPM", concurrency=1)


async def test_stream_takes_nothing_before_it_is_read(limiter: Limiter, reader: Reader) -> None:
    llm = limiter.wrap(MockLLM())
    closed = await reader.begin(llm)
    stream = await reader.begin(llm)
    await reader.close(closed)
    del stream
    gc.collect()
    assert await reader.rest(closed) == []
    assert admitted(limiter) == 0


async def test_stream_holds_its_slot_until_exhaustion(limiter: Limiter, reader: Reader) -> None:
    stream = await reader.begin(limiter.wrap(MockLLM(max_tokens=2)))
    assert [bool(await reader.next(stream)), in_flight(limiter)] == [True, 1]
    assert [bool(await reader.next(stream)), in_flight(limiter)] == [True, 1]
    assert [await reader.next(stream), in_flight(limiter)] == [None, 0]
    assert await reader.rest(stream) == []


class Breaking(MockLLM):
    """A model whose streams break after the first item."""

    async def astream_chat(self, *_: Any, **__: Any) -> Any:
        async def stream() -> AsyncGenerator[str, None]:
            yield "a"
            raise ConnectionError("reset")

        return stream()

    def stream_chat(self, *_: Any, **__: Any) -> Any:
        yield "a"
        raise ConnectionError("reset")


@pytest.mark.parametrize("end", ["closed twice", "broken", "thrown class", "thrown error"])
async def test_ended_stream_gives_its_slot_back_and_stays_at_its_end(
    limiter: Limiter, reader: Reader, end: str
) -> None:
    stream = await reader.begin(limiter.wrap(Breaking(max_tokens=None)))
    await reader.next(stream)
    assert in_flight(limiter) == 1
    if end == "closed twice":
        await reader.close(stream)
        await reader.close(stream)
    elif end == "broken":
        with pytest.raises(ConnectionError, match="reset"):
            await reader.next(stream)
    else:
        with pytest.raises(KeyError):
            await reader.throw(
                stream, *((KeyError,) if end == "thrown class" else (KeyError("x"),))
            )
    assert (admitted(limiter), in_flight(limiter)) == (1, 0)
    assert await reader.rest(stream) == []


@pytest.mark.parametrize("failure", ["refused", "cut off"])
async def test_dropped_stream_after_retry_gives_its_slot_back_at_once(
    limiter: Limiter, openai_api: ScriptedOpenAI, failure: str, reader: Reader
) -> None:
    if failure == "cut off":
        openai_api.script.append(httpx.ReadError("cut"))
    else:
        openai_api.refuse(429, {"retry-after-ms": "1"})
    gc.disable()
    try:
        stream = await reader.begin(limiter.wrap(make_openai(), retry=Retry(backoff=0.001)))
        await reader.next(stream)
        del stream
        assert (admitted(limiter), in_flight(limiter)) == (2, 0)
    finally:
        gc.enable()


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
def wire(openai_api: ScriptedOpenAI) -> Generator[Wire]:
    wire = Wire()
    headers = {"content-type": "text/event-stream"}
    openai_api.script.append(httpx.Response(200, headers=headers, stream=wire))
    gc.disable()
    yield wire
    gc.enable()


async def test_closed_stream_hangs_up_at_once(limiter: Limiter, wire: Wire, reader: Reader) -> None:
    stream = await reader.begin(limiter.wrap(make_openai()))
    await reader.next(stream)
    assert (wire.is_open, in_flight(limiter)) == (True, 1)
    await reader.close(stream)
    assert (wire.is_open, in_flight(limiter)) == (False, 0)


class Censored(OpenAI):
    """A model that ends its reply before the provider does, by a return or by an error."""

    most: int = 2
    breaks: bool

    async def astream_chat(self, *args: Any, **kwargs: Any) -> Any:
        async def stream() -> AsyncGenerator[Any, None]:
            async for item in await super(Censored, self).astream_chat(*args, **kwargs):
                if self._ends():
                    return
                yield item

        return stream()

    def stream_chat(self, *args: Any, **kwargs: Any) -> Any:
        for item in super().stream_chat(*args, **kwargs):
            if self._ends():
                return
            yield item

    def _ends(self) -> bool:
        self.most -= 1
        if self.most < 0 and self.breaks:
            raise ValueError("a bad word")
        return self.most < 0


@pytest.mark.parametrize("breaks", [False, True])
async def test_stream_ended_early_by_model_hangs_up(
    limiter: Limiter, wire: Wire, reader: Reader, *, breaks: bool
) -> None:
    llm = limiter.wrap(Censored(api_key="k", api_base=API_BASE, breaks=breaks))
    with pytest.raises(ValueError, match="a bad word") if breaks else contextlib.nullcontext():
        assert len(await reader.read(llm)) == 2
    assert (wire.is_open, in_flight(limiter)) == (False, 0)


async def test_dropped_stream_hangs_up_without_gc(limiter: Limiter, wire: Wire) -> None:
    async for _ in await limiter.wrap(make_openai()).astream_chat(MESSAGES):
        break
    assert in_flight(limiter) == 0
    for _ in range(5):
        await asyncio.sleep(0)
    assert not wire.is_open


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
async def test_cancelled_call_or_stream_gives_its_slot_back(
    limiter: Limiter, *, streaming: bool
) -> None:
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


async def test_stream_refuses_a_second_concurrent_reader(limiter: Limiter) -> None:
    stream = await limiter.wrap(MockLLM(max_tokens=2)).astream_chat(MESSAGES)
    async with limiter.acquire():
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="is being read already, by another task or thread"):
            await anext(stream)
        with pytest.raises(RuntimeError, match="is being read already"):
            await stream.aclose()
    await first
    assert [item.delta async for item in stream] == ["text"]
    assert (admitted(limiter), in_flight(limiter)) == (2, 0)


async def test_stream_can_be_closed_in_another_context(limiter: Limiter) -> None:
    stream = await limiter.wrap(Slow(max_tokens=None)).astream_chat(MESSAGES)
    step = stream.asend(None)
    copy_context().run(step.send, None)
    assert in_flight(limiter) == 1
    step.close()
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


async def test_stream_is_settled_by_a_usage_that_nobody_else_sees(
    openai_api: ScriptedOpenAI, reader: Reader, instrumentation: Instrumentation
) -> None:
    limiter = Limiter("100k TPM")
    chunks = await reader.read(limiter.wrap(make_openai()))
    assert openai_api.bodies[0]["stream_options"] == {"include_usage": True}
    assert [chunk.delta for chunk in chunks] == ["hello", "there"]
    assert instrumentation.events.count("LLMChatInProgressEvent") == 2
    assert limiter.statistics().limits[0].used == 18


@pytest.mark.parametrize(
    ("of_call", "of_model", "chunks"),
    [({"include_usage": True}, None, 3), (None, {"include_usage": True}, 3), (None, {}, 2)],
    ids=["asked by the call", "asked by the model", "declined by the model"],
)
async def test_stream_shows_usage_as_the_user_asked_for_it(
    openai_api: ScriptedOpenAI, of_call: Any, of_model: Any, chunks: int
) -> None:
    limiter = Limiter("100k TPM")
    given = {} if of_model is None else {"stream_options": of_model}
    llm = limiter.wrap(make_openai(additional_kwargs=given))
    options = {} if of_call is None else {"stream_options": of_call}
    seen: list[Any] = [chunk async for chunk in await llm.astream_chat(MESSAGES, **options)]
    assert openai_api.bodies[0]["stream_options"] == (of_call or of_model)
    assert len(seen) == chunks
    if chunks == 3:
        assert seen[-1].raw.usage.total_tokens == 18
    assert (limiter.statistics().limits[0].used == 18) == (chunks == 3)


async def test_provider_that_refuses_usage_option_is_asked_only_once(
    openai_api: ScriptedOpenAI, reader: Reader
) -> None:
    limiter = Limiter("1000 RPM", concurrency=1)
    llm = limiter.wrap(make_openai())
    openai_api.refuse(400, message="Unrecognized request argument: stream_options")
    for _ in range(2):
        assert len(await reader.read(llm)) == 2
    assert ["stream_options" in body for body in openai_api.bodies] == [True, False, False]
    assert (admitted(limiter), in_flight(limiter)) == (3, 0)


@pytest.mark.parametrize("status", [400, 401])
async def test_stream_rejected_at_first_item_gives_its_slot_back_and_is_not_retried(
    limiter: Limiter, openai_api: ScriptedOpenAI, reader: Reader, status: int
) -> None:
    openai_api.refuse(status)
    with pytest.raises(openai.APIStatusError, match="scripted"):
        await reader.read(limiter.wrap(make_openai()))
    assert (len(openai_api.requests), in_flight(limiter)) == (1, 0)


async def test_call_collecting_a_stream_is_settled_by_its_usage(openai_api: ScriptedOpenAI) -> None:
    class Within(OpenAI):
        async def achat(self, messages: Any, **_: Any) -> Any:
            parts = [part async for part in await self.astream_chat(messages)]
            return ChatResponse(message=parts[-1].message)

        def chat(self, messages: Any, **_: Any) -> Any:
            return ChatResponse(message=list(self.stream_chat(messages))[-1].message)

    limiter = Limiter("100k TPM", concurrency=1)
    llm = limiter.wrap(Within(api_key="k", api_base=API_BASE))
    await llm.achat(MESSAGES)
    await asyncio.to_thread(llm.chat, MESSAGES)
    assert len(openai_api.requests) == admitted(limiter) == 2
    assert (in_flight(limiter), limiter.statistics().limits[0].used) == (0, 2 * 18)


@pytest.mark.usefixtures("openai_api")
async def test_stream_closed_early_stays_charged_as_reserved() -> None:
    limiter = Limiter("100k TPM")
    llm = limiter.wrap(make_openai(), estimator=Estimating(lambda: Estimate(100, 400)))
    stream = await llm.astream_chat(MESSAGES)
    await anext(stream)
    await stream.aclose()
    assert limiter.statistics().limits[0].used == 500
