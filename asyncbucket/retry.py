"""Try again what failed for a while, and only that; stamina does the looping and the sleeping.

What is decided here, for each failed attempt:

1. *Is it worth it?* `classify` looks at the error, whoever's it is, without importing its library:
   time-outs, lost connections, 408, 409, 429 and 5xx are; other 4xx and an exhausted quota aren't.
2. *For whom?* A 429 speaks to all users of the limiter, so all pause, by the rule of
   `asyncbucket.http.refusals`: the refusals of one wave make one pause, which doubles from wave to
   wave where the server names none.
3. *When?* As the server says, plus up to a tenth; else an exponential back-off, of which a random
   part between a half and the whole is waited. Never past the deadline, never over `max_wait`: a
   longer wait is no back-off, and the call fails at once.
4. *May we?* A retry budget ends what an outage would multiply; see `RetryBudget`.

Each attempt acquires anew: during a back-off a call holds no slot and no tokens. The last error of
the provider is what the user sees, the same object, with a note that says how often it was tried.

How stamina is used, and why so. Its time-out would count the time in the queue (``timeout=None``; the
deadline is ours), and a back-off that a hook returns goes past its own jitter and cap (ours too),
even if it is NaN, which would hang. Its instrumentation reports the error that caused a retry, and
a provider's error may quote the prompt or the key. So stamina never sees it: what it catches and
retries is a `_TryAgain` that goes by the error's name, and the real error waits in `_Trial`. What
it calls has no arguments, and goes by the name of what is tried: the model's method. Everything
else, cancellation first of all, passes through stamina as through no hands at all.
"""

import functools
import logging
import math
import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

try:
    import stamina
except ModuleNotFoundError as error:
    raise ImportError('retrying needs stamina: pip install "asyncbucket[llama-index]"') from error

from asyncbucket.errors import AsyncBucketError
from asyncbucket.events import Retried
from asyncbucket.http.failures import Verdict, classify
from asyncbucket.http.headers import WEEK
from asyncbucket.http.refusals import Refusals, doubled
from asyncbucket.limiter import Limiter

__all__ = ["Retrier", "Retry", "RetryBudget", "Verdict", "classify"]

T = TypeVar("T")

_log: Final = logging.getLogger("asyncbucket")
#: How what stamina is told of an error ends, so that its log can be told from others'.
_OURS: Final = "; tried again by asyncbucket>"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryBudget:
    """Bound what retries add to the load: a bucket that successes refill and that retries drain.

    *Random errors are always retried through.* At an error rate e there are e / (1 - e) failures a
    success; 0.5 a success pays for them up to e = 1/3. At e = 0.2 the bucket gains 0.25 units a
    success, and the chance that a run of bad luck drains 100 units is under 1e-30. What may drain it
    is failures that come back sooner than the first successes; a full bucket is enough for 300
    calls in flight at e = 0.2. With more, or to survive the loss of every connection at once, give
    it the units of your `concurrency`.

    *A total outage costs little.* Nothing succeeds, so there are at most 100 retries however many
    calls there are: 1.1 times the load of 1,000 calls, 1.01 times that of 10,000. In between, the
    load is 1 / (1 - e) up to e = 1/3, at worst 1.5 times, and falls again beyond.

    *A 429 is not charged.* It refuses a whole wave of calls that did nothing wrong, and what it
    could multiply the pause and the limits hold back already; each call still has its attempts.

    Args:
        capacity: units of a full bucket, as at the start; a retry takes one.
        per_success: units that a successful call puts back.
    """

    capacity: float = 100.0
    per_success: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("capacity", self.capacity), ("per_success", self.per_success)):
            _check_number(value, f"the retry budget's {name}", most=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Say how failed calls are tried again.

    Args:
        attempts: the most attempts for one call, the first included; 1 switches retries off.
        max_wait: the longest wait (s) before an attempt. Who is told to wait longer fails at once.
        jitter: the share of a ``Retry-After`` that is added at random, so that not all come at once.
        backoff: the wait (s) after a first failure where the server names none; it doubles.
        budget: how much retries may add to the load of one model.
    """

    attempts: int = 5
    max_wait: float = 120.0
    jitter: float = 0.1
    backoff: float = 1.0
    budget: RetryBudget = field(default_factory=RetryBudget)

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int):
            raise TypeError(f"attempts must be a whole number, not {self.attempts!r}")
        if self.attempts < 1:
            raise ValueError(
                f"attempts must be at least 1, not {self.attempts}; 1 or retry=False means no retry"
            )
        _check_number(self.max_wait, "max_wait", most=WEEK)
        _check_number(self.backoff, "backoff", most=WEEK)
        _check_number(self.jitter, "jitter", most=1.0)
        if not isinstance(self.budget, RetryBudget):
            raise TypeError(f"budget must be a RetryBudget, not {self.budget!r}")

    @classmethod
    def of(cls, value: "Retry | int | None") -> "Retry":
        """Read what people pass as ``retry=``: a policy, attempts, False for none, True for usual.

        Raises:
            TypeError, ValueError: it is none of these, or less than one attempt.
        """
        if isinstance(value, Retry):
            return value
        if value is None or value is True:
            return cls()
        return cls(attempts=1 if value is False else value)


class Retrier:
    """Try the calls of one model again, under one policy and one budget.

    Safe on several event loops and threads at once.

    Args:
        policy: what is tried again, how often and when.
        limiter: what a 429 pauses; deadlines are in seconds of its clock.
        chance: random numbers from 0 to 1, for the jitter.
    """

    def __init__(
        self, policy: Retry, limiter: Limiter, *, chance: Callable[[], float] = random.random
    ) -> None:
        self.policy = policy
        self._limiter = limiter
        self._chance = chance
        self._lock = threading.Lock()
        self._budget = policy.budget.capacity
        self._refusals = Refusals(limiter)
        # A retry is a warning to stamina, which in a storm is hundreds of lines that say nothing.
        logging.getLogger("stamina").addFilter(_not_ours)

    def __repr__(self) -> str:
        return f"<Retrier {self.policy.attempts} attempts, {self._budget:g} retries in the budget>"

    async def call(
        self,
        attempt: Callable[[], Awaitable[T]],
        *,
        deadline: float | None = None,
        tried: Callable[..., object] | None = None,
    ) -> T:
        """Await ``attempt()`` until it succeeds or there is no point in another.

        Cancellation passes through at once, from an attempt and from a back-off.

        Args:
            attempt: makes one attempt; it acquires for itself and gives back whatever happens.
            deadline: the latest instant for an attempt to begin, in seconds of the limiter's clock.
            tried: what the attempt calls in the end, by whose name stamina's hooks know of retries.

        Raises:
            Exception: the provider's last error, with a note; or whatever else `attempt` raised.
        """
        trial = _Trial(self, deadline)

        async def once() -> T:
            return await trial.run(attempt)

        try:
            return await self._again(_renamed(once, tried or attempt))()
        except (_TryAgain, AsyncBucketError) as ended:
            error = trial.last_word(ended)
        finally:
            trial.error = None  # its traceback leads back here
        raise error

    def call_sync(
        self,
        attempt: Callable[[], T],
        *,
        deadline: float | None = None,
        tried: Callable[..., object] | None = None,
    ) -> T:
        """Call ``attempt()`` as `call` does, and block this thread during a back-off."""
        trial = _Trial(self, deadline)

        def once() -> T:
            return trial.run_sync(attempt)

        try:
            return self._again(_renamed(once, tried or attempt))()
        except (_TryAgain, AsyncBucketError) as ended:
            error = trial.last_word(ended)
        finally:
            trial.error = None
        raise error

    def _again(self, once: Callable[[], T]) -> Callable[[], T]:
        return stamina.retry(on=_wait_of, attempts=self.policy.attempts, timeout=None)(once)

    def succeeded(self) -> None:
        """Count a success: it pays into the budget, and ends a series of refusals."""
        with self._lock:
            budget = self.policy.budget
            self._budget = min(budget.capacity, self._budget + budget.per_success)
        self._refusals.succeeded()

    def pause(self, retry_after: float | None) -> float:
        """Pause the limiter after a refusal for rate; return the seconds until it ends."""
        policy = self.policy
        return self._refusals.pause(retry_after, first=policy.backoff, longest=policy.max_wait)

    def back_off(self, failures: int) -> float:
        """Return the seconds to wait after so many failures in a row, jitter included."""
        longest = doubled(self.policy.backoff, failures, most=self.policy.max_wait)
        return longest * (1 + self._chance()) / 2

    def hold_on(self, seconds: float) -> float:
        """Return the seconds to wait where the server said how many, jitter included."""
        return min(seconds * (1 + self.policy.jitter * self._chance()), self.policy.max_wait)

    def spend(self) -> bool:
        """Take a retry from the budget, if it holds one."""
        with self._lock:
            enough = self._budget >= 1
            self._budget -= enough
            return enough

    def tell_of_retry(self, attempt: int, error: str, delay: float) -> None:
        """Let those who watch the limiter know that a call will be tried again."""
        limiter, at = self._limiter, self.now()
        limiter.emit(
            Retried(limiter=limiter.name, at=at, attempt=attempt, error=error, delay=delay)
        )

    def now(self) -> float:
        """Return the seconds of the limiter's clock."""
        return self._limiter.now()


class _Trial:
    """One call: how often it was tried, since when, and the provider's last error."""

    __slots__ = ("attempts", "deadline", "error", "retrier", "started")

    def __init__(self, retrier: Retrier, deadline: float | None) -> None:
        self.retrier = retrier
        self.deadline = math.inf if deadline is None else deadline
        self.started = retrier.now()
        self.attempts = 0
        self.error: Exception | None = None

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        self.attempts += 1
        try:
            result = await attempt()
        except Exception as error:
            again = self.judge(error)
            if again is None:
                raise
        else:
            self.retrier.succeeded()
            return result
        raise again  # out here, so that it doesn't carry the real error as its context

    def run_sync(self, attempt: Callable[[], T]) -> T:
        self.attempts += 1
        try:
            result = attempt()
        except Exception as error:
            again = self.judge(error)
            if again is None:
                raise
        else:
            self.retrier.succeeded()
            return result
        raise again

    def judge(self, error: Exception) -> "_TryAgain | None":
        """Return what makes stamina try again, or None after noting on `error` why it is the end."""
        if isinstance(error, AsyncBucketError):
            return None
        self.error = error
        verdict = classify(error)
        wait, end = self._plan(verdict)
        if end is None and not verdict.rate_limited and not self.retrier.spend():
            end = "the retry budget is spent, too few calls succeed; Retry(budget=...) sets it"
        if end is None:
            _log.debug("attempt %d: %s; again in %.3g s", self.attempts, verdict.reason, wait)
            self.retrier.tell_of_retry(self.attempts, verdict.reason, wait)
            named = _by_the_name(type(error).__module__, type(error).__qualname__)
            return named(verdict.reason, wait)
        # A ValueError of the caller's own is his business; a provider's answer is ours.
        if self.attempts > 1 or verdict.retry or verdict.reason.startswith("HTTP"):
            self._note(error, end)
        return None

    def _plan(self, verdict: Verdict) -> tuple[float, str | None]:
        """Return how long to wait before the next attempt, and why there is to be none, if so."""
        retrier, policy, asked = self.retrier, self.retrier.policy, verdict.retry_after
        if not verdict.retry:
            return 0.0, f"{verdict.reason} is not retried"
        paused = retrier.pause(asked) if verdict.rate_limited else None
        if self.attempts >= policy.attempts:
            return 0.0, f"Retry(attempts={policy.attempts}) allows no more"
        if asked is not None and asked > policy.max_wait:
            return 0.0, (
                f"the provider asks to wait {asked:.3g} s, "
                f"and Retry(max_wait={policy.max_wait:g}) allows no more"
            )
        stated = paused if asked is None else asked
        wait = retrier.back_off(self.attempts) if stated is None else retrier.hold_on(stated)
        left = self.deadline - retrier.now()
        if not wait <= left:
            return 0.0, f"the next attempt is due in {wait:.3g} s, the deadline in {left:.3g} s"
        return wait, None

    def last_word(self, ended: "_TryAgain | AsyncBucketError") -> Exception:
        """Return what to raise when another attempt was not to be: the provider's last error."""
        error = self.error
        if error is None:
            return ended
        if isinstance(ended, _TryAgain):
            self._note(error, "stamina is switched off, or in its testing mode")
        else:
            self.attempts -= 1  # it was refused before it reached the provider
            self._note(error, f"no other attempt was admitted: {ended}")
        return error

    def _note(self, error: Exception, end: str) -> None:
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        seconds = self.retrier.now() - self.started
        error.add_note(f"asyncbucket: tried {times} in {seconds:.1f} s; gave up: {end}")


class _TryAgain(Exception):  # noqa: N818 - a request, not an error that anybody gets to see
    """Ask stamina for another attempt after `wait` seconds."""

    def __init__(self, reason: str, wait: float) -> None:
        super().__init__(reason)
        self.wait = wait

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__}: {self}{_OURS}"


@functools.lru_cache(maxsize=64)
def _by_the_name(module: str, name: str) -> type[_TryAgain]:
    """Return a `_TryAgain` of another name: by that of its class an error is told in metrics."""
    return type(name, (_TryAgain,), {"__module__": module, "__qualname__": name})


def _renamed(once: Callable[[], T], tried: Callable[..., object]) -> Callable[[], T]:
    """Return ``once`` by the name of what is ``tried``, below partials and bound methods."""
    while isinstance(tried, functools.partial):
        tried = tried.func
    named = tried if hasattr(tried, "__qualname__") else type(tried)
    once.__module__, once.__qualname__ = named.__module__, str(named.__qualname__)
    return once


def _wait_of(error: BaseException) -> bool | float:
    """Tell stamina when to try again; it asks about everything raised, cancellation too."""
    return error.wait if isinstance(error, _TryAgain) else False


def _not_ours(record: logging.LogRecord) -> bool:
    """Keep stamina's log of retries to those of other users of stamina in this process."""
    return not str(vars(record).get("stamina.caused_by")).endswith(_OURS)


def _check_number(value: float, name: str, *, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= value <= most:
        bound = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} must be at least 0{bound}, not {value!r}")
