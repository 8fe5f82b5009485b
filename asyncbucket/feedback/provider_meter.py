"""How the provider counts one limit: an estimate that every reply corrects, and that admits calls.

A limit says how much passes in a window, not how the provider counts it. Most count by a bucket: full
at the beginning, refilled at the limit's rate, and perhaps much smaller than the limit. Others count
by a log of the last minute, by minutes of the clock, or in slices of a second that nobody mentions.
Whoever takes a full bucket for a window needs a minute for what would pass at once; whoever takes
slices for a bucket is refused for ever. So wherever replies are seen, a `ProviderMeter` stands beside
a limit's `Window`, and learns.

*The backlog* is what we have sent and the provider has not given back yet, if it gives back at
``rate``: what a bucket lacks because of us, whoever else is there. A call may pass if the backlog
with it is at most ``size``. Two facts bound the size, and neither needs a header:

- accepted at a backlog V: the size is at least V, and may grow: by half, up to a tenth of the limit
  (a quarter for tokens), while nothing is proven; sixfold up to the size that is.
- refused at a backlog V: the size is less than V. It becomes half of V, and the backlog is taken to
  be as large as it may be, because the bucket is empty: this is the slow start. A larger size is
  tried again after one quiet window, then after two, four and so on.

A refusal at the smallest size means that the rate is too high. It is lowered by 5 percent; by 15 if
others took what was left; and else by 30 once it is below three quarters of what the user told.
While calls are accepted it rises again, half of the way to the rate that was refused, and never
above what the user told.

*The proof.* If replies say how much remains (R) and in how long all will be back (T), a bucket of size
B satisfies R + rate * T = B in every reply, whoever took what is missing. A log of the last minute
exceeds its limit by this, and minutes of the clock end at one instant. Four replies that agree,
though they came at different levels or times, are a proof. From then on the bucket is the law of this
limit, in place of the window (`Window.give_way`): all that it holds at once, and never more. Four
that contradict it put the window in force again.

*The start.* Before anything is known, a second's worth of the limit may pass at once, because the
shortest slices that providers document are seconds; a burst that the user gave counts instead.

`asyncbucket.feedback.remaining` holds calls back by what is left, where others use the same key.
"""

from collections import deque
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Meter
from asyncbucket.engine.statistics import Belief
from asyncbucket.feedback.remaining import Remaining

#: Calls are not paced by a window longer than this (ns): only what replies say is left counts.
_LONG: Final = 120_000_000_000
#: Before anything is known, as much as the rate brings in this time (ns) may pass at once.
_START: Final = 1_000_000_000
#: Without a proof the size grows up to this fraction (1/10) of the limit; if that is not paced, as
#: those of tokens are not, up to a quarter.
_UNPROVEN: Final = 10
_UNPACED: Final = 4
#: A limit that is announced, and lower than what the user told, counts for so many windows.
_MEMORY: Final = 2
#: To how many percent a refusal lowers a rate that is near what was told, that failed because others
#: took what was left, or else.
_NEAR: Final = 95
_TAKEN: Final = 85
_FAR: Final = 70
#: So many replies that agree prove how the provider counts; so many that do not, disprove it.
_PROOF: Final = 4
#: Replies agree if they differ by no more than this fraction (1/1,000) of the limit, or is rounded.
_NOISE: Final = 1_000
#: Replies agree on when a window of the clock ends if they do for so many times what they leave open.
_SURE: Final = 4
#: So many instants of admission are remembered until their replies come.
_REMEMBERED: Final = 4_096
#: No more than this many calls are the smallest backlog, which is not halved.
_FEW: Final = 2
#: The most windows that must be quiet before a larger size is tried.
_PATIENCE: Final = 64
#: What a reply said no longer ago than this (ns) is what the refusal says that is looked at.
_JUST_NOW: Final = 100_000_000
#: A rate that was lowered must hold for this long (ns), and for so many units, before it is raised.
_HOLD: Final = 5_000_000_000
_HOLD_UNITS: Final = 10


@dataclass(slots=True)
class _Sent:
    """What was booked at one instant and not refused: the backlog that it found, and its units."""

    found: int
    units: int = 0


class _Report(NamedTuple):
    """What a reply says: R, what a bucket's size (times the window) is between then, and when."""

    left: int
    low: int
    high: int
    at: int


class ProviderMeter(Meter):
    """Admit what the provider's own meter will accept, as far as replies have shown how it counts.

    It only holds calls back. But once `is_law`, whoever keeps the limit's window lets it decide alone.

    Args:
        limit: the limit, as the user told it, or as the provider announced it.
    """

    learns: ClassVar[bool] = True

    def __init__(self, limit: Limit) -> None:
        self.limit, self.key, self.window = limit, limit.key, limit.window
        self._told = limit.units
        self.is_paced = limit.window <= _LONG
        #: What the provider gives back in a window, as far as known.
        self.rate = limit.units
        #: The lowest rate that was refused, if that is known to be too high, or 0.
        self._refused_rate = 0
        usual = max(1, limit.units // _UNPROVEN)
        burst = limit.burst_units
        told = None if burst == usual else burst
        self._most = told or limit.units
        #: The most backlog that a call may leave behind.
        self._start = max(1, limit.units * min(_START, limit.window) // limit.window)
        self.size = told or self._start
        #: The largest backlog that was accepted, and the smallest that was refused, or 0.
        self._fits = self._refused_size = 0
        #: For how many windows nothing may be refused before a larger size is tried again.
        self._patience = 1
        #: When the latest wave of refusals came, and when the rate was changed last.
        self._refused_at = self._rate_at = -1
        # The backlog (units times window), and when it was that.
        self._backlog = self._at = 0
        self._sent: dict[int, _Sent] = {}
        #: The provider's limit, as it says.
        self.announced = limit.units
        #: The size of its bucket, if replies have proven that it counts by one.
        self.proven: int | None = None
        self._proof = 0, 0
        #: When the latest report came, and what it said was left.
        self._heard_at, self._left = -_JUST_NOW, 0
        self._reports: deque[_Report] = deque(maxlen=_PROOF)
        #: Between what instants all is back, by all replies that agree, and since when they do.
        self._full_from, self._full_to, self._agree_since, self._is_sure = 0, -1, 0, False
        #: How it counts: "bucket", "log" or "calendar", if that is proven.
        self.kind: str | None = None
        #: How many reports and waves of refusals came, and when (ns) what is believed changed.
        self._replies = self._refusals = self._evidence = self._believed_at = 0
        self._remaining = Remaining(limit, with_reserve=self.is_paced)

    # --- what passes ---

    def earliest(self, amount: int, since: int, *, back: int = 0) -> int:
        """See `Meter.earliest`; with ``back``, at once: a reply may bring good news."""
        if back:
            return since
        due = self._remaining.earliest(amount, since)
        if self.is_paced:
            over = self._backlog + (amount - max(amount, self.size)) * self.window
            if over > 0:
                due = max(due, self._at - -over // self.rate)
                if self.announced < self._told:
                    due = min(due, self._heard_at + _MEMORY * self.window)
        return due

    def book(self, amount: int, when: int) -> None:
        """See `Meter.book`."""
        self._send(amount, when)
        self._remaining.book(amount, when)

    owe = book

    def exceed(self, amount: int, when: int, sent: int) -> None:
        """See `Meter.exceed`; input is counted before the reply, so a later report includes it."""
        self._send(amount, when)
        counts = self.limit.resource == "input_tokens"
        self._remaining.exceed(amount, when, sent if counts else when)

    def _send(self, amount: int, when: int) -> None:
        """Add to the backlog."""
        self._leak(when)
        sent = self._sent.get(when)
        if sent is None:
            sent = self._sent[when] = _Sent(-(-self._backlog // self.window))
            if len(self._sent) > _REMEMBERED:
                del self._sent[next(iter(self._sent))]
        sent.units += amount
        self._backlog += amount * self.window

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """See `Meter.unbook`."""
        if when in self._sent:
            self._sent[when].units -= amount
        self._backlog = max(0, self._backlog - amount * self.window)
        self._remaining.unbook(amount, when, left=left)

    def available(self, now: int) -> int:
        """See `Meter.available`."""
        left = self._remaining.available(now)
        if not self.is_paced:
            return left
        backlog = max(0, self._backlog - max(0, now - self._at) * self.rate)
        return min(left, self.size - -(-backlog // self.window))

    def _leak(self, now: int) -> None:
        if self.announced < self._told and now >= self._heard_at + _MEMORY * self.window:
            self.announced = self.rate = self._told
        if now > self._at:
            self._backlog = max(0, self._backlog - (now - self._at) * self.rate)
            self._at = now

    # --- what is accepted and what is refused ---

    @property
    def _top(self) -> int:
        """The largest size that may be tried, as long as none was refused."""
        part = _UNPACED if self.limit.burst is None else _UNPROVEN
        return min(self._most, self.proven or max(1, self._limit // part))

    @property
    def _limit(self) -> int:
        """The limit, the provider's or the user's, whichever is lower."""
        return max(1, min(self.announced, self._told))

    def pressure(self, when: int) -> float:
        """Return how close to the size the bookings of that instant came."""
        sent = self._sent.get(when)
        return 0.0 if sent is None else (sent.found + sent.units) / self.size

    def is_moved_by(self, when: int) -> bool:
        """Tell whether an accepted call, booked at ``when``, may change what is estimated."""
        sent = self._sent.get(when) if self.is_paced else None
        if sent is None or (self.size >= self._top and self.rate >= self._limit):
            return False
        return self.rate < self._limit or 4 * (sent.found + sent.units) > self.size

    def accepted(self, when: int, now: int) -> None:
        """Take in that a call booked at ``when`` was accepted."""
        sent = self._sent.get(when)
        if sent is None or when < self._refused_at or not self.is_paced:
            return
        self._leak(now)
        self._fits = max(self._fits, sent.found + sent.units)
        if not self._refused_size:
            fits = self._fits
            some = fits // (2 if fits < 3 * self._start else 4) + 1
            grown = fits * 6 if self.proven else fits + some
            self.size = max(self.size, min(grown, self._top))
        elif now - self._refused_at > self.window * self._patience:  # try again what was refused
            self.size = max(self.size, min(self._refused_size, self._top))
            self._refused_size += self._refused_size // 2 + 1
            self._refused_size *= self.size < self._top
            self._refused_at = now
        if self.rate < self._limit:
            self._try_faster(now)

    def _try_faster(self, now: int) -> None:
        """Raise a rate that was lowered, if it has held for long enough."""
        held = now - max(self._refused_at, self._rate_at)
        if held > self.window:
            self._refused_rate = 0
        most = self._refused_rate or self._limit
        if held > _HOLD and held * self.rate > _HOLD_UNITS * self.window:
            step = (min(most, self.rate * 3 // 2) - self.rate) // 2
            self.rate += step or not self._refused_rate
            self._rate_at = now

    def has_room(self, amount: int, now: int) -> bool | None:
        """Tell whether a reply says now that ``amount`` fits; None if none says anything."""
        return self._left >= amount if now - self._heard_at <= _JUST_NOW else None

    def refused(self, amount: int, when: int, now: int) -> bool:
        """Take in that a call of ``amount``, booked at ``when``, was refused for this limit.

        Return whether that is the first refusal of a wave: later ones were sent before it came.
        """
        sent = self._sent.get(when)
        if sent is None or not self.is_paced:
            return False
        sent.units -= amount
        backlog, is_new_wave = sent.found + sent.units + amount, when >= self._refused_at
        self._leak(now)
        if backlog > _FEW * amount:
            if is_new_wave or backlog < self._refused_size:
                self._refused_size = backlog
                self._fits = min(self._fits, backlog // 2)
                self.size = max(1, min(self.size, backlog // 2))
        elif is_new_wave:
            # If less than it costs was left, others took it, and the rate may be right again soon.
            is_others = self.has_room(amount, now) is False
            self._refused_rate = 0 if is_others else self.rate
            is_near = self.rate * 4 > self._limit * 3
            kept = _NEAR if is_near else _TAKEN if is_others else _FAR
            self.rate = max(1, self.rate * kept // 100)
            self._rate_at = now
            self.size = max(1, self.size // 2)
        if is_new_wave:
            self._refused_at = now
            self._patience = min(_PATIENCE, 2 * self._patience)
            self._refusals += 1
            self._believed_at = self._believed_at if self.kind else now
        self._backlog = max(self._backlog, self.size * self.window)
        return is_new_wave

    # --- what replies say ---

    @property
    def is_law(self) -> bool:
        """Whether it alone says what may pass: the provider counts by a bucket, of the user's limit."""
        return self.proven is not None and self.announced * 100 <= self._told * 101

    def heard(
        self,
        left: int,
        now: int,
        *,
        limit: int | None = None,
        since: int | None = None,
        lent: int = 0,
        rounding: int = 0,
        full_in: tuple[int, int] | None = None,
    ) -> bool:
        """Take in what a reply says remains; return whether a belief changed.

        Args:
            left: units left (R).
            now: the instant.
            limit: the provider's limit, if it says.
            since: when the call was sent that the reply answers; now, if that is not known.
            lent: units that calls in flight may still give back.
            rounding: by how many units ``left`` may have been rounded down.
            full_in: in how many nanoseconds all is back (T), and by how many that may be off.
        """
        self._leak(now)
        self._heard_at, self._left = now, left
        self._replies += 1
        since = now if since is None else since
        if limit is not None and limit != self.announced:
            self.rate = max(1, min(self.rate, limit))
            self.announced = limit
            self._reports.clear()
        self._remaining.hear(
            *(left, now),
            amount=self._limit,
            since=since,
            proven=self.proven or 0,
            lent=lent,
            rounding=rounding,
        )
        if full_in is None:
            return False
        (span, off), rate = full_in, self.announced
        low = (left - rounding // 2) * self.window + rate * max(0, span - off)
        high = (left + 1 + rounding) * self.window + rate * (span + off)
        self._reports.append(_Report(left, low, high, now))
        begin, end = since + span - off, now + span + off
        first, last = max(self._full_from, begin), min(self._full_to, end)
        if first > last:
            first, last, self._agree_since = begin, end, now
        self._full_from, self._full_to = first, last
        self._is_sure = now - self._agree_since > _SURE * (end - begin)
        return len(self._reports) == _PROOF and self._judge(now)

    def _judge(self, now: int) -> bool:
        """Judge the latest reports; return whether a belief changed."""
        reports, whole = self._reports, self.announced * self.window
        noise = max(self.window, whole // _NOISE)
        least, most = max(each.low for each in reports), min(each.high for each in reports)
        kind = None if self.proven else self.kind
        if self.proven:
            low, high = self._proof
            if any(each.low - noise <= high and low <= each.high + noise for each in reports):
                return False
        if least <= min(most, whole) + noise:
            levels = [each.left for each in reports]
            apart = (max(levels) - min(levels)) * self.window
            if most < whole // 2:  # a log that is full agrees with one of the limit's size
                apart = max(apart, (now - reports[0].at) * self.announced)
            if apart > max(each.high - each.low for each in reports) + noise:
                kind = "bucket"
        elif self._is_sure:
            kind = "calendar"
        elif (
            self._agree_since > reports[0].at
            and min(each.low for each in reports) > whole + whole // 10
        ):
            kind = "log"
        if kind == self.kind:
            return False
        self.kind, self._believed_at, self._evidence = kind, now, self._replies
        self._proof = least, most
        self._remaining.kind = kind
        self.proven = max(1, -(-least // self.window)) if kind == "bucket" else None
        self.size = min(self.size, self.proven or self._top)
        return True

    @property
    def belief(self) -> Belief | None:
        """What is believed of how the provider counts; None as long as nothing was learned."""
        if self.kind is None and not self._refusals:
            return None
        return Belief(
            kind=self.kind,
            size=self.size if self.kind is None else self.proven or self._limit,
            rate=self.rate,
            since=self._believed_at * 1e-9,
            learned_from=self._evidence if self.kind else self._refusals,
        )
