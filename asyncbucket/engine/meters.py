"""What may pass: the arithmetic of limits, without a clock of its own.

A meter answers one question and keeps one account. ``earliest(amount, since)`` says from when on
``amount`` may pass if nothing else is booked in between; ``book(amount, when)`` takes it. ``unbook``
gives back what a booking took, ``owe`` adds what a call used beyond its booking, ``available`` says
how much could pass now. Instants are integer nanoseconds of any monotonic clock; amounts are whole
units. Nothing here waits, reads a clock or knows asyncio, so the same arithmetic serves the live
limiter, a plan on virtual time, and the tests of stores that keep these numbers elsewhere.
Everything that can hold a call back is a meter: a limit, a pause, what a provider says is left. (A
slot is not: it is an open call, and `Slots` counts those.)

A call passes all meters of its `Route` at once, or none: `admit` asks them, and books if it is due.
Whoever lets a call go, asks here: a newcomer, a dispatch of those who wait, a token bucket, a pool;
and so does whoever only wants to know: an explanation, a plan, a refusal.

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

``Window`` is one limit: a `Log` of what was booked, a `Period` if it resets by the calendar, and a
`Bucket` that paces it if the limit has a burst. Bookings are kept by time, and forgotten once the
window has passed them. To bound its memory, bookings within W/512 of each other are kept as one,
dated at the last. Each is kept 3W/512 longer than the window, to allow for network jitter: two calls
admitted exactly W apart may arrive closer together. In total that is at most W/128, on the safe side.

A window that resets by the calendar keeps one entry, and the number of the period that is open.
When a period is opened, the caller's monotonic clock decides when it ends. When that instant comes,
the wall clock is asked: if it shows a later period, that one is opened, and all comes back; else
the window waits for the end of the period that it shows. So a wall clock that is set back never
opens a period twice, one that is set forward ends none early, and no period ends later than one
period after it should. What was used beyond the amount stays owed in the next period, but no longer.

A sliding window would forget what calls used beyond its whole amount once that is a window old. So a
bucket that holds the amount joins it until that debt is paid: in the long run no more passes than
the limit, plus one call, whatever the estimates were.
"""

import bisect
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, ClassVar, Final, Protocol, TypeAlias

from asyncbucket.engine.limits import Calendar, Key, Limit
from asyncbucket.engine.statistics import Belief

#: "Not before something is given back": later than any instant.
NEVER: Final = 1 << 100
#: A window is divided into this many grains, and keeps bookings this many grains longer.
_GRAINS: Final = 512
_JITTER: Final = 3
#: A bucket remembers at most this many lows; one more, and they are merged in pairs.
_LOWS: Final = 511

#: The most (ns) that a call of a crowd is let go late on purpose; a timer may add as much.
LATE: Final = 1_000_000

#: What a call takes: resource -> whole units.
Amounts = Mapping[str, int]
#: Each meter with the resource that it counts.
Meters: TypeAlias = tuple[tuple["Meter", str], ...]
#: No list of its own for each of ten thousand idle limiters; never changed.
_NOTHING: Final[list[int]] = []


class Meter(Protocol):
    """Say from when on an amount may pass: the one interface for limits, feedback and stores."""

    __slots__ = ()

    #: What is reported as binding, if that is not the resource it counts.
    bound_by: ClassVar[str | None] = None
    #: Whether it learns from replies: see `asyncbucket.feedback.provider_meter`.
    learns: ClassVar[bool] = False

    @property
    def key(self) -> Key | None:
        """What identifies the limit of which it learns."""
        return None

    @property
    def belief(self) -> Belief | None:
        """What is believed of how the provider counts; None as long as nothing was learned."""
        return None

    #: How many units are sure to pass now or later, so that nobody has to ask; it may always be 0.
    free: int = 0
    #: What a store has to keep of it.
    kept: ClassVar[tuple[str, ...]] = ()

    def earliest(self, amount: int, since: int, *, back: int = 0) -> int:
        """Return the first instant from ``since`` on at which ``amount`` may pass.

        The answer never decreases as ``since`` advances, and holds while nothing else is booked. A
        newcomer asks since now, a call that waits since the instant at which it was first in line.
        ``back`` assumes that this many units had been given back.
        """
        ...

    def book(self, amount: int, when: int) -> None:
        """Take ``amount`` at ``when``, which ``earliest`` allowed."""

    def leeway(self, amount: int) -> int:  # noqa: ARG002 - for those below
        """Return how late (ns) a crowd of such calls may be let go without losing anything.

        It is 0 unless several of them come due within a `LATE`: then one timer serves them all.
        """
        return 0

    def owe(self, amount: int, when: int) -> None:
        """Take ``amount`` whether or not it may pass; later calls wait for it."""

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """Give back ``amount`` of what was booked at ``when``, where ``left`` of it stays booked."""

    def redate(self, amount: int, when: int, now: int) -> None:
        """Move a booking from ``when`` to ``now``, because the call leaves only now."""
        self.unbook(amount, when)
        self.owe(amount, now)

    def available(self, now: int) -> int:
        """Return how many units could pass at ``now``; negative while a debt is paid off."""
        ...

    def renewed(self, limits: "Mapping[Key, Window]") -> "Meter":  # noqa: ARG002 - as above
        """Return what stands in its place once ``limits`` are in force."""
        return self

    def state(self) -> list[Any]:
        """Return all that it remembers, as plain data for `restore`."""
        return [getattr(self, name) for name in self.kept]

    def restore(self, state: list[Any]) -> None:
        """Remember what a meter of the same limit did when it made ``state``."""
        for name, value in zip(self.kept, state, strict=True):
            setattr(self, name, value)


class Bucket(Meter):
    """Admit at most ``burst`` units at once, refilled at ``rate`` units a second.

    In any interval of t seconds at most ``burst + rate * t`` units pass. If the caller allows it,
    more than ``burst`` passes at once, too, after the rest has flowed in while the call was first
    in line.
    """

    kept = ("tat", "full_at", "_dates", "_lows", "low", "_earlier_bursts")

    def __init__(self, *, rate: float | Fraction, burst: int) -> None:
        self.burst = burst
        #: One unit flows in within p / q ns.
        self.p, self.q = (1_000_000_000 / exact_rate(rate)).as_integer_ratio()
        #: How far ahead `tat` may lie after any call, and before a call of one unit, in q-ths of ns.
        self.depth, self.slack = burst * self.p, (burst - 1) * self.p
        #: When the bucket will be (or was) full again, in q-ths of a nanosecond.
        self.tat = 0
        #: The last instant at which a booking found the bucket full, in the same unit.
        self.full_at = 0
        # The lows and their instants, both ascending, in q-ths of a nanosecond.
        self._dates: list[int] = _NOTHING
        self._lows: list[int] = _NOTHING
        #: The lowest backlog found by bookings that bypassed `book` (see `TokenBucket.acquire`); the
        #: next booking made here adds it to the others.
        self.low = NEVER
        #: Until when (ns) bookings were made under other bursts, and the least of those.
        self._earlier_bursts = -1, burst

    def reshaped(self, *, rate: float | Fraction, burst: int, now: int) -> "Bucket":
        """Return one of another rate and burst; units that are missing stay missing until they are given back."""
        new = Bucket(rate=rate, burst=burst)
        missing = max(0, self.tat - now * self.q)
        new.tat = now * new.q - -missing * new.p // self.p
        new.full_at = self.full_at * new.q // self.q
        new._dates = [date * new.q // self.q for date in self._dates]
        new._lows = [low * new.p // self.p for low in self._lows]
        new._earlier_bursts = self._earlier_bursts
        if burst != self.burst:
            new._earlier_bursts = now, min(self.burst, self._earlier_bursts[1])
        return new

    def earliest(self, amount: int, since: int, *, back: int = 0) -> int:
        """See `Meter.earliest`."""
        start = since * self.q
        over = (amount - self.burst) * self.p
        tat = self.tat
        if back:
            tat -= back * self.p
        if over > 0 and tat < start:  # the rest flows in while the caller is first in line
            tat = start
        tat += over
        return since if tat <= start else -(-tat // self.q)

    def book(self, amount: int, when: int) -> None:
        """See `Meter.book`."""
        cost = amount * self.p
        start = when * self.q
        if cost > self.depth:  # the rest flowed in while it was first in line: see `earliest`
            start -= cost - self.depth
        backlog = self.tat - start
        if backlog > 0:
            self._add(cost, start, backlog)
            return
        self.full_at = start
        self.tat = start + cost
        self.low = NEVER

    def _add(self, cost: int, start: int, backlog: int) -> None:
        low = min(self.low, backlog)
        self.low = NEVER
        if backlog <= 0:
            self.full_at = start
            self.tat = start + cost
            return
        self.tat += cost
        dates, lows = self._dates, self._lows
        if dates and dates[-1] == start:
            return  # the first booking of this instant found the lower backlog
        if not dates or dates[-1] <= self.full_at:
            self._dates, self._lows = [start], [low]
            return
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
        until, least = self._earlier_bursts
        burst = self.burst if when > until else least
        as_debt = when > until and (self.full_at == start or found != self.depth)
        if not as_debt and (left or self.tat != start + self.depth):
            amount = min(left + amount, burst) - min(left, burst)
        back = min([amount * self.p, self.low, *self._lows[later : later + 1]])
        self.low -= back
        lows = [low - back for low in self._lows[later:]]
        # Lows from before `when` stay unchanged; those now above a later one are no longer lows.
        first = bisect.bisect_left(self._lows, lows[0], 0, later) if lows else later
        del self._dates[first:later]
        self._lows[first:] = lows
        self.tat -= back

    def leeway(self, amount: int) -> int:
        """See `Meter.leeway`: until the bucket is half full again, beyond what the call takes."""
        if amount * self.p >= LATE * self.q:
            return 0
        return min(LATE, (self.burst - amount) * self.p // (2 * self.q))

    def owe(self, amount: int, when: int) -> None:
        """See `Meter.owe`; a bucket that has been full for long enough has earned the excess."""
        start = when * self.q
        if self.tat + (amount - self.burst) * self.p <= start:
            self.book(amount, when)
        else:
            self._add(amount * self.p, start, self.tat - start)

    def redate(self, amount: int, when: int, now: int) -> None:
        """See `Meter.redate`; the excess over a burst was earned by waiting, whenever it leaves."""
        super().redate(min(amount, self.burst), when, now)

    def available(self, now: int) -> int:
        """See `Meter.available`."""
        backlog = self.tat - now * self.q
        return (self.depth - backlog) // self.p if backlog > 0 else self.burst


def exact_rate(rate: float | Fraction) -> Fraction:
    """Return the ``rate`` that is meant: 0.1 is a tenth, 66666.66666666667 is 200,000 / 3."""
    exact = Fraction(rate)
    simple = exact.limit_denominator(1_000_000)
    return simple if float(simple) == float(rate) else exact


class Log:
    """Keep what was booked within a window, by time."""

    kept = ("_dates", "_units", "last", "closes", "used", "forgotten")

    def __init__(self, window: int, began: int) -> None:
        self.grain = max(1, window // _GRAINS)
        self.hold = window + _JITTER * window // _GRAINS
        #: Units booked within the window, debts included.
        self.used = 0
        # Entries that take no more bookings, oldest first: the date of the last booking in each,
        # and its units; and the sum of those.
        self._dates: list[int] = _NOTHING
        self._units: list[int] = _NOTHING
        self._closed = 0
        #: The newest entry: its date; and until when it takes more bookings, 0 if there is none.
        self.last = self.closes = 0
        #: The date of the last entry that was forgotten.
        self.forgotten = began

    def open(self, when: int) -> None:
        """Close the newest entry, and begin another."""
        if self.closes:
            self._dates = self._dates or []
            self._units = self._units or []
            self._dates.append(self.last)
            self._units.append(self.used - self._closed)
            self._closed = self.used
        self.closes = when + self.grain

    def back_at(self, units: int) -> int:
        """Return when so many units will have come back; `NEVER` if they have to be given back."""
        for date, booked in zip(self._dates, self._units, strict=True):
            units -= booked
            if units <= 0:
                return date + self.hold
        return self.last + self.hold if units <= self.used - self._closed else NEVER

    def unbook(self, amount: int, when: int) -> None:
        """Give back what was booked at ``when``; what is forgotten needs no giving back."""
        if when <= self.forgotten or when > self.last:
            return
        index = bisect.bisect_left(self._dates, when)
        if index < len(self._dates):
            back = min(amount, self._units[index])
            self._units[index] -= back
            self._closed -= back
        else:
            back = min(amount, self.used - self._closed)
        self.used -= back

    def insert(self, amount: int, when: int) -> None:
        """Book ``amount`` in the past."""
        index = bisect.bisect_left(self._dates, when)
        following = self._dates[index] if index < len(self._dates) else self.last
        if when <= self.forgotten or following - when <= _JITTER * self.grain:
            self.unbook(-amount, when)
            return
        self._dates, self._units = self._dates or [], self._units or []
        self._dates.insert(index, when)
        self._units.insert(index, amount)
        self.used, self._closed = self.used + amount, self._closed + amount

    def entries(self) -> list[tuple[int, int]]:
        """Return what is booked: (date, units), oldest first."""
        return [*zip(self._dates, self._units, strict=True), (self.last, self.used - self._closed)]

    def forget(self, now: int) -> bool:
        """Drop the entries that no window reaching to ``now`` contains; return whether the newest went, too."""
        horizon = now - self.hold
        gone = bisect.bisect_right(self._dates, horizon)
        if gone:
            self.forgotten = self._dates[gone - 1]
            units = sum(self._units[:gone])
            self.used -= units
            self._closed -= units
            del self._dates[:gone], self._units[:gone]
        if not self.closes or self.last > horizon:
            return False
        self.forgotten, self.used, self.closes = self.last, self._closed, 0
        return True

    def merge(self, until: int) -> None:
        """Keep all as one entry, booked last, which takes bookings ``until`` then."""
        self._dates, self._units, self._closed, self.closes = _NOTHING, _NOTHING, 0, until

    def restart(self, used: int, when: int) -> None:
        """Keep only ``used`` units, which nobody gives back, from ``when`` on."""
        self.used, self.forgotten = used, when - 1

    def state(self) -> list[Any]:
        """See `Meter.state`."""
        return [getattr(self, name) for name in self.kept]

    def restore(self, state: list[Any]) -> None:
        """See `Meter.restore`."""
        for name, value in zip(self.kept, state, strict=True):
            setattr(self, name, value)
        self._closed = sum(self._units)


class Period:
    """Know which period of the calendar is open: see above."""

    def __init__(self, calendar: Calendar, wall: Callable[[int], int]) -> None:
        self.calendar, self._wall = calendar, wall
        #: The number of the period that was opened; `NEVER` before the first.
        self.opened = NEVER

    def advance(self, when: int) -> tuple[int, int]:
        """Open the period that the wall clock shows; return by how many it is later, and when it ends."""
        wall = self._wall(when)
        number = self.calendar.number(wall)
        later = 0 if self.opened == NEVER else number - self.opened
        self.opened = number
        return later, when + self.calendar.start(number + 1) - wall

    def resets_at(self, end: int, times: int) -> int:
        """Return when it will have reset so many times, by the wall clock as it is now; it ends at ``end``."""
        then = self._wall(end)
        number = min(self.calendar.number(then), self.opened)
        return end + max(0, self.calendar.start(number + times) - then)


class Window(Meter):
    """Keep one limit: at most ``amount`` units in every window, and its pace if it has a burst."""

    def __init__(self, limit: Limit, *, began: int = -1, wall: Callable[[int], int] = int) -> None:
        """Keep ``limit``; calls booked up to ``began`` give nothing back.

        ``wall`` returns what the wall clock (ns since 1970) shows at an instant, as far as it is
        known now; by default the instants are the wall clock's own. Only limits that reset ask it.
        """
        #: Whether a call above the limit can never pass. A limit that a provider announced only
        #: holds such a call back, until it goes out alone, and its reply corrects the limit.
        self.refuses = True
        self.log = Log(limit.window, began)
        #: At least the most that one call has booked of it.
        self._largest = 0
        self._period: Period | None = None
        self._wall = wall
        #: See `Meter`. It is worked out as an entry opens, and falls with each booking.
        self.free = 0
        #: What paces it, if the limit has a burst.
        self.pace: Bucket | None = None
        self.reshape(limit, began + 1)
        self.log.closes = 0

    def reshape(self, limit: Limit, now: int, *, paced: bool = True) -> None:
        """Change the amount, the burst and when it resets; what was booked stays booked."""
        self.limit, self.units = limit, limit.units
        #: What was used beyond `allowed` is a debt that outlasts a reset: see `Node.set_limits`.
        self.amount = self.allowed = self.units
        self.free = 0
        calendar = limit.calendar
        if calendar != (None if self._period is None else self._period.calendar):
            self._period = None if calendar is None else Period(calendar, self._wall)
            self.log.merge(now)
        burst = limit.burst_units if paced and limit.burst_units is not None else self.units
        may_owe = calendar is None and self.pace is not None
        if burst == self.units and not may_owe:
            self.pace = None
        elif self.pace is None:
            self.pace = Bucket(rate=self._rate, burst=burst)
            self.pace.full_at = now * self.pace.q  # what was booked before gives nothing back
        else:
            self.pace = self.pace.reshaped(rate=self._rate, burst=burst, now=now)

    def give_way(self, to: Bucket | None = None) -> None:
        """Only count from now on: ``to`` or another meter knows how the limit is really counted."""
        if to is not None:
            for date, units in self.log.entries():
                to.owe(units, date)
        self.amount, self.pace, self.free = NEVER, to, 0

    @property
    def used(self) -> int:
        """Units booked within the window, debts included."""
        return self.log.used

    def earliest(self, amount: int, since: int, *, back: int = 0) -> int:
        """See `Meter.earliest`."""
        pace, log = self.pace, self.log
        if log.used + amount <= self.amount and not back:  # the usual case, in two steps
            return since if pace is None else pace.earliest(amount, since)
        if amount > self.amount and not self.refuses:
            amount = self.amount
        due = since if pace is None else pace.earliest(amount, since, back=back)
        over = log.used - back + amount - self.amount
        if over <= 0:
            return due
        if self._period is None:
            return max(due, log.back_at(over))
        if amount > self.amount:
            return NEVER
        return max(due, self._period.resets_at(log.closes, 1 if over <= self.allowed else 2))

    def book(self, amount: int, when: int) -> None:
        """See `Meter.book`."""
        if self.pace is not None:
            self.pace.book(amount, when)
        log = self.log
        if when >= log.closes:  # as `_book`, without the call: this is the hottest path
            self._open(when)
        log.used += amount
        log.last = when
        self.free -= amount
        if amount > self._largest:  # noqa: PLR1730 - `max` would be a call
            self._largest = amount

    def leeway(self, amount: int) -> int:
        """See `Meter.leeway`; without a pace, nothing is lost by it."""
        return NEVER if self.pace is None else self.pace.leeway(amount)

    def owe(self, amount: int, when: int) -> None:
        """See `Meter.owe`."""
        if self.pace is not None:
            self.pace.owe(amount, when)
        self._book(amount, when)
        self._largest += amount  # a call may have booked so much before
        if self.pace is None and self.log.used > self.amount and self._period is None:
            self._repay(amount, when)

    def _repay(self, amount: int, when: int) -> None:
        """Pace what comes by a bucket that holds the limit, until it has paid a debt of ``amount``.

        Without a debt it would never bind: what keeps the window, keeps it, too.
        """
        self.forget(when)
        spared = max(0, self.log.used - amount - self.amount)  # booked while the limit was higher
        self.pace, self.free = Bucket(rate=self._rate, burst=self.amount), 0
        entries = self.log.entries()
        self.pace.tat = entries[0][0] * self.pace.q  # no time before has earned anything
        for date, units in entries:
            self.pace.owe(max(0, units - spared), date)
            spared = max(0, spared - units)

    @property
    def _rate(self) -> Fraction:
        """Units a second."""
        return Fraction(self.amount * 1_000_000_000, self.limit.window)

    def fill(self, amount: int, when: int, now: int) -> None:
        """Owe what was taken at ``when``, as far as it fits; the pace owes it from ``now`` on."""
        if self.pace is not None and (room := self.pace.available(now)) > 0:
            self.pace.owe(min(amount, room), now)
        amount = min(amount, self._left(now))
        if amount <= 0:
            return
        if self._period is not None or when > self.log.last:
            self._book(amount, max(when, self.log.last))
        else:
            self.log.insert(amount, when)
        self._largest += amount

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """See `Meter.unbook`."""
        if self.pace is not None:
            self.pace.unbook(amount, when, left=left)
        self.log.unbook(amount, when)

    def redate(self, amount: int, when: int, now: int) -> None:
        """See `Meter.redate`."""
        if self.pace is not None:
            self.pace.redate(amount, when, now)
        self.log.unbook(amount, when)
        self._book(amount, now)

    def available(self, now: int) -> int:
        """See `Meter.available`."""
        left = self._left(now)
        return left if self.pace is None else min(left, self.pace.available(now))

    def state(self) -> list[Any]:
        """See `Meter.state`."""
        opened = None if self._period is None else self._period.opened
        pace = None if self.pace is None else self.pace.state()
        return [self._largest, self.log.state(), opened, pace]

    def restore(self, state: list[Any]) -> None:
        """See `Meter.restore`."""
        self._largest, log, opened, pace = state
        self.free = 0
        self.log.restore(log)
        if self._period is not None:
            self._period.opened = opened
        if pace is not None:
            self.pace = self.pace or Bucket(rate=self._rate, burst=self.amount)
            self.pace.restore(pace)

    def lent(self, calls: int) -> int:
        """Return at least what ``calls`` open calls may still give back."""
        held, pace = self.log.used, self.pace
        if pace is not None:  # a debt to it may outlast the window
            held = max(held, -((self.log.last * pace.q - pace.tat) // pace.p))
        return min(held, calls * self._largest)

    @property
    def was_used(self) -> bool:
        """Whether anything was ever booked."""
        log = self.log
        return bool(log.used or log.last or log.forgotten >= 0)

    def is_as_new(self, now: int) -> bool:
        """Tell whether a limit made anew would allow no more."""
        return self._left(now) == self.amount and self._is_paid(now)

    def _is_paid(self, now: int) -> bool:
        return self.pace is None or self.pace.tat <= now * self.pace.q

    def _book(self, amount: int, when: int) -> None:
        if when >= self.log.closes:
            self._open(when)
        self.log.used += amount
        self.log.last = when
        self.free -= amount

    def _left(self, now: int) -> int:
        self.forget(now)
        return self.amount - self.log.used

    def _open(self, when: int) -> None:
        """Have another entry, or period, take what is booked from now on."""
        self.free = self.available(when)
        if self._period is None:
            self.log.open(when)

    def forget(self, now: int) -> None:
        """Drop what no window reaching to ``now`` contains; open the calendar's next period."""
        if self._period is not None:
            while now >= self.log.closes:
                self._reset(self._period, now)
        elif self.log.forget(now) and self._is_paid(now):
            self._largest = 0
            if self.pace is not None and self.pace.burst == self.amount:  # all is paid
                self.pace = None

    def _reset(self, period: Period, now: int) -> None:
        """Open the period that the wall clock shows, unless it is one that was opened before."""
        # One after the other, so that it does not depend on who asked in between.
        when = now if period.opened == NEVER else self.log.closes
        later, self.log.closes = period.advance(when)
        if later > 0:
            owed = min(max(0, self.log.used - self.allowed), self.amount)
            self.log.restart(owed if later == 1 else 0, when)
            self.allowed, self._largest = self.amount, 0


class Slots:
    """Count the open calls of one limiter, whether or not their number is bounded."""

    __slots__ = ("admitted", "entered", "in_flight", "most")

    def __init__(self, most: int = NEVER) -> None:
        self.in_flight = self.admitted = 0
        #: The most calls in flight; `NEVER` if there is no bound.
        self.most = most
        #: Which call entered the only slot by ``async with``: its number, and its task's id.
        self.entered: tuple[int, int] = (0, 0)


class Route:
    """What a call passes: every meter, and a slot at every level; worked out once for all its calls."""

    __slots__ = ("bounded", "calendars", "levels", "meters", "most", "seconds")

    def __init__(
        self,
        levels: tuple[Slots, ...],
        meters: Meters,
        *,
        bounded: tuple[Slots, ...] = (),
        most: Mapping[str, int] | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        #: Where the call counts, and where its slot is one of a bounded number.
        self.levels, self.bounded = levels, bounded
        self.meters = meters
        #: Those that have to look at the wall clock before they are asked.
        self.calendars = tuple(m for m, _ in meters if isinstance(m, Window) and m.limit.calendar)
        #: The most that one call may cost of each resource; and how many seconds one unit takes of the
        #: fastest limit.
        self.most, self.seconds = most or {}, seconds or {}


def admit(  # noqa: C901 - the hottest path, in one piece
    route: Route, amounts: Amounts, since: int, now: int, *, book: bool = True, back: int = 0
) -> tuple[int, str | None]:
    """Return from when on a call may pass, and what binds; if it may pass ``now``, ``book`` it.

    All of it is booked, or nothing. `NEVER` means that it depends on something being given back.

    Args:
        route: what it passes.
        amounts: what it costs.
        since: when it became first in line; a newcomer did so now.
        now: the instant.
        book: whether to book it, or only to ask.
        back: how many slots of each level to count as given back.
    """
    for level in route.bounded:
        if level.in_flight >= level.most + back:
            return NEVER, "concurrency"
    for window in route.calendars:
        window.forget(now)
    due, bound_by = since, None
    for meter, resource in route.meters:
        amount = amounts.get(resource)
        if amount and amount > meter.free:
            when = meter.earliest(amount, since)
            if when > due:
                due, bound_by = when, meter.bound_by or resource
    if book and due <= now:  # as `take`, without the call: this is the hottest path
        for meter, resource in route.meters:
            amount = amounts.get(resource)
            if amount:
                meter.book(amount, now)
        for level in route.levels:
            level.in_flight += 1
            level.admitted += 1
    return due, bound_by


def take(route: Route, amounts: Amounts, now: int) -> None:
    """Book a call, which is due or has to pass all the same."""
    for meter, resource in route.meters:
        amount = amounts.get(resource)
        if amount:
            meter.book(amount, now)
    for level in route.levels:
        level.in_flight += 1
        level.admitted += 1


def untake(route: Route, amounts: Amounts, when: int) -> None:
    """Undo the booking of a call at ``when``, as if it had never been admitted."""
    for meter, resource in route.meters:
        amount = amounts.get(resource)
        if amount:
            meter.unbook(amount, when)
    for level in route.levels:
        level.in_flight -= 1
        level.admitted -= 1


def leeway(route: Route, amounts: Amounts) -> int:
    """Return how late (ns) a crowd of such calls may be let go without losing anything."""
    pairs = ((meter, amounts.get(resource)) for meter, resource in route.meters)
    least = min((meter.leeway(amount) for meter, amount in pairs if amount), default=0)
    return least if least <= LATE else 0
