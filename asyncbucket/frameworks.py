"""Frameworks beside LlamaIndex: what paces each of them, and the tool calls of MCP sessions.

A paced HTTP client suffices for most: it sees each attempt, its tokens, its stream and its end,
whatever becomes of the task that waits for it. So there is no adapter for them, only the lines
that hand them such a client, in frameworks.toml, for `asyncbucket doctor` and for the error of
`Limiter.wrap`. docs/frameworks.md shows each in a whole example; tests run those with the real
packages. The frameworks' own hooks were tried and are worse: LangChain's rate limiters see no
tokens; its callbacks, and LiteLLM's hooks, learn nothing of a cancelled call.

An MCP session sends no HTTP requests one by one (it may even be a pipe), so its ``call_tool`` is
paced: by a subclass of the session's own class that shares its state, as LlamaIndex models are.
"""

import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from asyncbucket.attempt import Attempt
from asyncbucket.engine.limiter import Limiter


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """Say what paces a framework.

    Attributes:
        name: what people call it.
        package: the distribution that has it.
        module: where its classes are; None if others may have a module of this name.
        lines: the code that paces it, as docs/frameworks.md has it; empty for a subclass there.
        unpaced: why a limiter does not reach it as it is; None if a client of its own does.
    """

    name: str
    package: str
    module: str | None = None
    lines: Sequence[str] = ()
    unpaced: str | None = None

    @property
    def how(self) -> str:
        """What paces it, in one line."""
        return "; ".join(self.lines) or "the subclass in the documentation, frameworks.html"


FRAMEWORKS: Final = tuple(
    Framework(**framework)
    for framework in tomllib.loads(
        files("asyncbucket").joinpath("frameworks.toml").read_text("utf-8")
    )["framework"]
)


def wrap_session(obj: Any, limiter: Limiter, options: Mapping[str, Any]) -> Any:
    """Return an MCP client or session whose tool calls ``limiter`` admits; None for LlamaIndex's.

    The result is of the session's class and shares its state; ``obj`` itself stays unpaced. A call
    of a tool that has a child of its name under ``limiter`` goes to that child, any other to
    ``limiter``. It costs one request, and holds a slot until the tool has answered. What is paced
    by ``limiter`` already is returned as it is.

    Raises:
        TypeError: it belongs to another framework, and the message shows what paces that; or an
            option is given.
        ValueError: it is paced by another limiter.
    """
    framework = _framework_of(obj)
    if framework is None:
        return None
    cls: type[Any] = type(obj)
    if framework.module != "mcp" or not hasattr(obj, "call_tool"):
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__} can't be wrapped; what paces {framework.name} is "
            f"{framework.how}"
        )
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


def _framework_of(obj: object) -> Framework | None:
    """Return the framework that an object's class is from, or is derived from."""
    modules = [cls.__module__ + "." for cls in type(obj).__mro__]
    if any(module.startswith("llama_index.") for module in modules):
        return None
    for framework in FRAMEWORKS:
        if framework.module and any(m.startswith(framework.module + ".") for m in modules):
            return framework
    return None
