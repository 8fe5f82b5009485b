"""What a call did cost in tokens, as its reply says.

Every provider reports it in another place and under other names, and LlamaIndex passes it on as it
comes: in `raw`, an object or a dict, or in `additional_kwargs`. This module has the one list of
both. The numbers come from outside: anything but a number from 0 to ten million is ignored.

In the bytes of a body the usage is found by its key, without parsing: a reply's text may contain
the letters ``"usage"``, but JSON escapes the quotes around them, so those bytes can only be the real
key. It is the key of an object, or, from Ollama, that of a number at the very end.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

#: Where a reply, or an event of a stream, keeps its usage.
_USAGE_FIELDS: Final = ("usage", "usage_metadata")
#: Where other objects keep the reply: LlamaIndex's, the first and last events of streams, Mistral's
#: events.
_WRAPPERS: Final = ("raw", "additional_kwargs", "response", "message", "data")

#: Where Cohere keeps the numbers inside: what it processed, and what it charges for.
_COHERE_FIELDS: Final = ("tokens", "billed_units")

#: OpenAI chat, then OpenAI Responses, Anthropic and Cohere, Bedrock, Gemini, Ollama.
_INPUT: Final = (
    "prompt_tokens",
    "input_tokens",
    "inputTokens",
    "prompt_token_count",
    "prompt_eval_count",
)
_OUTPUT: Final = (
    "completion_tokens",
    "output_tokens",
    "outputTokens",
    "candidates_token_count",
    "eval_count",
)
_TOTAL: Final = ("total_tokens", "totalTokens", "total_token_count")
#: Anthropic and Bedrock count separately what is written to their cache, and read from it; limits
#: of input count what is written, but not what is read.
_CACHE_WRITES: Final = ("cache_creation_input_tokens", "cacheWriteInputTokens")
_CACHE_READS: Final = ("cache_read_input_tokens", "cacheReadInputTokens")
#: OpenAI and those who speak its protocol count in the input what is read from their cache.
_DETAILS: Final = ("prompt_tokens_details", "input_tokens_details")
_CACHED: Final = "cached_tokens"

#: More than any model's context, and too little to stop a limiter for good.
_MAX_TOKENS: Final = 10_000_000

#: How much of the end, and after a key, is searched.
_SEARCHED_BYTES: Final = 4_096
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


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one call, used to settle its lease.

    Attributes:
        input_tokens: what limits of input count; whether that includes a prompt read from the
            provider's cache depends on the provider.
        output_tokens: what came back, reasoning included.
        total: both.
        cached_tokens: the part of the input that came from the provider's cache.
    """

    input_tokens: int
    output_tokens: int
    total: int
    cached_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """Add up what two calls used."""
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.total + other.total,
            self.cached_tokens + other.cached_tokens,
        )

    def __or__(self, other: "Usage | None") -> "Usage":
        """Merge two reports of one stream; counts only grow, so the larger ones are right."""
        if other is None:
            return self
        input_tokens = max(self.input_tokens, other.input_tokens)
        output_tokens = max(self.output_tokens, other.output_tokens)
        total = max(self.total, other.total, input_tokens + output_tokens)
        cached_tokens = max(self.cached_tokens, other.cached_tokens)
        return Usage(input_tokens, output_tokens, total, cached_tokens)

    def without_cached(self) -> "Usage":
        """Leave out of input and total what came from the provider's cache."""
        rest = self.input_tokens - self.cached_tokens
        return Usage(rest, self.output_tokens, self.total - self.cached_tokens)


def usage_of(reply: object) -> Usage | None:
    """Return the usage that a reply carries, or None if it carries none.

    `reply` is a ``ChatResponse``, a ``CompletionResponse``, the object in their ``raw``, or an
    event or chunk of a stream; an object or a dict; from OpenAI (chat, responses, embeddings),
    Anthropic, Gemini, Bedrock, Ollama or a compatible server. All zeros are no usage: some servers
    send them until they know.
    """
    for candidate in _usage_candidates(reply):
        usage = None if candidate is None else read_usage(candidate)
        if usage is not None:
            return usage
    return None


def _usage_candidates(reply: object) -> Iterator[object]:
    """Yield the places where usage may be, the most reliable first."""
    raw = _get(reply, "raw")
    holders = [reply, *(_get(holder, name) for holder in (reply, raw) for name in _WRAPPERS)]
    for holder in holders:
        if holder is not None:
            yield from (_get(holder, name) for name in _USAGE_FIELDS)
    # `additional_kwargs` of LlamaIndex's OpenAI, and Ollama's replies, hold the numbers directly.
    yield from (holder for holder in holders if isinstance(holder, Mapping))


def read_usage(candidate: object) -> Usage | None:
    """Return the usage in ``candidate``, an object with token counts or with such objects, or None."""
    found = map(_read_counts, (candidate, *(_get(candidate, name) for name in _COHERE_FIELDS)))
    return next(filter(None, found), None)


def _read_counts(counts: object) -> Usage | None:
    input_tokens = _number(counts, *_INPUT) or 0
    output_tokens = _number(counts, *_OUTPUT) or 0
    total = _number(counts, *_TOTAL) or 0
    if not (input_tokens or output_tokens or total):
        return None
    cache_writes = _number(counts, *_CACHE_WRITES) or 0
    if total:
        rest = max(0, total - input_tokens - output_tokens)
        cache_writes = min(cache_writes, rest)  # gateways like LiteLLM count it in the prompt
        # Gemini counts thoughts in the total only, and Bedrock counts cache reads there.
        output_tokens += max(0, rest - cache_writes - (_number(counts, *_CACHE_READS) or 0))
    input_tokens += cache_writes
    details = (_get(counts, name) for name in _DETAILS)
    cached = max(_number(detail, _CACHED) or 0 for detail in details)
    return Usage(
        input_tokens, output_tokens, input_tokens + output_tokens, min(input_tokens, cached)
    )


def _number(counts: object, *names: str) -> int | None:
    """Return the first number under one of these names."""
    lookup = counts.get if isinstance(counts, dict) else functools.partial(_get, counts)
    for name in names:
        value = lookup(name)
        if value is None:
            continue
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and 0 <= value <= _MAX_TOKENS
        ):
            return round(value)
    return None


def _get(holder: Any, name: str) -> Any:
    if isinstance(holder, Mapping):
        return holder.get(name)
    attributes = getattr(holder, "__dict__", {})
    if name in attributes:
        return attributes[name]
    if hasattr(holder, "__pydantic_fields_set__"):
        # Asking pydantic for a missing attribute is slow, and each chunk of a stream is asked.
        return (holder.__pydantic_extra__ or {}).get(name)
    return getattr(holder, name, None)


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
        {name.decode(): int(count) for name, count in _TOKEN_COUNT.findall(end[-_SEARCHED_BYTES:])}
    )


def _usage_at(data: bytes, start: int) -> Usage | None:
    value = _OBJECT_KEY.match(data, start)
    if value is None:
        return None
    text = data[value.end() : value.end() + _SEARCHED_BYTES].decode("utf-8", "replace")
    try:
        found, _ = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):  # cut off, or not JSON
        return None
    return read_usage(found)
