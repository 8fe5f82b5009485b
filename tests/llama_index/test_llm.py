"""Every call of an LLM is paced exactly once, whichever method it comes through."""

import asyncio
import contextvars
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.llms import LLM, CustomLLM, MockLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.tools import FunctionTool

from asyncbucket import Limiter
from asyncbucket.llama_index import Estimate, RateLimitWaitEvent
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import (
    MESSAGES,
    PROMPT,
    Estimating,
    Instrumentation,
    Person,
    ScriptedOpenAI,
    admitted,
    charged,
    in_flight,
    make_azure,
    make_completing_like,
    make_completing_openai,
    make_like,
    make_openai,
    make_responses,
    name_of,
)

ODD: dict[str, Any] = {"nan": math.nan, "nothing": None}
#: Ten tokens.
USED = {"usage": {"prompt_tokens": 4, "completion_tokens": 6}}


class Echo(CustomLLM):
    """A model of a user's own, whose asynchronous methods call the synchronous ones."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    @llm_completion_callback()  # pyright: ignore[reportUntypedFunctionDecorator]  # LlamaIndex's
    def complete(self, prompt: str, *_: Any, **__: Any) -> CompletionResponse:
        return CompletionResponse(text=prompt)

    @llm_completion_callback()  # pyright: ignore[reportUntypedFunctionDecorator]  # LlamaIndex's
    def stream_complete(self, prompt: str, *_: Any, **__: Any) -> CompletionResponseGen:
        def words() -> CompletionResponseGen:
            for word in prompt.split():
                yield CompletionResponse(text=prompt, delta=word)

        return words()


def greet(name: str) -> str:
    return f"hello {name}"


TOOL = FunctionTool.from_defaults(greet)
REMOTE: list[Callable[[], LLM]] = [
    make_openai,
    make_completing_openai,
    make_responses,
    make_azure,
    make_like,
    make_completing_like,
]


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
async def test_each_call_is_one_request_admitted_once_and_settled_by_its_usage(
    make: Callable[[], LLM], openai_api: ScriptedOpenAI
) -> None:
    limiter = Limiter("100 RPM", "100k TPM", "50k ITPM", "50k OTPM", concurrency=1)
    llm = limiter.wrap(make())
    for calls, name in enumerate(CALLS, start=1):
        await make_call(llm, name)
        assert (admitted(limiter), in_flight(limiter), len(openai_api.requests)) == (
            calls,
            0,
            calls,
        )
        assert charged(limiter) == [calls, 18 * calls, 11 * calls, 7 * calls]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "make", [lambda: MockLLM(max_tokens=3), Echo], ids=["MockLLM", "CustomLLM"]
)
async def test_call_through_nested_methods_is_paid_once(make: Callable[[], LLM], name: str) -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    await make_call(limiter.wrap(make()), name)
    assert (admitted(limiter), in_flight(limiter), charged(limiter)) == (1, 0, [1])


async def test_method_making_three_calls_is_charged_for_all_three() -> None:
    class Voting(Echo):
        async def achat(self, *_: Any, **__: Any) -> ChatResponse:
            replies = await asyncio.gather(*(self.acomplete("hi") for _turn in range(3)))
            return ChatResponse(message=ChatMessage(replies[0].text))

        def chat(self, *_: Any, **__: Any) -> ChatResponse:
            replies = [self.complete("hi") for _turn in range(3)]
            return ChatResponse(message=ChatMessage(replies[0].text))

        def complete(self, prompt: str, *_: Any, **__: Any) -> CompletionResponse:
            return CompletionResponse(text=prompt, raw=USED)

    limiter = Limiter("100 RPM", "10k TPM", concurrency=1)
    llm = limiter.wrap(Voting())
    await llm.achat(MESSAGES)
    await asyncio.to_thread(llm.chat, MESSAGES)
    assert (admitted(limiter), charged(limiter)) == (2, [6, 60])


@pytest.mark.parametrize("make", [make_openai, make_responses], ids=name_of)
async def test_tool_calls_are_paced(make: Callable[[], Any], openai_api: ScriptedOpenAI) -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    llm = limiter.wrap(make())
    await llm.achat_with_tools([TOOL], "hi")
    await drain(llm.astream_chat_with_tools([TOOL], "hi"))
    await asyncio.to_thread(llm.chat_with_tools, [TOOL], "hi")
    await asyncio.to_thread(list, llm.stream_chat_with_tools([TOOL], "hi"))
    assert admitted(limiter) == len(openai_api.requests) == 4


async def test_tool_run_by_predict_and_call_pays_its_own_call(openai_api: ScriptedOpenAI) -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    llm = limiter.wrap(make_openai())

    async def ask(name: str) -> str:
        return str(await llm.acomplete(name))

    reply = await llm.apredict_and_call([FunctionTool.from_defaults(async_fn=ask)], "hi")
    assert str(reply) == "hello there"
    assert admitted(limiter) == len(openai_api.requests) == 2


@pytest.mark.parametrize(
    "make",
    [make_openai, lambda: make_openai(model="gpt-4"), make_responses],
    ids=["json_schema", "function", "the SDK's own parse"],
)
async def test_structured_output_is_paced(
    make: Callable[[], Any], openai_api: ScriptedOpenAI
) -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    llm = limiter.wrap(make())
    one = await llm.astructured_predict(Person, PROMPT, thing="star")
    two = await asyncio.to_thread(
        llm.structured_predict, Person, PROMPT, thing="star", fn="f", model="m"
    )
    assert {one.name, two.name} == {"Ada"}
    if make is not make_responses:
        stream = await llm.astream_structured_predict(Person, PROMPT, thing="star")
        three: list[Any] = [person async for person in stream]
        four: list[Any] = await asyncio.to_thread(
            lambda: list(llm.stream_structured_predict(Person, PROMPT, thing="star"))
        )
        assert {three[-1].name, four[-1].name} == {"Ada"}
    assert in_flight(limiter) == 0
    assert admitted(limiter) == len(openai_api.requests) == (2 if make is make_responses else 4)


@pytest.mark.parametrize("outside", [True, False], ids=["wrapped outside", "wrapped inside"])
async def test_structured_llm_is_paced_once(outside: bool, openai_api: ScriptedOpenAI) -> None:  # noqa: FBT001 - a case
    limiter = Limiter("100 RPM", concurrency=1)
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
    assert admitted(limiter) == len(openai_api.requests) == 3


@pytest.mark.parametrize("make", [*REMOTE, Echo], ids=name_of)
async def test_pacing_adds_no_spans_or_events(
    make: Callable[[], LLM], openai_api: ScriptedOpenAI, instrumentation: Instrumentation
) -> None:
    for call in ASYNC_CALLS.values():
        await call(make())
        plain = instrumentation.take()
        await call(Limiter("100 RPM").wrap(make()))
        assert instrumentation.take() == plain
    assert openai_api.requests or make is Echo


async def test_wait_event_is_emitted_before_call_starts(
    virtual_time: VirtualTime, instrumentation: Instrumentation
) -> None:
    limiter = Limiter("2/s burst 1", name="mine", clock=virtual_time.clock)
    llm = limiter.wrap(MockLLM(max_tokens=3))
    of_a_tenant = limiter.key("acme").wrap(MockLLM(max_tokens=3))

    await llm.acomplete("one")
    await llm.acomplete("two")
    await of_a_tenant.acomplete("three")
    waits = [event for event in instrumentation.objects if isinstance(event, RateLimitWaitEvent)]
    first, of_tenant = waits
    assert (first.waited, first.bound_by, first.limiter) == (0.5, "requests", "mine")
    assert of_tenant.limiter == "mine/*"  # events do not say which tenant it was
    second = instrumentation.events[instrumentation.events.index("RateLimitWaitEvent") :]
    assert second[:2] == ["RateLimitWaitEvent", "LLMCompletionStartEvent"]
    with pytest.raises(ValueError, match="frozen"):
        first.waited = 0.0


def fail() -> None:
    error: Any = OSError("down")
    error.status_code = 429
    raise error


@pytest.mark.parametrize(
    ("estimate", "said"),
    [
        (lambda: None, r"<Estimating> returned None; it must return an Estimate"),
        (lambda: (900, 300), r"<Estimating> returned \(900, 300\); it must return an Estimate"),
        (lambda: Estimate(-1, 5), "input_tokens must be finite and not negative, not -1"),
        (lambda: Estimate(5, ODD["nan"], foreseen=True), "output_tokens must be finite"),
        (lambda: Estimate(5, ODD["nothing"]), "output_tokens must be a number, not None"),
        (fail, "down"),
    ],
)
async def test_invalid_or_failed_estimate_fails_the_call_without_sending_or_retry(
    estimate: Callable[[], Any], said: str
) -> None:
    limiter = Limiter("100 RPM")
    llm = limiter.wrap(MockLLM(), estimator=Estimating(estimate))
    for name in CALLS:
        with pytest.raises((TypeError, ValueError, OSError), match=said) as caught:
            await make_call(llm, name)
        assert not hasattr(caught.value, "__notes__")
    now = limiter.statistics()
    assert (now.admitted, now.upstream_429, now.waiting) == (0, 0, 0)


async def test_messages_added_before_admission_are_not_sent(openai_api: ScriptedOpenAI) -> None:
    limiter = Limiter("100 RPM")
    llm = limiter.wrap(make_openai())
    messages = [ChatMessage("one")]
    limiter.observe(lambda _: messages.append(ChatMessage("two")))
    await llm.achat(messages)
    del messages[1:]
    llm.chat(messages)
    assert [len(body["messages"]) for body in openai_api.bodies] == [1, 1]


async def test_task_that_outlives_its_call_pays_for_its_own_calls() -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    other = limiter.wrap(MockLLM(max_tokens=2))
    started: list[contextvars.Context] = []

    class Keeping(MockLLM):
        async def acomplete(self, prompt: str, *_: Any, **__: Any) -> CompletionResponse:
            started.append(contextvars.copy_context())
            return CompletionResponse(text=prompt)

    await limiter.wrap(Keeping(max_tokens=None)).acomplete("hi")
    started[0].run(other.complete, "later")
    assert admitted(limiter) == 2


async def test_call_working_in_own_tasks_and_threads_is_charged_once() -> None:
    limiter = Limiter("100 RPM", concurrency=1)

    class Busy(MockLLM):
        async def achat(self, messages: Sequence[ChatMessage], **_: Any) -> Any:
            first = asyncio.create_task(self.acomplete("one"))
            return await first, await asyncio.to_thread(self.chat, messages)

    await limiter.wrap(Busy(max_tokens=2)).achat(MESSAGES)
    assert admitted(limiter) == 1


async def test_nested_call_of_another_limiters_model_is_charged_to_it() -> None:
    mine, other = Limiter("100 RPM"), Limiter("100 RPM")
    helper = other.wrap(MockLLM(max_tokens=2))

    class Asking(MockLLM):
        async def acomplete(self, prompt: str, *_: Any, **__: Any) -> CompletionResponse:
            reply: CompletionResponse = await helper.acomplete(prompt)
            return reply

    await mine.wrap(Asking(max_tokens=None)).acomplete("hi")
    assert (admitted(mine), admitted(other)) == (1, 1)
