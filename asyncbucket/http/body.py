"""What a call's body says about its cost, and what is kept of a reply's body to find its usage.

A request's body is examined only if it is in memory already: a streamed upload stays a stream.
Tokens are counted as providers do at admission, by characters; no tokenizer runs. Everything that
is sent to the model counts: messages, instructions, tools and formats. Pictures, sound and files
count by constants and by size, because in JSON they are base64 and not text; a document may be
text.

A reply's body passes through untouched. References to its last chunks are kept (`Tail`). Once it is
complete, the usage is found in them by its key, without parsing: a reply's text may contain the
letters ``"usage"``, but JSON escapes the quotes around them, so those bytes can only be the real
key. It is the key of an object, or, from Ollama, that of a number at the very end.
"""

import json
import re
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, TypeGuard

from asyncbucket.http.usage import Usage, read_usage

#: Suffixes of paths whose calls make a model write.
_OUTPUT_PATHS: Final = (
    "/chat/completions",
    "/completions",
    "/responses",
    "/responses/compact",
    "/messages",
    "/v1/complete",  # not an upload's
    "/api/chat",
    "/api/generate",
    "/v2/chat",
)
#: Suffixes of paths whose calls only send tokens. ``/messages/count_tokens`` is not among them: it
#: has its own limit of requests, and none of tokens (docs.anthropic.com, "Token counting", read in
#: 2025).
_INPUT_ONLY_PATHS: Final = ("/embeddings", "/api/embed", "/v1/embed", "/v2/embed", "/rerank")
#: The end of a path that adds a message to a thread, for a run to read later.
_THREAD_MESSAGE_PATH: Final = re.compile(r"/threads/[^/]+/messages/?$")
#: The ends of paths that change an existing object: they cancel or archive it, or label a stored
#: reply, a run or a session, whose answer reports its total usage.
_UPDATE_PATH: Final = re.compile(r"/(cancel|archive)/?$|/(chat/completions|runs|sessions)/[^/]+/?$")
#: The kinds of a body's members, by their names in OpenAI's chat, completions, responses and
#: embeddings, Anthropic's messages, Cohere and Ollama.
_MEMBER_KINDS: Final = {
    **dict.fromkeys(
        (
            "messages",
            "input",
            "prompt",
            "instructions",
            "system",
            "suffix",
            "query",
            "documents",
            "texts",
        ),
        "text",
    ),
    **dict.fromkeys(("tools", "functions"), "tools"),
    **dict.fromkeys(("response_format", "text", "format", "output_config"), "json"),
    **dict.fromkeys(
        ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_tokens_to_sample"),
        "limit",
    ),
    "options": "options",
    "images": "pictures",
}
#: Members that ask for several replies to one prompt.
_REPLY_COUNTS: Final = ("n", "best_of")
#: Members of a message that are not sent to the model.
_NOT_SENT: Final = frozenset(
    {"cache_control", "detail", "id", "media_type", "role", "status", "tool_call_id", "type"}
)
#: Parts that are files, except Anthropic's documents whose source is text or content parts.
_FILE_TYPES: Final = ("document", "file", "input_file")
_INLINE_SOURCES: Final = ("text", "content")
#: A data URL: a picture, a video or a file, whatever the part around it is called.
_DATA_URL: Final = re.compile(r"data:(\w+)/[^,]{1,99};base64,")
#: OpenAI's GPT-4o and 4.1: 85 in low detail; 85 and 170 for each of four tiles of 512 pixels ("Images
#: and vision", read in 2025). Anthropic: width * height / 750, at most about 1,600.
IMAGE_TOKENS: Final = 765
LOW_DETAIL_IMAGE_TOKENS: Final = 85
#: Bytes of sound or of a file per token: a guess that the usage corrects.
_BYTES_PER_TOKEN: Final = 64

#: How much of a reply is kept, in bytes: more than an error's body, or what follows the usage.
_TAIL_BYTES: Final = 65_536
#: How much of a compressed reply is kept; it must be complete to be decoded.
_ENCODED_TAIL_BYTES: Final = 1_048_576
#: The first bytes of a stream: Anthropic's first event has the tokens of the prompt.
_HEAD_BYTES: Final = 4_096
#: The keys of an object with the usage: everybody's, then that of Cohere's embeddings.
_USAGE_KEYS: Final = (b'"usage"', b'"billed_units"')
_OBJECT_KEY: Final = re.compile(rb'"\w+"\s*:\s*(?=\{)')
#: The numbers at the end of Ollama's last line: docs.ollama.com/api/chat, read in 2026.
_TOKEN_COUNT: Final = re.compile(rb'"(prompt_eval_count|eval_count)"\s*:\s*(\d{1,9})(?=\s*[,}])')
#: After one of these a stream is complete, even if the client reads no further. They cannot occur
#: in what a model writes, because JSON escapes quotes and line ends.
_END_MARKERS: Final = (
    b"\ndata: [DONE]",
    b"\ndata:[DONE]",
    b'"eval_count"',
    b'"message-end"',
    b'"message_stop"',
    b'"response.completed"',
    b'"response.incomplete"',
)
_DECODER: Final = json.JSONDecoder()


class Sent:
    """Add up what a call sends and asks for."""

    __slots__ = ("characters", "extra", "max_output", "replies", "size", "writes")

    def __init__(self, *, writes: bool = False) -> None:
        #: Whether the model writes a reply.
        self.writes = writes
        #: Characters of all text.
        self.characters = 0
        #: The same, in bytes of UTF-8.
        self.size = 0
        #: Tokens of what is not text, or is sent as token numbers.
        self.extra = 0
        #: The most tokens of one reply, if the call says so.
        self.max_output: int | None = None
        #: How many replies are asked for.
        self.replies = 1

    @property
    def by_characters(self) -> int:
        """Tokens at four characters each, as OpenAI estimates at admission."""
        return -(-self.characters // 4) + self.extra

    @property
    def by_size(self) -> int:
        """Tokens at four bytes each: more accurate for text that is not English."""
        return -(-self.size // 4) + self.extra

    def output(self, default: int) -> int:
        """Return the most tokens of all replies; ``default`` for each if the call sets no limit."""
        return (self.max_output or default) * self.replies if self.writes else 0

    def add(self, value: object) -> None:
        """Add text, parts of messages, or lists of them."""
        if isinstance(value, str) and (data := _DATA_URL.match(value)):
            self.extra += IMAGE_TOKENS if data[1] == "image" else _file_tokens(value)
        elif isinstance(value, str):
            self.characters += len(value)
            self.size += len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
        elif isinstance(value, list):
            for item in value:
                self.add(item)
                if isinstance(item, str):  # each of several texts has its own last token
                    self.characters += -len(item) % 4
                    self.size += -len(item) % 4
        elif isinstance(value, dict):
            self._add_part(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            self.extra += 1  # texts to embed may be sent as token numbers

    def add_json(self, value: object) -> None:
        """Add what the model gets to see as JSON."""
        if value:
            self.add(json.dumps(value, ensure_ascii=False))

    def add_images(self, value: object) -> None:
        """Add pictures that are sent as plain base64, as to Ollama."""
        if isinstance(value, list):
            self.extra += IMAGE_TOKENS * len(value)

    def _add_part(self, part: dict[str, Any]) -> None:
        part_type = part.get("type")
        part_type = part_type if isinstance(part_type, str) else ""
        if "image" in part_type:
            self.extra += LOW_DETAIL_IMAGE_TOKENS if _detail(part) == "low" else IMAGE_TOKENS
        elif "audio" in part_type or (part_type in _FILE_TYPES and not _is_inline_text(part)):
            self.extra += _file_tokens(json.dumps(part))
        else:
            for name, value in part.items():
                if name in ("tool_calls", "function_call"):
                    self.add_json(value)
                elif name == "images" and "role" in part:
                    self.add_images(value)
                elif name not in _NOT_SENT:
                    self.add(value)


def read_json(content: bytes | None) -> Mapping[str, Any]:
    """Return the JSON object in ``content``; an empty one if it is none."""
    if not content or content.lstrip()[:1] != b"{":
        return {}
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def sent(path: str, body: Mapping[str, Any]) -> Sent:
    """Return what a call to ``path`` with the JSON ``body`` sends and asks for."""
    found = Sent(
        writes=path.rstrip("/").endswith(_OUTPUT_PATHS) and not _THREAD_MESSAGE_PATH.search(path)
    )
    found.replies = replies_of(body)
    if found.writes or is_input_only(path):
        try:
            _add_members(body, found)
        except RecursionError:  # nested deeper than any real call
            return found
    return found


def is_input_only(path: str) -> bool:
    """Tell whether a model only reads what a call to ``path`` sends, and writes nothing."""
    return path.rstrip("/").endswith(_INPUT_ONLY_PATHS)


def reports_own_usage(method: str, path: str) -> bool:
    """Tell whether the reply to such a call reports the call's own usage.

    Calls that only read or change something (a stored reply, a batch) report the usage of other
    calls.
    """
    return method == "POST" and not _UPDATE_PATH.search(path)


def replies_of(body: Mapping[str, Any]) -> int:
    """Return how many replies a call with the JSON ``body`` asks for, to all its prompts."""
    per_prompt = 1
    for name in _REPLY_COUNTS:
        value = body.get(name)
        if is_positive_integer(value):
            per_prompt = max(per_prompt, value)
    prompts = body.get("prompt")
    if not isinstance(prompts, list):
        return per_prompt
    # A list of numbers is one prompt.
    return per_prompt * max(1, sum(not isinstance(prompt, int) for prompt in prompts))


def _add_members(body: Mapping[str, Any], found: Sent) -> None:
    """Add up in ``found`` what ``body`` holds."""
    for name, value in body.items():
        kind = _MEMBER_KINDS.get(name)
        if kind == "text":
            found.add(value)
        elif kind == "json":
            found.add_json(value)
        elif kind == "tools" and isinstance(value, list):
            for tool in value:  # without OpenAI's wrapper
                found.add_json(tool.get("function", tool) if isinstance(tool, dict) else tool)
        elif kind == "pictures":
            found.add_images(value)
        elif kind == "limit" and is_positive_integer(value):
            found.max_output = value
        elif (
            kind == "options"
            and isinstance(value, dict)
            and is_positive_integer(value.get("num_predict"))
        ):
            found.max_output = value["num_predict"]


def _is_inline_text(part: dict[str, Any]) -> bool:
    """Tell whether a document is not a file, but text that is sent as it is."""
    source = part.get("source")
    return isinstance(source, dict) and source.get("type") in _INLINE_SOURCES


def _file_tokens(base64: str) -> int:
    """Return the tokens of sound or of a file, guessed from its size."""
    return len(base64) * 3 // 4 // _BYTES_PER_TOKEN


def _detail(part: dict[str, Any]) -> object:
    """Return the level of detail of a picture, in either of OpenAI's formats."""
    image = part.get("image_url")
    return image.get("detail") if isinstance(image, dict) else part.get("detail")


def is_positive_integer(value: object) -> TypeGuard[int]:
    """Tell whether a member of a body is a whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Tail:
    """Keep the end of a body that passes by, without copying it."""

    __slots__ = ("_chunks", "_head", "_limit", "_size")

    def __init__(self, *, encoded: bool = False) -> None:
        self._chunks: deque[bytes] = deque()
        self._head = b""
        self._size = 0
        self._limit = _ENCODED_TAIL_BYTES if encoded else _TAIL_BYTES

    def add(self, chunk: bytes) -> None:
        """Note the next chunk."""
        chunks = self._chunks
        if len(self._head) < _HEAD_BYTES:  # even the first event may come in pieces
            self._head += chunk[: _HEAD_BYTES - len(self._head)]
        chunks.append(chunk)
        self._size += len(chunk)
        while self._size - len(chunks[0]) >= self._limit:
            self._size -= len(chunks.popleft())

    def read(self) -> bytes:
        """Return what is kept."""
        return b"".join(self._chunks)

    @property
    def head(self) -> bytes:
        """The first bytes."""
        return self._head


def is_complete(end: bytes) -> bool:
    """Tell whether a stream of events was complete, though it was not read to its end."""
    # The last event may be as long as the whole reply.
    return any(mark in end for mark in _END_MARKERS)


def find_usage(end: bytes, head: bytes = b"") -> Usage | None:
    """Return the usage at the end of a reply's body, merged with that in its ``head``."""
    key = next((key for key in _USAGE_KEYS if key in end), None)
    usage = (None if key is None else _last_usage(end, key)) or _usage_from_counts(end)
    first = head.find(_USAGE_KEYS[0])
    early = None if first < 0 else _usage_at(head, first)
    return early if usage is None else usage | early


def _last_usage(end: bytes, key: bytes) -> Usage | None:
    usage, position, tries = None, end.rfind(key), 8
    while usage is None and position >= 0 and tries:
        usage = _usage_at(end, position)
        position = end.rfind(key, 0, position)
        tries -= 1
    return usage


def _usage_from_counts(end: bytes) -> Usage | None:
    return read_usage(
        {name.decode(): int(count) for name, count in _TOKEN_COUNT.findall(end[-_HEAD_BYTES:])}
    )


def _usage_at(data: bytes, start: int) -> Usage | None:
    value = _OBJECT_KEY.match(data, start)
    if value is None:
        return None
    text = data[value.end() : value.end() + _HEAD_BYTES].decode("utf-8", "replace")
    try:
        found, _ = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):  # cut off, or not JSON
        return None
    return read_usage(found)
