"""What metrics say of limiters, whoever shows them: measurements of events, and loads for gauges.

A limiter's numbers include those of all limiters below it, as its statistics do: a call of
``openai/chat`` counts there and at ``openai``. So a sum is taken over limiters that are not below
each other. Tenants have no numbers of their own but what events say of all of them together, under
``openai/*``. A pool's members are shown with it. A call that one of them takes counts at the pool, at
the member, and under the pool's name at the member: ``openai-1/pool``.
"""

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeAlias, cast

from asyncbucket.core import events
from asyncbucket.core.cost import Cost
from asyncbucket.core.events import Event
from asyncbucket.core.levels import levels, members_of, shown_name
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.statistics import Statistics, shares_used
from asyncbucket.core.wording import USD, in_given_unit
from asyncbucket.waiting import Lock

#: How a call's request for admission is decided, besides the reasons of a refusal.
ACQUIRED: Final = "acquired"
CANCELED: Final = "request_canceled"

Add: TypeAlias = Callable[[float], object]
#: A metric, by how much it rises, and the values of its labels besides the limiter's.
Measurement: TypeAlias = tuple[str, float, tuple[str, ...]]


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

    def __init__(self, registry: Any) -> None:  # noqa: ARG002 - for those who register with it
        #: An entry for each call of `watch`: the limiter, and the members if it is a pool.
        self._watched: tuple[list[Limiter], ...] = ()
        self._add = functools.cache(self.adder)

    @classmethod
    def of(cls, registry: Any) -> Self:
        """Return the metrics of a registry, which refuses a second set of the same names."""
        with _LOCK:
            metrics = _METRICS.get(registry)
            if metrics is None:
                metrics = _METRICS[registry] = cls(registry)
        return cast("Self", metrics)

    @abstractmethod
    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add:
        """Return what adds to a metric, if it is shown."""

    def watch(self, limiter: Limiter) -> Callable[[], None]:
        """Count for ``limiter`` and all below it, until the returned function is called.

        Members of a pool count as well, unless they, or some below them, do already.

        Raises:
            ValueError: it, or one above or below it, is observed already.
        """
        with _LOCK:
            known = [each for watched in self._watched for each in watched]
            for other in known:
                if other in levels(limiter) or limiter in levels(other):
                    raise ValueError(
                        f"limiter {other.name!r} is watched here already, and the calls of "
                        f"{limiter.name!r} would count twice; switch that off first"
                    )
            shown = {above for each in known for above in levels(each)}
            watched = [limiter, *(each for each in members_of(limiter) if each not in shown)]
            stops = [each.observe(self._observer(shown_name(each))) for each in watched]
            self._watched = (*self._watched, watched)

        def off() -> None:
            for stop in stops:
                stop()
            with _LOCK:
                self._watched = tuple(each for each in self._watched if each is not watched)

        return off

    def _observer(self, root: str) -> Callable[[Event], None]:
        """Return what counts an event at its limiter and those above it, up to ``root``."""
        labels_of = functools.cache(functools.partial(_labels, root))

        def observe(event: Event) -> None:
            for metric, amount, values in _measurements(event):
                for label in labels_of(event.limiter):
                    self._add(metric, label, values)(amount)

        return observe

    def loads(self) -> dict[str, Load]:
        """Return how full each limiter is now, by label."""
        loads: dict[str, Load] = {}
        for watched in self._watched:
            for each in (below for limiter in watched for below in with_children(limiter)):
                loads.setdefault(shown_name(each), Load()).add(each.statistics())
        return loads


def _labels(root: str, name: str) -> list[str]:
    """Return the names under which an event at ``name`` counts, from ``root`` down."""
    below = name.removeprefix(root)
    if below == name or below[:1] not in ("", "/"):  # a pool's call: the pool is a child here
        below = f"/{name.partition('/')[0]}"
    parts = below.split("/")
    return [root + "/".join(parts[: depth + 1]) for depth in range(len(parts))]


def _measurements(event: Event) -> Iterator[Measurement]:  # noqa: C901 - a table
    """Yield what an event adds to which metrics."""
    match event:
        case events.Admitted(cost=cost, waited=waited, bound_by=bound_by):
            yield "waited", waited, (ACQUIRED, bound_by or "none")
            yield "asked", 1, (ACQUIRED,)
            if cost.get("tokens"):
                yield "tokens", cost["tokens"], ("reserved",)
        case events.Released(held=held, outcome=outcome, used=used):
            yield "held", held, (outcome,)
            yield "ended", 1, (outcome,)
            if USD in used:
                yield "spent_usd", in_given_unit(used[USD], USD), ()
        case events.Refused(reason=reason):
            yield "asked", 1, (reason,)
            yield "ended", 1, (reason,)
        case events.Cancelled(waited=waited):
            yield "waited", waited, (CANCELED, "none")
            yield "asked", 1, (CANCELED,)
            yield "ended", 1, ("cancelled",)
        case events.Settled(reserved=reserved, used={"tokens": used}, corrects=corrects):
            before = corrects.get("tokens")
            booked = reserved.get("tokens", 0) if before is None else before
            yield "tokens", max(0, used - (before or 0)), ("used",)
            yield "tokens", max(0, booked - used), ("refunded",)
        case events.Paused(reason="429" | "daily quota"):
            yield "upstream_429", 1, ()
        case events.Retried():
            yield "retries", 1, ()
        case events.AgentFinished(kind=kind, seconds=seconds, ended_well=ended_well):
            yield "agents", seconds, (kind or "none", "ok" if ended_well else "failed")
        case _:
            pass


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
