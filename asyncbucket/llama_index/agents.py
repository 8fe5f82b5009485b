"""LlamaIndex's agents and workflows, each run of which is one agent to the limiters it calls."""

import asyncio
import copy
import functools
from collections.abc import Callable
from typing import Any

from llama_index.core.llms.llm import LLM
from llama_index.core.workflow import Workflow

from asyncbucket.core.context import Agent, InheritedScope, inherited, running_agent


def is_workflow(obj: object) -> bool:
    """Tell whether ``obj`` is an agent or another workflow."""
    return isinstance(obj, Workflow)


def with_scopes(workflow: Any, kind: str | None, pace: Callable[[Any], Any]) -> Any:
    """Return ``workflow`` such that each run is one agent; ``pace`` paces the model it has, if any.

    A run that begins inside another agent's scope belongs to that agent.
    """
    scoped = copy.copy(workflow)
    if isinstance(getattr(workflow, "llm", None), LLM):
        scoped.llm = pace(workflow.llm)

    @functools.wraps(workflow.run)
    def run(*args: Any, **kwargs: Any) -> Any:
        plain = type(scoped).run
        if running_agent(inherited.get()) is not None:
            return plain(scoped, *args, **kwargs)
        agent = Agent(None, kind, None)
        with InheritedScope(agent=agent):
            handler = plain(scoped, *args, **kwargs)
            asyncio.ensure_future(_end_with(agent, handler))  # noqa: RUF006 - the handler's task keeps it
        return handler

    object.__setattr__(scoped, "run", run)  # pydantic would refuse it
    return scoped


async def _end_with(agent: Agent, handler: Any) -> None:
    """End ``agent`` when its run is over."""
    ended_well = False
    try:
        await handler.stop_event_result()
        ended_well = True
    except Exception:  # noqa: BLE001, S110 - whoever awaits the handler gets it
        pass
    finally:
        agent.end(ended_well=ended_well)
