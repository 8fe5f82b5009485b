"""What metrics say of limiters, whoever shows them: measurements of events, and the load that gauges show.

A limiter's numbers include those of all limiters below it, as its statistics do: a call of
``openai/chat`` counts there and at ``openai``. So a sum is taken over limiters that are not below
each other. Tenants have no numbers of their own but what events say of all of them together, under
``openai/*``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, TypeAlias

from asyncbucket.core import events
from asyncbucket.core.cost import Cost
from asyncbucket.core.events import Event
from asyncbucket.core.levels import on_one_path, shown_name
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.statistics import shares_used
from asyncbucket.core.wording import read_count
from asyncbucket.waiting import Lock

#: The label of limiters beyond those that are told apart.
OTHER: Final = "other"
#: How a call's request for admission is decided, besides the reasons of a refusal.
ACQUIRED: Final = "acquired"
CANCELED: Final = "request_canceled"

Add: TypeAlias = Callable[[float], object]
Measurement: TypeAlias = tuple[str, float, tuple[str, ...]]
"""A metric, by how much it rises, and the values of its labels besides the limiter's."""


def check_source(limiter: object) -> None:
    """Refuse what is not a limiter, before anything is switched on.

    Raises:
        TypeError: it is not a limiter.
    """
    if not isinstance(limiter, Limiter):
        raise TypeError(f"only a limiter can be watched, not {type(limiter).__name__}")


@dataclass(slots=True)
class Load:
    """Say how full the limiters of one label are."""

    queued: int = 0
    in_flight: int = 0
    #: The fraction of each limit that is used; of several limiters the highest.
    used: dict[str, float] = field(default_factory=dict)


class Metrics(ABC):
    """Hold the limiters that one registry observes, and count what happens in them.

    Args:
        max_limiters: how many limiters are told apart. A child beyond that counts only in the
            limiters above it; a limiter that has none above counts as `OTHER`.

    Raises:
        ValueError: ``max_limiters`` is not a whole number from 1 on.
    """

    #: What is shown as 0 from the first sight of a limiter on: metrics and their labels.
    zeros: ClassVar[Sequence[tuple[str, tuple[str, ...]]]] = ()

    def __init__(self, max_limiters: int) -> None:
        self._max_labels = read_count(max_limiters, "max_limiters", least=1)
        self._lock = Lock()
        #: The labels of a limiter's events, from the top: its own is the last one.
        self._paths: dict[str, tuple[str, ...]] = {}
        self._adders: dict[tuple[tuple[str, ...], str, tuple[str, ...]], tuple[Add, ...]] = {}
        self._labels: set[str] = set()
        #: The observed limiters, each by a key of its own.
        self._sources: dict[object, Limiter] = {}

    @abstractmethod
    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add | None:
        """Return what adds to a metric; None if it isn't shown."""

    def watch(self, limiter: Limiter, where: str) -> Callable[[], None]:
        """Count for ``limiter`` and all below it, until the returned function is called.

        Raises:
            ValueError: it, or one above or below it, is observed already.
        """
        key = object()
        with self._lock:
            for other in self._sources.values():
                if on_one_path(other, limiter):
                    raise ValueError(
                        f"{where} watches limiter {other.name!r} already, and the calls of "
                        f"{limiter.name!r} would count twice; switch that off first"
                    )
            self._sources = {**self._sources, key: limiter}
            self._paths = {}  # it may be above limiters that were watched alone
        self._path(shown_name(limiter))
        stop = limiter.observe(self.observe)

        def off() -> None:
            stop()
            with self._lock:
                kept = {each: source for each, source in self._sources.items() if each is not key}
                self._sources = kept

        return off

    @property
    def is_watching(self) -> bool:
        """Whether any limiter is observed."""
        return bool(self._sources)

    def observe(self, event: Event) -> None:
        """Count an event."""
        measured = _measurements(event)
        if measured:
            labels = self._paths.get(event.limiter) or self._path(event.limiter)
            for metric, amount, values in measured:
                adders = self._adders.get((labels, metric, values))
                if adders is None:
                    made = [self.adder(metric, label, values) for label in labels]
                    adders = tuple(add for add in made if add is not None)
                    self._adders[labels, metric, values] = adders
                for add in adders:
                    add(amount)

    def loads(self) -> dict[str, Load]:
        """Return how full each limiter is now, by label."""
        loads: dict[str, Load] = {}
        for source in self._sources.values():
            for member in with_children(source):
                now = member.statistics()
                name = shown_name(member)
                label = self._path(name)[-1]
                if label == name or member is source:
                    load = loads.setdefault(label, Load())
                    load.queued += now.waiting
                    load.in_flight += now.in_flight
                    for limit, share in shares_used(now).items():
                        load.used[limit] = max(share, load.used.get(limit, 0.0))
        return loads

    def _path(self, name: str) -> tuple[str, ...]:
        """Return the labels under which a limiter called ``name`` counts."""
        roots = [shown_name(source) for source in self._sources.values()]
        root = next((each for each in roots if f"{name}/".startswith(f"{each}/")), name)
        parts = name[len(root) :].split("/")
        names = [root + "/".join(parts[: depth + 1]) for depth in range(len(parts))]
        with self._lock:
            told_apart = [each for each in names if self._has_label(each)]
            path = tuple(told_apart if root in told_apart else [OTHER, *told_apart])
            if path == tuple(names):
                self._paths[name] = path
        return path

    def _has_label(self, name: str) -> bool:
        if name not in self._labels and len(self._labels) < self._max_labels:
            self._labels.add(name)
            for metric, values in self.zeros:
                self.adder(metric, name, values)
        return name in self._labels


def _measurements(event: Event) -> list[Measurement]:
    """Return what an event adds to which metrics."""
    measured: list[Measurement] = []
    match event:
        case events.Admitted(cost=cost, waited=waited, bound_by=bound_by):
            waits = ("waited", waited, (ACQUIRED, bound_by or "none"))
            measured = [waits, ("asked", 1, (ACQUIRED,))]
            if cost.get("tokens"):
                measured.append(("tokens", cost["tokens"], ("reserved",)))
        case events.Released(held=held, outcome=outcome):
            measured = [("held", held, (outcome,)), ("ended", 1, (outcome,))]
        case events.Refused(reason=reason):
            measured = [("asked", 1, (reason,)), ("ended", 1, (reason,))]
        case events.Cancelled(waited=waited):
            waits = ("waited", waited, (CANCELED, "none"))
            measured = [waits, ("asked", 1, (CANCELED,)), ("ended", 1, ("cancelled",))]
        case events.Settled(reserved=reserved, used={"tokens": used}, corrects=corrects):
            before = corrects.get("tokens")
            booked = reserved.get("tokens", 0) if before is None else before
            more, less = max(0, used - (before or 0)), max(0, booked - used)
            measured = [("tokens", more, ("used",)), ("tokens", less, ("refunded",))]
        case events.Paused(reason="429"):
            measured = [("upstream_429", 1, ())]
        case events.Retried():
            measured = [("retries", 1, ())]
        case _:
            pass
    return measured


def as_given(amounts: Mapping[str, int]) -> dict[str, int]:
    """Return a cost as people give it: without the slot and without resources that cost nothing.

    If the total alone was given, it is booked as input and as output, too: nobody knows its parts.
    """
    given = dict(Cost.of(amounts))
    if given.get("tokens") == given.get("input_tokens") == given.get("output_tokens"):
        for part in ("input_tokens", "output_tokens"):
            given.pop(part, None)
    return given


def with_children(limiter: Limiter) -> Iterator[Limiter]:
    """Yield a limiter and all below it, without tenants."""
    yield limiter
    for child in tuple(limiter.children.values()):
        yield from with_children(child)
