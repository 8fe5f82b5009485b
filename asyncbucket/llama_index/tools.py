"""A paced tool: each of its calls waits for one admission.

What a tool holds while it makes calls itself: see `asyncbucket.nesting`. A tool is never
retried: only its author knows what it has done by then. LlamaIndex's agents show a tool's errors to
the model, including a refusal by the limiter.
"""

# mypy: disable-error-code="safe-super"
# Methods called by super() are abstract in LlamaIndex; what is paced is a concrete class.

import functools
from abc import ABC
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from llama_index.core.tools.types import AsyncBaseTool

from asyncbucket.core.doors import call_amounts
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import shown
from asyncbucket.llama_index.events import admit
from asyncbucket.llama_index.models import LimiterAttribute, paced_subclass, pacing_of
from asyncbucket.llama_index.pacing import Terms
from asyncbucket.nesting import is_running, running
from asyncbucket.waiting import ASYNC, IO, SYNC, run

ToolCost: TypeAlias = (
    Mapping[str, float | Callable[..., float]] | Callable[..., Mapping[str, float]]
)
"""What a call of a tool costs: an amount for each resource, or a callable that returns them.

A callable is called with the call's own arguments. The default is one request, also if a mapping
names no requests.
"""

_PACING: Final = "_asyncbucket_pacing"


class ToolPacing(Terms):
    """Pace the calls of one tool."""

    __slots__ = ("_price",)

    def __init__(self, limiter: Limiter, *, cost: ToolCost | None = None) -> None:
        super().__init__(limiter, cost=cost)
        self._price = _cost_function(cost)

    async def call(self, io: IO, tool: object, send: "functools.partial[Any]") -> Any:
        """Return what ``send()`` returns, paced; inside a call of the same tool, without pacing."""
        if is_running(tool):
            return await io.call(send)
        lease = await admit(io, self.limiter, self._amounts(tool, send))
        with lease, running(tool, lease):
            return await io.call(send)

    def _amounts(self, tool: object, send: "functools.partial[Any]") -> Mapping[str, float]:
        # A `FunctionTool` itself passes on the arguments it was made with.
        given: Mapping[str, Any] = getattr(tool, "partial_params", {})
        amounts = self._price(*send.args, **{**given, **send.keywords})
        if not isinstance(amounts, Mapping):
            raise TypeError(
                f"cost= returned {shown(amounts)}; it must return amounts by resource, {{'images': 3}}"
            )
        return amounts


class PacedTool:
    """The part of a paced tool that is not a tool."""

    limiter = LimiterAttribute()

    def __repr__(self) -> str:
        tool: Any = self
        return f"{type(self).__name__}({tool.metadata.name!r}, limiter={pacing_of(self).limiter!r})"


if TYPE_CHECKING:
    from llama_index.core.tools import BaseTool, ToolOutput

    class _Tool(PacedTool, BaseTool, ABC):
        """Let a type checker see what ``super()`` will find."""

    class _AsyncTool(PacedTool, AsyncBaseTool, ABC):
        """The same for tools with ``acall``."""

else:
    _Tool = _AsyncTool = PacedTool


class RateLimitedTool(_Tool, ABC):
    """Pace a tool that has only ``__call__``."""

    def __call__(self, *args: Any, **kwargs: Any) -> "ToolOutput":
        send = functools.partial(super().__call__, *args, **kwargs)
        output: ToolOutput = run(pacing_of(self).call(SYNC, self, send))
        return output


class RateLimitedAsyncTool(_AsyncTool, ABC):
    """Pace a tool that has ``call`` and ``acall``; its ``__call__`` calls the former."""

    def call(self, *args: Any, **kwargs: Any) -> "ToolOutput":
        send = functools.partial(super().call, *args, **kwargs)
        output: ToolOutput = run(pacing_of(self).call(SYNC, self, send))
        return output

    async def acall(self, *args: Any, **kwargs: Any) -> "ToolOutput":
        send = functools.partial(super().acall, *args, **kwargs)
        output: ToolOutput = await pacing_of(self).call(ASYNC, self, send)
        return output


def paced_tool(tool: Any, pacing: ToolPacing) -> Any:
    """Return a paced tool with the attributes of ``tool``, which stays as it is."""
    cls: Any = type(tool)
    if not isinstance(tool, PacedTool):
        cls = _paced_class(cls)
    paced = object.__new__(cls)
    vars(paced).update(vars(tool))
    vars(paced)[_PACING] = pacing
    return paced


@functools.lru_cache(maxsize=256)
def _paced_class(cls: type[Any]) -> type[Any]:
    """Return the paced subclass of a tool's class."""
    mixin = RateLimitedAsyncTool if issubclass(cls, AsyncBaseTool) else RateLimitedTool
    return paced_subclass(mixin, cls)


def _cost_function(cost: ToolCost | None) -> Callable[..., Mapping[str, float]]:
    """Return a function that computes the cost of a call from its arguments."""
    if callable(cost):
        return cost
    if cost is None or isinstance(cost, Mapping):
        return functools.partial(call_amounts, dict(cost or {}))
    raise TypeError(
        f"cost= must be amounts by resource, {{'images': 3}}, or a callable, not {shown(cost)}"
    )
