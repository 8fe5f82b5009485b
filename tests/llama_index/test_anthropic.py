"""Anthropic's models are paced where they are installed."""

import importlib
import json
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import (
    MESSAGES,
    PROMPT,
    Person,
    Reader,
    admitted,
    charged,
    in_flight,
)

anthropic = pytest.importorskip("anthropic")
integration = pytest.importorskip("llama_index.llms.anthropic")
# From 1.0 on the SDK uses httpx2, which is httpx in all that is needed here.
http: Any = importlib.import_module(
    anthropic.APIStatusError.__init__.__annotations__["response"].split(".")[0]
)

USAGE = {"input_tokens": 30, "output_tokens": 12}


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
            {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}},
            {"type": "content_block_stop"},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": USAGE},
            {"type": "message_stop"},
        ]
        lines = [f"event: {e['type']}\ndata: {json.dumps({'index': 0, **e})}\n\n" for e in events]
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


async def test_each_call_is_one_request_admitted_once_and_settled(
    api: ScriptedAnthropic, reader: Reader
) -> None:
    limiter = Limiter("100k TPM", concurrency=1)
    llm = limiter.wrap(api.model())
    await reader.call(llm.achat, llm.chat, MESSAGES)
    await reader.call(llm.acomplete, llm.complete, "hi")
    await reader.read(llm)
    await reader.read(llm, "stream_complete", "hi")
    assert admitted(limiter) == len(api.requests) == 4
    assert (in_flight(limiter), charged(limiter)) == (0, [4 * 42])


@pytest.mark.filterwarnings("ignore:The 'output_format' parameter:DeprecationWarning")
async def test_structured_prediction_through_sdk_client_is_paced(api: ScriptedAnthropic) -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    llm = limiter.wrap(api.model())
    one = await llm.astructured_predict(Person, PROMPT, thing="star")
    stream = await llm.astream_structured_predict(Person, PROMPT, thing="star")
    many = [person async for person in stream]
    three = llm.structured_predict(Person, PROMPT, thing="star")
    four = list(llm.stream_structured_predict(Person, PROMPT, thing="star"))
    assert {one.name, many[0].name, three.name, four[0].name} == {"Ada"}
    assert admitted(limiter) == len(api.requests) == 4
    assert in_flight(limiter) == 0


def test_refused_call_makes_five_requests_as_sdk_does_not_retry(
    api: ScriptedAnthropic, virtual_time: VirtualTime
) -> None:
    api.refusals = 50
    limiter = Limiter("1000 RPM", clock=virtual_time.clock)
    with pytest.raises(anthropic.RateLimitError, match="scripted"):
        virtual_time.run(limiter.wrap(api.model()).achat(MESSAGES))
    assert len(api.requests) == 5
