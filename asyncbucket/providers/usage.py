"""What a call did cost in tokens, as its reply says.

Every provider reports it in another place and under other names, and LlamaIndex passes it on as it
comes: in `raw`, an object or a dict, or in `additional_kwargs`. This module has the one list of
both. The numbers come from outside: anything but a number from 0 to ten million is ignored.

In the bytes of a body the usage is found by its key, without parsing: a reply's text may contain
the letters ``"usage"``, but JSON escapes the quotes around them, so those bytes can only be the real
key. It is the key of an object, or, from Ollama, that of a number at the very end.
"""

import base64
import contextlib
import functools
import json
import operator
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from asyncbucket.engine.wording import is_number

_Lookup: TypeAlias = Callable[[str], Any]

#: Where a reply, or an event of a stream, keeps its usage.
_USAGE_FIELDS: Final = ("usage", "usage_metadata", "usageMetadata", "meta")
#: Where other objects keep the reply: LlamaIndex's, the first and last events of streams, Mistral's
#: events.
_WRAPPERS: Final = ("raw", "additional_kwargs", "response", "message", "data")

#: Where Cohere keeps the numbers inside: what it processed, and what it charges for.
_COHERE_FIELDS: Final = ("tokens", "billed_units")

#: OpenAI chat, then OpenAI Responses, Anthropic and Cohere, Bedrock, Gemini, Ollama.
_INPUT: Final = (
    *("prompt_tokens", "input_tokens", "inputTokens"),
    *("prompt_token_count", "promptTokenCount", "prompt_eval_count"),
)
_OUTPUT: Final = (
    *("completion_tokens", "output_tokens", "outputTokens"),
    *("candidates_token_count", "candidatesTokenCount", "eval_count"),
)
_TOTAL: Final = ("total_tokens", "totalTokens", "total_token_count", "totalTokenCount")
#: Anthropic and Bedrock count separately what is written to their cache, and read from it; limits
#: of input count what is written, but not what is read.
_CACHE_WRITES: Final = ("cache_creation_input_tokens", "cacheWriteInputTokens")
_CACHE_READS: Final = ("cache_read_input_tokens", "cacheReadInputTokens")
#: OpenAI and those who speak its protocol count in the input what is read from their cache, and so
#: does Gemini. From GPT-5.6 on, OpenAI also says what is written to it.
_DETAILS: Final = ("prompt_tokens_details", "input_tokens_details")
_CACHED: Final = ("cached_tokens", "cached_content_token_count", "cachedContentTokenCount")
_CACHED_NOW: Final = ("cache_write_tokens",)

#: More than any model's context, and too little to stop a limiter for good.
_MAX_TOKENS: Final = 10_000_000
_ABSURD: Final = -1

#: How much of the end, and after a key, is searched.
_SEARCHED_BYTES: Final = 4_096
#: The key of an object with the usage: everybody's, Gemini's, or that of Cohere's first version and
#: of its embeddings.
_USAGE_KEY: Final = re.compile(rb'"(?:usage|usageMetadata|meta)"\s*:\s*(?=\{)')
#: An event of a model's own stream inside a stream of Bedrock's:
#: docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_PayloadPart.html, read in November 2026.
_PACKED_EVENT: Final = re.compile(rb'"bytes":"([A-Za-z0-9+/]+={0,2})"')
#: How many of them are tried, from the end.
_MAX_OBJECTS: Final = 8
#: The numbers at the end of Ollama's last line: docs.ollama.com/api/chat, read in 2026.
_TOKEN_COUNT: Final = re.compile(rb'"(prompt_eval_count|eval_count)"\s*:\s*(\d{1,9})(?=\s*[,}])')
#: After one of these a stream is complete, even if the client reads no further. They cannot occur
#: in what a model writes, because JSON escapes quotes and line ends. (One regular expression for all
#: takes a millisecond for a long reply.)
_END_MARKERS: Final = (
    *(b"\ndata: [DONE]", b"\ndata:[DONE]", b'"eval_count"', b'"message-end"', b'"stream-end"'),
    *(b'"message_stop"', b'"response.completed"', b'"response.incomplete"'),
    *(b'"finishReason"', b'"totalTokens"'),
)
_DECODER: Final = json.JSONDecoder()
_NO_FIELDS: Final[_Lookup] = dict[str, Any]().get
_is_there: Final = functools.partial(operator.is_not, None)


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one call, used to settle its lease.

    Attributes:
        input_tokens: what limits of input count; whether that includes a prompt read from the
            provider's cache depends on the provider.
        output_tokens: what came back, reasoning included.
        total: both.
        cached_tokens: the part of the input that came from the provider's cache.
        written_tokens: the part of the input that was written to the provider's cache.
        cached_beside: what came from the provider's cache and is not part of the input, as Anthropic
            and Bedrock count.
    """

    input_tokens: int
    output_tokens: int
    total: int
    cached_tokens: int = 0
    written_tokens: int = 0
    cached_beside: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """Add up what two calls used."""
        return Usage(*map(operator.add, _numbers(self), _numbers(other)))

    def __or__(self, other: "Usage | None") -> "Usage":
        """Merge two reports of one stream; counts only grow, so the larger ones are right."""
        if other is None:
            return self
        sent, received, total, *rest = map(max, _numbers(self), _numbers(other))
        return Usage(sent, received, max(total, sent + received), *rest)

    def without_cached(self) -> "Usage":
        """Leave out of input and total what came from the provider's cache."""
        cached = self.cached_tokens
        return replace(
            self,
            input_tokens=self.input_tokens - cached,
            total=self.total - cached,
            cached_tokens=0,
        )


#: All numbers of a usage, in order. (`dataclasses.astuple` copies deeply, in ten times the time.)
_numbers: Final = operator.attrgetter(*Usage.__slots__)


def usage_of(reply: object) -> Usage | None:
    """Return the usage that a reply carries, or None if it carries none.

    `reply` is a ``ChatResponse``, a ``CompletionResponse``, the object in their ``raw``, or an
    event or chunk of a stream; an object or a dict; from OpenAI (chat, responses, embeddings),
    Anthropic, Gemini, Bedrock, Cohere, Ollama or a compatible server. All zeros are no usage: some
    servers send them until they know.
    """
    lookup, holders = _lookup_in(reply), [reply]
    for holder in holders:
        inside = lookup if holder is reply else _lookup_in(holder)
        for name in _USAGE_FIELDS:
            found = inside(name)
            usage = None if found is None else read_usage(found)
            if usage is not None:
                return usage
        if holder is reply:
            holders += filter(_is_there, map(lookup, _WRAPPERS))
            if (raw := lookup("raw")) is not None:
                holders += filter(_is_there, map(_lookup_in(raw), _WRAPPERS))
    # `additional_kwargs` of LlamaIndex's OpenAI, and Ollama's replies, hold the numbers directly.
    mappings = (holder for holder in holders if isinstance(holder, Mapping))
    return next(filter(None, map(read_usage, mappings)), None)


def read_usage(candidate: object) -> Usage | None:
    """Return the usage in ``candidate``, an object with token counts or with such objects, or None."""
    lookup = _lookup_in(candidate)
    usage = _read_counts(lookup)
    for name in () if usage is not None else _COHERE_FIELDS:
        inside = lookup(name)
        usage = usage or (None if inside is None else _read_counts(_lookup_in(inside)))
    return usage


def _read_counts(lookup: _Lookup) -> Usage | None:
    input_tokens = _number(lookup, _INPUT)
    output_tokens = _number(lookup, _OUTPUT)
    total = _number(lookup, _TOTAL)
    if not (input_tokens or output_tokens or total):
        return None
    if _ABSURD in (input_tokens, output_tokens, total):  # then what was reserved stays
        return None
    written = cache_writes = _number(lookup, _CACHE_WRITES)
    cache_reads = _number(lookup, _CACHE_READS)
    if total:
        rest = max(0, total - input_tokens - output_tokens)
        cache_writes = min(cache_writes, rest)  # gateways like LiteLLM count it in the prompt
        # Gemini counts thoughts in the total only, and Bedrock counts cache reads there.
        output_tokens += max(0, rest - cache_writes - cache_reads)
        cache_reads = min(cache_reads, rest - cache_writes)
    input_tokens += cache_writes
    cached = _number(lookup, _CACHED)
    for name in _DETAILS:
        if (found := lookup(name)) is not None:
            details = _lookup_in(found)
            cached = max(cached, _number(details, _CACHED))
            written = max(written, _number(details, _CACHED_NOW))
    cached = min(input_tokens, cached)
    return Usage(
        input_tokens,
        output_tokens,
        input_tokens + output_tokens,
        cached,
        written_tokens=min(written, input_tokens - cached),
        cached_beside=0 if cached else cache_reads,
    )


def _number(lookup: _Lookup, names: tuple[str, ...]) -> int:
    """Return the first number under one of these names, or 0."""
    for name in names:
        value = lookup(name)
        if type(value) is not int and (value is None or not is_number(value)):
            continue
        if 0 <= value <= _MAX_TOKENS:
            return round(value)
        if value > _MAX_TOKENS:
            return _ABSURD
    return 0


def _lookup_in(holder: Any) -> _Lookup:
    """Return a function that looks up names in a mapping or an object; None if it has none."""
    if holder is None:
        return _NO_FIELDS
    if type(holder) is dict:
        lookup: _Lookup = holder.get
        return lookup
    if hasattr(holder, "__pydantic_fields_set__"):
        # Asking pydantic for a missing attribute is slow, and each chunk of a stream is asked.
        fields: dict[str, Any] = vars(holder) | (holder.__pydantic_extra__ or {})
        return fields.get
    if isinstance(holder, Mapping):
        return holder.get
    return lambda name: getattr(holder, name, None)


def unpacked(data: bytes) -> bytes:
    """Return ``data`` with the events that Bedrock packs in base64 into a stream of its own."""
    if b'"bytes":"' in data:
        with contextlib.suppress(ValueError):  # the padding is wrong: these are not Bedrock's
            return b"\n".join([data, *map(base64.b64decode, _PACKED_EVENT.findall(data))])
    return data


def is_complete(end: bytes) -> bool:
    """Tell whether a stream of events was complete, though it was not read to its end."""
    # The last event may be as long as the whole reply.
    return any(mark in end for mark in _END_MARKERS)


def find_usage(end: bytes, head: bytes = b"") -> Usage | None:
    """Return the usage at the end of a reply's body, merged with that in its ``head``."""
    counts: dict[str, int] = {}
    if b'eval_count"' in (last := end[-_SEARCHED_BYTES:]):  # far quicker than to search for it
        counts = {name.decode(): int(n) for name, n in _TOKEN_COUNT.findall(last)}
    objects = deque(_USAGE_KEY.finditer(end), _MAX_OBJECTS)
    late = (_usage_at(end, key.end()) for key in reversed(objects))
    usage = next(filter(None, late), None) or (read_usage(counts) if counts else None)
    first = _USAGE_KEY.search(head)
    early = None if first is None else _usage_at(head, first.end())
    return early if usage is None else usage | early


def _usage_at(data: bytes, start: int) -> Usage | None:
    text = data[start : start + _SEARCHED_BYTES].decode("utf-8", "replace")
    try:
        found, _ = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):  # cut off, or not JSON
        return None
    return read_usage(found)
