"""Know before you pay: how long calls take, what binds, and what other limits would gain.

`plan` runs the calls through the real meters on virtual time (`asyncbucket.plan.drive`), so there
is no second model of a limiter that could be wrong. `calls` decides what calls cost, how long they
take and when they come. Here is what one asks, and what a plan says, in numbers and in words. The rest
is loaded with the first plan, so that `import asyncbucket` stays light.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asyncbucket.core.cost import Cost
from asyncbucket.core.limits import Limit, read_limits
from asyncbucket.core.wording import (
    counted,
    in_seconds,
    is_number,
    read_count,
    rounded,
    usd_written,
    with_verb,
)

if TYPE_CHECKING:
    from asyncbucket.core.pool import Pool
    from asyncbucket.providers.prices import Prices

__all__ = [
    "Plan",
    "PlannedDollars",
    "PlannedLimit",
    "PlannedWaits",
    "Poisson",
    "Sample",
    "Samples",
    "plan",
]

Sample: TypeAlias = float | str | Cost | Mapping[str, Any]
"""A number; a text, whose tokens are counted; a cost; or an object, as in a line of JSONL."""

Samples: TypeAlias = Sample | PathLike[str] | Iterable[Sample]
"""One sample for every call, samples, or the path of a file of them, one a line: JSON, or plain text."""

NANOSECONDS: Final = 1_000_000_000
#: From this many seconds on, tenths do not matter.
_LONG: Final = 100
#: Units of longer times: the unit's seconds and its name, and those of the unit for the rest.
_UNITS: Final = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))


@dataclass(frozen=True, slots=True)
class Poisson:
    """Let calls come at random, independently: ``rate`` a second on average."""

    rate: float

    def __post_init__(self) -> None:
        """Refuse an invalid rate."""
        if not is_number(self.rate) or not 0 < self.rate < math.inf:
            raise ValueError(
                f"a rate must be a finite number of calls a second above 0, not {self.rate!r}"
            )

    def instants(self, calls: int, seed: int) -> Iterator[int]:
        """Yield when each call comes, in nanoseconds."""
        from random import Random

        rng = Random(f"{seed} arrivals")  # noqa: S311 - repeatable, not secret
        now = 0.0
        for _ in range(calls):
            now += rng.expovariate(self.rate)
            yield round(now * NANOSECONDS)


def plan(  # noqa: PLR0913 - all but the limits by keyword
    *limits: str | Limit,
    calls: int | None = None,
    tokens: Samples | None = None,
    concurrency: int | None = None,
    latency: Samples | None = None,
    arrivals: Poisson | None = None,
    profile: str = "openai",
    model: str | None = None,
    prices: "Prices | str | PathLike[str] | None" = None,
    seed: int = 0,
    pool: "Pool | None" = None,
    **limits_by_keyword: float | None,
) -> "Plan":
    """Predict how long calls take under limits, what binds, and how much other limits would help.

    Nothing waits and nothing is sent: a plan of a thousand calls takes about 10 ms. Up to 100,000
    calls, it also says what each limit that any call waits for would bring if it were doubled, or
    removed. The same arguments give the same plan.

    >>> print(plan(calls=10_000, tokens=800, rpm=500, tpm=200_000, concurrency=32, latency=1.5))

    ``tokens`` and ``latency`` may be one sample for every call; many, taken in order if there are
    as many as calls, else drawn with replacement; or the path of a JSONL file of samples. A sample
    of tokens is a number, a `Cost`, a text (four characters are a token), or an object: amounts
    such as ``{"input_tokens": 900, "output_tokens": 300}``, a request's body, or a line of OpenAI's
    batch files. A sample of latency is a number of seconds.

    All calls stand in one line. To see how tenants, children or agents that start agents share
    limits, run them with a `Limiter` on virtual time: `asyncbucket.testing.virtual_time`.

    Args:
        limits: as for `Limiter`: texts such as ``"500 RPM"`` or `Limit` objects.
        calls: how many; may be omitted if samples determine it. A plan simulates each one.
        tokens: tokens that a call costs.
        concurrency: the most calls in flight at once.
        latency: seconds from a call's admission to its end; none by default.
        arrivals: when calls come: all at once, or `Poisson`.
        profile: how the provider charges a request's body: see `asyncbucket.providers.profiles`.
        model: which model is called, for the plan's ``usd``; by default what requests' bodies name.
        prices: as for `Limiter`.
        seed: the seed of everything that is drawn at random.
        pool: whose members the calls go to, each to the one that can start it first; instead of
            limits and concurrency.
        limits_by_keyword: as for `Limiter`: ``rpm=500``, ``tpm=200_000``...

    Raises:
        LimitSyntaxError: a limit cannot be read; a ValueError.
        CostExceedsLimit: no call can ever pass; if only some cannot, they are counted.
        ValueError, TypeError: something is missing or makes no sense, or nobody knows what
            ``model`` costs; the message says what.
        OSError: a file cannot be read.
    """
    from asyncbucket.plan.calls import Load
    from asyncbucket.plan.drive import Bounds, make_plan
    from asyncbucket.providers.prices import read_prices

    read = tuple(read_limits(limits, limits_by_keyword))
    if concurrency is not None:
        concurrency = read_count(concurrency, "concurrency", least=1)
    members = [Bounds(read, concurrency)]
    if pool is not None:
        if read or concurrency is not None:
            raise ValueError("a pool has the limits of its members: give no others")
        members = [Bounds(each.limits, each.concurrency, each.name) for each in pool.members]
    load = Load(
        tokens=tokens,
        latency=latency,
        calls=calls,
        arrivals=arrivals,
        profile=profile,
        model=model,
        prices=None if prices is None else read_prices(prices),
        seed=seed,
    )
    for bounds in members:
        load.check(bounds.limits, bounds.slots)
    return make_plan(load, members)


@dataclass(frozen=True, slots=True)
class PlannedDollars:
    """What calls cost, in dollars; ``print`` it.

    Attributes:
        least: what they cost at least, with 95 % certainty if samples stand for calls.
        likely: the most likely sum.
        most: what they cost at most; None if nothing limits the replies.
    """

    least: float
    likely: float
    most: float | None

    def __str__(self) -> str:
        likely, least = _dollars(self.likely), _dollars(self.least)
        if self.most is None:
            return f"this job costs {likely} USD, at least {least}: nothing limits the replies"
        if (self.least, self.most) == (self.likely, self.likely):
            return f"this job costs {likely} USD"
        return f"this job costs {likely} USD, {least} to {_dollars(self.most)}"


def _dollars(amount: float) -> str:
    """Return an amount in cents or, below ten cents, with two digits that count."""
    return f"{amount:,.2f}" if amount >= 0.1 else usd_written(float(f"{amount:.2g}"))  # noqa: PLR2004


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
