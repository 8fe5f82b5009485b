"""What metrics say of limiters, whoever shows them: measurements of events, and loads for gauges.

A limiter's numbers include those of all limiters below it, as its statistics do: a call of
``openai/chat`` counts there and at ``openai``. So a sum is taken over limiters that are not below
each other. Tenants have no numbers of their own but what events say of all of them together, under
``openai/*``. A pool's members are shown with it. A call that one of them takes counts at the pool, at
the member, and under the pool's name at the member: ``openai-1/pool``.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Self, TypeAlias, cast

from asyncbucket.core import events
from asyncbucket.core.cost import Cost
from asyncbucket.core.events import Event
from asyncbucket.core.levels import levels, members_of, shown_name
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.statistics import Statistics, shares_used
from asyncbucket.core.wording import USD, in_given_unit, read_count
from asyncbucket.waiting import Lock

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
    #: Agents that call the limiter itself.
    agents: int = 0
    #: The fraction of each limit that is used; of several limiters the highest.
    used: dict[str, float] = field(default_factory=dict)

    def add(self, now: Statistics) -> None:
        """Count a limiter in."""
        self.queued += now.waiting
        self.in_flight += now.in_flight
        self.agents += 0 if now.agents is None else now.agents.running
        for limit, share in shares_used(now).items():
            self.used[limit] = max(share, self.used.get(limit, 0.0))


class Metrics(ABC):
    """Hold the limiters that one registry observes, and count what happens in them."""

    #: What is shown as 0 from the first sight of a limiter on: metrics and their labels.
    zeros: ClassVar[Sequence[tuple[str, tuple[str, ...]]]] = ()

    def __init__(self, registry: Any) -> None:  # noqa: ARG002 - for those who register with it
        self._adders: dict[tuple[tuple[str, ...], str, tuple[str, ...]], tuple[Add, ...]] = {}
        self._sources: tuple[_Source, ...] = ()

    @classmethod
    def of(cls, registry: Any) -> Self:
        """Return the metrics of a registry, which refuses a second set of the same names."""
        with _LOCK:
            metrics = _METRICS.get(registry)
            if metrics is None:
                metrics = _METRICS[registry] = cls(registry)
        return cast("Self", metrics)

    @abstractmethod
    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add | None:
        """Return what adds to a metric; None if it isn't shown."""

    def watch(self, limiter: Limiter, max_limiters: int) -> Callable[[], None]:
        """Count for ``limiter`` and all below it, until the returned function is called.

        Members of a pool count as well, unless they, or some below them, do already.

        Raises:
            ValueError: it, or one above or below it, is observed already, or ``max_limiters`` is
                not a whole number from 1 on.
        """
        sources = [_Source(self, limiter, read_count(max_limiters, "max_limiters", least=1))]
        with _LOCK:
            known = [source.limiter for source in self._sources]
            for other in known:
                if other in levels(limiter) or limiter in levels(other):
                    raise ValueError(
                        f"limiter {other.name!r} is watched here already, and the calls of "
                        f"{limiter.name!r} would count twice; switch that off first"
                    )
            shown = {above for each in known for above in levels(each)}
            members = (each for each in members_of(limiter) if each not in shown)
            sources += (_Source(self, each, max_limiters) for each in members)
            self._sources = (*self._sources, *sources)
        stops = [source.begin() for source in sources]

        def off() -> None:
            for stop in stops:
                stop()
            with _LOCK:
                self._sources = tuple(each for each in self._sources if each not in sources)

        return off

    def count(self, event: Event, labels: tuple[str, ...]) -> None:
        """Count an event for each of ``labels``."""
        for metric, amount, values in _measurements(event):
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
        for source in self._sources:
            for each in with_children(source.limiter):
                name = shown_name(each)
                if name in source.path(name):
                    loads.setdefault(name, Load()).add(each.statistics())
        return loads


class _Source:
    """One observed limiter, and the labels under which it and those below it count."""

    def __init__(self, metrics: Metrics, limiter: Limiter, most: int) -> None:
        self.limiter = limiter
        self.root = shown_name(limiter)
        self._metrics = metrics
        self._most = most
        self._labels: set[str] = set()
        self._paths: dict[str, tuple[str, ...]] = {}

    def begin(self) -> Callable[[], None]:
        """Count from now on, until the returned function is called."""
        self.path(self.root)
        return self.limiter.observe(self.observe)

    def observe(self, event: Event) -> None:
        self._metrics.count(event, self._paths.get(event.limiter) or self.path(event.limiter))

    def path(self, name: str) -> tuple[str, ...]:
        """Return the labels of ``name``, from the top; those above stand for one too many."""
        below = name.removeprefix(self.root)
        if below == name or below[:1] not in ("", "/"):  # a pool's call: the pool is a child here
            below = f"/{name.partition('/')[0]}"
        parts = below.split("/")
        names = [self.root + "/".join(parts[: depth + 1]) for depth in range(len(parts))]
        path = tuple(filter(self._has_label, names))
        if len(path) == len(names):
            self._paths[name] = path
        return path

    def _has_label(self, name: str) -> bool:
        if name not in self._labels and len(self._labels) < self._most:
            self._labels.add(name)
            for metric, values in self._metrics.zeros:
                self._metrics.adder(metric, name, values)
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
        case events.Released(held=held, outcome=outcome, used=used):
            measured = [("held", held, (outcome,)), ("ended", 1, (outcome,))]
            measured += [("spent_usd", in_given_unit(used[USD], USD), ())] if USD in used else []
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
        case events.Paused(reason="429" | "daily quota"):
            measured = [("upstream_429", 1, ())]
        case events.Retried():
            measured = [("retries", 1, ())]
        case events.AgentFinished(kind=kind, seconds=seconds, ended_well=ended_well):
            measured = [("agents", seconds, (kind or "none", "ok" if ended_well else "failed"))]
        case _:
            pass
    return measured


def as_given(amounts: Mapping[str, int]) -> dict[str, float]:
    """Return a cost as people give it: without the slot and without resources that cost nothing.

    If the total alone was given, it is booked as input and as output, too: nobody knows its parts.
    """
    given = {name: in_given_unit(amount, name) for name, amount in Cost.of(amounts).items()}
    if given.get("tokens") == given.get("input_tokens") == given.get("output_tokens"):
        for part in ("input_tokens", "output_tokens"):
            given.pop(part, None)
    return given


def with_children(limiter: Limiter) -> Iterator[Limiter]:
    """Yield a limiter and all below it, without tenants."""
    yield limiter
    for child in tuple(limiter.children.values()):
        yield from with_children(child)


#: The metrics of each registry, which cannot be made twice.
_METRICS: Final["weakref.WeakKeyDictionary[Any, Metrics]"] = weakref.WeakKeyDictionary()
_LOCK: Final = Lock()
