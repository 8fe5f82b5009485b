"""Whose limiter admits a call that is made for a tenant."""

from asyncbucket.context import inherited
from asyncbucket.limiter import Limiter


def asked(limiter: Limiter) -> Limiter:
    """Return who admits a call here: the limiter itself, or within `tenant` that of the tenant."""
    here = inherited.get()
    if here is None or here.tenant is None or "/*" in limiter.name:  # a tenant's own, or under it
        return limiter
    return limiter.key(here.tenant)
