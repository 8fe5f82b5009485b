"""What the provider says is left of a limit, and what other programs on the same key take of it.

Only the provider knows what others spend. `Remaining` keeps what its replies say between them: our
own bookings lower it, time raises it, the next reply corrects it.

*The level.* A reply arrives late: what we sent after the call that it answers may be in its number or
not, and the number may be rounded down. So a reply names an interval, and what we expected is moved
into it, no further. If less came back than the limit would bring (`_missing`, a low-pass filter over a
quarter of the window), less is expected from then on: the integral part of a controller.

*The reserve.* A bucket refills steadily. If it is known to be one, two of the largest bursts of others
stay untouched, and all else is ours. But to a log of the last minute, or a minute of the clock, nothing
comes back for a long time, and whoever takes all that is left leaves nothing to others. So `Others`
estimates what they take of a whole window, and we take the rest evenly. However it is counted, they
took at least (1) what is used beyond what we booked in the last window, and (2) if nothing came back,
the amount by which less is left than at some earlier moment, beyond our bookings since. The larger is
exact for a log and for minutes of the clock, but no more than what is missing, because a bucket may be
smaller than its limit. A margin is for chance: the variance of independent calls is their mean.

*Several meters.* Replies may tell of several meters in turn: of models with limits of their own, or of
the deployments behind a gateway. Then what is left rises by more than can have come back. If it does
so three times in a window, by a quarter of the limit, nothing says what others take.

If nobody calls, nobody hears what has come back. So one call asks a proven bucket when a twentieth of a
window has passed, and if no reply comes for two windows, everything is forgotten.
The constants were found by simulating buckets, logs and minutes of the clock, with others at 0 to 60 %.
"""

from dataclasses import replace
from math import isqrt
from typing import Final

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Window
from asyncbucket.feedback.proof import Proof

#: Less than this fraction (1/32) of the limit is noise: calls may arrive in another order.
_NOISE: Final = 32
#: What is missing is smoothed over this fraction (1/4) of the window; others' rate is computed over
#: at least half as much.
_SMOOTHING: Final = 4
#: If no more than this fraction (1/5) of the limit was ever left, the level says all: what does not
#: come back may never have been there. A bucket that is proven may be as small as the noise.
_SMALL: Final = 5
#: A report counts for this many windows, and what others take is a mean over as many.
_MEMORY: Final = 2
#: A little always passes, because its replies tell more: 1/20 of the limit per window.
_LEAST: Final = 20
#: By how much (ns) a provider may count a call later than we do.
LATE: Final = 100_000_000
#: But no longer than this fraction (1/8) of the time in which comes back what a call takes.
LATER: Final = 8
#: Calls that leave so close together (ns) may arrive in another order.
_REORDERED: Final = 200_000_000
#: Where calls are to come evenly, this fraction (1/10) of a window's worth may pass at once.
_AT_ONCE: Final = 10
#: So many times in a window, this fraction (1/4) of the limit more is left than can have come back.
_JUMPS: Final = 3
_JUMP: Final = 4


class Remaining:
    """Say when what is left suffices for a call. Levels are in units times window, hence exact.

    Args:
        limit: the limit, ours.
        proof: what is known of how the provider counts.
        with_reserve: whether to estimate what others take.
    """

    def __init__(self, limit: Limit, proof: Proof, *, with_reserve: bool) -> None:
        self.amount, self.window = limit.units, limit.window
        self._proof = proof
        #: What was left at ``_level_at``, as far as is known; None before the first report.
        self._level: int | None = None
        self._level_at = self._last_report = self._last_booking = 0
        #: By how much less than the limit comes back per window; and the most that was ever left.
        self._missing = self._most_left = 0
        #: Units that we booked in the last window.
        self._ours = Window(replace(limit, burst=limit.amount, resets=None))
        #: What others take; a short observation does not tell how much they take in a day.
        self.others = Others(limit)
        self._has_reserve = with_reserve
        #: Whether others are known to take something; nothing is if replies tell of several meters.
        self._leaves_to_others = False
        #: What the latest report said was left, at least and at most.
        self._reported = 0, limit.units
        #: When more was left than can have come back, the latest few times.
        self._jumps: list[int] = []

    def hear(
        self,
        left: int,
        now: int,
        amount: int,
        since: int,
        *,
        own: int = 0,
        ours: int = 0,
        rounding: int = 0,
    ) -> None:
        """Correct the expectation by what a reply says.

        Args:
            left: units left, as the provider says.
            now: the instant.
            amount: the limit, the provider's or ours, whichever is lower.
            since: when the call was sent that the reply answers.
            own: what that call has booked.
            ours: what a bucket lacks because of us.
            rounding: by how many units ``left`` may have been rounded down.
        """
        if amount != self.amount:  # what was expected under the old one no longer counts
            self.amount = amount
            self._ours.reshape(replace(self._ours.limit, amount=amount, burst=amount), now)
            self._level, self._missing = None, 0
        booked_since = self.booked_since(since, own)
        proven, before = self._proof.size, now if self._level is None else self._last_report
        back = -(-self.amount * max(0, now - since) // self.window)
        low, high = left - booked_since, min(left + rounding + back, proven or left + self.amount)
        flown_in = self.amount * (now - self._last_report) // self.window
        if low > self._reported[1] + flown_in + self.amount // _JUMP:
            self._jumps = [*self._jumps[1 - _JUMPS :], now]
        expected = self._expected_level(now)
        if expected is None:
            likely = min(proven - ours, low + back) - amount * LATE // self.window
            expected = self.window * max(low, likely if proven else low)
        self._level = min(max(expected, low * self.window), high * self.window)
        since_report = now - self._last_report + self.window // _SMOOTHING
        shortfall = (expected - self._level) // since_report
        self._missing = min(amount, max(0, self._missing + shortfall))
        self._most_left = proven or min(amount, max(self._most_left, high))
        if self._most_left * (_NOISE if proven else _SMALL) < amount:
            self._missing = 0
        self._level_at = self._last_report = now
        self._reported = low, high
        if self._has_reserve:
            taken = max(self._ours.available(now), left) - high  # its limit may be above ours
            uncertainty = booked_since + rounding
            self.others.update(high, now, before, taken, uncertainty, at_most=self._missing)
        several = len(self._jumps) == _JUMPS and now < self._jumps[0] + self.window
        self._leaves_to_others = self.others.estimate > 0 and not several

    def booked_since(self, when: int, own: int) -> int:
        """Return what a reply to a call may not have counted: what we booked since, but for its ``own``."""
        entries = self._ours.log.entries()
        return max(0, sum(units for date, units in entries if date > when - _REORDERED) - own)

    def booked(self, now: int) -> int:
        """Return what we booked in the window that ends now."""
        return self.amount - self._ours.available(now)

    def restart(self) -> None:
        """Expect anew at the next reply, because how the provider counts is another than was believed."""
        self._level = None

    @property
    def _growth(self) -> int:
        """What is expected to come back per window."""
        return max(self.amount - self._missing, self.amount // _LEAST, 1)

    def earliest(self, amount: int, now: int) -> int:
        """Return when ``amount`` may pass, if nothing else is booked or heard."""
        needed = self._needed_level(amount)
        level = self._expected_level(now, needed)
        if level is None:
            return now
        when = now
        if needed > level and self._proof.kind != "window":  # nothing flows in to those
            # As much later as the network may bring calls closer together.
            late = min(LATE, needed // self._growth // LATER) if self._proof.size else 0
            when = max(now, self._level_at) - -(needed - level) // self._growth + late
        reserve = self._reserve(amount)
        if reserve:
            when = max(when, self._earliest_evenly(min(amount, self.amount), now, reserve))
        if self._proof.size:
            quiet_since = max(self._last_report, self._last_booking)
            asks_at = quiet_since + amount * self.window // self.amount + self.window // _LEAST
            when = min(when, max(now, asks_at))
        return min(when, self._last_report + _MEMORY * self.window)

    def _earliest_evenly(self, amount: int, now: int, reserve: int) -> int:
        """Return when ``amount`` may pass so that we take evenly what others leave."""
        fits = self._ours.earliest(amount + reserve, now)
        return self.others.earliest(amount, fits, self.amount - reserve)

    def book(self, amount: int, when: int) -> None:
        """Take ``amount`` at ``when``, whether or not it may pass."""
        level = self._expected_level(when, self._needed_level(amount))
        if level is not None:
            self._level = level - amount * self.window
            self._level_at = max(self._level_at, when)
        self._last_booking = max(self._last_booking, when)
        self._ours.book(amount, when)
        self.others.book(amount, when, self.amount - self._reserve(amount))

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:
        """Give back what was booked at ``when``; what was before the latest report is counted in it."""
        if self._level is not None and when >= self._last_report:
            self._level += amount * self.window
        self._ours.unbook(amount, when, left=left)
        self.others.unbook(amount, self.amount - self._reserve(amount))

    def available(self, now: int) -> int:
        """Return what is left, including any reserve for others."""
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
        most = max(level, self._most_left * self.window, needed)
        return min(level + max(0, now - at) * self._growth, most)

    def _needed_level(self, amount: int) -> int:
        """Return the level at which ``amount`` may pass."""
        if self._proof.size and self._leaves_to_others:
            amount += min(2 * (self.others.at_once + amount), self._most_left // 2)
        return amount * self.window

    def _reserve(self, amount: int) -> int:
        """Return what is left to others in a window, if calls cost about ``amount``."""
        if self._proof.size or not self._leaves_to_others:
            return 0
        reserve = self.others.reserve(amount)
        if self._reported[0] >= reserve + self.amount:  # there is enough for all
            return 0
        return max(0, min(reserve, self.amount - amount))


class Others:
    """Estimate what others take in a window: what they must have taken, however it is counted."""

    def __init__(self, limit: Limit) -> None:
        self._noise, self._window = limit.units // _NOISE, limit.window
        #: The lowest usage beyond our bookings so far, and when that was; None before any report.
        self._lowest: tuple[int, int] | None = None
        #: What was used beyond our bookings when we heard last; and what we booked ever.
        self._used: int | None = None
        self._booked = 0
        #: How much they take at once, at most; and units per window, now and as a mean that fades.
        self.at_once = self.estimate = self._mean = 0
        #: Until when our bookings reach if they come evenly, and when we last booked.
        self._even_until = self._last_booking = 0

    def update(
        self, left: int, now: int, since: int, in_window: int, uncertainty: int, *, at_most: int
    ) -> None:
        """Take in that ``left`` units were left, or up to ``uncertainty`` less.

        Args:
            left: units left, at most.
            now: the instant.
            since: when the report before this one came.
            in_window: what was used beyond our bookings in the last window, at least.
            uncertainty: what we booked recently, which those numbers may or may not include.
            at_most: what comes back in a window less than the limit would bring.
        """
        used = -left - self._booked  # counted from any zero; only differences matter
        steadily = self.estimate * (now - since) // self._window
        jump = 0 if self._used is None else used - self._used - uncertainty - steadily
        faded = self.at_once * (now - since) // self._window
        self._used, self.at_once = used, max(jump, self.at_once - faded, 0)
        if self._lowest is None or used + uncertainty <= self._lowest[0]:  # so much has come back
            self._lowest = used + uncertainty, now
        latest = 0 if in_window <= self._noise else in_window + uncertainty // 2
        taken, elapsed = used - self._lowest[0], now - self._lowest[1]
        if taken > self._noise:
            elapsed = max(elapsed, self._window // _SMOOTHING // 2)
            latest = max(latest, (taken + uncertainty // 2) * self._window // elapsed)
        latest = min(latest, at_most)
        # The estimate rises faster than it falls.
        memory = self._window // 2 if latest > self._mean else _MEMORY * self._window
        self._mean += (latest - self._mean) * (now - since) // (memory + now - since)
        self.estimate = max(latest, self._mean)

    def reserve(self, amount: int) -> int:
        """Return what to leave to them in a window, if our calls cost about ``amount``."""
        return self.estimate + isqrt(3 * self.estimate * max(amount, self.at_once // 4, 1))

    def earliest(self, amount: int, fits: int, ours: int) -> int:
        """Return when ``amount`` that ``fits`` by then may pass so that ``ours`` comes evenly."""
        ahead = max(0, self._window // _AT_ONCE - amount * self._window // ours)
        when = max(fits, self._even_until - ahead)
        return min(when, self._last_booking + self._window // _LEAST)

    def book(self, amount: int, when: int, ours: int) -> None:
        """Take ``amount`` of what is ``ours`` of a window; that delays later ones by a quarter of it at most."""
        self._booked += amount
        until = max(self._even_until, when) + amount * self._window // max(1, ours)
        self._even_until, self._last_booking = min(until, when + self._window // _SMOOTHING), when

    def unbook(self, amount: int, ours: int) -> None:
        """Give back what was booked."""
        self._booked -= amount
        self._even_until -= amount * self._window // max(1, ours)
