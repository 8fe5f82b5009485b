"""How a LlamaIndex model is paced, and why this way.

`wrap` returns an object of a subclass of the model's own class, made on the fly, that shares the
model's fields. It *is* the model in all respects but one: before a call goes out, it waits for an
admission by a limiter, and afterwards the reservation is corrected to what was used.

Why a subclass? A delegating proxy would be shorter, but wrong in ways that show late. LlamaIndex
checks ``isinstance(llm, FunctionCallingLLM)`` before it sends tools, and ``isinstance(llm,
OpenAI)`` for a JSON schema; pydantic validates the ``llm`` field of agents and engines; and the
inner model's methods call each other on ``self``: ``achat_with_tools`` calls ``achat``, which a
proxy never sees. A subclass intercepts those calls, too.

Why share the fields? ``Settings`` and engines write ``callback_manager`` into a model later on, and
users set ``llm.temperature``; both objects should see it. So the new object is made by ``__new__``,
not by ``__init__`` (which would open clients, and would need to know each class's arguments), and
its ``__dict__`` is the inner model's. Its private values are copies: among them are the limiter,
and HTTP clients that do not retry. The inner model is left as it was, and stays unpaced.

Where a call is paced
    *LLMs*: at ``chat``, ``complete``, their streams and asynchronous twins. Everything else that
    LlamaIndex does with a model goes through these; ``predict_and_call`` must not be paced as a
    whole, since tools run inside it.
    *Embeddings*: beneath the cache, at the private methods that make one request. See `models`.
    *Structured LLMs* (``llm.as_structured_llm(...)``) have a model inside; that one is paced.
    *Tools*: at ``call`` and ``acall``, with which agents run them, without the calls that they
    make. See `tools`, and `asyncbucket.nesting` for what they hold meanwhile.

The traps, and where they are handled
    Public methods call public methods, and would pay twice: `asyncbucket.nesting` and `pacing`. A
    stream holds its slot until it ends, and may never be started or never be ended: `streams`. The
    model's class, the SDK and tenacity each retry, so one call may become twelve: `clients`,
    `misuse`, and `Paced.max_retries`. Pickling: `copies`.
    Spans: LlamaIndex puts one around a method that a *class* overrides, by ``__init_subclass__``.
    The overrides are in a mixin that is not a model, so this does not apply: a call has the same span
    and events as before, and the wait comes before them (`events`). A span is called after the
    object's class, so the subclass has the class's own name.

Each attempt of a retried call has an admission, a span and a start event of its own, because that
many requests did go out. Between attempts no slot is held.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Final, TypedDict, TypeVar, cast

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.tools import BaseTool, FunctionTool

from asyncbucket.core.levels import is_under
from asyncbucket.core.limiter import Limiter
from asyncbucket.llama_index.clients import is_client
from asyncbucket.llama_index.estimate import Estimator
from asyncbucket.llama_index.misuse import warn_of_misuse
from asyncbucket.llama_index.models import (
    Paced,
    RateLimitedEmbedding,
    RateLimitedLLM,
    RateLimitedMultiModalEmbedding,
    bind,
    paced_subclass,
    pacing_of,
)
from asyncbucket.llama_index.pacing import Pacing
from asyncbucket.llama_index.tools import (
    PacedTool,
    ToolCost,
    ToolPacing,
    paced_tool,
)
from asyncbucket.retry import Retry

T = TypeVar("T")

_PLAIN_CLASS = "__asyncbucket_plain_class__"


class WrapOptions(TypedDict, total=False):
    """What `Limiter.wrap` takes by keyword."""

    child: str | Limiter | None
    retry: Retry | int | None
    #: An `Estimator`, or what has as much of it as is called.
    estimator: Any
    cost: ToolCost | None


def wrap(
    obj: T,
    limiter: Limiter,
    *,
    child: str | Limiter | None = None,
    retry: Retry | int | None = None,
    estimator: Estimator | None = None,
    cost: ToolCost | None = None,
) -> T:
    """Return ``obj``, a LlamaIndex LLM, embedding model or tool, paced by ``limiter``.

    It is of a subclass of its class, and shares its fields; ``obj`` itself stays unpaced. What is
    already paced by ``limiter``, or by one below it, is returned as it is, or paced anew if options
    are given. What is paced by a limiter above ``limiter`` is paced by ``limiter`` from now on: it
    counts there and above, once each.

    Args:
        obj: any ``LLM``, ``BaseEmbedding`` or ``BaseTool``, or a list or tuple of them, which comes
            back as one. Plain functions in it become tools, as they would in an agent.
        limiter: what admits the calls; it may be shared with other models and plain code.
        child: a limiter below ``limiter``, or the name of its child, to use instead.
        retry: the most attempts, or a `Retry`; False for a single attempt. 5 attempts by default.
            Models only: a tool is never retried.
        estimator: what estimates the cost of a model's call in tokens, instead of the default.
        cost: what a tool's call costs, instead of one request; see `ToolCost`.

    Raises:
        TypeError: ``obj`` cannot be wrapped, or an option does not apply to it.
        ValueError: ``obj`` is paced by another limiter, or ``child`` is not below ``limiter``.
    """
    options = {"retry": retry, "estimator": estimator, "cost": cost}
    given = {name: value for name, value in options.items() if value is not None}
    limiter = _child_of(limiter, child)
    if not isinstance(obj, (list, tuple)):
        _check_options(given, [obj])
        one: T = _wrap_one(obj, limiter, given)
        return one
    objects = [_as_tool(item) for item in obj]
    _check_options(given, objects)
    several: Any = [_wrap_one(item, limiter, given) for item in objects]
    if isinstance(obj, tuple):
        several = tuple(several)
    return cast("T", several)


def _wrap_one(obj: Any, limiter: Limiter, options: Mapping[str, Any]) -> Any:
    """Return ``obj`` paced by ``limiter``, with the options that apply to it."""
    if isinstance(obj, StructuredLLM):
        inside = _wrap_one(obj.llm, limiter, options)
        return obj if inside is obj.llm else obj.model_copy(update={"llm": inside})
    is_tool = _kind(obj) == "tool"
    options = {name: options[name] for name in _OPTIONS[_kind(obj)] if name in options}
    pacing: Any
    if isinstance(obj, (Paced, PacedTool)):
        pacing = pacing_of(obj)
        if is_under(pacing.limiter, limiter):
            limiter = pacing.limiter
            if not options:
                return obj
        elif not is_under(limiter, pacing.limiter):
            raise ValueError(
                f"{obj!r} is paced already and can't be paced by {limiter!r} too: neither limiter is under the "
                f"other, so that a call would wait in two lines; wrap what it was made of, or make one of "
                f"them a child of the other"
            )
        pacing = pacing.copy_for(limiter, options)
    elif is_tool:
        pacing = ToolPacing(limiter, **options)
    else:
        pacing = Pacing(limiter, **options)
        warn_of_misuse(obj, pacing)
    return paced_tool(obj, pacing) if is_tool else _paced_model(obj, pacing)


#: The options of each kind of object.
_OPTIONS: Final = {"model": ("retry", "estimator"), "tool": ("cost",)}


def _kind(obj: object) -> str:
    """Return ``"model"`` or ``"tool"``.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(obj, (LLM, BaseEmbedding)):
        return "model"
    if isinstance(obj, BaseTool):
        return "tool"
    raise TypeError(_refusal_message(obj))


def _check_options(options: Mapping[str, Any], objects: list[Any]) -> None:
    """Refuse options that would have no effect."""
    kinds = {_kind(item) for item in objects}
    unused = options.keys() - {name for kind in kinds for name in _OPTIONS[kind]}
    if unused and kinds:
        raise TypeError(
            f"{', '.join(sorted(unused))}= is for {'models' if kinds == {'tool'} else 'tools'}: "
            f"a model's calls are estimated and tried again, a tool's have a cost"
        )


def _as_tool(obj: Any) -> Any:
    """Return a plain function as the tool that an agent would make of it."""
    return FunctionTool.from_defaults(obj) if inspect.isroutine(obj) else obj


def _child_of(limiter: Limiter, child: str | Limiter | None) -> Limiter:
    if child is None:
        return limiter
    if not isinstance(child, Limiter):
        return limiter.child(child)
    if not is_under(child, limiter):
        raise ValueError(
            f"{child!r} is not under {limiter!r}: make it by child(...), or wrap with it alone"
        )
    return child


def plain_class(cls: type[Any]) -> type[Any]:
    """Return the class that ``cls`` was generated from, or ``cls`` if it was written by hand."""
    plain: type[Any] = vars(cls).get(_PLAIN_CLASS, cls)
    return plain


def _paced_model(model: T, pacing: Pacing) -> T:
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
    """Return the paced subclass of a model's class; it keeps that class's public name."""
    if issubclass(cls, MultiModalEmbedding):
        mixin: type[Any] = RateLimitedMultiModalEmbedding
    else:
        mixin = RateLimitedLLM if issubclass(cls, LLM) else RateLimitedEmbedding

    return paced_subclass(mixin, cls, **{_PLAIN_CLASS: cls})


def limiter_of(paced: object) -> Limiter:
    """Return the limiter that paces a model or tool; a type checker knows no ``llm.limiter``.

    >>> limiter_of(pace(OpenAI(model="gpt-4o-mini"), rpm=500)).statistics()

    Raises:
        TypeError: it is not paced.
    """
    if isinstance(paced, StructuredLLM):
        return limiter_of(paced.llm)
    if not isinstance(paced, (Paced, PacedTool)):
        raise TypeError(f"{paced!r} is not paced: limiter.wrap(...) and pace(...) return what is")
    limiter: Limiter = pacing_of(paced).limiter
    return limiter


def _refusal_message(obj: object) -> str:
    if isinstance(obj, type):
        return f"wrap a model or tool, not its class: limiter.wrap({obj.__name__}(...))"
    if inspect.getattr_static(obj, "llm", None) is not None:  # `Settings` would make one
        return f"wrap what {type(obj).__name__} is made of: its llm, and its tools if it has any"
    if hasattr(obj, "to_tool_list"):
        return f"wrap the tools of {type(obj).__name__}: limiter.wrap(spec.to_tool_list())"
    if is_client(obj):
        name = type(obj).__name__
        sync = "" if name.startswith("Async") else "sync=True"
        return (
            f"an SDK's client is paced where it sends: "
            f"{name}(http_client=limiter.http_client({sync}), max_retries=0)"
        )
    return (
        f"a LlamaIndex LLM, embedding model or tool can be wrapped, not {type(obj).__name__}; pace "
        f"other code by `async with limiter.acquire(...)` or @limiter.paced"
    )
