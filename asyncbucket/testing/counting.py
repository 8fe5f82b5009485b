"""How a provider counts one limit: what is used, when it comes back, and what others take of it.

A policy is a pure object that is given the time and the limit, and remembers what was used of N units
a minute, whatever N is at the moment. At an instant `now`, in integer nanoseconds that never go
backwards, it says

- `wait`: in how many nanoseconds an amount would pass; 0 is now, None is never,
- `remaining`: how many units headers say would pass now,
- `reset`: in how many nanoseconds everything is back, if nothing else comes,

and is told by `charge` what was admitted. It judges asyncbucket, so it shares nothing with its meters:
asyncbucket books the future, this looks at the past.
"""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from asyncbucket.engine.wording import is_number, read_count

PolicyName: TypeAlias = Literal[
    "token_bucket", "sliding_window", "fixed_window", "one_second_slices", "ten_second_slices"
]
POLICY_NAMES: Final[tuple[PolicyName, ...]] = get_args(PolicyName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """How one limit is counted.

    Attributes:
        by: A bucket that refills continuously, a log of any minute, or the calendar: the clock's
            minutes, which begin anew.
        size: What a bucket holds; by default a minute's worth. A call above it never passes,
        oversize: unless this says that it does once nothing is missing.
        slices: The limit is also checked in so many parts of each of the clock's minutes.
        hidden: Headers say nothing of slices, only what is left of the minute.
        others: Which part of the limit other users of the key ask for, on average.
        others_at_once: They come in bursts of so many calls, at random instants.
        others_cost: What each of their calls costs.
        seed: Of their instants.
    """

    by: Literal["bucket", "log", "calendar"] = "bucket"
    size: int | None = None
    oversize: bool = False
    slices: int = 1
    hidden: bool = False
    others: float = 0.0
    others_at_once: int = 1
    others_cost: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("bucket", "log", "calendar"):
            raise ValueError(f"by must be bucket, log or calendar, not {self.by!r}")
        if self.size is not None:
            read_count(self.size, "size", least=1)
        for name in ("slices", "others_at_once", "others_cost"):
            read_count(getattr(self, name), name, least=1)
        if not is_number(self.others) or not 0 <= self.others <= 1:
            raise ValueError(f"others must be a fraction from 0 to 1, not {self.others!r}")


#: What the names of policies stand for.
POLICIES: Final[Mapping[str, Counting]] = {
    "token_bucket": Counting(),
    "sliding_window": Counting(by="log"),
    "fixed_window": Counting(by="calendar"),
    "one_second_slices": Counting(by="log", slices=60),
    "ten_second_slices": Counting(by="log", slices=6),
}


class Policy:
    """Count as providers do, by a `Counting` or the name of one.

    A slice is N / slices units, rounded up, in each of the clock's parts of a minute. What is charged
    may be negative: it comes back.

    Args:
        counting: How.
        minute: How long one lasts, in nanoseconds.
    """

    def __init__(self, counting: Counting | str, minute: int) -> None:
        if isinstance(counting, str):
            counting = POLICIES[counting]
        self._counting, self._minute = counting, minute
        whole = _Window(minute, by_clock=counting.by == "calendar")
        #: What counts, and into how many parts it divides the limit; headers tell of the shown ones.
        self._parts: list[tuple[_Bucket | _Window, int]] = [
            (_Bucket(minute, counting.size) if counting.by == "bucket" else whole, 1)
        ]
        if counting.slices > 1:
            part = _Window(minute // counting.slices, by_clock=True)
            self._parts.append((part, counting.slices))
        self._shown = self._parts[:1] if counting.hidden else self._parts
        self._chance = random.Random(counting.seed)  # noqa: S311 - repeatable, not secret
        self._next_others: int | None = None
        #: Calls of others, and how many of them were refused.
        self.others_sent = 0
        self.others_refused = 0

    def wait(self, amount: int, limit: int, now: int) -> int | None:
        self._let_others_in(limit, now)
        return self._wait(amount, limit, now)

    def charge(self, amount: int, limit: int, now: int) -> None:
        for part, n in self._parts:
            part.charge(amount, ceil(limit, n), now)

    def remaining(self, limit: int, now: int) -> int:
        self._let_others_in(limit, now)
        return min(part.remaining(ceil(limit, n), now) for part, n in self._shown)

    def reset(self, limit: int, now: int) -> int:
        return max(part.reset(ceil(limit, n), now) for part, n in self._shown)

    def _wait(self, amount: int, limit: int, now: int) -> int | None:
        most = self._counting.size or limit
        if amount > most and not self._counting.oversize:
            return None
        amount = min(amount, most)
        return max(part.wait(amount, ceil(limit, n), now) for part, n in self._parts)

    def _let_others_in(self, limit: int, now: int) -> None:
        """Charge what others have asked for since the last time, each burst at its own instant."""
        how = self._counting
        if not how.others:
            return
        gap = how.others_at_once * how.others_cost * self._minute / (how.others * limit)
        when = self._next_others
        if when is None:
            when = now + round(gap * self._chance.random())
        while when <= now:
            for _ in range(how.others_at_once):
                self.others_sent += 1
                if self._wait(how.others_cost, limit, when) == 0:
                    self.charge(how.others_cost, limit, when)
                else:
                    self.others_refused += 1
            when += round(self._chance.expovariate(1 / gap))
        self._next_others = when


class _Bucket:
    """Refill N units continuously within a span, up to a size.

    What is used is kept in units x span, of which each nanosecond gives back exactly N.
    """

    def __init__(self, span: int, size: int | None) -> None:
        self._span = span
        self._size = size
        self._used = 0
        self._at = 0

    def wait(self, amount: int, limit: int, now: int) -> int:
        over = self._used_at(limit, now) + (amount - (self._size or limit)) * self._span
        return max(0, ceil(over, limit))

    def charge(self, amount: int, limit: int, now: int) -> None:
        self._used = max(0, self._used_at(limit, now) + amount * self._span)

    def remaining(self, limit: int, now: int) -> int:
        return max(0, (self._size or limit) - ceil(self._used_at(limit, now), self._span))

    def reset(self, limit: int, now: int) -> int:
        return ceil(self._used_at(limit, now), limit)

    def _used_at(self, limit: int, now: int) -> int:
        self._used = max(0, self._used - (now - self._at) * limit)
        self._at = now
        return self._used


class _Window:
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
        room = max(0, limit - self._used_at(now))
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


def ceil(amount: int, divisor: int) -> int:
    """Divide, and round up."""
    return -(-amount // divisor)
