"""Read what a provider's headers say of its limits, and tell the limiter.

The values come from outside. A number is one to fifteen ASCII digits and nothing else; any other
value is ignored. No value, however long or odd, raises anything. All headers of a reply
are scanned once, because httpx's mappings search theirs again for every name.

A limiter may be below others, and only one of them has the limit that the provider reports: the one
whose number is announced, or else the one with the next lower number.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from asyncbucket.core.levels import in_force, levels, observe_remaining
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.feedback.headroom import share_of
from asyncbucket.providers.profiles import Profile, Told

#: A limiter, and the resource and the window of one of its limits.
_LimitId: TypeAlias = tuple[Limiter, str, float]

_MAX_LENGTH: Final = 64
_MAX_DIGITS: Final = 15
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
        left: dict[Told, int] = {}
        amounts: dict[Told, int] = {}
        for name, value in header_pairs(headers):
            told, is_left = index.get(name.lower(), (None, False))
            number = None if told is None else _number(value)
            if told is not None and number is not None:
                (left if is_left else amounts)[told] = number
        if left or amounts:
            self._report(left, amounts, since)
        if self._assumed and ok:
            assumed, self._assumed = self._assumed, {}  # at once: other threads read headers, too
            for (limiter, resource, per), amount in assumed.items():
                observe_remaining(limiter, amount, resource=resource, per=per)
        if since is not None:
            windows = (limit.per for limit in in_force(self._limiter))
            self._ignore_until = since + min(windows, default=0.0) / _READS_PER_WINDOW

    def _report(self, left: dict[Told, int], amounts: dict[Told, int], since: float | None) -> None:
        """Tell the limiter; if several headers report one window, the lowest of each kind counts."""
        self._adopt(amounts)
        remaining_by_limit: dict[_LimitId, list[tuple[int, int]]] = {}
        announced: dict[_LimitId, int] = {}
        for told in left.keys() | amounts.keys():
            amount = amounts.get(told) or math.inf
            limit_id = self._find_limit(told, amount)
            if amount < math.inf:
                announced[limit_id] = min(int(amount), announced.get(limit_id, int(amount)))
            if told in left:
                remaining = int(min(left[told], amount))
                remaining_by_limit.setdefault(limit_id, []).append((remaining, told.rounding))
        for limit_id, reports in remaining_by_limit.items():
            if self._assumed:
                self._assumed.pop(limit_id, None)
            remaining, rounding = min(reports)
            limiter, resource, per = limit_id
            observe_remaining(
                limiter,
                remaining,
                resource=resource,
                per=per,
                limit=announced.get(limit_id),
                since=since,
                rounding=rounding,
            )

    def _adopt(self, amounts: dict[Told, int]) -> None:
        """Adopt limits; if a reply announces several for one window, the lowest counts."""
        if any(above.limits for above in self._levels[1:]):
            return
        windows = {(told.resource, told.per) for told, amount in amounts.items() if amount}
        for resource, per in windows:
            amount = min(
                amount
                for told, amount in amounts.items()
                if amount and (told.resource, told.per) == (resource, per)
            )
            with contextlib.suppress(ValueError):  # no real limit is more than a store can count
                limit = Limit(resource, amount, per=per)
                if limit not in self._limiter.limits:
                    self._limiter.learn(limit)

    def _find_limit(self, told: Told, amount: float) -> _LimitId:
        """Find the limiter and the window that a header reports, by the amount if it is finite."""
        candidates = [
            (limit, limiter)
            for limiter in self._levels
            for limit in limiter.limits
            if limit.resource == told.resource
        ]
        same_window = [pair for pair in candidates if pair[0].per == told.per]
        for limit, limiter in (*same_window, *candidates):
            if limit.amount == amount:  # perhaps of another window
                return limiter, told.resource, limit.per
        nearest = self._limiter
        if same_window and amount == math.inf:
            _, nearest = same_window[-1]
        elif same_window:
            below = [pair for pair in same_window if pair[0].amount < amount]
            _, nearest = max(
                below or same_window, key=lambda pair: pair[0].amount if below else -pair[0].amount
            )
        return nearest, told.resource, told.per


def _number(value: bytes) -> int | None:
    value = value.strip(b" \t") if len(value) <= _MAX_LENGTH else b""
    # In bytes, these are ASCII digits.
    return int(value) if value.isdigit() and len(value) <= _MAX_DIGITS else None


def _headers_of(profile: Profile) -> dict[bytes, tuple[Told, bool]]:
    """Return which limit each header reports, and whether it is what is left of it."""
    left = {told.remaining.lower().encode(): (told, True) for told in profile.tells}
    amounts = {told.limit.lower().encode(): (told, False) for told in profile.tells if told.limit}
    return left | amounts


def header_pairs(headers: Any) -> Iterable[tuple[bytes, bytes]]:
    """Return names and values in bytes, as httpx and httpx2 keep them."""
    pairs: Any = getattr(headers, "raw", headers)
    if isinstance(pairs, list):
        return pairs
    return [(_bytes(name), _bytes(value)) for name, value in headers.items()]


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")
