"""What code inherits from its caller: a priority, a tenant, a deadline, and who pays.

An agent makes its calls deep inside a framework that knows nothing of limits. Context variables
reach them there, in every task that is started inside:

>>> with asyncbucket.priority("interactive"), asyncbucket.tenant("acme"), asyncbucket.deadline(30):
...     reply = await agent.run("...")
"""

import asyncio
import contextlib
import math
import time
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NoReturn, Protocol, Self, TypeAlias, TypeVar

from asyncbucket.engine.interfaces import Account
from asyncbucket.engine.meters import NEVER, Amounts
from asyncbucket.engine.node import Node
from asyncbucket.engine.wording import is_integer, is_number, plain

T = TypeVar("T")
#: How urgent a call is: a name, or a whole number; larger numbers are more urgent.
Priority: TypeAlias = int | Literal["interactive", "normal", "batch"]

_NAMES: Final = {"interactive": 1, "normal": 0, "batch": -1}
_HIGHEST: Final = 100
_FOR_EVER: Final = NEVER * 1e-9


class Payer(Protocol):
    """Open an account for each call that inherits it: a budget, an agent."""

    def account(self, node: Node, amounts: Amounts) -> Account | None:
        """Return what is to be told of a new call, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Inherited:
    """Hold what was set around a call; None for what was not."""

    priority: int | None = None
    tenant: str | None = field(default=None, repr=False)
    #: In seconds of the event loop's clock, on which tasks and threads of one program agree.
    deadline: float | None = None
    #: What the calls have in common, by which a pool chooses a member.
    sticky: str | None = field(default=None, repr=False)
    #: What opens accounts, outermost first.
    payers: tuple[Payer, ...] = ()

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline; 0 once it is over."""
        return None if self.deadline is None else max(0.0, self.deadline - _now())


#: One variable for all of it, so that a call does one look-up. For most it is None.
inherited: Final[ContextVar[Inherited | None]] = ContextVar("asyncbucket", default=None)


class InheritedScope(contextlib.AbstractContextManager[Any, None]):
    """Set what the calls in one ``with`` block inherit.

    It is not a decorator: around an async function, the block would end before the function has
    begun.
    """

    __slots__ = ("_token", "_values")

    def __init__(self, **values: Any) -> None:
        self._token: Token[Inherited | None] | None = None
        self._values = values

    def __getstate__(self) -> NoReturn:
        """Refuse to be pickled: what it sets may be secret.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"a {type(self).__name__} cannot be pickled: make one in each process")

    def __enter__(self) -> Self:
        if self._token is not None:
            raise RuntimeError(
                "this context was entered before: call priority(), tenant(), deadline() or budget() again"
            )
        outer = inherited.get() or Inherited()
        inner = replace(outer, **self._values)
        if outer.deadline is not None and inner.deadline is not None:
            inner = replace(inner, deadline=min(outer.deadline, inner.deadline))
        if "payers" in self._values:
            inner = replace(inner, payers=outer.payers + inner.payers)
        self._token = inherited.set(inner)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        put_back(inherited, self._token)


def priority(value: Priority) -> contextlib.AbstractContextManager[None, None]:
    """Set the priority of all calls inside that have none of their own.

    Urgent calls go first, and none starves: each priority with calls waiting is served at least an
    eighth as much as the next more urgent one. Calls of one priority go in order of arrival.

    Args:
        value: ``"interactive"``, ``"normal"``, ``"batch"`` (1, 0 and -1), or a whole number from
            -100 to 100.

    Raises:
        ValueError: it is none of these.
    """
    return InheritedScope(priority=read_priority(value))


def tenant(name: str) -> contextlib.AbstractContextManager[None, None]:
    """Make all calls inside on behalf of a tenant: through ``limiter.key(name)`` of their limiter.

    Raises:
        ValueError: the name is not a string, or is empty.
    """
    return InheritedScope(tenant=read_text(name, "a tenant"))


def sticky(key: str) -> contextlib.AbstractContextManager[None, None]:
    """Have a `Pool` prefer, for all calls inside, the member that served ``key`` last.

    Args:
        key: what the calls have in common, such as a conversation, whose prompt is in the cache of
            that member's provider. It is shown to nobody.

    Raises:
        ValueError: it is not a string, or is empty.
    """
    return InheritedScope(sticky=read_text(key, "sticky"))


def deadline(seconds: float) -> contextlib.AbstractContextManager[None, None]:
    """Have all calls inside admitted within ``seconds`` from now; an earlier deadline stays.

    A call that cannot be admitted in time is refused at once with `AcquireTimeout`, which says what
    binds and for how long. Calls already admitted are not ended: use ``asyncio.timeout`` for that.

    Args:
        seconds: from 0 on; ``math.inf`` neither sets a deadline nor lifts one.

    Raises:
        ValueError: ``seconds`` is NaN, negative or not a number.
    """
    for_ever = span_of(seconds, "a deadline", "math.inf sets none") >= NEVER
    return InheritedScope(deadline=math.inf if for_ever else _now() + seconds)


def read_text(text: str, what: str) -> str:
    """Return a name or a key.

    Raises:
        ValueError: it is not a string, or is empty.
    """
    if not isinstance(text, str) or not text:
        given = "''" if text == "" else type(text).__name__  # it may be secret
        raise ValueError(f"{what} must be a non-empty string, not {given}")
    return text


def put_back(variable: ContextVar[T], token: Token[T]) -> None:
    """Reset ``variable`` to its earlier value, if this is still the context where it was set.

    A generator or a coroutine may be closed in another context than the one it ran in.
    """
    try:  # noqa: SIM105 - it runs several times a call, and `suppress` takes a microsecond
        variable.reset(token)
    except ValueError:
        pass


def read_priority(value: Priority) -> int:
    """Return a priority as a number.

    Raises:
        ValueError: it is neither a name nor a whole number within the bounds.
    """
    number = _NAMES.get(value, value) if isinstance(value, str) else value
    if is_integer(number) and abs(number) <= _HIGHEST:
        return int(number)
    raise ValueError(
        f"priority must be {', '.join(map(repr, _NAMES))} or a whole number from "
        f"{-_HIGHEST} to {_HIGHEST}, not {value!r}"
    )


def deadline_of(now: int, *timeouts: float | None, deadline: float | None = None) -> int | None:
    """Return the earliest of ``timeouts`` (seconds from ``now``) and ``deadline``, in nanoseconds.

    Raises:
        ValueError: one of them is NaN or not a number, or a timeout is negative.
    """
    end = NEVER if deadline is None else nanoseconds(deadline, "deadline")
    for timeout in timeouts:
        if timeout is not None:
            end = min(end, now + span_of(timeout, "timeout", "None waits forever"))
    return None if end >= NEVER else end


def span_of(seconds: float, name: str, remedy: str) -> int:
    """Return a length of time in whole nanoseconds; `NEVER` for practically for ever.

    Raises:
        ValueError: it is NaN, not a number, or negative.
    """
    span = nanoseconds(seconds, name)
    if span < 0:
        raise ValueError(f"{name} must be at least 0 s, not {seconds!r}; {remedy}")
    return span


def nanoseconds(seconds: float, name: str) -> int:
    """Return ``seconds`` in whole nanoseconds; `NEVER` for practically for ever.

    Raises:
        ValueError: they are NaN or not a number.
    """
    if not is_number(seconds) or not abs(seconds) >= 0:
        raise ValueError(f"{name} must be a number of seconds, not {seconds!r}")
    seconds = plain(seconds)
    if abs(seconds) >= _FOR_EVER:
        return NEVER if seconds > 0 else -NEVER
    return round(seconds * 1_000_000_000)


def _now() -> float:
    loop = asyncio._get_running_loop()  # noqa: SLF001 - None in a plain thread
    return time.monotonic() if loop is None else loop.time()
