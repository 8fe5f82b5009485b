"""Who goes next among all waiters of one loop: branches, from the root's priorities to the lines."""

import math
from collections.abc import Callable, Iterator
from typing import Final

from asyncbucket.core.branch import Branch, Flow, PriorityClasses, Source
from asyncbucket.core.node import Node
from asyncbucket.core.queue import EMPTY, Line, Waiter
from asyncbucket.core.shares import Share, VirtualClock

#: With more flows than this, looking at all takes longer than joining their wake-ups saves.
_MANY: Final = 256


class Tree:
    """Choose among all waiters of one loop, wherever they stand in the tree of limiters."""

    __slots__ = ("_classes", "_emptied", "_pacer", "_root", "_rouse", "_self_bound")

    def __init__(self, root: Node, line: Line, rouse: Callable[[Node], object]) -> None:
        """Take over ``line``, in which calls have waited at the root so far.

        ``rouse`` is called to rouse a node in the trees of all loops.
        """
        self._root = root
        self._pacer = line.pacer
        self._rouse = rouse
        self._emptied: list[Branch] = []
        self._self_bound: set[Flow] = set()
        self._classes = PriorityClasses(root, root.fairness.top_clock, self._self_bound)
        branch = self._branch_of_priority(0)
        branch.add(None, line, root.fairness.line(0))
        branch.living = self._classes.living = len(line)
        line.above = (self._classes, branch)

    def __len__(self) -> int:
        return self._classes.living

    @property
    def calm_until(self) -> int:
        """Until when no flow held up by its own limits may go: such a flow would lose by each delay."""
        if len(self._self_bound) > _MANY:
            return 0
        return min((flow.asleep for flow in self._self_bound), default=EMPTY)

    def waiters(self) -> Iterator[Waiter]:
        """Yield all waiters."""
        return self._classes.waiters()

    @property
    def wake(self) -> int:
        """When a sleeper wakes that may then be the head; `EMPTY` if nobody is left or asleep."""
        return min(branch.wake for branch in self._branches_to_head())

    @property
    def turn(self) -> tuple[float, ...]:
        """What the head found last competes by with the heads of other loops.

        The tag of its priority and that priority, more urgent ones first; then the tags below.
        """
        tags = [branch.first.share.tag for branch in self._branches_to_head() if branch.first]
        priority_flow = self._classes.first
        return () if priority_flow is None else (tags[0], priority_flow.order, *tags[1:])

    @property
    def held_by(self) -> str | None:
        """What held up, below the root, the flows on the way to the head found last."""
        held = (branch.first.held_by for branch in self._branches_to_head() if branch.first)
        return next(filter(None, held), None)

    def line(self, node: Node, priority: int) -> Line:
        """Return the line of a node and a priority, in which somebody is about to stand."""
        branch = self._branch_of_priority(priority)
        above = [self._classes, branch]
        for level in reversed(node.below_root):
            branch = self._branch(branch, level, level, priority, level.fairness.shares)
            above.append(branch)
        flow = branch.find(None)
        if flow is None:
            made = Line(node, self._pacer, priority)
            flow = branch.add(None, made, node.fairness.line(priority))
        line = flow.source
        assert isinstance(line, Line)
        line.above = tuple(above)
        if not line:
            for chooser, wanted in self._flows_to(node, (priority,)):
                chooser.reactivate(wanted)
            branch.reactivate(flow)
        return line

    def join(self, waiter: Waiter, now: int, node: Node, priority: int) -> None:
        """Append ``waiter`` to the line of its node and priority; it may be entitled to go next."""
        for below in node.below_root:
            below.waiting_below_root += 1
        self.line(node, priority).join(waiter, now)
        self._pacer.ring_locked()

    def head(self, now: int, *, slotless: int = 0) -> Waiter | None:
        """Return the next waiter, as far as the limits below the root are concerned."""
        return self._classes.head(now, slotless=slotless)

    def served(self, head: Waiter, now: int) -> None:
        """Remove ``head``, which `head` returned and which passed, from its line; charge for it."""
        self._classes.served(head, now)
        if not head.line:
            self._emptied.extend(
                branch for branch in self._branches_to_head() if branch.lowest_emptied < math.inf
            )
        if head.node.is_below_child:
            self._rouse(head.node)

    @property
    def expects_caller(self) -> bool:
        """Whether the head that was found should first wait for another caller to come back."""
        return bool(self._emptied) and any(
            branch.first is not None and branch.first.share.tag > branch.lowest_emptied
            for branch in self._branches_to_head()
        )

    def begin_pass(self) -> None:
        """Begin a new pass: callers that were expected back have had their time."""
        for branch in self._emptied:
            branch.lowest_emptied = math.inf
        self._emptied.clear()

    def _branches_to_head(self) -> Iterator[Branch]:
        """Yield the branches on the way to the head found last."""
        branch: Source = self._classes
        while isinstance(branch, Branch):
            yield branch
            if branch.first is None:
                return
            branch = branch.first.source

    def is_free_for(self, node: Node, now: int) -> bool:
        """Tell whether a newcomer at ``node`` would overtake nobody that may go now or next."""
        return self._classes.head(now) is None and all(
            flow.source.head(now) is None for _, flow in self._flows_to(node, self._classes.keys())
        )

    def binding(self, node: Node) -> str | None:
        """Return what last held up the head at ``node``, if that is known."""
        if node is self._root:
            return self._classes.bound_by
        flows = [flow for _, flow in self._flows_to(node, self._classes.keys())]
        here = (flow.source.bound_by for flow in flows if flow.child is node)
        above = (flow.held_by for flow in reversed(flows))
        return next(filter(None, (*here, *above)), None)

    def rouse(self, node: Node) -> None:
        """Wake the sleepers at ``node`` and above, because something has changed there."""
        for branch, flow in self._flows_to(node, self._classes.keys()):
            branch.rouse(flow)

    def rouse_all(self) -> None:
        """Wake all sleepers, because limits have changed."""
        self._classes.rouse_all()

    def disband(self) -> None:
        """End all competition: this loop no longer serves them."""
        self._classes.disband()

    def _flows_to(
        self, node: Node, priorities: tuple[object, ...]
    ) -> Iterator[tuple[Branch, Flow]]:
        """Yield the flows from the top to ``node`` in which somebody waits, each with its branch."""
        for priority in priorities:
            branch: Branch = self._classes
            for key in (priority, *reversed(node.below_root)):
                flow = branch.find(key)
                if flow is None:
                    break
                yield branch, flow
                assert isinstance(flow.source, Branch)
                branch = flow.source

    def _branch_of_priority(self, priority: int) -> Branch:
        root = self._root
        return self._branch(self._classes, priority, root, priority, root.fairness.classes)

    def _branch(
        self, branch: Branch, key: object, node: Node, priority: int, shares: dict[int, Share]
    ) -> Branch:
        """Return the branch of ``node`` within ``branch``, made if nobody waits in it yet."""
        flow = branch.find(key)
        if flow is None:
            clock = node.fairness.clocks.setdefault(priority, VirtualClock())
            source = Branch(node, clock, self._self_bound)
            share = shares.setdefault(priority, Share(node.weight))
            branch.add(key, source, share, child=node if key is node else None)
            return source
        assert isinstance(flow.source, Branch)
        return flow.source
