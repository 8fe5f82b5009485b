"""Calls are settled by their usage in every provider's own format."""

import base64
from typing import Any

import pytest

from asyncbucket import Limiter
from tests.http.conftest import answering, client_over, used

MESSAGES = [{"role": "user", "content": "x" * 400}]
WHOLE = {"model": "m", "messages": MESSAGES, "max_tokens": 300}


#: What Cohere bills, and, beside it, what its limits count.
COHERE = (
    '{"billed_units":{"input_tokens":80,"output_tokens":5},'
    '"tokens":{"input_tokens":90,"output_tokens":7}}'
)
HI = '"message":{"role":"assistant","content":[{"type":"text","text":"Hi."}]}'
OLLAMA_END = '"done":true,"prompt_eval_count":90,"prompt_eval_duration":1,"eval_count":7'
TEXT = "x" * 400
TURN = {"role": "user", "parts": [{"text": TEXT}]}
GEMINI = {"contents": [TURN], "generationConfig": {"maxOutputTokens": 300}}
GEMINI_USAGE = (
    '"usageMetadata":{"promptTokenCount":90,"candidatesTokenCount":3,"thoughtsTokenCount":4,'
    '"totalTokenCount":97}'
)
CONVERSE = {
    "messages": [{"role": "user", "content": [{"text": TEXT}]}],
    "inferenceConfig": {"maxTokens": 300},
}
#: What is read from the cache counts in the total alone.
CONVERSE_USAGE = (
    '"usage":{"inputTokens":90,"cacheReadInputTokens":500,"outputTokens":7,"totalTokens":597}'
)
MODEL = "/model/us.anthropic.claude-sonnet-4-5-20250929-v1:0"
#: An event of Bedrock's has binary headers.
EVENT = "\0\0\1\r:event-type\7\0"


def packed(event: str) -> str:
    """Return an event of Anthropic's as Bedrock sends it."""
    return f'{EVENT}{{"bytes":"{base64.b64encode(event.encode()).decode()}","p":"abc"}}'


#: The path, the body, and the answer: 100 tokens are sent, of which the provider counts 90; up to
#: 300 are asked for, and 7 come, except from embeddings. docs.litellm.ai/docs/completion/usage,
#: docs.cohere.com/v2/reference/chat-stream and /embed, /v1/reference/chat, docs.ollama.com/api/chat,
#: /generate and /embed; ai.google.dev/api/generate-content; docs.aws.amazon.com/bedrock/latest/APIReference,
#: Converse, ConverseStream and InvokeModelWithResponseStream; read in 2026.
FORMATS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a stream of LiteLLM": (
        "/chat/completions",
        {**WHOLE, "stream": True, "stream_options": {"include_usage": True}},
        (
            'data: {"choices":[{"index":0,"delta":{"content":"Say \\"usage\\": {."}}]}\n\n'
            'data: {"choices":[{"index":0,"delta":{}}],'
            '"usage":{"completion_tokens":7,"prompt_tokens":90,"total_tokens":97}}\n\n'
            "data: [DONE]\n\n"
        ),
    ),
    "a stream of OpenAI's responses": (
        "/v1/responses",
        {"input": TEXT, "max_output_tokens": 300, "stream": True},
        (
            'event: response.output_text.delta\ndata: {"delta":"a \\"usage\\": {"}\n\n'
            'event: response.completed\ndata: {"type":"response.completed","response":'
            '{"usage":{"input_tokens":90,"output_tokens":7,"total_tokens":97}}}\n\n'
        ),
    ),
    "a reply of Cohere": ("/v2/chat", WHOLE, f'{{"id":"1",{HI},"usage":{COHERE}}}'),
    "a stream of Cohere": (
        "/v2/chat",
        {**WHOLE, "stream": True},
        (
            'event: content-delta\ndata: {"type":"content-delta","delta":{"text":"a \\"usage\\": {"}}\n\n'
            f'event: message-end\ndata: {{"type":"message-end","delta":{{"usage":{COHERE}}}}}\n\n'
        ),
    ),
    "a reply of Cohere's first version": (
        "/v1/chat",
        {"message": "x" * 200, "chat_history": [{"message": "x" * 200}], "max_tokens": 300},
        f'{{"text":"Hi.","finish_reason":"COMPLETE","meta":{COHERE}}}',
    ),
    "a stream of Cohere's first version": (
        "/v1/chat",
        {"message": TEXT, "max_tokens": 300, "stream": True},
        (
            '{"event_type":"text-generation","text":"a \\"meta\\": {"}\n'
            f'{{"event_type":"stream-end","response":{{"text":"Hi.","meta":{COHERE}}}}}\n'
        ),
    ),
    "embeddings of Cohere": (
        "/v2/embed",
        {"model": "m", "texts": [TEXT], "input_type": "search_document"},
        '{"embeddings":{"float":[[0.5,0.5]]},"meta":{"billed_units":{"input_tokens":90}}}',
    ),
    "a stream of Ollama": (
        "/api/chat",
        {"model": "m", "messages": MESSAGES, "options": {"num_predict": 300}},
        (
            '{"message":{"content":"a \\"eval_count\\": 9,"},"done":false}\n'
            f'{{"message":{{"content":""}},{OLLAMA_END},"eval_duration":4}}\n'
        ),
    ),
    "a reply of Ollama": (
        "/api/generate",
        {"model": "m", "prompt": TEXT, "stream": False, "options": {"num_predict": 300}},
        f'{{"response":"Hi.","context":{list(range(30_000))},{OLLAMA_END}}}\n',
    ),
    "a reply of Gemini": (
        "/v1beta/models/gemini-3-flash:generateContent",
        GEMINI,
        f'{{"candidates":[{{"finishReason":"STOP"}}],{GEMINI_USAGE}}}',
    ),
    "a stream of Gemini": (
        "/v1beta/models/gemini-3-flash:streamGenerateContent",
        GEMINI,
        (
            'data: {"candidates":[{"content":{"parts":[{"text":"a \\"usage\\": {"}]}}]}\n\n'
            f'data: {{"candidates":[{{"finishReason":"STOP"}}],{GEMINI_USAGE}}}\n\n'
        ),
    ),
    "embeddings of Gemini": (
        "/v1beta/models/gemini-embedding-001:embedContent",
        {"content": {"parts": [{"text": TEXT}]}},
        '{"embedding":{"values":[0.5]},"usageMetadata":{"promptTokenCount":90}}',
    ),
    "a reply of Bedrock": (
        f"{MODEL}/converse",
        CONVERSE,
        f'{{"output":{{}},"stopReason":"end_turn",{CONVERSE_USAGE}}}',
    ),
    "a stream of Bedrock": (
        f"{MODEL}/converse-stream",
        CONVERSE,
        f'{EVENT}{{"stopReason":"end_turn"}}{EVENT}{{"metrics":{{}},{CONVERSE_USAGE}}}',
    ),
    "a long stream of Anthropic": (
        "/v1/messages",
        {**WHOLE, "stream": True},
        (
            'data: {"message":{"usage":{"input_tokens":90,"output_tokens":1}}}\n\n'
            + 'data: {"type":"content_block_delta","delta":{"text":"blue"}}\n\n' * 2_000
            + 'data: {"type":"message_delta","usage":{"output_tokens":7}}\n\n'
            'data: {"type":"message_stop"}\n\n'
        ),
    ),
    "a stream of Anthropic's inside Bedrock's": (
        f"{MODEL}/invoke-with-response-stream",
        {"messages": MESSAGES, "max_tokens": 300, "anthropic_version": "bedrock-2023-05-31"},
        (
            packed(
                '{"type":"message_start","message":{"usage":{"input_tokens":90,"output_tokens":1}}}'
            )
            + packed('{"type":"message_delta","usage":{"output_tokens":7}}')
            + packed('{"type":"message_stop"}')
        ),
    ),
    "embeddings of Ollama": (
        "/api/embed",
        {"model": "m", "input": [TEXT]},
        f'{{"model":"m","embeddings":{[[0.5] * 20_000]},"prompt_eval_count":90}}\n',
    ),
}


def counted(limiter: Limiter) -> tuple[int, int]:
    return used(limiter, "input_tokens"), used(limiter, "output_tokens")


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("name", "ends"),
    [*((name, True) for name in FORMATS), *((name, False) for name in FORMATS if "stream" in name)],
)
async def test_call_is_settled_from_usage_once_it_was_read(
    library: Any, name: str, *, ends: bool, cut: bool
) -> None:
    """Clients read a stream no further than the event that ends it, though the reply may go on."""
    path, body, answer = FORMATS[name]
    if cut:
        at = answer.find('"bytes"') if "inside" in name else answer.index("90") + 1
        answer = answer[:at]  # half a number is none
    data = answer.encode()
    pieces = [data[at : at + 50] for at in range(0, len(data), 50)]
    limiter = Limiter("10k ITPM", "10k OTPM")
    reserved = (100, 0 if "embeddings" in name else 300)
    answers = answering(library, *pieces, *([] if ends else [b"\n"]))
    async with (
        client_over(library, limiter, answers) as client,
        client.stream("POST", f"http://llm.test{path}", json=body) as reply,
    ):
        assert counted(limiter) == reserved
        seen = b""
        async for chunk in reply.aiter_raw():
            seen += chunk
            if not ends and len(seen) == len(data):
                break
    assert counted(limiter) == (reserved if cut else (90, min(reserved[1], 7)))
