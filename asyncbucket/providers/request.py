"""What a request's body says about its cost, and how long a reply will be that nothing limits.

A body is examined only if it is in memory already: a streamed upload stays a stream. Tokens are
counted as providers do at admission, by characters; no tokenizer runs. Everything that is sent to
the model counts: messages, instructions, tools and formats. Pictures, sound and files count by
constants and by size, because in JSON they are base64 and not text; a document may be text.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

#: Suffixes of paths whose calls make a model write; the last ones are Gemini's and, at Vertex,
#: Anthropic's.
_OUTPUT_PATHS: Final = (
    *("/completions", "/responses", "/responses/compact", "/messages"),
    *("/api/chat", "/api/generate", "/v1/chat", "/v2/chat"),
    *(":generateContent", ":streamGenerateContent", ":rawPredict", ":streamRawPredict"),
)
#: Bedrock's; other servers have an "/invoke", too.
_BEDROCK_PATH: Final = re.compile(
    r"/model/.+/(converse|converse-stream|invoke|invoke-with-response-stream)"
)
#: Suffixes of paths whose calls only send tokens. ``/messages/count_tokens`` is not among them: it
#: has its own limit of requests, and none of tokens (docs.anthropic.com, "Token counting", read in
#: 2025).
_INPUT_ONLY_PATHS: Final = (
    *("/embeddings", "/api/embed", "/v1/embed", "/v2/embed", "/rerank"),
    *(":embedContent", ":batchEmbedContents"),
)
#: The ends of paths that change an existing object: they cancel or archive it, or label a stored
#: reply, whose answer reports its total usage.
_UPDATE_PATH: Final = re.compile(r"/(cancel|archive)/?$|/chat/completions/[^/]+/?$")
#: Members that ask for several replies to one prompt.
_REPLY_COUNTS: Final = ("n", "best_of", "candidateCount")
#: Members that limit the tokens of a reply: OpenAI's, Anthropic's, Ollama's, Gemini's, Bedrock's.
OUTPUT_LIMITS: Final = (
    *("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens"),
    *("num_predict", "maxOutputTokens", "maxTokens", "max_gen_len"),
)
#: Members that hold such members: Ollama's, Gemini's, Bedrock's.
_OPTIONS: Final = ("options", "generationConfig", "generation_config", "inferenceConfig")
#: Members of a message that are not sent to the model.
_NOT_SENT: Final = frozenset(
    {"cache_control", "detail", "id", "media_type", "role", "status", "tool_call_id", "type"}
)
#: Parts that are sound, video or files: by the member that holds them, as at Gemini and Bedrock, or by
#: their type; except Anthropic's documents whose source is text or content parts.
_FILE_MEMBERS: Final = frozenset({"audio", "document", "inlineData", "inline_data", "video"})
_FILE_TYPE: Final = re.compile(r"audio|video|\b(document|(input_)?file)$")
_INLINE_SOURCES: Final = ("text", "content")
#: A data URL: a picture, a video or a file, whatever the part around it is called.
_DATA_URL: Final = re.compile(r"data:(\w+)/[^,]{1,99};base64,")
#: OpenAI's GPT-4o and 4.1: 85 in low detail; 85 and 170 for each of four tiles of 512 pixels ("Images
#: and vision", read in 2025). Anthropic: width * height / 750, at most about 1,600.
IMAGE_TOKENS: Final = 765
LOW_DETAIL_IMAGE_TOKENS: Final = 85
#: Bytes of sound or of a file per token: a guess that the usage corrects.
_BYTES_PER_TOKEN: Final = 64

_DECODER: Final = json.JSONDecoder()
#: Tokens expected before any reply; LlamaIndex assumes as many, too.
FORESEEN: Final = 256
#: The share of replies that are to be no longer than the forecast, and how many are remembered.
_QUANTILE: Final = 0.9
_REMEMBERED: Final = 200


@dataclass(slots=True)
class RequestSize:
    """Add up what a call sends and asks for."""

    #: Whether the model writes a reply.
    writes: bool = False
    #: Characters of all text.
    characters: int = 0
    #: The same, in bytes of UTF-8.
    size: int = 0
    #: Tokens of what is not text, or is sent as token numbers.
    extra: int = 0
    #: The most tokens of one reply, if the call says so.
    max_output: int | None = None
    #: How many replies are asked for.
    replies: int = 1

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

    def expected(self, foreseen: int) -> int:
        """Return the tokens of all replies if each is as long as ``foreseen``, or as is allowed."""
        return min(self.max_output or foreseen, foreseen) * self.replies if self.writes else 0

    def add(self, value: object, name: str = "") -> None:
        """Add text, parts of messages, or lists of them; ``name`` is that of the member in a part."""
        if isinstance(value, str):
            data = _DATA_URL.match(value) if value.startswith("data:") else None
            if data is not None:
                self.extra += IMAGE_TOKENS if data[1] == "image" else _file_tokens(value)
                return
            self.characters += len(value)
            self.size += len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
        elif isinstance(value, list):
            for item in value:
                self.add(item)
                if isinstance(item, str):  # each of several texts has its own last token
                    self.characters += -len(item) % 4
                    self.size += -len(item) % 4
        elif isinstance(value, dict):
            self._add_part(value, name)
        elif isinstance(value, int) and not isinstance(value, bool):
            self.extra += 1  # texts to embed may be sent as token numbers

    def add_json(self, value: object) -> None:
        """Add what the model gets to see as JSON."""
        if value:
            self.add(json.dumps(value, ensure_ascii=False))

    def add_tools(self, value: object) -> None:
        """Add tools, without OpenAI's wrapper."""
        for tool in value if isinstance(value, list) else ():
            self.add_json(tool.get("function", tool) if isinstance(tool, dict) else tool)

    def add_images(self, value: object) -> None:
        """Add pictures that are sent as plain base64, as to Ollama."""
        if isinstance(value, list):
            self.extra += IMAGE_TOKENS * len(value)

    def limit_output(self, value: object) -> None:
        """Take in the most tokens of a reply."""
        if is_positive_integer(value):
            self.max_output = value

    def add_options(self, value: object) -> None:
        """Take in options, some of which may limit the output."""
        if isinstance(value, dict):
            for name in OUTPUT_LIMITS:
                self.limit_output(value.get(name))

    def _add_part(self, part: dict[str, Any], name: str) -> None:
        kind = f"{part.get('mimeType') or part.get('mime_type') or ''} {part.get('type') or ''}"
        if "image" in kind or name == "image":
            self.extra += LOW_DETAIL_IMAGE_TOKENS if _detail(part) == "low" else IMAGE_TOKENS
        elif (name in _FILE_MEMBERS or _FILE_TYPE.search(kind)) and not _is_inline_text(part):
            self.extra += _file_tokens(json.dumps(part))
        else:
            for member, value in part.items():
                if member in ("tool_calls", "function_call"):
                    self.add_json(value)
                elif member == "images" and "role" in part:
                    self.add_images(value)
                elif member not in _NOT_SENT:
                    self.add(value, member)


def read_json(content: bytes | None) -> Mapping[str, Any]:
    """Return the JSON object in ``content``; an empty one if it is none."""
    body = any_json(content) if content and content.lstrip()[:1] == b"{" else None
    return body if isinstance(body, dict) else {}


def any_json(content: bytes) -> object:
    """Return what ``content`` is as JSON; None if it is none."""
    try:
        return _DECODER.decode(content.decode())  # `json.loads` would guess the encoding first
    except (ValueError, RecursionError):
        return None


def request_size(path: str, body: Mapping[str, Any]) -> RequestSize:
    """Return what a call to ``path`` with the JSON ``body`` sends and asks for."""
    path = path.rstrip("/")
    writes = path.endswith(_OUTPUT_PATHS) or _BEDROCK_PATH.fullmatch(path) is not None
    found = RequestSize(writes=writes, replies=replies_of(body))
    if writes or is_input_only(path):
        try:
            for name, value in body.items():
                if name in _MEMBERS:
                    _MEMBERS[name](found, value)
        except RecursionError:  # nested deeper than any real call
            pass
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
    for holder in filter(None, (body, *map(body.get, _OPTIONS))):
        for name in _REPLY_COUNTS:
            count = holder.get(name) if isinstance(holder, dict) else None
            if count is not None and is_positive_integer(count):
                per_prompt = max(per_prompt, count)
    prompts = body.get("prompt")
    if not isinstance(prompts, list):
        return per_prompt
    # A list of numbers is one prompt.
    return per_prompt * max(1, sum(not isinstance(prompt, int) for prompt in prompts))


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


#: What the members of a body mean, by their names in OpenAI's chat, completions, responses and
#: embeddings, Anthropic's messages, Cohere, Ollama, Gemini and Bedrock.
_MEMBERS: Final[Mapping[str, Callable[[RequestSize, object], None]]] = {
    **dict.fromkeys(("messages", "input", "prompt", "instructions", "system"), RequestSize.add),
    **dict.fromkeys(("suffix", "query", "documents", "texts"), RequestSize.add),
    **dict.fromkeys(("message", "chat_history", "preamble"), RequestSize.add),
    **dict.fromkeys(("contents", "content", "requests"), RequestSize.add),
    **dict.fromkeys(("systemInstruction", "system_instruction"), RequestSize.add),
    **dict.fromkeys(("response_format", "text", "format", "output_config"), RequestSize.add_json),
    **dict.fromkeys(("tools", "functions"), RequestSize.add_tools),
    "toolConfig": RequestSize.add_json,
    **dict.fromkeys(OUTPUT_LIMITS, RequestSize.limit_output),
    **dict.fromkeys(_OPTIONS, RequestSize.add_options),
    "images": RequestSize.add_images,
}


class OutputForecast:
    """Estimate how long a reply will be: an upper quantile of the latest replies.

    The one foreseen before any counts as the first. So a longer reply raises the forecast at once,
    and shorter ones lower it only when they are nine of ten. Threads may share it: of two replies
    that end at once, one may be forgotten.
    """

    __slots__ = ("_foreseen", "_latest")

    def __init__(self) -> None:
        self._latest, self._foreseen = [FORESEEN], FORESEEN

    def observe(self, output_tokens: int) -> None:
        """Remember the length of a reply, and forget the oldest."""
        self._latest = latest = [*self._latest, output_tokens][-_REMEMBERED:]
        self._foreseen = sorted(latest)[math.ceil(_QUANTILE * len(latest)) - 1]

    def foresee(self) -> int:
        """Return the tokens that a reply probably stays under (nearest rank, no interpolation)."""
        return self._foreseen
