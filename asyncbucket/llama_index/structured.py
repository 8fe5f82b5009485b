"""Structured prediction: paced by the chat inside it, or as a whole if there is none.

LlamaIndex's own structured prediction ends in ``chat`` and the like, which are paced and see the
usage, so it is not paced again here. Some integrations use their client directly: OpenAIResponses
and Anthropic call ``parse``. And most are unknown. All these are paced here, as one call. If there
is a ``chat`` inside after all, it does not pay again, and its usage settles the call.
"""

# mypy: disable-error-code="safe-super"
# Some methods called by super() are abstract in LlamaIndex; what is paced is a concrete class.

import functools
from abc import ABC
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.llama_index.held import held_call
from asyncbucket.llama_index.mixin import Paced, pacing_of
from asyncbucket.llama_index.pacing import Pacing, no_usage
from asyncbucket.llama_index.streams import AsyncPacedStream, PacedStream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from dataclasses import InitVar

    from llama_index.core.llms.llm import LLM
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.types import Model

    from asyncbucket.core.limiter import Limiter
    from asyncbucket.llama_index.estimate import Estimator
    from asyncbucket.retry import Retry

    class _LLM(Paced, LLM, ABC):
        """Let a type checker see what ``super()`` will find, and what a subclass is made with."""

        limiter: Limiter
        retry: InitVar[Retry | int | None] = None
        estimator: InitVar[Estimator | None] = None

else:
    _LLM = Paced

#: Implementations outside LlamaIndex's core that are known to end in ``chat`` and the like.
_END_IN_CHAT: Final = frozenset(
    {
        "llama_index.llms.openai.base.OpenAI.astream_structured_predict",
        "llama_index.llms.openai.base.OpenAI.astructured_predict",
        "llama_index.llms.openai.base.OpenAI.stream_structured_predict",
        "llama_index.llms.openai.base.OpenAI.structured_predict",
        "llama_index.llms.openai.responses.OpenAIResponses.astream_structured_predict",
        "llama_index.llms.openai.responses.OpenAIResponses.stream_structured_predict",
    }
)


class RateLimitedPrediction(_LLM, ABC):
    """The part of a paced LLM that predicts structures: one admission, inside or as a whole."""

    async def astructured_predict(
        self,
        output_cls: "type[Model]",
        prompt: "PromptTemplate",
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> "Model":
        """Predict an ``output_cls``."""
        predict = functools.partial(super().astructured_predict, output_cls, prompt)
        predicted: Model = await _predict_paced(
            self, predict, llm_kwargs, prompt_args, pacing_of(self).call
        )
        return predicted

    async def astream_structured_predict(
        self,
        output_cls: "type[Model]",
        prompt: "PromptTemplate",
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> "AsyncGenerator[Any, None]":
        """Predict an ``output_cls``, streaming it."""
        predict = functools.partial(super().astream_structured_predict, output_cls, prompt)
        stream: AsyncGenerator[Any, None] = await _predict_paced(
            self,
            predict,
            llm_kwargs,
            prompt_args,
            functools.partial(_paced_stream, pacing_of(self)),
        )
        return stream

    def structured_predict(
        self,
        output_cls: "type[Model]",
        prompt: "PromptTemplate",
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> "Model":
        """Predict an ``output_cls``."""
        predict = functools.partial(super().structured_predict, output_cls, prompt)
        predicted: Model = _predict_paced(
            self, predict, llm_kwargs, prompt_args, pacing_of(self).call_sync
        )
        return predicted

    def stream_structured_predict(
        self,
        output_cls: "type[Model]",
        prompt: "PromptTemplate",
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> "Generator[Any, None, None]":
        """Predict an ``output_cls``, streaming it."""
        predict = functools.partial(super().stream_structured_predict, output_cls, prompt)
        stream: Generator[Any, None, None] = _predict_paced(
            self, predict, llm_kwargs, prompt_args, functools.partial(PacedStream, pacing_of(self))
        )
        return stream


def _predict_paced(
    llm: RateLimitedPrediction,
    predict: "functools.partial[Any]",
    llm_kwargs: dict[str, Any] | None,
    prompt_args: dict[str, Any],
    pace: Callable[..., Any],
) -> Any:
    """Call ``predict`` through ``pace``, or directly if another call, inside or outside, pays."""
    # By keyword, and only if given: classes take it by keyword only, or add their own.
    options = {} if llm_kwargs is None else {"llm_kwargs": llm_kwargs}
    send = functools.partial(predict, **options, **prompt_args)
    pacing = pacing_of(llm)
    if _ends_in_chat(type(llm), predict.func.__name__) or held_call(pacing.limiter):
        return send()
    output_cls, prompt = predict.args
    messages = prompt.format_messages(**prompt_args)
    kwargs = {"response_format": output_cls, **(llm_kwargs or {})}
    cost = functools.partial(pacing.estimator.chat, llm, messages, kwargs)
    return pace(send, cost, read=no_usage)


async def _paced_stream(pacing: Pacing, *args: Any, **kwargs: Any) -> AsyncPacedStream[Any]:
    return AsyncPacedStream(pacing, *args, **kwargs)


@functools.lru_cache(maxsize=1024)
def _ends_in_chat(cls: type[Any], name: str) -> bool:
    """Tell whether a class's method ``name`` is known to end in its ``chat`` methods."""
    bases = cls.__mro__[cls.__mro__.index(RateLimitedPrediction) + 1 :]
    owner = next(base for base in bases if name in vars(base))
    if owner.__module__.startswith("llama_index.core."):
        return True
    return f"{owner.__module__}.{owner.__qualname__}.{name}" in _END_IN_CHAT
