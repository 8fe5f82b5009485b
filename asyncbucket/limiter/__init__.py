"""Many limits, one admission: what people type, and how their calls get in and out.

A call comes through `limiter` (what people type; the rest of it is in `steering`) as an
`acquisition`, passes a `door` (at once, in turn, or not at all) under the limits of an `account`
(those in force, with their meters), and holds a `lease` until it is over. Which of the waiting
calls goes next, and when, is decided by the machine: `asyncbucket.budget`, `asyncbucket.pacer` and
the modules they use.
"""

from asyncbucket.limiter.lease import Lease
from asyncbucket.limiter.limiter import Limiter
from asyncbucket.limiter.pace import pace

__all__ = ["Lease", "Limiter", "pace"]
