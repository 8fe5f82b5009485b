"""What a request asks for: one `Prompt` read from the body of each of the endpoints.

Reading is only as tolerant as the provider needs to be: what the fake model, the charging rule and
the reply use is read, the rest of the body is ignored.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

Json: TypeAlias = Mapping[str, Any]

IMAGE_CHARACTERS = 340
"""An image in low detail is 85 tokens, which is this many characters at four a token."""

_MOST_DIMENSIONS = 16_384
"""More than any model has, and few enough to be generated at once."""


class InvalidRequestError(Exception):
    """The body is not what the endpoint takes; it becomes a 400."""

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Json


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one call asks of the model.

    Attributes:
        model: The model's name, echoed.
        characters: Length of all text in the request, tools and response format included.
        question: The last message of the user.
        system: The system prompt.
        observed: Whether a tool's result follows the question.
        tools: Functions offered.
        forced: The tool that must be called, or "required" for any; None if it may be.
        schema: JSON schema of the reply; empty for any object, None for text.
        max_tokens: Limit of the output, if any.
        stream: Whether the reply is streamed.
        include_usage: Whether the stream ends with the usage.
    """

    model: str
    characters: int
    question: str = ""
    system: str = ""
    observed: bool = False
    tools: Sequence[Tool] = ()
    forced: str | None = None
    schema: Json | None = None
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False

    @property
    def tokens(self) -> int:
        """The estimate that OpenAI documents: a token for every four characters."""
        return -(-self.characters // 4)


@dataclass(frozen=True, slots=True)
class EmbeddingPrompt:
    """Texts to embed, each with its estimate of tokens."""

    model: str
    texts: Sequence[str]
    tokens: int
    dimensions: int | None
    base64: bool


def read_chat(body: Json) -> Prompt:
    """Read the body of /chat/completions."""
    model = _model(body)
    messages = _messages(body, "messages")
    tools = [tool["function"] for tool in body.get("tools") or () if "function" in tool]
    response_format = body.get("response_format") or {}
    return _prompt(
        body,
        model=model,
        messages=messages,
        tools=tools,
        schema=_schema(response_format, response_format.get("json_schema")),
        max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
        extra=_length(response_format),
    )


def read_responses(body: Json) -> Prompt:
    """Read the body of /responses."""
    model = _model(body)
    asked = body.get("input")
    if isinstance(asked, str):
        body = {**body, "input": [{"role": "user", "content": asked}]}
    messages = list(_messages(body, "input"))
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    text_format = (body.get("text") or {}).get("format") or {}
    return _prompt(
        body,
        model=model,
        messages=messages,
        tools=[tool for tool in body.get("tools") or () if tool.get("type") == "function"],
        schema=_schema(text_format, text_format),
        max_tokens=body.get("max_output_tokens"),
        extra=_length(text_format),
    )


def read_completion(body: Json) -> Prompt:
    """Read the body of the legacy /completions."""
    model = _model(body)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise InvalidRequestError("'prompt' must be one string", parameter="prompt")
    messages = [{"role": "user", "content": prompt}]
    return _prompt(
        body,
        model=model,
        messages=messages,
        tools=[],
        schema=None,
        max_tokens=body.get("max_tokens"),
        extra=0,
    )


def read_embeddings(body: Json) -> EmbeddingPrompt:
    """Read the body of /embeddings: a text, texts, token ids or lists of token ids."""
    model = _model(body)
    asked = body.get("input")
    items = [asked] if isinstance(asked, str) or _is_token_ids(asked) else asked
    if not isinstance(items, list) or not items:
        raise InvalidRequestError(
            "'input' must be a string or a list of strings", parameter="input"
        )
    texts: list[str] = []
    tokens = 0
    for item in items:
        if isinstance(item, str):
            tokens += -(-len(item) // 4)
        elif _is_token_ids(item):
            tokens += len(item)
        else:
            raise InvalidRequestError("'input' holds neither text nor tokens", parameter="input")
        texts.append(str(item))
    dimensions = _count(body.get("dimensions"), "dimensions")
    if dimensions is not None and dimensions > _MOST_DIMENSIONS:
        raise InvalidRequestError(
            f"'dimensions' must be at most {_MOST_DIMENSIONS:,}", parameter="dimensions"
        )
    return EmbeddingPrompt(
        model, texts, tokens, dimensions, body.get("encoding_format") == "base64"
    )


def _prompt(
    body: Json,
    *,
    model: str,
    messages: Sequence[Json],
    tools: Sequence[Json],
    schema: Json | None,
    max_tokens: object,
    extra: int,
) -> Prompt:
    system, question, observed, characters = _read_messages(messages)
    return Prompt(
        model=model,
        characters=characters + extra + sum(map(_length, tools)),
        question=question,
        system=system,
        observed=observed,
        tools=[Tool(tool["name"], tool.get("parameters") or {}) for tool in tools],
        forced=_forced(body.get("tool_choice")),
        schema=schema,
        max_tokens=_count(max_tokens, "max_tokens"),
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


def _read_messages(messages: Sequence[Json]) -> tuple[str, str, bool, int]:
    """Return system prompt, last question, whether it was observed since, and characters."""
    system = question = ""
    observed = False
    characters = 0
    for message in messages:
        text, length = _text(message.get("content") or message.get("output"))
        characters += length
        role = message.get("role") or message.get("type")
        if role in ("system", "developer"):
            system = system or text
        elif role in ("tool", "function", "function_call_output"):
            observed = True
        elif role == "user" and text.startswith("Observation:"):
            # How ReAct prompts give a tool's result.
            observed = True
        elif role == "user":
            question, observed = text, False
        calls = message.get("tool_calls")
        if calls:
            characters += _length(calls)
        elif role == "function_call":
            characters += len(message.get("arguments", ""))
    return system, question, observed, characters


def _text(content: object) -> tuple[str, int]:
    """Return the text of a message and its length, images included."""
    if content is None:
        return "", 0
    if isinstance(content, str):
        return content, len(content)
    if not isinstance(content, list):
        raise InvalidRequestError("a message's 'content' must be text or parts")
    texts: list[str] = []
    images = 0
    for part in content:
        if not isinstance(part, dict):
            raise InvalidRequestError("a message's part must be an object")
        texts.append(str(part.get("text") or part.get("refusal") or ""))
        images += "image" in str(part.get("type"))
    return "\n".join(texts), sum(map(len, texts)) + images * IMAGE_CHARACTERS


def _forced(choice: object) -> str | None:
    """Read `tool_choice`: the tool's name, "required", "none", or None for the model's choice."""
    if isinstance(choice, dict):
        function = choice.get("function") or choice
        return str(function.get("name"))
    return choice if choice in ("required", "none") else None


def _schema(declared: Json, schema_holder: Json | None) -> Json | None:
    format_type = declared.get("type")
    if format_type == "json_schema":
        return (schema_holder or {}).get("schema") or {}
    return {} if format_type == "json_object" else None


def _model(body: Json) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("you must provide a model parameter", parameter="model")
    return model


def _messages(body: Json, name: str) -> Sequence[Json]:
    messages = body.get(name)
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError(f"'{name}' must be a list of messages", parameter=name)
    if not all(isinstance(message, dict) for message in messages):
        raise InvalidRequestError(f"'{name}' must hold objects", parameter=name)
    return messages


def _count(value: object, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequestError(f"'{name}' must be an integer of at least 1", parameter=name)
    return value


def _is_token_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, int) for item in value)


def _length(value: object) -> int:
    return len(json.dumps(value)) if value else 0
