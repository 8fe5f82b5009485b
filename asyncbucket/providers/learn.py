"""Read what a provider's headers say of its limits, and tell the limiter.

The values come from outside. A number is one to fifteen ASCII digits and nothing else; any other
value is ignored and counted. No value, however long or odd, raises anything. All headers of a reply
are scanned once, because httpx's mappings search theirs again for every name.

A limiter may be below others, and only one of them has the limit that the provider reports: the one
whose number is announced, or else the one with the next lower number.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

from asyncbucket.core.levels import in_force, levels
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Key, Limit
from asyncbucket.feedback.slices import share_of
from asyncbucket.providers.profiles import Profile, Told

#: A limiter, and the resource and the window of one of its limits.
_LimitId: TypeAlias = tuple[Limiter, str, float]

_MAX_LENGTH: Final = 64
_MAX_DIGITS: Final = 15
#: How many times in a window replies are read, at most.
_READS_PER_WINDOW: Final = 6_000
#: More different limits than this are not announced in good faith.
_MAX_LIMITS: Final = 64
#: Windows longer than this (s) are not counted in slices.
_MAX_SLICED_WINDOW: Final = 60

#: The windows of each limiter about which something was heard, or assumed.
_KNOWN_WINDOWS: Final[WeakKeyDictionary[Limiter, set[Key]]] = WeakKeyDictionary()


class HeaderReader:
    """Read headers for one limiter, and for those above it.

    Args:
        limiter: the limiter to tell.
        learn: whether to read headers at all; if so, a limiter without limits adopts announced
            ones.
    """

    __slots__ = (
        "_assumed",
        "_expected",
        "_ignore_until",
        "_in_force",
        "_indexes",
        "_learn",
        "_levels",
        "_limit_ids",
        "_limiter",
        "_min_interval",
        "ignored",
    )

    def __init__(self, limiter: Limiter, *, learn: bool = True) -> None:
        self._limiter = limiter
        self._levels = tuple(levels(limiter))
        self._learn = learn
        #: For each profile, which limit each header belongs to.
        self._indexes: dict[int, tuple[Profile, dict[bytes, tuple[int, bool]]]] = {}
        #: Profiles for which a first reply is awaited or has come.
        self._expected: dict[int, Profile] = {}
        #: What is assumed until that reply.
        self._assumed: dict[_LimitId, int] = {}
        #: Which limits headers report, as long as the limits in force are these.
        self._limit_ids: dict[tuple[int, int, int | None], _LimitId] = {}
        self._in_force: tuple[Limit, ...] = ()
        #: How long to ignore headers after reading some (s), and until when.
        self._min_interval = 0.0
        self._ignore_until = -math.inf
        #: How many values were no numbers.
        self.ignored = 0

    def expect(self, profile: Profile) -> None:
        """Assume, before the first reply, that only what any provider would admit is left.

        Until a reply says more, that is a slice of a window; see `asyncbucket.feedback.headroom`. A
        reply that says nothing ends the assumption.
        """
        if not self._learn or id(profile) in self._expected:
            return
        self._expected[id(profile)] = profile
        windows = {reported.resource: reported.per for reported in profile.tells}
        for limiter in self._levels:
            known = _KNOWN_WINDOWS.setdefault(limiter, set())
            for limit in limiter.limits:
                key = limit.key
                if (
                    limit.per <= min(windows.get(limit.resource, 0), _MAX_SLICED_WINDOW)
                    and key not in known
                ):
                    known.add(key)
                    self._assumed[limiter, *key] = limit.amount
                    limiter.observe_remaining(
                        share_of(limit.amount), resource=limit.resource, per=limit.per
                    )

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
        index = self._index(profile)
        left: dict[int, int] = {}
        limits: dict[int, int] = {}
        for name, value in header_pairs(headers):
            entry = index.get(name.lower())
            if entry is not None:
                told_index, is_remaining = entry
                number = self._number(value)
                if number is not None:
                    (left if is_remaining else limits)[told_index] = number
        if left or limits:
            self._report(profile, left, limits, since)
        if self._assumed and ok:
            assumed, self._assumed = self._assumed, {}  # at once: other threads read headers, too
            for (limiter, resource, per), amount in assumed.items():
                limiter.observe_remaining(amount, resource=resource, per=per)
        if since is not None:
            self._ignore_until = since + self._min_interval

    def _report(
        self, profile: Profile, left: dict[int, int], limits: dict[int, int], since: float | None
    ) -> None:
        """Tell the limiter; if several headers report one window, the lowest of each kind counts."""
        remaining_by_limit: dict[_LimitId, list[tuple[int, int]]] = {}
        announced: dict[_LimitId, int] = {}
        for told_index in left.keys() | limits.keys():
            limit = limits.get(told_index) or None
            limit_id = self._limit_id(profile, told_index, limits)
            if limit is not None:
                announced[limit_id] = min(limit, announced.get(limit_id, limit))
            if told_index in left:
                remaining = left[told_index] if limit is None else min(left[told_index], limit)
                remaining_by_limit.setdefault(limit_id, []).append(
                    (remaining, profile.tells[told_index].rounding)
                )
        for limit_id, reports in remaining_by_limit.items():
            if self._assumed:
                self._assumed.pop(limit_id, None)
            remaining, rounding = min(reports)
            limiter, resource, per = limit_id
            limiter.observe_remaining(
                remaining,
                resource=resource,
                per=per,
                limit=announced.get(limit_id),
                since=since,
                rounding=rounding,
            )

    def _limit_id(self, profile: Profile, told_index: int, limits: dict[int, int]) -> _LimitId:
        """Return the limiter and the window that a header reports; adopt an announced limit here."""
        limits_in_force = in_force(self._limiter)
        if limits_in_force is not self._in_force:
            self._in_force = limits_in_force
            self._limit_ids.clear()
            self._min_interval = (
                min((limit.per for limit in limits_in_force), default=0.0) / _READS_PER_WINDOW
            )
        limit = limits.get(told_index) or None
        key = id(profile), told_index, limit
        limit_id = self._limit_ids.get(key)
        if limit_id is None:
            told = profile.tells[told_index]
            if limit is not None and not any(above.limits for above in self._levels[1:]):
                self._adopt(profile, told, limits)
            limiter, per = self._find_limit(told, limit)
            limit_id = limiter, told.resource, per
            if len(self._limit_ids) < _MAX_LIMITS:
                self._limit_ids[key] = limit_id
        return limit_id

    def _adopt(self, profile: Profile, told: Told, limits: dict[int, int]) -> None:
        """Adopt a limit; if a reply announces several for one window, the lowest counts."""
        window = told.resource, told.per
        amounts = [
            amount
            for told_index, amount in limits.items()
            if amount
            and window == (profile.tells[told_index].resource, profile.tells[told_index].per)
        ]
        with contextlib.suppress(ValueError):  # no real limit is more than a store can count
            self._limiter.learn(Limit(told.resource, min(amounts), per=told.per))

    def _find_limit(self, told: Told, limit: int | None) -> tuple[Limiter, float]:
        """Find the limiter and the window that a header reports."""
        candidates = [
            (candidate, limiter)
            for limiter in self._levels
            for candidate in limiter.limits
            if candidate.resource == told.resource
        ]
        same_window = [
            (candidate, limiter) for candidate, limiter in candidates if candidate.per == told.per
        ]
        for candidate, limiter in (*same_window, *candidates):
            if candidate.amount == limit:  # perhaps of another window
                return limiter, candidate.per
        if not same_window:
            return self._limiter, told.per
        if limit is None:
            return same_window[-1][1], told.per
        below = [pair for pair in same_window if pair[0].amount < limit]
        nearest = max(
            below or same_window, key=lambda pair: pair[0].amount if below else -pair[0].amount
        )
        return nearest[1], told.per

    def _number(self, value: bytes) -> int | None:
        value = value.strip(b" \t") if len(value) <= _MAX_LENGTH else b""
        if value.isdigit() and len(value) <= _MAX_DIGITS:  # in bytes, these are ASCII digits
            return int(value)
        self.ignored += 1
        return None

    def _index(self, profile: Profile) -> dict[bytes, tuple[int, bool]]:
        known = self._indexes.get(id(profile))
        if known is not None:
            return known[1]
        index: dict[bytes, tuple[int, bool]] = {}
        for told_index, told in enumerate(profile.tells):
            index[told.remaining.lower().encode()] = (told_index, True)
            if told.limit is not None:
                index[told.limit.lower().encode()] = (told_index, False)
        self._indexes[id(profile)] = (profile, index)
        return index


def header_pairs(headers: Any) -> Iterable[tuple[bytes, bytes]]:
    """Return names and values in bytes, as httpx and httpx2 keep them."""
    if isinstance(headers, list):
        return headers
    raw = getattr(headers, "raw", None)
    if isinstance(raw, list):
        return raw
    return [(_bytes(name), _bytes(value)) for name, value in headers.items()]


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")
