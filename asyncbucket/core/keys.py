"""A child for each tenant, on demand: few are alive, and nothing that was used is forgotten.

A service may see a hundred thousand tenants a day, and a limiter for each would be a leak. So only
a bounded number is kept alive, those used last. Of a tenant that is put to rest, nothing is kept if
its limits are as good as new. Otherwise only what it used and when is kept, a small fraction of a
limiter's size. When the tenant comes back, its limits are rebuilt from that, on the safe side. A
tenant with calls waiting or in flight, or that was reconfigured, is never put to rest. A tenant's
own terms are remembered for good; each costs a name and a reference, as equal terms are one object.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeAlias, TypeVar

from asyncbucket.core.account import Account
from asyncbucket.core.rest import Rest, is_busy_locked, put_to_rest_locked, wake_locked
from asyncbucket.core.terms import Terms

#: How many of the longest unused limiters to look at whenever one is made.
_LOOKS: Final = 4


L = TypeVar("L")
#: Makes the limiter of a tenant from its name, its terms, and what finds its account again.
MakeLimiter: TypeAlias = Callable[[str, Terms, Callable[[], Account]], tuple[L, Account]]


class Keys(Generic[L]):
    """Keep one limiter for each tenant; at most ``alive`` of them, busy ones apart."""

    def __init__(self, parent: Account, make: MakeLimiter[L], *, alive: int) -> None:
        self._parent = parent
        self._make = make
        self._alive = alive
        self._default_terms = Terms()
        #: The terms of tenants that have their own; and each distinct set of terms once.
        self._own_terms: dict[str, Terms] = {}
        self._interned_terms: dict[Terms, Terms] = {}
        self._limiters: OrderedDict[str, tuple[L, Account]] = OrderedDict()
        self._resting: OrderedDict[str, Rest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._limiters)

    def busy(self) -> list[L]:
        """Return the limiters with calls that wait or are in flight now."""
        with self._parent.budget.lifecycle_lock:
            found = tuple(self._limiters.values())
        return [limiter for limiter, account in found if account.waiting or account.in_flight]

    def set_defaults(self, terms: Terms, *, alive: int) -> None:
        """Set the terms for tenants that have none of their own."""
        self._default_terms, self._alive = terms, alive

    def get(self, tenant: str, terms: Terms | None = None) -> L:
        """Return a tenant's limiter as it was left, or made on ``terms``.

        Raises:
            ValueError: it exists on other terms.
        """
        with self._parent.budget.lifecycle_lock:
            if terms is not None:
                self._remember_terms(tenant, terms)
            return self._get(tenant)[0]

    def find(self, tenant: str) -> Account:
        """Return a tenant's account, made again if it was put to rest."""
        with self._parent.budget.lifecycle_lock:
            return self._get(tenant)[1]

    def _remember_terms(self, tenant: str, terms: Terms) -> None:
        """Remember a tenant's own terms."""
        existing = self._own_terms.get(tenant)
        if existing is None and tenant not in self._limiters:
            existing = self._own_terms[tenant] = self._interned_terms.setdefault(terms, terms)
        if existing != terms:
            raise ValueError(
                "this tenant exists on other terms: ask for it by name alone, and change it with "
                "key(...).reconfigure(...)"
            )

    def _get(self, tenant: str) -> tuple[L, Account]:
        found = self._limiters.get(tenant)
        if found is not None:
            self._limiters.move_to_end(tenant)
            return found
        find_again = functools.partial(self.find, tenant)
        made = self._make(
            _hashed(tenant), self._own_terms.get(tenant, self._default_terms), find_again
        )
        self._limiters[tenant] = made
        with self._parent.budget.lock:
            rest = self._resting.pop(tenant, None)
            if rest is not None:
                wake_locked(made[1], rest)
            now = self._parent.budget.clock()
            self._put_to_rest_locked(now)
            self._forget_locked(now)
        return made

    def _put_to_rest_locked(self, now: int) -> None:
        """Put to rest those unused for the longest time; the last one used stays."""
        for _ in range(min(_LOOKS, len(self._limiters) - max(self._alive, 1))):
            tenant, (limiter, account) = self._limiters.popitem(last=False)
            if is_busy_locked(account, now):
                self._limiters[tenant] = (limiter, account)  # to the end: looked at again later
                continue
            rest = put_to_rest_locked(account, now)
            if rest is not None:
                self._resting[tenant] = rest

    def _forget_locked(self, now: int) -> None:
        """Forget resting tenants whose limits are as good as new by now."""
        for _ in range(min(_LOOKS, len(self._resting))):
            tenant, rest = self._resting.popitem(last=False)
            if rest.until > now:
                self._resting[tenant] = rest


def _hashed(tenant: str) -> str:
    """Return the public name of a tenant; its own name is known only to the caller."""
    import hashlib  # OpenSSL loads slowly, and most limiters have no tenants

    return "*" + hashlib.blake2s(tenant.encode(errors="surrogatepass"), digest_size=8).hexdigest()
