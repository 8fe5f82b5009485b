"""What the provider says is left: the one meter that hears of calls that we did not make.

Other programs spend from the same key, and only the provider knows how much. Its replies say what
is left of a limit. `Headroom` keeps that number between replies: our own bookings lower it, time
raises it, the next reply corrects it. It stands beside a limit's `Window` and can only hold calls
back; what the user allows at most is the window's business.

*The level.* A reply is late: what we sent after the call that it answers may be in its number or
not. And it may be rounded down. So it names an interval, and what we expected is moved into it, no
further. While we are alone, what we expect lies inside, and nothing happens. What came back less
than the limit would bring (`_missing`, a low-pass filter over an eighth of the window) slows the
growth that is expected. This is the integral part of a controller whose proportional part is the
level itself. While something is missing a margin of the level stays untouched, for at the edge every
call of others between two replies would cost a refusal.

*The reserve.* That is enough for a bucket, which refills steadily. Where a log of the last minute
counts, or a minute of the clock, nothing comes back for a long time, and who takes all that is left
leaves nothing to others until then. So `Others` reckons what they will take of a whole window, and
in every window we take the rest, and evenly. Nobody says how a provider counts; but whichever way it
is, others have taken at least (1) what is used beyond what we booked in the last window, and (2) as
far as nothing came back, what is left less now than at some earlier moment, beyond our bookings
since. The larger of these is the truth for a log and for the clock's minutes, and too little for a
bucket, where the level is enough. On top of it is room for chance: calls that come independently
have a variance like their number.

*Slices.* Providers may count in shorter slices than they say, 60,000 a minute as 1,000 a second, and
what they say is left is that of a slice. It is taken for one as long as it is never more than there
is in a slice; so before the first word no more than a second's worth passes in each second. Once it
is known when slices begin, the level says nothing: what passes is what `Slices` says.

In the first window that we listen, and whenever others are at work, calls come evenly, at most a
tenth of the limit at once: else all is spent before anything was heard.

When no reply comes for two windows, all is forgotten: what others took before counts no more.
The numbers below were found by simulation of buckets, logs, minutes of the clock and slices, with
others at 0, 10, 40 and 60 %.
"""

from typing import ClassVar, Final

from asyncbucket.feedback.others import Others, with_room
from asyncbucket.feedback.slices import NUMBERS, cut
from asyncbucket.meters import Window

#: Something is missing when it is at least this part of the limit.
_BUSY: Final = 8
#: The filter's time constant is this part of the window.
_SMOOTHING: Final = 8
#: The margin covers what is missing in this part of the window...
_MARGIN: Final = 60
#: ...and so many calls like the one that asks,
_CALLS: Final = 2
#: ...and is at most this part of what was ever left.
_MOST: Final = 4
#: Of a window longer than this (ns) only the level counts: nobody can tell from a while how much
#: others take in a day.
_LONG: Final = 120_000_000_000
#: So many windows after the last word, it counts no more.
_MEMORY: Final = 2
#: Some calls always pass, whose replies tell more: this part of the limit in a window.
_LEAST: Final = 20
#: The part of a window's worth that may pass at once where calls are to come evenly.
_AT_ONCE: Final = 10


class Headroom:
    """Admit what the provider says is left. Levels are kept in units times window, hence exact."""

    __slots__ = (
        "_alone",
        "_at",
        "_booked",
        "_even",
        "_first",
        "_growth",
        "_heard",
        "_last",
        "_left",
        "_level",
        "_long",
        "_margin",
        "_missing",
        "_most",
        "_others",
        "_ours",
        "_pace",
        "_slices",
        "_theirs",
        "amount",
        "window",
    )

    bound_by: ClassVar[str | None] = None
    remote: ClassVar[bool] = False

    def __init__(self, *, amount: int, window: int, ours: Window | None = None) -> None:
        """Know nothing yet, but ``ours``: what we booked before anybody listened."""
        self.amount = amount
        self.window = window
        #: What was left at ``_at``, as far as is known; None before any word from the provider.
        self._level: int | None = None
        self._at = 0
        #: When the last word was heard, and the first.
        self._heard = self._first = 0
        #: What comes back less than the limit in a window, and what is expected to come.
        self._missing = 0
        self._growth = amount
        #: What stays untouched while something is missing.
        self._margin = 0
        #: What was said to be left last, at least, and the most that ever was.
        self._left = 0
        self._most = 0
        #: Units that we booked, in the last window and ever.
        self._ours = Window(amount=amount, window=window) if ours is None else ours
        self._booked = 0
        self._others = Others(amount=amount, window=window)
        #: When what was booked would have passed, had it come evenly, and when it did.
        self._even = self._last = 0
        #: Whether it is as if nobody else were there, and the ns after which a unit comes then.
        self._alone = False
        self._pace = 0
        self._long = window > _LONG
        #: The provider's limit, where it is higher.
        self._theirs = amount
        #: The slices in which it may be counted; none once it is known to be counted as a whole.
        self._slices = () if self._long else cut(amount=amount, window=window)

    @property
    def others(self) -> int:
        """Units that others take of the limit in each window, estimated."""
        return self._others.estimate

    def hear(
        self,
        remaining: int,
        now: int,
        *,
        amount: int,
        limit: int | None = None,
        under_way: int = 0,
        lent: int = 0,
        rounding: int = 0,
    ) -> None:
        """Correct what is expected by what a reply says.

        Args:
            remaining: units left, in the provider's words.
            now: the instant.
            amount: the limit, the provider's or ours, whichever is lower.
            limit: the provider's, if it says so: what there is in a slice is a part of that.
            under_way: units that we booked after the call that the reply answers.
            lent: units that calls in flight may still give back.
            rounding: by how many units it may have been rounded down.
        """
        if self._level is None:
            self._first = now
        self._follow(amount, limit)
        self._slices = tuple(each for each in self._slices if remaining <= each.share)
        for each in self._slices:
            each.hear(remaining, now)
        self._correct(remaining, now, under_way=under_way, rounding=rounding)
        if not (self._long or len(self._slices) == len(NUMBERS)):
            used = -remaining - rounding
            ours = amount - self._ours.available(now)
            total = max(amount, remaining + ours)  # the provider's limit may be far above ours
            unsure = max(under_way, lent) + rounding
            self._others.hear(used - self._booked, now, used + total - ours, unsure)
        self._alone = not (self._slices or self._others.estimate or self._margin)
        self._pace = self.window // amount

    def _follow(self, amount: int, limit: int | None) -> None:
        """Take over another limit; what was expected of the last one counts no more."""
        changed = amount != self.amount
        if changed:
            self.amount = amount
            self._ours.reshape(amount=amount)
            self._level = None
            self._others = Others(amount=amount, window=self.window)
        if limit is None:
            limit = amount if changed else self._theirs
        theirs = max(limit, amount)
        if theirs != self._theirs:
            self._theirs = theirs
            if self._slices:
                self._slices = cut(amount=theirs, window=self.window)

    def _correct(self, remaining: int, now: int, *, under_way: int, rounding: int) -> None:
        """Move the level into the interval that a reply names, and note what was missing."""
        self._left = remaining - under_way
        self._most = min(self.amount, max(self._most, remaining + rounding + 1))
        low = (remaining - under_way) * self.window
        high = (remaining + rounding) * self.window
        expected = self._expect(now)
        if expected is None:
            self._level, self._missing = low, 0
        else:
            self._level = min(max(expected, low), high)
            less = (expected - self._level) // (
                now - self._heard + _MEMORY * self.window // _SMOOTHING
            )
            self._missing = min(self.amount, max(0, self._missing + less))
            if self._slices and self._slices[0].explain:
                self._missing = 0
        self._growth = max(self.amount - self._missing, self.amount // _LEAST, 1)
        missed = self._missing * _BUSY >= self.amount
        self._margin = max(1, self._missing // _MARGIN) if missed else 0
        self._at = self._heard = now

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:
        """See `asyncbucket.meters.Meter.earliest`; whatever comes ``back`` may bring better news."""
        needed = self._needed(amount)
        level = self._expect(now, needed)
        if level is None or back:
            return now
        if self._slices and self._slices[0].known:
            return self._slices[0].earliest(amount, now)
        when = now
        if needed > level:
            when = max(now, self._at) - -(needed - level) // self._growth
        reserve = self._reserve(amount)
        if reserve or (now < self._first + self.window and not self._long):
            when = max(when, self._evenly(amount, now, reserve))
        if self._slices:
            when = max(when, self._slices[0].earliest(amount, now))
        return min(when, self._heard + _MEMORY * self.window)

    def _evenly(self, amount: int, now: int, reserve: int) -> int:
        """Return when ``amount`` may pass so that we take evenly what others leave."""
        amount = min(amount, self.amount)
        cost = amount * self.window // (self.amount - reserve)
        even = self._even - max(0, self.window // _AT_ONCE - cost)
        when = max(even, self._ours.earliest(amount + reserve, now))
        return min(when, self._last + self.window // _LEAST)

    def take(self, amount: int, now: int) -> bool:
        """See `asyncbucket.meters.Meter.take`."""
        level = self._level
        if level is not None:
            if self._alone and now < self._heard + self.window:
                needed = amount * self.window  # as `earliest` does, without the calls
                if level + (now - self._at) * self._growth < needed:
                    return False
                evenly = now < self._first + self.window and not self._long
                if evenly and self._evenly(amount, now, 0) > now:
                    return False
            elif self.earliest(amount, now) > now:
                return False
        self.book(amount, now)
        return True

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.meters.Meter.book`."""
        level = self._expect(when, self._needed(amount))
        if level is not None:
            self._level = level - self._share(amount) * self.window
            self._at = max(self._at, when)
        self._booked += amount
        self._ours.book(amount, when)
        apart = amount * self._pace if self._alone else self._apart(amount)
        self._even = max(self._even, when) + apart
        self._last = when
        for each in self._slices:
            each.book(amount, when)

    def owe(self, amount: int, when: int) -> None:
        """See `asyncbucket.meters.Meter.owe`."""
        self.book(amount, when)

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """See `asyncbucket.meters.Meter.unbook`; the last word counts what was booked before."""
        if self._level is not None and when >= self._heard:
            self._level += self._share(amount) * self.window
        self._booked -= amount
        self._ours.unbook(amount, when, left=left)
        self._even -= self._apart(amount)
        for each in self._slices:
            each.unbook(amount, when, left)

    def available(self, now: int) -> int:
        """See `asyncbucket.meters.Meter.available`: what is left, whatever is reserved of it."""
        level = self._expect(now)
        if level is None:
            return self.amount
        return (level - self._needed(0)) // self.window

    def _expect(self, now: int, needed: int = 0) -> int | None:
        """Return the level at ``now``; None if nothing that was heard counts any more.

        It grows to the most that was ever left, or to what a larger call needs: none is impossible.
        """
        level, at = self._level, self._at
        if level is None or now >= self._heard + _MEMORY * self.window:
            return None
        if now <= at:
            return level
        return min(level + (now - at) * self._growth, max(level, self._most * self.window, needed))

    def _needed(self, amount: int) -> int:
        """Return the level at which ``amount`` may pass."""
        amount = self._share(amount)
        if self._margin:
            amount += min(self._margin + _CALLS * amount, self._most // _MOST)
        return amount * self.window

    def _share(self, amount: int) -> int:
        """Return what ``amount`` takes of the level: no more than there ever is in a slice."""
        return min(amount, self._slices[0].share) if self._slices else amount

    def _reserve(self, amount: int) -> int:
        """Return what is left to others in a window, where calls cost about ``amount``."""
        others = self._others.estimate
        if not others or (self._slices and self._slices[0].explain):
            return 0
        reserve = with_room(others, amount)
        if self._left >= reserve + self.amount:  # there is enough for all
            return 0
        return max(0, min(reserve, self.amount - max(amount, self.amount // _LEAST)))

    def _apart(self, amount: int) -> int:
        """Return the ns after which an even flow brings the next call."""
        return amount * self.window // max(1, self.amount - self._reserve(amount))
