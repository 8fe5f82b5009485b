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

from asyncbucket.feedback.slices import share_of
from asyncbucket.http.profiles import Profile, Told
from asyncbucket.limiter import Limiter
from asyncbucket.limiter.levels import in_force, levels
from asyncbucket.limits import Key, Limit

#: A limiter, and the resource and the window of one of its limits.
_Place: TypeAlias = tuple[Limiter, str, float]

_LONGEST: Final = 64
_DIGITS: Final = 15
#: How many times in a window replies are read, at most.
_TIMES: Final = 6_000
#: More different limits than this are not announced in good faith.
_MANY: Final = 64
#: Windows longer than this (s) are not counted in slices.
_LONG: Final = 60

#: The windows of each limiter about which something was heard, or assumed.
_KNOWN: Final[WeakKeyDictionary[Limiter, set[Key]]] = WeakKeyDictionary()


class Ear:
    """Read headers for one limiter, and for those above it.

    Args:
        limiter: the limiter to tell.
        learn: whether to read headers at all; if so, a limiter without limits adopts announced
            ones.
    """

    __slots__ = (
        "_assumed",
        "_deaf_until",
        "_expected",
        "_in_force",
        "_indexes",
        "_learn",
        "_limiter",
        "_line",
        "_pause",
        "_places",
        "ignored",
    )

    def __init__(self, limiter: Limiter, *, learn: bool = True) -> None:
        self._limiter = limiter
        self._line = tuple(levels(limiter))
        self._learn = learn
        #: For each profile, which limit each header belongs to.
        self._indexes: dict[int, tuple[Profile, dict[bytes, tuple[int, bool]]]] = {}
        #: Profiles for which a first reply is awaited or has come.
        self._expected: dict[int, Profile] = {}
        #: What is assumed until that reply.
        self._assumed: dict[_Place, int] = {}
        #: Which limits headers report, as long as the limits in force are these.
        self._places: dict[tuple[int, int, int | None], _Place] = {}
        self._in_force: tuple[Limit, ...] = ()
        #: How long to ignore headers after reading some (s), and until when.
        self._pause = 0.0
        self._deaf_until = -math.inf
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
        told = {each.resource: each.per for each in profile.tells}
        for limiter in self._line:
            known = _KNOWN.setdefault(limiter, set())
            for limit in limiter.limits:
                key = limit.key
                if limit.per <= min(told.get(limit.resource, 0), _LONG) and key not in known:
                    known.add(key)
                    self._assumed[limiter, *key] = limit.amount
                    limiter.observe_remaining(
                        share_of(limit.amount), resource=limit.resource, per=limit.per
                    )

    def is_due(self, now: float) -> bool:
        """Tell whether it is time to read headers again, at an instant of the limiter's clock.

        In between little changes, and reading them is a good part of what a call costs.
        """
        return now >= self._deaf_until or bool(self._assumed)

    def hear(
        self, headers: Any, profile: Profile, *, since: float | None = None, good: bool = True
    ) -> None:
        """Read the headers of a reply to a call that was sent at ``since``.

        Args:
            headers: httpx's or httpx2's headers, pairs of bytes, or a mapping.
            profile: which headers mean what.
            since: in seconds of the limiter's clock.
            good: whether the call succeeded; an error without headers about limits tells nothing.
        """
        if not self._learn or not profile.tells:
            return
        index = self._index(profile)
        left: dict[int, int] = {}
        limits: dict[int, int] = {}
        for name, value in pairs(headers):
            place = index.get(name.lower())
            if place is not None:
                header, says_left = place
                number = self._number(value)
                if number is not None:
                    (left if says_left else limits)[header] = number
        if left or limits:
            self._tell(profile, left, limits, since)
        if self._assumed and good:
            assumed, self._assumed = self._assumed, {}  # at once: other threads read headers, too
            for (limiter, resource, per), amount in assumed.items():
                limiter.observe_remaining(amount, resource=resource, per=per)
        if since is not None:
            self._deaf_until = since + self._pause

    def _tell(
        self, profile: Profile, left: dict[int, int], limits: dict[int, int], since: float | None
    ) -> None:
        """Tell the limiter; if several headers report one window, the lowest of each kind counts."""
        words: dict[_Place, list[tuple[int, int]]] = {}
        announced: dict[_Place, int] = {}
        for number in left.keys() | limits.keys():
            limit = limits.get(number) or None
            place = self._place(profile, number, limits)
            if limit is not None:
                announced[place] = min(limit, announced.get(place, limit))
            if number in left:
                remaining = left[number] if limit is None else min(left[number], limit)
                words.setdefault(place, []).append((remaining, profile.tells[number].rounding))
        for place, said in words.items():
            if self._assumed:
                self._assumed.pop(place, None)
            remaining, rounding = min(said)
            limiter, resource, per = place
            limiter.observe_remaining(
                remaining,
                resource=resource,
                per=per,
                limit=announced.get(place),
                since=since,
                rounding=rounding,
            )

    def _place(self, profile: Profile, number: int, limits: dict[int, int]) -> _Place:
        """Return the limiter and the window that a header reports; adopt an announced limit here."""
        now_in_force = in_force(self._limiter)
        if now_in_force is not self._in_force:
            self._in_force = now_in_force
            self._places.clear()
            self._pause = min((limit.per for limit in now_in_force), default=0.0) / _TIMES
        limit = limits.get(number) or None
        key = id(profile), number, limit
        place = self._places.get(key)
        if place is None:
            told = profile.tells[number]
            if limit is not None and not any(above.limits for above in self._line[1:]):
                self._take_over(profile, told, limits)
            limiter, per = self._whose(told, limit)
            place = limiter, told.resource, per
            if len(self._places) < _MANY:
                self._places[key] = place
        return place

    def _take_over(self, profile: Profile, told: Told, limits: dict[int, int]) -> None:
        """Adopt a limit; if a reply announces several for one window, the lowest counts."""
        window = told.resource, told.per
        amounts = [
            amount
            for number, amount in limits.items()
            if amount and window == (profile.tells[number].resource, profile.tells[number].per)
        ]
        with contextlib.suppress(ValueError):  # no real limit is more than a store can count
            self._limiter.learn(Limit(told.resource, min(amounts), per=told.per))

    def _whose(self, told: Told, limit: int | None) -> tuple[Limiter, float]:
        """Find the limiter and the window that a header reports."""
        ours = [
            (each, limiter)
            for limiter in self._line
            for each in limiter.limits
            if each.resource == told.resource
        ]
        same = [(each, limiter) for each, limiter in ours if each.per == told.per]
        for each, limiter in (*same, *ours):
            if each.amount == limit:  # perhaps of another window
                return limiter, each.per
        if not same:
            return self._limiter, told.per
        if limit is None:
            return same[-1][1], told.per
        below = [pair for pair in same if pair[0].amount < limit]
        nearest = max(below or same, key=lambda pair: pair[0].amount if below else -pair[0].amount)
        return nearest[1], told.per

    def _number(self, value: bytes) -> int | None:
        value = value.strip(b" \t") if len(value) <= _LONGEST else b""
        if value.isdigit() and len(value) <= _DIGITS:  # in bytes, these are ASCII digits
            return int(value)
        self.ignored += 1
        return None

    def _index(self, profile: Profile) -> dict[bytes, tuple[int, bool]]:
        known = self._indexes.get(id(profile))
        if known is not None:
            return known[1]
        index: dict[bytes, tuple[int, bool]] = {}
        for number, told in enumerate(profile.tells):
            index[told.remaining.lower().encode()] = (number, True)
            if told.limit is not None:
                index[told.limit.lower().encode()] = (number, False)
        self._indexes[id(profile)] = (profile, index)
        return index


def pairs(headers: Any) -> Iterable[tuple[bytes, bytes]]:
    """Return names and values in bytes, as httpx and httpx2 keep them."""
    if isinstance(headers, list):
        return headers
    raw = getattr(headers, "raw", None)
    if isinstance(raw, list):
        return raw
    return [(_bytes(name), _bytes(value)) for name, value in headers.items()]


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")
