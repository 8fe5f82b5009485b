"""Which methods of models and tools are paced, and what one call of them costs.

*LLMs* are paced at ``chat``, ``complete``, their streams and asynchronous twins; everything else
that LlamaIndex does with a model goes through these. That includes LlamaIndex's own structured
prediction. An integration's own may use its client directly (OpenAIResponses and Anthropic call
``parse``), so that is paced as a whole. If there is a ``chat`` inside after all, it does not pay
again, and its usage settles the call.

*Embedding models* are paced beneath the cache, at the private methods that make one request each,
so what is in the cache costs nothing. The base class implements some of them by calling others: of
a batch in that case each text pays for itself, and the batch does not. (``_aget_text_embedding``
calls its synchronous twin on the event loop: it pays without blocking the loop, and the twin, called
inside, does not pay again.) Whether a class's own batch method goes text by text shows only when it
runs. So the batch is admitted as one request, and each further text adds one.

*Tools* are paced at ``call`` and ``acall``, with which agents run them, or at ``__call__`` if they
have nothing else.

A method of the model is looked up when it is called, by the name it is called by: classes and tests
replace methods by functions of other names.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.llms.llm import LLM
from llama_index.core.tools import BaseTool
from llama_index.core.tools.types import AsyncBaseTool

from asyncbucket.llama_index.clients import unretried_options
from asyncbucket.llama_index.estimate import Estimate, Estimator, size_of
from asyncbucket.llama_index.pacing import INSIDE, Method, ModelCall, held_call, pacing_of
from asyncbucket.llama_index.streams import USAGE_OPTION, paced_stream
from asyncbucket.providers.usage import Usage, usage_of
from asyncbucket.waiting import ASYNC, SYNC


def usage_in(reply: Any) -> Usage | None:
    """Return the usage in one of LlamaIndex's replies, if there is any."""
    if getattr(reply, "raw", None) is None and not getattr(reply, "additional_kwargs", None):
        return None
    return usage_of(reply)


def _chat(
    estimator: Estimator, llm: Any, messages: list[Any], /, *_: Any, **kwargs: Any
) -> Estimate:
    return estimator.chat(llm, messages, kwargs)


def _completion(estimator: Estimator, llm: Any, prompt: str, /, *_: Any, **kwargs: Any) -> Estimate:
    return estimator.completion(llm, prompt, kwargs)


def _prediction(
    estimator: Estimator,
    llm: Any,
    output_cls: Any,
    /,
    prompt: Any,
    llm_kwargs: Any = None,
    **prompt_args: Any,
) -> Estimate:
    messages = prompt.format_messages(**prompt_args)
    return estimator.chat(llm, messages, {"response_format": output_cls, **(llm_kwargs or {})})


def _embedding(estimator: Estimator, _: Any, texts: str | Sequence[str]) -> Estimate:
    texts = [texts] if isinstance(texts, str) else texts
    at_most = sum(map(size_of, texts))
    return Estimate(estimator.embedding(texts), output_tokens=0, input_at_most=at_most)


def _image(*_: Any) -> Estimate:
    return Estimate(input_tokens=0, output_tokens=0)


_BASES: Final = (LLM, BaseEmbedding, MultiModalEmbedding)
_METHODS: Final = {
    "chat": Method("messages", _chat, usage_in),
    "stream_chat": Method("messages", _chat, usage_in),
    "complete": Method("prompt", _completion, usage_in),
    "stream_complete": Method("prompt", _completion, usage_in),
    "structured_predict": Method("output_cls", _prediction, by_others=True),
    "stream_structured_predict": Method("output_cls", _prediction, by_others=True),
    "_get_query_embedding": Method("query", _embedding),
    "_get_text_embedding": Method("text", _embedding),
    "_get_text_embeddings": Method("texts", _embedding, by_others=True),
    "_get_image_embedding": Method("img_file_path", _image),
    "_get_image_embeddings": Method("img_file_paths", _image, by_others=True),
}


def paced_methods(cls: type[Any], paced: type[Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the methods for ``paced``, a subclass of ``cls``, which pace those of ``cls``."""
    if issubclass(cls, AsyncBaseTool):
        methods = {"call": _tool_method, "acall": _tool_method}
    elif issubclass(cls, BaseTool):
        methods = {"__call__": _tool_method}
    else:
        methods = {
            twin: functools.partial(_model_method, method)
            for name, method in _METHODS.items()
            for twin in (name, _async_name(name))
            if hasattr(cls, twin) and not (method.by_others and _is_inherited(cls, twin))
        }
    for name, make in methods.items():
        method = make(paced, name)
        yield name, functools.wraps(getattr(cls, name), updated=())(method)


def _async_name(name: str) -> str:
    return f"_a{name[1:]}" if name.startswith("_") else f"a{name}"


def _is_inherited(cls: type[Any], name: str) -> bool:
    """Tell whether a class has the method ``name`` from LlamaIndex's base."""
    return any(vars(base).get(name) is getattr(cls, name) for base in _BASES)


def _tool_method(paced: type[Any], name: str) -> Callable[..., Any]:
    io = ASYNC if name == "acall" else SYNC

    async def method(tool: Any, /, *args: Any, **kwargs: Any) -> Any:
        send = functools.partial(getattr(super(paced, tool), name), *args, **kwargs)
        return await pacing_of(tool).call_tool(io, tool, send)

    return io.function(method)


def _model_method(how: Method, paced: type[Any], name: str) -> Callable[..., Any]:
    io = ASYNC if name.lstrip("_").startswith("a") else SYNC
    is_chat, is_stream = how.argument == "messages", "stream" in name
    unretried = unretried_options(paced)

    async def method(model: Any, /, *args: Any, **kwargs: Any) -> Any:
        own = getattr(super(paced, model), name)
        if not args:
            if how.argument not in kwargs:
                return await io.call(own, **kwargs)  # its own error says what is missing
            args = (kwargs.pop(how.argument),)
        pacing = pacing_of(model)
        held = held_call(pacing.limiter)
        if held is not None and held is INSIDE.get() and not is_stream:
            return await io.call(own, *args, **kwargs)
        if is_chat:  # the call may go out later, and the list may grow
            args = (list(args[0]), *args[1:])
        if unretried:
            given = vars(model).get("additional_kwargs") or {}
            kwargs = {**{k: v for k, v in unretried.items() if k not in given}, **kwargs}
        call = ModelCall(io, how, model, own, name, args, kwargs)
        if not is_stream:
            return await pacing.call(call, held)
        if how.read is usage_in and _must_ask_for_usage(model, kwargs):
            call.options = USAGE_OPTION
        return await paced_stream(pacing, call, held)

    return io.function(method)


def _must_ask_for_usage(llm: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether streams of ``llm`` end with their usage only if asked, and the user did not ask."""
    if "stream_options" in kwargs or "stream_options" in (vars(llm).get("additional_kwargs") or ()):
        return False
    # A model of that class can exist only if the module is loaded.
    openai = sys.modules.get("llama_index.llms.openai.base")
    return openai is not None and isinstance(llm, openai.OpenAI)
