"""What the bundled provider's model says, and how each endpoint writes it: whole, or as a stream.

How replies are written is a table, `replies.json`. The model is cheap, and answers the same every time. It calls the first tool once for each question,
and answers in text when it sees a result. With `tool_choice` it does as told. A response format gets
the smallest valid JSON. Any other question is repeated, so that an answer can be matched with its call.

Reading is only as tolerant as the provider needs to be: what the model, the charge and the reply
use is read, the rest of the body is ignored. A part of the wrong JSON type raises whatever Python
raises, which becomes an error 400.
"""

import json
import random
import struct
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from typing import Any, Final, TypeAlias

from asyncbucket.engine.wording import read_count
from asyncbucket.testing.prompt_cache import Block

Json: TypeAlias = Mapping[str, Any]
Chunk: TypeAlias = dict[str, Any]
"""What a stream sends; its type, if it has one, is also the name of the server-sent event."""

FORMS: Final[Json] = json.loads(
    files("asyncbucket.testing").joinpath("replies.json").read_text("utf-8")
)
CREATED: Final = 1_735_689_600
"""A constant: replies are the same from run to run."""
PIECES: Final = 8
"""The most pieces in which a text is streamed."""
DIMENSIONS: Final = 64
"""Of an embedding, unless the request says how many."""

IMAGE_CHARACTERS: Final = 340
"""An image in low detail is 85 tokens, which is this many characters at four a token."""
QUOTE: Final = 200
"""How much of a question is repeated."""
_FILLER: Final = " and so on"
_MAX_TOKENS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
#: Members of messages that are no text.
_SILENT: Final = {"cache_control", "role", "type", "id", "call_id", "tool_call_id", "tool_use_id"}
_TEXT: Final[Json] = {"type": "string"}
#: What bounds a number, and how far from there a valid one is.
_BOUNDS: Final = {"minimum": 0, "exclusiveMinimum": 1, "maximum": 0, "exclusiveMaximum": -1}


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
    #: What of the prompt was read from a cache, and what was written to it.
    cached: int = 0
    written: int = 0

    @property
    def total_tokens(self) -> int:
        """All tokens."""
        return self.prompt_tokens + self.completion_tokens


def answer(body: Json, *, reply_tokens: int = 0) -> Answer:
    """Answer the messages of a body, or a text in their place, with its tools and format.

    A text is padded to `reply_tokens` and cut at the body's `max_tokens`.
    """
    asked = body["messages"]
    messages: list[Json] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not messages:
        raise ValueError("there are no messages")
    question, observed = _last_question(messages)
    offered = [tool.get("function") or tool for tool in body.get("tools") or ()]
    tools = {tool["name"]: tool for tool in offered if "name" in tool}
    holders = [body.get(name) or {} for name in ("text", "output_config")]
    formats = [body.get("response_format"), *(each.get("format") for each in holders)]
    reply_format: Json = next(filter(None, [*formats, body.get("output_format")]), {})
    characters = _characters([messages, body.get("system"), body.get("instructions")])
    characters += sum(len(json.dumps(part)) for part in (*offered, reply_format) if part)
    tool = _tool_to_call(body.get("tool_choice") or "auto", tools, observed=observed)
    max_tokens = _number(body, *_MAX_TOKENS)
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


def blocks(body: Json) -> list[Block]:
    """Return the parts of a prompt in the order of Anthropic's cache: tools, system, messages."""
    found = [_block(tool, len(json.dumps(tool))) for tool in body.get("tools") or ()]
    asked = body["messages"]
    holders = [body.get("system"), asked] if isinstance(asked, str) else [body.get("system")]
    holders += [] if isinstance(asked, str) else [each.get("content") for each in asked]
    for content in holders:
        parts = content if isinstance(content, list) else [content] if content else []
        found += [_block(part, _characters(part)) for part in parts]
    return found


def _block(part: Any, characters: int) -> Block:
    if not isinstance(part, dict):
        return Block(part, characters, None)
    content = {name: value for name, value in part.items() if name != "cache_control"}
    return Block(content, characters, part.get("cache_control"))


def _text(text: str, reply_format: Json, tokens: int) -> str:
    """Return JSON if a format asks for it, else `text`, padded to so many tokens."""
    if reply_format.get("type", "text") != "text":
        schema = (reply_format.get("json_schema") or reply_format).get("schema", {})
        return json.dumps(smallest_instance(schema))
    return text if len(text) >= tokens * 4 else (text + _FILLER * tokens)[: tokens * 4]


def _number(body: Json, *names: str) -> int | None:
    """Read a number that may have several names; None if it isn't there."""
    for name in names:
        if body.get(name) is not None:
            return read_count(body[name], name, least=1)
    return None


def tokens_of(characters: int) -> int:
    """Return the estimate that OpenAI documents: a token for every four characters."""
    return -(-characters // 4)


def smallest_instance(schema: Json, *, text: str = "text", root: Json | None = None) -> Any:
    """Return a value that a JSON schema accepts, with only the required properties.

    References into the schema itself, `enum`, `const`, `anyOf`, `oneOf`, `minItems` and one bound of
    a number are understood; `allOf`, `pattern` and lengths of strings aren't.

    Args:
        schema: A JSON schema; an empty one stands for any object.
        text: What free strings hold.
        root: The schema that references point into.
    """
    root = schema if root is None else root
    while "$ref" in schema or "anyOf" in schema or "oneOf" in schema:
        schema = _followed(schema, root)
    write = partial(smallest_instance, text=text, root=root)
    kind = schema.get("type") or ("object" if "properties" in schema or not schema else "string")
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if isinstance(kind, list):
        kind = "null" if "null" in kind else kind[0]
    match kind:
        case "object":
            parts, names = schema.get("properties") or {}, schema.get("required", ())
            return {name: write(parts.get(name) or _TEXT) for name in names}
        case "array":
            return [write(schema.get("items") or _TEXT) for _ in range(schema.get("minItems", 0))]
        case "integer" | "number":
            bounds = (schema[name] + step for name, step in _BOUNDS.items() if name in schema)
            return next(bounds, 1)
        case _:
            return {"null": None, "boolean": True}.get(kind, text)


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


def whole(endpoint: str, reply: Answer, call_id: str) -> Chunk:
    """Write a reply as an endpoint does."""
    chunk: Chunk = filled(FORMS[endpoint]["whole"], _names(reply, call_id))
    return chunk


def events(endpoint: str, reply: Answer, call_id: str, body: Json) -> list[Chunk]:
    """Write a reply as the events of a stream; none if the endpoint has no streams."""
    form, names = FORMS[endpoint], _names(reply, call_id)
    names["whole"] = filled(form["whole"], names)
    names["begun"] = {**names["whole"], **filled(form.get("begun", {}), names)}
    planned = list(form.get("tool" if reply.tool else "text", ()))
    if (body.get("stream_options") or {}).get("include_usage") and "usage" in form:
        planned.append(form["usage"])
    chunks: list[Chunk] = []
    for event in planned:
        for piece in _pieces(reply.text) if "each" in event else [""]:
            chunk = {**form.get("head", {}), **event.get("each", event)}
            if form.get("numbered"):
                chunk["sequence_number"] = len(chunks)
            chunks.append(filled(chunk, {**names, "piece": piece}))
    return chunks


def _names(reply: Answer, call_id: str) -> dict[str, Any]:
    """Return what the names in the forms stand for."""
    ended = "cut" if reply.truncated else "done"
    called = ended if reply.tool is None else "called"
    names: dict[str, Any] = {
        **asdict(reply),
        "id": call_id,
        "created": CREATED,
        "arguments": reply.tool and json.loads(reply.text),
        "total_tokens": reply.total_tokens,
        "uncached_tokens": reply.prompt_tokens - reply.cached - reply.written,
        **FORMS["ends"][ended],
        **FORMS["ends"][called],
    }
    parts = FORMS["parts"]["tool" if reply.tool else "text"]
    names |= filled({**parts, **FORMS["usage"]}, names)
    return names


def filled(form: Any, names: Mapping[str, Any]) -> Any:
    """Put in what the names stand for: "$name" as it is, "{name}" in a text."""
    match form:
        case str():
            return names[form[1:]] if form.startswith("$") else form.format_map(names)
        case list():
            return [filled(part, names) for part in form]
        case dict():
            return {name: filled(part, names) for name, part in form.items()}
        case _:
            return form


def embeddings(body: Json) -> tuple[int, Chunk]:
    """Return the tokens of /embeddings, and its reply: equal texts get equal vectors of length 1.

    Texts may be lists of token ids.
    """
    asked = body["input"]
    texts = [asked] if isinstance(asked, str) or isinstance(asked[0], int) else asked
    tokens = sum(tokens_of(len(text)) if isinstance(text, str) else len(text) for text in texts)
    size = _number(body, "dimensions") or DIMENSIONS
    vectors: list[Any] = [_vector(str(text), size) for text in texts]
    if body.get("encoding_format") == "base64":  # which OpenAI's own clients ask for
        vectors = [b64encode(struct.pack(f"<{size}f", *vector)).decode() for vector in vectors]
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return tokens, {"object": "list", "data": data, "model": str(body["model"]), "usage": usage}


def _vector(text: str, size: int) -> list[float]:
    rng = random.Random(text)  # noqa: S311 - repeatable, not secret
    numbers = [rng.gauss(0.0, 1.0) for _ in range(size)]
    length = sum(number * number for number in numbers) ** 0.5
    return [round(number / length, 6) for number in numbers]


def _from_gemini(body: Json, path: str) -> Json:
    """Bring a body of Gemini's into OpenAI's form; tools are left out."""
    turns = body["contents"]
    return {
        "model": path.rsplit("/", 1)[-1].rsplit(":", 1)[0],
        "messages": [
            {"role": each.get("role", "user"), "content": each["parts"]} for each in turns
        ],
        "system": (body.get("systemInstruction") or {}).get("parts"),
        "max_tokens": (body.get("generationConfig") or {}).get("maxOutputTokens"),
    }


def _from_bedrock(body: Json, path: str) -> Json:
    """Bring a body of Bedrock's `invoke` for Claude into OpenAI's form."""
    return {**body, "model": path.rsplit("/", 2)[-2]}


#: How each endpoint that generates text is asked: brings a body with its path into the form of OpenAI's
#: chats. Google's and Amazon's stream at other paths.
READERS: Final[Mapping[str, Callable[[Json, str], Json]]] = {
    "chat/completions": lambda body, _: body,
    "responses": lambda body, _: {**body, "messages": body["input"]},
    "messages": lambda body, _: body,
    "generateContent": _from_gemini,
    "invoke": _from_bedrock,
}
