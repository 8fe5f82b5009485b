"""A limiter's place in the tree of limiters: what its calls pass, and its share of its parent."""

import itertools
from typing import Self

from asyncbucket.core.gates import Gates
from asyncbucket.core.meters import Amounts
from asyncbucket.core.shares import Fairness, Prices, Share


class Node:
    """Know which meters the calls of one limiter pass, and what its share of its parent is."""

    __slots__ = (
        "_fairness",
        "_gates",
        "_prices",
        "below_root",
        "cached_path_gates",
        "parent",
        "path",
        "waiting_below_root",
        "weight",
    )

    def __init__(
        self,
        parent: "Self | None" = None,
        *,
        weight: float = 1.0,
        gates: Gates | None = None,
    ) -> None:
        self.parent = parent
        self.weight = weight
        #: This node and those above it, up to the root; and the same without the root.
        self.path: tuple[Self, ...] = (self, *parent.path) if parent is not None else (self,)
        self.below_root = self.path[:-1]
        #: Calls that wait here or below, on all loops; not counted at the root.
        self.waiting_below_root = 0
        # There may be thousands of idle children, so what admits a call is made for the first one.
        self._gates = gates
        #: The value of `path_gates`, if it has been computed since the last change.
        self.cached_path_gates: Gates | None = None
        self._prices: Prices | None = None
        self._fairness: Fairness | None = None

    @property
    def is_below_child(self) -> bool:
        """Whether a limiter other than the root is above: this one's debts affect who is next there."""
        return len(self.below_root) > 1

    @property
    def gates(self) -> Gates:
        """The meters of this limiter alone."""
        if self._gates is None:
            self._gates = self.make_gates()
        return self._gates

    def make_gates(self) -> Gates:
        """Return the meters of this limiter, side by side."""
        return Gates(())

    def forget_gates(self) -> None:
        """Rebuild the gates when next asked, because the meters have changed here."""
        self._gates = None
        self.forget_path_gates()

    @property
    def path_gates(self) -> Gates:
        """All meters that a call from here passes, up to the root's."""
        if self.cached_path_gates is None:
            above = self.parent
            self.cached_path_gates = (
                self.gates if above is None else self.gates.plus(above.path_gates)
            )
        return self.cached_path_gates

    def forget_path_gates(self) -> None:
        """Rebuild what depends on meters here and above when next asked, because some have changed."""
        self.cached_path_gates = None
        self._prices = None

    @property
    def prices(self) -> Prices:
        """What calls cost here, by the limits here and above."""
        if self._prices is None:
            self._prices = Prices(self.path_gates.limits)
        return self._prices

    def after_fork(self) -> None:
        """Start afresh in a child process: those who waited are the parent's."""
        self.waiting_below_root = 0
        self._fairness = None

    @property
    def fairness(self) -> Fairness:
        """Its shares and virtual clocks, made when somebody first has to wait."""
        if self._fairness is None:
            self._fairness = Fairness()
        return self._fairness

    def reweigh(self, weight: float) -> None:
        """Change the weight."""
        self.weight = weight
        if self._fairness is not None:
            for share in self._fairness.shares.values():
                share.weight = weight

    def correct(self, priority: int, reserved: Amounts, used: Amounts | None) -> None:
        """Credit the shares on the way to the root with what a call did not use.

        ``used`` is None if the call was not made: then all that was reserved is credited.
        """
        root = self.path[-1]
        # The shares that paid, by priority, and the node at which the call had that price.
        paid: list[tuple[dict[int, Share], Node]]
        paid = [(self.fairness.lines, self), (root.fairness.classes, root)]
        paid += [(child.fairness.shares, above) for child, above in itertools.pairwise(self.path)]
        for shares, node in paid:
            share = shares.get(priority)
            if share is not None:
                spent = 0.0 if used is None else node.prices.of(used)
                share.correct((node.prices.of(reserved) - spent) / share.weight)
