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

Where a call is paced, and what paces a copy in a pickle: see `paced`. *Structured LLMs*
(``llm.as_structured_llm(...)``) have a model inside; that one is paced.

The traps, and where they are handled
    Public methods call public methods, and would pay twice: `asyncbucket.attempt` and `pacing`. A
    stream holds its slot until it ends, and may never be started or never be ended: `pacing`. The
    model's class, the SDK and tenacity each retry, so one call may become twelve: `clients`, and
    ``max_retries`` in `paced`.
    Spans: LlamaIndex puts one around a method that a *class* overrides, by ``__init_subclass__``.
    The overrides are set when the class is there, so this does not apply: a call has the same span
    and events as before. A span is called after the object's class, so the subclass has the class's
    own name.

Each attempt of a retried call has an admission, a span and a start event of its own, because that
many requests did go out. Between attempts no slot is held.

*Pools.* Calls are prepared by the first model's class, and its replies are read by it: tools,
streams and structured output have the format of its provider. So the others must be of its family,
as ``AzureOpenAI`` is of ``OpenAI``'s. Embedding models only turn text into numbers, which are of use
beside those of the same model alone.
"""

import asyncio
import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict, TypeVar, cast

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.tools import BaseTool, FunctionTool
from llama_index.core.workflow import Workflow

from asyncbucket.agents import Agent, read_label, running_agent
from asyncbucket.engine.context import InheritedScope, inherited
from asyncbucket.engine.limiter import Limiter
from asyncbucket.levels import is_under
from asyncbucket.llama_index.clients import warn_of_misuse
from asyncbucket.llama_index.estimate import Estimator
from asyncbucket.llama_index.paced import Paced, paced_copy, pacing_of, subclass
from asyncbucket.llama_index.pacing import Pacing
from asyncbucket.pools import Pool
from asyncbucket.providers.prefixes import CacheMode, read_mode
from asyncbucket.retry import Retry

T = TypeVar("T")

#: What LLMs of any provider have in common.
_COMMON: Final = frozenset({*CustomLLM.__mro__, *FunctionCallingLLM.__mro__})


class WrapOptions(TypedDict, total=False):
    """What `Limiter.wrap` takes by keyword."""

    retry: Retry | int | None
    estimator: Estimator | None
    kind: str | None
    cache: CacheMode
    learn: bool


def wrap(
    obj: T,
    limiter: Limiter,
    *,
    retry: Retry | int | None = None,
    estimator: Estimator | None = None,
    kind: str | None = None,
    cache: CacheMode = "count",
    learn: bool = True,
) -> T:
    """Return ``obj``, a LlamaIndex LLM, embedding model, tool, agent or workflow, paced by ``limiter``.

    It is of a subclass of its class, and shares its fields; ``obj`` itself stays unpaced. What is
    already paced by ``limiter``, or by one below it, is returned as it is, or paced anew if options
    are given. (So is a tool whose function is under `Limiter.paced`.) What is paced by a limiter
    above ``limiter`` is paced by ``limiter`` from now on: it counts there and above, once each.

    Args:
        obj: any ``LLM``, ``BaseEmbedding`` or ``BaseTool``, or a list or tuple of them, which comes
            back as one. Plain functions in it become tools, as they would in an agent. Or an agent
            or another ``Workflow``: its own model is paced, if it has one, or those of the agents
            of an ``AgentWorkflow``, and each ``run`` is one agent to the limiters that it calls; see
            `asyncbucket.agent`.
        limiter: what admits the calls; it may be shared with other models and plain code.
        retry: the most attempts, or a `Retry`; False for a single attempt. 5 attempts by default.
            Models only: a tool is never retried.
        estimator: what estimates the cost of a model's call in tokens, instead of the default.
        kind: what agents of about the same size have in common; for agents and workflows.
        cache: ``"lead"`` has one of the calls with the same new prompt prefix go first, if they ask
            the provider to cache it; see `asyncbucket.providers.prefixes`.
        learn: whether the limits learn from the replies, as behind a transport, if the model's SDK
            shows them, as OpenAI's and Anthropic's do. False keeps the strict window.

    Raises:
        TypeError: ``obj`` cannot be wrapped, or an option does not apply to it.
        ValueError: ``obj`` is paced by another limiter.
    """
    given = {"retry": retry, "estimator": estimator, "kind": read_label(kind, "kind")}
    given["cache"] = None if read_mode(cache) == "count" else cache
    given["learn"] = None if learn else False
    options = {name: value for name, value in given.items() if value is not None}
    if not isinstance(obj, (list, tuple)):
        return cast("T", _wrap_one(obj, limiter, options))
    if isinstance(limiter, Pool):
        return cast("T", _wrap_for_pool(obj, limiter, options))
    several: Any = [_wrap_one(_as_tool(item), limiter, options) for item in obj]
    return cast("T", tuple(several) if isinstance(obj, tuple) else several)


def _as_tool(obj: Any) -> Any:
    """Return a plain function as the tool that an agent would make of it."""
    return FunctionTool.from_defaults(obj) if inspect.isroutine(obj) else obj


def _wrap_one(obj: Any, limiter: Limiter, options: Mapping[str, Any]) -> Any:
    """Return ``obj`` paced by ``limiter``."""
    if isinstance(obj, StructuredLLM):
        inside = _wrap_one(obj.llm, limiter, options)
        return obj if inside is obj.llm else obj.model_copy(update={"llm": inside})
    if isinstance(obj, Workflow):
        return _wrap_workflow(obj, limiter, options)
    _check_options(obj, options)
    function = getattr(obj, "real_fn", None)  # of a tool; it may acquire by itself
    present = getattr(obj, "paced_by", None) or getattr(function, "paced_by", None)
    if isinstance(present, Limiter):  # mocks have every attribute
        return _wrap_again(obj, present, limiter, options)
    if isinstance(limiter, Pool):
        raise TypeError(
            f"one {type(obj).__name__} calls one provider, and pool {limiter.name!r} has "
            f"{len(limiter.members)}: wrap one model for each member, pool.wrap([llm_a, llm_b]), and "
            f"a tool by a limiter of its own; or, without wrapping it, make the model with clients of "
            f'pool.http_client({{limiter: {{"base_url": ..., "headers": ...}}}})'
        )
    pacing = Pacing(limiter, **options)
    warn_of_misuse(obj, pacing)
    return paced_copy(obj, pacing)


def _check_options(obj: Any, options: Mapping[str, Any]) -> None:
    """Refuse what is neither model nor tool, and options that do not apply to it."""
    if not isinstance(obj, (LLM, BaseEmbedding, BaseTool)):
        what = type(obj).__name__
        if isinstance(obj, type):
            what = f"the class {obj.__name__}: wrap an object, {obj.__name__}(...)"
        raise TypeError(
            f"a LlamaIndex LLM, embedding model, tool or agent can be wrapped, not {what}; wrap "
            f"the llm and the tools of an engine, and spec.to_tool_list() of a tool spec; give an SDK's "
            f"client http_client=limiter.http_client(); pace other code by `async with "
            f"limiter.acquire(...)` or @limiter.paced"
        )
    wrong = sorted(options if isinstance(obj, BaseTool) else options.keys() & {"kind"})
    if wrong:
        raise TypeError(
            f"{', '.join(wrong)}= does not apply to {type(obj).__name__}: kind= is for agents and "
            f"workflows, retry=, estimator=, cache= and learn= are for models"
        )


def _wrap_again(obj: Any, present: Limiter, limiter: Limiter, options: Mapping[str, Any]) -> Any:
    """Return ``obj``, which ``present`` paces, paced by ``limiter``; each level counts a call once."""
    if is_under(present, limiter):
        if not options:
            return obj
        limiter = present
    elif not isinstance(obj, Paced) or not is_under(limiter, present):
        raise ValueError(
            f"{obj!r} is paced by {present!r} already and can't be paced by {limiter!r} too: "
            f"a call would wait in two lines, or be charged twice; wrap what it was made of, or make "
            f"one of the limiters a child of the other"
        )
    pacing = pacing_of(obj)
    return paced_copy(obj, Pacing(limiter, models=pacing.models, **{**pacing.options, **options}))


# --- pools ---


def _wrap_for_pool(models: Sequence[Any], pool: Pool, options: Mapping[str, Any]) -> Any:
    """Return a model like the first, which calls the model of whichever member takes the call."""
    if len(models) != len(pool.members) or not all(_can_serve_as(each, models) for each in models):
        raise TypeError(
            f"pool {pool.name!r} needs one model for each member, in their order "
            f"({', '.join(repr(member.name) for member in pool.members)}), LLMs of one family, such as "
            f"OpenAI, AzureOpenAI and OpenAILike, or embedding models with the same model_name and "
            f"dimensions, whose vectors compare; none of them paced already, or structured; not "
            f"{', '.join(type(model).__name__ for model in models)}"
        )
    others: dict[Limiter, Any] = {}
    pacing = Pacing(pool, **options, models=others)
    for model in models:
        warn_of_misuse(model, pacing)
    first, *rest = (paced_copy(model, pacing) for model in models)
    others.update(zip(pool.members[1:], rest, strict=True))
    return first


def _can_serve_as(model: Any, models: Sequence[Any]) -> bool:
    """Tell whether a call that was prepared by the first of a pool's models can be made by ``model``."""
    first = models[0]
    if isinstance(model, (Paced, StructuredLLM)):
        return False
    if isinstance(first, BaseEmbedding):
        what = ("model_name", "dimensions")
        is_same = all(getattr(model, name, None) == getattr(first, name, None) for name in what)
        return is_same and isinstance(model, BaseEmbedding)
    family = (set(type(model).__mro__) & set(type(first).__mro__)) - _COMMON
    return bool(family) and isinstance(model, LLM)


# --- agents and workflows ---


def _wrap_workflow(workflow: Any, limiter: Limiter, options: Mapping[str, Any]) -> Any:
    """Return an agent or workflow whose runs are one agent each, its models paced by ``limiter``.

    A run that begins inside another agent's scope belongs to that agent.
    """
    scoped: Any = copy.copy(workflow)
    cls: Any = type(workflow)
    object.__setattr__(scoped, "__class__", _workflow_class(cls, options.get("kind")))
    if isinstance(llm := getattr(workflow, "llm", None), LLM):
        of_model = {name: value for name, value in options.items() if name != "kind"}
        scoped.llm = _wrap_one(llm, limiter, of_model)
    agents = vars(workflow).get("agents")
    if isinstance(agents, dict):  # an AgentWorkflow's; they run within its own runs
        scoped.agents = {
            name: _wrap_one(each, limiter, options) if isinstance(each, Workflow) else each
            for name, each in agents.items()
        }
    return scoped


@functools.lru_cache(maxsize=256)
def _workflow_class(cls: Any, kind: str | None) -> Any:
    """Return a subclass of a workflow's ``cls``, each run of which is one agent of a ``kind``.

    A function kept by the object would go on to run the original when the object is copied.
    """

    @functools.wraps(cls.run)
    def run(workflow: Any, /, *args: Any, **kwargs: Any) -> Any:
        if running_agent(inherited.get()) is not None:
            return cls.run(workflow, *args, **kwargs)
        agent = Agent(None, kind, None)
        with InheritedScope(payers=(agent,)):
            handler = cls.run(workflow, *args, **kwargs)
            result = asyncio.ensure_future(handler)

        def end(done: asyncio.Future[Any]) -> None:
            agent.end(ended_well=not done.cancelled() and done.exception() is None)

        result.add_done_callback(end)
        return result if asyncio.iscoroutine(handler) else handler

    @functools.wraps(cls.run)
    async def run_to_its_end(workflow: Any, /, *args: Any, **kwargs: Any) -> Any:
        return await run(workflow, *args, **kwargs)

    scoped = subclass(cls)
    scoped._step_functions = cls._step_functions  # noqa: SLF001 - steps added to the class, not in it
    scoped.run = run_to_its_end if inspect.iscoroutinefunction(cls.run) else run
    return scoped


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
