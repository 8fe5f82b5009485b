"""What a call did cost in tokens, as the reply says it.

Every provider says it in a place and with names of its own, and LlamaIndex passes it on as it comes:
in `raw`, an object or a dict, or in `additional_kwargs`. Here is the one list of both. The numbers
come from outside: what is not a number from 0 to ten million is not believed.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

#: Where a reply, or an event of a stream, keeps its usage.
_PLACES: Final = ("usage", "usage_metadata")
#: Where a reply is kept by what is passed on: LlamaIndex, the end and the beginning of a stream, Mistral's
#: events.
_WRAPPERS: Final = ("raw", "additional_kwargs", "response", "message", "data")

#: OpenAI chat, then OpenAI Responses and Anthropic, Bedrock, Gemini, Ollama.
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
#: Anthropic and Bedrock count apart what is written to their cache, and read from it; limits of input
#: count what is written, and not what is read.
_CACHE_WRITES: Final = ("cache_creation_input_tokens", "cacheWriteInputTokens")
_CACHE_READS: Final = ("cache_read_input_tokens", "cacheReadInputTokens")

#: More than any model's context, and less than would stop a limiter for good.
_MOST: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one call, by which its lease is settled.

    Attributes:
        input_tokens: what limits of input count, a prompt read from the provider's cache included or
            not, as the provider does.
        output_tokens: what came back, reasoning included.
        total: both.
    """

    input_tokens: int
    output_tokens: int
    total: int

    def __add__(self, other: "Usage") -> "Usage":
        """Add up what two calls used."""
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.total + other.total,
        )

    def __or__(self, other: "Usage | None") -> "Usage":
        """Join what two events of a stream say: counts only grow, so the larger ones are right."""
        if other is None:
            return self
        input_tokens = max(self.input_tokens, other.input_tokens)
        output_tokens = max(self.output_tokens, other.output_tokens)
        total = max(self.total, other.total, input_tokens + output_tokens)
        return Usage(input_tokens, output_tokens, total)


def usage_of(reply: object) -> Usage | None:
    """Return the usage that a reply carries, or None if it carries none.

    `reply` is a ``ChatResponse``, a ``CompletionResponse``, what is in their ``raw``, or an event or
    chunk of a stream; objects and dicts alike, of OpenAI (chat, responses, embeddings), Anthropic,
    Gemini, Bedrock, Ollama and those that imitate them. All zeros are no usage: some servers send
    them until they know.
    """
    for place in _places(reply):
        usage = None if place is None else read_usage(place)
        if usage is not None:
            return usage
    return None


def _places(reply: object) -> Iterator[object]:
    """Yield where usage may be, the surest place first."""
    raw = _get(reply, "raw")
    holders = [reply, *(_get(holder, name) for holder in (reply, raw) for name in _WRAPPERS)]
    for holder in holders:
        if holder is not None:
            yield from (_get(holder, name) for name in _PLACES)
    # `additional_kwargs` of LlamaIndex's OpenAI, and Ollama's replies, hold the numbers themselves.
    yield from (holder for holder in holders if isinstance(holder, Mapping))


def read_usage(place: object) -> Usage | None:
    """Return the usage that is written in ``place``, which is one already, or None."""
    given, received = _number(place, *_INPUT) or 0, _number(place, *_OUTPUT) or 0
    total = _number(place, *_TOTAL) or 0
    if not (given or received or total):
        return None
    written = _number(place, *_CACHE_WRITES) or 0
    if total:
        rest = max(0, total - given - received)
        written = min(written, rest)  # of gateways like LiteLLM it is in the prompt
        # Gemini counts its thoughts in the total alone, and Bedrock there what it read from its cache.
        received += max(0, rest - written - (_number(place, *_CACHE_READS) or 0))
    given += written
    return Usage(given, received, given + received)


def _number(place: object, *names: str) -> int | None:
    """Return the first number that goes by one of these names."""
    look = place.get if isinstance(place, dict) else functools.partial(_get, place)
    for name in names:
        value = look(name)
        if value is None:
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MOST:
            return round(value)
    return None


def _get(holder: Any, name: str) -> Any:
    if isinstance(holder, Mapping):
        return holder.get(name)
    attributes = getattr(holder, "__dict__", {})
    if name in attributes:
        return attributes[name]
    if hasattr(holder, "__pydantic_fields_set__"):
        # Asking pydantic for what it has not is slow, and each chunk of a stream is asked.
        return (holder.__pydantic_extra__ or {}).get(name)
    return getattr(holder, name, None)
