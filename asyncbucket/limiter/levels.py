"""A limiter and those above it: a call counts at each of them, and one of them is the provider's."""

from collections.abc import Iterator

from asyncbucket.context import inherited
from asyncbucket.limiter.limiter import Limiter
from asyncbucket.limits import Limit


def levels(limiter: Limiter) -> Iterator[Limiter]:
    """Yield ``limiter`` and those above it, up to the root."""
    level: Limiter | None = limiter
    while level is not None:
        yield level
        level = level.parent


def is_under(limiter: Limiter, other: Limiter) -> bool:
    """Tell whether what ``limiter`` admits counts at ``other``, too.

    A tenant that was put to rest and is back has several `Limiter` objects: their accounts are compared.
    """
    return other._account in limiter._account.path  # noqa: SLF001 - its own kind


def provider_of(limiter: Limiter) -> Limiter:
    """Return the level whose limits are the provider's own: the highest that has any.

    What a provider says of its limits, by a header or by a refusal, concerns all below that level.
    Those above have no limits of their own, and only group what several providers serve.
    """
    path = list(levels(limiter))
    return next((level for level in reversed(path) if level.limits), path[-1])


def in_force(limiter: Limiter) -> tuple[Limit, ...]:
    """Return the limits that hold for calls here: its own, and those of the levels above."""
    account = limiter._account  # noqa: SLF001 - its own kind
    gates = account.known_through
    if gates is None:
        with account.budget.lock:
            gates = account.through
    return gates.limits


def can_give_slots_up(limiter: Limiter) -> bool:
    """Tell whether a refusal can be answered here, or above, by fewer slots than there are."""
    path = limiter._account.path  # noqa: SLF001 - its own kind
    return any(each.adaptive and each.adaptive.size > each.adaptive.least for each in path)


def asked(limiter: Limiter) -> Limiter:
    """Return who admits a call here: the limiter itself, or within `tenant` that of the tenant."""
    here = inherited.get()
    if here is None or here.tenant is None or limiter._account.personal:  # noqa: SLF001 - its own kind
        return limiter
    return limiter.key(here.tenant)
