"""A limiter for each tenant, made on demand and let go when nobody misses it."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final, Generic, Protocol, TypeVar

from asyncbucket.engine.dispatchers import Lock
from asyncbucket.engine.node import Node
from asyncbucket.engine.terms import Terms

# It touches the private parts of the limiters that it keeps.
# ruff: noqa: SLF001

#: How many tenants' limiters are kept alive unless `per_key` says otherwise; and how many of those
#: unused for the longest time are looked at whenever one is asked for.
ALIVE: Final = 1_000
_LOOKS: Final = 4


class InFront(Protocol):
    """The public object in front of a node."""

    _node: Node
    #: Whether it is no longer as it was made.
    _was_changed: bool


L = TypeVar("L", bound=InFront)


class Tenants(Generic[L]):
    """Keep a limiter for each tenant, as long as it is used or not as good as new.

    A service may see a hundred thousand tenants a day, and a limiter for each would be a leak. Of
    the limiters unused for the longest time, those beyond ``alive`` that nobody holds and that are
    as good as new are let go: one made anew would do the same. If a lease holds the node of one, and
    uses it in the end, the node stays.
    """

    def __init__(self, make: Callable[[str, Terms], L], again: Callable[[Node, Terms], L]) -> None:
        """Keep limiters that ``make`` makes by name, and ``again`` for a node that was kept."""
        self._make, self._again = make, again
        self.alive = ALIVE
        self.default_terms = Terms()
        self._own_terms: dict[str, Terms] = {}
        self._interned: dict[Terms, Terms] = {}
        #: Those that are kept, in the order of their use.
        self._recent: OrderedDict[str, L] = OrderedDict()
        #: Nodes that leases may still hold; and those that were used after they were let go.
        self._nodes: weakref.WeakValueDictionary[str, Node] = weakref.WeakValueDictionary()
        self._used: dict[str, Node] = {}
        self._lock = Lock()

    def get(self, tenant: str, terms: Terms | None) -> L:
        """Return a tenant's limiter as it was left, or made on ``terms``.

        Raises:
            ValueError: it exists on other terms.
        """
        with self._lock:
            if terms is not None and terms != self._own_terms.get(tenant):
                if tenant in self._own_terms or tenant in self._nodes:
                    raise ValueError(
                        "this tenant already exists on other terms: get it by name alone, and change it "
                        "with key(...).reconfigure(...)"
                    )
                self._own_terms[tenant] = self._interned.setdefault(terms, terms)
            for each in (*self._used, tenant):
                self._recent[each] = self._recent.pop(each, None) or self._find(each)
            for _ in range(min(_LOOKS, len(self._recent) - max(self.alive, 1))):
                self._review_oldest()
            return self._recent[tenant]

    def _find(self, tenant: str) -> L:
        """Return a limiter in front of a node that was let go, or a new one."""
        terms = self._own_terms.get(tenant, self.default_terms)
        node = self._used.pop(tenant, None) or self._nodes.get(tenant)
        if node is not None:
            return self._again(node, terms)
        import hashlib  # OpenSSL loads slowly, and most limiters have no tenants

        text = tenant.encode(errors="surrogatepass")
        limiter = self._make(f"*{hashlib.blake2s(text, digest_size=8).hexdigest()}", terms)
        self._nodes[tenant] = node = limiter._node
        if node.pacer.place is not None:
            node.keeper = node.pacer.place.below(node)
        return limiter

    def _review_oldest(self) -> None:
        """Let the one go that is unused for the longest time, unless it is held, or not as new."""
        tenant, limiter = self._recent.popitem(last=False)
        held, node = weakref.ref(limiter), limiter._node
        with node.pacer.lock:
            may_go = node.is_as_new(node.pacer.clock()) and not limiter._was_changed
        kept = None if may_go else limiter
        del limiter
        if (kept := kept or held()) is None:
            node.on_finalize = partial(self._keep_if_used, tenant, node.slots.admitted)
        else:
            self._recent[tenant] = kept  # to the end: looked at again later

    def _keep_if_used(self, tenant: str, admitted: int, node: Node) -> None:
        """Keep a node that was used after it was let go; nobody holds it any more.

        A finalizer may run anywhere, even inside the lock, or where a user's clock does not.
        """
        used = node.slots.admitted > admitted or any(window.used for window in node.limits.values())
        if used or node.extra:
            self._used[tenant] = node
