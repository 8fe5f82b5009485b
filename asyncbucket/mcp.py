"""Tool calls of MCP sessions, paced.

A session sends no HTTP requests one by one (it may even be a pipe), so its ``call_tool`` is paced:
by a subclass of the session's own class that shares its state, as LlamaIndex models are.
"""

import types
from collections.abc import Mapping
from typing import Any

from asyncbucket.attempt import Attempt
from asyncbucket.engine.limiter import Limiter


def wrap_session(obj: Any, limiter: Limiter, options: Mapping[str, Any]) -> Any:
    """Return an MCP client or session whose tool calls ``limiter`` admits; None for anything else.

    The result is of the session's class and shares its state; ``obj`` itself stays unpaced. A call
    of a tool that has a child of its name under ``limiter`` goes to that child, any other to
    ``limiter``. It costs one request, and holds a slot until the tool has answered. What is paced
    by ``limiter`` already is returned as it is.

    Raises:
        TypeError: an option is given.
        ValueError: it is paced by another limiter.
    """
    cls: type[Any] = type(obj)
    modules = (each.__module__ for each in cls.__mro__)
    if not hasattr(obj, "call_tool") or not any(f"{each}.".startswith("mcp.") for each in modules):
        return None
    given = sorted(name for name, value in options.items() if value is not None)
    if given:
        raise TypeError(f"{', '.join(given)}= is for LlamaIndex's models and agents, not for MCP")
    paced_by = getattr(obj, "paced_by", None)
    if paced_by is limiter:
        return obj
    if paced_by is not None:
        raise ValueError(f"{obj!r} is paced by {paced_by!r} already: wrap what it was made of")

    async def call_tool(self: Any, name: str, *args: Any, **options: Any) -> Any:
        attempt = Attempt(limiter.children.get(name, limiter))
        with await attempt.admit(), attempt:
            return await cls.call_tool(self, name, *args, **options)

    members = {"__module__": cls.__module__, "call_tool": call_tool, "paced_by": limiter}
    paced = types.new_class(cls.__name__, (cls,), {}, lambda namespace: namespace.update(members))
    session: Any = object.__new__(paced)
    session.__dict__ = vars(obj)
    return session
