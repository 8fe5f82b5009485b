"""What all processes must follow and the store has not heard yet: other terms, a pause."""

from collections.abc import Callable

from asyncbucket.stores.store import Ledger, Terms


class Orders:
    """Keep the latest terms and the longest pause until a ledger has heard them.

    Orders are given in any thread. The desks of several loops may report the same one, which is
    harmless. While the store is gone, or not yet open, they wait.
    """

    def __init__(self, on_terms: Callable[[Terms], None] | None = None) -> None:
        """Begin with none; ``on_terms`` is called with terms that other workers have set."""
        self._on_terms = on_terms
        # What is wanted, and which of it was reported: compared by identity, so that an order given
        # meanwhile by another thread does not count as reported.
        self._terms: Terms | None = None
        self._reported_terms: Terms | None = None
        #: Until when (ns of the worker's clock), and whether gradually.
        self._pause: tuple[int, bool] | None = None
        self._reported_pause: tuple[int, bool] | None = None

    def __bool__(self) -> bool:
        return self._terms is not self._reported_terms or self._pause is not self._reported_pause

    def configure(self, terms: Terms) -> None:
        """Put ``terms`` in force."""
        self._terms = terms

    def pause(self, until: int, *, gradually: bool) -> None:
        """Let nobody start before ``until``; an earlier pause that ends later stays."""
        if self._pause is None or until > self._pause[0]:
            self._pause = until, gradually

    def adopt_terms(self, terms: Terms) -> None:
        """Follow ``terms`` of another worker, unless ours are still to be reported: these are newer."""
        if self._on_terms is not None and self._terms is self._reported_terms:
            self._on_terms(terms)

    async def report(self, ledger: Ledger, clock: Callable[[], int]) -> None:
        """Tell ``ledger`` what is wanted.

        Raises:
            StoreError: the store cannot be told; what it has not heard is kept.
        """
        terms, pause = self._terms, self._pause
        if terms is not None and terms is not self._reported_terms:
            await ledger.configure(terms)
            self._reported_terms = terms
        if pause is not None and pause is not self._reported_pause:
            until, gradually = pause
            left = until - clock()
            if left > 0:  # else it is over
                await ledger.pause(left, gradually=gradually)
            self._reported_pause = pause
