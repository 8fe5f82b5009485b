"""A paced LLM: each of its calls waits for one admission."""

# mypy: disable-error-code="safe-super"
# Some methods called by super() are abstract in LlamaIndex; what is paced is a concrete class.

import functools
import sys
from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
)
from llama_index.core.llms.llm import LLM

from asyncbucket.llama_index.held import held_call, nested_stream, nested_stream_sync
from asyncbucket.llama_index.mixin import pacing_of
from asyncbucket.llama_index.streams import AsyncPacedStream, PacedStream
from asyncbucket.llama_index.structured import RateLimitedPrediction

if TYPE_CHECKING:
    from asyncbucket.llama_index.estimate import Estimate


class RateLimitedLLM(RateLimitedPrediction, ABC):
    """Pace an LLM: put this mixin before the LLM's class, and pass the limiter to the constructor.

    >>> class PacedOpenAI(RateLimitedLLM, OpenAI):
    ...     '''OpenAI's models under my limits.'''
    >>> llm = PacedOpenAI(model="gpt-4o-mini", limiter=limiter)

    `Limiter.wrap` does the same to an existing model. Everything that LlamaIndex builds on these
    methods (prediction, tools, agents, structured output, query engines) goes through them, and so
    is paced.
    """

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        messages = list(messages)  # the call may go out later, and the list may grow
        send = functools.partial(super().achat, messages, **kwargs)
        return await pacing_of(self).call(send, _chat_cost(self, messages, kwargs))

    async def acomplete(self, prompt: str, *args: Any, **kwargs: Any) -> CompletionResponse:
        send = functools.partial(super().acomplete, prompt, *args, **kwargs)
        return await pacing_of(self).call(send, _completion_cost(self, prompt, kwargs))

    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        messages = list(messages)
        start = functools.partial(super().astream_chat, messages, **kwargs)
        if held := held_call(pacing_of(self).limiter):
            return await nested_stream(held, start)
        return AsyncPacedStream(
            pacing_of(self),
            start,
            _chat_cost(self, messages, kwargs),
            ask_for_usage=_must_ask_for_usage(self, kwargs),
        )

    async def astream_complete(
        self, prompt: str, *args: Any, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        start = functools.partial(super().astream_complete, prompt, *args, **kwargs)
        if held := held_call(pacing_of(self).limiter):
            return await nested_stream(held, start)
        return AsyncPacedStream(
            pacing_of(self),
            start,
            _completion_cost(self, prompt, kwargs),
            ask_for_usage=_must_ask_for_usage(self, kwargs),
        )

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        messages = list(messages)
        send = functools.partial(super().chat, messages, **kwargs)
        return pacing_of(self).call_sync(send, _chat_cost(self, messages, kwargs))

    def complete(self, prompt: str, *args: Any, **kwargs: Any) -> CompletionResponse:
        send = functools.partial(super().complete, prompt, *args, **kwargs)
        return pacing_of(self).call_sync(send, _completion_cost(self, prompt, kwargs))

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        messages = list(messages)
        start = functools.partial(super().stream_chat, messages, **kwargs)
        if held := held_call(pacing_of(self).limiter):
            return nested_stream_sync(held, start)
        return PacedStream(
            pacing_of(self),
            start,
            _chat_cost(self, messages, kwargs),
            ask_for_usage=_must_ask_for_usage(self, kwargs),
        )

    def stream_complete(self, prompt: str, *args: Any, **kwargs: Any) -> CompletionResponseGen:
        start = functools.partial(super().stream_complete, prompt, *args, **kwargs)
        if held := held_call(pacing_of(self).limiter):
            return nested_stream_sync(held, start)
        return PacedStream(
            pacing_of(self),
            start,
            _completion_cost(self, prompt, kwargs),
            ask_for_usage=_must_ask_for_usage(self, kwargs),
        )


def _chat_cost(
    llm: RateLimitedLLM, messages: Sequence[ChatMessage], kwargs: dict[str, Any]
) -> "functools.partial[Estimate]":
    return functools.partial(pacing_of(llm).estimator.chat, llm, messages, kwargs)


def _completion_cost(
    llm: RateLimitedLLM, prompt: str, kwargs: dict[str, Any]
) -> "functools.partial[Estimate]":
    return functools.partial(pacing_of(llm).estimator.completion, llm, prompt, kwargs)


def _must_ask_for_usage(llm: LLM, kwargs: dict[str, Any]) -> bool:
    """Tell whether streams of ``llm`` end with their usage only if asked, and the user did not ask."""
    if "stream_options" in kwargs or "stream_options" in getattr(llm, "additional_kwargs", {}):
        return False
    # A model of that class can exist only if the module is loaded.
    openai = sys.modules.get("llama_index.llms.openai.base")
    return openai is not None and isinstance(llm, openai.OpenAI)
