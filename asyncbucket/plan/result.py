"""What a plan says, in numbers and in words."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from asyncbucket.core.wording import counted, in_seconds, rounded, with_verb
from asyncbucket.plan.calls import PlannedDollars

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
        usd: what they cost together; None if nothing says which model they call.
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
    usd: PlannedDollars | None = None
    waits: PlannedWaits
    limits: tuple[PlannedLimit, ...]
    held_up: Mapping[str, float] = field(default_factory=dict)
    peak_in_flight: int = 0
    mean_in_flight: float = 0.0
    refused: int = 0
    refusal: str | None = None
    timeline: tuple[int, ...] = ()

    def __str__(self) -> str:
        waits, lines = self.waits, [self.summary]
        lines += [] if self.usd is None else [str(self.usd)]
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
