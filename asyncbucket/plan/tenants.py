"""Who shares the limits: tenants, each with calls of its own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncbucket.core.limits import Limit, read_limits
from asyncbucket.core.wording import is_integer
from asyncbucket.feedback.adaptive import read_concurrency
from asyncbucket.plan.arrivals import Arrivals
from asyncbucket.plan.bounds import Bounds
from asyncbucket.plan.samples import Samples

if TYPE_CHECKING:
    from asyncbucket.core.context import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One of several that share limits: a child of the limiter, with calls of its own.

    Anything left out is taken from the plan; ``calls`` then applies to each tenant.

    Args:
        limits: its own limits, besides the shared ones.
        concurrency: the most of its calls in flight.
        weight: its share compared with the others', if there is not enough for all.
        priority: the priority of its calls; see `asyncbucket.priority`.
        calls: see `asyncbucket.plan.plan`, as for the rest.
        tokens: see there.
        input_tokens: see there.
        output_tokens: see there.
        used_tokens: see there.
        latency: see there.
        arrivals: see there.
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
            read_limits(_checked_limits(tenant.limits, name), {}),
            _slots(tenant.concurrency),
            terms={"weight": tenant.weight, "priority": tenant.priority},
        )
        for name, tenant in tenants.items()
    }
    return Bounds(limits, _slots(concurrency), own)


def _slots(concurrency: Any) -> int | None:
    """Return how many calls may be in flight, read as a limiter reads it."""
    bounds = read_concurrency(concurrency)
    if bounds is not None and not is_integer(concurrency):
        raise ValueError(
            f"concurrency={concurrency!r} depends on how a server answers, which a plan cannot know: "
            "give a number"
        )
    return None if bounds is None else bounds[0]


def _checked_limits(limits: Sequence[str | Limit], name: str) -> Sequence[str | Limit]:
    """Refuse a single limit instead of a tuple; a text would be read letter by letter."""
    if isinstance(limits, str) or not isinstance(limits, Iterable):
        raise TypeError(f"limits of tenant {name!r} must be a tuple: write ({limits!r},)")
    return limits
