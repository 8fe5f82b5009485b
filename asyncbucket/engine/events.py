"""What happens inside a limiter, as one stream of frozen events, and who observes it.

A call that passes at once makes `Admitted` and `Released`. One that waits makes `Queued` first, and
ends in `Admitted`, `Refused` or `Cancelled`. `Settled` may come at any time after `Admitted`. The
other events are about the limiter, not about one call.

The core promises this to an observer: it gets every event of a limiter and of its children, once.
It is called with no lock held, so it may ask the limiter for ``statistics()``. The events of
waiting (`Queued`, `Admitted`, `Refused`, `Cancelled`) come in the context of the call itself, so
the current span is the caller's. It is called in the thread where the event happens, and must not
block. An exception that it raises is logged once and breaks nothing. While nobody observes, no
event is made. A lease that nobody released is released by the garbage collector, which may
interrupt an observer anywhere, even while it holds locks: such an event waits for the next one.

No event holds a prompt, a key, the password of a URL, the message of a foreign exception or the
name of a tenant. A limiter is named by its path, ``"openai/chat"``; all its tenants share the name
``"openai/chat/*"``.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = [
    "Admitted",
    "AgentFinished",
    "AgentStarted",
    "Callback",
    "Cancelled",
    "Event",
    "LimitChanged",
    "LimitLearned",
    "Observers",
    "Outcome",
    "Paused",
    "PromptCached",
    "Queued",
    "Reason",
    "Refused",
    "Released",
    "Retried",
    "Settled",
    "Shadowed",
    "StoreLost",
    "StoreRecovered",
]

#: Why a call was turned away.
Reason = Literal["would_block", "timeout", "queue_full", "too_costly", "budget"]
#: How a call ended, as its lease was told.
Outcome = Literal["ok", "overloaded", "failed"]

# There is no NullHandler, as in asyncio: without configured logging, warnings appear on stderr.
_log: Final = logging.getLogger("asyncbucket")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Say that something happened in a limiter. Costs are amounts by resource; times are seconds."""

    #: The path of the limiter: ``"openai"``, ``"openai/chat"``, ``"openai/chat/*"`` for tenants.
    limiter: str
    #: When it happened, in seconds of the limiter's clock.
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Event):
    """A call has to wait."""

    cost: Mapping[str, int]
    #: Calls that wait now, this one included.
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted(Event):
    """A call was admitted; ``at`` is when it was booked, as limits count it."""

    cost: Mapping[str, int]
    #: Seconds between asking and admission.
    waited: float
    #: The resource that held it up, ``"concurrency"`` or ``"paused"``; None if it did not wait.
    bound_by: str | None
    #: Calls that wait now.
    waiting: int
    #: Leases not yet released, this one included.
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Event):
    """A call was refused: at once, or when its time was up."""

    cost: Mapping[str, int]
    reason: Reason
    #: What had no room: a resource, ``"concurrency"`` or ``"paused"``; None if others came first.
    bound_by: str | None
    #: In how many seconds it might pass; None if that is not known, or it never will.
    retry_after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(Event):
    """A call gave up while it waited."""

    cost: Mapping[str, int]
    #: Seconds between asking and giving up.
    waited: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled(Event):
    """A lease was settled; only the named resources are shown."""

    #: What had been reserved.
    reserved: Mapping[str, int]
    #: What was used.
    used: Mapping[str, int]
    #: What an earlier report said that this one corrects; empty for the first report.
    corrects: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Released(Event):
    """A lease was released: the call is over."""

    cost: Mapping[str, int]
    #: Seconds between admission and release.
    held: float
    outcome: Outcome
    #: What it has used, as settled by now, or else as reserved.
    used: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Event):
    """Nobody is admitted for a while.

    The reason is ``"429"`` after a provider's refusal, ``"daily quota"`` if that says so.
    """

    seconds: float
    #: Why, as given by whoever paused it.
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadowed(Event):
    """A call of a limiter in shadow, which passed at once, would have been admitted now."""

    cost: Mapping[str, int]
    #: Seconds that it would have waited, and for what; None if it would not.
    would_wait: float
    bound_by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """A call failed and will be tried again."""

    #: The number of the attempt that failed, from 1 on.
    attempt: int
    #: The kind of error, such as ``"HTTP 429"`` or ``"ReadTimeout"``; never its message.
    error: str
    #: Seconds until the next attempt asks for its admission.
    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCached(Event):
    """A reply says that a prompt was read from the provider's cache, or written to it."""

    read: bool
    written: bool
    #: How many tokens were read that no limit counts.
    saved_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStarted(Event):
    """An agent made its first call at this limiter; see `asyncbucket.agent`."""

    kind: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFinished(Event):
    """An agent that had called this limiter is over."""

    kind: str | None
    #: Seconds since its first call here.
    seconds: float
    #: Whether it ended without an exception.
    ended_well: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitLearned(Event):
    """A limit that the provider announced was adopted."""

    #: In words: ``"500 requests per 60 s"``.
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BeliefChanged(Event):
    """Replies have shown how the provider counts a limit, or that it counts otherwise than believed."""

    #: In words: ``"500 requests per 60 s"``.
    limit: str
    #: In words: ``"the provider counts by a bucket of 60 requests, ..."``; see `Belief`.
    belief: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitChanged(Event):
    """A limit or the number of slots was changed while the limiter runs, here or elsewhere.

    Elsewhere means in another process that shares the store.
    """

    #: In words: ``"500 requests per 60 s"``, ``"concurrency 12"``.
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLost(Event):
    """The shared store cannot be reached: from now on this process follows ``on_outage``."""

    #: What is wrong, in the words of the `StoreError`; never the password of a URL.
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRecovered(Event):
    """The shared store is back."""

    #: How long it was lost.
    seconds: float


#: What `Limiter.observe` takes: a plain function, called with each event.
Callback = Callable[[Event], object]


class Observers:
    """Hold the observers of one limiter, and call them in the order in which they were added.

    Every method may be called from any thread, even by an observer while it runs.
    """

    def __init__(self) -> None:
        self._callbacks: dict[object, Callback] = {}
        self._failed: set[object] = set()

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def add(self, callback: Callback) -> Callable[[], bool]:
        """Call ``callback`` with every event from now on.

        The returned function ends that, and tells whether it had not ended before.

        Raises:
            TypeError: it cannot be called, or is a coroutine function, which nobody would await.
        """
        called = type(callback).__call__ if callable(callback) else None  # it may be async, too
        if called is None or any(map(inspect.iscoroutinefunction, (callback, called))):
            raise TypeError(
                f"an observer must be a plain function of an event, not {_name(callback)}; one that "
                f"is async can read a queue, into which a plain one puts events"
            )
        key = object()
        self._callbacks[key] = callback
        return lambda: self._callbacks.pop(key, None) is not None

    def emit(self, event: Event) -> None:
        """Call every observer. The first error of each is logged; it still gets later events."""
        for key, callback in tuple(self._callbacks.items()):
            try:
                callback(event)
            except Exception as error:  # noqa: BLE001 - the call that caused the event goes on
                if key not in self._failed:
                    self._failed.add(key)
                    _log.error(
                        "observer %s raised on %s; its later errors are not reported",
                        _name(callback),
                        type(event).__name__,
                        exc_info=error,
                    )


def _name(callback: object) -> str:
    """Return the name of a callback; its repr might show its arguments."""
    return str(getattr(callback, "__qualname__", type(callback).__qualname__))
