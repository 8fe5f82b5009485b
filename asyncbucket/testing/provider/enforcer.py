"""Which calls get in: limits, slots and scripted failures, decided in one step at one instant.

A call is admitted by all limits or charged by none. A refused call costs nothing; an admitted one
is charged even if it fails. All public methods of the enforcer may be called from any thread.

It counts by policies, pure objects that are given the time and the limit. They judge asyncbucket, so
they share no code with it: asyncbucket books the future, these look at the past. Each remembers what
was used of N units a minute, whatever N is at the moment. At an instant `now`, in integer nanoseconds
that never go backwards, it says

- `wait`: in how many nanoseconds an amount would pass; 0 is now, None is never,
- `remaining`: how many units would pass now,
- `reset`: in how many nanoseconds everything is back, if nothing else comes,

and is told by `charge` what was admitted. A policy is one `Bucket` or `Window`, or two that both
have to agree.
"""

import random
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from asyncbucket.core.wording import read_count
from asyncbucket.testing.provider.options import (
    NANOSECONDS,
    RULES,
    SLICES,
    Arrival,
    Failure,
    Options,
    PolicyName,
    ProviderStatistics,
)
from asyncbucket.waiting import Lock

TOO_MANY_REQUESTS = 429
#: What is limited, and by which option.
_LIMITS = {
    "requests": "rpm",
    "tokens": "tpm",
    "input_tokens": "itpm",
    "output_tokens": "otpm",
    "daily_requests": "rpd",
}
_MINUTES_OF_A_DAY = 1_440
_FIXED_AT_START = frozenset({"policy", "profile", "minute", "port", "clock"})
_ARRIVALS_KEPT = 1_000_000


class Bucket:
    """Refill N units continuously within a span.

    What is used is kept in units x span, of which each nanosecond gives back exactly N.
    """

    def __init__(self, span: int) -> None:
        self._span = span
        self._used = 0
        self._at = 0

    def wait(self, amount: int, limit: int, now: int) -> int:
        over = self._used_at(limit, now) + (amount - limit) * self._span
        return max(0, _ceil(over, limit))

    def charge(self, amount: int, limit: int, now: int) -> None:
        self._used = max(0, self._used_at(limit, now) + amount * self._span)

    def remaining(self, limit: int, now: int) -> int:
        return max(0, limit - _ceil(self._used_at(limit, now), self._span))

    def reset(self, limit: int, now: int) -> int:
        return _ceil(self._used_at(limit, now), limit)

    def _used_at(self, limit: int, now: int) -> int:
        self._used = max(0, self._used - (now - self._at) * limit)
        self._at = now
        return self._used


class Window:
    """Count at most N units in each window: any span of time, or those that the clock begins.

    Windows of the clock admit twice N across their edge. A call of more than N passes in a window
    that nothing has used, and closes those after it until it is paid off.
    """

    def __init__(self, span: int, *, by_clock: bool = False) -> None:
        self._span = span
        self._by_clock = by_clock
        #: When units come back, and how many.
        self._log: deque[tuple[int, int]] = deque()
        self._used = 0

    def wait(self, amount: int, limit: int, now: int) -> int:
        over = self._used_at(now) - max(0, limit - amount)
        wait = 0
        # Walks no further than the entries that must leave, which are few under saturation.
        for expires, used in self._log:
            if over <= 0:
                break
            over -= used
            wait = expires - now
        return wait

    def charge(self, amount: int, limit: int, now: int) -> None:
        room = limit - self._used_at(now)
        while amount < 0 and self._log:  # back from the latest
            expires, used = self._log.pop()
            part = min(-amount, used)
            self._used, amount = self._used - part, amount + part
            if used > part:
                self._log.append((expires, used - part))
        amount = max(0, amount)
        expires = now + self._span - (now % self._span if self._by_clock else 0)
        self._used += amount
        while amount:
            part = min(amount, room)
            self._log.append((expires, part))
            amount, room, expires = amount - part, limit, expires + self._span

    def remaining(self, limit: int, now: int) -> int:
        return max(0, limit - self._used_at(now))

    def reset(self, limit: int, now: int) -> int:  # noqa: ARG002 - a bucket needs the limit
        self._used_at(now)
        return self._log[-1][0] - now if self._log else 0

    def _used_at(self, now: int) -> int:
        while self._log and self._log[0][0] <= now:
            self._used -= self._log.popleft()[1]
        return self._used


class Policy:
    """Count as providers do.

    One-second slices are N / 60 units, rounded up, in each second of the clock, and at most N in
    any minute; ten-second slices are N / 6. What is charged may be negative: it comes back.

    Args:
        name: One of `POLICY_NAMES`.
        minute: How long one lasts, in nanoseconds.
    """

    def __init__(self, name: PolicyName, minute: int) -> None:
        #: What counts, and into how many parts it divides the limit.
        self._parts: list[tuple[Bucket | Window, int]] = [(Window(minute), 1)]
        if name == "token_bucket":
            self._parts = [(Bucket(minute), 1)]
        elif name == "fixed_window":
            self._parts = [(Window(minute, by_clock=True), 1)]
        elif name in SLICES:
            count = SLICES[name]
            self._parts.append((Window(minute // count, by_clock=True), count))

    def wait(self, amount: int, limit: int, now: int) -> int | None:
        if amount > limit:
            return None
        return max(part.wait(amount, _ceil(limit, n), now) for part, n in self._parts)

    def charge(self, amount: int, limit: int, now: int) -> None:
        for part, n in self._parts:
            part.charge(amount, _ceil(limit, n), now)

    def remaining(self, limit: int, now: int) -> int:
        return min(part.remaining(_ceil(limit, n), now) for part, n in self._parts)

    def reset(self, limit: int, now: int) -> int:
        return max(part.reset(_ceil(limit, n), now) for part, n in self._parts)


def _ceil(amount: int, divisor: int) -> int:
    return -(-amount // divisor)


@dataclass(frozen=True, slots=True)
class RateRefusal:
    """Why a call was refused for rate.

    Attributes:
        reason: "requests", "tokens"..., or "concurrency".
        limit: The limit that refuses it.
        used: How much of it is used.
        requested: What the call asked for.
        wait: Nanoseconds until it would pass; None if waiting doesn't help or it is unknown.
    """

    reason: str
    limit: int
    used: int
    requested: int
    wait: int | None


class Enforcer:
    """Decide about calls, and keep a record of them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._lock = Lock()
        #: Whose rules hold, if not each endpoint's.
        self.rules = None if options.profile is None else RULES[options.profile]
        minute = round(options.minute * NANOSECONDS)
        counted_in = {} if self.rules is None else self.rules.counted_in
        self._policies = {
            name: Policy(counted_in.get(name, options.policy), minute) for name in _LIMITS
        }
        self._policies["daily_requests"] = Policy("fixed_window", minute * _MINUTES_OF_A_DAY)
        self._scripted: deque[Failure] = deque()
        self._latencies = random.Random(0)  # noqa: S311 - repeatable, not secret
        self._arrivals: deque[Arrival] = deque(maxlen=_ARRIVALS_KEPT)
        self._refused: Counter[str] = Counter()
        self._endpoints: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def enter(
        self, endpoint: str, tokens: int, amounts: Mapping[str, int] | None = None
    ) -> RateRefusal | Failure | None:
        """Admit a call or say why not; None means that it is in and must `leave`.

        A call with a `Failure` other than 429 is in as well, and must `leave`, too.

        Args:
            endpoint: The end of its path.
            tokens: What it costs.
            amounts: What it costs of other resources.
        """
        amounts = {"requests": 1, "daily_requests": 1, **(amounts or {}), "tokens": tokens}
        with self._lock:
            now = self.options.clock()
            outcome = self._decide(amounts, now)
            admitted = not is_refusal(outcome)
            self._endpoints[endpoint] += 1
            self._arrivals.append(Arrival(now, endpoint, tokens, admitted))
            if admitted:
                self._charge(amounts, now)
                self._count_in()
                self._counts["errors"] += outcome is not None
            else:
                reason = outcome.reason if isinstance(outcome, RateRefusal) else "scripted"
                self._refused[reason] += 1
            return outcome

    def leave(self, *, disconnected: bool = False) -> None:
        """Give the slot of an admitted call back."""
        with self._lock:
            self._counts["in_flight"] -= 1
            self._counts["disconnected"] += disconnected

    def settle(self, corrections: Mapping[str, int]) -> None:
        """Correct what an admitted call was charged, by these differences, once its reply is done."""
        with self._lock:
            self._charge(corrections, self.options.clock())

    def count_invalid(self) -> None:
        """Count a call that was refused unread."""
        with self._lock:
            self._counts["invalid"] += 1

    def draw_latency(self) -> float:
        """Return the seconds that the next reply takes."""
        latency = self.options.latency
        if callable(latency):
            return latency()
        with self._lock:
            return self._latencies.uniform(*latency) if isinstance(latency, tuple) else latency

    def budget(self) -> list[tuple[str, int, int, int]]:
        """Return for each limit its name, amount, what remains, and nanoseconds until it is full."""
        with self._lock:
            now = self.options.clock()
            return [
                (name, limit, policy.remaining(limit, now), policy.reset(limit, now))
                for name, limit, policy in self._limits()
            ]

    def statistics(self) -> ProviderStatistics:
        """Take a consistent snapshot."""
        with self._lock:
            return ProviderStatistics(
                requests=sum(self._endpoints.values()),
                refused_429=dict(self._refused),
                endpoints=dict(self._endpoints),
                **self._counts,
            )

    def arrivals(self) -> list[Arrival]:
        """Copy the latest arrivals, oldest first."""
        with self._lock:
            return list(self._arrivals)

    def fail_next(self, count: int, failure: Failure) -> None:
        """Let the next `count` calls fail, after those scripted before; 0 forgets all of them."""
        read_count(count, "count")
        with self._lock:
            if count:
                self._scripted.extend([failure] * count)
            else:
                self._scripted.clear()

    def reconfigure(self, changes: dict[str, Any]) -> None:
        """Change options while running; what was used stays used."""
        fixed = sorted(_FIXED_AT_START & changes.keys())
        if fixed:
            raise ValueError(f"{', '.join(fixed)} can't change while the provider runs")
        Options(**{**self.options.given(), **changes})  # refuses what is invalid
        with self._lock:
            for name, value in changes.items():
                setattr(self.options, name, value)

    def _limits(self) -> Iterator[tuple[str, int, Policy]]:
        for name, option in _LIMITS.items():
            limit: int | None = getattr(self.options, option)
            if limit is not None:
                yield name, limit, self._policies[name]

    def _decide(self, amounts: Mapping[str, int], now: int) -> RateRefusal | Failure | None:
        always = self.options.always
        failure = Failure(always) if always else None
        if self._scripted:
            failure = self._scripted[0]
        if failure is None or failure.status != TOO_MANY_REQUESTS:
            refusal = self._refusal(amounts, now)
            if refusal is not None:
                return refusal
        return self._scripted.popleft() if self._scripted else failure

    def _refusal(self, amounts: Mapping[str, int], now: int) -> RateRefusal | None:
        slots, in_flight = self.options.concurrency, self._counts["in_flight"]
        if slots is not None and in_flight >= slots:
            return RateRefusal("concurrency", slots, in_flight, 1, None)
        refusals: list[RateRefusal] = []
        for name, limit, policy in self._limits():
            amount = amounts.get(name, 0)
            wait = policy.wait(amount, limit, now)
            if wait != 0:
                used = limit - policy.remaining(limit, now)
                refusals.append(RateRefusal(name, limit, used, amount, wait))
        # The one that lasts longest.
        return max(refusals, key=lambda each: (each.wait is None, each.wait or 0), default=None)

    def _charge(self, amounts: Mapping[str, int], now: int) -> None:
        for name, limit, policy in self._limits():
            policy.charge(amounts.get(name, 0), limit, now)
        self._counts["tokens"] += amounts.get("tokens", 0)

    def _count_in(self) -> None:
        counts = self._counts
        counts["admitted"] += 1
        counts["in_flight"] += 1
        counts["peak_in_flight"] = max(counts["peak_in_flight"], counts["in_flight"])


def is_refusal(outcome: RateRefusal | Failure | None) -> bool:
    """Tell whether the call is not admitted."""
    if isinstance(outcome, Failure):
        return outcome.status == TOO_MANY_REQUESTS
    return outcome is not None
