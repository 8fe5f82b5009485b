"""A limiter and those above it: a call counts at each level, and one of them is the provider's."""

from collections.abc import Iterator

from asyncbucket.core.context import inherited
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit


def levels(limiter: Limiter) -> Iterator[Limiter]:
    """Yield ``limiter`` and those above it, up to the root."""
    level: Limiter | None = limiter
    while level is not None:
        yield level
        level = level.parent


def is_under(limiter: Limiter, other: Limiter) -> bool:
    """Tell whether what ``limiter`` admits also counts at ``other``.

    A tenant that was put to rest and came back has several `Limiter` objects, so accounts are
    compared.
    """
    return other._account in limiter._account.path  # noqa: SLF001 - its own kind


def provider_of(limiter: Limiter) -> Limiter:
    """Return the level whose limits are the provider's own: the highest with any limits.

    What a provider says of its limits, in a header or a refusal, concerns everything below that
    level. Levels above it have no limits of their own; they only group several providers.
    """
    path = list(levels(limiter))
    return next((level for level in reversed(path) if level.limits), path[-1])


def in_force(limiter: Limiter) -> tuple[Limit, ...]:
    """Return the limits that hold for calls here: its own, and those of the levels above."""
    account = limiter._account  # noqa: SLF001 - its own kind
    gates = account.cached_path_gates
    if gates is None:
        with account.budget.lock:
            gates = account.path_gates
    return gates.limits


def can_give_slots_up(limiter: Limiter) -> bool:
    """Tell whether this limiter, or one above, can answer a refusal by reducing its slots."""
    path = limiter._account.path  # noqa: SLF001 - its own kind
    return any(level.adaptive and level.adaptive.size > level.adaptive.least for level in path)


def effective_limiter(limiter: Limiter) -> Limiter:
    """Return the limiter that admits a call here: this one, or the tenant's inside `tenant`."""
    context = inherited.get()
    if context is None or context.tenant is None or limiter._account.belongs_to_tenant:  # noqa: SLF001 - its own kind
        return limiter
    return limiter.key(context.tenant)
