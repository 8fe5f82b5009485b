"""Paced models: every method that sends a request waits for an admission.

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

A method of the model is looked up when it is called, by the name it is called by: classes and tests
replace methods by functions of other names.
"""

import functools
import sys
import types
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.llms.llm import LLM
from llama_index.core.schema import BaseComponent

from asyncbucket.core.limiter import Limiter
from asyncbucket.llama_index.clients import client_of, is_client, without_retries
from asyncbucket.llama_index.copies import reduce
from asyncbucket.llama_index.estimate import Estimate, Estimator
from asyncbucket.llama_index.misuse import unretried_options, warn_of_misuse
from asyncbucket.llama_index.pacing import Call, Pacing, Reader, no_usage, usage_in
from asyncbucket.llama_index.streams import USAGE_OPTION, paced_stream
from asyncbucket.waiting import ASYNC, IO, SYNC

if TYPE_CHECKING:
    from collections.abc import Generator
    from dataclasses import InitVar

    from asyncbucket.retry import Retry

_PACING: Final = "_asyncbucket_pacing"


class _NoRetries:
    """Read as 0 on an instance, whatever its field says: only one layer retries, and it is ours.

    The field's own value stays where it is, so it is serialised, copied and set as before. On the
    class there is no value, as with any pydantic field: a property would count as a subclass's
    default.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, model: object, owner: type | None = None) -> int:
        if model is None:
            raise AttributeError(self._name)
        return 0

    def __set__(self, model: object, value: int) -> None:
        vars(model)[self._name] = value


class LimiterAttribute:
    """Return the limiter of a paced model or tool, unless that has its own ``limiter`` attribute.

    There is no ``__set__``, so an instance attribute, such as a pydantic field, comes first. On the
    class there is no value, for the same reason as above.
    """

    def __get__(self, paced: object, owner: type | None = None) -> Limiter:
        if paced is None:
            raise AttributeError("limiter")
        limiter: Limiter = pacing_of(paced).limiter
        return limiter


class Paced:
    """The part of a paced model that is neither LLM nor embedding.

    The class is not a pydantic model, so mixing it in adds no field, changes no default, and leaves
    its methods alone: LlamaIndex puts spans around what a *model's* class overrides. Helpers that
    override nothing are functions: as methods they could hide the model's own of that name.
    """

    # To a type checker, these are fields of the model's class.
    if not TYPE_CHECKING:  # pragma: no branch - always so at run time
        max_retries = _NoRetries("max_retries")
        limiter = LimiterAttribute()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        mro = cls.__mro__
        if any("retries" in getattr(base, "model_fields", ()) for base in mro[1:]):
            setattr(cls, "retries", _NoRetries("retries"))  # noqa: B010 - GoogleGenAIEmbedding's name for it
        if BaseComponent in mro[: mro.index(Paced)]:
            bases = sorted(cls.__bases__, key=lambda base: not issubclass(base, Paced))
            right_order = ", ".join(base.__name__ for base in bases)
            raise TypeError(
                f"{cls.__name__} would not be paced: the methods of a class that comes first hide the "
                f"mixin's; write class {cls.__name__}({right_order})"
            )

    def __init__(self, *args: Any, limiter: Limiter, **kwargs: Any) -> None:
        """Make the model from all other arguments than ``limiter``, ``retry`` and ``estimator``."""
        options = {name: kwargs.pop(name) for name in ("retry", "estimator") if name in kwargs}
        super().__init__(*args, **kwargs)
        pacing = Pacing(limiter, **options)
        warn_of_misuse(self, pacing)
        bind(self, pacing)

    def _get_client(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()  # some models have it
        make = functools.partial(base._get_client, *args, **kwargs)  # noqa: SLF001 - an override
        return client_of(self, make)

    def _get_aclient(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        make = functools.partial(base._get_aclient, *args, **kwargs)  # noqa: SLF001 - as above
        return client_of(self, make)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return reduce(self, pacing_of(self))

    def __repr_args__(self) -> "Generator[tuple[str | None, Any]]":
        """Show what helps a reader; a model's fields include its API key."""
        for name in ("model", "model_name"):
            if name in vars(self):
                yield name, vars(self)[name]
                break
        yield "limiter", pacing_of(self).limiter


if TYPE_CHECKING:

    class _LLM(Paced, LLM, ABC):
        """Let a type checker see the model's methods, and what a subclass is made with."""

        limiter: Limiter
        retry: InitVar[Retry | int | None] = None
        estimator: InitVar[Estimator | None] = None

    class _Embedding(Paced, BaseEmbedding, ABC):
        """The same for embedding models."""

        limiter: Limiter
        retry: InitVar[Retry | int | None] = None
        estimator: InitVar[Estimator | None] = None

    class _MultiModalEmbedding(_Embedding, MultiModalEmbedding, ABC):
        """The same for images."""

else:
    _LLM = _Embedding = _MultiModalEmbedding = Paced


class RateLimitedLLM(_LLM, ABC):
    """Pace an LLM: put this mixin before the LLM's class, and pass the limiter to the constructor.

    >>> class PacedOpenAI(RateLimitedLLM, OpenAI):
    ...     '''OpenAI's models under my limits.'''
    >>> llm = PacedOpenAI(model="gpt-4o-mini", limiter=limiter)

    The constructor also takes ``retry=`` and ``estimator=``, as `Limiter.wrap` does, which does the
    same to an existing model. Everything that LlamaIndex builds on its methods (prediction, tools,
    agents, structured output, query engines) is paced.
    """


class RateLimitedEmbedding(_Embedding, ABC):
    """Pace an embedding model: put this mixin before the model's class, and pass the limiter.

    >>> class PacedEmbedding(RateLimitedEmbedding, OpenAIEmbedding):
    ...     '''OpenAI's embeddings under my limits.'''
    >>> embed_model = PacedEmbedding(limiter=limiter)

    `Limiter.wrap` does the same to an existing model. A batch of ``embed_batch_size`` texts is one
    request.
    """


class RateLimitedMultiModalEmbedding(RateLimitedEmbedding, _MultiModalEmbedding, ABC):
    """Pace an embedding model for texts and images; an image costs a request and no tokens."""


def paced_subclass(mixin: type[Any], cls: type[Any], **names: Any) -> type[Any]:
    """Return a subclass of ``mixin`` and ``cls``, which people and their dashboards know as ``cls``."""
    names |= {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return types.new_class(cls.__name__, (mixin, cls), {}, lambda ns: ns.update(names))


def pacing_of(paced: object) -> Any:
    """Return the pacing of a paced model or tool."""
    private = _private(paced)
    return private[_PACING] if _PACING in private else vars(paced)[_PACING]


def bind(model: object, pacing: Pacing) -> None:
    """Pace ``model``, of a class with `Paced`: keep ``pacing`` and clients that do not retry.

    Both are kept among pydantic's private values. They are no fields, so they appear in no schema,
    dump, hash of an ingestion cache, or request.
    """
    private = {
        name: without_retries(value) if is_client(value) else value
        for name, value in _private(model).items()
    }
    object.__setattr__(model, "__pydantic_private__", {**private, _PACING: pacing})


def unpaced_private(model: object) -> dict[str, Any]:
    """Return the private values of ``model`` without ours."""
    return {name: value for name, value in _private(model).items() if name != _PACING}


def _private(model: object) -> dict[str, Any]:
    private: dict[str, Any] | None = getattr(model, "__pydantic_private__", None)
    return private or {}


@dataclass(frozen=True, slots=True)
class _Methods:
    """Paced methods of a mixin that take, cost and return the same kind of thing."""

    mixin: type[Any]
    #: What the models inherit from.
    base: type[Any]
    first_argument: str
    #: Estimates a call from what it is called with.
    estimate: Callable[..., Estimate]
    read: Reader = no_usage
    #: Whether what a class inherits from ``base`` calls other paced methods, which pay.
    by_others: bool = False

    def add(self, *names: str) -> None:
        """Give the mixin paced methods of these names; a leading ``a`` means async."""
        for name in names:
            io = ASYNC if name.lstrip("_").startswith("a") else SYNC
            setattr(self.mixin, name, self._method(io, name))

    def _method(self, io: IO, name: str) -> Callable[..., Any]:
        async def method(model: Any, /, *args: Any, **kwargs: Any) -> Any:
            return await self._call(io, name, model, args, kwargs)

        return functools.wraps(getattr(self.base, name), updated=())(io.function(method))

    async def _call(
        self, io: IO, name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the model's own method ``name``, paced."""
        inner = getattr(super(self.mixin, model), name)
        if not args and self.first_argument not in kwargs:
            # Its own error says what is missing.
            return await io.call(functools.partial(inner, **kwargs))
        first, *others = args or (kwargs.pop(self.first_argument),)
        if self.by_others and self._is_inherited(type(model), name):
            inner = functools.partial(getattr(self.base, name), model)
            return await io.call(functools.partial(inner, first, *others, **kwargs))
        if self.first_argument == "messages":
            first = list(first)  # the call may go out later, and the list may grow
        is_stream = "stream" in name
        options: Mapping[str, Any] = {}
        if self.read is not no_usage:
            kwargs = unretried_options(model, kwargs) | kwargs
            if is_stream and _must_ask_for_usage(model, kwargs):
                options = USAGE_OPTION
        send = functools.partial(inner, first, *others, **kwargs)
        estimate = functools.partial(self.estimate, model, first, *others, **kwargs)
        call = Call(io, send, estimate, self.read, options)
        pacing: Pacing = pacing_of(model)
        return await (paced_stream(pacing, call) if is_stream else pacing.call(call))

    def _is_inherited(self, cls: type[Any], name: str) -> bool:
        """Tell whether a class has the method ``name`` from ``base``."""
        rest = cls.__mro__[cls.__mro__.index(self.mixin) + 1 :]
        return next((each for each in rest if name in vars(each)), None) is self.base


def _must_ask_for_usage(llm: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether streams of ``llm`` end with their usage only if asked, and the user did not ask."""
    if "stream_options" in kwargs or "stream_options" in (vars(llm).get("additional_kwargs") or ()):
        return False
    # A model of that class can exist only if the module is loaded.
    openai = sys.modules.get("llama_index.llms.openai.base")
    return openai is not None and isinstance(llm, openai.OpenAI)


def _chat(llm: Any, messages: list[Any], /, **kwargs: Any) -> Estimate:
    return cast("Estimate", pacing_of(llm).estimator.chat(llm, messages, kwargs))


def _completion(llm: Any, prompt: str, /, *_: Any, **kwargs: Any) -> Estimate:
    return cast("Estimate", pacing_of(llm).estimator.completion(llm, prompt, kwargs))


def _prediction(
    llm: Any, output_cls: Any, /, prompt: Any, llm_kwargs: Any = None, **prompt_args: Any
) -> Estimate:
    messages = prompt.format_messages(**prompt_args)
    return _chat(llm, messages, **{"response_format": output_cls, **(llm_kwargs or {})})


def _embedding(model: Any, texts: str | Sequence[str]) -> Estimate:
    texts = [texts] if isinstance(texts, str) else texts
    return Estimate(input_tokens=pacing_of(model).estimator.embedding(texts), output_tokens=0)


def _image(*_: Any) -> Estimate:
    return Estimate(input_tokens=0, output_tokens=0)


_Methods(RateLimitedLLM, LLM, "messages", _chat, usage_in).add(
    "achat", "chat", "astream_chat", "stream_chat"
)
_Methods(RateLimitedLLM, LLM, "prompt", _completion, usage_in).add(
    "acomplete", "complete", "astream_complete", "stream_complete"
)
_Methods(RateLimitedLLM, LLM, "output_cls", _prediction, by_others=True).add(
    "astructured_predict",
    "structured_predict",
    "astream_structured_predict",
    "stream_structured_predict",
)
_Methods(RateLimitedEmbedding, BaseEmbedding, "query", _embedding).add(
    "_aget_query_embedding", "_get_query_embedding"
)
_Methods(RateLimitedEmbedding, BaseEmbedding, "text", _embedding).add(
    "_aget_text_embedding", "_get_text_embedding"
)
_Methods(RateLimitedEmbedding, BaseEmbedding, "texts", _embedding, by_others=True).add(
    "_aget_text_embeddings", "_get_text_embeddings"
)
_Methods(RateLimitedMultiModalEmbedding, MultiModalEmbedding, "img_file_path", _image).add(
    "_aget_image_embedding", "_get_image_embedding"
)
_Methods(
    RateLimitedMultiModalEmbedding, MultiModalEmbedding, "img_file_paths", _image, by_others=True
).add("_aget_image_embeddings", "_get_image_embeddings")
