"""Who goes next among all that wait on one loop: branches, from the root's priorities to the lines."""

import math
from collections.abc import Callable, Iterator
from typing import Final

from asyncbucket.branch import Branch, Classes, Flow, Source
from asyncbucket.node import Node
from asyncbucket.queue import EMPTY, Line, Waiter
from asyncbucket.shares import Share, VirtualClock

#: To look at more than so many takes longer than is saved where others need not go one by one.
_MANY: Final = 256


class Tree:
    """Choose among all who wait on one loop, wherever in the tree of limiters they do."""

    __slots__ = ("_classes", "_emptied", "_pacer", "_root", "_rouse", "_tight")

    def __init__(self, root: Node, line: Line, rouse: Callable[[Node], object]) -> None:
        """Take over the ``line`` of those who have waited at the root so far.

        ``rouse`` is `Tree.rouse` for the trees of all loops.
        """
        self._root = root
        self._pacer = line.pacer
        self._rouse = rouse
        self._emptied: list[Branch] = []
        self._tight: set[Flow] = set()
        self._classes = Classes(root, root.fairness.top, self._tight)
        branch = self._class(0)
        branch.add(None, line, root.fairness.line(0))
        branch.living = self._classes.living = len(line)
        line.above = (self._classes, branch)

    def __len__(self) -> int:
        return self._classes.living

    @property
    def calm_until(self) -> int:
        """Until when nobody may go whom its own limits have held up: whoever may loses by each delay."""
        if len(self._tight) > _MANY:
            return 0
        return min((flow.asleep for flow in self._tight), default=EMPTY)

    def waiters(self) -> Iterator[Waiter]:
        """Yield all who wait."""
        return self._classes.waiters()

    @property
    def wake(self) -> int:
        """When somebody wakes who may then be the head; `EMPTY` if nobody is left or asleep."""
        return min(branch.wake for branch in self._chosen())

    @property
    def turn(self) -> tuple[float, ...]:
        """What the head that was found last competes by with those of other loops.

        The tag of its priority and that priority, the more urgent first; then the tags below.
        """
        tags = [branch.first.share.tag for branch in self._chosen() if branch.first]
        urgent = self._classes.first
        return () if urgent is None else (tags[0], urgent.order, *tags[1:])

    @property
    def held_by(self) -> str | None:
        """What held up, below the root, those before the head that was found last."""
        held = (branch.first.held_by for branch in self._chosen() if branch.first)
        return next(filter(None, held), None)

    def line(self, node: Node, priority: int) -> Line:
        """Return the line for those of a node and a priority, in which somebody is about to stand."""
        branch = self._class(priority)
        above = [self._classes, branch]
        for each in reversed(node.below_root):
            branch = self._branch(branch, each, each, priority, each.fairness.shares)
            above.append(branch)
        flow = branch.find(None)
        if flow is None:
            made = Line(node, self._pacer, priority)
            flow = branch.add(None, made, node.fairness.line(priority))
        line = flow.source
        assert isinstance(line, Line)
        line.above = tuple(above)
        if not line:
            for chooser, wanted in self._way(node, (priority,)):
                chooser.want(wanted)
            branch.want(flow)
        return line

    def head(self, now: int, *, slotless: int = 0) -> Waiter | None:
        """Return who goes next as far as the limits below the root are concerned."""
        return self._classes.head(now, slotless=slotless)

    def served(self, head: Waiter, now: int) -> None:
        """Take ``head``, which `head` returned and which passed, out of its line; charge for it."""
        self._classes.served(head, now)
        if not head.line:
            self._emptied.extend(
                branch for branch in self._chosen() if branch.lowest_emptied < math.inf
            )
        if head.node.deep:
            self._rouse(head.node)

    @property
    def expects(self) -> bool:
        """Whether the head that was found should wait for somebody to come back first."""
        return bool(self._emptied) and any(
            branch.first is not None and branch.first.share.tag > branch.lowest_emptied
            for branch in self._chosen()
        )

    def begin(self) -> None:
        """Begin a new pass: whoever was to come back has had the time."""
        for branch in self._emptied:
            branch.lowest_emptied = math.inf
        self._emptied.clear()

    def _chosen(self) -> Iterator[Branch]:
        """Yield the branches on the way to the head that was found last."""
        branch: Source = self._classes
        while isinstance(branch, Branch):
            yield branch
            if branch.first is None:
                return
            branch = branch.first.source

    def free_for(self, node: Node, now: int) -> bool:
        """Tell whether a newcomer at ``node`` would overtake nobody who may go now or next."""
        return self._classes.head(now) is None and all(
            flow.source.head(now) is None for _, flow in self._way(node, self._classes.keys())
        )

    def binding(self, node: Node) -> str | None:
        """Return what holds up who goes next at ``node``, as far as that was found."""
        if node is self._root:
            return self._classes.bound_by
        way = [flow for _, flow in self._way(node, self._classes.keys())]
        here = (flow.source.bound_by for flow in way if flow.child is node)
        above = (flow.held_by for flow in reversed(way))
        return next(filter(None, (*here, *above)), None)

    def rouse(self, node: Node) -> None:
        """Look again at those who sleep at ``node`` or above: something has changed there."""
        for branch, flow in self._way(node, self._classes.keys()):
            branch.rouse(flow)

    def rouse_all(self) -> None:
        """Look at all again: limits have changed."""
        self._classes.rouse_all()

    def disband(self) -> None:
        """Have nobody compete any more: this loop serves them no longer."""
        self._classes.disband()

    def _way(self, node: Node, priorities: tuple[object, ...]) -> Iterator[tuple[Branch, Flow]]:
        """Yield the flows from the top to ``node`` in which somebody waits, and who chooses them."""
        for priority in priorities:
            branch: Branch = self._classes
            for key in (priority, *reversed(node.below_root)):
                flow = branch.find(key)
                if flow is None:
                    break
                yield branch, flow
                assert isinstance(flow.source, Branch)
                branch = flow.source

    def _class(self, priority: int) -> Branch:
        root = self._root
        return self._branch(self._classes, priority, root, priority, root.fairness.classes)

    def _branch(
        self, branch: Branch, key: object, node: Node, priority: int, shares: dict[int, Share]
    ) -> Branch:
        """Return the branch of ``node`` in ``branch``, made if nobody waits in it yet."""
        flow = branch.find(key)
        if flow is None:
            clock = node.fairness.clocks.setdefault(priority, VirtualClock())
            source = Branch(node, clock, self._tight)
            share = shares.setdefault(priority, Share(node.weight))
            branch.add(key, source, share, child=node if key is node else None)
            return source
        assert isinstance(flow.source, Branch)
        return flow.source
