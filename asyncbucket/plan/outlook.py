"""Make a plan from a run: what was used, what bound, and what other limits would have gained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncbucket.core.errors import CostExceedsLimit
from asyncbucket.core.limits import Limit
from asyncbucket.plan.arrivals import MOST
from asyncbucket.plan.bounds import Bound, Bounds, cost_for
from asyncbucket.plan.drive import Record, drive
from asyncbucket.plan.load import Load
from asyncbucket.plan.result import Plan, PlannedLimit, PlannedTenant, PlannedWaits

if TYPE_CHECKING:
    from array import array

_NANOSECONDS: Final = 1_000_000_000
#: Up to this many calls, other limits are tried by default; with tenants that takes longer.
_MAX_WHAT_IF_CALLS: Final = 100_000
_MAX_WHAT_IF_CALLS_OF_TENANTS: Final = 20_000
#: The most calls with tenants, which take ten times as long as those of one line.
_MAX_CALLS_OF_TENANTS: Final = MOST // 10
#: Parts of the timeline.
_PARTS: Final = 240


@dataclass(frozen=True, slots=True)
class _Run:
    """What happened, in total and to each tenant."""

    total: Record
    tenants: Mapping[str, Record] = field(default_factory=dict)

    def of(self, tenant: str | None) -> Record:
        """Return what happened to a tenant, or in total."""
        return self.total if tenant is None else self.tenants[tenant]


#: Calls, by tenant; without tenants under None.
Loads = Mapping[str | None, Load]


def make_plan(loads: Loads, bounds: Bounds, *, what_if: bool | None) -> Plan:
    """Return the plan of calls under limits; see `asyncbucket.plan.plan`."""
    calls = _count(loads)
    _check(loads, bounds)
    run = _run(loads, bounds)
    refusal = _refusal(run, bounds)
    if refusal is not None and not run.total.admitted:
        raise CostExceedsLimit(f"no call can ever pass: {refusal}")
    is_small = calls <= (_MAX_WHAT_IF_CALLS if None in loads else _MAX_WHAT_IF_CALLS_OF_TENANTS)
    what_if_loads = loads if (is_small if what_if is None else what_if) else None
    limits = tuple(_limit(bound, bounds, run, what_if_loads) for bound in bounds.all_bounds())
    return _plan(run, limits, refusal)


def _count(loads: Loads) -> int:
    """Return how many calls there are.

    Raises:
        ValueError: they are too many to be simulated.
    """
    calls = sum(load.calls for load in loads.values())
    most, whose = (MOST, "") if None in loads else (_MAX_CALLS_OF_TENANTS, " of tenants")
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
    counted = {bound.limit.resource for bound in bounds.all_bounds() if bound.limit is not None}
    for name, load in loads.items():
        own = bounds.of(name)
        shared = [] if name is None else bounds.limits
        slots = own.concurrency or bounds.concurrency
        load.check([*own.limits, *shared], slots, counted=counted)


def _run(loads: Loads, bounds: Bounds) -> _Run:
    shared_load = loads.get(None)
    if shared_load is None:
        from asyncbucket.plan.fair import drive_fair

        named = {name: load for name, load in loads.items() if name is not None}
        return _Run(*drive_fair(bounds, named))
    arrivals, follow = shared_load.arrivals()
    gates = bounds.limiter()._door.account.path_gates  # noqa: SLF001 - only needed here
    return _Run(drive(gates, arrivals, follow))


def _refusal(run: _Run, bounds: Bounds) -> str | None:
    """Return what the limiter tells the first call that can never pass."""
    root = bounds.limiter()
    for name in run.tenants or (None,):
        limiter = root if name is None else root.child(name)
        for call in run.of(name).refused[:1]:
            try:
                limiter.acquire_nowait(cost_for(limiter, call))
            except CostExceedsLimit as error:
                return str(error)
    return None


def _limit(bound: Bound, bounds: Bounds, run: _Run, loads: Loads | None) -> PlannedLimit:
    """Describe a limit; with ``loads`` also what would happen if it were another."""
    tenant, limit = bound
    record, own = run.of(tenant), bounds.of(tenant)
    resource = "concurrency" if limit is None else limit.resource
    doubled = removed = None
    if loads is not None:
        doubled = removed = run.total.end / _NANOSECONDS
        if record.held_up.get(resource):
            doubled, removed = (
                _run(loads, other).total.end / _NANOSECONDS
                for other in (bounds.doubled(bound), bounds.without(bound))
            )
    return PlannedLimit(
        limit=f"{own.concurrency:,} at once" if limit is None else str(limit),
        resource=resource,
        tenant=tenant,
        used=_used(limit, own, record),
        rate=_rate(limit, own, record),
        if_doubled=doubled,
        if_removed=removed,
    )


def _used(limit: Limit | None, bounds: Bounds, record: Record) -> float:
    """Return which fraction of a limit was used, of the most that was possible in that time."""
    if limit is None:
        assert bounds.concurrency is not None
        return record.busy / (bounds.concurrency * record.end) if record.end else 0.0
    last = record.admitted[-1] if record.admitted else 0
    most: float = limit.amount * (last // limit.window + 1)
    if limit.burst is not None:
        most = min(most, limit.burst + limit.amount * last / limit.window)
    # Calls that use more than they reserved may exceed it: then all was used.
    return min(1.0, record.used.get(limit.resource, 0) / most)


def _rate(limit: Limit | None, bounds: Bounds, record: Record) -> float | None:
    """Return how many calls a second a limit admits, at their mean cost or latency."""
    calls = len(record.admitted)
    if limit is None:
        assert bounds.concurrency is not None
        return bounds.concurrency * calls * _NANOSECONDS / record.busy if record.busy else None
    used = record.used.get(limit.resource)
    return limit.amount / limit.per * calls / used if used else None


def _plan(run: _Run, limits: tuple[PlannedLimit, ...], refusal: str | None) -> Plan:
    record, end = run.total, run.total.end
    return Plan(
        duration=end / _NANOSECONDS,
        calls=len(record.admitted),
        tokens=record.used.get("tokens", 0),
        waits=_waits(record.waited),
        limits=limits,
        held_up=_shares(record.held_up),
        peak_in_flight=record.peak,
        mean_in_flight=record.busy / end if end else 0.0,
        refused=len(record.refused),
        refusal=refusal,
        timeline=_timeline(record),
        tenants={name: _tenant(tenant_record) for name, tenant_record in run.tenants.items()},
    )


def _tenant(record: Record) -> PlannedTenant:
    return PlannedTenant(
        calls=len(record.admitted),
        tokens=record.used.get("tokens", 0),
        duration=record.end / _NANOSECONDS,
        waits=_waits(record.waited),
        held_up=_shares(record.held_up),
        refused=len(record.refused),
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


def _timeline(record: Record) -> tuple[int, ...]:
    counts = [0] * _PARTS
    for instant in record.admitted:
        counts[min(instant * _PARTS // max(1, record.end), _PARTS - 1)] += 1
    return tuple(counts)
