"""What a limiter did so far: frozen snapshots."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncbucket.limits import Limit


@dataclass(frozen=True, slots=True)
class Waits:
    """Sum up the calls that waited for one resource."""

    count: int
    #: Seconds, all of them together.
    seconds: float


@dataclass(frozen=True, slots=True)
class LimitUse:
    """Show one limit at one instant."""

    limit: Limit
    #: Units booked within the window, debts included.
    used: int
    #: Units that could pass now; negative while a debt is paid off.
    available: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """Show a limiter at one instant; counts run from its making."""

    name: str
    #: Calls that passed.
    admitted: int
    #: Calls turned away: no room, too long a wait, a full queue, or a cost that can never pass.
    refused: int
    #: Calls that gave up while they waited.
    cancelled: int
    #: Calls that wait now.
    waiting: int
    #: Leases not yet released.
    in_flight: int
    #: Slots in all, or None without a cap on concurrency.
    concurrency: int | None
    #: Seconds until the end of a pause, else 0.
    paused: float
    #: Refusals (429) that the provider sent all the same.
    upstream_429: int
    #: Calls that passed without a slot because every slot was held on a blocked event loop.
    overridden: int
    #: How many calls waited, and how long, by what bound them.
    waits: Mapping[str, Waits] = field(default_factory=dict)
    #: Units given back by settling, by resource.
    refunded: Mapping[str, int] = field(default_factory=dict)
    limits: tuple[LimitUse, ...] = ()
