"""What a request asks for, and the fake model's answer: cheap, and the same every time.

The model calls the first tool once for each question, and answers in text when it sees a result.
With `tool_choice` it does as told. A response format gets the smallest valid JSON. Any other
question is repeated, so that an answer can be matched with its call.

Reading is only as tolerant as the provider needs to be: what the model, the charge and the reply
use is read, the rest of the body is ignored. A part of the wrong JSON type raises whatever Python
raises, which becomes an error 400.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

Json: TypeAlias = Mapping[str, Any]

IMAGE_CHARACTERS: Final = 340
"""An image in low detail is 85 tokens, which is this many characters at four a token."""
QUOTE: Final = 200
"""How much of a question is repeated."""
_FILLER: Final = " and so on"
_MAX_TOKENS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_MOST: Final = 1_000_000
"""The largest number of tokens or dimensions; any more would take long to make."""
#: Members of messages that are no text.
_SILENT: Final = {"role", "type", "id", "call_id", "tool_call_id", "tool_use_id"}
_TEXT: Final[Json] = {"type": "string"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says: text, or the call of a tool with its arguments as text."""

    model: str
    text: str
    tool: str | None
    truncated: bool
    max_tokens: int | None
    prompt_tokens: int
    completion_tokens: int


def answer(asked: Any, body: Json, *, reply_tokens: int = 0) -> Answer:
    """Answer messages; a text is padded to `reply_tokens` and cut at the body's `max_tokens`.

    Args:
        asked: The messages of the body, or a text.
        body: What else is asked: tools, a format.
        reply_tokens: Length to which text replies are padded.
    """
    messages: list[Json] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not messages:
        raise ValueError("there are no messages")
    question, observed = _last_question(messages)
    offered = [tool.get("function") or tool for tool in body.get("tools") or ()]
    tools = {tool["name"]: tool for tool in offered if "name" in tool}
    reply_format = body.get("response_format") or (body.get("text") or {}).get("format") or {}
    characters = _characters([messages, body.get("system"), body.get("instructions")])
    characters += sum(len(json.dumps(part)) for part in (*offered, reply_format) if part)
    tool = _tool_to_call(body.get("tool_choice") or "auto", tools, observed=observed)
    max_tokens = read_count(body, *_MAX_TOKENS)
    quote = question[:QUOTE]
    if tool is not None:
        parameters = tools[tool].get("parameters") or tools[tool].get("input_schema") or {}
        text = cut = json.dumps(smallest_instance(parameters, text=quote or "text"))
    else:
        text = _text(f"You said: {quote}", reply_format, reply_tokens)
        cut = text if max_tokens is None else text[: max_tokens * 4]
    return Answer(
        model=str(body["model"]),
        text=cut,
        tool=tool,
        truncated=len(cut) < len(text),
        max_tokens=max_tokens,
        prompt_tokens=tokens_of(characters),
        completion_tokens=max(1, tokens_of(len(tool or "") + len(cut))),
    )


def _text(text: str, reply_format: Json, tokens: int) -> str:
    """Return JSON if a format asks for it, else `text`, padded to so many tokens."""
    if reply_format.get("type", "text") != "text":
        schema = (reply_format.get("json_schema") or reply_format).get("schema", {})
        return json.dumps(smallest_instance(schema))
    return text if len(text) >= tokens * 4 else (text + _FILLER * tokens)[: tokens * 4]


def from_gemini(body: Json, path: str) -> Json:
    """Bring a body of Gemini's into OpenAI's form; tools are left out."""
    options = body.get("generationConfig") or {}
    return {
        "model": path.rsplit("/", 1)[-1].rsplit(":", 1)[0],
        "messages": [
            {"role": turn.get("role", "user"), "content": turn["parts"]}
            for turn in body["contents"]
        ],
        "system": (body.get("systemInstruction") or {}).get("parts"),
        "max_tokens": options.get("maxOutputTokens"),
    }


def from_bedrock(body: Json, path: str) -> Json:
    """Bring a body of Bedrock's into OpenAI's form; `converse` keeps its limits aside."""
    options = body.get("inferenceConfig") or {}
    model = path.rsplit("/", 2)[-2]
    return {"max_tokens": options.get("maxTokens"), **body, "model": model}


def read_count(body: Json, *names: str) -> int | None:
    """Read a number that may have several names; None if it isn't there."""
    for name in names:
        value = body.get(name)
        if value is not None:
            if not 1 <= value <= _MOST:
                raise ValueError(f"{name} must be from 1 to {_MOST:,}, not {value}")
            return int(value)
    return None


def tokens_of(characters: int) -> int:
    """Return the estimate that OpenAI documents: a token for every four characters."""
    return -(-characters // 4)


def smallest_instance(  # noqa: PLR0911 - one for each type
    schema: Json, *, text: str = "text", root: Json | None = None
) -> Any:
    """Return a value that a JSON schema accepts, with only the required properties.

    References into the schema itself, `enum`, `const`, `anyOf`, `oneOf`, `minItems` and
    bounds of numbers are understood; `allOf`, `pattern` and lengths of strings aren't.

    Args:
        schema: A JSON schema; an empty one stands for any object.
        text: What free strings hold.
        root: The schema that references point into.
    """
    root = schema if root is None else root
    while "$ref" in schema or "anyOf" in schema or "oneOf" in schema:
        schema = _followed(schema, root)

    def write(part: Json) -> Any:
        return smallest_instance(part, text=text, root=root)

    kind = schema.get("type") or ("object" if "properties" in schema or not schema else "string")
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    match kind:
        case "object":
            parts, names = schema.get("properties") or {}, schema.get("required", ())
            return {name: write(parts.get(name) or _TEXT) for name in names}
        case "array":
            return [write(schema.get("items") or _TEXT) for _ in range(schema.get("minItems", 0))]
        case "integer" | "number":
            least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
            most = schema.get("maximum", schema.get("exclusiveMaximum", math.inf) - 1)
            return min(max(1, least), most)
        case "null":
            return None
        case "boolean":
            return True
        case _:
            return text


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


def _last_question(messages: Iterable[Json]) -> tuple[str, bool]:
    """Return the last question, and whether a tool's result follows it."""
    question, observed = "", False
    for message in messages:
        content, role = message.get("content") or "", message.get("role") or message.get("type")
        parts = [{"text": content}] if isinstance(content, str) else content
        if role in ("tool", "function_call_output") or any(
            part.get("type") == "tool_result" for part in parts
        ):
            observed = True
        elif role == "user":
            question, observed = "\n".join(part.get("text") or "" for part in parts), False
    return question, observed


def _characters(value: object) -> int:
    """Count the characters of all text in a part of a request."""
    match value:
        case str():
            return len(value)
        case list():
            return sum(map(_characters, value))
        case {"type": str(kind)} if "image" in kind:
            return IMAGE_CHARACTERS
        case dict():
            return sum(_characters(part) for name, part in value.items() if name not in _SILENT)
        case _:
            return 0


def _tool_to_call(choice: Any, tools: Mapping[str, Json], *, observed: bool) -> str | None:
    """Return the tool that `tool_choice` names, or the first; None for an answer in text."""
    if isinstance(choice, dict):
        choice = (choice.get("function") or choice).get("name") or choice.get("type")
    if choice in tools:
        return str(choice)
    wanted = choice in ("required", "any") or (choice == "auto" and not observed)
    return next(iter(tools), None) if wanted else None
