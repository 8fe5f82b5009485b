"""Anthropic's models are paced where they are installed."""

import asyncio
import gc
import importlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel

from asyncbucket import Limiter
from asyncbucket.testing import virtual_time

if TYPE_CHECKING:
    from tests.llama_index.conftest import Serve

anthropic = pytest.importorskip("anthropic")
integration = pytest.importorskip("llama_index.llms.anthropic")
# From 1.0 on the SDK uses httpx2, which is httpx in all that is needed here.
http: Any = importlib.import_module(
    anthropic.APIStatusError.__init__.__annotations__["response"].split(".")[0]
)

MESSAGES = [ChatMessage("hi")]
USAGE = {"input_tokens": 30, "output_tokens": 12}


class Person(BaseModel):
    """What structured prediction fills in."""

    name: str


class ScriptedAnthropic:
    """An Anthropic API that answers everything, after as many refusals as a test asks for."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.refusals = 0

    def answer(self, request: Any) -> Any:
        self.requests.append(body := json.loads(request.content))
        if self.refusals:
            self.refusals -= 1
            error = {"type": "rate_limit_error", "message": "scripted"}
            return http.Response(429, json={"type": "error", "error": error})
        text = '{"name": "Ada"}' if {"output_config", "output_format"} & body.keys() else "hello"
        message = {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": USAGE,
        }
        if not body.get("stream"):
            return http.Response(200, json=message)
        start = {**message, "content": [], "usage": {"input_tokens": 30, "output_tokens": 1}}
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": start},
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "text", "text": ""},
            },
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": text},
            },
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": USAGE},
            {"type": "message_stop"},
        ]
        lines = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]
        return http.Response(
            200, text="".join(lines), headers={"content-type": "text/event-stream"}
        )

    def model(self, **options: Any) -> Any:
        llm = integration.Anthropic(model="claude-sonnet-4-5", api_key="k", **options)
        transport = http.MockTransport(self.answer)
        retries = llm.max_retries
        llm._client = anthropic.Anthropic(
            api_key="k", max_retries=retries, http_client=http.Client(transport=transport)
        )
        llm._aclient = anthropic.AsyncAnthropic(
            api_key="k", max_retries=retries, http_client=http.AsyncClient(transport=transport)
        )
        return llm


@pytest.fixture
def api() -> ScriptedAnthropic:
    return ScriptedAnthropic()


async def test_async_call_is_one_request_admitted_once_and_settled(api: ScriptedAnthropic) -> None:
    limiter = Limiter("100k TPM", concurrency=1)
    llm = limiter.wrap(api.model())

    await llm.achat(MESSAGES)
    await llm.acomplete("hi")
    _ = [chunk async for chunk in await llm.astream_chat(MESSAGES)]
    _ = [chunk async for chunk in await llm.astream_complete("hi")]

    now = limiter.statistics()
    assert (now.admitted, now.in_flight, len(api.requests)) == (4, 0, 4)
    assert now.limits[0].used == 4 * 42


def test_synchronous_call_is_one_request_admitted_once_and_settled(api: ScriptedAnthropic) -> None:
    limiter = Limiter("100k TPM", concurrency=1)
    llm = limiter.wrap(api.model())

    llm.chat(MESSAGES)
    llm.complete("hi")
    _ = list(llm.stream_chat(MESSAGES))
    _ = list(llm.stream_complete("hi"))

    now = limiter.statistics()
    assert (now.admitted, now.in_flight, len(api.requests)) == (4, 0, 4)
    assert now.limits[0].used == 4 * 42


@pytest.mark.filterwarnings("ignore:The 'output_format' parameter:DeprecationWarning")
async def test_structured_prediction_through_sdk_client_is_paced(api: ScriptedAnthropic) -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    llm = limiter.wrap(api.model())
    prompt = PromptTemplate("Name a {thing}.")

    one = await llm.astructured_predict(Person, prompt, thing="star")
    stream = await llm.astream_structured_predict(Person, prompt, thing="star")
    many = [person async for person in stream]
    three = llm.structured_predict(Person, prompt, thing="star")
    four = list(llm.stream_structured_predict(Person, prompt, thing="star"))

    assert {one.name, many[0].name, three.name, four[0].name} == {"Ada"}
    now = limiter.statistics()
    assert (now.admitted, now.in_flight, len(api.requests)) == (4, 0, 4)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_call_is_sent_once_on_each_of_several_event_loops(
    api: ScriptedAnthropic, serve: "Serve", caplog: pytest.LogCaptureFixture
) -> None:
    limiter = Limiter("1000 RPM")

    async def ask() -> None:
        await asyncio.gather(llm.achat(MESSAGES), llm.achat(MESSAGES))
        assert [chunk async for chunk in await llm.astream_chat(MESSAGES)]

    async def hang_up() -> None:
        await llm._aclient.close()

    with serve(api.answer) as url:
        model = integration.Anthropic(model="claude-sonnet-4-5", api_key="k", base_url=url)
        llm = limiter.wrap(model, retry=False)
        for _ in range(3):
            asyncio.run(ask())
        asyncio.run(hang_up())
        gc.collect()

    assert len(api.requests) == limiter.statistics().admitted == 9
    assert not caplog.records


def test_refused_call_makes_five_requests_as_sdk_does_not_retry(api: ScriptedAnthropic) -> None:
    api.refusals = 50
    with virtual_time() as time:
        limiter = Limiter("1000 RPM", clock=time.clock)

        with pytest.raises(anthropic.RateLimitError, match="scripted"):
            time.run(limiter.wrap(api.model()).achat(MESSAGES))

    assert len(api.requests) == 5
