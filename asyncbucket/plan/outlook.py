"""Make a plan from a run: what was used, what bound, and what other limits would have gained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncbucket.errors import CostExceedsLimit
from asyncbucket.limits import Limit
from asyncbucket.plan.arrivals import MOST
from asyncbucket.plan.bounds import Bound, Bounds, cost_for
from asyncbucket.plan.drive import Course, drive
from asyncbucket.plan.load import Load
from asyncbucket.plan.result import Plan, PlannedLimit, PlannedTenant, PlannedWaits

if TYPE_CHECKING:
    from array import array

_NANOSECONDS: Final = 1_000_000_000
#: Up to this many calls, other limits are tried by default; with tenants that takes longer.
_MANY: Final = 100_000
_MANY_OF_TENANTS: Final = 20_000
#: The most calls with tenants, which take ten times as long as those of one line.
_MOST_OF_TENANTS: Final = MOST // 10
#: Parts of the timeline.
_PARTS: Final = 240


@dataclass(frozen=True, slots=True)
class _Run:
    """What happened, in total and to each tenant."""

    whole: Course
    tenants: Mapping[str, Course] = field(default_factory=dict)

    def of(self, tenant: str | None) -> Course:
        """Return what happened to a tenant, or in total."""
        return self.whole if tenant is None else self.tenants[tenant]


#: Calls, by tenant; without tenants under None.
Loads = Mapping[str | None, Load]


def foresee(loads: Loads, bounds: Bounds, *, what_if: bool | None) -> Plan:
    """Return the plan of calls under limits; see `asyncbucket.plan.plan`."""
    calls = _count(loads)
    _check(loads, bounds)
    run = _run(loads, bounds)
    refusal = _refusal(run, bounds)
    if refusal is not None and not run.whole.admitted:
        raise CostExceedsLimit(f"no call can ever pass: {refusal}")
    few = calls <= (_MANY if None in loads else _MANY_OF_TENANTS)
    tried = loads if (few if what_if is None else what_if) else None
    limits = tuple(_limit(bound, bounds, run, tried) for bound in bounds.each())
    return _plan(run, limits, refusal)


def _count(loads: Loads) -> int:
    """Return how many calls there are.

    Raises:
        ValueError: they are too many to be simulated.
    """
    calls = sum(load.calls for load in loads.values())
    most, whose = (MOST, "") if None in loads else (_MOST_OF_TENANTS, " of tenants")
    if calls > most:
        raise ValueError(
            f"{calls:,} calls are more than the {most:,}{whose} that a plan runs through: plan a "
            f"part of them; where limits bind, twice the calls take twice as long"
        )
    return calls


def _check(loads: Loads, bounds: Bounds) -> None:
    """Refuse what no plan can know, or what nothing is known of.

    Raises:
        ValueError: the message says what is missing.
    """
    counted = {bound.limit.resource for bound in bounds.each() if bound.limit is not None}
    for name, load in loads.items():
        own = bounds.of(name)
        shared = [] if name is None else bounds.limits
        slots = own.concurrency or bounds.concurrency
        load.check([*own.limits, *shared], slots, counted=counted)


def _run(loads: Loads, bounds: Bounds) -> _Run:
    only = loads.get(None)
    if only is None:
        from asyncbucket.plan.fair import drive_fair

        named = {name: load for name, load in loads.items() if name is not None}
        return _Run(*drive_fair(bounds, named))
    arrivals, follow = only.arrivals()
    passage = bounds.limiter()._door.account.path_gates  # noqa: SLF001 - only needed here
    return _Run(drive(passage, arrivals, follow))


def _refusal(run: _Run, bounds: Bounds) -> str | None:
    """Return what the limiter tells the first call that can never pass."""
    limiter = bounds.limiter()
    for name in run.tenants or (None,):
        door = limiter if name is None else limiter.child(name)
        for call in run.of(name).refused[:1]:
            try:
                door.acquire_nowait(cost_for(door, call))
            except CostExceedsLimit as error:
                return str(error)
    return None


def _limit(bound: Bound, bounds: Bounds, run: _Run, loads: Loads | None) -> PlannedLimit:
    """Describe a limit; with ``loads`` also what would happen if it were another."""
    tenant, limit = bound
    course, own = run.of(tenant), bounds.of(tenant)
    resource = "concurrency" if limit is None else limit.resource
    doubled = removed = None
    if loads is not None:
        doubled = removed = run.whole.end / _NANOSECONDS
        if course.held_up.get(resource):
            doubled, removed = (
                _run(loads, other).whole.end / _NANOSECONDS
                for other in (bounds.doubled(bound), bounds.without(bound))
            )
    return PlannedLimit(
        limit=f"{own.concurrency:,} at once" if limit is None else str(limit),
        resource=resource,
        tenant=tenant,
        used=_used(limit, own, course),
        rate=_rate(limit, own, course),
        if_doubled=doubled,
        if_removed=removed,
    )


def _used(limit: Limit | None, bounds: Bounds, course: Course) -> float:
    """Return which fraction of a limit was used, of the most that was possible in that time."""
    if limit is None:
        assert bounds.concurrency is not None
        return course.busy / (bounds.concurrency * course.end) if course.end else 0.0
    last = course.admitted[-1] if course.admitted else 0
    most: float = limit.amount * (last // limit.window + 1)
    if limit.burst is not None:
        most = min(most, limit.burst + limit.amount * last / limit.window)
    # Calls that use more than they reserved may exceed it: then all was used.
    return min(1.0, course.used.get(limit.resource, 0) / most)


def _rate(limit: Limit | None, bounds: Bounds, course: Course) -> float | None:
    """Return how many calls a second a limit admits, at their mean cost or latency."""
    calls = len(course.admitted)
    if limit is None:
        assert bounds.concurrency is not None
        return bounds.concurrency * calls * _NANOSECONDS / course.busy if course.busy else None
    used = course.used.get(limit.resource)
    return limit.amount / limit.per * calls / used if used else None


def _plan(run: _Run, limits: tuple[PlannedLimit, ...], refusal: str | None) -> Plan:
    course, end = run.whole, run.whole.end
    return Plan(
        duration=end / _NANOSECONDS,
        calls=len(course.admitted),
        tokens=course.used.get("tokens", 0),
        waits=_waits(course.waited),
        limits=limits,
        held_up=_shares(course.held_up),
        peak_in_flight=course.peak,
        mean_in_flight=course.busy / end if end else 0.0,
        refused=len(course.refused),
        refusal=refusal,
        timeline=_timeline(course),
        tenants={name: _tenant(each) for name, each in run.tenants.items()},
    )


def _tenant(course: Course) -> PlannedTenant:
    return PlannedTenant(
        calls=len(course.admitted),
        tokens=course.used.get("tokens", 0),
        duration=course.end / _NANOSECONDS,
        waits=_waits(course.waited),
        held_up=_shares(course.held_up),
        refused=len(course.refused),
    )


def _shares(held_up: Mapping[str, int]) -> dict[str, float]:
    total = sum(held_up.values())
    return {resource: spent / total for resource, spent in held_up.items() if total}


def _waits(waited: "array[int]") -> PlannedWaits:
    ranked = sorted(waited) or [0]
    p50, p95, most = (
        ranked[max(0, -(-len(ranked) * rank // 100) - 1)] / _NANOSECONDS for rank in (50, 95, 100)
    )
    return PlannedWaits(p50=p50, p95=p95, max=most, mean=sum(ranked) / len(ranked) / _NANOSECONDS)


def _timeline(course: Course) -> tuple[int, ...]:
    counts = [0] * _PARTS
    for instant in course.admitted:
        counts[min(instant * _PARTS // max(1, course.end), _PARTS - 1)] += 1
    return tuple(counts)
