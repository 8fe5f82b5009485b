"""Retry what failed temporarily, and only that; stamina does the looping and the sleeping.

What is decided here, for each failed attempt:

1. *Is it worth it?* `classify` looks at the error, from whichever library, without importing that:
   time-outs, lost connections, 408, 409, 429 and 5xx are retried; other 4xx and an exhausted quota
   are not.
2. *Who waits?* A 429 concerns all users of the limiter, so all pause, by the rule of
   `asyncbucket.providers.learn`: the refusals of one wave make one pause. If the server names no
   time, the pause doubles from wave to wave.
3. *When?* As the server says, plus up to a tenth; otherwise by exponential back-off, of which a
   random part between a half and the whole is waited. Never past the deadline, and never longer
   than `max_wait`: then the call fails at once.
4. *May we?* A retry budget bounds the load that an outage would multiply; see `Retry`.

Each attempt acquires anew: during a back-off a call holds no slot and no tokens. The user sees the
provider's last error, the same object, with a note that says how often the call was tried.

Under a pool, 2. and 3. concern a member. A 429 pauses the member that refused, and one that failed
itself is left out (`Verdict.member_failed`). Either way the call goes back into the pool's line at
once, as long as a member is in, and each may be tried once even if that takes more attempts.

Layers are stacked, and only the outermost retries: see `asyncbucket.attempt`.

stamina is used as it is. Its ``on=`` hook makes these decisions and returns the back-off, so its
instrumentation, its testing mode and its switch work as for any other code. (Its time-out is off: it
would count the time in line.) A call that succeeds at once never gets to it.
"""

import functools
import logging
import math
import random
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from asyncbucket.attempt import Attempt, Sent
from asyncbucket.engine.context import inherited
from asyncbucket.engine.dispatchers import Lock
from asyncbucket.engine.errors import AsyncBucketError
from asyncbucket.engine.events import Retried
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.wording import in_seconds, is_integer, is_number
from asyncbucket.levels import effective_limiter, emit, shown_name
from asyncbucket.providers.errors import WEEK, Verdict, classify
from asyncbucket.providers.learn import Refusals, doubled
from asyncbucket.waiting import ASYNC, IO

try:
    import stamina
except ModuleNotFoundError:  # `Retrier` says so
    stamina = None  # type: ignore[assignment]

__all__ = ["Retrier", "Retry", "Verdict", "classify"]

# Where no log is set up, Python would print the bare words "stamina.retry_scheduled" for each retry.
logging.getLogger("stamina").addHandler(logging.NullHandler())

T = TypeVar("T")

#: Units that a successful call puts back into the budget of retries; see `Retry`.
_PER_SUCCESS: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Configure how failed calls are retried.

    A budget bounds what retries add to the load: a bucket that retries drain, and that each success
    refills by half a unit.

    *Random errors are always retried.* At an error rate e there are e / (1 - e) failures per
    success; 0.5 per success pays for them up to e = 1/3. At e = 0.2 the bucket gains 0.25 units per
    success, and the chance that bad luck drains 100 units is below 1e-30. Only failures that come
    back sooner than the first successes may drain it; a full bucket is enough for 300 calls in
    flight at e = 0.2. With more calls, or to survive the loss of every connection at once, set the
    budget to your `concurrency`.

    *A total outage costs little.* Nothing succeeds, so there are at most 100 retries however many
    calls there are: 1.1 times the load of 1,000 calls, 1.01 times that of 10,000. For smaller error
    rates the load is 1 / (1 - e) up to e = 1/3, at worst 1.5 times, and falls again beyond.

    *A 429 is not charged.* It refuses a whole wave of calls that did nothing wrong, and the pause
    and the limits bound the load already. Nor does it count as an attempt of a call if another call
    met the same wave first; and if others passed since this call was last refused, it counts as half
    an attempt. So however many calls are refused, none is lost by the others.

    Args:
        attempts: the most attempts for one call, the first included; 1 switches retries off.
        max_wait: the longest wait (s) before an attempt. A call told to wait longer fails at once,
            and so does one that gets a 429 without a time after nothing else came for longer.
        jitter: the fraction of a ``Retry-After`` added at random, so that calls do not come all at
            once.
        backoff: the wait (s) after a first failure if the server names none; it doubles.
        budget: retries of one model that a full bucket holds, as at the start.
    """

    attempts: int = 5
    max_wait: float = 120.0
    jitter: float = 0.1
    backoff: float = 1.0
    budget: float = 100.0

    def __post_init__(self) -> None:
        if not is_integer(self.attempts):
            raise TypeError(f"attempts must be a whole number, not {self.attempts!r}")
        if self.attempts < 1:
            raise ValueError(
                f"attempts must be at least 1, not {self.attempts}; 1 or retry=False means no retry"
            )
        for name, most in (("max_wait", WEEK), ("backoff", WEEK), ("jitter", 1), ("budget", 1e9)):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be at least 0 and at most {most:g}, not {value!r}")

    @classmethod
    def of(cls, value: "Retry | int | None") -> "Retry":
        """Read what people pass as ``retry=``: a policy, attempts, False (none) or True (default).

        Raises:
            TypeError, ValueError: it is not one of these, or less than one attempt.
        """
        if isinstance(value, Retry):
            return value
        if value is None or value is True:
            return cls()
        return cls(attempts=1 if value is False else value)

    @classmethod
    def times(cls, retries: "Retry | int | None") -> "Retry":
        """Read what people pass as ``retries=``: a policy, how many, 0 (none) or None (default).

        Raises:
            TypeError, ValueError: it is not one of these.
        """
        if not is_integer(retries):
            return cls.of(retries)
        if retries < 0:
            raise ValueError(f"retries must be at least 0, which means none, not {retries}")
        return cls(attempts=retries + 1)


class Retrier:
    """Retry the calls of one model, under one policy and one budget.

    Safe on several event loops and threads at once.

    Args:
        policy: what is retried, how often and when.
        limiter: what a 429 pauses, except under a pool; deadlines are in seconds of its clock.
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
        if stamina is None:
            raise ImportError('retrying needs stamina: pip install "asyncbucket[http]"')
        self.policy = policy
        self.now = limiter.now
        self._caller = limiter if caller is None else caller
        self._chance = chance
        self._lock = Lock()
        self._budget = policy.budget
        self._refusals = Refusals.of(limiter)

    async def call(
        self,
        make: Callable[[Attempt], Awaitable[T]],
        *,
        io: IO = ASYNC,
        tried: Callable[..., object] | None = None,
    ) -> T:
        """Await ``make(attempt)`` until it succeeds or there is no point in trying again.

        Cancellation passes through at once, from an attempt and from a back-off. No attempt begins
        after the `asyncbucket.deadline` around the call.

        Args:
            make: makes one attempt; it is admitted by that, and ends its lease whatever happens.
            io: how ``make`` waits, and how back-offs do; see `asyncbucket.waiting`.
            tried: what the attempt calls in the end; stamina's hooks see its name.

        Raises:
            Exception: the provider's last error, with a note; or whatever else ``make`` raised.
        """
        started, sent = self.now(), Sent()
        try:
            return await self.attempt(make, sent)
        except Exception as error:
            if isinstance(error, AsyncBucketError):
                raise
            trial = _Trial(self, make, error, started, sent)

        async def again() -> Any:
            return await trial.again()

        assert stamina is not None
        # Its hooks see the name of what is tried.
        functools.update_wrapper(again, tried or make, ("__module__", "__qualname__"), ())
        retry = stamina.retry(on=trial.back_off, attempts=None, timeout=None)
        try:
            return cast("T", await io.call(retry(io.function(again))))
        except Exception as error:  # noqa: BLE001 - which one to raise is decided there
            failed = trial.final_error(error)
        finally:
            # stamina's objects are a cycle, and keep the trial until the collector runs. Its errors
            # would keep these frames, and a stream that is the reply would keep its slot.
            del trial.first, trial.error, trial.make
        raise failed

    async def attempt(self, make: Callable[[Attempt], Awaitable[T]], sent: Sent) -> T:
        """Make one attempt, and count it if it succeeds."""
        sent.paused = sent.member = None
        sent.is_one_of_many = False
        attempt = Attempt(self._caller, sent=sent)
        attempt.is_retried = True
        try:
            with attempt:
                result = await make(attempt)
        finally:
            attempt.is_retried = False  # a task that was started inside has a copy of the context
        self.succeeded(sent)
        return result

    def succeeded(self, sent: Sent) -> None:
        """Count a success: it pays into the budget, and ends a series of earlier refusals."""
        most = self.policy.budget
        if self._budget < most:
            with self._lock:
                self._budget = min(most, self._budget + _PER_SUCCESS)
        refusals = self._refusals if sent.member is None else Refusals.of(sent.member)
        if refusals.latest:
            refusals.succeeded(sent.at)

    def spend(self) -> bool:
        """Take a retry from the budget, if it holds one."""
        with self._lock:
            enough = self._budget >= 1
            self._budget -= enough
            return enough

    def refusals_of(self, sent: Sent) -> Refusals:
        """Return what a refusal of this attempt pauses."""
        return self._refusals if sent.member is None else Refusals.of(sent.member)

    def jittered(self, known: float | None, attempts: int) -> float:
        """Return a wait with its jitter: ``known``, or that of the back-off after ``attempts``."""
        policy = self.policy
        if known:
            return min(known * (1 + policy.jitter * self._chance()), policy.max_wait)
        longest = doubled(policy.backoff, attempts, most=policy.max_wait)
        return longest * (1 + self._chance()) / 2

    def report(self, attempt: int, verdict: Verdict, delay: float) -> None:
        """Tell the observers of the limiter that was asked that a call will be retried."""
        caller = effective_limiter(self._caller)
        name, at = shown_name(caller), self.now()
        emit(
            caller, Retried(limiter=name, at=at, attempt=attempt, error=verdict.reason, delay=delay)
        )


@dataclass(slots=True, eq=False)
class _Trial:
    """One call that failed: how often it was tried, since when, and what its errors mean."""

    retrier: Retrier
    make: Callable[[Attempt], Awaitable[Any]]
    #: The failure of the attempt that was made before stamina was asked.
    first: Exception
    started: float
    sent: Sent
    attempts: int = 0
    #: How many of them do not count, because another call met the refusal first, or others passed.
    free: float = 0
    #: How many calls had succeeded when it was last refused.
    successes: float = math.inf
    #: The provider's last error.
    error: Exception | None = None

    async def again(self) -> Any:
        """Make another attempt; at first, raise what the one before stamina raised."""
        self.attempts += 1
        if self.attempts == 1:
            raise self.first
        return await self.retrier.attempt(self.make, self.sent)

    def back_off(self, error: BaseException) -> bool | float:
        """Tell stamina when to try again, if at all; it asks even about cancellation."""
        if not isinstance(error, Exception) or isinstance(error, AsyncBucketError):
            return False
        self.error, verdict = error, classify(error)
        wait, reason = self._next_wait(verdict)
        if reason is None:
            self.retrier.report(self.attempts, verdict, wait)
            # They may hold a half-read stream, for whose slot the next attempt would wait.
            traceback.clear_frames(error.__traceback__)
            return wait
        # The user's own ValueError stays as it is; a provider's answer gets a note.
        if self.attempts > 1 or verdict.retry or verdict.reason.startswith("HTTP"):
            self._add_note(error, reason)
        return False

    def _next_wait(self, verdict: Verdict) -> tuple[float, str | None]:
        """Return how long to wait before the next attempt, and why there will be none, if so."""
        policy, known, refused_for = self.retrier.policy, verdict.retry_after, 0.0
        paused = self._pause(verdict)
        if self._goes_elsewhere(verdict):
            return 0.0, None
        if not verdict.retry:
            return 0.0, f"{verdict.reason} is not retried"
        if known is not None and known > policy.max_wait:
            asked = in_seconds(known)
            return 0.0, (
                f"the provider asks to wait {asked}, and Retry(max_wait={policy.max_wait:g}) allows no more"
            )
        if verdict.rate_limited:
            refused_for = self.retrier.refusals_of(self.sent).lasted(waves=policy.attempts)
            known = known or paused
            self.free += self._part_that_is_free() if policy.attempts > 1 else 0
        attempts = self.attempts - self.free
        wait, left = self.retrier.jittered(known, max(1, int(attempts))), _seconds_left()
        reason = None
        if attempts >= policy.attempts:
            reason = f"Retry(attempts={policy.attempts}) allows no more"
        elif refused_for > policy.max_wait:
            reason = f"the provider has refused every call for {in_seconds(refused_for)}"
        elif wait > left:
            reason = (
                f"the next attempt is due in {in_seconds(wait)}, the deadline in {in_seconds(left)}"
            )
        elif not verdict.rate_limited and not self.retrier.spend():
            reason = "the retry budget is spent, too few calls succeed; Retry(budget=...) sets it"
        return wait, reason

    def _part_that_is_free(self) -> float:
        """Return how much of an attempt that was refused does not count."""
        before, now = self.successes, self.retrier.refusals_of(self.sent).successes
        self.successes = now
        return 1 if self.sent.is_one_of_many else (now > before) / 2

    def _pause(self, verdict: Verdict) -> float:
        """Take in a refusal, once; return the seconds until the pause that it makes ends."""
        refusals = self.retrier.refusals_of(self.sent)
        if self.sent.paused is not refusals.limiter:  # else by the transport that got the reply
            effect = refusals.take_in(verdict, sent_at=self.sent.at)
            self.sent.is_one_of_many = effect == "later"
        return refusals.seconds_left()

    def _goes_elsewhere(self, verdict: Verdict) -> bool:
        """Tell whether the call goes back into a pool's line at once, perhaps to another member."""
        most, pool = self.retrier.policy.attempts, self.sent.pool
        if pool is None or self.sent.member is None or most == 1:
            return False
        if self.attempts >= max(most, len(pool.members)):
            return False
        is_one_in = any(not each.left_out for each in pool.states())
        return verdict.rate_limited or (verdict.member_failed and is_one_in)

    def final_error(self, ended: Exception) -> Exception:
        """Return what to raise after the last attempt: the provider's last error."""
        if self.error is None:  # stamina is switched off, so it did not ask
            self._pause(classify(ended))
        elif isinstance(ended, AsyncBucketError):
            self.attempts -= 1  # it was refused before it reached the provider
            self._add_note(self.error, f"no other attempt was admitted: {ended}")
            return self.error
        return ended

    def _add_note(self, error: Exception, reason: str) -> None:
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        seconds = self.retrier.now() - self.started
        error.add_note(f"asyncbucket: tried {times} in {seconds:.1f} s; gave up: {reason}")
        pool = self.sent.pool
        states = () if pool is None else pool.states()
        if pool is not None and any(each.left_out for each in states):
            error.add_note(f"asyncbucket: pool {shown_name(pool)!r}: {'; '.join(map(str, states))}")


def _seconds_left() -> float:
    """Return the seconds until the deadline around this code; infinity if there is none."""
    terms = inherited.get()
    left = None if terms is None else terms.seconds_left()
    return math.inf if left is None else left
