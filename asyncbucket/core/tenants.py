"""A limiter for each tenant, made on demand and let go when nobody misses it."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final, Generic, Protocol, TypeVar

from asyncbucket.core.node import Node
from asyncbucket.core.pacer import Pacer
from asyncbucket.core.seats import reset_after_fork
from asyncbucket.core.terms import Terms

# It touches the private parts of the limiters that it keeps.
# ruff: noqa: SLF001

#: How many tenants' limiters are kept alive unless `per_key` says otherwise; and how many of those
#: unused for the longest time are looked at whenever one is made.
ALIVE: Final = 1_000
_LOOKS: Final = 4


class InFront(Protocol):
    """The public object in front of a node."""

    _node: Node


L = TypeVar("L", bound=InFront)


class Tenants(Generic[L]):
    """Keep a limiter for each tenant, as long as it is used or not as good as new.

    A service may see a hundred thousand tenants a day, and a limiter for each would be a leak. Of
    the limiters unused for the longest time, those beyond ``alive`` that are as good as new are let
    go: one made anew would do the same. Whoever still holds one finds it again by name; if it was
    used in the end, its node stays.
    """

    def __init__(self, make: Callable[[str, Terms], L], again: Callable[[Node, Terms], L]) -> None:
        """Keep limiters that ``make`` makes by name, and ``again`` for a node that was kept."""
        self._make, self._again = make, again
        self.alive = ALIVE
        self.default_terms = Terms()
        self._lock = threading.RLock()
        self._own_terms: dict[str, Terms] = {}
        self._interned: dict[Terms, Terms] = {}
        #: All that are alive; in ``_recent`` in the order of their use, and kept alive by it.
        self._limiters: weakref.WeakValueDictionary[str, L] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[str, L] = OrderedDict()
        #: Nodes that leases hold, or that were used after they were let go.
        self._nodes: weakref.WeakValueDictionary[str, Node] = weakref.WeakValueDictionary()
        self._used: dict[str, Node] = {}
        #: Those that were reconfigured, or have children, by the names of their nodes.
        self._kept: dict[str, L] = {}
        reset_after_fork(self)

    def get(self, tenant: str, terms: Terms | None) -> L:
        """Return a tenant's limiter as it was left, or made on ``terms``.

        Raises:
            ValueError: it exists on other terms.
        """
        with self._lock:
            if terms is not None and terms != self._own_terms.get(tenant):
                if tenant in self._own_terms or tenant in self._nodes:
                    raise ValueError(
                        "this tenant exists on other terms: ask for it by name alone, and change it "
                        "with key(...).reconfigure(...)"
                    )
                self._own_terms[tenant] = self._interned.setdefault(terms, terms)
            limiter = self._find(tenant)
            limiter._node.last_words = None
            self._recent[tenant] = limiter
            self._recent.move_to_end(tenant)
            for used in tuple(self._used):  # to be looked at again
                self._recent[used] = self._find(used)
            self._let_go(limiter._node.pacer)
            return limiter

    def _find(self, tenant: str) -> L:
        limiter = self._limiters.get(tenant)
        if limiter is not None:
            return limiter
        terms = self._own_terms.get(tenant, self.default_terms)
        node = self._used.pop(tenant, None) or self._nodes.get(tenant)
        if node is None:
            import hashlib  # OpenSSL loads slowly, and most limiters have no tenants

            text = tenant.encode(errors="surrogatepass")
            name = f"*{hashlib.blake2s(text, digest_size=8).hexdigest()}"
            limiter = self._make(name, terms)
        else:
            limiter = self._again(node, terms)
        self._limiters[tenant], self._nodes[tenant] = limiter, limiter._node
        return limiter

    def _let_go(self, pacer: Pacer) -> None:
        """Let go of those unused for the longest time; the last one used stays."""
        for _ in range(min(_LOOKS, len(self._recent) - max(self.alive, 1))):
            tenant, limiter = self._recent.popitem(last=False)
            with pacer:
                is_as_new = limiter._node.is_as_new(pacer.clock())
            if is_as_new and limiter._node.name not in self._kept:
                limiter._node.last_words = partial(self._look_after, tenant)
            else:
                self._recent[tenant] = limiter  # to the end: looked at again later

    def _look_after(self, tenant: str, node: Node) -> None:
        """Keep a node that was used after it was let go; nobody holds it any more."""

        def keep_locked() -> None:
            if not node.is_as_new(node.pacer.clock()):
                self._used[tenant] = node

        node.pacer.do(keep_locked)  # a finalizer may run anywhere, even inside the lock

    def keep(self, limiter: L) -> None:
        """Never let go of ``limiter``: one made anew would be another, or lack what is below it."""
        self._kept[limiter._node.name] = limiter

    def after_fork(self) -> None:
        """Replace the lock, which the parent may have held."""
        self._lock = threading.RLock()
