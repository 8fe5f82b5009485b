"""How a provider counts: four policies, each a pure object that is given the time.

They judge asyncbucket, so they share no code with it: asyncbucket books the future, these look at
the past. Each holds one `limit` of N units a minute. At an instant `now`, in integer nanoseconds
that never go backwards, it says

- `wait`: in how many nanoseconds an amount would pass; 0 is now, None is never,
- `remaining`: how many units would pass now,
- `reset`: in how many nanoseconds everything is back, if nothing else comes,

and is told by `charge` what was admitted, and by `resize` of another limit from now on; what was
used stays used.
"""

from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

PolicyName: TypeAlias = Literal[
    "token_bucket", "sliding_window", "fixed_window", "one_second_slices"
]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

SLICES = 60


class TokenBucketPolicy:
    """A bucket of N units, full at the start, refilled continuously at N a minute.

    The level is kept in units x minute, in which a nanosecond refills exactly N.
    """

    def __init__(self, limit: int, *, minute: int, now: int) -> None:
        self.limit = limit
        self._minute = minute
        self._level = limit * minute
        self._at = now

    def wait(self, amount: int, now: int) -> int | None:
        missing = amount * self._minute - self._refill(now)
        return None if amount > self.limit else max(0, _ceil(missing, self.limit))

    def charge(self, amount: int, now: int) -> None:
        self._level = self._refill(now) - amount * self._minute

    def remaining(self, now: int) -> int:
        return max(0, self._refill(now) // self._minute)

    def reset(self, now: int) -> int:
        return _ceil(self.limit * self._minute - self._refill(now), self.limit)

    def resize(self, limit: int, now: int) -> None:
        self._level = min(self._refill(now), limit * self._minute)
        self.limit = limit

    def _refill(self, now: int) -> int:
        gained = (now - self._at) * self.limit
        self._level = min(self.limit * self._minute, self._level + gained)
        self._at = now
        return self._level


class SlidingWindowPolicy:
    """At most N units in any window [t, t + minute): a log of admissions, exact to the entry."""

    def __init__(self, limit: int, *, minute: int, now: int) -> None:
        self.limit = limit
        self._minute = minute
        self._log: deque[tuple[int, int]] = deque()
        self._used = 0
        self._expire(now)

    def wait(self, amount: int, now: int) -> int | None:
        self._expire(now)
        if amount > self.limit:
            return None
        over = self._used + amount - self.limit
        if over <= 0:
            return 0
        # Walks no further than the entries that must leave, which are few under saturation.
        for expires, used in self._log:
            over -= used
            if over <= 0:
                return expires - now
        raise AssertionError("the log holds all that is used")

    def charge(self, amount: int, now: int) -> None:
        self._expire(now)
        self._log.append((now + self._minute, amount))
        self._used += amount

    def remaining(self, now: int) -> int:
        self._expire(now)
        return max(0, self.limit - self._used)

    def reset(self, now: int) -> int:
        self._expire(now)
        return self._log[-1][0] - now if self._log else 0

    def resize(self, limit: int, now: int) -> None:
        self._expire(now)
        self.limit = limit

    def _expire(self, now: int) -> None:
        while self._log and self._log[0][0] <= now:
            self._used -= self._log.popleft()[1]


class FixedWindowPolicy:
    """At most N units in each minute of the clock; up to twice that across a boundary."""

    def __init__(self, limit: int, *, minute: int, now: int) -> None:
        self.limit = limit
        self._minute = minute
        self._window = now // minute
        self._used = 0

    def wait(self, amount: int, now: int) -> int | None:
        if amount > self.limit:
            return None
        return 0 if amount <= self.limit - self._used_at(now) else self._minute - now % self._minute

    def charge(self, amount: int, now: int) -> None:
        self._used = self._used_at(now) + amount

    def remaining(self, now: int) -> int:
        return max(0, self.limit - self._used_at(now))

    def reset(self, now: int) -> int:
        return self._minute - now % self._minute if self._used_at(now) else 0

    def resize(self, limit: int, now: int) -> None:
        self._used_at(now)
        self.limit = limit

    def _used_at(self, now: int) -> int:
        if now // self._minute != self._window:
            self._window, self._used = now // self._minute, 0
        return self._used


class OneSecondSlicesPolicy(SlidingWindowPolicy):
    """N / 60 units in each second of the clock, and at most N in any minute.

    Providers may enforce 60,000 a minute as 1,000 a second. Where N / 60 isn't whole it is rounded
    up, and the minute keeps the sum at N. A call that costs more than a slice passes in a slice
    that nothing has used, and closes the slices after it until it is paid off.
    """

    def __init__(self, limit: int, *, minute: int, now: int) -> None:
        super().__init__(limit, minute=minute, now=now)
        self._slice = minute // SLICES
        self._index = now // self._slice
        self._slice_used = 0

    @property
    def share(self) -> int:
        """Units in a slice."""
        return _ceil(self.limit, SLICES)

    def wait(self, amount: int, now: int) -> int | None:
        minute_wait = super().wait(amount, now)
        over = self._used_in_slice(now) - max(0, self.share - amount)
        if minute_wait is None or over <= 0:
            return minute_wait
        slices = _ceil(over, self.share)
        return max(minute_wait, (self._index + slices) * self._slice - now)

    def charge(self, amount: int, now: int) -> None:
        super().charge(amount, now)
        self._slice_used = self._used_in_slice(now) + amount

    def remaining(self, now: int) -> int:
        return min(max(0, self.share - self._used_in_slice(now)), super().remaining(now))

    def resize(self, limit: int, now: int) -> None:
        self._used_in_slice(now)
        super().resize(limit, now)

    def _used_in_slice(self, now: int) -> int:
        index = now // self._slice
        self._slice_used = max(0, self._slice_used - (index - self._index) * self.share)
        self._index = index
        return self._slice_used


Policy: TypeAlias = TokenBucketPolicy | SlidingWindowPolicy | FixedWindowPolicy

_POLICIES: dict[PolicyName, Callable[..., Policy]] = {
    "token_bucket": TokenBucketPolicy,
    "sliding_window": SlidingWindowPolicy,
    "fixed_window": FixedWindowPolicy,
    "one_second_slices": OneSecondSlicesPolicy,
}


def make_policy(name: PolicyName, limit: int, *, minute: int, now: int) -> Policy:
    """Make a policy with nothing used; `minute` is how long one lasts, in nanoseconds."""
    return _POLICIES[name](limit, minute=minute, now=now)


def _ceil(amount: int, divisor: int) -> int:
    return -(-amount // divisor)
