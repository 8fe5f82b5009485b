"""How a LlamaIndex model or tool is paced, and why this way.

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

Where a call is paced: see `methods`. *Structured LLMs* (``llm.as_structured_llm(...)``) have a model
inside; that one is paced. ``predict_and_call`` must not be paced as a whole, since tools run inside.

The traps, and where they are handled
    Public methods call public methods, and would pay twice: `asyncbucket.nesting` and `pacing`. A
    stream holds its slot until it ends, and may never be started or never be ended: `streams`. The
    model's class, the SDK and tenacity each retry, so one call may become twelve: `clients`, and
    ``max_retries`` below. Pickling: `copies`.
    Spans: LlamaIndex puts one around a method that a *class* overrides, by ``__init_subclass__``.
    The overrides are set when the class is there, so this does not apply: a call has the same span
    and events as before. A span is called after the object's class, so the subclass has the class's
    own name.

Each attempt of a retried call has an admission, a span and a start event of its own, because that
many requests did go out. Between attempts no slot is held.
"""

import asyncio
import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypedDict, TypeVar, cast

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.schema import BaseComponent
from llama_index.core.tools import BaseTool, FunctionTool
from llama_index.core.workflow import Workflow

from asyncbucket.core.context import Agent, InheritedScope, inherited, read_label, running_agent
from asyncbucket.core.levels import is_under, share_a_level
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.pool import Pool
from asyncbucket.llama_index.clients import (
    client_of,
    is_client,
    warn_of_misuse,
    without_retries,
)
from asyncbucket.llama_index.copies import reduce, set_state
from asyncbucket.llama_index.estimate import Estimator
from asyncbucket.llama_index.methods import paced_methods
from asyncbucket.llama_index.pacing import PACING, Pacing, pacing_of
from asyncbucket.llama_index.pools import check_models, refuse_single
from asyncbucket.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")

#: Fields that set how often a model's own class retries.
_RETRY_FIELDS: Final = ("max_retries", "retries")
#: Methods by which models make their clients.
_CLIENT_METHODS: Final = ("_get_client", "_get_aclient")


class WrapOptions(TypedDict, total=False):
    """What `Limiter.wrap` takes by keyword."""

    retry: Retry | int | None
    estimator: Estimator | None
    kind: str | None


def wrap(
    obj: T,
    limiter: Limiter,
    *,
    retry: Retry | int | None = None,
    estimator: Estimator | None = None,
    kind: str | None = None,
) -> T:
    """Return ``obj``, a LlamaIndex LLM, embedding model, tool, agent or workflow, paced by ``limiter``.

    It is of a subclass of its class, and shares its fields; ``obj`` itself stays unpaced. What is
    already paced by ``limiter``, or by one below it, is returned as it is, or paced anew if options
    are given. (So is a tool whose function is under `Limiter.paced`.) What is paced by a limiter
    above ``limiter`` is paced by ``limiter`` from now on: it counts there and above, once each.

    Args:
        obj: any ``LLM``, ``BaseEmbedding`` or ``BaseTool``, or a list or tuple of them, which comes
            back as one. Plain functions in it become tools, as they would in an agent. Or an agent
            or another ``Workflow``: its own model is paced, if it has one, and each ``run`` is one
            agent to the limiters that it calls; see `asyncbucket.agent`.
        limiter: what admits the calls; it may be shared with other models and plain code.
        retry: the most attempts, or a `Retry`; False for a single attempt. 5 attempts by default.
            Models only: a tool is never retried.
        estimator: what estimates the cost of a model's call in tokens, instead of the default.
        kind: what agents of about the same size have in common; for agents and workflows.

    Raises:
        TypeError: ``obj`` cannot be wrapped, or an option does not apply to it.
        ValueError: ``obj`` is paced by another limiter.
    """
    given = {"retry": retry, "estimator": estimator, "kind": read_label(kind, "kind")}
    options = {name: value for name, value in given.items() if value is not None}
    if isinstance(limiter, Pool) and isinstance(obj, (list, tuple)):
        return cast("T", _wrap_for_pool(obj, limiter, options))
    if not isinstance(obj, (list, tuple)):
        one: T = _wrap_one(obj, limiter, options)
        return one
    several: Any = [_wrap_one(_as_tool(item), limiter, options) for item in obj]
    return cast("T", tuple(several) if isinstance(obj, tuple) else several)


def _wrap_one(obj: Any, limiter: Limiter, options: Mapping[str, Any]) -> Any:
    """Return ``obj`` paced by ``limiter``."""
    if isinstance(obj, StructuredLLM):
        inside = _wrap_one(obj.llm, limiter, options)
        return obj if inside is obj.llm else obj.model_copy(update={"llm": inside})
    if not isinstance(obj, (LLM, BaseEmbedding, BaseTool)):
        return _wrap_workflow(obj, limiter, options)
    if "kind" in options:
        raise TypeError("kind= is for agents and workflows, whose runs it sorts by size")
    if options and isinstance(obj, BaseTool):
        raise TypeError(
            f"{', '.join(sorted(options))}= is for models: a tool is never tried again, and costs one "
            f"request"
        )
    if isinstance(obj, Paced):
        return _wrap_again(obj, limiter, options)
    refuse_single(obj, limiter)
    mark = getattr(getattr(obj, "real_fn", None), "paced_by", None)
    if mark is not None and share_a_level(mark, limiter):
        if is_under(mark, limiter):
            return obj  # a tool whose function acquires
        raise ValueError(
            f"the function of {obj!r} acquires from {mark!r} already, so each call would be "
            f"charged twice by {limiter!r}: wrap the plain function, or leave the tool as it is"
        )
    pacing = Pacing(limiter, **options)
    if not isinstance(obj, BaseTool):
        warn_of_misuse(obj, pacing)
    return _paced(obj, paced_class(type(obj)), pacing)


def _wrap_again(obj: "Paced", limiter: Limiter, options: Mapping[str, Any]) -> Any:
    pacing = pacing_of(obj)
    if is_under(pacing.limiter, limiter):
        if not options:
            return obj
        limiter = pacing.limiter
    elif not is_under(limiter, pacing.limiter):
        raise ValueError(
            f"{obj!r} is paced by {pacing.limiter!r} already and can't be paced by {limiter!r} too: "
            f"neither limiter is under the other, so that a call would wait in two lines; wrap what "
            f"it was made of, or make one of them a child of the other"
        )
    return _paced(
        obj, type(obj), Pacing(limiter, models=pacing.models, **{**pacing.options, **options})
    )


def _wrap_for_pool(models: Sequence[Any], pool: Pool, options: Mapping[str, Any]) -> Any:
    """Return a model like the first, which calls the model of whichever member takes the call."""
    check_models(models, pool)
    others: dict[Limiter, Any] = {}
    pacing = Pacing(pool, **options, models=others)
    paced = []
    for model in models:
        warn_of_misuse(model, pacing)
        cls: Any = type(model)  # hashable, which mypy cannot know
        paced.append(_paced(model, paced_class(cls), pacing))
    others.update(zip(pool.members[1:], paced[1:], strict=True))
    return paced[0]


def _wrap_workflow(obj: Any, limiter: Limiter, options: Mapping[str, Any]) -> Any:
    """Return an agent or workflow whose runs are one agent each, its model paced by ``limiter``.

    A run that begins inside another agent's scope belongs to that agent.
    """
    if not isinstance(obj, Workflow):
        what = f"the class {obj.__name__}" if isinstance(obj, type) else type(obj).__name__
        raise TypeError(
            f"a LlamaIndex LLM, embedding model, tool or agent can be wrapped, not {what}; wrap "
            f"the llm and the tools of an engine, and spec.to_tool_list() of a tool spec; give an SDK's "
            f"client http_client=limiter.http_client(); pace other code by `async with "
            f"limiter.acquire(...)` or @limiter.paced"
        )
    scoped: Any = copy.copy(obj)
    object.__setattr__(scoped, "__class__", _workflow_class(type(obj), options.get("kind")))
    if isinstance(llm := getattr(obj, "llm", None), LLM):
        of_model = {name: value for name, value in options.items() if name != "kind"}
        scoped.llm = _wrap_one(llm, limiter, of_model)
    return scoped


@functools.lru_cache(maxsize=256)
def _workflow_class(cls: Any, kind: str | None) -> Any:
    """Return a subclass of a workflow's ``cls``, each run of which is one agent of a ``kind``.

    A function kept by the object would go on to run the original when the object is copied.
    """

    @functools.wraps(cls.run)
    def run(workflow: Any, /, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(cls.run, workflow)
        if running_agent(inherited.get()) is not None:
            return plain(*args, **kwargs)
        agent = Agent(None, kind, None)
        with InheritedScope(agent=agent):
            handler = plain(*args, **kwargs)
            asyncio.ensure_future(_end_with(agent, handler))  # noqa: RUF006 - the handler's task keeps it
        return handler

    scoped = _subclass(cls)
    scoped._step_functions = cls._step_functions  # noqa: SLF001 - steps added to the class, not in it
    scoped.run = run
    return scoped


async def _end_with(agent: Agent, handler: Any) -> None:
    """End ``agent`` when its run is over."""
    ended_well = False
    with contextlib.suppress(Exception):  # whoever awaits the handler gets it
        try:
            await handler.stop_event_result()
            ended_well = True
        finally:
            agent.end(ended_well=ended_well)


def limiter_of(paced: object) -> Limiter:
    """Return the limiter that paces a model or tool.

    >>> limiter_of(pace(OpenAI(model="gpt-4o-mini"), rpm=500)).statistics()

    Raises:
        TypeError: it is not paced.
    """
    if isinstance(paced, StructuredLLM):
        return limiter_of(paced.llm)
    if not isinstance(paced, Paced):
        raise TypeError(f"{paced!r} is not paced: limiter.wrap(...) and pace(...) return what is")
    return paced.paced_by


class Paced:
    """The part of a paced model or tool that is neither.

    It is not a pydantic model, so mixing it in adds no field and changes no default.
    """

    @property
    def paced_by(self) -> Limiter:
        """The limiter, by the mark that `Limiter.paced` leaves on functions, too."""
        return pacing_of(self).limiter

    @property
    def limiter(self) -> Limiter:
        """The limiter; type checkers know it by `limiter_of`."""
        return self.paced_by

    def __repr_args__(self) -> "Generator[tuple[str | None, Any]]":
        """Show what helps a reader; a model's fields include its API key."""
        for name in ("model", "model_name"):
            if name in vars(self):
                yield name, vars(self)[name]
                break
        yield "limiter", self.paced_by


@functools.lru_cache(maxsize=256)
def paced_class(cls: type[Any]) -> type[Any]:
    """Return the paced subclass of ``cls``, which people and their dashboards know as ``cls``."""
    paced: type[Any] = _subclass(Paced, cls)
    for name, override in (*paced_methods(cls, paced), *_overrides(cls, paced)):
        setattr(paced, name, override)
    return paced


def _subclass(*bases: type[Any]) -> Any:
    """Return a subclass that has the name of the last of its ``bases``, and its documentation."""
    cls = bases[-1]
    names = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__qualname__")}
    return types.new_class(cls.__name__, bases, {}, lambda ns: ns.update(names))


def _overrides(cls: type[Any], paced: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield what else ``paced``, a subclass of a model's class ``cls``, does in its own way."""
    if not issubclass(cls, BaseComponent):
        return
    yield "__reduce_ex__", reduce
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
        return client_of(model, getattr(super(paced, model), name)(*args, **kwargs))

    return get_client


def _paced(obj: Any, cls: type[Any], pacing: Pacing) -> Any:
    """Return an object of ``cls`` with the attributes of ``obj``, which stays as it is."""
    paced: Any = object.__new__(cls)
    if isinstance(obj, BaseTool):
        vars(paced).update(vars(obj), **{PACING: pacing})
        return paced
    # Not a field, so it appears in no schema, dump, hash of an ingestion cache, or request.
    private = {
        name: without_retries(value) if is_client(value) else value
        for name, value in (obj.__pydantic_private__ or {}).items()
    }
    set_state(paced, obj, vars(obj), {**private, PACING: pacing})
    return paced


def _as_tool(obj: Any) -> Any:
    """Return a plain function as the tool that an agent would make of it."""
    return FunctionTool.from_defaults(obj) if inspect.isroutine(obj) else obj
