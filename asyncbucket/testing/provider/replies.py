"""Replies in the JSON of each endpoint: whole, or as the events of a stream."""

import base64
import functools
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from asyncbucket.testing.provider.prompt import Answer, Json, Prompt, read_count

Chunk: TypeAlias = dict[str, Any]
"""What a stream sends; its type, if it has one, is also the name of the server-sent event."""
Writer: TypeAlias = Callable[[Prompt, Answer, str], Chunk]

CREATED = 1_735_689_600
"""A constant: replies are the same from run to run."""
PIECES = 8
"""The most pieces in which a text is streamed."""
DIMENSIONS = 64
"""Of an embedding, unless the request says how many."""
DIRECTIONS = 1024
"""How many different embeddings there are; a text's checksum chooses one."""


def as_events(events: Sequence[Chunk]) -> list[bytes]:
    """Write server-sent events; a chat's have no types, and end with [DONE]."""
    if "type" not in events[0]:
        return [*(b"data: %b\n\n" % _encode(event) for event in events), b"data: [DONE]\n\n"]
    return [b"event: %b\ndata: %b\n\n" % (each["type"].encode(), _encode(each)) for each in events]


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _pieces(text: str) -> list[str]:
    step = max(1, -(-len(text) // PIECES))
    return [text[start : start + step] for start in range(0, len(text), step)]


def chat(prompt: Prompt, reply: Answer, call_id: str) -> Chunk:
    """Return the reply of /chat/completions."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.tool is not None:
        calls = [_tool_call(reply.tool, reply.text, call_id)]
        message = {**message, "content": None, "tool_calls": calls}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(reply)}
    head = _chat_head("chat.completion", prompt, call_id)
    return {**head, "choices": [choice], "usage": _chat_usage(reply)}


def chat_events(prompt: Prompt, reply: Answer, call_id: str) -> list[Chunk]:
    """Return the same as chunks."""
    head = _chat_head("chat.completion.chunk", prompt, call_id)
    usage = {"usage": None} if prompt.include_usage else {}

    def chunk(delta: Json, finish_reason: str | None = None) -> Chunk:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice], **usage}

    chunks = [chunk({"role": "assistant", "content": None if reply.tool else ""})]
    if reply.tool is not None:
        first = {"index": 0, **_tool_call(reply.tool, "", call_id)}
        deltas = [{"index": 0, "function": {"arguments": piece}} for piece in _pieces(reply.text)]
        chunks += [chunk({"tool_calls": [delta]}) for delta in (first, *deltas)]
    else:
        chunks += [chunk({"content": piece}) for piece in _pieces(reply.text)]
    chunks.append(chunk({}, _finish(reply)))
    if prompt.include_usage:
        chunks.append({**head, "choices": [], "usage": _chat_usage(reply)})
    return chunks


def _chat_head(kind: str, prompt: Prompt, call_id: str) -> Chunk:
    return {"id": f"chatcmpl-{call_id}", "object": kind, "created": CREATED, "model": prompt.model}


def _tool_call(name: str, arguments: str, call_id: str) -> Chunk:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{call_id}", "type": "function", "function": function}


def _finish(reply: Answer) -> str:
    return "tool_calls" if reply.tool is not None else "length" if reply.truncated else "stop"


def _chat_usage(reply: Answer) -> Json:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def response(prompt: Prompt, reply: Answer, call_id: str) -> Chunk:
    """Return the reply of /responses: one output item, a message or a function call."""
    status = "incomplete" if reply.truncated else "completed"
    if reply.tool is None:
        part = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": []}
        item = {"id": f"msg_{call_id}", "type": "message", "role": "assistant", "content": [part]}
    else:
        call = {"call_id": f"call_{call_id}", "name": reply.tool, "arguments": reply.text}
        item = {"id": f"fc_{call_id}", "type": "function_call", **call}
    return {
        "id": f"resp_{call_id}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if reply.truncated else None,
        "instructions": None,
        "max_output_tokens": prompt.max_tokens,
        "metadata": {},
        "model": prompt.model,
        "output": [{**item, "status": status}],
        "parallel_tool_calls": False,
        "temperature": 1.0,
        "tool_choice": prompt.forced or "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": reply.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
    }


def message(prompt: Prompt, reply: Answer, call_id: str) -> Chunk:
    """Return the reply of Anthropic's /messages: one block of content, a text or the use of a tool."""
    reason = "max_tokens" if reply.truncated else "end_turn"
    content: Chunk = {"type": "text", "text": reply.text}
    if reply.tool is not None:
        reason, content = "tool_use", _tool_use(reply.tool, json.loads(reply.text), call_id)
    begun = _message_begun(prompt, reply, call_id)
    usage = {**begun["usage"], "output_tokens": reply.completion_tokens}
    return {**begun, "content": [content], "stop_reason": reason, "usage": usage}


def message_events(prompt: Prompt, reply: Answer, call_id: str) -> list[Chunk]:
    """Return the same as events."""
    done = message(prompt, reply, call_id)
    block: Chunk = {"type": "text", "text": ""}
    deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(reply.text)]
    if reply.tool is not None:
        block = _tool_use(reply.tool, {}, call_id)
        deltas = [
            {"type": "input_json_delta", "partial_json": piece} for piece in _pieces(reply.text)
        ]
    end = {"stop_reason": done["stop_reason"], "stop_sequence": None}
    usage = {"output_tokens": reply.completion_tokens}
    return [
        {"type": "message_start", "message": _message_begun(prompt, reply, call_id)},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": usage},
        {"type": "message_stop"},
    ]


def _message_begun(prompt: Prompt, reply: Answer, call_id: str) -> Chunk:
    return {
        "id": f"msg_{call_id}",
        "type": "message",
        "role": "assistant",
        "model": prompt.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": reply.prompt_tokens, "output_tokens": 1},
    }


def _tool_use(name: str, given: Json, call_id: str) -> Chunk:
    return {"type": "tool_use", "id": f"toolu_{call_id}", "name": name, "input": given}


def embeddings(model: str, texts: Sequence[str], tokens: int, body: Json) -> Chunk:
    """Return the reply of /embeddings: equal texts get equal vectors of length 1."""
    size = read_count(body, "dimensions") or DIMENSIONS
    in_base64 = body.get("encoding_format") == "base64"
    vectors = [_vector(zlib.crc32(text.encode()) % DIRECTIONS, size, in_base64) for text in texts]
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


@functools.lru_cache(maxsize=2 * DIRECTIONS)
def _vector(direction: int, size: int, in_base64: bool) -> str | tuple[float, ...]:  # noqa: FBT001 - a cache key
    rng = random.Random(direction)  # noqa: S311 - repeatable, not secret
    numbers = [rng.gauss(0.0, 1.0) for _ in range(size)]
    length = sum(number * number for number in numbers) ** 0.5
    packed = struct.pack(f"<{size}f", *(number / length for number in numbers))
    return base64.b64encode(packed).decode() if in_base64 else struct.unpack(f"<{size}f", packed)


#: How each endpoint that generates text replies: whole, and in events if it can be streamed.
WRITERS: dict[str, tuple[Writer, Callable[[Prompt, Answer, str], list[Chunk]] | None]] = {
    "chat/completions": (chat, chat_events),
    "responses": (response, None),
    "messages": (message, message_events),
}
