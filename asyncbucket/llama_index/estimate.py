"""What a call will cost in tokens, estimated before it is made.

The input is what the provider is sent: every block of every message, what the provider's template
adds to each, tools and the response format. A limiter that books too little lets too many calls
pass and is refused; one that books too much gets the rest back when the reply comes. So the larger
of two numbers counts: the tokenizer's, and a quarter of the characters, OpenAI's estimate at
admission.

The output is `max_tokens` if the call or the model sets it: OpenAI charges that much at admission.
Otherwise nobody knows; the estimate is what nine in ten of the model's latest replies stayed under
(`OutputForecast`). Such a guess is marked as one, because it must not make a call impossible.

Nothing here does I/O, so pictures are not measured and files are not opened: media count by the
constants below.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from asyncbucket.core.cost import rounded_up
from asyncbucket.llama_index.tokens import Tokenizer, bundled_tokenizer, count
from asyncbucket.providers.forecast import OutputForecast
from asyncbucket.providers.request import (
    IMAGE_TOKENS,
    LOW_DETAIL_IMAGE_TOKENS,
    is_positive_integer,
    replies_of,
)

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.llms import LLM

#: OpenAI's template: 3 tokens a message, 1 for the role, and 3 that open the reply. See "How to
#: count tokens with tiktoken" in the OpenAI cookbook, read in 2025.
_TOKENS_PER_MESSAGE: Final = 4
_TOKENS_BEFORE_REPLY: Final = 3
#: For media that cannot be measured without a decoder: the fewest tokens, and bytes per token.
#: Sound is MP3 of 128 kbit/s at Gemini's 32 tokens a second, video 2 Mbit/s at its 263, and PDF
#: pages 50 kB at Anthropic's 1,500 to 3,000.
_MEDIA: Final = {"audio": (256, 500), "video": (2048, 950), "document": (2048, 20)}
#: The fields that hold a medium's bytes, in base64.
_DATA_FIELDS: Final = {"audio": "audio", "video": "video", "document": "data"}

_OUTPUT_LIMITS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
#: Arguments that are sent and count as input.
_SENT_ARGUMENTS: Final = (
    "tools",
    "built_in_tools",
    "functions",
    "response_format",
    "text",
    "instructions",
    "system",
)
#: Those of them that OpenAIResponses keeps in fields, and sends with every call.
_SENT_FIELDS: Final = ("instructions", "built_in_tools")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call is expected to cost.

    Attributes:
        input_tokens: what is sent.
        output_tokens: what comes back, at most or probably.
        foreseen: whether the output is a guess rather than a limit. A guess may be lowered to what
            the limits can ever admit.

    Raises:
        TypeError, ValueError: an amount is not a number, or negative, NaN or infinite.
    """

    input_tokens: int
    output_tokens: int
    foreseen: bool = False

    def __post_init__(self) -> None:
        rounded_up(self.input_tokens, "input_tokens")
        rounded_up(self.output_tokens, "output_tokens")


class Estimator(Protocol):
    """Estimate the cost of a call. It runs on the event loop: no I/O, a few milliseconds at most."""

    def chat(
        self, llm: "LLM", messages: Sequence["ChatMessage"], kwargs: Mapping[str, Any]
    ) -> Estimate:
        """Estimate a chat: ``messages`` hold the system prompt, ``kwargs`` tools and the like."""
        ...

    def completion(self, llm: "LLM", prompt: str, kwargs: Mapping[str, Any]) -> Estimate:
        """Estimate a completion of ``prompt``."""
        ...

    def embedding(self, texts: Sequence[str]) -> int:
        """Estimate the tokens of one batch of texts to embed."""
        ...


@runtime_checkable
class Observer(Protocol):
    """An estimator that learns from replies."""

    def observe(self, output_tokens: int) -> None:
        """Learn how long a whole reply was."""
        ...


class DefaultEstimator:
    """Estimate with a tokenizer that needs no download, and with the replies so far.

    Each model needs an estimator of its own, which learns from that model's replies.

    Args:
        tokenizer: turns a text into tokens; by default the one inside llama_index.core, or a count
            of characters if that is missing. It must not do I/O, as some models' own tokenizers do.
        forecast: estimates the length of replies without `max_tokens`.
    """

    def __init__(
        self, tokenizer: Tokenizer | None = None, *, forecast: OutputForecast | None = None
    ) -> None:
        self._tokenizer = bundled_tokenizer() if tokenizer is None else tokenizer
        self._forecast = OutputForecast() if forecast is None else forecast

    def __repr__(self) -> str:
        return f"<DefaultEstimator {self._forecast!r}>"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the bundled tokenizer: the other process has it, too."""
        bundled = self._tokenizer is bundled_tokenizer()
        return {**vars(self), "_tokenizer": None if bundled else self._tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tokenizer = self._tokenizer or bundled_tokenizer()

    def chat(
        self, llm: "LLM", messages: Sequence["ChatMessage"], kwargs: Mapping[str, Any]
    ) -> Estimate:
        """Estimate a chat by everything that is sent."""
        payload = _Payload(tokens=_TOKENS_BEFORE_REPLY)
        for message in messages:
            payload.add_message(message)
        return self._estimate(llm, payload, kwargs)

    def completion(self, llm: "LLM", prompt: str, kwargs: Mapping[str, Any]) -> Estimate:
        """Estimate a completion; chat models get the prompt as one message."""
        return self._estimate(
            llm, _Payload(prompt, tokens=_TOKENS_PER_MESSAGE + _TOKENS_BEFORE_REPLY), kwargs
        )

    def embedding(self, texts: Sequence[str]) -> int:
        """Estimate the tokens of one batch of texts to embed, at least one."""
        return max(1, self.count(*texts))

    def count(self, *texts: str) -> int:
        """Return the tokens of `texts`, or a quarter of their characters if that is more."""
        characters = sum(map(len, texts))
        return max(count(texts, self._tokenizer), math.ceil(characters / 4))

    def observe(self, output_tokens: int) -> None:
        """Learn how long a whole reply was."""
        self._forecast.observe(output_tokens)

    def _estimate(self, llm: "LLM", payload: "_Payload", kwargs: Mapping[str, Any]) -> Estimate:
        # A structured LLM calls another one, and sends it the schema of its output.
        model = getattr(llm, "llm", llm)
        payload.add_argument(getattr(llm, "output_cls", None))
        fields = {name: getattr(model, name, None) for name in _SENT_FIELDS}
        arguments = {**fields, **_additional_kwargs(model), **kwargs}
        for name in _SENT_ARGUMENTS:
            payload.add_argument(arguments.get(name))
        from_arguments = (arguments.get(name) for name in _OUTPUT_LIMITS)
        from_fields = (getattr(model, name, None) for name in _OUTPUT_LIMITS)
        limit = next(filter(is_positive_integer, (*from_arguments, *from_fields)), 0)
        return Estimate(
            input_tokens=self.count(*payload.texts) + payload.tokens,
            # The forecast is for the whole call.
            output_tokens=limit * replies_of(arguments) or self._forecast.foresee(),
            foreseen=not limit,
        )


class _Payload:
    """What a call sends: its texts, and the tokens of what is not text."""

    __slots__ = ("texts", "tokens")

    def __init__(self, *texts: str, tokens: int = 0) -> None:
        self.texts = list(texts)
        self.tokens = tokens

    def add_message(self, message: "ChatMessage") -> None:
        """Add a message: its blocks, and the tool calls that older integrations keep beside them."""
        self.tokens += _TOKENS_PER_MESSAGE
        if not hasattr(message, "blocks"):
            return  # not a message: the model's own error says it better
        for block in message.blocks:
            self.add_block(block)
        extra = message.additional_kwargs
        if not any(block.block_type == "tool_call" for block in message.blocks):
            self.add_argument(extra.get("tool_calls"))
        self.add_argument(extra.get("name"))

    def add_block(self, block: Any) -> None:
        """Add a content block; a block of an unknown kind counts by its text."""
        match getattr(block, "block_type", None):
            case "image":
                self.tokens += LOW_DETAIL_IMAGE_TOKENS if block.detail == "low" else IMAGE_TOKENS
            case "document" if str(block.document_mimetype).startswith("text/") and block.data:
                self.tokens += _decoded_size(block.data) // 4
            case "audio" | "video" | "document" as medium:
                self.add_medium(medium, getattr(block, _DATA_FIELDS[medium]))
            case "cache":
                pass
            case "thinking":
                self.texts.append(block.content or "")
            case "tool_call":
                self.texts.append(_tool_call(block))
            case "citable":
                self.texts += (block.title, block.source)
                for inner in block.content:
                    self.add_block(inner)
            case "citation":
                self.texts += (block.title, block.source)
                self.add_block(block.cited_content)
            case _:
                self.texts.append(str(getattr(block, "text", "")))

    def add_medium(self, medium: str, data: object) -> None:
        """Add sound, video or a document, by its size if that is known."""
        minimum, bytes_per_token = _MEDIA[medium]
        self.tokens += max(minimum, _decoded_size(data) // bytes_per_token)

    def add_argument(self, value: object) -> None:
        """Add an argument, which is sent as JSON, or unchanged if it is text."""
        if isinstance(value, str):
            self.texts.append(value)
        elif value:
            self.texts.append(_json(value))


def _tool_call(block: Any) -> str:
    """Return a tool call as it is sent to OpenAI."""
    arguments = block.tool_kwargs
    if not isinstance(arguments, str):
        arguments = _json(arguments)
    function = {"name": block.tool_name, "arguments": arguments}
    return _json({"id": block.tool_call_id, "type": "function", "function": function})


def _json(value: object) -> str:
    """Return ``value`` as JSON; if that is impossible, as text: an estimate must not fail a call."""
    try:
        return json.dumps(value, default=_to_jsonable, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _to_jsonable(value: Any) -> object:
    """Convert what is sent as JSON: tools, pydantic models and classes."""
    to_openai_tool = getattr(getattr(value, "metadata", None), "to_openai_tool", None)
    if callable(to_openai_tool):
        return to_openai_tool(skip_length_check=True)
    if isinstance(value, type):
        schema = getattr(value, "model_json_schema", None)
        return schema() if callable(schema) else value.__name__
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else str(value)


def _decoded_size(data: object) -> int:
    """Return the number of bytes of data in base64; 0 if there is none here."""
    return len(data) * 3 // 4 if isinstance(data, bytes) else 0


def _additional_kwargs(llm: object) -> Mapping[str, Any]:
    value = getattr(llm, "additional_kwargs", None)
    return value if isinstance(value, Mapping) else {}
