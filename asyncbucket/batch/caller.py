"""Who acquires for a call of a batch: the batch, or the function itself.

A call must be admitted once. Twice would charge it twice, and calls that hold a slot while they wait
for a second one would wait forever. What paces itself is marked: a method of a model that the limiter
wraps, and a function that `Limiter.paced` decorates. For any other function the batch acquires. If
such a call acquires from the same limiter, or from one above or beside it, its slot is given back, so
that nothing waits for itself, and the batch ends with an error that names the remedy, ``paced=True``.
"""

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeAlias

from asyncbucket.agents import agent
from asyncbucket.attempt import Attempt, in_progress
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.events import Admitted, Event, Queued, Refused
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.wording import shown
from asyncbucket.levels import is_under, root_of, share_a_level, undo

#: What an item costs: a `Cost`, keywords of `Limiter.acquire`, or a function that returns either.
ItemCost: TypeAlias = Cost | Mapping[str, float]
ItemCostOf: TypeAlias = ItemCost | Callable[[Any], ItemCost]
AsyncFunction: TypeAlias = Callable[[Any], Awaitable[Any]]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Say that no further call may start."""


def layers_of(fn: object) -> Iterator[object]:
    """Yield ``fn``, and what it calls as a partial or as a decorator's wrapper, inwards."""
    while fn is not None:
        yield fn
        fn = fn.func if isinstance(fn, functools.partial) else getattr(fn, "__wrapped__", None)


def marked_limiter(fn: object) -> Limiter | None:
    """Return the limiter that admits each call of ``fn``, if ``fn`` is marked as paced."""
    for layer in layers_of(fn):
        owner = getattr(layer, "__self__", layer)
        for marked in (getattr(owner, "llm", None), owner, layer):  # a structured LLM has an `llm`
            mark = getattr(marked, "paced_by", None)
            if isinstance(mark, Limiter):
                return mark
    return None


def _on_event(root: Limiter, event: Event) -> None:
    """Notice an acquisition below ``root`` in the context of a call that was admitted already."""
    if not isinstance(event, (Admitted, Queued, Refused)):
        return
    for attempt in in_progress():
        caller, lease = attempt.call, attempt.lease
        if isinstance(caller, Caller) and lease is not None and root_of(attempt.limiter) is root:
            lease.release()  # for what is acquired, which may wait for this very slot
            caller.refuse(event.limiter)


class Caller:
    """Call the function for one item after another, each admitted once.

    Args:
        limiter: what admits the calls.
        fn: an async function of one item.
        cost: what a call costs, if it is not one request.
        paced: whether ``fn`` acquires by itself; None to look for its mark.
        agents: whether each call is an agent, which acquires by itself; or of which kind.

    Raises:
        ValueError, TypeError: ``cost`` is not a cost, or contradicts ``paced``; ``fn`` is paced by a
            limiter above or beside this one, so it would be charged twice.
    """

    def __init__(
        self,
        limiter: Limiter,
        fn: AsyncFunction,
        *,
        cost: ItemCostOf | None,
        paced: bool | None,
        agents: bool | str = False,
    ) -> None:
        self._scope: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        if agents:
            self._scope = functools.partial(agent, kind=None if agents is True else agents)
            self._scope()  # report mistakes at once
            paced = paced or cost is None
        if cost is not None and paced:
            raise ValueError(
                "cost= says that the batch acquires, paced=True that fn does: give one of them"
            )
        self._limiter = limiter
        self._fn = fn
        self._refuses_second = cost is None and paced is None
        self.fn_acquires = bool(paced) or (self._refuses_second and self._is_marked())
        #: What to do if a call acquires once more, from the limiter of this name.
        self.refuse: Callable[[str], object] = lambda _: None
        cost = {} if cost is None else cost
        #: Keywords of `Limiter.acquire`, the same for each call unless they depend on its item.
        self._cost: dict[str, Any] | Callable[[Any], ItemCost]
        self._cost = cost if callable(cost) else _keywords(cost)

    def _is_marked(self) -> bool:
        """Tell whether each call of ``fn`` is admitted by the limiter, or by one below it."""
        found, limiter = marked_limiter(self._fn), self._limiter
        if found is None or is_under(found, limiter):
            return found is not None
        if share_a_level(found, limiter):
            raise ValueError(
                f"{name_in_code(self._fn)} is paced by {found.name!r} already, and would be paced by "
                f"{limiter.name!r}, too: pace both by one limiter, or say by paced= or cost= who acquires"
            )
        return False

    def watched(self, end: Callable[[Exception], object]) -> contextlib.ExitStack:
        """Notice calls that acquire once more, in a ``with`` block around all calls.

        Unless the user said who acquires, ``end`` is called with an error, on this loop.
        """
        stack = contextlib.ExitStack()
        if not self.fn_acquires:
            root = root_of(self._limiter)
            stack.callback(root.observe(functools.partial(_on_event, root)))
            loop = asyncio.get_running_loop()

            def refuse(limiter: str) -> None:
                error = ValueError(
                    f"{name_in_code(self._fn)} acquires from {limiter!r} itself, so each call would be charged "
                    f"twice: pass paced=True, or cost= if the batch is to acquire as well"
                )
                loop.call_soon_threadsafe(end, error)

            if self._refuses_second:
                self.refuse = refuse
        return stack

    async def call(self, item: Any, begin: Callable[[], None]) -> Any:
        """Return what the function returns for ``item``; ``begin`` is called right before.

        Raises:
            Stopped: ``begin`` did, so nothing was charged.
            Exception: whatever the function or the limiter raises.
        """
        if self.fn_acquires:
            begin()
            return await self._start(item)
        terms = _keywords(self._cost(item)) if callable(self._cost) else self._cost
        attempt = Attempt(self._limiter, call=self)
        with await attempt.admit(**terms) as lease:
            try:
                begin()
            except Stopped:
                undo(lease)
                raise
            with attempt:
                return await self._start(item)

    async def _start(self, item: Any) -> Any:
        with self._scope():
            awaitable = self._fn(item)
            if not inspect.isawaitable(awaitable):
                raise TypeError(
                    f"{name_in_code(self._fn)} returned {type(awaitable).__name__}, which cannot be awaited: "
                    f"give an async function, which may call a plain one by asyncio.to_thread"
                )
            return await awaitable


def name_in_code(fn: object) -> str:
    """Return what the code calls ``fn``."""
    return str(getattr(fn, "__qualname__", type(fn).__qualname__))


def _keywords(price: ItemCost) -> dict[str, Any]:
    """Return the keywords of `Limiter.acquire`."""
    if isinstance(price, Cost):
        return {"cost": price}
    if isinstance(price, Mapping):
        return dict(price)
    raise TypeError(
        f"a cost must be a Cost, a dict such as {{'tokens': 500}}, or a function from an item to one, "
        f"not {shown(price)}"
    )
