"""Read what a provider's headers say of its limits, and tell the limiter.

The values come from outside; no value, however long or odd, raises anything.

A limiter may be below others, and only one of them has the limit that the provider reports: the one
whose number is announced, or else the one whose number is nearest.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from asyncbucket.core.levels import in_force, levels, observe_remaining
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.feedback.headroom import share_of
from asyncbucket.providers.headers import count, header_pairs
from asyncbucket.providers.profiles import Profile, Told

#: A limiter, and the resource and the window of one of its limits.
_LimitId: TypeAlias = tuple[Limiter, str, float]

#: How many times in a window replies are read, at most.
_READS_PER_WINDOW: Final = 6_000
#: Windows longer than this (s) are not counted in slices.
_MAX_SLICED_WINDOW: Final = 60


class HeaderReader:
    """Read headers for one limiter, and for those above it.

    Args:
        limiter: the limiter to tell.
        learn: whether to read headers at all; if so, a limiter without limits adopts announced
            ones.
    """

    def __init__(self, limiter: Limiter, *, learn: bool = True) -> None:
        self._limiter = limiter
        self._levels = tuple(levels(limiter))
        self._learn = learn
        #: By their ids, the profiles for which a first reply is awaited or has come, and for each
        #: header which of the limits it reports: what is left of it, or its amount.
        self._profiles: dict[int, tuple[Profile, dict[bytes, tuple[Told, bool]]]] = {}
        #: What is assumed until that reply.
        self._assumed: dict[_LimitId, int] = {}
        self._ignore_until = -math.inf

    def expect(self, profile: Profile) -> None:
        """Assume, before the first reply, that only what any provider would admit is left.

        Until a reply says more, that is a slice of a window; see `asyncbucket.feedback.headroom`. A
        reply that says nothing ends the assumption.
        """
        if not self._learn or id(profile) in self._profiles:
            return
        self._profiles[id(profile)] = profile, _headers_of(profile)
        windows = {told.resource: min(told.per, _MAX_SLICED_WINDOW) for told in profile.tells}
        for limiter in self._levels:
            # Windows about which something was heard or assumed, by whichever reader.
            known: set[Any] = vars(limiter).setdefault("_known_windows", set())
            for limit in limiter.limits:
                if limit.per <= windows.get(limit.resource, 0) and limit.key not in known:
                    known.add(limit.key)
                    self._assumed[limiter, *limit.key] = limit.amount
                    share = share_of(limit.amount)
                    observe_remaining(limiter, share, resource=limit.resource, per=limit.per)

    def is_due(self, now: float) -> bool:
        """Tell whether it is time to read headers again, at an instant of the limiter's clock.

        In between little changes, and reading them is a good part of what a call costs.
        """
        return now >= self._ignore_until or bool(self._assumed)

    def read(
        self, headers: Any, profile: Profile, *, since: float | None = None, ok: bool = True
    ) -> None:
        """Read the headers of a reply to a call that was sent at ``since``.

        Args:
            headers: httpx's or httpx2's headers, pairs of bytes, or a mapping.
            profile: which headers mean what.
            since: in seconds of the limiter's clock.
            ok: whether the call succeeded; an error without headers about limits tells nothing.
        """
        if not self._learn or not profile.tells:
            return
        _, index = self._profiles.get(id(profile)) or (profile, _headers_of(profile))
        reports: dict[tuple[str, float], _Report] = {}
        for name, value in header_pairs(headers):
            told, is_left = index.get(name.lower(), (None, False))
            number = None if told is None else count(value)
            if told is not None and number is not None:
                report = reports.setdefault((told.resource, told.per), _Report())
                report.add(number, told.rounding if is_left else None)
        self._adopt(reports)
        for window, report in reports.items():
            self._report(window, report, since)
        if self._assumed and ok:
            assumed, self._assumed = self._assumed, {}  # at once: other threads read headers, too
            for (limiter, resource, per), amount in assumed.items():
                observe_remaining(limiter, amount, resource=resource, per=per)
        if since is not None:
            windows = (limit.per for limit in in_force(self._limiter))
            self._ignore_until = since + min(windows, default=0.0) / _READS_PER_WINDOW

    def _report(self, window: tuple[str, float], report: "_Report", since: float | None) -> None:
        """Tell the limiter what is left of a window."""
        if report.left == math.inf:
            return
        limiter, resource, per = limit_id = self._find_limit(window, report.amount)
        if self._assumed:
            self._assumed.pop(limit_id, None)
        observe_remaining(
            limiter,
            int(min(report.left, report.amount)),
            resource=resource,
            per=per,
            limit=None if report.amount == math.inf else int(report.amount),
            since=since,
            rounding=report.rounding,
        )

    def _adopt(self, reports: dict[tuple[str, float], "_Report"]) -> None:
        """Adopt announced limits, unless a limiter above has any."""
        if any(above.limits for above in self._levels[1:]):
            return
        for (resource, per), report in reports.items():
            if report.amount == math.inf:
                continue
            with contextlib.suppress(ValueError):  # no real limit is more than a store can count
                limit = Limit(resource, int(report.amount), per=per)
                if limit not in self._limiter.limits:
                    self._limiter.learn(limit)

    def _find_limit(self, window: tuple[str, float], amount: float) -> _LimitId:
        """Find the limiter and the window that a header reports, by the amount if it is finite."""
        resource, per = window
        candidates = [
            (limit, limiter)
            for limiter in self._levels
            for limit in limiter.limits
            if limit.resource == resource
        ]
        same_window = [pair for pair in candidates if pair[0].per == per]
        for limit, limiter in (*same_window, *candidates):
            if limit.amount == amount:  # perhaps of another window
                return limiter, resource, limit.per
        nearest = self._limiter
        if same_window and amount == math.inf:
            _, nearest = same_window[-1]
        elif same_window:
            _, nearest = min(same_window, key=lambda pair: abs(pair[0].amount - amount))
        return nearest, resource, per


@dataclass(slots=True)
class _Report:
    """Hold what a reply says of one window; if several headers do, the lowest of each kind counts."""

    left: float = math.inf
    amount: float = math.inf
    rounding: int = 0

    def add(self, number: int, rounding: int | None) -> None:
        """Take in what is left, rounded like that, or else the amount of the limit."""
        if rounding is None:
            self.amount = min(self.amount, number or math.inf)
        elif number < self.left:
            self.left, self.rounding = number, rounding


def _headers_of(profile: Profile) -> dict[bytes, tuple[Told, bool]]:
    """Return which limit each header reports, and whether it is what is left of it."""
    left = {told.remaining.lower().encode(): (told, True) for told in profile.tells}
    amounts = {told.limit.lower().encode(): (told, False) for told in profile.tells if told.limit}
    return left | amounts
