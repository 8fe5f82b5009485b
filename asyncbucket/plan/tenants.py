"""Who shares the limits: tenants, each with calls of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncbucket.limits import Limit, read_limits
from asyncbucket.plan.arrivals import Arrivals
from asyncbucket.plan.bounds import Bounds
from asyncbucket.plan.samples import Samples

if TYPE_CHECKING:
    from asyncbucket.context import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One of those who share limits: a child of the limiter, with calls of its own.

    What is left out is as the plan says; ``calls`` is then so many for each tenant.

    Args:
        limits: its own limits, besides those that all share.
        concurrency: the most of its calls in flight.
        weight: its share beside the others', where not all can have what they want.
        priority: of its calls; see `asyncbucket.priority`.
        calls: see `asyncbucket.plan.plan`, as for the others.
        tokens: likewise.
        input_tokens: likewise.
        output_tokens: likewise.
        used_tokens: likewise.
        latency: likewise.
        arrivals: likewise.
    """

    limits: tuple[str | Limit, ...] = ()
    concurrency: int | None = None
    weight: float = 1.0
    priority: "Priority | None" = None
    calls: int | None = None
    tokens: Samples | None = None
    input_tokens: Samples | None = None
    output_tokens: Samples | None = None
    used_tokens: Samples | None = None
    latency: Samples | None = None
    arrivals: Arrivals = None


def bounds_of(
    limits: Sequence[Limit], concurrency: int | None, tenants: Mapping[str, Tenant]
) -> Bounds:
    """Return the limits of a plan, and those of its tenants."""
    own = {
        name: Bounds(
            read_limits(_several(tenant.limits, name), {}),
            tenant.concurrency,
            terms={"weight": tenant.weight, "priority": tenant.priority},
        )
        for name, tenant in tenants.items()
    }
    return Bounds(limits, concurrency, own)


def _several(limits: Sequence[str | Limit], name: str) -> Sequence[str | Limit]:
    """Refuse one text in the place of several, which would be read letter by letter."""
    if isinstance(limits, str):
        raise TypeError(f"limits of tenant {name!r} must be a tuple: write ({limits!r},)")
    return limits
