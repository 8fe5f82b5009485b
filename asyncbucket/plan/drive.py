"""Make a plan: run its calls through the real meters on virtual time.

A limiter consists of meters, which say what may pass and when; a queue, which says who is next; and
a pacer, which sleeps. Here nobody has to sleep: time moves to the next instant at which something
can happen, when the meters let the first in line pass, or when a call ends. The meters are asked
and booked as by the pacer, with the same integers; only futures, tasks and timers are left out. A
million calls take seconds, and the instants are those of a `Limiter` to the nanosecond (tests/plan
compares them). A limit that resets by the calendar does so at the start and then after days of 24
hours, whatever the date is, so that a plan is the same tomorrow; months are those of 2025.
"""

import heapq
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from typing import Any, Final, NamedTuple

from asyncbucket.engine.cost import Cost
from asyncbucket.engine.errors import CostExceedsLimit
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import NEVER, Amounts, Route, Slots, Window, admit
from asyncbucket.engine.wording import counted, in_seconds, rounded, usd_written, with_verb
from asyncbucket.limiter import Limiter, Pool
from asyncbucket.plan.calls import NANOSECONDS, Load, PlannedCall

#: Up to this many calls, other limits are tried.
_MAX_WHAT_IF_CALLS: Final = 100_000
#: When plans begin, for limits that reset by the calendar: early in January 2025.
_DATE: Final = 1_736_380_800 * NANOSECONDS
#: From this many seconds on, tenths do not matter.
_LONG: Final = 100
#: Units of longer times: the unit's seconds and its name, and those of the unit for the rest.
_UNITS: Final = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))


class Bounds(NamedTuple):
    """What calls pass: limits and, if there is a bound, slots; of one limiter, or a pool's member."""

    limits: tuple[Limit, ...]
    slots: int | None
    name: str = ""


@dataclass(slots=True)
class Record:
    """What happened; instants and lengths are nanoseconds."""

    #: When each call was admitted, and how long it had waited, in order of admission.
    admitted: "array[int]" = field(default_factory=lambda: array("q"))
    waited: "array[int]" = field(default_factory=lambda: array("q"))
    #: How long the first in line waited for each resource.
    held_up: dict[str, int] = field(default_factory=dict)
    #: What each of the bounds has admitted.
    limiters: "list[SimulatedLimiter]" = field(default_factory=list)
    #: Calls that can never pass.
    refused: list[PlannedCall] = field(default_factory=list)
    #: When the last call ended.
    end: int = 0
    #: The most calls in flight at once.
    peak: int = 0

    @property
    def seconds(self) -> float:
        """How long everything took."""
        return self.end / NANOSECONDS


def run_calls(load: Load, members: Sequence[Bounds]) -> Record:
    """Run every call from its arrival to its end, first come first served.

    Args:
        load: the calls, in order of their arrival.
        members: what the calls pass: each goes to the member that can start it first.
    """
    limiters = [SimulatedLimiter(bounds) for bounds in members]
    record = Record(limiters=limiters)
    now = 0
    for arrived, call in load:
        able = [limiter for limiter in limiters if limiter.takes(call.amounts)]
        if not able:
            record.refused.append(call)
            continue
        since = now = max(now, arrived)  # it is first in line from now on
        while True:
            for limiter in limiters:
                limiter.end_calls(now, record)
            dues = [limiter.admit(call.amounts, since, now, book=False) for limiter in able]
            due, bound_by = min(dues, key=itemgetter(0))
            if due <= now:
                break
            ends = [limiter.running[0] for limiter in limiters if limiter.running]
            until = min([due, *ends])
            assert bound_by is not None  # as it has to wait
            record.held_up[bound_by] = record.held_up.get(bound_by, 0) + until - now
            now = until
        able[dues.index((due, bound_by))].begin(call, since, now)
        record.admitted.append(now)
        record.waited.append(now - arrived)
        record.peak = max(record.peak, sum(len(limiter.running) for limiter in limiters))
    for limiter in limiters:
        limiter.end_calls(NEVER, record)
    return record


class SimulatedLimiter:
    """One limiter, or one member of a pool, while the calls run."""

    def __init__(self, bounds: Bounds) -> None:
        self.slots = Slots(NEVER if bounds.slots is None else bounds.slots)
        meters = ((Window(limit, wall=_wall_of(limit)), limit.resource) for limit in bounds.limits)
        self.route = Route((self.slots,), tuple(meters), bounded=(self.slots,))
        #: The sum of the lengths (ns) of its calls, and the units that they used of limited resources,
        #: and of tokens.
        self.busy = 0
        self.used = {limit.resource: 0 for limit in bounds.limits} | {"tokens": 0}
        self.most = [(limit.resource, limit.units) for limit in bounds.limits]
        #: When each call in flight ends, the first one first.
        self.running: list[int] = []

    def takes(self, amounts: Amounts) -> bool:
        """Tell whether such a call can ever pass."""
        return all(amounts.get(resource, 0) <= units for resource, units in self.most)

    def admit(
        self, amounts: Amounts, since: int, now: int, *, book: bool
    ) -> tuple[int, str | None]:
        """Return when a call can pass that is first in line since then, and what binds; or book it."""
        due, bound_by = admit(self.route, amounts, since, now, book=book)
        return (self.running[0] if due == NEVER else due), bound_by

    def begin(self, call: PlannedCall, since: int, now: int) -> None:
        """Let a call go."""
        self.admit(call.amounts, since, now, book=True)
        self.busy += call.latency
        for resource in self.used:
            self.used[resource] += call.amounts.get(resource, 0)
        heapq.heappush(self.running, now + call.latency)

    def end_calls(self, now: int, record: Record) -> None:
        """End the calls that are over by ``now``."""
        running = self.running
        while running and running[0] <= now:
            record.end = max(record.end, heapq.heappop(running))
            self.slots.in_flight -= 1


def _wall_of(limit: Limit) -> Callable[[int], int]:
    """Return what the wall clock shows in a plan: it begins when the limit has just reset."""
    calendar = limit.calendar
    start = 0 if calendar is None else calendar.start(calendar.number(_DATE))
    return lambda now: now + start


def make_plan(load: Load, members: Sequence[Bounds]) -> "Plan":
    """Return the plan of calls under limits; see `asyncbucket.plan.plan`."""
    record = run_calls(load, members)
    refusal = _refusal(members, record.refused[0]) if record.refused else None
    calls, end = len(record.admitted), record.end
    if refusal is not None and not calls:
        raise CostExceedsLimit(f"no call can ever pass: {refusal}")
    planned = []
    asks = load.count <= _MAX_WHAT_IF_CALLS
    for place, bounds in enumerate(members):
        for number, limit in enumerate(_limits(bounds, record, record.limiters[place])):
            doubled = removed = record.seconds if asks else None
            if asks and record.held_up.get(limit.resource):
                doubled, removed = (
                    run_calls(load, [*members[:place], other, *members[place + 1 :]]).seconds
                    for other in _changed(bounds, number)
                )
            planned.append(replace(limit, if_doubled=doubled, if_removed=removed))
    held_up = sum(record.held_up.values())
    return Plan(
        duration=record.seconds,
        calls=calls,
        tokens=sum(limiter.used["tokens"] for limiter in record.limiters),
        usd=load.dollars(),
        waits=_waits(record),
        limits=tuple(planned),
        held_up={resource: spent / held_up for resource, spent in record.held_up.items()},
        peak_in_flight=record.peak,
        mean_in_flight=sum(limiter.busy for limiter in record.limiters) / end if end else 0.0,
        refused=len(record.refused),
        refusal=refusal,
    )


def _refusal(members: Sequence[Bounds], call: PlannedCall) -> str | None:
    """Return what the limiter, or the pool, tells a call that can never pass."""
    limiters = [Limiter(*bounds.limits, name=bounds.name or "default") for bounds in members]
    limiter = limiters[0] if len(limiters) == 1 else Pool(*limiters)
    try:
        limiter.acquire_nowait(Cost.of(call.amounts))
    except CostExceedsLimit as error:
        return str(error)
    return None


def _limits(bounds: Bounds, record: Record, limiter: SimulatedLimiter) -> Iterator["PlannedLimit"]:
    """Describe each limit, and the slots as the last one."""
    of = f"{bounds.name}: " if bounds.name else ""
    for limit in bounds.limits:
        used = limiter.used[limit.resource]
        rate = limit.units / limit.per * limiter.slots.admitted / used if used else None
        part = _part_used(limit, used, record)
        yield PlannedLimit(limit=f"{of}{limit}", resource=limit.resource, used=part, rate=rate)
    if bounds.slots is not None:
        part = limiter.busy / (bounds.slots * record.end) if record.end else 0.0
        rate = (
            bounds.slots * limiter.slots.admitted * NANOSECONDS / limiter.busy
            if limiter.busy
            else None
        )
        slots = f"{of}{bounds.slots:,} at once"
        yield PlannedLimit(limit=slots, resource="concurrency", used=part, rate=rate)


def _part_used(limit: Limit, used: int, record: Record) -> float:
    """Return which part of a limit was used, of the most that was possible in that time."""
    last = record.admitted[-1]
    most: float = limit.units * (last // limit.window + 1)
    if limit.burst_units is not None:
        most = min(most, limit.burst_units + limit.units * last / limit.window)
    # Days of the calendar may be shorter, and then more of them begin.
    return min(1.0, used / most)


def _changed(bounds: Bounds, number: int) -> tuple[Bounds, Bounds]:
    """Return bounds with one of the limits doubled, and without it; the slots come last."""
    before, rest = bounds.limits[:number], bounds.limits[number:]
    if not rest:
        assert bounds.slots is not None
        return bounds._replace(slots=2 * bounds.slots), bounds._replace(slots=None)
    limit = rest[0]
    # A user who doubles the number gets its default burst: for 38 that is 3, for 19 it was 1.
    default = replace(limit, burst=None).burst
    burst = None if limit.burst is None or limit.burst == default else 2 * limit.burst
    doubled = replace(limit, amount=2 * limit.amount, burst=burst)
    return (
        bounds._replace(limits=(*before, doubled, *rest[1:])),
        bounds._replace(limits=(*before, *rest[1:])),
    )


def _waits(record: Record) -> "PlannedWaits":
    ranked = sorted(record.waited)
    p50, p95, most = (
        ranked[-(-len(ranked) * rank // 100) - 1] / NANOSECONDS for rank in (50, 95, 100)
    )
    return PlannedWaits(p50=p50, p95=p95, max=most, mean=sum(ranked) / len(ranked) / NANOSECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWaits:
    """How long calls wait for their admission, in seconds."""

    p50: float
    p95: float
    max: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLimit:
    """What one limit does to the plan.

    Attributes:
        limit: in words: "500 requests per 60 s", "32 at once".
        resource: what it limits: "requests", "tokens", "concurrency", ...
        used: the fraction of it that is used until the last call is admitted; for concurrency until
            the last one ends.
        rate: how many calls a second it admits in the long run, at their mean cost or latency; None
            if they use nothing of it.
        if_doubled: how many seconds everything would take if it were twice as high; None if that
            was not asked.
        if_removed: the same without it.
    """

    limit: str
    resource: str
    used: float
    rate: float | None
    if_doubled: float | None = None
    if_removed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Say how long calls take under limits, and why; ``print`` it.

    Attributes:
        duration: seconds from the start to the end of the last call.
        calls: how many calls pass.
        tokens: what they use together.
        usd: what they likely cost together, in dollars; None if nothing says which model they call.
        waits: how long they wait for admission.
        limits: what each limit does.
        held_up: for each resource, its part in what held calls up.
        peak_in_flight: the most calls at once.
        mean_in_flight: calls at once on average.
        refused: how many calls can never pass, because they cost more than a limit.
        refusal: the error of the first of these.
    """

    duration: float
    calls: int
    tokens: int
    usd: float | None = None
    waits: PlannedWaits
    limits: tuple[PlannedLimit, ...]
    held_up: Mapping[str, float] = field(default_factory=dict)
    peak_in_flight: int = 0
    mean_in_flight: float = 0.0
    refused: int = 0
    refusal: str | None = None

    def __str__(self) -> str:
        waits, lines = self.waits, [self.summary]
        lines += [] if self.usd is None else [f"this job costs about {_dollars(self.usd)} USD"]
        if waits.max:
            lines.append(
                f"waits: {duration_in_words(waits.p50)} at the median, "
                f"{duration_in_words(waits.p95)} at 95 %, {duration_in_words(waits.max)} at most"
            )
        if self.mean_in_flight:
            mean, most = rounded(self.mean_in_flight), f"{self.peak_in_flight:,}"
            lines.append(f"in flight: {mean} on average, {most} at most")
        if self.refused:
            lines.append(f"never passed: {counted(self.refused, 'calls')}: {self.refusal}")
        return "\n".join([*lines, *self._table()])

    def _table(self) -> Iterator[str]:
        """Yield a header and a line for each limit: what is used of it, and what changes would do."""
        if not self.limits:
            return
        rows = [("limit", "used", "if doubled", "if removed")]
        for limit in self.limits:
            doubled, removed = (
                change(seconds, self.duration) for seconds in (limit.if_doubled, limit.if_removed)
            )
            rows.append((limit.limit, percent(limit.used), doubled, removed))
        width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield ""
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths, strict=True)]
            yield "  ".join([first.ljust(width), *cells]).rstrip()

    @property
    def binding(self) -> PlannedLimit | None:
        """The limit that binds: among those that any call waited for, the one used most."""
        waited = [limit for limit in self.limits if self.held_up.get(limit.resource)]
        return max(waited, key=lambda limit: limit.used, default=None)

    @property
    def bound_by(self) -> str | None:
        """Its resource: "requests", "tokens", "concurrency"...; None if nobody waited."""
        return None if self.binding is None else self.binding.resource

    @property
    def summary(self) -> str:
        """The plan in a line: "39 min 39 s, tokens bind: 10,000 calls with 8,000,000 tokens"."""
        what = counted(self.calls, "calls")
        if self.tokens:
            what += f" with {self.tokens:,} tokens"
        return f"{duration_in_words(self.duration)}, {binds(self.bound_by)}: {what}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything in values that JSON can hold; times are seconds."""
        return {"bound_by": self.bound_by, **asdict(self)}


def binds(resource: str | None) -> str:
    """Say what binds: "tokens bind", "concurrency binds", "nothing binds"."""
    return "nothing binds" if resource is None else with_verb(resource, "bind")


def duration_in_words(seconds: float) -> str:
    """Return a length of time in at most two units: "1.5 s", "39 min 39 s", "6 h 42 min"."""
    if seconds < _LONG:
        return in_seconds(seconds)
    size, name, small, rest_name = next(unit for unit in _UNITS if round(seconds) >= unit[0])
    whole, rest = divmod(round(round(seconds) / small) * small, size)
    return f"{whole:,} {name} {rest // small} {rest_name}" if rest else f"{whole:,} {name}"


def percent(share: float) -> str:
    """Return a fraction in percent, rounded down to tenths: 99.96 % is not 100 %."""
    return f"{int(share * 1000 + 1e-6) / 10:.1f} %"


def change(seconds: float | None, duration: float) -> str:
    """Say how long all would take instead of ``duration``: "19 min 52 s (-50 %)", or "the same"."""
    if seconds is None:
        return "-"
    share = (seconds - duration) / duration if duration else 0.0
    if abs(share) < 0.005:  # noqa: PLR2004 - it would be written as 0 %
        return "the same"
    return f"{duration_in_words(seconds)} ({share:+.0%})".replace("%", " %")


def _dollars(amount: float) -> str:
    """Return an amount in cents or, below ten cents, with two digits that count."""
    return f"{amount:,.2f}" if amount >= 0.1 else usd_written(float(f"{amount:.2g}"))  # noqa: PLR2004
