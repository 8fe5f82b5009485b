"""What a call is going to cost in tokens, estimated before it is made.

The input is what the provider is sent: every block of every message, what the provider's template
adds to each, tools and the response format. A limiter that books too little lets too many pass and
is refused, one that books too much gets the rest back when the reply comes. So of the tokenizer's
count and a quarter of the characters, by which OpenAI estimates at admission, the larger one counts.

The output is `max_tokens` where the call or the model has one: so much OpenAI charges at admission.
Where neither has one, nobody knows; it is foreseen as what nine in ten of the model's last replies
stayed under (`OutputForecast`). Such a guess is marked as one: it must not make a call impossible.

Nothing here does I/O, so pictures are not measured and files are not opened: media count by the
constants below.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from asyncbucket.cost import rounded_up
from asyncbucket.http.body import A_SMALL_IMAGE, AN_IMAGE, is_count, replies_of
from asyncbucket.http.forecast import OutputForecast
from asyncbucket.llama_index.tokens import Tokenizer, bundled_tokenizer, count

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.llms import LLM

#: OpenAI's template: 3 tokens a message, 1 for the role, and 3 that open the reply. See "How to
#: count tokens with tiktoken" in the OpenAI cookbook, read in 2025.
_A_MESSAGE: Final = 4
_A_REPLY: Final = 3
#: The least, and the bytes for a token more, of what can't be measured without a decoder: sound as
#: MP3 of 128 kbit/s at Gemini's 32 tokens a second, video of 2 Mbit/s at its 263, and PDF pages of
#: 50 kB at Anthropic's 1,500 to 3,000.
_MEDIA: Final = {"audio": (256, 500), "video": (2048, 950), "document": (2048, 20)}
#: The fields that hold a medium's bytes, in base64.
_DATA: Final = {"audio": "audio", "video": "video", "document": "data"}

_LIMITS_OF_OUTPUT: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
#: Arguments that are sent along and count as input.
_SENT: Final = (
    "tools",
    "built_in_tools",
    "functions",
    "response_format",
    "text",
    "instructions",
    "system",
)
#: Of these, what OpenAIResponses keeps in fields, to send it with every call.
_SENT_ALWAYS: Final = ("instructions", "built_in_tools")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call is expected to cost.

    Attributes:
        input_tokens: what is sent.
        output_tokens: what comes back at most, or probably.
        foreseen: whether the output is a guess rather than a limit. A guess may be cut down to what
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
    """Foresee the cost of a call. It runs on the event loop: no I/O, and a few milliseconds at most."""

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
    """Estimate by a tokenizer that is there without asking anybody, and by the replies so far.

    One estimator belongs to one model, for its replies are what it learns from.

    Args:
        tokenizer: turns a text into tokens; by default the one inside llama_index.core, or a count of
            characters where it is missing. It must not do I/O: some models' own ones do.
        forecast: foresees replies without `max_tokens`.
    """

    def __init__(
        self, tokenizer: Tokenizer | None = None, *, forecast: OutputForecast | None = None
    ) -> None:
        self._tokenizer = bundled_tokenizer() if tokenizer is None else tokenizer
        self._forecast = OutputForecast() if forecast is None else forecast

    def __repr__(self) -> str:
        return f"<DefaultEstimator {self._forecast!r}>"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the bundled tokenizer behind: it is in the other process as well."""
        bundled = self._tokenizer is bundled_tokenizer()
        return {**vars(self), "_tokenizer": None if bundled else self._tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tokenizer = self._tokenizer or bundled_tokenizer()

    def chat(
        self, llm: "LLM", messages: Sequence["ChatMessage"], kwargs: Mapping[str, Any]
    ) -> Estimate:
        """Estimate a chat by everything that is sent."""
        sent = _Sent(tokens=_A_REPLY)
        for message in messages:
            sent.add_message(message)
        return self._estimate(llm, sent, kwargs)

    def completion(self, llm: "LLM", prompt: str, kwargs: Mapping[str, Any]) -> Estimate:
        """Estimate a completion; chat models get the prompt as one message."""
        return self._estimate(llm, _Sent(prompt, tokens=_A_MESSAGE + _A_REPLY), kwargs)

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

    def _estimate(self, llm: "LLM", sent: "_Sent", kwargs: Mapping[str, Any]) -> Estimate:
        # A structured LLM asks another one, and sends it the schema of what it wants.
        model = getattr(llm, "llm", llm)
        sent.add_argument(getattr(llm, "output_cls", None))
        fields = {name: getattr(model, name, None) for name in _SENT_ALWAYS}
        arguments = {**fields, **_additional_kwargs(model), **kwargs}
        for name in _SENT:
            sent.add_argument(arguments.get(name))
        told = (arguments.get(name) for name in _LIMITS_OF_OUTPUT)
        always = (getattr(model, name, None) for name in _LIMITS_OF_OUTPUT)
        limit = next(filter(is_count, (*told, *always)), 0)
        return Estimate(
            input_tokens=self.count(*sent.texts) + sent.tokens,
            # What is foreseen is of whole calls.
            output_tokens=limit * replies_of(arguments) or self._forecast.foresee(),
            foreseen=not limit,
        )


class _Sent:
    """What a call sends: its texts, and the tokens of what is not a text."""

    __slots__ = ("texts", "tokens")

    def __init__(self, *texts: str, tokens: int = 0) -> None:
        self.texts = list(texts)
        self.tokens = tokens

    def add_message(self, message: "ChatMessage") -> None:
        """Add a message: its blocks, and the tool calls that older integrations keep beside them."""
        self.tokens += _A_MESSAGE
        if not hasattr(message, "blocks"):
            return  # it is not a message, which the model says better
        for block in message.blocks:
            self.add_block(block)
        extra = message.additional_kwargs
        if not any(block.block_type == "tool_call" for block in message.blocks):
            self.add_argument(extra.get("tool_calls"))
        self.add_argument(extra.get("name"))

    def add_block(self, block: Any) -> None:
        """Add a content block; one of an unknown kind counts as the text that it has."""
        match getattr(block, "block_type", None):
            case "image":
                self.tokens += A_SMALL_IMAGE if block.detail == "low" else AN_IMAGE
            case "document" if str(block.document_mimetype).startswith("text/") and block.data:
                self.tokens += _size(block.data) // 4
            case "audio" | "video" | "document" as kind:
                self.add_medium(kind, getattr(block, _DATA[kind]))
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

    def add_medium(self, kind: str, data: object) -> None:
        """Add sound, video or a document, by its size if it is at hand."""
        least, bytes_a_token = _MEDIA[kind]
        self.tokens += max(least, _size(data) // bytes_a_token)

    def add_argument(self, value: object) -> None:
        """Add an argument that is sent as JSON, or as it is if it is text."""
        if isinstance(value, str):
            self.texts.append(value)
        elif value:
            self.texts.append(_json(value))


def _tool_call(block: Any) -> str:
    """Write a tool call as OpenAI is sent it."""
    arguments = block.tool_kwargs
    if not isinstance(arguments, str):
        arguments = _json(arguments)
    function = {"name": block.tool_name, "arguments": arguments}
    return _json({"id": block.tool_call_id, "type": "function", "function": function})


def _json(value: object) -> str:
    """Write what is sent as JSON; what can't be written so is no reason to fail a call."""
    try:
        return json.dumps(value, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _plain(value: Any) -> object:
    """Turn into JSON what providers are sent as JSON: tools, models and classes of pydantic."""
    to_openai_tool = getattr(getattr(value, "metadata", None), "to_openai_tool", None)
    if callable(to_openai_tool):
        return to_openai_tool(skip_length_check=True)
    if isinstance(value, type):
        schema = getattr(value, "model_json_schema", None)
        return schema() if callable(schema) else value.__name__
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else str(value)


def _size(data: object) -> int:
    """Return the bytes of what LlamaIndex keeps in base64; 0 if they are elsewhere."""
    return len(data) * 3 // 4 if isinstance(data, bytes) else 0


def _additional_kwargs(llm: object) -> Mapping[str, Any]:
    value = getattr(llm, "additional_kwargs", None)
    return value if isinstance(value, Mapping) else {}
