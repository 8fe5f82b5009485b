"""How failed calls are retried, as a user configures it."""

import math
from dataclasses import dataclass, field

from asyncbucket.core.wording import is_integer, is_number
from asyncbucket.providers.headers import WEEK


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryBudget:
    """Bound what retries add to the load: a bucket that successes refill and retries drain.

    *Random errors are always retried.* At an error rate e there are e / (1 - e) failures per
    success; 0.5 per success pays for them up to e = 1/3. At e = 0.2 the bucket gains 0.25 units per
    success, and the chance that bad luck drains 100 units is below 1e-30. Only failures that come
    back sooner than the first successes may drain it; a full bucket is enough for 300 calls in
    flight at e = 0.2. With more calls, or to survive the loss of every connection at once, set the
    capacity to your `concurrency`.

    *A total outage costs little.* Nothing succeeds, so there are at most 100 retries however many
    calls there are: 1.1 times the load of 1,000 calls, 1.01 times that of 10,000. For smaller error
    rates the load is 1 / (1 - e) up to e = 1/3, at worst 1.5 times, and falls again beyond.

    *A 429 is not charged.* It refuses a whole wave of calls that did nothing wrong, and the pause
    and the limits bound the load already; each call is still bound by its attempts.

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
    """Configure how failed calls are retried.

    Args:
        attempts: the most attempts for one call, the first included; 1 switches retries off.
        max_wait: the longest wait (s) before an attempt. A call told to wait longer fails at once,
            and so does one that gets a 429 without a time after nothing else came for longer.
        jitter: the fraction of a ``Retry-After`` added at random, so that calls do not come all at
            once.
        backoff: the wait (s) after a first failure if the server names none; it doubles.
        budget: how much retries may add to the load of one model.
    """

    attempts: int = 5
    max_wait: float = 120.0
    jitter: float = 0.1
    backoff: float = 1.0
    budget: RetryBudget = field(default_factory=RetryBudget)

    def __post_init__(self) -> None:
        if not is_integer(self.attempts):
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
        """Read what people pass as ``retry=``: a policy, attempts, False (none) or True (default).

        Raises:
            TypeError, ValueError: it is not one of these, or less than one attempt.
        """
        if isinstance(value, Retry):
            return value
        if value is None or value is True:
            return cls()
        return cls(attempts=1 if value is False else value)


def _check_number(value: float, name: str, *, most: float) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= value <= most:
        bound = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} must be at least 0{bound}, not {value!r}")
