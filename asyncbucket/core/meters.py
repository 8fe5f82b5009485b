"""What may pass: the arithmetic of limits, without a clock of its own.

A meter answers two questions and keeps one account. ``earliest(amount, now)`` says from when on
``amount`` may pass if nothing else is booked in between; ``book(amount, when)`` takes it.
``unbook`` gives back what a booking took, ``owe`` adds what a call used beyond its booking,
``available`` says how much could pass now. Instants are integer nanoseconds of any monotonic clock;
amounts are whole units. No method waits, reads a clock or knows asyncio, so the same arithmetic
serves the live limiter, a plan on virtual time, and the tests of stores that keep these numbers
elsewhere.

``Bucket`` is the generic cell rate algorithm (ITU-T I.371): instead of a level that must be
refilled, it keeps the one instant ``tat`` at which the bucket will be full again. Taking n units
moves it n * p / q ns into the future (p / q ns being the exact time in which one unit flows in);
n may pass as soon as ``tat`` would then lie at most ``burst * p / q`` ns ahead. Time is counted in
q-ths of a nanosecond, so nothing is ever rounded but the instant that is returned, upwards.

Refunds need care. What flows into a full bucket is lost. So a refund of something taken long ago
must not bring back more than the bucket would hold now if it had never been taken. That is exactly
the lowest backlog (distance from full) since the booking. The bucket remembers these lows in a
short list, ascending in time and in backlog. If the list gets too long it is halved: each pair
becomes one entry with the lower low and the later time, so a refund errs on the safe side only.

``Window`` is the sliding window itself: bookings by time, forgotten once the window has passed
them. To bound its memory, bookings within W/512 of each other are kept as one, dated at the last.
Each is kept 3W/512 longer than the window, to allow for network jitter: two calls admitted exactly
W apart may arrive closer together. In total that is at most W/128, on the safe side.
"""

import bisect
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import ClassVar, Final, Protocol

#: "Not before something is given back": later than any instant.
NEVER: Final = 1 << 100

#: A window is divided into this many grains,
_GRAINS: Final = 512
#: and keeps bookings this many grains longer, to allow for network jitter.
_JITTER: Final = 3
#: A bucket remembers at most this many lows; one more, and they are merged in pairs.
_LOWS: Final = 511

#: What a call takes: resource -> whole units.
Amounts = Mapping[str, int]


class Meter(Protocol):
    """Say what may pass. Amounts are whole units, instants integer nanoseconds."""

    #: What is reported as binding if this meter binds, if that is not the resource it counts.
    bound_by: ClassVar[str | None]
    #: Whether it stands for a meter in a store, which dates bookings itself.
    remote: ClassVar[bool]

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:
        """Return the first instant from ``now`` on at which ``amount`` may pass.

        The answer never decreases as ``now`` advances, and holds while nothing else is booked. For
        a waiter, ``now`` is the instant since which it has been first in line. ``back`` assumes
        that this many units had been given back.
        """
        ...

    def take(self, amount: int, now: int) -> bool:
        """Book ``amount`` if it may pass at ``now``; return whether it may."""
        ...

    def book(self, amount: int, when: int) -> None:
        """Take ``amount`` at ``when``, which ``earliest`` allowed."""
        ...

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """Give back ``amount`` of what was booked at ``when``, where ``left`` of it stays booked."""
        ...

    def owe(self, amount: int, when: int) -> None:
        """Take ``amount`` whether or not it may pass; later calls wait for it."""
        ...

    def available(self, now: int) -> int:
        """Return how many units could pass at ``now``; negative while a debt is paid off."""
        ...


class Bucket:
    """Admit at most ``burst`` units at once, refilled at ``rate`` units a second.

    In any interval of t seconds at most ``burst + rate * t`` units pass. If the caller allows it,
    more than ``burst`` passes at once, too, after the rest has flowed in while the call was first
    in line.
    """

    bound_by: ClassVar[str | None] = None
    remote: ClassVar[bool] = False

    __slots__ = ("_dates", "_lows", "burst", "depth", "full_at", "low", "p", "q", "slack", "tat")

    def __init__(self, *, rate: float | Fraction, burst: int) -> None:
        #: When the bucket will be (or was) full again, in q-ths of a nanosecond.
        self.tat = 0
        #: The last instant at which a booking found the bucket full, in the same unit.
        self.full_at = 0
        # The lows and their instants, both ascending, in q-ths of a nanosecond.
        self._dates: list[int] = []
        self._lows: list[int] = []
        #: The lowest backlog found by bookings that bypassed `book` (see `TokenBucket.acquire`); the
        #: next booking made here adds it to the others.
        self.low = NEVER
        #: One unit flows in within p / q ns.
        self.p = self.q = 1
        #: How far ahead `tat` may lie after any call, and before a call of one unit, in q-ths of ns.
        self.depth = self.slack = 0
        self.burst = 0
        self.reshape(rate=rate, burst=burst, now=0)

    def reshape(self, *, rate: float | Fraction, burst: int, now: int) -> None:
        """Change rate and burst; units that are missing stay missing until they are given back."""
        p, q, missing = self.p, self.q, max(0, self.tat - now * self.q)
        self.p, self.q = (1_000_000_000 / exact_rate(rate)).as_integer_ratio()
        self.burst = burst
        self.depth = burst * self.p
        self.slack = self.depth - self.p
        self.tat = now * self.q - -missing * self.p // p
        self.full_at = self.full_at * self.q // q
        self._dates = [date * self.q // q for date in self._dates]
        self._lows = [low * self.p // p for low in self._lows]
        self.low = NEVER

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:
        """See `Meter.earliest`."""
        start = now * self.q
        over = (amount - self.burst) * self.p
        tat = self.tat - back * self.p
        if over > 0 and tat < start:  # the rest flows in while the caller is first in line
            tat = start
        tat += over
        return now if tat <= start else -(-tat // self.q)

    def take(self, amount: int, now: int) -> bool:
        """See `Meter.take`."""
        start = now * self.q
        cost = amount * self.p
        backlog = self.tat - start
        if cost > self.depth or backlog + cost > self.depth:
            return False
        if backlog <= 0:  # as `_add` does, without the call: this is the hottest path
            self.full_at = start
            self.tat = start + cost
            self.low = NEVER
        else:
            self._add(cost, start, backlog)
        return True

    def book(self, amount: int, when: int) -> None:
        """See `Meter.book`."""
        cost = amount * self.p
        start = when * self.q
        if cost > self.depth:  # the rest flowed in while it was first in line: see `earliest`
            start -= cost - self.depth
        self._add(cost, start, self.tat - start)

    def _add(self, cost: int, start: int, backlog: int) -> None:
        low = min(self.low, backlog)
        self.low = NEVER
        if backlog <= 0:
            self.full_at = start
            self.tat = start + cost
            return
        self.tat += cost
        dates, lows = self._dates, self._lows
        if dates:
            if dates[-1] == start:
                return  # the first booking of this instant found the lower backlog
            if dates[-1] <= self.full_at:
                dates.clear()
                lows.clear()
            while lows and lows[-1] >= low:
                del dates[-1], lows[-1]
        dates.append(start)
        lows.append(low)
        if len(lows) > _LOWS:
            self._dates, self._lows = dates[1::2], lows[::2]

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """See `Meter.unbook`: at most the lowest backlog since then comes back."""
        start = when * self.q
        if self.full_at > start:
            return
        later = bisect.bisect_right(self._dates, start)
        # A call above the burst earned the excess by waiting at the head. The excess comes back
        # only if the whole call does and nothing was booked since, not even at the same instant. A
        # debt has earned nothing if it found the bucket neither full nor empty, or full just then.
        found = self._lows[later - 1] if start in self._dates[later - 1 : later] else self.depth
        as_debt = self.full_at == start or found != self.depth
        if not as_debt and (left or self.tat != start + self.depth):
            amount = min(left + amount, self.burst) - min(left, self.burst)
        back = min([amount * self.p, self.low, *self._lows[later : later + 1]])
        self.low -= back
        lows = [low - back for low in self._lows[later:]]
        # Lows from before `when` stay unchanged; those now above a later one are no longer lows.
        first = bisect.bisect_left(self._lows, lows[0], 0, later) if lows else later
        del self._dates[first:later]
        self._lows[first:] = lows
        self.tat -= back

    def owe(self, amount: int, when: int) -> None:
        """See `Meter.owe`; a bucket that has been full for long enough has earned the excess."""
        start = when * self.q
        if self.tat + (amount - self.burst) * self.p <= start:
            self.book(amount, when)
        else:
            self._add(amount * self.p, start, self.tat - start)

    def remember(self, amount: int, when: int) -> None:
        """Take ``amount`` that was missing at ``when`` in an earlier bucket; more is a debt."""
        at_once = min(amount, self.burst)
        self.book(at_once, when)
        self.owe(amount - at_once, when)

    def available(self, now: int) -> int:
        """See `Meter.available`; negative while a debt is paid off."""
        backlog = self.tat - now * self.q
        return (self.depth - backlog) // self.p if backlog > 0 else self.burst

    def missing(self, now: int) -> int:
        """Return how many units are missing from a full bucket, rounded up."""
        return self.burst - self.available(now)


def exact_rate(rate: float | Fraction) -> Fraction:
    """Return the ``rate`` that is meant: 0.1 is a tenth, 66666.66666666667 is 200,000 / 3."""
    exact = Fraction(rate)
    simple = exact.limit_denominator(1_000_000)
    return simple if float(simple) == float(rate) else exact


class Window:
    """Admit at most ``amount`` units in every window of ``window`` nanoseconds.

    Bookings made elsewhere, up to ``began``, give nothing back here.
    """

    bound_by: ClassVar[str | None] = None
    remote: ClassVar[bool] = False

    __slots__ = (
        "_closes",
        "_dates",
        "_forgotten",
        "_grain",
        "_hold",
        "_last",
        "_recent",
        "_units",
        "amount",
        "lent",
        "used",
        "window",
    )

    def __init__(self, *, amount: int, window: int, began: int = -1) -> None:
        self.amount = amount
        self.window = window
        #: Units booked within the window, debts included.
        self.used = 0
        #: Units that open calls may still give back; whoever ends a call subtracts its units.
        self.lent = 0
        self._grain = max(1, window // _GRAINS)
        self._hold = window + _JITTER * window // _GRAINS
        # Entries: the date of the last booking in each, and its units. The newest entry is kept
        # apart: it takes more bookings until its grain has passed; 0 if there is none.
        self._dates: list[int] = []
        self._units: list[int] = []
        self._last = 0
        self._recent = 0
        self._closes = 0
        #: The date of the last entry that was forgotten.
        self._forgotten = began

    def reshape(self, *, amount: int) -> None:
        """Change the amount; what was booked stays booked."""
        self.amount = amount

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:
        """See `Meter.earliest`."""
        over = self.used - back + amount - self.amount
        if over <= 0:
            return now
        for date, units in zip(self._dates, self._units, strict=True):
            over -= units
            if over <= 0:
                return max(now, date + self._hold)
        return max(now, self._last + self._hold) if over <= self._recent else NEVER

    def take(self, amount: int, now: int) -> bool:
        """See `Meter.take`."""
        if self.used + amount > self.amount and self.available(now) < amount:
            return False
        if now >= self._closes:
            self._open(now)
        self.used += amount  # as `book` does, without the call: this is the hottest path
        self.lent += amount
        self._recent += amount
        self._last = now
        return True

    def book(self, amount: int, when: int) -> None:
        """See `Meter.book`."""
        if when >= self._closes:
            self._open(when)
        self.used += amount
        self.lent += amount
        self._recent += amount
        self._last = when

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - units are alike
        """See `Meter.unbook`; what the window has forgotten needs no giving back."""
        self.lent -= amount
        if when <= self._forgotten or when > self._last:
            return
        index = bisect.bisect_left(self._dates, when)
        if index < len(self._dates):
            back = min(amount, self._units[index])
            self._units[index] -= back
        else:
            back = min(amount, self._recent)
            self._recent -= back
        self.used -= back

    owe = book

    def available(self, now: int) -> int:
        """See `Meter.available`."""
        self._forget(now)
        return self.amount - self.used

    @property
    def last(self) -> int:
        """The date of the last booking."""
        return self._last

    def booked_since(self, when: int) -> int:
        """Return the units booked after ``when``, or within a grain before it."""
        recent = self._recent if self._last > when else 0
        return recent + sum(self._units[bisect.bisect_right(self._dates, when) :])

    def without_open_calls(self) -> "Window":
        """Return another window with the bookings that no open call can give back: the oldest ones."""
        result = Window(amount=self.amount, window=self.window)
        left = self.used - self.lent
        for date, units in self._entries():
            if left > 0:
                result.remember(min(units, left), date)
            left -= units
        return result

    def entries(self, now: int) -> list[tuple[int, int]]:
        """Return what is booked in the window that ends at ``now``: (date, units), oldest first."""
        self._forget(now)
        return [(date, units) for date, units in self._entries() if units]

    def remember(self, amount: int, when: int) -> None:
        """Book ``amount`` at ``when`` for a call that has ended and gives nothing back."""
        self.book(amount, when)
        self.lent -= amount

    def _entries(self) -> Iterator[tuple[int, int]]:
        yield from zip(self._dates, self._units, strict=True)
        yield self._last, self._recent

    def _open(self, when: int) -> None:
        """Close the newest entry, and begin another."""
        self._forget(when)
        if self._closes:
            self._dates.append(self._last)
            self._units.append(self._recent)
            self._recent = 0
        self._closes = when + self._grain

    def _forget(self, now: int) -> None:
        """Drop the entries that no window reaching to ``now`` contains."""
        horizon = now - self._hold
        gone = bisect.bisect_right(self._dates, horizon)
        if gone:
            self._forgotten = self._dates[gone - 1]
            self.used -= sum(self._units[:gone])
            del self._dates[:gone], self._units[:gone]
        if self._closes and self._last <= horizon:
            self._forgotten = self._last
            self.used -= self._recent
            self._recent = self._closes = 0


class Slots:
    """Admit at most ``size`` units until some are given back."""

    bound_by: ClassVar[str | None] = None
    remote: ClassVar[bool] = False

    __slots__ = ("size", "used")

    def __init__(self, *, size: int) -> None:
        self.size = size
        #: Slots taken.
        self.used = 0

    def reshape(self, *, size: int) -> None:
        """Change the size; slots that are taken stay taken."""
        self.size = size

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:
        """See `Meter.earliest`: now, or not before a slot is given back."""
        return now if self.used - back + amount <= self.size else NEVER

    def take(self, amount: int, now: int) -> bool:  # noqa: ARG002 - slots know no time
        """See `Meter.take`."""
        if self.used + amount > self.size:
            return False
        self.used += amount
        return True

    def book(self, amount: int, when: int) -> None:  # noqa: ARG002 - slots know no time
        """See `Meter.book`."""
        self.used += amount

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - slots know no time
        """See `Meter.unbook`."""
        self.used -= amount

    owe = book

    def give_back(self) -> None:
        """Give back one slot."""
        self.used -= 1

    def available(self, now: int) -> int:  # noqa: ARG002 - slots know no time
        """See `Meter.available`; negative after the size was cut."""
        return self.size - self.used
