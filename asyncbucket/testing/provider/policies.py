"""How a provider counts: five policies, pure objects that are given the time and the limit.

They judge asyncbucket, so they share no code with it: asyncbucket books the future, these look at
the past. Each remembers what was used of N units a minute, whatever N is at the moment. At an
instant `now`, in integer nanoseconds that never go backwards, it says

- `wait`: in how many nanoseconds an amount would pass; 0 is now, None is never,
- `remaining`: how many units would pass now,
- `reset`: in how many nanoseconds everything is back, if nothing else comes,

and is told by `charge` what was admitted. A policy is one `Bucket` or `Window`, or two that both
have to agree.
"""

from collections import deque
from typing import Final, Literal, TypeAlias, get_args

PolicyName: TypeAlias = Literal[
    "token_bucket", "sliding_window", "fixed_window", "one_second_slices", "ten_second_slices"
]
POLICY_NAMES: Final[tuple[PolicyName, ...]] = get_args(PolicyName)

SLICES: Final = 60
_SLICES: Final[dict[str, int]] = {"one_second_slices": SLICES, "ten_second_slices": SLICES // 10}


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
        elif name in _SLICES:
            count = _SLICES[name]
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
