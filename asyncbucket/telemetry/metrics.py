"""The metrics of limiters, whoever shows them: counted from events, or read when somebody looks.

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
from typing import Any, Final, Self, TypeAlias, cast

from asyncbucket.engine import events
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.dispatchers import Lock
from asyncbucket.engine.events import Event
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.statistics import shares_used
from asyncbucket.engine.wording import USD, in_given_unit
from asyncbucket.levels import levels, members_of, shown_name

#: A metric's text, and its labels.
Description: TypeAlias = tuple[str, tuple[str, ...]]
#: Waits may be as short as a burst's pace or as long as a minute's window; agents may take hours.
BUCKETS: Final = (
    *(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    *(20, 30, 60, 120, 300, 600, 1_200, 3_600, 7_200),
)
#: Histograms of seconds.
HISTOGRAMS: Final[dict[str, Description]] = {
    "wait": (
        "Seconds from acquire to admission, by the limit that bound.",
        ("limiter", "bound_by"),
    ),
    "shadow_wait": (
        "Seconds that a call in shadow would have waited, by what would have bound it.",
        ("limiter", "bound_by"),
    ),
    "agent": (
        "Seconds from an agent's first call to its end, by kind of agent.",
        ("limiter", "kind", "outcome"),
    ),
}
COUNTERS: Final[dict[str, Description]] = {
    "requests": ("Calls by how they ended.", ("limiter", "outcome")),
    "tokens": (
        "Tokens reserved, used, refunded by settling, and not counted because they were cached.",
        ("limiter", "kind"),
    ),
    "spent_usd": ("US dollars that calls have cost.", ("limiter",)),
    "upstream_429": ("Calls that the provider refused for rate.", ("limiter",)),
    "retries": ("Attempts after the first.", ("limiter",)),
    "prompt_cache": (
        "Calls that read from the provider's prompt cache, or wrote to it.",
        ("limiter", "kind"),
    ),
}
#: What is read when somebody looks, because the use of a limit changes even if nothing happens.
GAUGES: Final[dict[str, Description]] = {
    "queued_requests": ("Calls that wait for their admission now.", ("limiter",)),
    "in_flight_requests": ("Calls in flight.", ("limiter",)),
    "running_agents": ("Running agents that call the limiter itself.", ("limiter",)),
    "limit_used_ratio": ("Share of a limit in use, 1 for all of it.", ("limiter", "limit")),
}

Add: TypeAlias = Callable[[float], object]
#: A metric, by how much it rises, and the values of its labels besides the limiter's.
Measurement: TypeAlias = tuple[str, float, tuple[str, ...]]


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
    def adder(self, metric: str, values: tuple[str, ...]) -> Add:
        """Return what adds to a histogram or a counter with these values of its labels."""

    def watch(self, limiter: Limiter) -> Callable[[], None]:
        """Count for ``limiter`` and all below it, until the returned function is called.

        Members of a pool count as well, unless they, or some below them, do already.

        Raises:
            ValueError: it, or one above or below it, is observed already.
        """
        with _LOCK:
            known = {each for watched in self._watched for each in watched}
            shown = {above for each in known for above in levels(each)}
            if limiter in shown or not known.isdisjoint(levels(limiter)):
                raise ValueError(
                    f"limiter {limiter.name!r}, or one above or below it, is watched here already, and "
                    f"its calls would count twice; switch that off first"
                )
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
                    self._add(metric, (label, *values))(amount)

        return observe

    def read(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return the values of each gauge now, by those of its labels.

        Limiters of one name count together; of their limits the fullest counts.
        """
        found: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in GAUGES}
        for watched in self._watched:
            for each in (below for limiter in watched for below in with_children(limiter)):
                now, label = each.statistics(), shown_name(each)
                running = 0 if now.agents is None else now.agents.running
                counts = (now.waiting, now.in_flight, running)
                for name, count in zip(GAUGES, counts, strict=False):
                    found[name][label,] = found[name].get((label,), 0) + count
                used = found["limit_used_ratio"]
                for limit, share in shares_used(now).items():
                    used[label, limit] = max(share, used.get((label, limit), 0.0))
        return found


def _labels(root: str, name: str) -> list[str]:
    """Return the names under which an event at ``name`` counts, from ``root`` down."""
    below = name.removeprefix(root)
    if name != root and not name.startswith(f"{root}/"):  # a pool's call: the pool is a child here
        below = f"/{name.partition('/')[0]}"
    parts = below.split("/")
    return [root + "/".join(parts[: depth + 1]) for depth in range(len(parts))]


def _measurements(event: Event) -> Iterator[Measurement]:  # noqa: C901, PLR0912 - a table
    """Yield what an event adds to which metrics."""
    match event:
        case events.Admitted(cost=cost, waited=waited, bound_by=bound_by):
            yield "wait", waited, (bound_by or "none",)
            if cost.get("tokens"):
                yield "tokens", cost["tokens"], ("reserved",)
        case events.Shadowed(would_wait=waited, bound_by=bound_by):
            yield "shadow_wait", waited, (bound_by or "none",)
        case events.Released(outcome=outcome, used=used):
            yield "requests", 1, (outcome,)
            if USD in used:
                yield "spent_usd", in_given_unit(used[USD], USD), ()
        case events.Refused(reason=reason):
            yield "requests", 1, (reason,)
        case events.Cancelled():
            yield "requests", 1, ("cancelled",)
        case events.Settled(reserved=reserved, used={"tokens": used}, corrects=corrects):
            before = corrects.get("tokens")
            booked = reserved.get("tokens", 0) if before is None else before
            yield "tokens", max(0, used - (before or 0)), ("used",)
            yield "tokens", max(0, booked - used), ("refunded",)
        case events.Paused(reason="429" | "daily quota"):
            yield "upstream_429", 1, ()
        case events.Retried():
            yield "retries", 1, ()
        case events.PromptCached(read=read, written=written, saved_tokens=saved):
            yield "prompt_cache", read, ("read",)
            yield "prompt_cache", written, ("write",)
            yield "tokens", saved, ("cached",)
        case events.AgentFinished(kind=kind, seconds=seconds, ended_well=ended_well):
            yield "agent", seconds, (kind or "none", "ok" if ended_well else "failed")
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
