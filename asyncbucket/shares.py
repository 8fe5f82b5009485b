"""Who goes next among several: the children of a limiter, and priorities.

The calls that wait form a tree, like the limiters at which they wait. At the leaves stand lines,
first come, first served: those of a limiter's own calls. A limiter's `Branch` holds its own line and
the branches of its children, and chooses among them by start-time fair queueing (Goyal, Vin and
Cheng, SIGCOMM 1996): each has a tag, the virtual time at which its next call may start; the lowest
goes first, and grows by the price of the call over the weight. So whoever has something waiting is
served in proportion to its weight, in cost, not in calls; what one does not want goes to the others,
at once; an idle child saves nothing up and loses nothing.

The price of a call is the largest part that it takes of any limit of the node or above it, in
seconds (`Prices`). It is what was reserved; settling corrects the tag.

Whoever comes anew starts at the node's virtual time: in the paper, the tag at which the call that was
served last started. While newcomers keep coming, each would start at that same time, and go before
whoever was just served, whose tag is higher. So virtual time moves by itself, too: each call that is
served adds its price, divided by the weights of all who compete, to a *potential*, the tag that each
would have if all were served at once. Virtual time follows that, one call behind: the last of each of
those who compete, divided likewise, for so far may whoever was just served be ahead. (The largest that
there ever was would stop it long after, while newcomers with small calls go before all who wait.)

A child that is out of its own limits is no candidate. It sleeps until its meters say when, and holds
up nobody; when it wakes it is as if it had been idle, but for one call: as much as its last one it has
not lost of its share, and goes next by that. Else a child that may call every few seconds would wait for
its turn each time, and count the next seconds only from then: far less than its own limit and than its
share. Whoever goes next may still have to wait for the limits of the node itself; only who is entitled
to go before may overtake then, and that is bounded by virtual time.

Many callers ask one call after the other: when theirs has passed they are gone, and back in the
loop's next turn. Whoever was emptied by a pass, and would be next if it came back, gets that turn
before somebody with a higher tag is served (`Tree.expects`). Or the patient would get the share of
the busy.

Above all that stand the priorities: there is such a tree for each, and they compete by the same
rule, with a weight that is eight times that of the next below. So an urgent call that comes alone is
next, eight in a row may be, and a class that is always outbid has its share all the same: beside n
that are more urgent at least 1 / (1 + 8 + ... + 8^n) of the limit.

Several loops have a tree each, and in common the tags, the virtual times and the count of those who
compete: the tags on the way from the root to its head say which loop is next.
"""

from collections.abc import Iterable
from typing import Final

from asyncbucket.limits import Limit
from asyncbucket.meters import Amounts

#: How many times the weight of a priority is that of the next below among those that wait.
STEP: Final = 8.0
#: Windows so many times longer than the shortest say nothing about who goes next.
_LONG: Final = 100


class Prices:
    """Tell the largest part, in seconds, that a call takes of any of some limits.

    6,000 tokens of 60,000 a minute are six seconds. Of several limits of a resource the fastest
    counts, for that one binds from call to call; limits over a day say nothing beside those over a
    minute. Without any limit a call costs one.
    """

    __slots__ = ("_seconds",)

    def __init__(self, limits: Iterable[Limit]) -> None:
        limits = tuple(limits)
        shortest = min((limit.per for limit in limits), default=0)
        #: For each resource that counts how many seconds a unit of it costs.
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
    """One claimant's account of virtual time, over all loops."""

    __slots__ = ("_credit", "counted", "loops", "price", "tag", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        #: On how many loops it competes, and with what weight it is counted there.
        self.loops = 0
        self.counted = 0.0
        #: The virtual time at which its next call may start.
        self.tag = 0.0
        #: What its last call cost.
        self.price = 0.0
        self._credit = 0.0

    def join(self, virtual: float, *, kept: float = 0.0) -> None:
        """Want something again, after nothing was wanted: what was not used then, but for ``kept``, is lost."""
        self.tag = max(self.tag - self._credit, virtual - kept)
        self._credit = 0.0

    def charge(self, step: float) -> None:
        """Pay for a call, with what came back from earlier ones first."""
        step -= self._credit
        self._credit = max(0.0, -step)
        self.tag += max(0.0, step)

    def correct(self, step: float) -> None:
        """Hear that earlier calls used so much less than they paid for."""
        self._credit += step


class VirtualClock:
    """Tell the virtual time at which newcomers start, by the weights of those who compete."""

    __slots__ = ("_potential", "_prices", "_weights", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._potential = 0.0
        #: Of all that compete, on whichever loops: each counts once. The prices are of their last calls.
        self._weights = self._prices = 0.0

    def enter(self, share: Share) -> None:
        """Have ``share`` compete on one loop more."""
        share.loops += 1
        if share.loops == 1:
            share.counted = share.weight
            self._weights += share.counted
            self._prices += share.price

    def leave(self, share: Share) -> None:
        """Have ``share`` compete on one loop less."""
        share.loops -= 1
        if not share.loops:
            self._weights -= share.counted
            self._prices -= share.price

    def weigh(self, share: Share) -> float:
        """Return the weights of all that compete, with that of ``share`` as it is by now."""
        self._weights += share.weight - share.counted
        share.counted = share.weight
        return max(self._weights, share.counted)  # a sum of floats that come and go

    def advance(self, share: Share, price: float, *, weights: float) -> None:
        """Serve ``share``, which competes, with a call of that price, beside others of so many weights."""
        self._prices += price - share.price
        share.price = price
        if share.tag > self.now:
            self.now = self._potential = share.tag
        self._potential += price / weights
        self.now = max(self.now, self._potential - self._prices / weights)


class Fairness:
    """Remember the shares and clocks of a node that somebody has waited at, by priority."""

    __slots__ = ("classes", "clocks", "lines", "shares", "top")

    def __init__(self) -> None:
        #: The node's claims on its parent, and those of its own calls on itself.
        self.shares: dict[int, Share] = {}
        self.lines: dict[int, Share] = {}
        self.clocks: dict[int, VirtualClock] = {}
        #: At the root, the claims of the priorities on it, and their clock.
        self.classes: dict[int, Share] = {}
        self.top = VirtualClock()

    def line(self, priority: int) -> Share:
        """Return the claim of the node's own calls of that priority."""
        return self.lines.setdefault(priority, Share(1.0))
