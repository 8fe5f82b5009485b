"""What a transport knows about one limiter: what calls cost there, and what its provider said."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asyncbucket.core.cost import Cost
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import effective_limiter, in_force
from asyncbucket.core.limiter import Limiter
from asyncbucket.http.attempt import Attempt
from asyncbucket.providers.forecast import OutputForecast
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.profiles import Call, Profile
from asyncbucket.providers.refusals import Refusals
from asyncbucket.providers.request import replies_of, reports_own_usage

if TYPE_CHECKING:
    from asyncbucket.core.limits import Limit


class Lane:
    """Stand between a transport and one limiter.

    Args:
        limiter: what admits the calls.
        paused_limiter: the one that a refusal pauses.
        learn: whether to read what headers say.
    """

    __slots__ = (
        "_forecast",
        "_refusals",
        "_settles_by_profile",
        "header_reader",
        "limiter",
    )

    def __init__(self, limiter: Limiter, *, paused_limiter: Limiter, learn: bool) -> None:
        self.limiter = limiter
        self.header_reader = HeaderReader(limiter, learn=learn)
        self._refusals = Refusals(paused_limiter)
        self._forecast = OutputForecast()
        #: For each profile: the limits when last looked at, and whether the profile settles any.
        self._settles_by_profile: dict[int, tuple[Profile, tuple[Limit, ...], bool]] = {}

    def foresee(self) -> int:
        """Return the tokens that a reply probably stays under, judged by the latest ones."""
        return self._forecast.foresee()

    def price(self, call: Call, profile: Profile) -> tuple[Call, Cost | None]:
        """Return ``call`` as it is priced, and its cost, or None if it needs no admission."""
        self.header_reader.expect(profile)
        cost = profile.cost(call)
        if cost is None:
            return call, None
        excess = self._excess(cost)
        if excess:  # a mere forecast must not make a call impossible
            original = call
            for replies in (replies_of(call.body), 1):  # a profile may count one forecast for all
                call = replace(original, foreseen=max(0, original.foreseen - -(-excess // replies)))
                cost = profile.cost(call)
                if cost is None or not self._excess(cost):
                    break
        return call, cost

    def _excess(self, cost: Cost) -> int:
        """Return by how much ``cost`` exceeds what any limit can ever admit."""
        excess, amounts = 0, cost._amounts  # noqa: SLF001 - looked at for each request
        for limit in in_force(effective_limiter(self.limiter)):
            excess = max(excess, amounts.get(limit.resource, 0) - limit.amount)
        return excess

    def attempt(self, lease: Lease, call: Call, profile: Profile) -> Attempt:
        """Return the attempt that ``lease`` was taken for; it leaves now."""
        if lease.waited:  # the loop may have been busy since the admission
            lease.sent()
        return Attempt(
            lease,
            call,
            profile,
            header_reader=self.header_reader,
            refusals=self._refusals,
            forecast=self._forecast,
            now=self.limiter.now,
            settles=reports_own_usage(call.method, call.path) and self._settles_any_limit(profile),
        )

    def _settles_any_limit(self, profile: Profile) -> bool:
        limits = in_force(effective_limiter(self.limiter))
        known = self._settles_by_profile.get(id(profile))
        if known is None or known[1] is not limits:
            settles = any(limit.resource in profile.settles for limit in limits)
            self._settles_by_profile[id(profile)] = known = profile, limits, settles
        return known[2]


def acquire_keywords(cost: Cost) -> dict[str, Any]:
    """Return a cost as keywords, which `Limiter.acquire` handles faster."""
    return {"requests": 0, "input_tokens": 0, "output_tokens": 0, **cost._amounts}  # noqa: SLF001
