"""What a transport makes of a request: its limiter, its profile, and what it costs.

A key may have limits that differ from model to model and from endpoint to endpoint. Each of these
is a child of the transport's limiter; ``routes=`` decides which one a request is for, by its path
and by the model that it names.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple, TypeAlias

from asyncbucket.engine.cost import Cost
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.wording import USD, shown
from asyncbucket.levels import (
    InForce,
    capped,
    effective_limiter,
    in_force,
    is_under,
    provider_of,
)
from asyncbucket.providers.learn import HeaderReader, Refusals
from asyncbucket.providers.prefixes import (
    LEAST,
    CacheMode,
    Prefixes,
    Prompt,
    asks_to_cache,
    conversation_of,
    cuts_of,
)
from asyncbucket.providers.prices import Price, priced
from asyncbucket.providers.profiles import Call, Profile, charge, profile_named, profile_of
from asyncbucket.providers.request import OutputForecast, read_json
from asyncbucket.retry import Retrier, Retry

#: A child's name, or the child itself; None for the transport's own limiter.
Target: TypeAlias = str | Limiter | None
#: What people pass as ``routes=``: patterns with wildcards, of which the first match counts, or a
#: function. In a pattern, a path begins with a slash (``"/v1/embeddings"``), anything else is a model
#: (``"gpt-4o*"``), and both may be combined (``"/v1/chat/completions gpt-4o*"``).
Routing: TypeAlias = Mapping[str, Target] | Callable[[Call], Target]

_TOKENS: Final = frozenset({"tokens", "input_tokens", "output_tokens"})
#: How many children are remembered: tenants, perhaps.
_MAX_REMEMBERED: Final = 256


@dataclass(frozen=True, slots=True)
class Provider:
    """Hold what learns from one provider's answers."""

    headers: HeaderReader
    refusals: Refusals
    #: None if it is found by the host of each request.
    profile: Profile | None


@dataclass(frozen=True, slots=True)
class Lane:
    """What a transport knows about the calls of one limiter."""

    limiter: Limiter
    #: Who answers: in a pool, by the member that takes a call; else the one under None.
    providers: Mapping[Limiter | None, Provider]
    #: None if failed calls are not retried.
    retrier: Retrier | None
    forecast: OutputForecast
    #: What its providers have in their prompt caches; None for a pool, whose members have their own.
    prefixes: Prefixes | None


class ReadRequest(NamedTuple):
    """A request as its profile sees it."""

    lane: Lane
    #: What limits it.
    limits: InForce
    call: Call
    profile: Profile
    #: None if it needs no admission.
    cost: Cost | None
    #: What it sends, if reading that from the provider's prompt cache changes what it costs.
    prompt: Prompt | None
    #: What it has in common with earlier calls of a pool; None if it is short, or for no pool.
    conversation: str | None
    #: What its model costs; None if nothing counts dollars.
    price: Price | None
    #: Whether the headers of its reply are the provider's.
    teaches: bool
    #: Whether its body is in memory.
    in_memory: bool

    def at(self, member: Limiter | None) -> tuple[Provider, Profile]:
        """Return who answers, and its profile: in a pool, of the member that took the call."""
        provider = self.lane.providers[member]
        return provider, provider.profile or self.profile

    def needs_usage(self, profile: Profile) -> bool:
        """Tell whether its reply's usage corrects a limit, or a budget."""
        limited = self.limits.resources
        return not limited.isdisjoint(profile.settles) or not _TOKENS.isdisjoint(capped())


@dataclass(eq=False)
class Lanes:
    """Read the requests of one transport.

    Raises:
        ValueError: ``profile`` is not known, a pattern is neither a path nor a model, ``limiter``
            has no child of that name, or a limiter is not below it.
        TypeError: ``profile`` or ``routes`` is of another type, or so is a target.
    """

    #: The limiter for requests that no route matches.
    limiter: Limiter
    #: A provider's name or a profile; None finds it by the host.
    profile: Profile | str | None
    #: Whether headers are read.
    learn: bool
    #: How failed calls are retried.
    retry: Retry
    #: Which child a request is for.
    routes: Routing | None
    #: If the limiter is a pool, the host of each member.
    hosts: Mapping[Limiter, str]
    #: Whether calls with the same cold prefix wait for one that leads.
    cache: CacheMode
    _fixed_profile: Profile | None = field(init=False)
    _default: Lane = field(init=False)
    _lane_of: Callable[..., Lane] = field(init=False)
    _choose: Callable[[Call], Target] | None = field(init=False)

    def __post_init__(self) -> None:
        given = self.profile
        self._fixed_profile = profile_named(given) if isinstance(given, str) else given
        if not (given is None or isinstance(self._fixed_profile, Profile)):
            raise TypeError(f"profile must be a provider's name or a Profile, not {given!r}")
        self._default = self._new_lane(self.limiter, paused=provider_of(self.limiter))
        self._lane_of = functools.lru_cache(_MAX_REMEMBERED)(self._new_lane)
        self._choose = None if self.routes is None else self._chooser(self.routes)

    def read(self, request: Any, *, teaches: bool) -> ReadRequest:
        """Work out what ``request`` costs; ``teaches`` tells whether its headers are the provider's.

        Raises:
            UnknownPrice: something counts dollars, and nobody knows what its model costs.
        """
        url, lane, content = request.url, self._default, content_of(request)
        host = url.host
        call = Call(request.method, host, url.path, read_json(content), lane.forecast.foresee())
        if self._choose is not None:
            limiter = self._resolve(self._choose(call))
            if limiter is not self.limiter:
                lane = self._lane_of(limiter, paused=limiter)
                call = replace(call, foreseen=lane.forecast.foresee())
        limits = in_force(effective_limiter(lane.limiter))
        profile: Profile | None = None
        cost: Cost | None = None
        for provider in lane.providers.values():  # any may take it: what most charge counts
            theirs = provider.profile or profile_of(host)
            if teaches:
                provider.headers.expect()
            if profile is None:
                profile = theirs
                call, cost = charge(call, profile, limits.by_way)
            elif theirs is not profile:
                cost = _higher(cost, charge(call, theirs, limits.by_way)[1])
        assert profile is not None
        prompt, conversation = None, None
        if cost is not None and cost.get("input_tokens", 0) >= LEAST:
            prompt, conversation = self._prefix(lane, call, profile, content)
        price: Price | None = None
        if limits.counts(USD):
            cost, price = priced(lane.limiter, call, cost)
        in_memory = content is not None
        return ReadRequest(
            lane, limits, call, profile, cost, prompt, conversation, price, teaches, in_memory
        )

    def _prefix(
        self, lane: Lane, call: Call, profile: Profile, content: bytes | None
    ) -> tuple[Prompt | None, str | None]:
        """Return what a call sends, if it may be cached; in a pool, its conversation."""
        site = f"{call.host} {call.model}"
        if lane.prefixes is None:
            return None, conversation_of(call.body, site)
        if not (call.asked.writes and (asks_to_cache(content) or profile.caches_unasked)):
            return None, None
        cuts = cuts_of(call.body, site)
        return Prompt(lane.prefixes, profile, cuts, self.cache == "lead"), None

    def _new_lane(self, limiter: Limiter, *, paused: Limiter) -> Lane:
        """Return the lane of ``limiter``, of which a refusal pauses ``paused``."""
        fixed, providers = self._fixed_profile, dict[Limiter | None, Provider]()
        for member, host in self.hosts.items():
            providers[member] = self._provider(member, member, fixed or profile_of(host))
        if not providers:
            providers[None] = self._provider(limiter, paused, fixed)
        retries = self.retry.attempts > 1
        retrier = Retrier(self.retry, paused, caller=limiter) if retries else None
        prefixes = None if self.hosts else Prefixes.of(paused)
        return Lane(limiter, providers, retrier, OutputForecast(), prefixes)

    def _provider(self, limiter: Limiter, paused: Limiter, profile: Profile | None) -> Provider:
        return Provider(HeaderReader(limiter, learn=self.learn), Refusals.of(paused), profile)

    def _chooser(self, routes: Routing) -> Callable[[Call], Target]:
        """Return what finds a call's target; report mistakes at once."""
        if isinstance(routes, Mapping):
            rules = [(*_parse(pattern), target) for pattern, target in routes.items()]
            for *_, target in rules:
                self._resolve(target, may_be_new=False)
            return functools.partial(_first_match, rules)
        if not callable(routes):
            raise TypeError(
                f'routes must be a mapping such as {{"gpt-4o*": "big"}}, or a function of the call, '
                f"not {routes!r}"
            )
        return routes

    def _resolve(self, target: Target, *, may_be_new: bool = True) -> Limiter:
        """Return a target's limiter; a misspelt name would become a child without limits."""
        if target is None:
            return self.limiter
        if isinstance(target, str):
            if not may_be_new and target not in self.limiter.children:
                known = ", ".join(self.limiter.children) or "none"
                raise ValueError(
                    f"{self.limiter.name!r} has no child {target!r} (it has: {known}): correct the "
                    f"name, or make it first by child({target!r}, ...)"
                )
            return self.limiter.child(target)
        if not isinstance(target, Limiter):
            raise TypeError(f"a route must lead to a child or its name, not to {shown(target)}")
        if not is_under(target, self.limiter):
            raise ValueError(f"{target.name!r} is not a child of {self.limiter.name!r}")
        return target


def content_of(request: Any) -> bytes | None:
    """Return a request's body, if it is in memory; one that is still to be streamed is left alone."""
    try:
        return bytes(request.content)
    except RuntimeError:
        return None


def _higher(one: Cost | None, other: Cost | None) -> Cost | None:
    """Return what suffices for both costs."""
    if one is None or other is None:
        return one
    names = {**one, **other}
    return Cost.of({name: max(one.get(name, 0), other.get(name, 0)) for name in names})


def _first_match(rules: list[tuple[str | None, str | None, Target]], call: Call) -> Target:
    """Return the target of the first rule whose path and model match ``call``, or are any."""
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
