"""A stream holds its slot from its first item until it ends, however it ends."""

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.llms import MockLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai import OpenAI, OpenAIResponses
from llama_index_instrumentation.dispatcher import instrument_tags
from llama_index_instrumentation.span import active_span_id

from asyncbucket import Limiter
from asyncbucket.llama_index import Estimate, Retry
from asyncbucket.testing import virtual_time

if TYPE_CHECKING:
    from asyncbucket.testing.pytest_plugin import ProviderFactory
    from tests.llama_index.conftest import AsyncReader, Instrumentation, ScriptedOpenAI

API_BASE = "https://llm.test/v1"
MESSAGES = [ChatMessage("one two three")]


def openai_llm(**options: Any) -> OpenAI:
    return OpenAI(model="gpt-4o-mini", api_key="k", api_base=API_BASE, **options)


def in_flight(limiter: Limiter) -> int:
    return limiter.statistics().in_flight


def admitted(limiter: Limiter) -> int:
    return limiter.statistics().admitted


@pytest.fixture
def limiter() -> Limiter:
    return Limiter("1000 RPM", concurrency=1)


async def test_stream_takes_nothing_before_it_is_read(
    limiter: Limiter, reader: "AsyncReader"
) -> None:
    llm = limiter.wrap(MockLLM())
    closed = await reader.begin(llm)
    stream = await reader.begin(llm)
    await reader.close(closed)
    del stream
    gc.collect()

    assert await reader.rest(closed) == []
    assert admitted(limiter) == 0


async def test_stream_holds_its_slot_until_exhaustion(
    limiter: Limiter, reader: "AsyncReader"
) -> None:
    stream = await reader.begin(limiter.wrap(MockLLM(max_tokens=2)))

    assert [bool(await reader.next(stream)), in_flight(limiter)] == [True, 1]
    assert [bool(await reader.next(stream)), in_flight(limiter)] == [True, 1]
    assert [await reader.next(stream), in_flight(limiter)] == [None, 0]
    assert await reader.rest(stream) == []


async def test_closed_stream_gives_its_slot_back(limiter: Limiter, reader: "AsyncReader") -> None:
    stream = await reader.begin(limiter.wrap(MockLLM(max_tokens=3)), "stream_complete", "hi")
    await reader.next(stream)

    await reader.close(stream)
    await reader.close(stream)

    assert in_flight(limiter) == 0
    assert await reader.rest(stream) == []


async def test_dropped_stream_gives_its_slot_back(limiter: Limiter, reader: "AsyncReader") -> None:
    stream = await reader.begin(limiter.wrap(MockLLM(max_tokens=3)))
    await reader.next(stream)
    assert in_flight(limiter) == 1

    del stream
    gc.collect()

    assert in_flight(limiter) == 0


async def test_dropped_stream_of_a_pooled_connection_gives_its_slot_back(
    limiter: Limiter, rate_limited_provider: "ProviderFactory"
) -> None:
    provider = rate_limited_provider(latency=0.5, reply_tokens=10)
    async with httpx.AsyncClient() as client:
        llm = OpenAI(api_key="k", api_base=provider.base_url, async_http_client=client)
        stream = await limiter.wrap(llm).astream_chat(MESSAGES)
        await anext(stream)
        assert in_flight(limiter) == 1

        del stream
        gc.collect()

        assert in_flight(limiter) == 0


@pytest.mark.parametrize("failure", ["refused", "broken", "cut off"])
async def test_dropped_stream_after_retry_gives_its_slot_back_at_once(
    limiter: Limiter,
    openai_api: "ScriptedOpenAI",
    refusal: Callable[..., httpx.Response],
    failure: str,
    reader: "AsyncReader",
) -> None:
    first: dict[str, httpx.Response | Exception] = {
        "refused": refusal(429, {"retry-after-ms": "1"}),
        "broken": refusal(500),
        "cut off": httpx.ReadError("cut"),
    }
    openai_api.script.append(first[failure])
    gc.disable()
    try:
        stream = await reader.begin(limiter.wrap(openai_llm(), retry=Retry(backoff=0.001)))
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
def wire(openai_api: "ScriptedOpenAI") -> Generator[Wire]:
    wire = Wire()
    headers = {"content-type": "text/event-stream"}
    openai_api.script.append(httpx.Response(200, headers=headers, stream=wire))
    gc.disable()
    yield wire
    gc.enable()


async def test_closing_stream_hangs_up_at_once(
    limiter: Limiter, wire: Wire, reader: "AsyncReader"
) -> None:
    stream = await reader.begin(limiter.wrap(openai_llm()))
    await reader.next(stream)
    assert (wire.is_open, in_flight(limiter)) == (True, 1)

    await reader.close(stream)

    assert (wire.is_open, in_flight(limiter)) == (False, 0)


class Censored(OpenAI):
    """A model that ends its reply before the provider does, by a return or by an error."""

    most: int
    breaks: bool

    async def astream_chat(self, *args: Any, **kwargs: Any) -> Any:
        async def stream() -> AsyncGenerator[Any, None]:
            async for item in await super(Censored, self).astream_chat(*args, **kwargs):
                if not self._ends():
                    yield item
                else:
                    return

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


def censored(*, most: int, breaks: bool) -> Censored:
    return Censored(model="gpt-4o", api_key="k", api_base=API_BASE, most=most, breaks=breaks)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("most", [0, 2])
async def test_stream_ended_early_by_model_hangs_up(
    limiter: Limiter, wire: Wire, reader: "AsyncReader", *, most: int, breaks: bool
) -> None:
    llm = limiter.wrap(censored(most=most, breaks=breaks))

    with pytest.raises(ValueError, match="a bad word") if breaks else contextlib.nullcontext():
        assert len(await reader.read(llm)) == most

    assert (wire.is_open, in_flight(limiter)) == (False, 0)


async def test_asynchronous_stream_over_a_synchronous_one_hangs_up(
    limiter: Limiter, wire: Wire
) -> None:
    class Over(OpenAI):
        async def astream_chat(self, *args: Any, **kwargs: Any) -> Any:
            async def stream() -> AsyncGenerator[Any, None]:
                for item in super(Over, self).stream_chat(*args, **kwargs):
                    yield item

            return stream()

    llm = limiter.wrap(Over(model="gpt-4o", api_key="k", api_base=API_BASE))
    stream = await llm.astream_chat(MESSAGES)
    await anext(stream)
    await stream.aclose()

    assert (wire.is_open, in_flight(limiter)) == (False, 0)


async def test_dropped_stream_hangs_up_without_gc(limiter: Limiter, wire: Wire) -> None:
    async for _ in await limiter.wrap(openai_llm()).astream_chat(MESSAGES):
        break
    assert in_flight(limiter) == 0

    for _ in range(5):
        await asyncio.sleep(0)

    assert not wire.is_open


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("wire")
def test_stream_dropped_after_its_loop_closed_gives_its_slot_back(limiter: Limiter) -> None:
    kept = []

    async def begin() -> None:
        kept.append(await limiter.wrap(openai_llm()).astream_chat(MESSAGES))
        await anext(kept[0])

    asyncio.run(
        begin()
    )  # it closes all generators in the end, but older SDKs' connections stay open
    assert in_flight(limiter) == 1
    kept.clear()

    assert in_flight(limiter) == 0
    gc.collect()


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


async def test_broken_stream_gives_its_slot_back_and_is_not_retried(
    limiter: Limiter, reader: "AsyncReader"
) -> None:
    stream = await reader.begin(limiter.wrap(Breaking(max_tokens=None)))
    await reader.next(stream)
    with pytest.raises(ConnectionError, match="reset"):
        await reader.next(stream)

    assert (admitted(limiter), in_flight(limiter)) == (1, 0)
    assert await reader.rest(stream) == []


class Slow(MockLLM):
    """A model that says nothing for an hour."""

    async def astream_chat(self, *_: Any, **__: Any) -> Any:
        async def stream() -> AsyncGenerator[str, None]:
            await asyncio.sleep(3600)
            yield "late"

        return stream()


async def test_cancelled_stream_gives_its_slot_back(limiter: Limiter) -> None:
    async def read() -> None:
        async for _ in await limiter.wrap(Slow(max_tokens=None)).astream_chat(MESSAGES):
            pass

    task = asyncio.create_task(read())
    for _ in range(5):  # to the sleep in the stream
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


def test_synchronous_stream_refuses_use_while_being_read(limiter: Limiter) -> None:
    inside: list[Any] = []

    class Curious(MockLLM):
        def stream_chat(self, *_: Any, **__: Any) -> Any:
            with pytest.raises(RuntimeError, match="is being read already"):
                inside[0].close()
            yield "a"

    inside.append(limiter.wrap(Curious(max_tokens=None)).stream_chat(MESSAGES))

    assert list(inside[0]) == ["a"]
    assert (admitted(limiter), in_flight(limiter)) == (1, 0)


async def test_stream_can_be_closed_in_another_context(limiter: Limiter) -> None:
    stream = await limiter.wrap(Slow(max_tokens=None)).astream_chat(MESSAGES)
    step = stream.asend(None)
    copy_context().run(step.send, None)
    assert in_flight(limiter) == 1

    step.close()

    assert in_flight(limiter) == 0


@pytest.mark.parametrize("error", [(KeyError("mine"),), (KeyError,), (KeyError, KeyError("mine"))])
async def test_thrown_error_ends_the_stream(
    limiter: Limiter, reader: "AsyncReader", error: Any
) -> None:
    stream = await reader.begin(limiter.wrap(MockLLM(max_tokens=3)))
    await reader.next(stream)

    with pytest.raises(KeyError):
        await reader.throw(stream, *error)

    assert in_flight(limiter) == 0


async def test_consumers_calls_between_stream_items_are_charged(limiter: Limiter) -> None:
    limiter = Limiter("1000 RPM", concurrency=2)
    llm = limiter.wrap(MockLLM(max_tokens=2))
    async for _ in await llm.astream_chat(MESSAGES):
        await llm.acomplete("aside")

    assert admitted(limiter) == 1 + 2


async def test_stream_can_be_read_by_several_tasks_in_turn(limiter: Limiter) -> None:
    stream = await limiter.wrap(MockLLM(max_tokens=3)).astream_chat(MESSAGES)

    async def step() -> Any:
        return (await anext(stream)).delta

    items = [await asyncio.create_task(step()) for _ in range(3)]

    assert items == ["text ", "text ", "text"]
    with pytest.raises(StopAsyncIteration):
        await asyncio.create_task(anext(stream))
    assert in_flight(limiter) == 0


async def test_stream_span_has_its_callers_span_as_parent(
    limiter: Limiter, instrumentation: "Instrumentation"
) -> None:
    token = active_span_id.set("the caller")
    stream = await limiter.wrap(MockLLM(max_tokens=2)).astream_chat(MESSAGES)
    active_span_id.reset(token)

    await anext(stream)

    assert instrumentation.parents[0] == "the caller"
    assert active_span_id.get() is None


def test_stream_events_carry_tags_and_span_of_caller(instrumentation: "Instrumentation") -> None:
    with virtual_time() as time:
        limiter = Limiter("1/s burst 1", clock=time.clock)
        llm = limiter.wrap(MockLLM(max_tokens=2))

        async def main() -> None:
            limiter.acquire_nowait().release()
            token = active_span_id.set("the caller")
            with instrument_tags({"user": "ada"}):
                stream = await llm.astream_chat(MESSAGES)
            active_span_id.reset(token)
            with instrument_tags({"user": "bob"}):
                assert len([item async for item in stream]) == 2

        time.run(main())

    names = [event.class_name() for event in instrumentation.objects]
    assert names[:2] == ["RateLimitWaitEvent", "LLMChatStartEvent"]
    assert instrumentation.objects[0].span_id == "the caller"
    assert [event.tags for event in instrumentation.objects] == [{"user": "ada"}] * len(names)


async def test_stream_is_settled_by_a_usage_that_nobody_else_sees(
    openai_api: "ScriptedOpenAI", reader: "AsyncReader", instrumentation: "Instrumentation"
) -> None:
    limiter = Limiter("100k TPM")

    chunks = await reader.read(limiter.wrap(openai_llm()))

    assert openai_api.bodies[0]["stream_options"] == {"include_usage": True}
    assert [chunk.delta for chunk in chunks] == ["hello", "there"]
    assert instrumentation.events.count("LLMChatInProgressEvent") == 2
    assert limiter.statistics().limits[0].used == 18


@pytest.mark.parametrize(
    "where", ["call", "model"], ids=["asked by the call", "asked by the model"]
)
@pytest.mark.usefixtures("openai_api")
async def test_stream_passes_on_usage_that_user_requested(where: str) -> None:
    option = {"stream_options": {"include_usage": True}}
    limiter = Limiter("100k TPM")
    llm = limiter.wrap(openai_llm(additional_kwargs=option if where == "model" else {}))

    stream = await llm.astream_chat(MESSAGES, **(option if where == "call" else {}))
    chunks: list[Any] = [chunk async for chunk in stream]

    assert len(chunks) == 3
    assert chunks[-1].raw.usage.total_tokens == 18
    assert limiter.statistics().limits[0].used == 18


async def test_stream_does_not_request_usage_that_user_declined(
    openai_api: "ScriptedOpenAI",
) -> None:
    limiter = Limiter("100k TPM")
    llm = limiter.wrap(openai_llm(additional_kwargs={"stream_options": {}}))

    _ = [chunk async for chunk in await llm.astream_chat(MESSAGES)]

    assert openai_api.bodies[0]["stream_options"] == {}
    assert limiter.statistics().limits[0].used > 18


async def test_provider_that_refuses_usage_option_is_asked_only_once(
    openai_api: "ScriptedOpenAI", refusal: Callable[..., httpx.Response], reader: "AsyncReader"
) -> None:
    limiter = Limiter("1000 RPM", concurrency=1)
    llm = limiter.wrap(openai_llm())
    openai_api.script = [refusal(400, message="Unrecognized request argument: stream_options")]

    for _ in range(2):
        assert len(await reader.read(llm)) == 2

    assert ["stream_options" in body for body in openai_api.bodies] == [True, False, False]
    assert (admitted(limiter), in_flight(limiter)) == (3, 0)


async def test_other_bad_request_is_raised_without_retry(
    limiter: Limiter, openai_api: "ScriptedOpenAI", refusal: Callable[..., httpx.Response]
) -> None:
    openai_api.script = [refusal(400)]

    with pytest.raises(openai.BadRequestError, match="scripted"):
        await anext(await limiter.wrap(openai_llm()).astream_chat(MESSAGES))

    assert len(openai_api.requests) == 1


async def test_responses_stream_settles_without_usage_option(openai_api: "ScriptedOpenAI") -> None:
    limiter = Limiter("100k TPM")
    llm = limiter.wrap(OpenAIResponses(model="gpt-4o-mini", api_key="k", api_base=API_BASE))

    chunks = [chunk async for chunk in await llm.astream_chat(MESSAGES)]

    assert "stream_options" not in openai_api.bodies[0]
    assert len(chunks) == 2
    assert limiter.statistics().limits[0].used == 18


async def test_stream_made_from_a_plain_call_is_settled_by_its_usage(
    openai_api: "ScriptedOpenAI",
) -> None:
    class Pretending(OpenAI):
        async def astream_chat(self, messages: Any, **_: Any) -> Any:
            async def stream() -> AsyncGenerator[ChatResponse, None]:
                yield ChatResponse(message=(await self.achat(messages)).message)

            return stream()

    limiter = Limiter("100k TPM")
    llm = limiter.wrap(Pretending(model="gpt-4o-mini", api_key="k", api_base=API_BASE))

    assert len([item async for item in await llm.astream_chat(MESSAGES)]) == 1

    assert len(openai_api.requests) == 1
    assert limiter.statistics().limits[0].used == 18


async def test_call_collecting_stream_is_settled_by_its_usage(openai_api: "ScriptedOpenAI") -> None:
    class Within(OpenAIResponses):
        async def achat(self, messages: Any, **_: Any) -> Any:
            parts = [part async for part in await self.astream_chat(messages)]
            return ChatResponse(message=parts[-1].message)

        def chat(self, messages: Any, **_: Any) -> Any:
            return ChatResponse(message=list(self.stream_chat(messages))[-1].message)

        async def astream_structured_predict(self, *_: Any, **__: Any) -> Any:
            stream = await self.astream_complete("one")
            return (part.delta async for part in stream)

        def stream_structured_predict(self, *_: Any, **__: Any) -> Any:
            return (part.delta for part in self.stream_complete("one"))

    limiter = Limiter("100k TPM", concurrency=1)
    options: dict[str, Any] = {"model": "gpt-4o-mini", "api_key": "k", "api_base": API_BASE}
    llm = limiter.wrap(Within(**options))
    prompt = PromptTemplate("one")

    await llm.achat(MESSAGES)
    await asyncio.to_thread(llm.chat, MESSAGES)
    async for _ in await llm.astream_structured_predict(ChatMessage, prompt):
        pass
    assert list(llm.stream_structured_predict(ChatMessage, prompt))

    assert len(openai_api.requests) == admitted(limiter) == 4
    assert (in_flight(limiter), limiter.statistics().limits[0].used) == (0, 4 * 18)


@pytest.mark.usefixtures("openai_api")
async def test_stream_closed_early_stays_charged_as_reserved() -> None:
    class Fixed:
        def chat(self, *_: Any) -> Estimate:
            return Estimate(input_tokens=100, output_tokens=400)

    limiter = Limiter("100k TPM")
    llm = limiter.wrap(openai_llm(), estimator=Fixed())
    stream = await llm.astream_chat(MESSAGES)
    await anext(stream)

    await stream.aclose()

    assert limiter.statistics().limits[0].used == 500


def test_stream_refused_with_429_at_first_item_is_retried(
    openai_api: "ScriptedOpenAI", refusal: Callable[..., httpx.Response]
) -> None:
    openai_api.script = [refusal(429, {"retry-after": "2"})]
    with virtual_time() as time:
        limiter = Limiter("1000 RPM", concurrency=1, clock=time.clock)

        async def main() -> int:
            stream = await limiter.wrap(openai_llm()).astream_chat(MESSAGES)
            return len([chunk async for chunk in stream])

        assert time.run(main()) == 2
        assert 2.0 <= time.now <= 2.3

    assert len(openai_api.requests) == 2
    assert (admitted(limiter), in_flight(limiter)) == (2, 0)


async def test_stream_that_fails_at_first_item_gives_its_slot_back(
    limiter: Limiter,
    openai_api: "ScriptedOpenAI",
    refusal: Callable[..., httpx.Response],
    reader: "AsyncReader",
) -> None:
    openai_api.script = [refusal(401)]

    with pytest.raises(openai.AuthenticationError):
        await reader.read(limiter.wrap(openai_llm()))

    assert in_flight(limiter) == 0
