"""What can go wrong, and what the caller can do about it.

::

    AsyncBucketError
    ├── LimitSyntaxError (ValueError)    a limit that cannot be read
    ├── CostExceedsLimit (ValueError)    a call that can never pass
    ├── WouldBlock                       ``acquire_nowait`` found no room now
    ├── AcquireTimeout (TimeoutError)    the deadline passed, or is bound to
    ├── QueueFull                        ``max_queue`` calls wait already
    ├── BudgetExceeded                   a call that would pass the budget around it
    ├── UnknownPrice (ValueError)        a model whose calls cost nobody knows what
    └── StoreError                       shared state is out of reach, or unusable

Every message says what happened, the numbers, and the remedy.
"""

from dataclasses import dataclass as _dataclass
from typing import Any as _Any
from typing import ClassVar as _ClassVar


class AsyncBucketError(Exception):
    """The base of every error that asyncbucket raises on purpose."""

    #: What observers hear of a refused call.
    _reason: _ClassVar[str] = ""


class LimitSyntaxError(AsyncBucketError, ValueError):
    """Say that a limit could not be read, and how limits are written."""


class CostExceedsLimit(AsyncBucketError, ValueError):  # noqa: N818 - a name of the public interface
    """Say that a call costs more than a limit ever allows, so waiting would never end."""

    _reason = "too_costly"


class _NotNow(AsyncBucketError):  # noqa: N818 - its heirs bear names of the public interface
    """Carry what a caller needs to try again: what binds, where, and the seconds until then."""

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        bound_by: str | None = None,
        limiter: str | None = None,
    ) -> None:
        super().__init__(message)
        #: Seconds until such a call could pass; None if that depends on a slot being released or on
        #: a store that would have to be asked, or if the call passes only by waiting in line.
        self.retry_after = retry_after
        #: What binds: ``"requests"``, ``"tokens"``, ``"concurrency"``, ``"paused"``...
        self.bound_by = bound_by
        #: The name of the limiter whose limit binds, or whose line is full: of the shared one if others
        #: came first. None of a `TokenBucket`.
        self.limiter = limiter


class WouldBlock(_NotNow):
    """Say that a call could not be admitted without waiting."""

    _reason = "would_block"


class AcquireTimeout(_NotNow, TimeoutError):  # noqa: N818 - a name of the public interface
    """Say that a call was not admitted before its deadline, or could not be."""

    _reason = "timeout"


class QueueFull(_NotNow):
    """Say that ``max_queue`` calls wait already."""

    _reason = "queue_full"


@_dataclass(eq=False, repr=False)
class BudgetExceeded(AsyncBucketError):  # noqa: N818 - a name of the public interface
    """Say that a call would pass the budget around it, before it is sent: see `asyncbucket.budget`.

    The message is written for an agent, too: it says what is left, and to end with what there is.
    Amounts are dollars, or units, as they were given.
    """

    _reason: _ClassVar[str] = "budget"
    message: str
    #: The budget, or None in another process; and which of its caps it is: ``"usd"``, ``"tokens"``...
    budget: _Any = None
    resource: str = ""
    #: The cap; what is spent of it, and reserved by calls in flight.
    cap: float = 0.0
    spent: float = 0.0
    reserved: float = 0.0
    #: What the call may cost at most.
    cost: float = 0.0

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[_Any, ...]:
        return type(self), (self.message,), {**vars(self), "budget": None}


class UnknownPrice(AsyncBucketError, ValueError):  # noqa: N818 - a name of the public interface
    """Say that a limit or a budget of dollars is in force, and nobody knows what a model costs."""


class StoreError(AsyncBucketError):
    """Say that the state shared by several processes is out of reach or unusable."""


def refusal_in(error: BaseException | None) -> AsyncBucketError | None:
    """Return asyncbucket's own error inside ``error``; None if there is none.

    Some frameworks turn every error into one of their own. The limiter's error, with its
    ``retry_after``, is then among the causes. Exception groups are searched, too.
    """
    seen: set[int] = set()
    found = [error]
    while found:
        each = found.pop()
        if isinstance(each, AsyncBucketError):
            return each
        if each is not None and id(each) not in seen:  # a chain may be circular
            seen.add(id(each))
            found += [None if each.__suppress_context__ else each.__context__, each.__cause__]
            found += reversed(each.exceptions) if isinstance(each, BaseExceptionGroup) else ()
    return None
