"""When the provider refuses calls: everyone waits, once, and for as long as it says.

`classify` decides what a refusal means. This module decides what follows for the limiter. A refusal
for rate, or for lack of slots, concerns all calls, and so does an overloaded provider (529, or a
503 that says so). The refusals of one wave, which is everything in flight when the first one came
back, make one pause. If the provider names no time, the pause doubles from wave to wave until a
call succeeds, up to the time when the provider says that its limits are fully available again. If
the limiter finds its concurrency by itself, a first wave that names no time reduces the slots and
makes no pause: that is how a server says that there was one call too many. An exhausted quota does
not pass by waiting, and pauses nobody.

Several parties may hear of one wave: each transport of a limiter, and each wrapped model's retries.
What they have heard is kept once for each limiter, so it remains one wave.
"""

import logging
import math
import threading
from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

from asyncbucket.core.levels import can_give_slots_up
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import in_seconds
from asyncbucket.providers.errors import RATE_LIMITED, Verdict, classify

#: The first pause (s) if the provider names none, and the longest.
_FIRST_PAUSE: Final = 1.0
_MAX_PAUSE: Final = 120.0
_EXPLANATIONS: Final = {
    "429": (
        "the provider refused a call (429); its limits may be lower than yours, or others use the "
        "same key"
    ),
    "overload": "the provider is overloaded; a lower concurrency may serve it better",
}
#: At most one pause in this many seconds is logged as a warning; the others for debugging.
_WARNING_INTERVAL: Final = 60.0
_UNAVAILABLE: Final = 503
_OVERLOADED: Final = 529

_log: Final = logging.getLogger("asyncbucket")


class _Refusal(Exception):  # noqa: N818 - never raised: it is only shown to `classify`
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


class _RefusalState:
    """What is known of one limiter's refusals, from whichever source."""

    __slots__ = (
        "first_wave_at",
        "lock",
        "paused_until",
        "quiet_until",
        "quota_warned",
        "wave_started_at",
        "waves",
    )

    def __init__(self) -> None:
        self.lock = threading.Lock()
        #: Waves since a call last succeeded, and when the first of them came.
        self.waves = 0
        self.first_wave_at = -math.inf
        #: When the latest wave came, and when its pause ends.
        self.wave_started_at = -math.inf
        self.paused_until = -math.inf
        self.quiet_until = -math.inf
        self.quota_warned = False

    def is_after_wave(self, now: float, sent_at: float | None) -> bool:
        """Tell whether a call sent at ``sent_at``, answered now, says more than the latest wave."""
        return now >= self.paused_until and (sent_at is None or sent_at > self.wave_started_at)


_STATES: Final[WeakKeyDictionary[Limiter, _RefusalState]] = WeakKeyDictionary()


class Refusals:
    """Pause one limiter when its provider refuses; all objects for that limiter share their state.

    Safe on several threads.
    """

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._state = _STATES.setdefault(limiter, _RefusalState())

    def succeeded(self, sent_at: float | None = None) -> None:
        """End a series of waves, unless the call was sent before the latest wave came."""
        state = self._state
        if state.waves:
            with state.lock:
                if state.is_after_wave(self._limiter.now(), sent_at):
                    state.waves = 0

    def lasted(self, *, waves: int) -> float:
        """Return for how long (s) no call has succeeded, if there were more than so many ``waves``."""
        state = self._state
        return self._limiter.now() - state.first_wave_at if state.waves > waves else 0.0

    def judge(
        self,
        status: int,
        headers: Mapping[str, Any],
        body: Mapping[str, Any],
        *,
        sent_at: float | None = None,
    ) -> Verdict:
        """Judge a reply whose status is an error, and pause the limiter if it concerns all."""
        verdict = classify(_Refusal(status, headers, body))
        if verdict.rate_limited:
            self.pause(verdict.retry_after, whole_after=verdict.whole_after, sent_at=sent_at)
        elif self._is_overload(status, verdict):
            self.pause(verdict.retry_after, reason="overload", sent_at=sent_at)
        elif status == RATE_LIMITED and not self._state.quota_warned:
            self._state.quota_warned = True
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

    def pause(
        self,
        retry_after: float | None,
        *,
        reason: str = "429",
        whole_after: float | None = None,
        first: float = _FIRST_PAUSE,
        longest: float = _MAX_PAUSE,
        sent_at: float | None = None,
    ) -> float:
        """Pause the limiter after a refusal that concerns all; return the seconds until it ends.

        During a pause nothing is sent. So a refusal that arrives during one, or of a call that was
        sent before it, belongs to the wave that caused it; it only makes the pause longer if the
        server says so.

        Args:
            retry_after: the seconds that the server asks for, if it does.
            reason: ``"429"`` or ``"overload"``.
            whole_after: the seconds until its limits are fully available again, if it says so: a
                pause without ``retry_after`` is no longer than that, but at least ``first``.
            first: the seconds of a first pause for which the server names no time; the next ones
                double.
            longest: the most seconds.
            sent_at: when the call was sent, in seconds of the limiter's clock, if that is known.
        """
        state = self._state
        with state.lock:
            now = self._limiter.now()
            new_wave = state.is_after_wave(now, sent_at)
            if new_wave:
                state.waves += 1
                state.wave_started_at = now
                if state.waves == 1:
                    state.first_wave_at = now
            if retry_after is not None:
                seconds = min(retry_after, longest)
            elif not new_wave:
                seconds = max(0.0, state.paused_until - now)
            elif state.waves == 1 and can_give_slots_up(self._limiter):
                seconds = 0.0
            else:
                cap = longest if whole_after is None else min(longest, max(first, whole_after))
                seconds = doubled(first, state.waves, most=cap)
            state.paused_until = max(state.paused_until, now + seconds)
            is_logged = new_wave and seconds > 0
            is_warning = is_logged and now >= state.quiet_until
            if is_warning:
                state.quiet_until = now + _WARNING_INTERVAL
        self._limiter.pause(seconds, reason=reason, gradually=True)
        if is_logged:
            _log.log(
                logging.WARNING if is_warning else logging.DEBUG,
                "limiter %r pauses for %s: %s",
                self._limiter.name,
                in_seconds(seconds),
                _EXPLANATIONS[reason],
            )
        return seconds


def doubled(first: float, times: int, *, most: float) -> float:
    """Return the ``times``-th of a doubling series, 1, 2, 4... times ``first``, up to ``most``.

    The exponent is bounded, because a series may be long and a power of floats overflows.
    """
    return min(first * 2.0 ** min(times - 1, 30), most)
