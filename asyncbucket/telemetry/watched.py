"""What metrics know of limiters besides their events: which are observed, their labels, their use."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

from asyncbucket.core.cost import Cost
from asyncbucket.core.events import Callback, Event, Settled
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.node import shown_name
from asyncbucket.core.statistics import Statistics, shares_used
from asyncbucket.core.wording import read_count

#: The label of limiters beyond those that are told apart.
OTHER: Final = "other"


@runtime_checkable
class Source(Protocol):
    """A limiter, as telemetry sees it."""

    @property
    def name(self) -> str:
        """The path, ``openai/chat``."""
        ...

    @property
    def parent(self) -> "Source | None":
        """The limiter above."""
        ...

    @property
    def children(self) -> "Mapping[str, Source]":
        """The limiters below, without those of tenants."""
        ...

    def statistics(self) -> Statistics:
        """Return a snapshot."""
        ...

    def observe(self, callback: Callback) -> Callable[[], None]:
        """Call ``callback`` with every event."""
        ...


def check_source(limiter: object) -> None:
    """Refuse what is not a limiter, before anything is switched on.

    Raises:
        TypeError: it is not a limiter.
    """
    if not isinstance(limiter, Source):
        raise TypeError(f"only a limiter can be watched, not {type(limiter).__name__}")


@dataclass(slots=True)
class Reading:
    """Say how full the limiters of one label are."""

    queued: int = 0
    in_flight: int = 0
    #: The fraction of each limit that is used; of several limiters the highest.
    used: dict[str, float] = field(default_factory=dict)


class Watched:
    """Hold the limiters that one registry observes, and the few labels that it has for them.

    Args:
        max_labels: how many labels there may be, whatever happens; `OTHER` is one more.

    Raises:
        ValueError: ``max_labels`` is not a whole number from 1 on.
    """

    def __init__(self, max_labels: int) -> None:
        self._max_labels = read_count(max_labels, "max_limiters", least=1)
        self._lock = threading.RLock()
        self._labels: dict[str, str] = {}
        #: The observed limiters, each by a key of its own.
        self._sources: dict[object, Source] = {}

    def __bool__(self) -> bool:
        return bool(self._sources)

    def add(self, limiter: Source, where: str) -> Callable[[], None]:
        """Observe ``limiter`` and all below it, until the returned function is called.

        Raises:
            ValueError: it, or one above or below it, is observed already.
        """
        with self._lock:
            for other in self._sources.values():
                if other in _self_and_ancestors(limiter) or limiter in _self_and_ancestors(other):
                    raise ValueError(
                        f"{where} watches limiter {other.name!r} already, and the calls of "
                        f"{limiter.name!r} would count twice; switch that off first"
                    )
            key = object()
            self._sources = {**self._sources, key: limiter}
        return lambda: self._remove(key)

    def _remove(self, key: object) -> None:
        with self._lock:
            self._sources = {
                known: source for known, source in self._sources.items() if known is not key
            }

    def label(self, name: str) -> str:
        """Return the label of the limiter called ``name``."""
        known = self._labels.get(name)
        if known is not None:
            return known
        name = shown_name(name)
        with self._lock:
            if len(self._labels) >= self._max_labels:
                return self._labels.get(name, OTHER)
            return self._labels.setdefault(name, name)

    def read(self) -> Mapping[str, Reading]:
        """Return how full each limiter is now, by label."""
        readings: dict[str, Reading] = {}
        for source in self._sources.values():
            self._read(source, readings)
        return readings

    def _read(self, limiter: Source, readings: dict[str, Reading]) -> Statistics:
        statistics = limiter.statistics()
        reading = readings.setdefault(self.label(statistics.name), Reading())
        children = [self._read(child, readings) for child in _children_of(limiter)]
        # A limiter's statistics include those below it; here each call counts only where it asked.
        reading.queued += max(0, statistics.waiting - sum(child.waiting for child in children))
        reading.in_flight += max(
            0, statistics.in_flight - sum(child.in_flight for child in children)
        )
        for limit, share in shares_used(statistics).items():
            reading.used[limit] = max(share, reading.used.get(limit, 0.0))
        return statistics


def tokens_of(event: Settled) -> tuple[int, int] | None:
    """Return the tokens that ``event`` adds to those used and those refunded; None if it has none."""
    used = event.used.get("tokens")
    if used is None:
        return None
    before = event.corrects.get("tokens")
    booked = event.reserved.get("tokens", 0) if before is None else before
    return max(0, used - (before or 0)), max(0, booked - used)


def as_given(amounts: Mapping[str, int]) -> dict[str, int]:
    """Return a cost as people give it: without the slot and without resources that cost nothing.

    If the total alone was given, it is booked as input and as output, too: nobody knows its parts.
    """
    given = dict(Cost.of(amounts))
    if given.get("tokens") == given.get("input_tokens") == given.get("output_tokens"):
        for part in ("input_tokens", "output_tokens"):
            given.pop(part, None)
    return given


def dispatch_by_type(handlers: Mapping[type[Event], Callable[[Any], object]]) -> Callback:
    """Return an observer that passes each event to the handler of its kind, if there is one."""
    handler_of = dict(handlers).get

    def observe(event: Event) -> None:
        handle = handler_of(type(event))
        if handle is not None:
            handle(event)

    return observe


def _children_of(limiter: Source) -> Iterator[Source]:
    yield from tuple(limiter.children.values())
    if isinstance(limiter, Limiter):
        yield from limiter._busy_tenants()  # noqa: SLF001 - shown as a star only; idle ones are many


def _self_and_ancestors(limiter: Source) -> Iterator[Source]:
    ancestor: Source | None = limiter
    while ancestor is not None:
        yield ancestor
        ancestor = ancestor.parent
