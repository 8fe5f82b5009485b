"""What a request asks for, and the fake model's answer: cheap, and the same every time.

The model calls the first tool once for each question, and answers in text when it sees a result.
With `tool_choice` it does as told. A response format gets the smallest valid JSON. Any other
question is repeated, so that an answer can be matched with its call.

Reading is only as tolerant as the provider needs to be: what the model, the charge and the reply
use is read, the rest of the body is ignored.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from asyncbucket.core.wording import is_integer

Json: TypeAlias = Mapping[str, Any]

IMAGE_CHARACTERS = 340
"""An image in low detail is 85 tokens, which is this many characters at four a token."""
_TEXT: Json = {"type": "string"}
FILLER = " and so on"
_MAX_TOKENS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_MOST = 1_000_000
"""The largest number of tokens or dimensions; any more would take long to make."""
QUOTE = 200
"""How much of a question is repeated."""


class InvalidRequestError(Exception):
    """The request is not what the endpoint takes; it becomes an error with this status."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What one call asks of the model.

    Attributes:
        model: The model's name, echoed.
        characters: Length of all text in the request, tools and response format included.
        question: The last message of the user.
        observed: Whether a tool's result follows the question.
        tools: The JSON schema of the parameters of each function offered, by its name.
        forced: The tool that must be called, "required" for any or "none"; None if it may be.
        schema: JSON schema of the reply; empty for any object, None for text.
        max_tokens: Limit of the output, if any.
        stream: Whether the reply is streamed.
        include_usage: Whether a stream of chat chunks ends with the usage.
    """

    model: str
    characters: int
    question: str
    observed: bool
    tools: Mapping[str, Json]
    forced: str | None
    schema: Json | None
    max_tokens: int | None
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says: text, or the call of a tool with its arguments as text."""

    text: str
    tool: str | None
    truncated: bool
    prompt_tokens: int
    completion_tokens: int


def read_prompt(endpoint: str, body: Json) -> Prompt:
    """Read the body of chat/completions, responses or messages."""
    model = read_model(body)
    named = "input" if endpoint == "responses" else "messages"
    messages = body.get(named)
    if endpoint == "responses" and isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError(f"'{named}' must be a list of messages")
    _, system_length, _ = _read_content(body.get("instructions") or body.get("system"))
    question, observed, characters = _read_messages(messages)
    tools = [tool.get("function") or tool for tool in body.get("tools") or ()]
    reply_format = body.get("response_format") or (body.get("text") or {}).get("format") or {}
    return Prompt(
        model=model,
        characters=characters + system_length + sum(map(_length, [*tools, reply_format])),
        question=question,
        observed=observed,
        tools={
            tool["name"]: tool.get("parameters") or tool.get("input_schema") or {}
            for tool in tools
            if "name" in tool
        },
        forced=_forced(body.get("tool_choice")),
        schema=_schema(reply_format),
        max_tokens=read_count(body, *_MAX_TOKENS),
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


def read_texts(body: Json) -> tuple[list[str], int]:
    """Read what is to be embedded, texts or lists of token ids, and how many tokens that is."""
    asked = body.get("input")
    is_one = isinstance(asked, str) or (isinstance(asked, list) and asked and is_integer(asked[0]))
    items: Any = [asked] if is_one else asked
    if not isinstance(items, list) or not items:
        raise InvalidRequestError("'input' must be a string or a list of strings")
    tokens = sum(tokens_of(len(item)) if isinstance(item, str) else len(item) for item in items)
    return [str(item) for item in items], tokens


def read_model(body: Json) -> str:
    """Read the name of the model."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("you must provide a model parameter")
    return model


def read_count(body: Json, *names: str) -> int | None:
    """Read a number that may have several names; None if it isn't there."""
    for name in names:
        value = body.get(name)
        if value is not None and not (is_integer(value) and 1 <= value <= _MOST):
            raise InvalidRequestError(f"'{name}' must be an integer from 1 to {_MOST:,}")
        if value is not None:
            return int(value)
    return None


def tokens_of(characters: int) -> int:
    """Return the estimate that OpenAI documents: a token for every four characters."""
    return -(-characters // 4)


def answer(prompt: Prompt, *, reply_tokens: int = 0) -> Answer:
    """Answer `prompt`; texts are padded to `reply_tokens` and cut at the prompt's `max_tokens`."""
    prompt_tokens = tokens_of(prompt.characters)
    tool = _tool_to_call(prompt)
    if tool is not None:
        quoted = prompt.question[:QUOTE] or "text"
        text = json.dumps(smallest_instance(prompt.tools[tool], text=quoted))
        return Answer(text, tool, False, prompt_tokens, tokens_of(len(tool + text)))
    if prompt.schema is not None:
        text = json.dumps(smallest_instance(prompt.schema))
    else:
        text = f"You said: {prompt.question[:QUOTE]}"
        if len(text) < reply_tokens * 4:
            text = (text + FILLER * reply_tokens)[: reply_tokens * 4]
    most = len(text) if prompt.max_tokens is None else prompt.max_tokens * 4
    cut = text[:most]
    return Answer(cut, None, len(text) > most, prompt_tokens, max(1, tokens_of(len(cut))))


def smallest_instance(schema: Json, *, text: str = "text", root: Json | None = None) -> Any:
    """Return a value that a JSON schema accepts, with only the required properties.

    References into the schema itself, `enum`, `const`, `anyOf`, `oneOf`, and bounds of numbers and
    lengths are understood; `allOf`, `pattern` and `format` aren't.

    Args:
        schema: A JSON schema; an empty one stands for any object.
        text: What free strings hold.
        root: The schema that references point into.
    """
    root = schema if root is None else root
    while "$ref" in schema or "anyOf" in schema or "oneOf" in schema:
        schema = _followed(schema, root)
    write = functools.partial(smallest_instance, text=text, root=root)
    kind = schema.get("type") or ("object" if "properties" in schema or not schema else "string")
    if isinstance(kind, list):
        kind = "null" if "null" in kind else kind[0]
    value: Any = None
    if "const" in schema or "enum" in schema:
        value = schema["const"] if "const" in schema else schema["enum"][0]
    elif kind == "object":
        parts = schema.get("properties") or {}
        names = schema.get("required", ())
        value = {name: write(parts.get(name) or _TEXT) for name in names}
    elif kind == "array":
        value = [write(schema.get("items") or _TEXT) for _ in range(schema.get("minItems", 0))]
    elif kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        most = schema.get("maximum", schema.get("exclusiveMaximum", math.inf) - 1)
        value = min(max(1, least), most)
    elif kind != "null":
        filled = text.ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength")]
        value = kind == "boolean" or filled
    return value


def _followed(schema: Json, root: Json) -> Json:
    """Return what a reference points to, or one of the alternatives: null if that is one."""
    if "$ref" in schema:
        target: Any = root
        for step in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target[step]
        return dict(target)
    options = schema.get("anyOf") or schema["oneOf"]
    # A strict schema of a tree requires a child, or null.
    return next((option for option in options if option.get("type") == "null"), options[0])


def _read_messages(messages: Sequence[Json]) -> tuple[str, bool, int]:
    """Return the last question, whether a tool's result follows it, and all characters."""
    question, observed, characters = "", False, 0
    for message in messages:
        text, length, has_result = _read_content(message.get("content") or message.get("output"))
        calls = message.get("tool_calls") or message.get("arguments")
        characters += length + (len(calls) if isinstance(calls, str) else _length(calls))
        role = message.get("role") or message.get("type")
        if role in ("tool", "function", "function_call_output") or has_result:
            observed = True
        elif role == "user":
            question, observed = text, False
    return question, observed, characters


def _read_content(content: Any) -> tuple[str, int, bool]:
    """Return a message's text, its length with images and calls, and whether it has a tool's result."""
    if content is None or isinstance(content, str):
        return content or "", len(content or ""), False
    texts: list[str] = []
    length, has_result = 0, False
    for part in content:
        kind = str(part.get("type"))
        has_result = has_result or kind == "tool_result"
        inner, inner_length, _ = _read_content(part.get("content"))
        texts.append(str(part.get("text") or part.get("refusal") or inner))
        length += len(texts[-1]) if not inner else inner_length
        length += IMAGE_CHARACTERS * ("image" in kind) + _length(part.get("input"))
    return "\n".join(texts), length, has_result


def _forced(choice: object) -> str | None:
    """Read `tool_choice`: the tool's name, "required", "none", or None for the model's choice."""
    if isinstance(choice, dict):
        function = choice.get("function") or choice
        choice = function.get("name") or choice.get("type")
    return None if choice in (None, "auto") else "required" if choice == "any" else str(choice)


def _schema(reply_format: Json) -> Json | None:
    match reply_format.get("type"):
        case "json_schema":
            return (reply_format.get("json_schema") or reply_format).get("schema") or {}
        case "json_object":
            return {}
        case _:
            return None


def _tool_to_call(prompt: Prompt) -> str | None:
    if not prompt.tools or prompt.forced == "none":
        return None
    if prompt.forced in (None, "required"):
        wanted = prompt.forced == "required" or not prompt.observed
        return next(iter(prompt.tools)) if wanted else None
    return prompt.forced if prompt.forced in prompt.tools else None


def _length(value: object) -> int:
    return len(json.dumps(value)) if value else 0
