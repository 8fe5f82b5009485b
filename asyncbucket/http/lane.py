"""What a transport knows of one limiter: what calls cost there, and what its provider said."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asyncbucket.cost import Cost
from asyncbucket.http.attempt import Attempt
from asyncbucket.http.body import may_use, replies_of
from asyncbucket.http.forecast import OutputForecast
from asyncbucket.http.learn import Ear
from asyncbucket.http.profiles import Call, Profile
from asyncbucket.http.refusals import Refusals
from asyncbucket.limiter import Limiter
from asyncbucket.limiter.lease import Lease
from asyncbucket.limiter.levels import asked, in_force

if TYPE_CHECKING:
    from asyncbucket.limits import Limit


class Lane:
    """Stand between a transport and one limiter.

    Args:
        limiter: what admits the calls.
        pauses: what a refusal pauses.
        learn: whether to hear what headers say.
    """

    __slots__ = (
        "_forecast",
        "_refusals",
        "_settles",
        "ear",
        "limiter",
    )

    def __init__(self, limiter: Limiter, *, pauses: Limiter, learn: bool) -> None:
        self.limiter = limiter
        self.ear = Ear(limiter, learn=learn)
        self._refusals = Refusals(pauses)
        self._forecast = OutputForecast()
        #: For each profile, the limits when they were last looked at, and whether it settles any.
        self._settles: dict[int, tuple[Profile, tuple[Limit, ...], bool]] = {}

    def foresee(self) -> int:
        """Return the tokens that a reply probably stays under, to judge by the last ones."""
        return self._forecast.foresee()

    def price(self, call: Call, profile: Profile) -> tuple[Call, Cost | None]:
        """Return what ``call`` costs, None for no admission; and the call as it is priced."""
        self.ear.expect(profile)
        cost = profile.cost(call)
        if cost is None:
            return call, None
        excess = self._excess(cost)
        if excess:  # what is only foreseen must not make a call impossible
            whole = call
            for replies in (replies_of(call.body), 1):  # a profile may foresee one for all of them
                call = replace(whole, foreseen=max(0, whole.foreseen - -(-excess // replies)))
                cost = profile.cost(call)
                if cost is None or not self._excess(cost):
                    break
        return call, cost

    def _excess(self, cost: Cost) -> int:
        """Return by how much ``cost`` is more than what any limit can ever admit."""
        excess, amounts = 0, cost._amounts  # noqa: SLF001 - looked at for each request
        for limit in in_force(asked(self.limiter)):
            excess = max(excess, amounts.get(limit.resource, 0) - limit.amount)
        return excess

    def attempt(self, lease: Lease, call: Call, profile: Profile) -> Attempt:
        """Return the attempt that ``lease`` was taken for, which leaves now."""
        if lease.waited:  # since the admission, the loop may have been busy with others
            lease.sent()
        return Attempt(
            lease,
            call,
            profile,
            ear=self.ear,
            refusals=self._refusals,
            forecast=self._forecast,
            now=self.limiter.now,
            settles=may_use(call.method, call.path) and self._is_settled(profile),
        )

    def _is_settled(self, profile: Profile) -> bool:
        limits = in_force(asked(self.limiter))
        known = self._settles.get(id(profile))
        if known is None or known[1] is not limits:
            settles = any(limit.resource in profile.settles for limit in limits)
            self._settles[id(profile)] = known = profile, limits, settles
        return known[2]


def parts(cost: Cost) -> dict[str, Any]:
    """Return a cost as keywords, which `Limiter.acquire` takes faster."""
    return {"requests": 0, "input_tokens": 0, "output_tokens": 0, **cost._amounts}  # noqa: SLF001
