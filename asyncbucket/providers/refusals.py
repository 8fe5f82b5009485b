"""When the provider refuses calls: everyone waits, once, and for as long as it says.

`asyncbucket.providers.errors` decides what a refusal means. This module decides what follows for
the limiter. A refusal for rate, or for lack of slots, concerns all calls, and so does an overloaded
provider (529, or a 503 that says so). The refusals of one wave, which is everything in flight when
the first one came back, make one pause. If the provider names no time, the pause doubles from wave
to wave until a call succeeds, up to two minutes. If the limiter finds its concurrency by itself, a first wave that names no time
reduces the slots and makes no pause: that is how a server says that there was one call too many.

A quota of a day that is used up makes one pause that lasts until the quota is full again. An
exhausted account does not pass by waiting, and pauses nobody.

Several parties may hear of one wave: each transport of a limiter, and each wrapped model's retries.
What they have heard is kept with the limiter, so it remains one wave.
"""

import logging
import math
from typing import Final

from asyncbucket.core.levels import can_give_slots_up
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import in_seconds
from asyncbucket.providers.errors import Verdict
from asyncbucket.waiting import Lock

#: The first pause (s) if the provider names none, and the longest.
_FIRST_PAUSE: Final = 1.0
_MAX_PAUSE: Final = 120.0
_EXPLANATIONS: Final = {
    "429": (
        "the provider refused a call (429); its limits may be lower than yours, or others use the "
        "same key"
    ),
    "daily quota": "the provider's quota for the day is used up",
    "overload": "the provider is overloaded; a lower concurrency may serve it better",
}
#: At most one pause in this many seconds is logged as a warning; the others for debugging.
_WARNING_INTERVAL: Final = 60.0

_log: Final = logging.getLogger("asyncbucket")


class Refusals:
    """Pause one limiter when its provider refuses; `of` returns the one object for each limiter.

    Safe on several threads.
    """

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self._lock = Lock()
        #: Waves since a call last succeeded, and when the first of them came.
        self._waves = 0
        self._first_at = -math.inf
        #: When the latest wave came, and when its pause ends.
        self._started_at = -math.inf
        self._paused_until = -math.inf
        #: Until when pauses are logged for debugging only.
        self._quiet_until = -math.inf
        #: Whether an exhausted account was logged.
        self._warned = False

    @classmethod
    def of(cls, limiter: Limiter) -> "Refusals":
        """Return what all who hear of this limiter's refusals share."""
        found: Refusals = vars(limiter).get("_refusals") or vars(limiter).setdefault(
            "_refusals", cls(limiter)
        )
        return found

    def succeeded(self, sent_at: float | None = None) -> None:
        """End a series of waves, unless the call was sent before the latest wave came."""
        if self._waves:
            with self._lock:
                if self._is_over(self.limiter.now(), sent_at):
                    self._waves = 0

    def lasted(self, *, waves: int) -> float:
        """Return for how long (s) no call has succeeded, if there were more than so many ``waves``."""
        return self.limiter.now() - self._first_at if self._waves > waves else 0.0

    def seconds_left(self) -> float:
        """Return the seconds until the pause of the latest wave ends."""
        return max(0.0, self._paused_until - self.limiter.now())

    def _is_over(self, now: float, sent_at: float | None) -> bool:
        """Tell whether a call sent at ``sent_at``, answered now, says more than the latest wave."""
        return now >= self._paused_until and (sent_at is None or sent_at > self._started_at)

    def take_in(
        self,
        verdict: Verdict,
        *,
        sent_at: float | None = None,
        first: float = _FIRST_PAUSE,
        longest: float = _MAX_PAUSE,
    ) -> float:
        """Pause the limiter if a refusal concerns all; return the seconds until the pause ends.

        During a pause nothing is sent. So a refusal that arrives during one, or of a call that was
        sent before it, belongs to the wave that caused it; it only makes the pause longer if the
        server says so.

        Args:
            verdict: what the refusal means.
            sent_at: when the call was sent, in seconds of the limiter's clock, if that is known.
            first: the seconds of a first pause for which the server names no time; the next ones
                double.
            longest: the most seconds, unless a quota of a day is used up: then nobody asks before.
        """
        if verdict.pause is None:
            self._warn_of_exhausted_account(verdict)
            return 0.0
        asked = verdict.retry_after
        with self._lock:
            now = self.limiter.now()
            new_wave = self._is_over(now, sent_at)
            if new_wave:
                self._waves += 1
                self._started_at = now
                self._first_at = now if self._waves == 1 else self._first_at
            if asked is not None:
                seconds = asked if verdict.daily else min(asked, longest)
            elif not new_wave:
                seconds = max(0.0, self._paused_until - now)
            elif self._waves == 1 and can_give_slots_up(self.limiter):
                seconds = 0.0
            else:
                seconds = doubled(first, self._waves, most=longest)
            self._paused_until = max(self._paused_until, now + seconds)
            level = logging.NOTSET
            if new_wave and seconds > 0:
                level = logging.WARNING if now >= self._quiet_until else logging.DEBUG
            if level == logging.WARNING:
                self._quiet_until = now + _WARNING_INTERVAL
        self.limiter.pause(seconds, reason=verdict.pause, gradually=True)
        if level:
            name, why = self.limiter.name, _EXPLANATIONS[verdict.pause]
            _log.log(level, "limiter %r pauses for %s: %s", name, in_seconds(seconds), why)
        return seconds

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
