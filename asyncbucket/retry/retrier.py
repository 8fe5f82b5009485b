"""What retries the calls of one model, under one policy and one budget."""

import logging
import random
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.events import Retried
from asyncbucket.core.levels import effective_limiter
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.node import shown_name
from asyncbucket.http.failures import Verdict
from asyncbucket.http.refusals import Refusals, doubled
from asyncbucket.retry.policy import Retry
from asyncbucket.retry.stamina_loop import TryAgain, is_not_ours, named_like, with_retries
from asyncbucket.retry.trial import Sent, Trial

T = TypeVar("T")


class Retrier:
    """Retry the calls of one model, under one policy and one budget.

    Safe on several event loops and threads at once.

    Args:
        policy: what is retried, how often and when.
        limiter: what a 429 pauses; deadlines are in seconds of its clock.
        caller: the limiter that the calls ask, if it is another one, below ``limiter``; events of
            retries are sent as its own.
        chance: random numbers from 0 to 1, for the jitter.
    """

    def __init__(
        self,
        policy: Retry,
        limiter: Limiter,
        *,
        caller: Limiter | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.policy = policy
        self._limiter = limiter
        self._caller = limiter if caller is None else caller
        self._chance = chance
        self._lock = threading.Lock()
        self._budget = policy.budget.capacity
        self._refusals = Refusals(limiter)
        # stamina logs each retry as a warning: in a storm, hundreds of lines that say nothing.
        logging.getLogger("stamina").addFilter(is_not_ours)

    def __repr__(self) -> str:
        return f"<Retrier {self.policy.attempts} attempts, {self._budget:g} retries in the budget>"

    async def call(
        self,
        attempt: Callable[[], Awaitable[T]],
        *,
        deadline: float | None = None,
        tried: Callable[..., object] | None = None,
        sent: Sent | None = None,
    ) -> T:
        """Await ``attempt()`` until it succeeds or there is no point in trying again.

        Cancellation passes through at once, from an attempt and from a back-off.

        Args:
            attempt: makes one attempt; it acquires for itself, and gives back whatever happens.
            deadline: the latest instant at which an attempt may begin, in seconds of the limiter's
                clock.
            tried: what the attempt calls in the end; stamina's hooks see its name.
            sent: where attempts note when they were sent, so that a late refusal is assigned to its
                own wave.

        Raises:
            Exception: the provider's last error, with a note; or whatever else `attempt` raised.
        """
        trial = Trial(self, deadline, sent)

        async def once() -> T:
            return await trial.run(attempt)

        try:
            return await with_retries(
                named_like(once, tried or attempt), attempts=self.policy.attempts
            )()
        except (TryAgain, AsyncBucketError) as ended:
            error = trial.final_error(ended)
        finally:
            trial.error = None  # its traceback leads back here
        raise error

    def call_sync(
        self,
        attempt: Callable[[], T],
        *,
        deadline: float | None = None,
        tried: Callable[..., object] | None = None,
        sent: Sent | None = None,
    ) -> T:
        """Call ``attempt()`` as `call` does, and block this thread during a back-off."""
        trial = Trial(self, deadline, sent)

        def once() -> T:
            return trial.run_sync(attempt)

        try:
            return with_retries(named_like(once, tried or attempt), attempts=self.policy.attempts)()
        except (TryAgain, AsyncBucketError) as ended:
            error = trial.final_error(ended)
        finally:
            trial.error = None
        raise error

    def succeeded(self, sent_at: float | None = None) -> None:
        """Count a success: it pays into the budget, and ends a series of earlier refusals."""
        with self._lock:
            budget = self.policy.budget
            self._budget = min(budget.capacity, self._budget + budget.per_success)
        self._refusals.succeeded(sent_at)

    def pause(self, verdict: Verdict, sent_at: float | None = None) -> float:
        """Pause the limiter after a refusal for rate; return the seconds until it ends."""
        policy = self.policy
        return self._refusals.pause(
            verdict.retry_after,
            whole_after=verdict.whole_after,
            first=policy.backoff,
            longest=policy.max_wait,
            sent_at=sent_at,
        )

    def refused_for(self) -> float:
        """Return for how long (s) the provider has refused whatever came; 0 if that is not sure."""
        return self._refusals.lasted(waves=self.policy.attempts)

    def back_off(self, failures: int) -> float:
        """Return the seconds to wait after this many failures in a row, jitter included."""
        longest = doubled(self.policy.backoff, failures, most=self.policy.max_wait)
        return longest * (1 + self._chance()) / 2

    def hold_on(self, seconds: float) -> float:
        """Return the seconds to wait if the server said how many, jitter included."""
        return min(seconds * (1 + self.policy.jitter * self._chance()), self.policy.max_wait)

    def spend(self) -> bool:
        """Take a retry from the budget, if it holds one."""
        with self._lock:
            enough = self._budget >= 1
            self._budget -= enough
            return enough

    def tell_of_retry(self, attempt: int, error: str, delay: float) -> None:
        """Tell the observers of the limiter that was asked that a call will be retried."""
        caller = effective_limiter(self._caller)
        name, at = shown_name(caller.name), self.now()
        caller.emit(Retried(limiter=name, at=at, attempt=attempt, error=error, delay=delay))

    def now(self) -> float:
        """Return the current time in seconds of the limiter's clock."""
        return self._limiter.now()
