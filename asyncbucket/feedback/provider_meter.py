"""How the provider counts one limit: an estimate that every reply corrects, and that admits calls.

A limit says how much passes in a window, not how the provider counts it. Most count by a bucket: full
at the beginning, and perhaps much smaller than the limit. Others count by a log of the last minute, by
minutes of the clock, or in slices of a second that nobody mentions. Whoever takes a full bucket for a
window waits a minute for nothing; whoever takes slices for a bucket is refused for ever. So wherever
replies are seen, a `ProviderMeter` stands beside a limit's `Window`, and learns.

*The backlog* is what we have sent and the provider has not given back yet, if it gives back at
``rate``: what a bucket lacks because of us. A call may pass if the backlog with it is at most
``size``. Two facts bound the size, and neither needs a header:

- accepted at a backlog V: the size is at least V. It grows by a third of V, up to a tenth of the limit
  while nothing is proven, and at once to the size that is. It doubles, up to the whole limit, once all
  replies of five seconds leave what we left: nobody else uses the key, so the default pace goes, too.
- refused at a backlog V: the size is less than V, and becomes a third of it. A larger one is tried
  again after four quiet windows.

A refusal at the smallest size means that the rate is too high. It is lowered by a quarter, or by 5 percent if
it is near what the user told; while calls are accepted, it comes back in small steps.

*The start.* Before anything is known, a second's worth of the limit may pass at once, because the
shortest slices that providers document are seconds; a burst that the user gave counts instead.

`asyncbucket.feedback.proof` finds out whether the provider counts by a bucket. If so, the bucket is the
law of this limit in place of the window (`Window.give_way`). `asyncbucket.feedback.remaining` holds
calls back by what is left, where others use the same key.
"""

from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar, Final, Self

from asyncbucket.engine.limits import Key, Limit
from asyncbucket.engine.meters import NEVER, Bucket, Meter, Window
from asyncbucket.engine.statistics import Belief
from asyncbucket.feedback.proof import Proof
from asyncbucket.feedback.remaining import LATE, LATER, Remaining

#: Calls are not paced by a window longer than this (ns): only what replies say is left counts.
_LONG: Final = 120_000_000_000
#: Before anything is known, as much as the rate brings in this time (ns) may pass at once.
_START: Final = 1_000_000_000
#: Without a proof the size grows up to this fraction (1/10) of the limit.
_UNPROVEN: Final = 10
#: A limit that is announced, and lower than what the user told, counts for so many windows.
_MEMORY: Final = 2
#: To how many percent a refusal lowers a rate that is near what was told, or that is not.
_NEAR: Final = 95
_FAR: Final = 75
#: A rate of fewer units cannot be lowered by five percent; after a refusal, calls come a little later.
_COARSE: Final = 20
#: So many instants of admission are remembered until their replies come.
_REMEMBERED: Final = 4_096
#: A refusal cuts the size to this fraction (1/3) of the backlog; no more than so many calls are the
#: smallest one, which is not cut.
_CUT: Final = 3
#: To how many eighths it cuts the size of a proven bucket that was empty.
_LESS: Final = 7
_FEW: Final = 2
#: If what is left differs from what we left by less than this fraction (1/64) of the limit for so long
#: (ns), nobody else takes any.
_FELT: Final = 64
_SURE: Final = 5_000_000_000
#: So many windows must be quiet before a larger size is tried.
_QUIET: Final = 4
#: A log may have more left than we expect by this fraction (1/16) of the limit: calls overtake others.
_DOUBT: Final = 16
#: What a reply said no longer ago than this (ns) is what the refusal says that is looked at.
_JUST_NOW: Final = 100_000_000
#: A rate that was lowered must hold for this long (ns) before it rises by this fraction (1/8) of itself,
#: or of what it lacks if that is less.
_HOLD: Final = 5_000_000_000
_STEP: Final = 8


class ProviderMeter(Meter):
    """Admit what the provider's own meter will accept, as far as replies have shown how it counts.

    It only holds calls back. But once `is_law`, whoever keeps the limit's window lets it decide alone.

    Args:
        limit: the limit, as the user told it, or as the provider announced it.
        began: since when (ns) calls are booked here.
    """

    learns: ClassVar[bool] = True

    def __init__(self, limit: Limit, began: int = 0) -> None:
        self.limit, self.window = limit, limit.window
        self.is_paced = limit.window <= _LONG
        #: The provider's limit, as it says; and what it gives back in a window, as far as known.
        self.announced = self.rate = self._told = limit.units
        burst = limit.burst_units
        told = None if burst == max(1, limit.units // _UNPROVEN) else burst
        self._most = told or self._told
        #: The most backlog that a call may leave behind.
        self.size = told or max(1, limit.units * min(_START, self.window) // self.window)
        self._backlog = _Backlog(limit.window)
        #: Waves of refusals so far, and when the latest came.
        self._waves, self._refused_at = 0, -1
        #: When the rate was changed last; when the latest report came, and what it said was left.
        self._rate_at, self._heard = -1, (-_JUST_NOW, 0)
        self._proof = Proof(limit.window)
        #: Since when (ns) that is believed which is, and how many replies or refusals had shown it.
        self._believed = 0, 0
        self._remaining = Remaining(limit, self._proof, with_reserve=self.is_paced)
        self._began = began
        #: Since when only we have taken any, as far as replies show; and whether that is long enough.
        self._alone_since, self.is_alone = NEVER, False

    @classmethod
    def of(cls, window: Window, began: int = 0) -> Self:
        """Return one of the limit that ``window`` keeps, with what was booked there."""
        meter = cls(window.limit, began)
        for date, units in window.log.entries():
            if units:
                meter.book(units, date)
        return meter

    @property
    def key(self) -> Key:
        """See `Meter.key`."""
        return self.limit.key

    def renewed(self, limits: Mapping[Key, Window]) -> Self:
        """See `Meter.renewed`: of another limit nothing is known."""
        window = limits[self.key]
        return self if window.limit == self.limit else self.of(window)

    # --- what passes ---

    def earliest(self, amount: int, since: int, *, back: int = 0) -> int:
        """See `Meter.earliest`; with ``back``, at once: a reply may bring good news."""
        if back:
            return since
        due = self._remaining.earliest(amount, since)
        if self.is_paced:
            late = 0
            if self._waves and self._told < _COARSE:  # the network brings calls closer together
                late = min(LATE, amount * self.window // self.rate // LATER)
            due = max(due, self._backlog.earliest(max(0, self.size - amount), self.rate) + late)
            if self.announced < self._told:
                due = max(since, min(due, self._heard[0] + _MEMORY * self.window))
        return due

    def book(self, amount: int, when: int) -> None:
        """See `Meter.book`."""
        self._leak(when)
        self._backlog.add(amount, when)
        self._remaining.book(amount, when)

    def owe(self, amount: int, when: int) -> None:
        """See `Meter.owe`."""
        self.book(amount, when)

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """See `Meter.unbook`."""
        self._backlog.take_back(amount, when)
        self._remaining.unbook(amount, when, left=left)

    def available(self, now: int) -> int:
        """See `Meter.available`."""
        left = self._remaining.available(now)
        return min(left, self.size - self._backlog.level(now, self.rate)) if self.is_paced else left

    def _leak(self, now: int) -> None:
        if self.announced < self._told and now >= self._heard[0] + _MEMORY * self.window:
            self.announced = self.rate = self._told
        self._backlog.leak(now, self.rate)

    # --- what is accepted and what is refused ---

    @property
    def _top(self) -> int:
        """The largest size that may be tried, as long as none was refused."""
        whole = self._limit if self.is_alone else max(1, self._limit // _UNPROVEN)
        return min(self._most, self._proof.size or whole)

    @property
    def _limit(self) -> int:
        """The limit, the provider's or the user's, whichever is lower."""
        return max(1, min(self.announced, self._told))

    def pressure(self, when: int) -> float:
        """Return how close to the size the bookings of that instant came."""
        return self._backlog.sent.get(when, 0) / self.size

    def is_moved_by(self, when: int) -> bool:
        """Tell whether an accepted call, booked at ``when``, may change what is estimated."""
        grows = 4 * self._backlog.sent.get(when, 0) > self.size and self.size < self._top
        return self.is_paced and (grows or self.rate < self._limit)

    def accepted(self, when: int, now: int) -> None:
        """Take in that a call booked at ``when`` was accepted."""
        fits = self._backlog.sent.get(when)
        if fits is None or when < self._refused_at or not self.is_paced:
            return
        self._leak(now)
        if not self._waves or now > self._refused_at + _QUIET * self.window:
            grown = self._top if self.proven else fits + (fits if self.is_alone else fits // 3 + 1)
            self.size = max(self.size, min(grown, self._top))
        if self.rate < self._limit and now - self._rate_at > _HOLD:
            self.rate += min(self._limit - self.rate, self.rate) // _STEP + 1
            self._rate_at = now

    def has_room(self, amount: int, now: int) -> bool | None:
        """Tell whether a reply says now that ``amount`` fits; None if none says anything."""
        at, left = self._heard
        return left >= amount if now - at <= _JUST_NOW else None

    def refused(self, amount: int, when: int, now: int) -> bool:
        """Take in that a call of ``amount``, booked at ``when``, was refused for this limit.

        Return whether that is the first refusal of a wave: later ones were sent before it came.
        """
        backlog = self._backlog.sent.get(when)
        if backlog is None or not self.is_paced:
            return False
        self._leak(now)
        self._backlog.sent[when] -= amount
        if when < self._refused_at:
            return False
        was_quiet = self._refused_at < 0 or now > self._refused_at + _QUIET * self.window
        self._rate_at = self._refused_at = now
        is_full = self.proven > 0 and self.has_room(amount, now) is False
        if was_quiet and is_full:
            return False  # once, that calls came at another time than was thought explains it
        self._waves += 1
        if backlog > _FEW * amount and is_full:
            self.size = max(1, min(self.size, backlog) * _LESS // 8)
        elif backlog > _FEW * amount:
            self.size = max(1, min(self.size, backlog // _CUT))
        else:
            is_near = self.rate * 4 > self._limit * 3
            self.rate = max(1, self.rate * (_NEAR if is_near else _FAR) // 100)
            self.size = max(1, self.size // 2)
        if self.kind is None:
            self._believed = now, self._waves
        return True

    # --- what replies say ---

    @property
    def kind(self) -> str | None:
        """How it counts: "bucket" or "window", if that is proven."""
        return self._proof.kind

    @property
    def proven(self) -> int:
        """The size of its bucket, if replies have proven that it counts by one, or 0."""
        return self._proof.size

    @property
    def keeps_pace(self) -> bool:
        """Whether calls keep to the pace of the user's limit, too: to the default one unless we are alone."""
        return self._most < self._told or not self.is_alone

    @property
    def is_law(self) -> bool:
        """Whether it alone says what may pass: the provider counts by a bucket, of the user's limit."""
        return self.proven > 0 and self.announced * 100 <= self._told * 101

    def bucket(self) -> Bucket:
        """Return the bucket by which the provider counts, full."""
        return Bucket(rate=Fraction(self.rate * 1_000_000_000, self.window), burst=self.proven)

    def heard(
        self,
        left: int,
        now: int,
        *,
        limit: int | None = None,
        since: int | None = None,
        own: int = 0,
        rounding: int = 0,
        full_in: tuple[int, int] | None = None,
    ) -> bool:
        """Take in what a reply says remains; return whether a belief changed.

        Args:
            left: units left (R).
            now: the instant.
            limit: the provider's limit, if it says.
            since: when the call was sent that the reply answers; now, if that is not known.
            own: what that call has booked.
            rounding: by how many units ``left`` may have been rounded down.
            full_in: in how many nanoseconds all is back (T), and by how many that may be off.
        """
        self._leak(now)
        self._heard = now, left
        before = self._limit
        if limit is not None and limit != self.announced:
            self.rate, self.announced = max(1, min(self.rate, limit)), limit
            self._proof.agreed.clear()
        sent = now if since is None else since
        if sent < self._began:  # others of our calls left before any was booked here
            self.book(max(0, self._limit - left - self._remaining.booked(now)), now)
            self.size = max(self.size, min(self._backlog.level(now, self.rate) + 1, self._top))
        is_news = self._is_news(left, now, sent, own, rounding, full_in)
        if is_news:
            self._believed = now, self._proof.heard if self.kind else self._waves
            is_sure = self.proven and not self._waves
            self.size = self._top if is_sure else min(self.size, self._top)
            self._remaining.restart()
        taken = self._limit - left - rounding - self._remaining.booked(now)
        uncertain, noise = self._remaining.booked_since(sent, own), self._limit // _FELT
        if not -uncertain - noise <= taken <= noise or self._alone_since == NEVER:
            self._alone_since = now
        self.is_alone = now - self._alone_since >= _SURE
        self._remaining.hear(
            *(left, now, self._limit, sent),
            own=own,
            ours=self._backlog.level(now, self.rate),
            rounding=rounding,
        )
        return is_news or self._limit != before

    def _is_news(
        self,
        left: int,
        now: int,
        sent: int,
        own: int,
        rounding: int,
        full_in: tuple[int, int] | None,
    ) -> bool:
        """Tell whether such a reply to a call that was ``sent`` then proves or disproves anything."""
        rate = self.announced
        if full_in is not None:
            span, off = full_in
            missing, back = (rate * max(0, span - off), rate * (span + off)), now * rate
        else:
            since = self._remaining.booked_since(sent, own)
            booked = self._remaining.booked(now) - since
            if left <= rate - booked + rate // _DOUBT:
                return False  # a log may say the same
            lacks = self._backlog.lacks(now, self.rate)
            missing = max(0, lacks - since * self.window), lacks + self.rate * (now - sent)
            back = self._backlog.back
        is_told = full_in is not None
        return self._proof.changes(left, missing, back, rate, rounding, is_told=is_told)

    @property
    def belief(self) -> Belief | None:
        """What is believed of how the provider counts; None as long as nothing was learned."""
        is_lower = self.announced < self._told
        if self.kind is None and not self._waves and not is_lower:
            return None
        return Belief(
            kind=self.kind,
            size=self.size if self.kind is None else self.proven or self._limit,
            rate=self.rate,
            since=self._believed[0] * 1e-9,
            learned_from=self._believed[1],
            announced=self._limit if is_lower else None,
        )


class _Backlog:
    """What we have sent and the provider has not given back yet, in units times the window."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._units = self._at = 0
        #: What has been given back ever.
        self.back = 0
        #: What it was, in units, with all that was booked at an instant.
        self.sent: OrderedDict[int, int] = OrderedDict()

    def leak(self, now: int, rate: int) -> None:
        if now > self._at:
            back = min(self._units, (now - self._at) * rate)
            self._units, self._at, self.back = self._units - back, now, self.back + back

    def add(self, amount: int, when: int) -> None:
        if when not in self.sent:
            self.sent[when] = -(-self._units // self._window)
            if len(self.sent) > _REMEMBERED:
                self.sent.popitem(last=False)
        self.sent[when] += amount
        self._units += amount * self._window

    def take_back(self, amount: int, when: int) -> None:
        if when in self.sent:
            self.sent[when] -= amount
        self._units = max(0, self._units - amount * self._window)

    def level(self, now: int, rate: int) -> int:
        return -(-self.lacks(now, rate) // self._window)

    def lacks(self, now: int, rate: int) -> int:
        """Return what it is at ``now``, in units times the window."""
        return max(0, self._units - max(0, now - self._at) * rate)

    def earliest(self, level: int, rate: int) -> int:
        """Return when it has leaked down to so many units."""
        return self._at - -max(0, self._units - level * self._window) // rate
