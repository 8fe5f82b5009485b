"""Read what a provider's headers say of its limits, and tell the limiter.

The values come from outside; no value, however long or odd, raises anything.

A limiter may be below others, and only one of them has the limit that the provider reports: the one
whose number is announced, or else the one whose number is nearest.
"""

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from asyncbucket.core.levels import in_force, levels, observe_remaining
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.feedback.headroom import share_of
from asyncbucket.providers.profiles import Profile, Told

#: A limiter, and the resource and the window of one of its limits.
_LimitId: TypeAlias = tuple[Limiter, str, float]

#: How many times in a window replies are read, at most.
_READS_PER_WINDOW: Final = 6_000
#: Windows longer than this (s) are not counted in slices.
_MAX_SLICED_WINDOW: Final = 60
#: A count has one to fifteen digits, which in bytes are ASCII.
_COUNT: Final = re.compile(rb"[ \t]*([0-9]{1,15})[ \t]*")


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
        #: header which of the limits it reports, and what of it.
        self._profiles: dict[int, tuple[Profile, _HeaderIndex]] = {}
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
                    self._assumed[limiter, *limit.key] = limit.units
                    share = share_of(limit.units)
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
            headers: httpx's or httpx2's headers, or pairs of bytes.
            profile: which headers mean what.
            since: in seconds of the limiter's clock.
            ok: whether the call succeeded; an error without headers about limits tells nothing.
        """
        if not self._learn or not profile.tells:
            return
        _, index = self._profiles.get(id(profile)) or (profile, _headers_of(profile))
        reports: dict[tuple[str, float], _Report] = {}
        # httpx's and httpx2's mappings search all headers again for every name.
        for name, value in getattr(headers, "raw", headers):
            known = index.get(name.lower())
            if known is not None and (number := _COUNT.fullmatch(value)):
                told, part = known
                key = told.resource, told.per
                report = reports.get(key) or reports.setdefault(key, _Report(told))
                report.add(part, int(number[1]))
        for report in reports.values():
            self._complete(report)
        self._adopt(reports.values())
        for report in reports.values():
            self._report(report, since)
        if self._assumed and ok:
            assumed, self._assumed = self._assumed, {}  # at once: other threads read headers, too
            for (limiter, resource, per), amount in assumed.items():
                observe_remaining(limiter, amount, resource=resource, per=per)
        if since is not None:
            windows = (limit.per for limit in in_force(self._limiter))
            self._ignore_until = since + min(windows, default=0.0) / _READS_PER_WINDOW

    def _complete(self, report: "_Report") -> None:
        """Find out what an announced limit is for if its window varies.

        A slice of one of our limits says as much of the whole limit. What is left may be of a slice
        or of the window; `asyncbucket.feedback.headroom` finds out.
        """
        told, seconds = report.told, report.seconds
        if told.period is None:
            return
        ours = (limit.key for limiter in self._levels for limit in limiter.limits)
        if not seconds:
            report.amount = math.inf
        elif seconds < told.per and (told.resource, told.per) in ours:
            report.amount *= told.per / seconds
        else:
            report.per = seconds

    def _report(self, report: "_Report", since: float | None) -> None:
        """Tell the limiter what is left of a window."""
        if report.left == math.inf:
            return
        window = report.told.resource, report.per
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

    def _adopt(self, reports: Iterable["_Report"]) -> None:
        """Adopt announced limits, unless a limiter above has any."""
        if any(above.limits for above in self._levels[1:]):
            return
        for report in reports:
            if report.amount == math.inf:
                continue
            amount, slices = int(report.amount), report.told.slices
            burst = None if slices == 1 else max(1, amount // slices)
            with contextlib.suppress(ValueError):  # no real limit is more than a store can count
                limit = Limit(report.told.resource, amount, per=report.per, burst=burst)
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
            if limit.units == amount:  # perhaps of another window
                return limiter, resource, limit.per
        nearest = self._limiter
        if same_window and amount == math.inf:
            _, nearest = same_window[-1]
        elif same_window:
            _, nearest = min(same_window, key=lambda pair: abs(pair[0].units - amount))
        return nearest, resource, per


@dataclass(slots=True)
class _Report:
    """Hold what a reply says of one window; if several headers do, the lowest of each kind counts."""

    told: Told
    left: float = math.inf
    amount: float = math.inf
    rounding: int = 0
    #: The window; and what the reply says of it, if it does.
    per: float = 0
    seconds: int = 0

    def __post_init__(self) -> None:
        self.per = self.told.per

    def add(self, part: "_Part", number: int) -> None:
        """Take in what a header says: what is left, the amount of the limit, or its window."""
        if part == "period":
            self.seconds = number
        elif part == "amount":
            self.amount = min(self.amount, number * self.told.times or math.inf)
        elif number < self.left:
            self.left, self.rounding = number, self.told.rounding


#: What a header says of a limit.
_Part: TypeAlias = Literal["left", "amount", "period"]
_HeaderIndex: TypeAlias = dict[bytes, tuple[Told, _Part]]


def _headers_of(profile: Profile) -> _HeaderIndex:
    """Return which limit each header reports, and what of it."""
    index: _HeaderIndex = {}
    for told in profile.tells:
        parts: dict[_Part, str | None] = {
            "left": told.remaining,
            "amount": told.limit,
            "period": told.period,
        }
        index |= {name.lower().encode(): (told, part) for part, name in parts.items() if name}
    return index
