"""The class of a paced model or tool: which methods wait in line, and what paces its copies.

*LLMs* are paced at ``chat``, ``complete``, their streams and asynchronous twins; everything else
that LlamaIndex does with a model goes through these. That includes LlamaIndex's own structured
prediction. An integration's own may use its client directly (OpenAIResponses and Anthropic call
``parse``), so that is paced as a whole. If there is a ``chat`` inside after all, it does not pay
again, and its usage settles the call. ``predict_and_call`` must not be paced as a whole, since tools
run inside.

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

*Pickles.* LlamaIndex pickles models to spread work over processes
(``IngestionPipeline(num_workers=2)``). A limiter cannot be pickled: its budget lives in this
process. What stands for it in a pickle are the keys of it and of those above it, and the terms on
which they were made. A copy that comes back into this process shares the original's limiter. In another process,
limiters are made on the same terms, once for all copies, and a warning says what that means; with a
store, the processes share the limits.
"""

import functools
import inspect
import os
import sys
import types
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.llms.llm import LLM
from llama_index.core.schema import BaseComponent
from llama_index.core.tools import BaseTool
from llama_index.core.tools.types import AsyncBaseTool

from asyncbucket.engine.dispatchers import Lock
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.limits import Limit
from asyncbucket.levels import levels, terms_of
from asyncbucket.llama_index.clients import REPORTS, late_client, unretried_options, without_retries
from asyncbucket.llama_index.estimate import Estimate, Estimator
from asyncbucket.llama_index.pacing import Method, ModelCall, Pacing, call_around
from asyncbucket.providers.usage import Usage, usage_of
from asyncbucket.waiting import ASYNC, SYNC

#: Where a paced model or tool keeps its `Pacing`.
_PACING: Final = "_asyncbucket_pacing"
#: Fields that set how often a model's own class retries.
_RETRY_FIELDS: Final = ("max_retries", "retries")
#: Methods by which models make their clients.
_CLIENT_METHODS: Final = ("_get_client", "_get_aclient")


class Paced:
    """The part of a paced model or tool that is neither.

    It is not a pydantic model, so mixing it in adds no field and changes no default.
    """

    @property
    def paced_by(self) -> Limiter:
        """The limiter, by the mark that `Limiter.paced` leaves on functions, too."""
        return pacing_of(self).limiter

    #: The same; type checkers know it by `limiter_of`.
    limiter = paced_by

    def __repr_args__(self) -> Generator[tuple[str | None, Any]]:
        """Show what helps a reader; a model's fields include its API key."""
        names = (name for name in ("model", "model_name") if name in vars(self))
        if name := next(names, None):
            yield name, vars(self)[name]
        yield "limiter", self.paced_by


def pacing_of(paced: Any) -> Pacing:
    """Return the pacing of a paced model or tool."""
    private: Mapping[str, Any] = getattr(paced, "__pydantic_private__", None) or {}
    pacing: Pacing | None = private.get(_PACING) or vars(paced).get(_PACING)
    if pacing is None:
        name = type(paced).__name__
        raise TypeError(
            f"this {name} was made by the class of a paced one, so no limiter paces it: "
            f"make a plain {name}, and wrap that"
        )
    return pacing


def paced_copy(obj: Any, pacing: Pacing) -> Any:
    """Return a paced object with the attributes of ``obj``, which stays as it is."""
    cls: Any = type(obj)  # hashable, which mypy cannot know
    paced: Any = object.__new__(cls if issubclass(cls, Paced) else _paced_class(cls))
    if isinstance(obj, BaseTool):
        vars(paced).update(vars(obj), **{_PACING: pacing})
        return paced
    # Not a field, so it appears in no schema, dump, hash of an ingestion cache, or request.
    private = obj.__pydantic_private__ or {}
    private = {name: without_retries(value) for name, value in private.items()}
    has_client = any(hasattr(type(each), REPORTS) for each in private.values())
    if has_client or any(hasattr(cls, name) for name in _CLIENT_METHODS):
        pacing.expect_headers()
    _set_state(paced, obj, vars(obj), {**private, _PACING: pacing})
    return paced


def _set_state(model: Any, source: Any, fields: dict[str, Any], private: Any) -> None:
    """Give ``model`` the state of ``source``, but with ``fields`` and ``private``."""
    object.__setattr__(model, "__dict__", fields)
    object.__setattr__(model, "__pydantic_private__", private)
    for name in ("__pydantic_extra__", "__pydantic_fields_set__"):
        object.__setattr__(model, name, getattr(source, name))


@functools.lru_cache(maxsize=256)
def _paced_class(cls: type[Any]) -> type[Any]:
    """Return the paced subclass of ``cls``, which people and their dashboards know as ``cls``."""
    paced: type[Any] = subclass(Paced, cls)
    for name, override in (*_paced_methods(cls, paced), *_overrides(cls, paced)):
        setattr(paced, name, override)
    return paced


def subclass(*bases: type[Any]) -> Any:
    """Return a subclass that has the name of the last of its ``bases``, and its documentation."""
    cls = bases[-1]
    names = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__qualname__")}
    return types.new_class(cls.__name__, bases, {}, lambda ns: ns.update(names))


def _overrides(cls: type[Any], paced: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield what else ``paced``, a subclass of a model's class ``cls``, does in its own way."""
    if not issubclass(cls, BaseComponent):
        return
    yield "__reduce_ex__", _reduce
    for name in _RETRY_FIELDS:
        if name in cls.model_fields:
            yield name, _zero(name)
    for name in _CLIENT_METHODS:
        if hasattr(cls, name):
            yield name, _client_method(paced, name)


def _zero(name: str) -> property:
    """Return a property that reads 0, whatever the field says: one layer retries, and it is ours.

    The field's own value stays where it is, so it is serialised, copied and set as before.
    """

    def set_field(model: object, value: int) -> None:
        vars(model)[name] = value

    return property(lambda _: 0, set_field)


def _client_method(paced: type[Any], name: str) -> Callable[..., Any]:
    def get_client(model: Any, *args: Any, **kwargs: Any) -> Any:
        client = getattr(super(paced, model), name)(*args, **kwargs)
        return client if hasattr(type(client), REPORTS) else late_client(model, client)

    return get_client


# --- which methods are paced, and what one call of them costs ---


def _usage_in(reply: Any) -> Usage | None:
    """Return the usage in one of LlamaIndex's replies, if there is any."""
    if getattr(reply, "raw", None) is None and not getattr(reply, "additional_kwargs", None):
        return None
    return usage_of(reply)


def _chat(estimator: Estimator, llm: Any, messages: Any, /, *_: Any, **kwargs: Any) -> Estimate:
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
    return Estimate(estimator.embedding([texts] if isinstance(texts, str) else texts), 0)


def _image(*_: Any) -> Estimate:
    return Estimate(0, 0)


_BASES: Final = (LLM, BaseEmbedding, MultiModalEmbedding)
_METHODS: Final = {
    "chat": Method("messages", _chat, _usage_in),
    "stream_chat": Method("messages", _chat, _usage_in),
    "complete": Method("prompt", _completion, _usage_in),
    "stream_complete": Method("prompt", _completion, _usage_in),
    "structured_predict": Method("output_cls", _prediction, by_others=True),
    "stream_structured_predict": Method("output_cls", _prediction, by_others=True),
    "_get_query_embedding": Method("query", _embedding),
    "_get_text_embedding": Method("text", _embedding),
    "_get_text_embeddings": Method("texts", _embedding, by_others=True),
    "_get_image_embedding": Method("img_file_path", _image),
    "_get_image_embeddings": Method("img_file_paths", _image, by_others=True),
}


def _paced_methods(cls: type[Any], paced: type[Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the methods for ``paced``, a subclass of ``cls``, which pace those of ``cls``."""
    if issubclass(cls, AsyncBaseTool):
        methods = {"call": _tool_method, "acall": _tool_method}
    elif issubclass(cls, BaseTool):
        methods = {"__call__": _tool_method}
    else:
        methods = {
            twin: functools.partial(_model_method, method)
            for name, method in _METHODS.items()
            for twin in (name, f"_a{name[1:]}" if name.startswith("_") else f"a{name}")
            if hasattr(cls, twin) and not (method.by_others and _is_inherited(cls, twin))
        }
    for name, make in methods.items():
        method = make(paced, name)
        yield name, functools.wraps(getattr(cls, name), updated=())(method)


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
        if not _is_call(own, args, kwargs, how.argument, check=is_stream):
            return await io.call(own, *args, **kwargs)  # its own error says what is wrong
        pacing = pacing_of(model)
        around = call_around(pacing.limiter)
        if around is not None and around.is_part and not is_stream:
            return await io.call(own, *args, **kwargs)
        if is_chat:  # the call may go out later, and the list may grow
            if args:
                args = (list(args[0]), *args[1:])
            else:
                kwargs["messages"] = list(kwargs["messages"])
        if unretried:
            kwargs = {**unretried, **kwargs}
        call = ModelCall(io, how, model, own, name, args, kwargs)
        if not is_stream:
            return await pacing.call(call, around)
        call.asks_for_usage = how.read is _usage_in and _must_ask_for_usage(model, kwargs)
        return await pacing.stream(call, around)

    return io.function(method)


def _is_call(
    own: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    argument: str,
    *,
    check: bool,
) -> bool:
    """Tell whether ``own`` can be called so; only ``check`` looks further than its first ``argument``.

    A stream is made at its first item, and an error in its call should not wait until then.
    """
    if not args and argument not in kwargs:
        return False
    try:
        _ = check and inspect.signature(own).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def _must_ask_for_usage(llm: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether streams of ``llm`` end with their usage only if asked, and the user did not ask."""
    given = {**(vars(llm).get("additional_kwargs") or {}), **kwargs}
    # A model of that class can exist only if the module is loaded.
    openai = sys.modules.get("llama_index.llms.openai.base")
    return "stream_options" not in given and openai is not None and isinstance(llm, openai.OpenAI)


# --- what paces copies in pickles ---

_LOCK: Final = Lock()
#: The keys of limiters whose models were pickled, and of those above them. A pickle carries no
#: references, so each process must find its limiters by name.
_KEYS: Final[dict[Limiter, str]] = {}
#: Limiters by the id of a process and the key that stands for them there.
_LIMITERS: Final[dict[tuple[int, str], Limiter]] = {}
#: What stands for a limiter in a pickle: its key, its own name, its limits as they are now, and all
#: other terms that it was made with.
_Level: TypeAlias = tuple[str, str, tuple[Limit, ...], dict[str, Any], type[Any]]


def _passport(limiter: Limiter) -> list[_Level]:
    """Return what stands for ``limiter`` and those above it, from the root down."""
    passport: list[_Level] = []
    for level in levels(limiter):
        with _LOCK:
            key = _KEYS.setdefault(level, uuid.uuid4().hex)
            _LIMITERS[os.getpid(), key] = level
        name = level.name if level.parent is None else level.name.rpartition("/")[2]
        passport.append((key, name, level.limits, terms_of(level), type(level)))
    return passport[::-1]


def _limiter_at(passport: list[_Level]) -> Any:
    """Return the limiter that a passport stands for here, with all its doors."""
    limiter: Limiter | None = None
    with _LOCK:
        for key, name, limits, terms, cls in passport:
            parent, limiter = limiter, _LIMITERS.get((os.getpid(), key))
            if limiter is None:
                limiter = _made(parent, name, limits, terms, cls)
                _KEYS[limiter], _LIMITERS[os.getpid(), key] = key, limiter
    assert limiter is not None  # there is a root
    return limiter


def _made(
    parent: Any, name: str, limits: tuple[Limit, ...], terms: dict[str, Any], cls: type[Any]
) -> Limiter:
    """Return a new limiter; if it has no parent, warn at the line that unpickles."""
    if parent is not None:
        make = parent.key if name.startswith("*") else parent.child
        child: Limiter = make(name, *limits, **terms)
        return child
    limiter: Limiter = cls(*limits, name=name, **terms)
    if "store" not in terms:
        warnings.warn(
            f"{limiter!r} came from another process with a copy of a model; together the "
            f"processes may use several times the limits; give each process its share of "
            f"them, or all of them one Limiter(store=...)",
            RuntimeWarning,
            stacklevel=4,
        )
    return limiter


def _reduce(model: Any, _: object) -> tuple[Any, ...]:
    """Return what ``pickle`` needs to make a copy of a paced model: an unpaced twin, and what paces it.

    LlamaIndex's own ``__getstate__`` deletes from the live object whatever cannot be pickled, so the
    twin has a dictionary of its own.
    """
    cls: Any = type(model).__bases__[1]
    twin, pacing = cls.__new__(cls), pacing_of(model)
    if pacing.models:
        raise TypeError(
            f"a model of pool {pacing.limiter.name!r} cannot be pickled: make pool and model in each "
            f"process; members with store= share their limits"
        )
    private = {name: each for name, each in model.__pydantic_private__.items() if name != _PACING}
    _set_state(twin, model, dict(vars(model)), private or None)
    return _restore, (twin, pacing.options, _passport(pacing.limiter))


def _restore(twin: object, options: dict[str, Any], passport: list[_Level]) -> object:
    return _limiter_at(passport).wrap(twin, **options)
