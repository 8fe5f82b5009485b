"""What a plan says, in numbers and in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from asyncbucket.core.wording import counted, in_seconds, rounded, with_verb

#: From this many seconds on, tenths do not matter.
_LONG: Final = 100
#: Units of longer times: the unit's seconds and its name, and those of the unit for the rest.
_UNITS: Final = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))


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
        waits: how long they wait for admission.
        limits: what each limit does.
        held_up: for each resource, its part in what held calls up.
        peak_in_flight: the most calls at once.
        mean_in_flight: calls at once on average.
        refused: how many calls can never pass, because they cost more than a limit.
        refusal: the error of the first of these.
        timeline: admissions in each of as many equal parts of the duration.
    """

    duration: float
    calls: int
    tokens: int
    waits: PlannedWaits
    limits: tuple[PlannedLimit, ...]
    held_up: Mapping[str, float] = field(default_factory=dict)
    peak_in_flight: int = 0
    mean_in_flight: float = 0.0
    refused: int = 0
    refusal: str | None = None
    timeline: tuple[int, ...] = ()

    def __str__(self) -> str:
        lines = [self.summary, *details(self)]
        if self.limits:
            lines += ["", *_aligned(rows_of(self))]
        return "\n".join(lines)

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


def details(plan: Plan) -> Iterator[str]:
    """Yield what is to be said besides the summary and the table."""
    waits = plan.waits
    if waits.max:
        yield (
            f"waits: {duration_in_words(waits.p50)} at the median, {duration_in_words(waits.p95)} at 95 %, "
            f"{duration_in_words(waits.max)} at most"
        )
    if plan.mean_in_flight:
        yield f"in flight: {rounded(plan.mean_in_flight)} on average, {plan.peak_in_flight:,} at most"
    if plan.refused:
        calls = counted(plan.refused, "calls")
        yield f"never passed: {calls}: {plan.refusal}"


def rows_of(plan: Plan) -> list[tuple[str, ...]]:
    """Return the header and a row for each limit: what is used of it, and what changes would do."""
    rows: list[tuple[str, ...]] = [("limit", "used", "if doubled", "if removed")]
    for limit in plan.limits:
        others = (limit.if_doubled, limit.if_removed)
        changes = (change(seconds, plan.duration) for seconds in others)
        rows.append((limit.limit, percent(limit.used), *changes))
    if all(limit.if_doubled is None for limit in plan.limits):
        rows = [row[:2] for row in rows]
    return rows


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def change(seconds: float | None, duration: float) -> str:
    """Say how long all would take instead of ``duration``: "19 min 52 s (-50 %)", or "the same"."""
    if seconds is None:
        return ""
    share = (seconds - duration) / duration if duration else 0.0
    if abs(share) < 0.005:  # noqa: PLR2004 - it would be written as 0 %
        return "the same"
    return f"{duration_in_words(seconds)} ({share:+.0%})".replace("%", " %")
