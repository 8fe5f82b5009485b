"""What a plan's calls are limited by: shared limits, and those of tenants."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncbucket.core.cost import COMMON, Cost
from asyncbucket.core.levels import in_force
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit

if TYPE_CHECKING:
    from asyncbucket.plan.drive import Call


class Bound(NamedTuple):
    """One limit of a plan: its tenant, None if it is shared; and the limit, None for the slots."""

    tenant: str | None
    limit: Limit | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of a plan or of a tenant in it, including slots."""

    limits: Sequence[Limit]
    concurrency: int | None
    tenants: "Mapping[str, Bounds]" = field(default_factory=dict)
    #: How a tenant shares: weight and priority.
    terms: Mapping[str, Any] = field(default_factory=dict)

    def limiter(self, clock: Callable[[], int] = lambda: 0) -> Limiter:
        """Return a fresh limiter with these limits, and with children for tenants."""
        root = Limiter(*self.limits, concurrency=self.concurrency, clock=clock)
        for name, tenant in self.tenants.items():
            root.child(name, *tenant.limits, concurrency=tenant.concurrency, **tenant.terms)
        return root

    def without(self, bound: Bound) -> "Bounds":
        """Return all limits except ``bound``."""
        if bound.tenant is not None:
            return self._with_tenant(
                bound.tenant, self.tenants[bound.tenant].without(_without_tenant(bound))
            )
        if bound.limit is None:
            return replace(self, concurrency=None)
        return replace(self, limits=[limit for limit in self.limits if limit is not bound.limit])

    def doubled(self, bound: Bound) -> "Bounds":
        """Return the same with one limit doubled."""
        if bound.tenant is not None:
            return self._with_tenant(
                bound.tenant, self.tenants[bound.tenant].doubled(_without_tenant(bound))
            )
        limit = bound.limit
        if limit is None:
            assert self.concurrency is not None
            return replace(self, concurrency=2 * self.concurrency)
        # A user who doubles the number gets its default burst: for 38 that is 3, for 19 it was 1.
        default = replace(limit, burst=None).burst
        burst = None if limit.burst is None or limit.burst == default else 2 * limit.burst
        doubled = replace(limit, amount=2 * limit.amount, burst=burst)
        return replace(
            self, limits=[doubled if existing is limit else existing for existing in self.limits]
        )

    def _with_tenant(self, name: str, tenant: "Bounds") -> "Bounds":
        return replace(self, tenants={**self.tenants, name: tenant})

    def all_bounds(self, tenant: str | None = None) -> Iterator[Bound]:
        """Yield all limits, those of tenants after the shared ones."""
        yield from (Bound(tenant, limit) for limit in self.limits)
        if self.concurrency is not None:
            yield Bound(tenant, None)
        for name, bounds in self.tenants.items():
            yield from bounds.all_bounds(name)

    def of(self, tenant: str | None) -> "Bounds":
        """Return the bounds of a tenant, or the shared ones."""
        return self if tenant is None else self.tenants[tenant]


def _without_tenant(bound: Bound) -> Bound:
    return bound._replace(tenant=None)


def cost_for(limiter: Limiter, call: "Call") -> Cost:
    """Return what a call costs at ``limiter``, without resources that are not limited there."""
    counted = COMMON | {limit.resource for limit in in_force(limiter)}
    return Cost.of({name: amount for name, amount in call.amounts.items() if name in counted})
