"""Replies in OpenAI's JSON: chat completions, legacy completions and embeddings, whole or in chunks.

`responses.py` has the newer format. Constant parts are written as text where that saves a pass of
the JSON encoder.
"""

import base64
import functools
import json
import random
import struct
import zlib
from typing import Any

from asyncbucket.testing.provider.model import Reply, ToolCall
from asyncbucket.testing.provider.prompt import EmbeddingPrompt, Prompt

CREATED = 1_735_689_600
"""A constant: replies are the same from run to run."""

PIECES = 8
"""The most pieces in which a text is streamed."""

DIRECTIONS = 1024
"""How many different embeddings there are; a text's checksum chooses one."""

DONE = b"data: [DONE]\n\n"

MODELS = ("gpt-4o-mini", "gpt-4o", "text-embedding-3-small")


def encode(value: object) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


def pieces(text: str) -> list[str]:
    """Cut a text into at most `PIECES` pieces of equal length."""
    step = max(1, -(-len(text) // PIECES))
    return [text[start : start + step] for start in range(0, len(text), step)]


def chat_completion(prompt: Prompt, reply: Reply, *, call_id: str) -> bytes:
    """Write the reply of /chat/completions."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.call:
        message["content"] = None
        message["tool_calls"] = [_tool_call(reply.call, call_id)]
    return encode(
        {
            "id": f"chatcmpl-{call_id}",
            "object": "chat.completion",
            "created": CREATED,
            "model": prompt.model,
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": _finish_reason(reply),
                }
            ],
            "usage": _usage(reply),
        }
    )


def chat_chunks(prompt: Prompt, reply: Reply, *, call_id: str) -> list[bytes]:
    """Write the reply of /chat/completions as server-sent events."""
    head = {
        "id": f"chatcmpl-{call_id}",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": prompt.model,
    }
    usage = {"usage": None} if prompt.include_usage else {}

    def chunk(delta: object, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**head, "choices": [choice], **usage})

    chunks = [chunk({"role": "assistant", "content": None if reply.call else ""})]
    if reply.call:
        first = _tool_call(ToolCall(reply.call.name, ""), call_id)
        chunks.append(chunk({"tool_calls": [{"index": 0, **first}]}))
        chunks += [
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
            for piece in pieces(reply.call.arguments)
        ]
    else:
        chunks += [chunk({"content": piece}) for piece in pieces(reply.text)]
    chunks.append(chunk({}, _finish_reason(reply)))
    if prompt.include_usage:
        chunks.append(_event({**head, "choices": [], "usage": _usage(reply)}))
    return [*chunks, DONE]


def completion(prompt: Prompt, reply: Reply, *, call_id: str) -> bytes:
    """Write the reply of the legacy /completions."""
    return encode(
        {
            **_completion_head(prompt, call_id),
            "choices": [_completion_choice(reply.text, _finish_reason(reply))],
            "usage": _usage(reply),
        }
    )


def completion_chunks(prompt: Prompt, reply: Reply, *, call_id: str) -> list[bytes]:
    """Write the reply of the legacy /completions as server-sent events."""
    head = _completion_head(prompt, call_id)
    texts = [(piece, None) for piece in pieces(reply.text)]
    chunks = [
        _event({**head, "choices": [_completion_choice(text, finish)]})
        for text, finish in [*texts, ("", _finish_reason(reply))]
    ]
    if prompt.include_usage:
        chunks.append(_event({**head, "choices": [], "usage": _usage(reply)}))
    return [*chunks, DONE]


def embeddings(prompt: EmbeddingPrompt, *, dimensions: int) -> bytes:
    """Write the reply of /embeddings: equal texts get equal vectors of length 1."""
    size = prompt.dimensions or dimensions
    items = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}'
        % (index, _vector(zlib.crc32(text.encode()) % DIRECTIONS, size, prompt.base64))
        for index, text in enumerate(prompt.texts)
    )
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (
        items,
        encode(prompt.model),
        encode({"prompt_tokens": prompt.tokens, "total_tokens": prompt.tokens}),
    )


def models() -> bytes:
    """Write the reply of /models."""
    data = [
        {"id": name, "object": "model", "created": CREATED, "owned_by": "asyncbucket"}
        for name in MODELS
    ]
    return encode({"object": "list", "data": data})


@functools.lru_cache(maxsize=2 * DIRECTIONS)
def _vector(direction: int, size: int, as_base64: bool) -> bytes:  # noqa: FBT001 - a cache key
    rng = random.Random(direction)  # noqa: S311 - repeatable, not secret
    numbers = [rng.gauss(0.0, 1.0) for _ in range(size)]
    length = sum(number * number for number in numbers) ** 0.5
    packed = struct.pack(f"<{size}f", *(number / length for number in numbers))
    if as_base64:
        return b'"%b"' % base64.b64encode(packed)
    return encode(struct.unpack(f"<{size}f", packed))


def _event(value: object) -> bytes:
    return b"data: %b\n\n" % encode(value)


def _tool_call(call: ToolCall, call_id: str) -> dict[str, object]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{call_id}", "type": "function", "function": function}


def _finish_reason(reply: Reply) -> str:
    if reply.call:
        return "tool_calls"
    return "length" if reply.truncated else "stop"


def _usage(reply: Reply) -> dict[str, object]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.total_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def _completion_head(prompt: Prompt, call_id: str) -> dict[str, object]:
    return {
        "id": f"cmpl-{call_id}",
        "object": "text_completion",
        "created": CREATED,
        "model": prompt.model,
    }


def _completion_choice(text: str, finish_reason: str | None) -> dict[str, object]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
