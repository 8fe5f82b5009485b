"""Listen to what a provider's headers say of its limits, and tell the limiter.

What comes in is input from outside. A number is one to fifteen ASCII digits and nothing else, or it
says nothing and is counted; no value, however long or odd, raises anything. All headers of a reply
are gone through once, for the mappings of httpx search theirs for every name that they are asked.
"""

import re
from collections.abc import Iterable
from typing import Any, Final

from asyncbucket.http.profiles import Profile, Told
from asyncbucket.limiter import Limiter
from asyncbucket.limits import Limit

_NUMBER: Final = re.compile(rb"[0-9]{1,15}")
_LONGEST: Final = 64


class Ear:
    """Listen for one limiter.

    Args:
        limiter: whom to tell.
        learn: whether to listen at all; a limiter without limits then takes over those announced.
    """

    __slots__ = ("_indexes", "_learn", "_limiter", "ignored")

    def __init__(self, limiter: Limiter, *, learn: bool = True) -> None:
        self._limiter = limiter
        self._learn = learn
        #: For each profile, where each header's value belongs.
        self._indexes: dict[int, tuple[Profile, dict[bytes, tuple[int, bool]]]] = {}
        #: Values that were no numbers.
        self.ignored = 0

    def hear(self, headers: Any, profile: Profile, *, since: float | None = None) -> None:
        """Take in the headers of a reply to a call that was sent at ``since``.

        Args:
            headers: what httpx or httpx2 makes of a reply's headers, pairs of bytes, or a mapping.
            profile: which of them speak of what.
            since: in seconds of the limiter's clock.
        """
        if not self._learn or not profile.tells:
            return
        found: dict[int, dict[bool, int]] = {}
        index = self._index(profile)
        for name, value in pairs(headers):
            place = index.get(name.lower())
            if place is not None:
                number = self._number(value)
                if number is not None:
                    found.setdefault(place[0], {})[place[1]] = number
        if found:
            self._tell(profile.tells, found, since)

    def _tell(
        self, tells: tuple[Told, ...], found: dict[int, dict[bool, int]], since: float | None
    ) -> None:
        """Tell the limiter; where several headers speak of one window, the least counts."""
        least: dict[tuple[str, float], tuple[int, int | None, int]] = {}
        for place, numbers in found.items():
            told = tells[place]
            limit = numbers.get(False) or None
            if limit is not None:
                self._limiter.learn(Limit(told.resource, limit, per=told.per))
            remaining = numbers.get(True)
            if remaining is None:
                continue
            key = (told.resource, self._window(told, limit))
            word = (remaining, limit, told.rounding)
            if key not in least or remaining < least[key][0]:
                least[key] = word
        for (resource, per), (remaining, limit, rounding) in least.items():
            self._limiter.observe_remaining(
                remaining if limit is None else min(remaining, limit),
                resource=resource,
                per=per,
                limit=limit,
                since=since,
                rounding=rounding,
            )

    def _window(self, told: Told, limit: int | None) -> float:
        """Return the window that is spoken of: another of the limiter's, if the number is its."""
        windows = {
            ours.per: ours.amount for ours in self._limiter.limits if ours.resource == told.resource
        }
        if limit is None or windows.get(told.per) == limit:
            return told.per
        return next((per for per, amount in windows.items() if amount == limit), told.per)

    def _number(self, value: bytes) -> int | None:
        value = value.strip(b" \t") if len(value) <= _LONGEST else b""
        if _NUMBER.fullmatch(value):
            return int(value)
        self.ignored += 1
        return None

    def _index(self, profile: Profile) -> dict[bytes, tuple[int, bool]]:
        known = self._indexes.get(id(profile))
        if known is not None:
            return known[1]
        index: dict[bytes, tuple[int, bool]] = {}
        for place, told in enumerate(profile.tells):
            index[told.remaining.lower().encode()] = (place, True)
            if told.limit is not None:
                index[told.limit.lower().encode()] = (place, False)
        self._indexes[id(profile)] = (profile, index)
        return index


def pairs(headers: Any) -> Iterable[tuple[bytes, bytes]]:
    """Return names and values in bytes, which httpx and httpx2 keep as they came."""
    if isinstance(headers, list):
        return headers
    raw = getattr(headers, "raw", None)
    if isinstance(raw, list):
        return raw
    return [(_bytes(name), _bytes(value)) for name, value in headers.items()]


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")
