"""What the provider says is left: the one meter that learns of calls that we did not make.

Other programs spend from the same key, and only the provider knows how much. Its replies say what
is left of a limit. `Headroom` keeps that number between replies: our own bookings lower it, time
raises it, the next reply corrects it. It stands beside a limit's `Window`, and can only hold calls
back: the window enforces what the user allows.

*The level.* A reply arrives late: what we sent after the call that it answers may be in its number
or not. And the number may be rounded down. So a reply names an interval; what we expected is moved
into it, no further. While we are alone, the expectation lies inside, and nothing happens. If less
came back than the limit would bring (`_missing`, a low-pass filter over an eighth of the window),
the expected growth is reduced. This is the integral part of a controller whose proportional part is
the level. While something is missing, a margin of the level stays untouched: near zero, every call
that others make between two replies would cost a refusal.

*The reserve.* The level is enough for a bucket, which refills steadily. But if the provider counts
a log of the last minute, or a minute of the clock, nothing comes back for a long time, and whoever
takes all that is left leaves nothing to others until then. So `Others` estimates what they will
take of a whole window, and in every window we take the rest, evenly. Nobody says how a provider
counts. But whichever way it is, others have taken at least (1) what is used beyond what we booked
in the last window, and (2) if nothing came back, the amount by which less is left than at some
earlier moment, beyond our bookings since. The larger of these is exact for a log and for minutes of
the clock, and too low for a bucket, for which the level is enough. On top there is a margin for
chance: the number of calls that come independently has a variance equal to its mean.

*Slices.* Providers may count in shorter slices than they say, 60,000 a minute as 1,000 a second,
and report what is left of a slice. Reports are taken to be of a slice as long as they never exceed
what a slice holds. So before the first report, no more than a second's worth passes in each second.
Once it is known when slices begin, the level does not count: `Slices` decides what passes.

In the first window, and whenever others are active, calls come evenly, at most a tenth of the limit
at once: otherwise everything would be spent before anything was heard.

If no reply comes for two windows, everything is forgotten: what others took before no longer
counts. The constants below were found by simulating buckets, logs, minutes of the clock and slices,
with others at 0, 10, 40 and 60 %.
"""

from collections.abc import Iterable
from typing import ClassVar, Final

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Meter, Window
from asyncbucket.feedback.others import Others, with_margin
from asyncbucket.feedback.slices import SLICE_COUNTS, possible_slices

#: Something counts as missing if it is at least this fraction (1/8) of the limit.
_BUSY: Final = 8
#: The filter's time constant is this fraction (1/8) of the window.
_SMOOTHING: Final = 8
#: The margin covers what is missing in this fraction (1/60) of the window...
_MARGIN: Final = 60
#: ...and this many calls like the one that asks,
_MARGIN_CALLS: Final = 2
#: ...but at most this fraction (1/4) of the most that was ever left.
_MAX_MARGIN: Final = 4
#: For a window longer than this (ns) only the level counts: a short observation does not tell how
#: much others take in a day.
_LONG: Final = 120_000_000_000
#: A report counts for this many windows.
_MEMORY: Final = 2
#: A little always passes, because its replies tell more: 1/20 of the limit per window.
_LEAST: Final = 20
#: Where calls are to come evenly, this fraction (1/10) of a window's worth may pass at once.
_AT_ONCE: Final = 10


class Headroom(Meter):
    """Admit what the provider says is left. Levels are in units times window, hence exact."""

    __slots__ = (
        "_booked",
        "_first_report",
        "_growth",
        "_is_alone",
        "_is_long",
        "_last_booking",
        "_last_report",
        "_level",
        "_level_at",
        "_margin",
        "_missing",
        "_most_left",
        "_others",
        "_ours",
        "_provider_limit",
        "_reported_left",
        "_slices",
        "_spread_until",
        "_unit_spacing",
        "amount",
        "key",
        "window",
    )

    bound_by: ClassVar[str | None] = None

    def __init__(self, limit: Limit, ours: Iterable[tuple[int, int]] = ()) -> None:
        """Know nothing yet except ``ours``: what we booked before the first report."""
        amount, window = limit.amount, limit.window
        self.key = limit.key
        self.amount = amount
        self.window = window
        #: What was left at ``_level_at``, as far as is known; None before the first report.
        self._level: int | None = None
        self._level_at = 0
        #: When the latest report was heard, and the first.
        self._last_report = self._first_report = 0
        #: By how much less than the limit comes back per window, and what is expected to come back.
        self._missing = 0
        self._growth = amount
        #: What is left untouched while something is missing.
        self._margin = 0
        #: What the latest report said was left, at least, and the most that was ever left.
        self._reported_left = 0
        self._most_left = 0
        #: Units that we booked, in the last window and ever.
        self._ours = Window(Limit("units", amount, per=limit.per, burst=amount))
        for date, units in ours:
            self._ours.book(units, date)
        self._booked = 0
        self._others = Others(amount=amount, window=window)
        #: Until when our bookings reach if spread evenly, and when we last booked.
        self._spread_until = self._last_booking = 0
        #: Whether others are negligible, and how many ns apart single units then come.
        self._is_alone = False
        self._unit_spacing = 0
        self._is_long = window > _LONG
        #: The provider's limit, if it is higher than ours.
        self._provider_limit = amount
        #: The slices in which the provider may count; empty once it is known to count as a whole.
        self._slices = () if self._is_long else possible_slices(amount=amount, window=window)

    @property
    def others(self) -> int:
        """Estimated units that others take of the limit in each window."""
        return self._others.estimate

    def update(
        self,
        remaining: int,
        now: int,
        *,
        amount: int,
        limit: int | None = None,
        booked_since: int = 0,
        lent: int = 0,
        rounding: int = 0,
    ) -> None:
        """Correct the expectation by what a reply says.

        Args:
            remaining: units left, as the provider says.
            now: the instant.
            amount: the limit, the provider's or ours, whichever is lower.
            limit: the provider's limit, if it says so; a slice holds a fraction of it.
            booked_since: units that we booked after the call that the reply answers.
            lent: units that calls in flight may still give back.
            rounding: by how many units ``remaining`` may have been rounded down.
        """
        if self._level is None:
            self._first_report = now
        self._adopt_limit(amount, limit, now)
        self._slices = tuple(slices for slices in self._slices if remaining <= slices.share)
        for slices in self._slices:
            slices.update(remaining, now)
        self._correct(remaining, now, booked_since=booked_since, rounding=rounding)
        if not (self._is_long or len(self._slices) == len(SLICE_COUNTS)):
            used = -remaining - rounding
            ours = amount - self._ours.available(now)
            total = max(amount, remaining + ours)  # the provider's limit may be far above ours
            uncertainty = max(booked_since, lent) + rounding
            self._others.update(used - self._booked, now, used + total - ours, uncertainty)
        self._is_alone = not (self._slices or self._others.estimate or self._margin)
        self._unit_spacing = self.window // amount

    def _adopt_limit(self, amount: int, limit: int | None, now: int) -> None:
        """Adopt another limit; what was expected under the old one no longer counts."""
        changed = amount != self.amount
        if changed:
            self.amount = amount
            old = self._ours.limit
            self._ours.reshape(Limit("units", amount, per=old.per, burst=amount), now)
            self._level = None
            self._others = Others(amount=amount, window=self.window)
        if limit is None:
            limit = amount if changed else self._provider_limit
        provider_limit = max(limit, amount)
        if provider_limit != self._provider_limit:
            self._provider_limit = provider_limit
            if self._slices:
                self._slices = possible_slices(amount=provider_limit, window=self.window)

    def _correct(self, remaining: int, now: int, *, booked_since: int, rounding: int) -> None:
        """Move the level into the interval that a reply names, and update what is missing."""
        self._reported_left = remaining - booked_since
        self._most_left = min(self.amount, max(self._most_left, remaining + rounding + 1))
        low = (remaining - booked_since) * self.window
        high = (remaining + rounding) * self.window
        expected = self._expected_level(now)
        if expected is None:
            self._level, self._missing = low, 0
        else:
            self._level = min(max(expected, low), high)
            shortfall = (expected - self._level) // (
                now - self._last_report + _MEMORY * self.window // _SMOOTHING
            )
            self._missing = min(self.amount, max(0, self._missing + shortfall))
            if self._slices and self._slices[0].explains_shortfall:
                self._missing = 0
        self._growth = max(self.amount - self._missing, self.amount // _LEAST, 1)
        is_missing = self._missing * _BUSY >= self.amount
        self._margin = max(1, self._missing // _MARGIN) if is_missing else 0
        self._level_at = self._last_report = now

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:
        """See `asyncbucket.core.meters.Meter.earliest`; with ``back``, now: a reply may bring good news."""
        needed = self._needed_level(amount)
        level = self._expected_level(now, needed)
        if level is None or back:
            return now
        if self._slices and self._slices[0].is_known:
            return self._slices[0].earliest(amount, now)
        when = now
        if needed > level:
            when = max(now, self._level_at) - -(needed - level) // self._growth
        reserve = self._reserve(amount)
        if reserve or (now < self._first_report + self.window and not self._is_long):
            when = max(when, self._earliest_evenly(amount, now, reserve))
        if self._slices:
            when = max(when, self._slices[0].earliest(amount, now))
        return min(when, self._last_report + _MEMORY * self.window)

    def _earliest_evenly(self, amount: int, now: int, reserve: int) -> int:
        """Return when ``amount`` may pass so that we take evenly what others leave."""
        amount = min(amount, self.amount)
        cost = amount * self.window // (self.amount - reserve)
        even = self._spread_until - max(0, self.window // _AT_ONCE - cost)
        when = max(even, self._ours.earliest(amount + reserve, now))
        return min(when, self._last_booking + self.window // _LEAST)

    def take(self, amount: int, now: int) -> bool:
        """See `asyncbucket.core.meters.Meter.take`."""
        level = self._level
        if level is not None:
            if self._is_alone and now < self._last_report + self.window:
                needed = amount * self.window  # as `earliest` does, without the calls
                if level + (now - self._level_at) * self._growth < needed:
                    return False
                must_spread = now < self._first_report + self.window and not self._is_long
                if must_spread and self._earliest_evenly(amount, now, 0) > now:
                    return False
            elif self.earliest(amount, now) > now:
                return False
        self.book(amount, now)
        return True

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.book`."""
        level = self._expected_level(when, self._needed_level(amount))
        if level is not None:
            self._level = level - self._share(amount) * self.window
            self._level_at = max(self._level_at, when)
        self._booked += amount
        self._ours.book(amount, when)
        spacing = amount * self._unit_spacing if self._is_alone else self._spacing(amount)
        self._spread_until = max(self._spread_until, when) + spacing
        self._last_booking = when
        for slices in self._slices:
            slices.book(amount, when)

    def owe(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.owe`."""
        self.book(amount, when)

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """See `asyncbucket.core.meters.Meter.unbook`; bookings before the latest report are counted in it."""
        if self._level is not None and when >= self._last_report:
            self._level += self._share(amount) * self.window
        self._booked -= amount
        self._ours.unbook(amount, when, left=left)
        self._spread_until -= self._spacing(amount)
        for slices in self._slices:
            slices.unbook(amount, when, left)

    def available(self, now: int) -> int:
        """See `asyncbucket.core.meters.Meter.available`: what is left, including any reserve for others."""
        level = self._expected_level(now)
        if level is None:
            return self.amount
        return (level - self._needed_level(0)) // self.window

    def _expected_level(self, now: int, needed: int = 0) -> int | None:
        """Return the level at ``now``; None if no report counts any more.

        It grows to the most that was ever left, or to what a larger call needs, so every call can
        pass.
        """
        level, at = self._level, self._level_at
        if level is None or now >= self._last_report + _MEMORY * self.window:
            return None
        if now <= at:
            return level
        return min(
            level + (now - at) * self._growth, max(level, self._most_left * self.window, needed)
        )

    def _needed_level(self, amount: int) -> int:
        """Return the level at which ``amount`` may pass."""
        amount = self._share(amount)
        if self._margin:
            amount += min(self._margin + _MARGIN_CALLS * amount, self._most_left // _MAX_MARGIN)
        return amount * self.window

    def _share(self, amount: int) -> int:
        """Return what ``amount`` takes of the level: at most what a slice holds."""
        return min(amount, self._slices[0].share) if self._slices else amount

    def _reserve(self, amount: int) -> int:
        """Return what is left to others in a window, if calls cost about ``amount``."""
        others = self._others.estimate
        if not others or (self._slices and self._slices[0].explains_shortfall):
            return 0
        reserve = with_margin(others, amount)
        if self._reported_left >= reserve + self.amount:  # there is enough for all
            return 0
        return max(0, min(reserve, self.amount - max(amount, self.amount // _LEAST)))

    def _spacing(self, amount: int) -> int:
        """Return the time (ns) between calls of ``amount`` in an even flow."""
        return amount * self.window // max(1, self.amount - self._reserve(amount))
