"""What a transport makes of a request: its limiter, its profile, and what it costs."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asyncbucket.core.levels import effective_limiter, in_force, provider_of
from asyncbucket.core.limiter import Limiter
from asyncbucket.http.routes import Routes, Routing
from asyncbucket.providers.forecast import OutputForecast, price
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.profiles import Call, Profile, profile_named, profile_of
from asyncbucket.providers.refusals import Refusals
from asyncbucket.providers.request import read_json

if TYPE_CHECKING:
    from asyncbucket.core.cost import Cost

#: A request's lane, the call, its profile, and its cost; None if it needs no admission.
PricedRequest: TypeAlias = "tuple[Lane, Call, Profile, Cost | None]"

#: How many routes are remembered.
_MAX_REMEMBERED: Final = 256


class Lane:
    """What a transport knows about one limiter.

    Args:
        limiter: what admits the calls.
        paused_limiter: the one that a refusal pauses.
        learn: whether to read what headers say.
    """

    __slots__ = ("forecast", "header_reader", "limiter", "refusals")

    def __init__(self, limiter: Limiter, *, paused_limiter: Limiter, learn: bool) -> None:
        self.limiter = limiter
        self.header_reader = HeaderReader(limiter, learn=learn)
        self.refusals = Refusals(paused_limiter)
        self.forecast = OutputForecast()

    def settles_any_limit(self, profile: Profile) -> bool:
        """Tell whether a reply's usage corrects any limit in force."""
        limits = in_force(effective_limiter(self.limiter))
        return any(limit.resource in profile.settles for limit in limits)


class RequestReader:
    """Read the requests of one transport.

    Args:
        limiter: the limiter for requests that no route matches.
        profile: a provider's name or a profile; None finds it by the host.
        learn: whether headers are read.
        routes: see `Routes`.

    Raises:
        ValueError: ``profile`` or a route cannot be understood.
        TypeError: likewise.
    """

    __slots__ = ("_default_lane", "_fixed_profile", "_lanes", "_learn", "_routes")

    def __init__(
        self,
        limiter: Limiter,
        *,
        profile: Profile | str | None,
        learn: bool,
        routes: Routing | None,
    ) -> None:
        self._fixed_profile = profile_named(profile) if isinstance(profile, str) else profile
        priced = callable(getattr(self._fixed_profile, "cost", None))
        if isinstance(profile, type) or not (profile is None or priced):
            raise TypeError(f"profile must be a provider's name or a Profile, not {profile!r}")
        self._learn = learn
        self._default_lane = Lane(limiter, paused_limiter=provider_of(limiter), learn=learn)
        self._routes = None if routes is None else Routes(limiter, routes)
        self._lanes: dict[Limiter, Lane] = {limiter: self._default_lane}

    def read(self, request: Any, *, teaches: bool) -> PricedRequest:
        """Return a request's lane, the call as its profile sees it, the profile, and the cost."""
        url = request.url
        try:
            content: bytes | None = request.content
        except RuntimeError:  # still to be streamed, so it is left alone
            content = None
        lane, host = self._default_lane, url.host
        call = Call(request.method, host, url.path, read_json(content), lane.forecast.foresee())
        if self._routes is not None:
            lane = self._lane_of(self._routes.of(call))
            call = replace(call, foreseen=lane.forecast.foresee())
        profile = self._fixed_profile or profile_of(host)
        if teaches:
            lane.header_reader.expect(profile)
        return lane, *price(call, profile, in_force(effective_limiter(lane.limiter)))

    def _lane_of(self, limiter: Limiter) -> Lane:
        lane = self._lanes.get(limiter)
        if lane is None:
            if len(self._lanes) >= _MAX_REMEMBERED:  # tenants, perhaps
                self._lanes = {self._default_lane.limiter: self._default_lane}
            lane = self._lanes[limiter] = Lane(limiter, paused_limiter=limiter, learn=self._learn)
        return lane
