"""One item's call: admitted here, or left to the function if that acquires by itself."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias

from asyncbucket.core.cost import Cost
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import shown
from asyncbucket.nesting import give_up_slots, running

#: What an item costs: a `Cost`, keywords of `Limiter.acquire`, or a function that returns either.
Price: TypeAlias = Cost | Mapping[str, float]
PriceOf: TypeAlias = Price | Callable[[Any], Price]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Say that no further call may start."""


class Call(Protocol):
    """Call the function for one item; ``begin`` is called right before that.

    ``begin`` may raise `Stopped`: then nothing is charged.
    """

    async def __call__(self, item: Any, begin: Callable[[], None]) -> Any: ...


def leave_admission_to(fn: Callable[[Any], Awaitable[Any]]) -> Call:
    """Leave the admission to ``fn``."""

    async def call(item: Any, begin: Callable[[], None]) -> Any:
        begin()
        return await start_call(fn, item)

    return call


def admit_each(
    limiter: Limiter, fn: Callable[[Any], Awaitable[Any]], price: PriceOf | None = None
) -> Call:
    """Make each call wait for an admission at its price, by default one request."""
    keywords_of = _keywords_of({} if price is None else price)

    async def call(item: Any, begin: Callable[[], None]) -> Any:
        give_up_slots(limiter)  # of calls around this batch
        async with limiter.acquire(**keywords_of(item)) as lease:
            try:
                begin()
            except Stopped:
                lease.undo()
                raise
            with running(fn, lease):  # it may call the limiter unseen
                return await start_call(fn, item)

    return call


def _keywords_of(price: PriceOf) -> Callable[[Any], dict[str, Any]]:
    """Return a function from an item to the keywords of `Limiter.acquire`."""
    if callable(price):
        return lambda item: _keywords(price(item))
    keywords = _keywords(price)
    return lambda _: keywords


def _keywords(price: Price) -> dict[str, Any]:
    """Return the keywords of `Limiter.acquire`."""
    if isinstance(price, Cost):
        return {"cost": price}
    if isinstance(price, Mapping):
        return dict(price)
    raise TypeError(
        f"a cost must be a Cost, a dict such as {{'tokens': 500}}, or a function from an item to one, "
        f"not {shown(price)}"
    )


def start_call(fn: Callable[[Any], Awaitable[Any]], item: Any) -> Awaitable[Any]:
    """Call ``fn`` and return its awaitable.

    Raises:
        TypeError: it is a plain function, which has blocked the event loop.
    """
    awaitable = fn(item)
    if not inspect.isawaitable(awaitable):
        name = getattr(fn, "__qualname__", repr(fn))
        raise TypeError(
            f"{name} returned {type(awaitable).__name__}, which cannot be awaited: amap takes async "
            f"functions; map takes plain ones"
        )
    return awaitable
