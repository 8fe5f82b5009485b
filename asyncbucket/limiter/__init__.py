"""Many limits, one admission: what people type, and how their calls get in and out.

A call comes through `limiter` (what people type; `steering` is the rest of it) as an `acquisition`,
passes a `door` (at once, in turn, or not at all) under the limits of an `account` (in force, with
what they count), and holds a `lease` until it is over. Who next among those that wait, and when, is
the machine's business: `asyncbucket.budget`, `asyncbucket.pacer` and what they ask.
"""

from asyncbucket.limiter.lease import Lease
from asyncbucket.limiter.limiter import Limiter
from asyncbucket.limiter.pace import pace

__all__ = ["Lease", "Limiter", "pace"]
