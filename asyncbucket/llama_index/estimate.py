"""What a call will cost in tokens, estimated before it is made.

The input is what the provider is sent, as JSON: every block of every message, tools, the response
format and all other arguments, at four bytes a token. Providers estimate alike at admission, most
of them by the text alone, so a call is never booked below that; what is booked too much comes back
with the reply. No tokenizer runs unless one is given: then the larger number counts.

The output is `max_tokens` if the call or the model sets it: OpenAI charges that much at admission.
Otherwise nobody knows; the estimate is what nine in ten of the model's latest replies stayed under
(`OutputForecast`). Such a guess is marked as one, because it must not make a call impossible.

Nothing here does I/O, so pictures are not measured and files are not opened: media count by the
constants below.
"""

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from asyncbucket.providers.request import (
    IMAGE_TOKENS,
    LOW_DETAIL_IMAGE_TOKENS,
    OUTPUT_LIMITS,
    OutputForecast,
    is_positive_integer,
    replies_of,
)

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.llms import LLM

BYTES_PER_TOKEN: Final = 4
#: Bytes of what models add to each call: temperature, stream options and the like.
_ADDED_BYTES: Final = 128
#: For media that cannot be measured without a decoder: the field with the bytes in base64, the
#: fewest tokens, and bytes per token. Sound is MP3 of 128 kbit/s at Gemini's 32 tokens a second,
#: video 2 Mbit/s at its 263, and PDF pages 50 kB at Anthropic's 1,500 to 3,000.
_MEDIA: Final = {
    "audio": ("audio", 256, 500),
    "video": ("video", 2048, 950),
    "document": ("data", 2048, 20),
}
#: What is kept in fields, and sent with every call; the latter two by OpenAIResponses.
_SENT_FIELDS: Final = ("model", "instructions", "built_in_tools")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call is expected to cost.

    Attributes:
        input_tokens: what is sent. Where dollars count, a call with an output limit reserves them for
            four times as many, because a token has at least one byte.
        output_tokens: what comes back, at most or probably.
        foreseen: whether the output is a guess rather than a limit. A guess may be lowered to what
            the limits can ever admit.
    """

    input_tokens: int
    output_tokens: int
    foreseen: bool = False


@runtime_checkable
class Estimator(Protocol):
    """Estimate the cost of a call. It runs on the event loop: no I/O, a few milliseconds at most.

    One that also has ``observe(output_tokens)`` is told how long each whole reply was.
    """

    def chat(
        self, llm: "LLM", messages: Sequence["ChatMessage"], kwargs: Mapping[str, Any], /
    ) -> Estimate:
        """Estimate a chat: ``messages`` hold the system prompt, ``kwargs`` tools and the like."""
        ...

    def completion(self, llm: "LLM", prompt: str, kwargs: Mapping[str, Any], /) -> Estimate:
        """Estimate a completion of ``prompt``."""
        ...

    def embedding(self, texts: Sequence[str], /) -> int:
        """Estimate the tokens of one batch of texts to embed."""
        ...


class DefaultEstimator:
    """Estimate by the bytes that are sent, and by the replies so far.

    Each model needs an estimator of its own, which learns from that model's replies.

    Args:
        tokenizer: turns a text into tokens, which count if they are more. It must do no I/O, as
            some models' own tokenizers do, and it takes the event loop's time.
    """

    def __init__(self, tokenizer: Callable[[str], Sized] | None = None) -> None:
        self._tokenizer = tokenizer
        self._forecast = OutputForecast()

    def chat(
        self, llm: "LLM", messages: Sequence["ChatMessage"], kwargs: Mapping[str, Any]
    ) -> Estimate:
        """Estimate a chat by everything that is sent."""
        media: list[int] = []
        sent = [_message(message, media) for message in messages]
        return self._estimate(llm, sent, kwargs, sum(media))

    def completion(self, llm: "LLM", prompt: str, kwargs: Mapping[str, Any]) -> Estimate:
        """Estimate a completion; chat models get the prompt as one message."""
        return self._estimate(llm, [{"role": "user", "content": prompt}], kwargs, 0)

    def embedding(self, texts: Sequence[str]) -> int:
        """Estimate the tokens of one batch of texts to embed, at least one."""
        return max(1, sum(map(self._count, texts)))

    def observe(self, output_tokens: int) -> None:
        """Learn how long a whole reply was."""
        self._forecast.observe(output_tokens)

    def _estimate(
        self, llm: "LLM", messages: list[Any], kwargs: Mapping[str, Any], media: int
    ) -> Estimate:
        fields = vars(llm)  # asking pydantic for what is missing takes microseconds
        arguments = {**(fields.get("additional_kwargs") or {}), **kwargs}
        sent = {name: fields[name] for name in _SENT_FIELDS if name in fields}
        limit = _output_limit(arguments) or _output_limit(fields)
        replies = replies_of(arguments) if arguments else 1
        text = _json({"messages": messages, **sent, **arguments})
        return Estimate(
            input_tokens=self._count(text) + _ADDED_BYTES // BYTES_PER_TOKEN + media,
            # The forecast is for the whole call.
            output_tokens=limit * replies or self._forecast.foresee(),
            foreseen=not limit,
        )

    def _count(self, text: str) -> int:
        """Return the tokens of a text, by its bytes or by the tokenizer if that finds more."""
        # Lone surrogates can't be encoded otherwise; they are three bytes as their neighbors are.
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        by_size = -(-size // BYTES_PER_TOKEN)
        return by_size if self._tokenizer is None else max(by_size, len(self._tokenizer(text)))


def prompt_to_cache(
    llm: "LLM", messages: Sequence["ChatMessage"], kwargs: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return what of a chat a provider may cache; None if nothing in it asks for that.

    It asks by LlamaIndex's cache points, and by what its Anthropic integration takes.
    """
    last = vars(llm).get("cache_idx")
    asks = last is not None or "cache_control" in kwargs
    for message in messages:
        if not hasattr(message, "blocks"):
            return None
        asks = asks or "cache_control" in message.additional_kwargs
        for block in message.blocks:
            asks = asks or block.block_type == "cache"
    if not asks:
        return None
    body: dict[str, Any] = {
        name: kwargs[name] for name in ("tools", "cache_control") if kwargs.get(name)
    }
    body["messages"] = sent = list[dict[str, Any]]()
    for number, message in enumerate(messages):
        content = [
            {"cachePoint": block.cache_control.model_dump()}
            if block.block_type == "cache"
            else _block(block, []) or block  # media as they are
            for block in message.blocks
        ]
        sent.append({"role": message.role, **message.additional_kwargs, "content": content})
        if last is not None and (last < 0 or number <= last):
            sent[-1]["cache_control"] = {"type": "ephemeral"}
    return body


def turns_of(messages: Sequence["ChatMessage"]) -> Mapping[str, Any]:
    """Return the texts of a chat, which tell its conversation from others."""
    turns = (each for each in messages if hasattr(each, "blocks"))
    return {"messages": [{"role": each.role, "content": each.content} for each in turns]}


def _message(message: "ChatMessage", media: list[int]) -> Any:
    """Return a message as it is sent, with the tool calls that some integrations keep beside.

    The tokens of what is not sent as text are added to ``media``.
    """
    if not hasattr(message, "blocks"):
        return None  # not a message: the model's own error says it better
    extra = message.additional_kwargs
    if extra and any(block.block_type == "tool_call" for block in message.blocks):
        extra = {name: value for name, value in extra.items() if name != "tool_calls"}
    content = [_block(block, media) for block in message.blocks]
    return {"role": message.role, "content": content, **extra}


def _block(block: Any, media: list[int]) -> Any:
    """Return a content block as it is sent; most count by their fields."""
    match getattr(block, "block_type", None):
        case "text":
            return {"type": "text", "text": block.text}
        case "image":
            media.append(LOW_DETAIL_IMAGE_TOKENS if block.detail == "low" else IMAGE_TOKENS)
        case "document" if str(block.document_mimetype).startswith("text/") and block.data:
            media.append(_decoded_size(block.data) // BYTES_PER_TOKEN)
        case "audio" | "video" | "document" as medium:
            field, least, bytes_per_token = _MEDIA[medium]
            media.append(max(least, _decoded_size(getattr(block, field)) // bytes_per_token))
        case "tool_call":
            arguments = _json(block.tool_kwargs)  # sent as JSON inside JSON
            function = {"name": block.tool_name, "arguments": arguments}
            return {"id": block.tool_call_id, "type": "function", "function": function}
        case _:
            return block  # as its fields
    return None


def _output_limit(holder: Mapping[str, Any]) -> int:
    """Return the most tokens of a reply; 0 if nothing limits them."""
    most = 0
    for name in OUTPUT_LIMITS:
        limit = holder.get(name)
        if limit is not None and is_positive_integer(limit):
            most = max(most, limit)
    return most


def _json(value: object) -> str:
    """Return ``value`` as JSON; if that is impossible, as text: an estimate must not fail a call."""
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _to_jsonable(value: Any) -> object:
    """Convert what is sent as JSON: pydantic models and classes."""
    convert = getattr(value, "model_json_schema" if isinstance(value, type) else "model_dump", None)
    return convert() if callable(convert) else str(value)


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_to_jsonable)


def _decoded_size(data: object) -> int:
    """Return the number of bytes of data in base64; 0 if there is none here."""
    return len(data) * 3 // 4 if isinstance(data, bytes) else 0
