"""Who goes next among several: the children of a limiter, and priorities.

The calls that wait form a tree, like the limiters at which they wait. Its leaves are lines, first
come, first served: one for each limiter's own calls. A limiter's `Branch` holds its own line and
the branches of its children, and chooses among them by start-time fair queueing (Goyal, Vin and
Cheng, SIGCOMM 1996). Each competitor has a tag, the virtual time at which its next call may start.
The lowest tag goes first, and grows by the call's price divided by the weight. So competitors are
served in proportion to their weights, measured in cost, not in calls. What one does not want goes
to the others at once; an idle child saves nothing up and loses nothing.

The price of a call is the largest part that it takes of any limit of the node or above it, in
seconds (`Prices`). It is worked out from what was reserved; settling corrects the tag.

A newcomer starts at the node's virtual time: in the paper, the start tag of the call served last.
But while newcomers keep coming, each would start at that same time, and go before the one just
served, whose tag is higher. So virtual time also moves by itself. Each call that is served adds its
price, divided by the weights of all competitors, to a *potential*: the tag that each would have if
all were served at once. Virtual time follows the potential at a distance: the prices of the
competitors' last calls, divided likewise, because the one just served may be that far ahead. (A
distance of the largest price ever would stop virtual time for long after a costly call, while
newcomers with small calls go before all who wait.)

A child held up by its own limits is no candidate. It sleeps until its meters say when, and holds up
nobody. When it wakes, it is treated as if it had been idle, except for one call: it keeps as much
of its share as its last call cost, and so goes next. Otherwise a child that may call every few
seconds would wait for its turn each time, and count the next seconds only from then: it would get
far less than its own limit and than its share. The head may still have to wait for the limits of
the node itself. Then only calls entitled to go before it may overtake, and virtual time bounds
that.

Many callers make one call after the other. When it has passed, their line is empty, but they are
back in the loop's next iteration. A flow that a pass has emptied, and that would be next if its
caller came back, gets that iteration before a higher tag is served (`Tree.expects_caller`).
Otherwise those that queue calls ahead would get its share.

Above all this stand the priorities. There is one such tree for each, and they compete by the same
rule, each with eight times the weight of the next below. So an urgent call that comes alone is
next, up to eight in a row may be, and a priority that is always outbid still gets its share: beside
n more urgent ones, at least 1 / (1 + 8 + ... + 8^n) of the limit.

Each loop has a tree of its own. The tags, the virtual times and the count of competitors are common
to all: the tags on the way from the root to its head decide which loop is next.
"""

from collections.abc import Iterable
from typing import Final

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Amounts

#: The ratio of the weights of neighbouring priorities among those that wait.
STEP: Final = 8.0
#: Windows more than this many times longer than the shortest do not affect who goes next.
_LONG: Final = 100


class Prices:
    """Know what part, in seconds, a call takes of each of some limits; the largest is its price.

    6,000 tokens of 60,000 a minute are six seconds. Of several limits of one resource, the fastest
    counts, because it binds from call to call; limits over a day do not count beside limits over a
    minute. Without any limit a call costs one.
    """

    __slots__ = ("_seconds",)

    def __init__(self, limits: Iterable[Limit]) -> None:
        limits = tuple(limits)
        shortest = min((limit.per for limit in limits), default=0)
        #: For each resource that counts, how many seconds one unit costs.
        self._seconds: dict[str, float] = {}
        for limit in limits:
            if limit.per <= _LONG * shortest:
                seconds = limit.per / limit.amount
                earlier = self._seconds.get(limit.resource, seconds)
                self._seconds[limit.resource] = min(seconds, earlier)

    def of(self, amounts: Amounts) -> float:
        """Return the price of a call of ``amounts``."""
        price = 0.0
        for resource, seconds in self._seconds.items():
            price = max(price, amounts.get(resource, 0) * seconds)
        return price if self._seconds else 1.0


class Share:
    """One competitor's account of virtual time, over all loops."""

    __slots__ = ("_credit", "counted", "loops", "price", "tag", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        #: On how many loops it competes, and the weight it is counted with there.
        self.loops = 0
        self.counted = 0.0
        #: The virtual time at which its next call may start.
        self.tag = 0.0
        #: What its last call cost.
        self.price = 0.0
        self._credit = 0.0

    def join(self, virtual: float, *, kept: float = 0.0) -> None:
        """Compete again after being idle: what was not used then is lost, except ``kept``."""
        self.tag = max(self.tag - self._credit, virtual - kept)
        self._credit = 0.0

    def charge(self, step: float) -> None:
        """Pay for a call, first with what came back from earlier ones."""
        step -= self._credit
        self._credit = max(0.0, -step)
        self.tag += max(0.0, step)

    def correct(self, step: float) -> None:
        """Credit ``step``, by which earlier calls used less than they paid for."""
        self._credit += step


class VirtualClock:
    """Keep the virtual time at which newcomers start, by the weights of those that compete."""

    __slots__ = ("_potential", "_prices", "_weights", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._potential = 0.0
        #: Totals of all that compete, on any loop; each counts once, with its last call's price.
        self._weights = self._prices = 0.0

    def enter(self, share: Share) -> None:
        """Let ``share`` compete on one more loop."""
        share.loops += 1
        if share.loops == 1:
            share.counted = share.weight
            self._weights += share.counted
            self._prices += share.price

    def leave(self, share: Share) -> None:
        """Let ``share`` compete on one loop fewer."""
        share.loops -= 1
        if not share.loops:
            self._weights -= share.counted
            self._prices -= share.price

    def weigh(self, share: Share) -> float:
        """Return the total weight of all that compete, with the current weight of ``share``."""
        self._weights += share.weight - share.counted
        share.counted = share.weight
        return max(self._weights, share.counted)  # sums of floats drift

    def advance(self, share: Share, price: float, *, weights: float) -> None:
        """Serve ``share``, a competitor, with a call of ``price``; ``weights`` is the total weight."""
        self._prices += price - share.price
        share.price = price
        if share.tag > self.now:
            self.now = self._potential = share.tag
        self._potential += price / weights
        self.now = max(self.now, self._potential - self._prices / weights)


class Fairness:
    """Keep the shares and virtual clocks of a node at which somebody has waited, by priority."""

    __slots__ = ("classes", "clocks", "lines", "shares", "top_clock")

    def __init__(self) -> None:
        #: The node's shares of its parent, and the shares of its own calls in itself.
        self.shares: dict[int, Share] = {}
        self.lines: dict[int, Share] = {}
        self.clocks: dict[int, VirtualClock] = {}
        #: At the root, the shares of the priorities, and their clock.
        self.classes: dict[int, Share] = {}
        self.top_clock = VirtualClock()

    def line(self, priority: int) -> Share:
        """Return the share of the node's own calls of this priority."""
        return self.lines.setdefault(priority, Share(1.0))
