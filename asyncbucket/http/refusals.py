"""When the provider turns calls away: everyone waits, once, and for as long as it says.

What a refusal means is for `classify` to say. Here is what follows for the limiter: a refusal for
rate, or for want of slots, concerns all calls, and so does an overloaded provider (529, and 503
that says so). Those of one wave, what was in flight when the first came back, make one pause; where
the provider names no time, it doubles from wave to wave until a call succeeds. An exhausted quota is
nothing that waiting helps, and pauses nobody.
"""

import logging
import math
import threading
from collections.abc import Mapping
from typing import Any, Final

from asyncbucket.http.failures import Verdict, classify
from asyncbucket.limiter import Limiter

#: The first pause (s) where the provider names none, and the longest.
_FIRST: Final = 1.0
_LONGEST: Final = 120.0
_WHY: Final = {
    "429": (
        "the provider refused a call (429); its limits may be lower than yours, or others use the "
        "same key"
    ),
    "overload": "the provider is overloaded; a lower concurrency may serve it better",
}
#: One pause in so many seconds is a warning; the others are for whoever debugs.
_QUIET: Final = 60.0
_UNAVAILABLE: Final = 503
_OVERLOADED: Final = 529
_RATE_LIMITED: Final = 429

_log: Final = logging.getLogger("asyncbucket")


class _Refusal(Exception):  # noqa: N818 - never raised: what `classify` is shown
    """Look like an SDK's error."""

    def __init__(self, status: int, headers: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        super().__init__(status)
        self.status_code = status
        self.body = body
        self.response = _Response(headers)


class _Response:
    __slots__ = ("headers",)

    def __init__(self, headers: Mapping[str, Any]) -> None:
        self.headers = headers


class Refusals:
    """Pause one limiter by what its provider refuses. Safe on several threads."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._lock = threading.Lock()
        self._waves = 0
        self._paused_until = -math.inf
        self._quiet_until = -math.inf
        self._told_of_quota = False

    def succeeded(self) -> None:
        """End a series of waves."""
        if self._waves:
            with self._lock:
                if self._now() >= self._paused_until:
                    self._waves = 0

    def judge(self, status: int, headers: Mapping[str, Any], body: Mapping[str, Any]) -> Verdict:
        """Judge a reply whose status is an error, and pause the limiter if it concerns all."""
        verdict = classify(_Refusal(status, headers, body))
        if verdict.rate_limited:
            self._pause(verdict.retry_after, reason="429")
        elif self._is_overload(status, verdict):
            self._pause(verdict.retry_after, reason="overload")
        elif status == _RATE_LIMITED and not self._told_of_quota:
            self._told_of_quota = True
            _log.warning(
                "the provider refuses calls of limiter %r for good (%s): no waiting helps; "
                "look at the account's plan and balance",
                self._limiter.name,
                verdict.reason,
            )
        return verdict

    def _is_overload(self, status: int, verdict: Verdict) -> bool:
        if not verdict.retry:
            return False
        says_so = verdict.retry_after is not None or "overloaded" in verdict.reason
        return status == _OVERLOADED or (status == _UNAVAILABLE and says_so)

    def _pause(self, asked: float | None, *, reason: str) -> None:
        with self._lock:
            now = self._now()
            new_wave = now >= self._paused_until
            self._waves += new_wave
            if asked is not None:
                seconds = min(asked, _LONGEST)
            elif new_wave:
                seconds = min(_FIRST * 2.0 ** min(self._waves - 1, 30), _LONGEST)
            else:
                seconds = self._paused_until - now
            self._paused_until = max(self._paused_until, now + seconds)
        self._limiter.pause(seconds, reason=reason, gradually=True)
        if new_wave:
            loud = now >= self._quiet_until
            if loud:
                self._quiet_until = now + _QUIET
            _log.log(
                logging.WARNING if loud else logging.DEBUG,
                "limiter %r pauses for %.3g s: %s",
                self._limiter.name,
                seconds,
                _WHY[reason],
            )

    def _now(self) -> float:
        return self._limiter.now()
