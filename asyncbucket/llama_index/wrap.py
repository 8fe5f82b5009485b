"""Pace a LlamaIndex model: how, and why so.

`wrap` returns an object of a subclass of the model's own class, made on the fly, that shares the
model's fields. It *is* the model in all respects but one: before a call goes out it is admitted by
a limiter, and afterwards what was reserved is corrected by what was used.

Why a subclass? A proxy that delegates would be shorter, and wrong in ways that show late. LlamaIndex
asks ``isinstance(llm, FunctionCallingLLM)`` before it sends tools, and ``isinstance(llm, OpenAI)``
for a JSON schema; pydantic validates the ``llm`` field of agents and engines; and the inner model's
methods call each other on ``self``: ``achat_with_tools`` calls ``achat``, which a proxy never sees.
As a subclass we stand in the way of those calls, too.

Why share the fields? ``Settings`` and engines write ``callback_manager`` into a model later on, and
users set ``llm.temperature``; both objects should see it. So the new object is made by ``__new__``,
not by ``__init__`` (which would open clients, and would need to know each class's arguments), and
its ``__dict__`` is the inner model's. Its private values are copies: the limiter is one of them, and
so are HTTP clients that do not retry. The inner model is left as it was, and stays unpaced.

Where a call is paced
    *LLMs*: at ``chat``, ``complete``, their streams and asynchronous twins. All else that LlamaIndex
    does with a model goes through these; ``predict_and_call`` must not be paced as a whole, since
    tools run inside it. The exception is the structured prediction of some integrations, which talk
    to their client themselves. See `llm` and `structured`.
    *Embeddings*: beneath the cache, at the private methods that make one request. See `embedding`.
    *Structured LLMs* (``llm.as_structured_llm(...)``) have a model inside; that one is paced.

The traps, and where they are dealt with
    Public methods call public methods, and would pay twice: `held`. A stream holds its slot until it
    ends, and may never be started or never be ended: `streams`. The model's class, the SDK and
    tenacity each retry, so that one call may become twelve: `clients`, and `Paced.max_retries`.
    Pickling: `copies`. Spans: LlamaIndex puts one around a method that a *class* overrides, by
    ``__init_subclass__``. The overrides stand in a mixin that is no model, out of its reach: a call
    has the span and the events it always had, and the wait comes before them (`events`).

Each attempt of a call that is retried is an admission, a span and a start event of its own, for so
many requests did go out. Between attempts no slot is held.
"""

import functools
import types
import warnings
from typing import Any, TypeVar

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM

from asyncbucket.limiter import Limiter
from asyncbucket.llama_index.embedding import RateLimitedEmbedding, RateLimitedMultiModalEmbedding
from asyncbucket.llama_index.estimate import Estimator
from asyncbucket.llama_index.llm import RateLimitedLLM
from asyncbucket.llama_index.mixin import Paced, bind, pacing_of
from asyncbucket.llama_index.pacing import Pacing
from asyncbucket.retry import Retry

T = TypeVar("T")

_GENERATED = "__asyncbucket_plain_class__"


def wrap(
    obj: T,
    limiter: Limiter,
    *,
    retry: Retry | int | None = None,
    estimator: Estimator | None = None,
) -> T:
    """Return ``obj``, a LlamaIndex LLM or embedding model, paced by ``limiter``.

    It is of a subclass of its class and shares its fields; ``obj`` itself stays unpaced. What is
    paced by ``limiter`` already is returned as it is, or paced anew if options are given.

    Args:
        obj: any ``LLM`` or ``BaseEmbedding``.
        limiter: what admits its calls; it may be shared with other models and plain code.
        retry: attempts at most, or a `Retry`; False for a single one. 5 attempts by default.
        estimator: what foresees the cost of a call in tokens, instead of the default.

    Raises:
        TypeError: ``obj`` is neither LLM nor embedding model.
        ValueError: ``obj`` is paced by another limiter.
    """
    options: dict[str, Any] = {"retry": retry, "estimator": estimator}
    if isinstance(obj, StructuredLLM):
        inside = wrap(obj.llm, limiter, **options)
        return obj if inside is obj.llm else obj.model_copy(update={"llm": inside})
    if not isinstance(obj, (LLM, BaseEmbedding)):
        raise TypeError(_refusal(obj))
    pacing = pacing_of(obj)
    if pacing is not None and pacing.limiter is not limiter:
        raise ValueError(
            f"{obj!r} is paced already and can't be paced by {limiter!r} too: wrap the model that "
            f"it was made of, or put all limits into one limiter"
        )
    if pacing is not None and retry is None and estimator is None:
        return obj
    _warn_of_native_limiter(obj)
    return _share(obj, Pacing(limiter, **options))


def plain_class(cls: type[Any]) -> type[Any]:
    """Return the class that ``cls`` was generated from, or ``cls`` if it was written by hand."""
    plain: type[Any] = vars(cls).get(_GENERATED, cls)
    return plain


def _share(model: T, pacing: Pacing) -> T:
    """Return a paced model with the fields of ``model``, which stays as it is."""
    cls: Any = type(model)
    if not isinstance(model, Paced):
        cls = paced_class(cls)
    paced: T = cls.__new__(cls)
    for name in (
        "__dict__",
        "__pydantic_fields_set__",
        "__pydantic_extra__",
        "__pydantic_private__",
    ):
        object.__setattr__(paced, name, getattr(model, name))
    bind(paced, pacing)
    return paced


@functools.lru_cache(maxsize=256)
def paced_class(cls: type[Any]) -> type[Any]:
    """Return the paced subclass of a model's class; it goes by the name of that class outside."""
    if issubclass(cls, MultiModalEmbedding):
        mixin: type[Any] = RateLimitedMultiModalEmbedding
    else:
        mixin = RateLimitedLLM if issubclass(cls, LLM) else RateLimitedEmbedding

    def class_name(_: type[Any]) -> str:
        """Be serialised as what it was made of."""
        name: str = cls.class_name()
        return name

    names = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": f"Paced{cls.__qualname__}",
        "class_name": classmethod(class_name),
        _GENERATED: cls,
    }
    return types.new_class(f"Paced{cls.__name__}", (mixin, cls), {}, lambda ns: ns.update(names))


def _refusal(obj: object) -> str:
    if isinstance(obj, type):
        return f"wrap a model, not its class: limiter.wrap({obj.__name__}(...))"
    return (
        f"a LlamaIndex LLM or embedding model can be wrapped, not {type(obj).__name__}; pace other "
        f"code by `async with limiter.acquire(...)` or @limiter.paced"
    )


def _warn_of_native_limiter(model: LLM | BaseEmbedding) -> None:
    if model.rate_limiter is not None:
        warnings.warn(
            f"{type(model).__name__} has a rate_limiter of its own: each call would wait there, too, "
            f"with its slot held and as part of the model's latency; make it without rate_limiter=",
            UserWarning,
            stacklevel=4,
        )
