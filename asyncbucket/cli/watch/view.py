"""What a reading means: bars, rates since the last one, and how long the line will take."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from asyncbucket.core.wording import counted, in_seconds, one_line


@dataclass(frozen=True, slots=True)
class Bar:
    """Show one limit."""

    limit: str
    used: int
    amount: int
    #: Whether it holds up the first in line.
    binds: bool

    @property
    def fraction(self) -> float:
        """How much of it is used, from 0 to 1."""
        return min(1.0, max(0.0, self.used / self.amount))


@dataclass(frozen=True, slots=True)
class View:
    """Show one limiter."""

    name: str
    bars: tuple[Bar, ...]
    #: Facts in words, the most pressing first.
    facts: tuple[str, ...]
    #: Whether someone should look at it: a pause, or refusals by the provider.
    alarming: bool

    @classmethod
    def of(
        cls,
        now: Mapping[str, Any],
        before: Mapping[str, Any] | None,
        seconds: float,
        *,
        above: Iterable[Mapping[str, Any]] = (),
    ) -> Self:
        """Compare a limiter with how it was ``seconds`` ago.

        ``above`` are the limiters above it. If several limits, here and there, count the resource
        that binds its calls, the one with the least left is shown as binding.
        """
        binding = now.get("bound_by")
        least = min(
            (
                limit["available"]
                for limiter in (now, *above)
                for limit in _limits(limiter)
                if limit["resource"] == binding
            ),
            default=0,
        )
        bars = [
            Bar(
                one_line(limit["limit"]),
                limit["used"],
                limit["amount"],
                limit["resource"] == binding and limit["available"] <= least,
            )
            for limit in _limits(now)
        ]
        rate = 0.0
        if before is not None and seconds > 0 and "admitted" in now:
            rate = max(0, now["admitted"] - before["admitted"]) / seconds
        return cls(
            one_line(now["name"]),
            tuple(bars),
            tuple(_facts(now, rate)),
            bool(now["paused"] or now.get("upstream_429")),
        )


def compare(
    now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], seconds: float
) -> list[View]:
    """Compare all limiters of a reading with how they were ``seconds`` ago."""
    earlier = {limiter["name"]: limiter for limiter in before}
    return [
        View.of(
            limiter,
            earlier.get(limiter["name"]),
            seconds,
            above=[other for other in now if limiter["name"].startswith(f"{other['name']}/")],
        )
        for limiter in now
    ]


def _limits(limiter: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the limits of a limiter, with its slots as the last one."""
    yield from limiter["limits"]
    slots, slots_taken = limiter.get("concurrency"), limiter["in_flight"]
    if slots:
        yield {
            "limit": f"{slots:,} at once",
            "resource": "concurrency",
            "amount": slots,
            "used": slots_taken,
            "available": slots - slots_taken,
        }


def _facts(now: Mapping[str, Any], rate: float) -> list[str]:
    facts: list[str] = []
    if now["paused"]:
        facts.append(f"paused for {in_seconds(now['paused'])} more")
    if "waiting" in now:
        facts.append(f"{now['waiting']:,} waiting{_eta(now['waiting'], rate)}")
    if not now.get("concurrency"):
        facts.append(f"{now['in_flight']:,} in flight")
    if now.get("ahead"):
        facts.append(f"starts are booked {now['ahead']:.1f} s ahead")
    if "workers" in now:
        facts.append(counted(now["workers"], "workers"))
    if "admitted" in now:
        facts.append(f"{now['admitted']:,} admitted" + (f", {rate:,.1f}/s now" if rate else ""))
    facts += [
        f"{now[field]:,} {phrase}"
        for field, phrase in (
            ("upstream_429", "refused by the provider (429)"),
            ("refused", "turned away"),
            ("cancelled", "gave up"),
        )
        if now.get(field)
    ]
    waits = now.get("waits") or {}
    count = sum(wait["count"] for wait in waits.values())
    if count:
        mean = sum(wait["seconds"] for wait in waits.values()) / count
        facts.append(f"{count:,} had to wait, {mean:,.1f} s on average")
    return facts


def _eta(waiting: int, rate: float) -> str:
    return f" (about {waiting / rate:,.0f} s)" if waiting and rate else ""
