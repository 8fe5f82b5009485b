"""Replies in the JSON of each endpoint: whole, or as the events of a stream."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from asyncbucket.testing.provider.prompt import (
    Answer,
    Json,
    from_bedrock,
    from_gemini,
    read_count,
    tokens_of,
)

Chunk: TypeAlias = dict[str, Any]
"""What a stream sends; its type, if it has one, is also the name of the server-sent event."""

CREATED: Final = 1_735_689_600
"""A constant: replies are the same from run to run."""
PIECES: Final = 8
"""The most pieces in which a text is streamed."""
DIMENSIONS: Final = 64
"""Of an embedding, unless the request says how many."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an endpoint that generates text is asked, and how it answers.

    Attributes:
        asked: The member that holds the messages, once the body is `read`.
        whole: Writes a reply, given the answer and the call's number.
        events: Writes the same as a stream's chunks, given the request's body, too.
        read: Brings a body with its path into the form of OpenAI's.
    """

    asked: str
    whole: Callable[[Answer, str], Chunk]
    events: Callable[[Answer, str, Json], list[Chunk]]
    read: Callable[[Json, str], Json] = lambda body, _path: body


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


def _chat(reply: Answer, call_id: str) -> Chunk:
    message: Chunk = {"role": "assistant", "content": reply.text}
    if reply.tool is not None:
        calls = [_tool_call(reply.tool, reply.text, call_id)]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": _finish(reply)}
    head = _chat_head("chat.completion", reply, call_id)
    return {**head, "choices": [choice], "usage": _chat_usage(reply)}


def _chat_events(reply: Answer, call_id: str, body: Json) -> list[Chunk]:
    head = _chat_head("chat.completion.chunk", reply, call_id)
    deltas: list[Chunk] = [{"role": "assistant", "content": None if reply.tool else ""}]
    if reply.tool is not None:
        parts = [{"function": {"arguments": piece}} for piece in _pieces(reply.text)]
        parts = [_tool_call(reply.tool, "", call_id), *parts]
        deltas += [{"tool_calls": [{"index": 0, **part}]} for part in parts]
    else:
        deltas += [{"content": piece} for piece in _pieces(reply.text)]
    choices: list[Chunk] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": _finish(reply)})
    if not (body.get("stream_options") or {}).get("include_usage"):
        return [{**head, "choices": [choice]} for choice in choices]
    chunks = [{**head, "choices": [choice], "usage": None} for choice in choices]
    return [*chunks, {**head, "choices": [], "usage": _chat_usage(reply)}]


def _chat_head(kind: str, reply: Answer, call_id: str) -> Chunk:
    return {"id": f"chatcmpl-{call_id}", "object": kind, "created": CREATED, "model": reply.model}


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
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _response(reply: Answer, call_id: str) -> Chunk:
    """Return one output item, a message or a function call."""
    status = "incomplete" if reply.truncated else "completed"
    if reply.tool is None:
        part = {"type": "output_text", "text": reply.text, "annotations": []}
        item = {"id": f"msg_{call_id}", "type": "message", "role": "assistant", "content": [part]}
    else:
        call = {"call_id": f"call_{call_id}", "name": reply.tool, "arguments": reply.text}
        item = {"id": f"fc_{call_id}", "type": "function_call", **call}
    return {
        "id": f"resp_{call_id}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if reply.truncated else None,
        "model": reply.model,
        "output": [{**item, "status": status}],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": reply.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
    }


def _response_events(reply: Answer, call_id: str, _: Json) -> list[Chunk]:
    whole = _response(reply, call_id)
    (item,) = whole["output"]
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    started = {**item, "status": "in_progress"}
    if reply.tool is None:
        (part,) = item["content"]
        started["content"] = []
        where: Chunk = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        delta: Chunk = {"type": "response.output_text.delta", "logprobs": [], **where}
        head = [{"type": "response.content_part.added", "part": {**part, "text": ""}, **where}]
        tail = [{"type": "response.content_part.done", "part": part, **where}]
    else:
        started["arguments"] = ""
        where = {"item_id": item["id"], "output_index": 0}
        delta = {"type": "response.function_call_arguments.delta", **where}
        head, tail = [], []
    events: list[Chunk] = [
        {"type": "response.created", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": started},
        *head,
        *({**delta, "delta": piece} for piece in _pieces(reply.text)),
        *tail,
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": f"response.{whole['status']}", "response": whole},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _message(reply: Answer, call_id: str) -> Chunk:
    """Return one block of content, a text or the use of a tool."""
    reason = "max_tokens" if reply.truncated else "end_turn"
    content: Chunk = {"type": "text", "text": reply.text}
    if reply.tool is not None:
        reason, content = "tool_use", _tool_use(reply.tool, json.loads(reply.text), call_id)
    usage = {"input_tokens": reply.prompt_tokens, "output_tokens": reply.completion_tokens}
    return {
        "id": f"msg_{call_id}",
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "content": [content],
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _message_events(reply: Answer, call_id: str, _: Json) -> list[Chunk]:
    whole = _message(reply, call_id)
    usage = {**whole["usage"], "output_tokens": 1}
    begun = {**whole, "content": [], "stop_reason": None, "usage": usage}
    pieces = _pieces(reply.text)
    block: Chunk = {"type": "text", "text": ""}
    deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
    if reply.tool is not None:
        block = _tool_use(reply.tool, {}, call_id)
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    end = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    return [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": end,
            "usage": {"output_tokens": reply.completion_tokens},
        },
        {"type": "message_stop"},
    ]


def _tool_use(name: str, given: Json, call_id: str) -> Chunk:
    return {"type": "tool_use", "id": f"toolu_{call_id}", "name": name, "input": given}


def embeddings(body: Json) -> tuple[int, Chunk]:
    """Return the tokens of /embeddings, and its reply: equal texts get equal vectors of length 1.

    Texts may be lists of token ids.
    """
    asked = body["input"]
    texts = [asked] if isinstance(asked, str) or isinstance(asked[0], int) else asked
    tokens = sum(tokens_of(len(text)) if isinstance(text, str) else len(text) for text in texts)
    size = read_count(body, "dimensions") or DIMENSIONS
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(str(text), size)}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return tokens, {"object": "list", "data": data, "model": str(body["model"]), "usage": usage}


def _vector(text: str, size: int) -> list[float]:
    rng = random.Random(text)  # noqa: S311 - repeatable, not secret
    numbers = [rng.gauss(0.0, 1.0) for _ in range(size)]
    length = sum(number * number for number in numbers) ** 0.5
    return [round(number / length, 6) for number in numbers]


def _gemini(reply: Answer, _call_id: str) -> Chunk:
    """Return one candidate, whose thoughts are none."""
    content = {"role": "model", "parts": [{"text": reply.text}]}
    reason = "MAX_TOKENS" if reply.truncated else "STOP"
    return {
        "candidates": [{"content": content, "finishReason": reason, "index": 0}],
        "modelVersion": reply.model,
        "usageMetadata": {
            "promptTokenCount": reply.prompt_tokens,
            "candidatesTokenCount": reply.completion_tokens,
            "totalTokenCount": reply.prompt_tokens + reply.completion_tokens,
        },
    }


def _converse(reply: Answer, _call_id: str) -> Chunk:
    """Return Bedrock's form of a message."""
    message = {"role": "assistant", "content": [{"text": reply.text}]}
    return {
        "output": {"message": message},
        "stopReason": "max_tokens" if reply.truncated else "end_turn",
        "usage": {
            "inputTokens": reply.prompt_tokens,
            "outputTokens": reply.completion_tokens,
            "totalTokens": reply.prompt_tokens + reply.completion_tokens,
        },
        "metrics": {"latencyMs": 1},
    }


def _cohere(reply: Answer, call_id: str) -> Chunk:
    """Return the message of Cohere's second version."""
    usage = {"input_tokens": reply.prompt_tokens, "output_tokens": reply.completion_tokens}
    return {
        "id": call_id,
        "message": {"role": "assistant", "content": [{"type": "text", "text": reply.text}]},
        "finish_reason": "MAX_TOKENS" if reply.truncated else "COMPLETE",
        "usage": {"billed_units": usage, "tokens": usage},
    }


def _no_events(_reply: Answer, _call_id: str, _body: Json) -> list[Chunk]:
    raise ValueError("the provider streams only OpenAI's and Anthropic's formats")


DIALECTS: Final = {
    "generateContent": Dialect("messages", _gemini, _no_events, from_gemini),
    "converse": Dialect("messages", _converse, _no_events, from_bedrock),
    "invoke": Dialect("messages", _message, _no_events, from_bedrock),
    "chat": Dialect("messages", _cohere, _no_events),
    "chat/completions": Dialect("messages", _chat, _chat_events),
    "responses": Dialect("input", _response, _response_events),
    "messages": Dialect("messages", _message, _message_events),
}
