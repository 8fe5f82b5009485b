"""Make a plan from a run: what was used, what bound, and what other limits would have gained."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import CostExceedsLimit
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.plan.drive import Call, Drive, Record
from asyncbucket.plan.load import Load
from asyncbucket.plan.result import Plan, PlannedLimit, PlannedWaits

_NANOSECONDS: Final = 1_000_000_000
#: Up to this many calls, other limits are tried by default.
_MAX_WHAT_IF_CALLS: Final = 100_000
#: Parts of the timeline.
_PARTS: Final = 240


def make_plan(
    load: Load, limits: Sequence[Limit], concurrency: int | None, *, what_if: bool | None
) -> Plan:
    """Return the plan of calls under limits; see `asyncbucket.plan.plan`."""
    record = Drive(limits, concurrency).run(load)
    refusal = _refusal(limits, record.refused[0]) if record.refused else None
    calls, end = len(record.admitted), record.end
    if refusal is not None and not calls:
        raise CostExceedsLimit(f"no call can ever pass: {refusal}")
    planned = list(_limits(limits, concurrency, record))
    if load.calls <= _MAX_WHAT_IF_CALLS if what_if is None else what_if:
        for number, limit in enumerate(planned):
            doubled = removed = record.seconds
            if record.held_up.get(limit.resource):
                doubled, removed = (
                    Drive(*others).run(load).seconds
                    for others in _changed(limits, concurrency, number)
                )
            planned[number] = replace(limit, if_doubled=doubled, if_removed=removed)
    held_up = sum(record.held_up.values())
    return Plan(
        duration=record.seconds,
        calls=calls,
        tokens=record.used["tokens"],
        waits=_waits(record),
        limits=tuple(planned),
        held_up={resource: spent / held_up for resource, spent in record.held_up.items()},
        peak_in_flight=record.peak,
        mean_in_flight=record.busy / end if end else 0.0,
        refused=len(record.refused),
        refusal=refusal,
        timeline=_timeline(record),
    )


def _refusal(limits: Sequence[Limit], call: Call) -> str | None:
    """Return what the limiter tells a call that can never pass."""
    try:
        Limiter(*limits).acquire_nowait(Cost.of(call.amounts))
    except CostExceedsLimit as error:
        return str(error)
    return None


def _limits(
    limits: Sequence[Limit], concurrency: int | None, record: Record
) -> Iterator[PlannedLimit]:
    """Describe each limit, and the slots as the last one."""
    calls = len(record.admitted)
    for limit in limits:
        used = record.used[limit.resource]
        rate = limit.amount / limit.per * calls / used if used else None
        part = _part_used(limit, record)
        yield PlannedLimit(limit=str(limit), resource=limit.resource, used=part, rate=rate)
    if concurrency is not None:
        part = record.busy / (concurrency * record.end) if record.end else 0.0
        rate = concurrency * calls * _NANOSECONDS / record.busy if record.busy else None
        slots = f"{concurrency:,} at once"
        yield PlannedLimit(limit=slots, resource="concurrency", used=part, rate=rate)


def _part_used(limit: Limit, record: Record) -> float:
    """Return which part of a limit was used, of the most that was possible in that time."""
    last = record.admitted[-1] if record.admitted else 0
    most: float = limit.amount * (last // limit.window + 1)
    if limit.burst is not None:
        most = min(most, limit.burst + limit.amount * last / limit.window)
    # Calls that use more than they reserved may exceed it: then all was used.
    return min(1.0, record.used[limit.resource] / most)


def _changed(
    limits: Sequence[Limit], concurrency: int | None, number: int
) -> tuple[tuple[Sequence[Limit], int | None], tuple[Sequence[Limit], int | None]]:
    """Return limits and slots with one of them doubled, and without it; the slots come last."""
    before, rest = limits[:number], limits[number:]
    if not rest:
        assert concurrency is not None
        return (limits, 2 * concurrency), (limits, None)
    limit = rest[0]
    # A user who doubles the number gets its default burst: for 38 that is 3, for 19 it was 1.
    default = replace(limit, burst=None).burst
    burst = None if limit.burst is None or limit.burst == default else 2 * limit.burst
    doubled = replace(limit, amount=2 * limit.amount, burst=burst)
    return ([*before, doubled, *rest[1:]], concurrency), ([*before, *rest[1:]], concurrency)


def _waits(record: Record) -> PlannedWaits:
    ranked = sorted(record.waited) or [0]
    p50, p95, most = (
        ranked[max(0, -(-len(ranked) * rank // 100) - 1)] / _NANOSECONDS for rank in (50, 95, 100)
    )
    return PlannedWaits(p50=p50, p95=p95, max=most, mean=sum(ranked) / len(ranked) / _NANOSECONDS)


def _timeline(record: Record) -> tuple[int, ...]:
    counts = [0] * _PARTS
    for instant in record.admitted:
        counts[min(instant * _PARTS // max(1, record.end), _PARTS - 1)] += 1
    return tuple(counts)
