"""What can be seen of limiters: plain values, and the text that Prometheus reads.

Tenants are private: they count in the numbers of the limiter above, and are not listed.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.core.statistics import Statistics, shares_used

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
    return {"time": time.time(), "limiters": [_row(snapshot) for snapshot in _snapshots(limiters)]}


def check_names(limiters: Sequence[Limiter]) -> None:
    """Refuse limiters of the same name, whose numbers could not be told apart.

    Raises:
        ValueError: the message says which name.
    """
    seen: set[str] = set()
    for name in (member.name for limiter in limiters for member in _with_descendants(limiter)):
        if name in seen:
            raise ValueError(
                f"two limiters to be shown are called {name!r}: give each a name= of its own, and "
                f"leave out children, which are seen with their parents"
            )
        seen.add(name)


def as_prometheus(limiters: Sequence[Limiter]) -> str:
    """Return the same as text in Prometheus's format, version 0.0.4."""
    snapshots = _snapshots(limiters)
    rows = [_row(snapshot) for snapshot in snapshots]
    lines: list[str] = []
    for metric_type, metrics in (("gauge", _GAUGES), ("counter", _COUNTERS)):
        for metric, field, help_ in metrics:
            lines += [f"# HELP {metric} {help_}", f"# TYPE {metric} {metric_type}"]
            lines += [f"{metric}{{limiter={_quoted(row['name'])}}} {row[field]}" for row in rows]
    metric = "asyncbucket_limit_used_ratio"
    lines += [f"# HELP {metric} Part of a limit that is used.", f"# TYPE {metric} gauge"]
    lines += [
        f"{metric}{{limiter={_quoted(snapshot.name)},limit={_quoted(label)}}} {share}"
        for snapshot in snapshots
        for label, share in shares_used(snapshot).items()
    ]
    return "\n".join([*lines, ""])


def _with_descendants(limiter: Limiter) -> Iterator[Limiter]:
    yield limiter
    for child in limiter.children.values():
        yield from _with_descendants(child)


def _snapshots(limiters: Iterable[Limiter]) -> list[Statistics]:
    return [member.statistics() for limiter in limiters for member in _with_descendants(limiter)]


def _row(snapshot: Statistics) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "admitted": snapshot.admitted,
        "refused": snapshot.refused,
        "cancelled": snapshot.cancelled,
        "waiting": snapshot.waiting,
        "in_flight": snapshot.in_flight,
        "concurrency": snapshot.concurrency,
        "paused": round(snapshot.paused, 3),
        "upstream_429": snapshot.upstream_429,
        "bound_by": snapshot.bound_by,
        "waits": {
            name: {"count": wait.count, "seconds": wait.seconds}
            for name, wait in snapshot.waits.items()
        },
        "refunded": dict(snapshot.refunded),
        "limits": [
            row_of(use.limit, used=use.used, available=use.available) for use in snapshot.limits
        ],
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
