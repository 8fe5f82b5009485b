"""One call that may be retried: how often it was tried, since when, and what its errors mean."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.wording import in_seconds
from asyncbucket.providers.errors import Verdict, classify
from asyncbucket.retry.stamina_loop import TryAgain, is_stamina_off, try_again_class

if TYPE_CHECKING:
    from asyncbucket.retry.retrier import Retrier

T = TypeVar("T")

_log: Final = logging.getLogger("asyncbucket")


class Sent:
    """Hold when the latest attempt was sent, in seconds of the limiter's clock; None until then."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at: float | None = None


class Trial:
    """One call: how often it was tried, since when, and the provider's last error."""

    __slots__ = ("attempts", "deadline", "error", "retrier", "sent", "started")

    def __init__(self, retrier: "Retrier", deadline: float | None, sent: Sent | None) -> None:
        self.retrier = retrier
        self.sent = Sent() if sent is None else sent
        self.deadline = math.inf if deadline is None else deadline
        self.started = retrier.now()
        self.attempts = 0
        self.error: Exception | None = None

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        self.attempts += 1
        try:
            result = await attempt()
        except Exception as error:
            try_again = self.judge(error)
            if try_again is None:
                raise
        else:
            self.retrier.succeeded(self.sent.at)
            return result
        raise try_again  # raised here so that the real error is not its context

    def run_sync(self, attempt: Callable[[], T]) -> T:
        self.attempts += 1
        try:
            result = attempt()
        except Exception as error:
            try_again = self.judge(error)
            if try_again is None:
                raise
        else:
            self.retrier.succeeded(self.sent.at)
            return result
        raise try_again

    def judge(self, error: Exception) -> TryAgain | None:
        """Return what makes stamina try again; or None, after noting on `error` why this is the end."""
        if isinstance(error, AsyncBucketError):
            return None
        self.error = error
        verdict = classify(error)
        wait, reason = self._next_wait(verdict)
        if reason is None and not verdict.rate_limited and not self.retrier.spend():
            reason = "the retry budget is spent, too few calls succeed; Retry(budget=...) sets it"
        if reason is None:
            _log.debug(
                "attempt %d: %s; again in %s", self.attempts, verdict.reason, in_seconds(wait)
            )
            self.retrier.tell_of_retry(self.attempts, verdict.reason, wait)
            error_class = try_again_class(type(error).__module__, type(error).__qualname__)
            return error_class(verdict.reason, wait)
        # The user's own ValueError stays as it is; a provider's answer gets a note.
        if self.attempts > 1 or verdict.retry or verdict.reason.startswith("HTTP"):
            self._add_note(error, reason)
        return None

    def _next_wait(self, verdict: Verdict) -> tuple[float, str | None]:
        """Return how long to wait before the next attempt, and why there will be none, if so."""
        retrier, policy, retry_after = self.retrier, self.retrier.policy, verdict.retry_after
        if not verdict.retry:
            return 0.0, f"{verdict.reason} is not retried"
        paused = retrier.pause(verdict, self.sent.at) if verdict.rate_limited else None
        refused_for = retrier.refused_for() if paused is not None and retry_after is None else 0.0
        given_wait = paused if retry_after is None else retry_after
        wait = retrier.hold_on(given_wait) if given_wait else retrier.back_off(self.attempts)
        left = self.deadline - retrier.now()
        if self.attempts >= policy.attempts:
            reason = f"Retry(attempts={policy.attempts}) allows no more"
        elif is_stamina_off():
            reason = "stamina is switched off"
        elif retry_after is not None and retry_after > policy.max_wait:
            reason = (
                f"the provider asks to wait {in_seconds(retry_after)}, "
                f"and Retry(max_wait={policy.max_wait:g}) allows no more"
            )
        elif refused_for > policy.max_wait:
            reason = f"the provider has refused every call for {in_seconds(refused_for)}"
        elif not wait <= left:
            reason = (
                f"the next attempt is due in {in_seconds(wait)}, the deadline in {in_seconds(left)}"
            )
        else:
            return wait, None
        return 0.0, reason

    def final_error(self, ended: TryAgain | AsyncBucketError) -> Exception:
        """Return what to raise if no further attempt was possible: the provider's last error."""
        error = self.error
        if error is None:
            return ended
        if isinstance(ended, TryAgain):
            self._add_note(error, "stamina is in its testing mode")
        else:
            self.attempts -= 1  # it was refused before it reached the provider
            self._add_note(error, f"no other attempt was admitted: {ended}")
        return error

    def _add_note(self, error: Exception, reason: str) -> None:
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        seconds = self.retrier.now() - self.started
        error.add_note(f"asyncbucket: tried {times} in {seconds:.1f} s; gave up: {reason}")
