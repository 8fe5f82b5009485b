"""Every request of a model is paced exactly once, whichever method it comes through."""

import asyncio
import contextvars
import math
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import Mock

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.embeddings.mock_embed_model import MockMultiModalEmbedding
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding

from asyncbucket import Limiter, events, telemetry
from asyncbucket.levels import emit
from asyncbucket.llama_index import DefaultEstimator, Estimate, RateLimitWaitEvent
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import (
    API_BASE,
    MESSAGES,
    PROMPT,
    TOOL,
    FakeAPI,
    Instrumentation,
    Person,
    admitted,
    charged,
    in_flight,
    make_anthropic,
    make_azure,
    make_like,
    make_openai,
    make_responses,
    name_of,
)

NAN: Any = math.nan
#: Ten tokens.
USED = {"usage": {"prompt_tokens": 4, "completion_tokens": 6}}
REMOTE: list[Any] = [make_openai, make_responses, make_azure, make_like, make_anthropic]


async def drain(stream: Awaitable[Any]) -> list[Any]:
    return [item async for item in await stream]


ASYNC_CALLS: dict[str, Callable[[LLM], Awaitable[Any]]] = {
    "achat": lambda llm: llm.achat(MESSAGES),
    "acomplete": lambda llm: llm.acomplete("hi"),
    "astream_chat": lambda llm: drain(llm.astream_chat(MESSAGES)),
    "astream_complete": lambda llm: drain(llm.astream_complete("hi")),
}
SYNC_CALLS: dict[str, Callable[[LLM], Any]] = {
    "chat": lambda llm: llm.chat(MESSAGES),
    "complete": lambda llm: llm.complete("hi"),
    "stream_chat": lambda llm: list(llm.stream_chat(MESSAGES)),
    "stream_complete": lambda llm: list(llm.stream_complete("hi")),
}
CALLS = ASYNC_CALLS | SYNC_CALLS


async def make_call(llm: LLM, name: str) -> None:
    reply = CALLS[name](llm)
    if name in ASYNC_CALLS:
        await reply


@pytest.mark.parametrize("make", REMOTE, ids=name_of)
async def test_each_call_is_one_request_admitted_once_and_settled(make: Any, api: FakeAPI) -> None:
    limiter = Limiter("100 RPM", "100k TPM", "50k ITPM", "50k OTPM", concurrency=1)
    llm = limiter.wrap(make())
    for calls, name in enumerate(CALLS, start=1):
        await make_call(llm, name)
        assert (in_flight(limiter), len(api.requests)) == (0, calls)
        assert charged(limiter) == [calls, api.tokens, calls, api.tokens - calls]


async def test_call_through_nested_methods_is_paid_once() -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    llm = limiter.wrap(MockLLM(max_tokens=3))
    for calls, name in enumerate(CALLS, start=1):
        await make_call(llm, name)
        assert (admitted(limiter), in_flight(limiter), charged(limiter)) == (calls, 0, [calls])


@pytest.mark.parametrize("make", [make_openai, make_responses], ids=name_of)
async def test_tools_are_paced(limiter: Limiter, make: Callable[[], Any], api: FakeAPI) -> None:
    llm = limiter.wrap(make())
    await llm.achat_with_tools([TOOL], "hi")
    await drain(llm.astream_chat_with_tools([TOOL], "hi"))
    await asyncio.to_thread(llm.chat_with_tools, [TOOL], "hi")
    await asyncio.to_thread(list, llm.stream_chat_with_tools([TOOL], "hi"))
    assert admitted(limiter) == len(api.requests) == 4


async def test_tool_of_predict_and_call_pays_its_own(limiter: Limiter, api: FakeAPI) -> None:
    llm = limiter.wrap(make_openai())

    async def ask(name: str) -> str:
        return str(await llm.acomplete(name))

    reply = await llm.apredict_and_call([FunctionTool.from_defaults(async_fn=ask)], "hi")
    assert str(reply) == "You said: hi"
    assert admitted(limiter) == len(api.requests) == 2


@pytest.mark.filterwarnings("ignore:The 'output_format' parameter:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [make_openai, lambda: make_openai(model="gpt-4"), make_responses, make_anthropic],
    ids=["json_schema", "function", "OpenAI's own parse", "Anthropic's own parse"],
)
async def test_structures_are_paced(limiter: Limiter, make: Any, api: FakeAPI) -> None:
    llm = limiter.wrap(make())
    given = {"thing": "star", "fn": "f", "model": "m"}
    found = [
        await llm.astructured_predict(Person, PROMPT, **given),
        await asyncio.to_thread(llm.structured_predict, Person, PROMPT, **given),
    ]
    if make is not make_responses:
        found += (await drain(llm.astream_structured_predict(Person, PROMPT, thing="star")))[-1:]
        found += list(llm.stream_structured_predict(Person, PROMPT, thing="star"))[-1:]
    assert {type(each) for each in found} == {Person}
    assert (in_flight(limiter), admitted(limiter)) == (0, len(found))
    assert len(api.requests) == len(found)


@pytest.mark.parametrize("outside", [True, False], ids=["wrapped outside", "wrapped inside"])
async def test_structured_llm_pays(limiter: Limiter, api: FakeAPI, *, outside: bool) -> None:
    llm = make_openai()
    structured = (
        limiter.wrap(llm.as_structured_llm(Person))
        if outside
        else limiter.wrap(llm).as_structured_llm(Person)
    )
    reply = await structured.achat(MESSAGES)
    await drain(structured.astream_chat(MESSAGES))
    await asyncio.to_thread(structured.complete, "hi")
    assert isinstance(reply.raw, Person)
    assert limiter.wrap(structured) is structured
    assert admitted(limiter) == len(api.requests) == 3


@pytest.mark.parametrize("make", [make_openai, make_responses, MockLLM], ids=name_of)
async def test_pacing_adds_no_spans_or_events(
    make: Callable[[], LLM], api: FakeAPI, instrumentation: Instrumentation
) -> None:
    for call in ASYNC_CALLS.values():
        await call(make())
        plain = instrumentation.take()
        await call(Limiter("100 RPM").wrap(make()))
        assert instrumentation.take() == plain
    assert api.requests or make is MockLLM


async def test_wait_is_first(virtual_time: VirtualTime, instrumentation: Instrumentation) -> None:
    limiter = Limiter("2/s burst 1", name="mine", clock=virtual_time.clock)
    llm = limiter.wrap(MockLLM(max_tokens=3))
    of_a_tenant = limiter.key("acme").wrap(MockLLM(max_tokens=3))

    await llm.acomplete("one")
    await llm.acomplete("two")
    await of_a_tenant.acomplete("three")
    waits = [event for event in instrumentation.objects if isinstance(event, RateLimitWaitEvent)]
    assert (waits[0].waited, waits[0].bound_by) == (0.5, "requests")
    assert [each.limiter for each in waits] == ["mine", "mine/*"]  # events name no tenant
    second = instrumentation.events[instrumentation.events.index("RateLimitWaitEvent") :]
    assert second[:2] == ["RateLimitWaitEvent", "LLMCompletionStartEvent"]


def test_refusals_are_told_with_numbers(limiter: Limiter, instrumentation: Instrumentation) -> None:
    common: dict[str, Any] = {"limiter": "default", "at": 1.0}
    refusal: dict[str, Any] = {"reason": "timeout", "bound_by": "tokens", "retry_after": 3.0}
    retry: dict[str, Any] = {"attempt": 1, "error": "HTTP 429", "delay": 2.0}
    pause: dict[str, Any] = {"seconds": 2.0, "reason": "429"}
    waited: dict[str, Any] = {"waited": 1.8, "bound_by": "tokens", "waiting": 0, "in_flight": 1}
    telemetry.llama_index(limiter)
    for event in (
        events.Admitted(**common, cost={}, **waited),  # models report their waits by themselves
        events.Refused(**common, cost={}, **refusal),
        events.Retried(**common, **retry),
        events.Paused(**common, **pause),
        events.Released(**common, cost={}, held=1.0, outcome="ok"),
    ):
        emit(limiter, event)
    own = {"limiter", *refusal, *retry, *pause}
    assert [each.model_dump(include=own) for each in instrumentation.objects] == [
        {"class_name": f"RateLimit{kind}Event", "limiter": "default", **numbers}
        for kind, numbers in (("Refused", refusal), ("Retry", retry), ("Pause", pause))
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((-1, 5), "input_tokens must be finite and not negative, not -1"),
        ((5, NAN, True), "output_tokens must be finite"),
        (None, "down"),
    ],
)
async def test_bad_estimate_sends_nothing(limiter: Limiter, given: Any, said: str) -> None:
    def estimate(*_: object) -> Estimate:
        if given is None:
            raise ConnectionError("down")  # a model's call would be retried after that
        return Estimate(*given)

    llm = limiter.wrap(MockLLM(), estimator=Mock(chat=estimate, completion=estimate))
    for name in ("achat", "astream_chat", "stream_complete"):
        with pytest.raises((ValueError, ConnectionError), match=said) as caught:
            await make_call(llm, name)
        assert not hasattr(caught.value, "__notes__")
    now = limiter.statistics()
    assert (now.admitted, now.upstream_429, now.waiting) == (0, 0, 0)


async def test_messages_added_too_late_are_not_sent(limiter: Limiter, api: FakeAPI) -> None:
    llm = limiter.wrap(make_openai())
    messages = [ChatMessage("one")]
    limiter.observe(lambda _: messages.append(ChatMessage("two")))
    await llm.achat(messages)
    del messages[1:]
    llm.chat(messages)
    assert [len(body["messages"]) for body in api.bodies] == [1, 1]


async def test_task_that_outlives_its_call_pays_for_its_own_calls(limiter: Limiter) -> None:
    other = limiter.wrap(MockLLM(max_tokens=2))
    started: list[contextvars.Context] = []

    class Keeping(MockLLM):
        async def acomplete(self, prompt: str, *_: Any, **__: Any) -> CompletionResponse:
            started.append(contextvars.copy_context())
            return CompletionResponse(text=prompt)

    await limiter.wrap(Keeping(max_tokens=None)).acomplete("hi")
    started[0].run(other.complete, "later")
    assert admitted(limiter) == 2


# --- embeddings: what is in a cache is free ---

TEXTS = [f"text {number}" for number in range(6)]


class OnlySync(BaseEmbedding):
    """The least that users write: asynchronous methods fall back on the synchronous ones."""

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return [float(len(text))]


class Batching(OnlySync):
    """A model with its own batch method, which calls the single one."""

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [self._get_text_embedding(text) for text in texts]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.gather(*map(self._aget_text_embedding, texts))


def openai_embedding(**options: Any) -> OpenAIEmbedding:
    return OpenAIEmbedding(api_key="k", api_base=API_BASE, embed_batch_size=2, **options)


async def test_batch_text_and_query_are_one_admission_and_one_request_each(
    limiter: Limiter, api: FakeAPI, instrumentation: Instrumentation
) -> None:

    async def use(model: BaseEmbedding) -> None:
        await model.aget_text_embedding_batch(TEXTS)
        await asyncio.to_thread(model.get_text_embedding_batch, TEXTS)
        await model.aget_text_embedding("a")
        await model.aget_query_embedding("a")
        await asyncio.to_thread(model.get_text_embedding, "a")
        await asyncio.to_thread(model.get_query_embedding, "a")

    await use(openai_embedding())
    plain = instrumentation.take()
    await use(limiter.wrap(openai_embedding()))
    assert instrumentation.take() == plain
    assert (admitted(limiter), in_flight(limiter)) == (10, 0)
    assert len(api.requests) == 10 * 2


async def test_cached_embeddings_are_free(limiter: Limiter, api: FakeAPI) -> None:
    model = limiter.wrap(openai_embedding(embeddings_cache=SimpleKVStore()))
    for _ in range(2):
        await model.aget_text_embedding_batch(TEXTS)
        await asyncio.to_thread(model.get_text_embedding_batch, TEXTS)
        await model.aget_query_embedding(TEXTS[0])
        assert (admitted(limiter), len(api.requests)) == (3, 3)


async def test_batch_is_settled_by_usage_that_sdk_receives(api: FakeAPI) -> None:
    limiter = Limiter("100k TPM")
    estimator = DefaultEstimator()
    model = limiter.wrap(openai_embedding(), estimator=estimator)
    await model.aget_text_embedding_batch(["öööö"] * 20)
    await asyncio.to_thread(model.get_text_embedding_batch, ["öööö"] * 20)
    assert charged(limiter) == [api.tokens] == [40]  # by bytes it would be 80
    assert estimator.completion(MockLLM(), "hi", {}).output_tokens == 256


@pytest.mark.parametrize(
    ("model", "admissions"),
    [(OnlySync(), 12), (MockEmbedding(embed_dim=2), 12), (Batching(embed_batch_size=2), 6)],
    ids=["inherited", "mock", "own"],
)
async def test_batch_sent_singly_pays_each(limiter: Limiter, model: Any, admissions: int) -> None:
    paced = limiter.wrap(model)
    await paced.aget_text_embedding_batch(TEXTS)
    await asyncio.to_thread(paced.get_text_embedding_batch, TEXTS)
    assert (admitted(limiter), charged(limiter)[0]) == (admissions, 12)


async def test_fallback_to_synchronous_embedding_does_not_block_loop(limiter: Limiter) -> None:
    model = limiter.wrap(OnlySync())
    lease = await limiter.acquire()
    waiting = asyncio.create_task(model.aget_text_embedding("a"))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    lease.release()
    assert await waiting == [1.0]
    assert admitted(limiter) == 2


async def test_images_cost_a_request_each_and_no_tokens(limiter: Limiter) -> None:
    model = limiter.wrap(MockMultiModalEmbedding(embed_dim=2))
    await model.aget_image_embedding("a.png")
    await model.aget_image_embedding_batch(["a.png", "b.png"])
    await asyncio.to_thread(model.get_image_embedding_batch, ["a.png", "b.png"])
    assert charged(limiter) == [5, 0]
