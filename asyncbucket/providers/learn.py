"""What a provider's answers tell the limiter: headers what is left, refusals when to pause.

**Headers.** The values come from outside; no value, however long or odd, raises anything. If several
limiters are above each other, a report is of the one whose limit is announced, or is the nearest.

**Refusals.** `asyncbucket.providers.errors` decides what a refusal means, and this module what follows.
A refusal for rate or for slots, and an overloaded provider, concern all calls: everyone waits, once,
for as long as it says. What was in flight when the first refusal came back is one wave and makes one
pause. If the provider names no time, the pause doubles from wave to wave until a call succeeds, up to
two minutes; but the first wave only reduces the slots if the limiter finds their number by itself.

A used-up quota of a day makes one pause, until it resets; an exhausted account pauses nobody. Each
transport and each wrapped model's retries may hear of one wave; the limiter keeps what they heard.
"""

import contextlib
import functools
import logging
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

from asyncbucket.engine.dispatchers import Lock
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.wording import in_seconds
from asyncbucket.levels import (
    can_give_slots_up,
    in_force,
    is_in_shadow,
    is_learning,
    levels,
    meet_provider,
    observe_remaining,
    provider_of,
    shared,
)
from asyncbucket.providers.errors import DAILY, Verdict, http_date
from asyncbucket.providers.profiles import Profile, Told

#: What a header says of a limit, by the fields of `Told`.
_PARTS: Final = ("remaining", "limit", "period", "reset")
_HeaderIndex: TypeAlias = dict[bytes, tuple[Told | None, str]]

#: How many times in a window replies are read, at most.
_READS_PER_WINDOW: Final = 6_000
#: So many replies with numbers are read even if they follow at once: they say how it counts.
_READ_FIRST: Final = 64
_SECOND: Final = 1_000_000_000
#: What is longer is no number, no duration and no date.
_LONGEST: Final = 64
_DATE: Final = re.compile(rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,16}(?:Z|[+-][0-9]{2}:[0-9]{2})")
_DURATION: Final = re.compile(
    rb"(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m(?!s))?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)s)?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)ms)?"
)
#: A count has one to twelve digits, which in bytes are ASCII.
_COUNT: Final = re.compile(rb"[ \t]*([0-9]{1,12})[ \t]*")

#: The first pause (s) if the provider names none; and the longest, except until a quota of a day is
#: full again.
_FIRST_PAUSE: Final = 1.0
_MAX_PAUSE: Final = 120.0
#: A refusal that names no time counts if half of the latest replies are refusals, too: of the last
#: eight, or, if headers show room for the call, of as many as are in flight; or else, where limits learn, a
#: sixth of the last 32: a limit a little lower than ours refuses no more. So many are remembered.
_PART: Final = 2
_LATEST: Final = 8
_LONG_PART: Final = 6
_LONG: Final = 32
_REMEMBERED: Final = 1_024
#: What a refusal is: of no rate, an accident, the first of a wave, or a later one of it.
Effect: TypeAlias = Literal["none", "accident", "first", "later"]
_EXPLANATIONS: Final = {
    "429": (
        "the provider refused a call (429); its limits may be lower than yours, or others use the "
        "same key"
    ),
    DAILY: "the provider's quota for the day is used up",
    "overload": "the provider is overloaded; a lower concurrency may serve it better",
}
#: At most one pause in this many seconds is logged.
_WARNING_INTERVAL: Final = 60.0

_log: Final = logging.getLogger("asyncbucket")


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
        self.learns = learn
        self._expected = False
        #: How many replies are still to be read whenever they come, because they may prove something.
        self._unread = _READ_FIRST
        self._ignore_until = -math.inf

    @classmethod
    def of(cls, limiter: Limiter) -> "HeaderReader":
        """Return what all models that are paced by this limiter share."""
        return shared(cls, limiter, "_headers")

    def expect(self) -> None:
        """Have the provider's limits learn how it counts them, from the first call on."""
        if self.learns and not self._expected:
            self._expected = True
            meet_provider(provider_of(self._limiter))

    def is_due(self, now: float) -> bool:
        """Tell whether it is time to read headers again, at an instant of the limiter's clock.

        In between little changes, and reading them is a good part of what a call costs.
        """
        return self._unread > 0 or now >= self._ignore_until

    def read(
        self,
        headers: Any,
        profile: Profile,
        *,
        since: float | None = None,
        own: Mapping[str, int] | None = None,
    ) -> None:
        """Read the headers of a reply to a call that was sent at ``since``.

        Args:
            headers: httpx's or httpx2's headers, or pairs of bytes.
            profile: which headers mean what.
            since: in seconds of the limiter's clock.
            own: what the call has booked; the reply has counted that.
        """
        if not self.learns or not profile.tells:
            return
        reports, wall = _read_reports(headers, profile)
        for report in reports.values():
            self._complete(report)
        self._adopt(reports.values())
        for report in reports.values():
            self._report(report, since, wall, (own or {}).get(report.told.resource, 0))
        tells = any(report.reset for report in reports.values())
        self._unread = max(0, self._unread - 1) if tells else 0
        if since is not None:
            windows = (limit.per for limit in in_force(self._limiter).limits)
            self._ignore_until = since + min(windows, default=0.0) / _READS_PER_WINDOW

    def _complete(self, report: "_Report") -> None:
        """Find out what an announced limit is for if its window varies: Azure's is 1, 10 or 60 s.

        A slice of one of our limits says as much of the whole limit.
        """
        told, seconds = report.told, report.seconds
        if told.period is None:
            return
        ours = (limit.key for limiter in self._levels for limit in limiter.limits)
        if not 0 < seconds <= told.per:
            report.amount = math.inf
        elif (told.resource, told.per) in ours:
            report.amount *= told.per / seconds
        else:
            report.per = seconds

    def _report(self, report: "_Report", since: float | None, wall: float | None, own: int) -> None:
        """Tell the limiter what is left of the limit with that amount, or else the nearest one.

        Of several that are as near, it is the highest limiter's.
        """
        resource, per, amount = report.told.resource, report.per, report.amount
        found = [
            ((limit.units != amount, limit.per != per, abs(limit.units - amount)), limiter, limit)
            for limiter in reversed(self._levels)
            for limit in limiter.limits
            if limit.resource == resource and (limit.per == per or limit.units == amount)
        ]
        if report.left == math.inf or not found:
            return
        _, limiter, limit = min(found, key=lambda each: each[0])
        observe_remaining(
            limiter,
            int(min(report.left, amount)),
            resource=resource,
            per=limit.per,
            limit=None if amount == math.inf else int(amount),
            since=since,
            own=own,
            rounding=report.rounding,
            full_in=read_reset(report.reset, wall),
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
            limit = Limit(report.told.resource, amount, per=report.per, burst=burst)
            if limit not in self._limiter.limits:
                self._limiter.learn(limit)


@dataclass(slots=True)
class _Report:
    """Hold what a reply says of one window; if several headers do, the lowest of each kind counts."""

    told: Told
    #: The window; and what the reply says of it, if it does.
    per: float
    seconds: int = 0
    left: float = math.inf
    amount: float = math.inf
    rounding: int = 0
    reset: bytes = b""

    def add(self, part: str, number: int) -> None:
        """Take in what a header says: what remains, the amount of the limit, or its window."""
        if part == "period":
            self.seconds = number
        elif part == "limit":
            self.amount = min(self.amount, number * self.told.times or math.inf)
        elif number < self.left:
            self.left, self.rounding = number, self.told.rounding


def read_reset(value: bytes, wall: float | None = None) -> tuple[int, int] | None:
    """Return in how many nanoseconds a limit is full again, and by how many that may be off.

    Args:
        value: seconds, a duration of Go's such as ``6m0s``, or a date; None if it is none of these.
        wall: when the reply was sent, by the server's clock (s since 1970); by ours, if that is not
            known.
    """
    if _COUNT.fullmatch(value):
        return int(value) * _SECOND, _SECOND
    if _DATE.fullmatch(value):
        with contextlib.suppress(ValueError):  # a 31st of February
            seconds = datetime.fromisoformat(value.decode()).timestamp()
            # Both dates have whole seconds: that of the reset may be rounded up, the other is cut off.
            seconds -= (time.time() if wall is None else wall) + 0.5
            return round(max(0.0, seconds) * _SECOND), 3 * _SECOND // 2
    found = _DURATION.fullmatch(value + b"s" if value[-1:].isdigit() else value)
    if not value or found is None:
        return None
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in found.groups())
    seconds += hours * 3_600 + minutes * 60 + milliseconds / 1_000
    return round(seconds * _SECOND), _SECOND // 100


def _read_reports(
    headers: Any, profile: Profile
) -> tuple[dict[tuple[str, float], "_Report"], float | None]:
    """Return what headers say of each window, and when the server sent them, by its clock."""
    index, wall = _headers_of(profile), None
    reports: dict[tuple[str, float], _Report] = {}
    # httpx's and httpx2's mappings search all headers again for every name.
    for name, value in getattr(headers, "raw", headers):
        known = index.get(name.lower())
        if known is None or len(value) > _LONGEST:
            continue
        told, part = known
        if told is None:
            wall = http_date(value.decode("latin-1"))
        elif part == "reset" or _COUNT.fullmatch(value):
            key = told.resource, told.per
            report = reports.get(key) or reports.setdefault(key, _Report(told, told.per))
            if part == "reset":
                report.reset = value
            else:
                report.add(part, int(value))
    return reports, wall


@functools.lru_cache(64)
def _headers_of(profile: Profile) -> _HeaderIndex:
    """Return which limit each header reports, and what of it."""
    names = [(told, part, getattr(told, part)) for told in profile.tells for part in _PARTS]
    index: _HeaderIndex = {b"date": (None, "")}
    index |= {name.lower().encode(): (told, part) for told, part, name in names if name is not None}
    return index


class Refusals:
    """Pause one limiter when its provider refuses; `of` returns the one object for each limiter.

    It has to be told of a success only while `latest` is not 0. Safe on several threads.
    """

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self._lock = Lock()
        #: Which of the latest replies were refusals: one bit each, the latest lowest.
        self.latest = 0
        #: How many calls succeeded while it was not 0.
        self.successes = 0
        #: Waves since a call last succeeded; when the first and the latest came, and the pause ends.
        self._waves = 0
        self._first_at = self._latest_at = self._paused_until = -math.inf
        #: Until when pauses are not logged.
        self._quiet_until = -math.inf
        #: Whether an exhausted account was logged.
        self._warned = False

    @classmethod
    def of(cls, limiter: Limiter) -> "Refusals":
        """Return what all who hear of this limiter's refusals share."""
        return shared(cls, limiter, "_refusals")

    def succeeded(self, sent_at: float | None = None) -> None:
        """End a series of waves, unless the call was sent before the latest wave came."""
        with self._lock:
            self._remember(0)
            self.successes += 1
            if not self.latest or (self._waves and self._is_over(self.limiter.now(), sent_at)):
                self._waves = 0
            elif self._waves and sent_at is not None and sent_at > self._first_at:
                self._waves, self._first_at = 1, self._latest_at

    def lasted(self, *, waves: int) -> float:
        """Return for how long (s) no call has succeeded, if there were more than so many ``waves``."""
        return self.limiter.now() - self._first_at if self._waves > waves else 0.0

    def seconds_left(self) -> float:
        """Return the seconds until the pause of the latest wave ends."""
        return max(0.0, self._paused_until - self.limiter.now())

    def _is_over(self, now: float, sent_at: float | None) -> bool:
        """Tell whether a call sent at ``sent_at``, answered now, says more than the latest wave."""
        return now >= self._paused_until and (sent_at is None or sent_at > self._latest_at)

    def take_in(
        self, verdict: Verdict, *, sent_at: float | None = None, in_flight: int = 0
    ) -> Effect:
        """Pause the limiter if a refusal concerns all; return what one for rate is to the others.

        One that names no time counts only in runs: a limit refuses in runs, an accident alone.

        During a pause nothing is sent. So a refusal that arrives during one, or of a call that was
        sent before it, belongs to the wave that caused it; it only makes the pause longer if the
        server says so.

        Args:
            verdict: what the refusal means.
            sent_at: when the call was sent, in seconds of the limiter's clock, if that is known.
            in_flight: how many calls are in flight, if headers show room for this one.
        """
        if verdict.pause is None:
            self._warn_of_exhausted_account(verdict)
            return "none"
        asked, learns = verdict.retry_after, is_learning(self.limiter)
        with self._lock:
            self._remember(1)
            is_run = (
                asked is not None
                or verdict.pause != "429"
                or self._are_part(_PART, of=max(_LATEST, in_flight))
                or (not in_flight and learns and self._are_part(_LONG_PART, of=_LONG))
            )
            now = self.limiter.now()
            new_wave = self._is_over(now, sent_at) and is_run
            if new_wave:
                self._waves, self._latest_at = self._waves + 1, now
                self._first_at = now if self._waves == 1 else self._first_at
            seconds = 0.0
            if asked is not None:
                seconds = asked if verdict.pause == DAILY else min(asked, _MAX_PAUSE)
            elif new_wave and (self._waves > 1 or not can_give_slots_up(self.limiter)):
                seconds = doubled(_FIRST_PAUSE, self._waves, most=_MAX_PAUSE)
            self._paused_until = max(self._paused_until, now + seconds)
            is_news = new_wave and seconds > 0 and now >= self._quiet_until
            if is_news:
                self._quiet_until = now + _WARNING_INTERVAL
        self.limiter.pause(seconds, reason=verdict.pause, gradually=not learns)
        if is_news and not is_in_shadow(self.limiter):
            name, why = self.limiter.name, _EXPLANATIONS[verdict.pause]
            _log.warning("limiter %r pauses for %s: %s", name, in_seconds(seconds), why)
        if verdict.pause != "429":
            return "none"
        if not is_run:
            return "accident"
        return "first" if new_wave else "later"

    def _are_part(self, part: int, *, of: int) -> bool:
        """Tell whether refusals are half, or what ``part`` says, ``of`` so many latest replies."""
        return (self.latest & (1 << of) - 1).bit_count() * part >= of

    def _remember(self, refusal: int) -> None:
        self.latest = (self.latest << 1 | refusal) & (1 << _REMEMBERED) - 1

    def _warn_of_exhausted_account(self, verdict: Verdict) -> None:
        if verdict.exhausted and not self._warned:
            self._warned = True
            _log.warning(
                "the provider permanently refuses calls of limiter %r (%s): waiting does not help; "
                "check the account's plan and balance",
                *(self.limiter.name, verdict.reason),
            )


def doubled(first: float, times: int, *, most: float) -> float:
    """Return the ``times``-th of a doubling series, 1, 2, 4... times ``first``, up to ``most``.

    The exponent is bounded, because a series may be long and a power of floats overflows.
    """
    return min(first * 2.0 ** min(times - 1, 30), most)
