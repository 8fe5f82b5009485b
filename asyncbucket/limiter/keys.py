"""A child for each tenant, on demand: few alive, and nothing forgotten that anybody used.

A service may see a hundred thousand tenants a day, and a limiter for each would be a leak. So only
so many are kept alive, those asked for last. Of one that is put to rest nothing is kept if its
limits are as good as new; else just what it used and when, which is a small fraction of a limiter:
its limits are rebuilt with it when the tenant comes back, on the safe side. One that has calls
waiting or in flight, or was reconfigured, is never put to rest. Terms of a tenant's own are
remembered for good; what they cost beside its name is a reference, for equal terms are one object.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeAlias, TypeVar

from asyncbucket.limiter.account import Account
from asyncbucket.limiter.rest import Rest, is_busy_locked, put_to_rest_locked, wake_locked
from asyncbucket.limiter.terms import Terms

#: How many of the longest unused are looked at for each that is made.
_LOOKS: Final = 4


L = TypeVar("L")
#: Makes the limiter of a tenant from its name, its terms, and what finds its account again.
Make: TypeAlias = Callable[[str, Terms, Callable[[], Account]], tuple[L, Account]]


class Keys(Generic[L]):
    """Keep one limiter for each tenant, at most ``alive`` of them if they let that happen."""

    def __init__(self, parent: Account, make: Make[L], *, alive: int) -> None:
        self._parent = parent
        self._make = make
        self._alive = alive
        self._terms = Terms()
        #: The terms of tenants that have their own, and those terms without their doubles.
        self._own: dict[str, Terms] = {}
        self._known: dict[Terms, Terms] = {}
        self._limiters: OrderedDict[str, tuple[L, Account]] = OrderedDict()
        self._resting: OrderedDict[str, Rest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._limiters)

    def busy(self) -> list[L]:
        """Return the limiters with calls that wait or are in flight now."""
        with self._parent.budget.making:
            found = tuple(self._limiters.values())
        return [limiter for limiter, account in found if account.waiting or account.in_flight]

    def agree(self, terms: Terms, *, alive: int) -> None:
        """Say on what terms tenants stand that have none of their own."""
        self._terms, self._alive = terms, alive

    def get(self, tenant: str, terms: Terms | None = None) -> L:
        """Return the limiter of a tenant, as it was left; ``terms`` is what it is made with.

        Raises:
            ValueError: it exists on other terms.
        """
        with self._parent.budget.making:
            if terms is not None:
                self._keep(tenant, terms)
            return self._get(tenant)[0]

    def find(self, tenant: str) -> Account:
        """Return the account of a tenant, made anew if it was put to rest."""
        with self._parent.budget.making:
            return self._get(tenant)[1]

    def _keep(self, tenant: str, terms: Terms) -> None:
        """Remember a tenant's own terms."""
        stands = self._own.get(tenant)
        if stands is None and tenant not in self._limiters:
            stands = self._own[tenant] = self._known.setdefault(terms, terms)
        if stands != terms:
            raise ValueError(
                "this tenant exists on other terms: ask for it by name alone, and change it with "
                "key(...).reconfigure(...)"
            )

    def _get(self, tenant: str) -> tuple[L, Account]:
        found = self._limiters.get(tenant)
        if found is not None:
            self._limiters.move_to_end(tenant)
            return found
        again = functools.partial(self.find, tenant)
        made = self._make(_hashed(tenant), self._own.get(tenant, self._terms), again)
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
        """Let go of those that have not been asked for in the longest time; the last asked stays."""
        for _ in range(min(_LOOKS, len(self._limiters) - max(self._alive, 1))):
            tenant, (limiter, account) = self._limiters.popitem(last=False)
            if is_busy_locked(account, now):
                self._limiters[tenant] = (limiter, account)  # asked again later
                continue
            rest = put_to_rest_locked(account, now)
            if rest is not None:
                self._resting[tenant] = rest

    def _forget_locked(self, now: int) -> None:
        """Forget those at rest whose limits are as good as new by now."""
        for _ in range(min(_LOOKS, len(self._resting))):
            tenant, rest = self._resting.popitem(last=False)
            if rest.until > now:
                self._resting[tenant] = rest


def _hashed(tenant: str) -> str:
    """Return what a tenant is called: its own name is nobody's business but the caller's."""
    import hashlib  # OpenSSL takes its time to load, and most limiters have no tenants

    return "*" + hashlib.blake2s(tenant.encode(errors="surrogatepass"), digest_size=8).hexdigest()
