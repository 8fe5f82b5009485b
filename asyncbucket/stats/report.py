"""What can be seen of limiters: plain values, and the text that Prometheus reads.

Tenants are private: they count in the numbers of the limiter above, and are not listed.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from asyncbucket.limiter import Limiter
from asyncbucket.limiter.statistics import Statistics, shares_used
from asyncbucket.limits import Limit

#: Names, fields and descriptions. A parent's numbers include its children's, as in its statistics.
_GAUGES: Final = (
    ("asyncbucket_queued_requests", "waiting", "Calls that wait, children included."),
    ("asyncbucket_in_flight_requests", "in_flight", "Leases not yet released, children included."),
    ("asyncbucket_paused_seconds", "paused", "Seconds until the end of a pause."),
)
_COUNTERS: Final = (
    ("asyncbucket_admitted_total", "admitted", "Calls that passed, children included."),
    ("asyncbucket_refused_total", "refused", "Calls turned away, children included."),
    (
        "asyncbucket_cancelled_total",
        "cancelled",
        "Calls that gave up while they waited, children included.",
    ),
    ("asyncbucket_upstream_429_total", "upstream_429", "Refusals that the provider sent."),
)


def report(limiters: Sequence[Limiter]) -> dict[str, Any]:
    """Return what can be seen of ``limiters`` and their children, in values that JSON can hold.

    Shape: ``{"time": Unix seconds, "limiters": [{"name", "admitted", "waiting", "limits": [...]}]}``.
    Times are seconds, amounts whole units.
    """
    return {"time": time.time(), "limiters": [_row(now) for now in _snapshots(limiters)]}


def check_names(limiters: Sequence[Limiter]) -> None:
    """Refuse limiters of the same name, whose numbers could not be told apart.

    Raises:
        ValueError: the message says which name.
    """
    seen: set[str] = set()
    for name in (each.name for limiter in limiters for each in _family(limiter)):
        if name in seen:
            raise ValueError(
                f"two limiters to be shown are called {name!r}: give each a name= of its own, and "
                f"leave out children, which are seen with their parents"
            )
        seen.add(name)


def as_prometheus(limiters: Sequence[Limiter]) -> str:
    """Return the same as text in Prometheus's format, version 0.0.4."""
    snapshots = _snapshots(limiters)
    rows = [_row(now) for now in snapshots]
    lines: list[str] = []
    for kind, metrics in (("gauge", _GAUGES), ("counter", _COUNTERS)):
        for metric, field, help_ in metrics:
            lines += [f"# HELP {metric} {help_}", f"# TYPE {metric} {kind}"]
            lines += [f"{metric}{{limiter={_quoted(row['name'])}}} {row[field]}" for row in rows]
    metric = "asyncbucket_limit_used_ratio"
    lines += [f"# HELP {metric} Part of a limit that is used.", f"# TYPE {metric} gauge"]
    lines += [
        f"{metric}{{limiter={_quoted(now.name)},limit={_quoted(label)}}} {share}"
        for now in snapshots
        for label, share in shares_used(now).items()
    ]
    return "\n".join([*lines, ""])


def _family(limiter: Limiter) -> Iterator[Limiter]:
    yield limiter
    for child in limiter.children.values():
        yield from _family(child)


def _snapshots(limiters: Iterable[Limiter]) -> list[Statistics]:
    return [each.statistics() for limiter in limiters for each in _family(limiter)]


def _row(now: Statistics) -> dict[str, Any]:
    return {
        "name": now.name,
        "admitted": now.admitted,
        "refused": now.refused,
        "cancelled": now.cancelled,
        "waiting": now.waiting,
        "in_flight": now.in_flight,
        "concurrency": now.concurrency,
        "paused": round(now.paused, 3),
        "upstream_429": now.upstream_429,
        "bound_by": now.bound_by,
        "waits": {name: {"count": w.count, "seconds": w.seconds} for name, w in now.waits.items()},
        "refunded": dict(now.refunded),
        "limits": [row_of(use.limit, used=use.used, available=use.available) for use in now.limits],
    }


def row_of(limit: Limit, *, used: int, available: int) -> dict[str, Any]:
    """Return how much of a limit is used, in values that JSON can hold."""
    return {
        "limit": str(limit),
        "label": limit.label,
        "resource": limit.resource,
        "amount": limit.amount,
        "per": limit.per,
        "used": used,
        "available": available,
    }


def _quoted(text: str) -> str:
    escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'
