"""What a transport makes of a request: its limiter, its profile, and what it costs.

A key may have limits that differ from model to model and from endpoint to endpoint. Each of these
is a child of the transport's limiter; ``routes=`` decides which one a request is for, by its path
and by the model that it names.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final, NamedTuple, Self, TypeAlias

from asyncbucket.core.cost import Cost
from asyncbucket.core.levels import (
    capped,
    effective_limiter,
    in_force,
    is_under,
    limits_by_way,
    provider_of,
)
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import shown
from asyncbucket.http.bodies import content_of
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.prices import Price, priced
from asyncbucket.providers.profiles import Call, Profile, charge, profile_named, profile_of
from asyncbucket.providers.refusals import Refusals
from asyncbucket.providers.request import OutputForecast, read_json
from asyncbucket.retry import Retrier, Retry

#: A child's name, or the child itself; None for the transport's own limiter.
Target: TypeAlias = str | Limiter | None
#: What people pass as ``routes=``: patterns with wildcards, of which the first match counts, or a
#: function. In a pattern, a path begins with a slash (``"/v1/embeddings"``), anything else is a model
#: (``"gpt-4o*"``), and both may be combined (``"/v1/chat/completions gpt-4o*"``).
Routing: TypeAlias = Mapping[str, Target] | Callable[[Call], Target]
#: A path and a model, each with wildcards, or None for any; and where such calls go.
_Rule: TypeAlias = tuple[str | None, str | None, Target]

#: How many children are remembered.
_MAX_REMEMBERED: Final = 256


class Lane:
    """What a transport knows about one limiter.

    Args:
        limiter: what admits the calls.
        paused_limiter: the one that a refusal pauses.
        learn: whether to read what headers say.
        retry: how its failed calls are retried.
        profiles: if it is a pool, the profile of each member.
    """

    __slots__ = ("at", "forecast", "header_reader", "limiter", "profile", "refusals", "retrier")

    def __init__(
        self,
        limiter: Limiter,
        *,
        paused_limiter: Limiter,
        learn: bool,
        retry: Retry,
        profiles: Mapping[Limiter, Profile],
    ) -> None:
        self.limiter = limiter
        self.header_reader = HeaderReader(limiter, learn=learn)
        self.refusals = Refusals.of(paused_limiter)
        #: None if failed calls are not retried.
        self.retrier = (
            Retrier(retry, paused_limiter, caller=limiter) if retry.attempts > 1 else None
        )
        self.forecast = OutputForecast()
        #: The profile of all requests, if they go to one provider.
        self.profile: Profile | None = None
        #: The same at each member of a pool, to which headers and refusals apply.
        self.at: dict[Limiter, Lane] = {
            member: self._at(member, profile, learn=learn) for member, profile in profiles.items()
        }

    def _at(self, member: Limiter, profile: Profile, *, learn: bool) -> Self:
        lane = copy.copy(self)
        lane.profile, lane.refusals = profile, Refusals.of(member)
        lane.header_reader = HeaderReader(member, learn=learn)
        return lane

    def needs_usage(self, profile: Profile) -> bool:
        """Tell whether a reply's usage corrects a limit in force, or a budget."""
        limits = in_force(effective_limiter(self.limiter))
        return any(limit.resource in profile.settles for limit in limits) or any(
            name.endswith("tokens") for name in capped()
        )


class ReadRequest(NamedTuple):
    """A request as its profile sees it."""

    lane: Lane
    call: Call
    profile: Profile
    #: None if it needs no admission.
    cost: Cost | None
    #: What its model costs; None if nothing counts dollars.
    price: Price | None
    #: Whether the headers of its reply are the provider's.
    teaches: bool

    def at(self, member: Limiter | None) -> "ReadRequest":
        """Return the same as the member of a pool sees it that took the call."""
        if member is None:
            return self
        lane = self.lane.at[member]
        return self._replace(lane=lane, profile=lane.profile or self.profile)


class Lanes:
    """Read the requests of one transport.

    Args:
        limiter: the limiter for requests that no route matches.
        profile: a provider's name or a profile; None finds it by the host.
        learn: whether headers are read.
        retry: how failed calls are retried.
        routes: which child a request is for.
        hosts: if the limiter is a pool, the host of each member.

    Raises:
        ValueError: ``profile`` is not known, a pattern is neither a path nor a model, ``limiter``
            has no child of that name, or a limiter is not below it.
        TypeError: ``profile`` or ``routes`` is of another type, or so is a target.
    """

    def __init__(
        self,
        limiter: Limiter,
        *,
        profile: Profile | str | None,
        learn: bool,
        retry: Retry,
        routes: Routing | None,
        hosts: Mapping[Limiter, str],
    ) -> None:
        self._fixed_profile = profile_named(profile) if isinstance(profile, str) else profile
        if not (profile is None or isinstance(self._fixed_profile, Profile)):
            raise TypeError(f"profile must be a provider's name or a Profile, not {profile!r}")
        self._limiter = limiter
        profiles = {
            member: self._fixed_profile or profile_of(host) for member, host in hosts.items()
        }
        self._new_lane = partial(Lane, learn=learn, retry=retry, profiles=profiles)
        self._default = self._new_lane(limiter, paused_limiter=provider_of(limiter))
        self._by_limiter: dict[Limiter, Lane] = {limiter: self._default}
        self._choose = None if routes is None else self._chooser(routes)

    def read(self, request: Any, *, teaches: bool) -> ReadRequest:
        """Work out what ``request`` costs; ``teaches`` tells whether its headers are the provider's.

        Raises:
            UnknownPrice: something counts dollars, and nobody knows what its model costs.
        """
        url = request.url
        call = Call(request.method, url.host, url.path, read_json(content_of(request)))
        lane = self._default if self._choose is None else self._lane_of(self._choose(call))
        call = replace(call, foreseen=lane.forecast.foresee())
        limits = limits_by_way(effective_limiter(lane.limiter))
        profile: Profile | None = None
        cost: Cost | None = None
        for at in lane.at.values() or (lane,):  # any member may take it: what most charge counts
            theirs = at.profile or self._fixed_profile or profile_of(url.host)
            if teaches:
                at.header_reader.expect(theirs)
            if profile is None:
                profile = theirs
                call, cost = charge(call, profile, limits)
            elif theirs is not profile:
                cost = _higher(cost, charge(call, theirs, limits)[1])
        assert profile is not None
        return ReadRequest(lane, call, profile, *priced(lane.limiter, call, cost), teaches)

    def _lane_of(self, target: Target) -> Lane:
        limiter = self._resolve(target)
        lane = self._by_limiter.get(limiter)
        if lane is None:
            if len(self._by_limiter) >= _MAX_REMEMBERED:  # tenants, perhaps
                self._by_limiter = {self._limiter: self._default}
            lane = self._new_lane(limiter, paused_limiter=limiter)
            self._by_limiter[limiter] = lane
        return lane

    def _chooser(self, routes: Routing) -> Callable[[Call], Target]:
        """Return what finds a call's target; report mistakes at once."""
        if isinstance(routes, Mapping):
            rules = [(*_parse(pattern), target) for pattern, target in routes.items()]
            for *_, target in rules:
                self._refuse_unknown(target)
            return partial(_first_match, rules)
        if not callable(routes):
            raise TypeError(
                f'routes must be a mapping such as {{"gpt-4o*": "big"}}, or a function of the call, '
                f"not {routes!r}"
            )
        return routes

    def _refuse_unknown(self, target: Target) -> None:
        """Refuse unknown names: a misspelt one would become a child without limits."""
        if isinstance(target, str) and target not in self._limiter.children:
            known = ", ".join(self._limiter.children) or "none"
            raise ValueError(
                f"{self._limiter.name!r} has no child {target!r} (it has: {known}): correct the name, "
                f"or make it first by child({target!r}, ...)"
            )
        self._resolve(target)

    def _resolve(self, target: Target) -> Limiter:
        if target is None:
            return self._limiter
        if isinstance(target, str):
            return self._limiter.child(target)
        if not isinstance(target, Limiter):
            raise TypeError(f"a route must lead to a child or its name, not to {shown(target)}")
        if not is_under(target, self._limiter):
            raise ValueError(f"{target.name!r} is not a child of {self._limiter.name!r}")
        return target


def _higher(one: Cost | None, other: Cost | None) -> Cost | None:
    """Return what suffices for both costs."""
    if one is None or other is None:
        return one
    names = {**one, **other}
    return Cost.of({name: max(one.get(name, 0), other.get(name, 0)) for name in names})


def _first_match(rules: list[_Rule], call: Call) -> Target:
    named = call.body.get("model")
    for path, model, target in rules:
        if path is not None and not fnmatchcase(call.path, path):
            continue
        if model is None or (isinstance(named, str) and fnmatchcase(named, model)):
            return target
    return None


def _parse(pattern: str) -> tuple[str | None, str | None]:
    """Return the path and the model of a pattern."""
    parts = pattern.split() if isinstance(pattern, str) else []
    path = parts.pop(0) if parts and parts[0].startswith("/") else None
    model = parts.pop(0) if parts else None
    if parts or (path is None and model is None):
        raise ValueError(
            f'a route must be a path, a model, or both, such as "/v1/chat/completions gpt-4o*", '
            f"not {pattern!r}"
        )
    return path, model
