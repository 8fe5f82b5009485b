"""Replies of OpenAI's /responses: one output item, a message or a function call, whole or in events."""

from typing import Any

from asyncbucket.testing.provider.model import Reply
from asyncbucket.testing.provider.prompt import Prompt
from asyncbucket.testing.provider.wire import CREATED, encode, pieces


def response(prompt: Prompt, reply: Reply, *, call_id: str) -> bytes:
    """Write the reply of /responses."""
    item = _item(reply, call_id, done=True)
    return encode(_response(prompt, call_id, reply=reply, output=[item]))


def response_events(prompt: Prompt, reply: Reply, *, call_id: str) -> list[bytes]:
    """Write the reply of /responses as server-sent events."""
    in_progress = {"response": _response(prompt, call_id)}
    item = _item(reply, call_id, done=True)
    final = {"response": _response(prompt, call_id, reply=reply, output=[item])}
    events: list[tuple[str, dict[str, Any]]] = [
        ("response.created", in_progress),
        ("response.in_progress", in_progress),
        ("response.output_item.added", _with_output_index(item=_item(reply, call_id, done=False))),
        *(_call_events(reply, call_id) if reply.call else _text_events(reply, call_id)),
        ("response.output_item.done", _with_output_index(item=item)),
        ("response.incomplete" if reply.truncated else "response.completed", final),
    ]
    return [
        b"event: %b\ndata: %b\n\n"
        % (event_type.encode(), encode({"type": event_type, "sequence_number": number, **fields}))
        for number, (event_type, fields) in enumerate(events)
    ]


def _text_events(reply: Reply, call_id: str) -> list[tuple[str, dict[str, Any]]]:
    location = _with_output_index(item_id=f"msg_{call_id}", content_index=0)
    return [
        ("response.content_part.added", {**location, "part": _part("")}),
        *(
            ("response.output_text.delta", {**location, "delta": piece, "logprobs": []})
            for piece in pieces(reply.text)
        ),
        ("response.output_text.done", {**location, "text": reply.text, "logprobs": []}),
        ("response.content_part.done", {**location, "part": _part(reply.text)}),
    ]


def _call_events(reply: Reply, call_id: str) -> list[tuple[str, dict[str, Any]]]:
    assert reply.call is not None
    location = _with_output_index(item_id=f"fc_{call_id}")
    event_type = "response.function_call_arguments"
    done = {**location, "name": reply.call.name, "arguments": reply.call.arguments}
    return [
        *(
            (f"{event_type}.delta", {**location, "delta": piece})
            for piece in pieces(reply.call.arguments)
        ),
        (f"{event_type}.done", done),
    ]


def _with_output_index(**fields: Any) -> dict[str, Any]:
    return {"output_index": 0, **fields}


def _item(reply: Reply, call_id: str, *, done: bool) -> dict[str, Any]:
    status = "completed" if done else "in_progress"
    if reply.call:
        return {
            "id": f"fc_{call_id}",
            "type": "function_call",
            "status": status,
            "call_id": f"call_{call_id}",
            "name": reply.call.name,
            "arguments": reply.call.arguments if done else "",
        }
    return {
        "id": f"msg_{call_id}",
        "type": "message",
        "status": "incomplete" if done and reply.truncated else status,
        "role": "assistant",
        "content": [_part(reply.text)] if done else [],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response(
    prompt: Prompt,
    call_id: str,
    *,
    reply: Reply | None = None,
    output: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build the response object, in progress without a reply and finished with one."""
    truncated = reply is not None and reply.truncated
    status = "in_progress" if reply is None else "incomplete" if truncated else "completed"
    return {
        "id": f"resp_{call_id}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if truncated else None,
        "instructions": None,
        "max_output_tokens": prompt.max_tokens,
        "metadata": {},
        "model": prompt.model,
        "output": output or [],
        "parallel_tool_calls": False,
        "temperature": 1.0,
        "tool_choice": prompt.forced or "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None if reply is None else _usage(reply),
    }


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": reply.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reply.total_tokens,
    }
