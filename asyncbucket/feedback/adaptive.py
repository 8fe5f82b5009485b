"""How many calls at once, if nobody says: a controller that finds a server's hidden capacity.

A server that publishes no limits (vLLM, Ollama, a gateway) still has a number of concurrent calls
beyond which more bring nothing: they queue, and each takes longer, or they are refused. `Adaptive`
looks for that number. Time is an argument, and nothing here waits.

It works in rounds. First, as many calls as there are slots, or were before a cut, end without being
measured, because they began under the old size. Then the mean latency of the next calls counts: as
many as there are slots, at least ten; if replies vary a lot, up to three times the size. What the
standard error may explain is subtracted from every rise in latency. A round is busy if half of its
calls had to wait for a slot, and all slots were taken at times (otherwise the calls waited for a
child's slots). Only a busy round may raise the size.

*By latency.* An earlier, smaller size and its latency are the anchor. By Little's law throughput is
size / latency. So from the anchor (n0, l0) to (n, l), the slope ln(l / l0) / ln(n / n0) is 0 if
throughput grows in proportion to the calls, and 1 if further calls only queue. Up to a quarter, the
size grows by a step that doubles from round to round. From 0.6 on, it is cut to what the server
carries at l0, n * l0 / l, plus a tenth: a short queue keeps the server busy. One busy round in 25,
and the one after a cut, is run at 0.7 of the size, to get a new anchor, so none is stale for long.

*By refusals.* A 429, a 503 or a time-out cuts the size to 0.9 of it, or to the size before its last
raise if that is less; if the next round brings another, to half. Refusals of calls that were
admitted before a cut count as part of it. The refused size is a ceiling: each round regains half of
the way to it, and after ten rounds just below it, the ceiling is forgotten. A single refusal that
names no wait may be an accident. It is reported as overload only while a larger size is being tried, and
not where calls have failed at a size that had been accepted: there, only a run of refusals counts.

Prior art. TCP Vegas (Brakmo and Peterson 1994) compares with the lowest latency ever seen: a trap,
because a batching server is slower at 32 than at 1 and still much better off there. Netflix's
Gradient2 compares with a slow average, which takes a standing queue for normal. BBR (Cardwell and
others 2016) spends a round at a lower size now and then to get a true base, as here. CUBIC (Ha, Rhee
and Xu 2008) waits below the last refusal, as here.
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

#: Where the search begins.
_START: Final = 4
#: The fewest calls whose mean latency counts.
_SAMPLE: Final = 10
#: A round goes on until its mean's relative error is this small, or for this many times the size.
_MAX_ERROR: Final = 0.1
_MAX_ROUND: Final = 3
#: Below the first slope the size grows; from the second on it is cut.
_FLAT: Final = 0.25
_STEEP: Final = 0.6
#: The smallest distance from the anchor used for a slope, and that at which the anchor moves up.
_NEAR: Final = math.log(1.2)
_FAR: Final = 1.4
#: How much of a queue to keep, relative to what the server carries at once.
_QUEUE: Final = 1.1
#: The most that one cut takes.
_HALF: Final = 0.5
#: What remains of the size after a refusal.
_BACKOFF: Final = 0.9
#: The relative size of the round that gives a new anchor, and how many rounds lie between two.
_PROBE: Final = 0.7
_PROBE_EVERY: Final = 25
#: Rounds just below a refused size before it is tried again.
_HOLD: Final = 10


class Adaptive:
    """Say how many calls may be in flight, within bounds, by how earlier ones ended.

    After each call of `ended`, ``size`` is the number to keep to. The same history gives the same
    sizes.

    Args:
        least: the lower bound, at least 1.
        most: the upper bound.
        start: the first size; it is brought within the bounds.
    """

    def __init__(self, *, least: int, most: int, start: int = _START) -> None:
        self.least, self.most = least, most
        self.size = max(least, min(start, most))
        self._round = _Round(self.size)
        self._anchor: _Anchor | None = None
        #: The size to go back to after a round at a lower size that gives an anchor.
        self._resume_size: int | None = None
        #: What the next raise adds, and what the last one added.
        self._step, self._last_raise = self.size, 0
        #: A size that was refused, and how many rounds were spent just below it.
        self._ceiling: tuple[int, int] | None = None
        #: When the last refusal cut the size, and when it was raised last.
        self._cut_at = self._raised_at = -1
        #: See `asyncbucket.engine.interfaces.Sizer`; never again once calls failed at other times.
        self.is_trying = self._fails = False

    def ended(self, outcome: str, *, started: int, now: int, waited: bool, full: bool) -> None:
        """Take in the end of a call: see `asyncbucket.engine.interfaces.Sizer`."""
        if outcome == "overloaded" and started > self._cut_at:
            self._refused(now)
        self._fails |= outcome == "failed" and started > self._cut_at
        if outcome == "ok":
            self.is_trying &= started < self._raised_at
            latencies = self._round.add(now - started, self.size, waited=waited, full=full)
            if latencies is not None:
                before, busy, self._round = self.size, self._round.is_busy, _Round(self.size)
                self._end_round(latencies, busy=busy)
                if self.size > before:
                    self._raised_at, self.is_trying = now, not self._fails

    def _refused(self, now: int) -> None:
        """Cut the size, because the server refused a call that was admitted after the latest cut."""
        size = self.size if self._resume_size is None else self._resume_size
        kept = (
            _HALF * size if self._round.after_cut else min(_BACKOFF * size, size - self._last_raise)
        )
        self._ceiling, self._cut_at = (size, 0), now
        self._step, self._last_raise, self._resume_size = 1, 0, None
        self.is_trying = False
        self._resize(int(kept))
        self._round = _Round(self.size, after_cut=True)

    def _end_round(self, latencies: "_Latencies", *, busy: bool) -> None:
        """Choose the next size by how long the calls of a round took at this size."""
        anchor = self._anchor
        if self._resume_size is not None:
            self._anchor = _Anchor(self.size, latencies)
            self._resize(self._resume_size)
            self._resume_size = None
            return
        if anchor is None or self.size < anchor.size:
            slower = anchor is not None and latencies.rise_from(anchor.latencies) > _NEAR
            # If slower, calls may queue at this size, too.
            anchor = self._anchor = _Anchor(self.size, latencies, _PROBE_EVERY * slower)
        slope = latencies.rise_from(anchor.latencies) / max(
            math.log(self.size / anchor.size), _NEAR
        )
        if slope >= _STEEP:
            self._cut(anchor, latencies)
        elif busy:
            self._grow_or_probe(anchor, latencies, slope)

    def _grow_or_probe(self, anchor: "_Anchor", latencies: "_Latencies", slope: float) -> None:
        """Stay, grow, or look again at a lower size."""
        anchor.rounds += 1
        if anchor.rounds >= _PROBE_EVERY and self.size > self.least:
            self._resume_size = self.size
            self._resize(int(self.size * _PROBE))
        elif slope < _FLAT:
            if self.size >= anchor.size * _FAR:
                self._anchor = _Anchor(self.size, latencies)
            self._raise()

    def _cut(self, anchor: "_Anchor", latencies: "_Latencies") -> None:
        """Cut the size to what the server carries at the anchor's latency, plus a short queue."""
        carried = max(anchor.latencies.mean / latencies.mean * _QUEUE, _HALF)
        self._step, self._last_raise = 1, 0
        self._resize(min(int(self.size * carried), self.size - 1))
        if self.size > anchor.size:  # it may be queued itself
            anchor.rounds = _PROBE_EVERY

    def _raise(self) -> None:
        """Grow by the step, which doubles, or by half of the way to a size that was refused."""
        step, before = self._step, self.size
        if self._ceiling is not None:
            refused, held = self._ceiling
            step = (refused - before) // 2
            if step < 1:
                step = held + 1 >= _HOLD
                self._ceiling = None if step else (refused, held + 1)
        self._resize(before + step)
        self._last_raise = self.size - before
        self._step = max(1, min(2 * step, self.size))

    def _resize(self, size: int) -> None:
        before, self.size = self.size, max(self.least, min(size, self.most))
        self._round.warmup = max(before, self.size)


class _Latencies(NamedTuple):
    """How long the calls of a round took (mean, in ns), and the relative standard error of the mean."""

    mean: float
    error: float

    def rise_from(self, base: "_Latencies") -> float:
        """Return the logarithm of the ratio of the means, less what may be chance."""
        return math.log(self.mean / base.mean) - math.hypot(self.error, base.error)


@dataclass(slots=True)
class _Anchor:
    """A size, how long calls took there, and busy rounds since."""

    size: int
    latencies: _Latencies
    rounds: int = 0


@dataclass(slots=True)
class _Round:
    """The calls of a round: the first ``warmup`` do not count."""

    warmup: int
    #: Whether a refusal has just cut the size.
    after_cut: bool = False
    seen: int = 0
    waited: int = 0
    total: int = 0
    squares: int = 0
    #: Whether all slots were taken at some point in it.
    full: bool = False

    def add(self, took: int, size: int, *, waited: bool, full: bool) -> _Latencies | None:
        """Count a call; return how long calls took, once that is known well enough."""
        self.seen += 1
        self.full |= full
        counted = self.seen - self.warmup
        if counted <= 0:
            return None
        self.waited += waited
        self.total += took
        self.squares += took * took
        if counted < max(size, _SAMPLE):
            return None
        mean = max(self.total / counted, 1.0)
        variance = max(self.squares / counted - mean * mean, 0.0)
        found = _Latencies(mean, math.sqrt(variance / counted) / mean)
        return found if found.error <= _MAX_ERROR or counted >= _MAX_ROUND * size else None

    @property
    def is_busy(self) -> bool:
        """Whether half of the calls that count had to wait for a slot, and all slots were taken."""
        return self.full and self.waited * 2 >= self.seen - self.warmup
