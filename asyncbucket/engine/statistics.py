"""What a limiter has done so far: frozen snapshots."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.wording import counted, in_seconds, with_verb, written, written_out


@dataclass(frozen=True, slots=True)
class Waits:
    """Sum up the calls that waited for one resource."""

    count: int
    #: Seconds in total.
    seconds: float


@dataclass(frozen=True, slots=True)
class Belief:
    """Show how the provider counts a limit, as far as its replies have shown."""

    #: "bucket", or "window" (any, or the clock's), if that is proven.
    kind: str | None
    #: Units that it accepts at once: those that a bucket holds, or that the window admits; if
    #: nothing is proven, those that were not refused.
    size: int
    #: Units that it gives back in a window.
    rate: int
    #: Since when that is believed, in seconds of the limiter's clock.
    since: float
    #: How many replies had shown it; if nothing is proven, how many waves of refusals.
    learned_from: int
    #: Units in a window that it announces, if fewer than the limit: only those pass.
    announced: int | None = None

    def words(self, limit: Limit) -> str:
        """Return a sentence about ``limit``."""
        span, rate = f"{written_out(limit.per)} s", written(self.rate, limit.resource)
        size, says = counted(self.size, limit.resource), ""
        if self.announced is not None:
            says = f"the provider announces {counted(self.announced, limit.resource)} per {span}"
        if not self.learned_from:
            return says
        source = "replies" if self.kind else "waves of refusals"
        how = {
            "bucket": f"counts by a bucket of {size}, refilled at {rate} per {span}",
            "window": f"counts {size} in each {span}, not by a bucket",
            None: f"accepts {size} at once and {rate} per {span}",
        }[self.kind]
        learned = f"the provider {how}; learned from {counted(self.learned_from, source)}"
        return f"{says}; {learned}" if says else learned


@dataclass(frozen=True, slots=True)
class LimitUse:
    """Show one limit at one instant; units of ``usd`` are micro-dollars."""

    limit: Limit
    #: Units booked within the window, debts included.
    used: int
    #: Units that could pass now; negative while a debt is paid off.
    available: int
    #: Seconds until it resets by the calendar; None if it does not.
    resets_in: float | None = None
    #: How the provider counts it, if its replies have shown that.
    belief: Belief | None = None


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Sum up what replies say of the provider's prompt cache."""

    #: Calls that read a part of their prompts from it, and calls that wrote one to it.
    reads: int = 0
    writes: int = 0
    #: Tokens that were read, and that no limit counted therefore.
    saved_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AgentKind:
    """Show what is known of one kind of agents at a limiter."""

    running: int
    #: Finished runs that are remembered.
    known: int
    #: Their mean use, in seconds of the limits; that of all kinds if there are none; or None.
    size: float | None


@dataclass(frozen=True, slots=True)
class AgentStatistics:
    """Show the agents of a limiter at one instant: see `asyncbucket.agent`."""

    #: Agents that have made a call here and are not over, and those that ended well.
    running: int
    finished: int
    kinds: Mapping[str | None, AgentKind]


@dataclass(frozen=True, slots=True)
class MemberState:
    """Show whether a member of a pool is given calls."""

    #: The name of its limiter.
    name: str
    #: Why the pool leaves it out, or did so last; None if it never has.
    reason: str | None
    #: For how long yet (s), at most: while one call finds out whether it works again, until it ends.
    #: 0 if it is in use.
    left_out: float

    def __str__(self) -> str:
        if not self.left_out:
            before = "" if self.reason is None else f", after a failure ({self.reason})"
            return f"{self.name!r}: in use{before}"
        return f"{self.name!r}: left out for {in_seconds(self.left_out)} more ({self.reason})"


@dataclass(frozen=True, slots=True)
class ShadowStatistics:
    """Show what a limiter in shadow would have done with its calls so far."""

    calls: int
    #: Calls that would have waited; and seconds of waiting, as a mean over all calls.
    would_wait: int
    mean_wait: float
    #: Calls that would have failed: a cost above a limit, a full queue, a wait beyond the deadline.
    would_fail: int
    #: Refusals (429) that would not have happened, of all that did.
    prevented: int
    refusals: int
    #: How many calls would have waited, and how long, by what held them up.
    waits: Mapping[str, Waits] = field(default_factory=dict)

    def __str__(self) -> str:
        fails = f"; {self.would_fail:,} would have failed" if self.would_fail else ""
        return (
            f"{self.would_wait:,} of {self.calls:,} calls would have waited, {self.mean_wait:,.1f} s per "
            f"call on average{fails}; {self.prevented:,} of {self.refusals:,} refusals would have been "
            f"prevented"
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """Show a limiter at one instant; counts begin when it was made."""

    name: str
    #: Calls admitted.
    admitted: int
    #: Calls refused: no room, too long a wait, a full queue, or a cost that can never pass.
    refused: int
    #: Calls that gave up while they waited.
    cancelled: int
    #: Calls that wait now.
    waiting: int
    #: Leases not yet released.
    in_flight: int
    #: Slots in all; None if concurrency is not limited.
    concurrency: int | None
    #: Seconds until a pause ends; 0 if there is none.
    paused: float
    #: Refusals (429) that the provider sent nevertheless.
    upstream_429: int
    #: Calls that passed without a slot because every slot was held on a blocked event loop.
    overridden: int
    #: How many calls waited, and how long, by what held them up.
    waits: Mapping[str, Waits] = field(default_factory=dict)
    #: Units given back by settling, by resource.
    refunded: Mapping[str, int] = field(default_factory=dict)
    #: How much of each limit is used, without the limits of the limiters above.
    limits: tuple[LimitUse, ...] = ()
    #: What holds up the first call in line now; None if nobody waits.
    bound_by: str | None = None
    #: The agents that call this limiter itself; None if there were none.
    agents: AgentStatistics | None = None
    #: What it would have done, if it is in shadow.
    shadow: ShadowStatistics | None = None
    #: How the provider's prompt cache was used.
    cache: CacheUse = CacheUse()
    #: Those of a pool's members.
    members: "tuple[Statistics, ...]" = ()

    def __str__(self) -> str:
        waits = ", ".join(
            f"{each.count:,} for {name} ({each.seconds:,.1f} s)"
            for name, each in self.waits.items()
        )
        most = "" if self.concurrency is None else f" of {self.concurrency:,}"
        bound = self.bound_by not in {None, "paused"}  # a pause is mentioned below
        binds = f" ({with_verb(str(self.bound_by), 'bind')})" if bound else ""
        facts = [
            f"{self.admitted:,} admitted",
            f"{self.waiting:,} waiting{binds}",
            f"{self.in_flight:,}{most} in flight",
            f"{self.refused:,} refused",
            f"{self.cancelled:,} cancelled",
            f"{self.upstream_429:,} upstream 429s",
            f"{self.cache.saved_tokens:,} tokens read from the prompt cache"
            if self.cache.saved_tokens
            else "",
            f"paused for {in_seconds(self.paused)} more" if self.paused else "",
            f"waited so far: {waits}" if waits else "",
            f"in shadow: {self.shadow}" if self.shadow else "",
        ]
        used = map(_in_words, () if self.members else self.limits)
        members = "".join(f"\n  {each}" for each in self.members)
        return f"{self.name}: {'; '.join([', '.join(filter(None, facts)), *used])}{members}"


def _in_words(use: LimitUse) -> str:
    """Say how much is used; with the bucket, if the provider counts by one: only that binds."""
    belief = use.belief
    how = f" (by a bucket of {belief.size:,})" if belief and belief.kind == "bucket" else ""
    return f"{written(use.used, use.limit.resource)} of {use.limit} used{how}"


def shares_used(now: Statistics) -> dict[str, float]:
    """Return the used fraction of each limit, and of the slots, by the labels that metrics have.

    Limits of one label, which a pool's members may have, count together.
    """
    sums: dict[str, tuple[int, int]] = {}
    for use in now.limits:
        used, units = sums.get(use.limit.label, (0, 0))
        sums[use.limit.label] = used + use.used, units + use.limit.units
    shares = {label: used / units for label, (used, units) in sums.items()}
    if now.concurrency:
        shares["concurrency"] = now.in_flight / now.concurrency
    return shares
