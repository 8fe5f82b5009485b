"""How many calls at once, if nobody says: a controller that finds a server's hidden capacity.

A server that publishes no limits (vLLM, Ollama, a gateway) still has a number of concurrent calls
beyond which more bring nothing: they queue, and each takes longer, or they are refused. `Adaptive`
looks for that number. It is told the end of each call and says how many may be in flight. Time is
an argument, and nothing here waits.

It works in rounds. First, as many calls as there are slots, or were before a cut, end without being
measured, because they began under the old size. Then the mean latency of the next calls counts: as
many as there are slots, at least ten. A round is busy if half of its calls had to wait for a slot,
and all slots were taken at times (otherwise the calls waited for a child's slots). Only a busy
round may raise the size: with slots to spare, nothing is learned about what would be too much.

The mean of such a round has a standard error. If replies vary a lot the round goes on, up to three
times the size, and what the error may explain is subtracted from every rise in latency.

*By latency.* An earlier, smaller size and its latency are the anchor. By Little's law throughput is
size / latency. So from the anchor (n0, l0) to (n, l), the slope

    e = ln(l / l0) / ln(n / n0)

is 0 if throughput grows in proportion to the calls, and 1 if further calls only queue. Up to a
slope of a quarter, the size grows by a step that doubles from round to round: it starts additively,
yet follows a capacity that has doubled. From 0.6 on, the size is cut to what the server carries at
l0, n * l0 / l, plus a tenth: a short queue keeps the server busy. One cut takes at most half. One
busy round in 25, and the one after a cut, is run at 0.7 of the size, to get a new anchor. So an
anchor is never stale for long: if prompts get longer, or the anchor was itself measured with a
queue, a few rounds correct it.

*By refusals.* A 429, a 503 or a time-out cuts the size to 0.9 of it, or to the size before its last
raise if that is less; if the next round brings another, to half. Refusals of calls that were
admitted before a cut count as part of it. The refused size is a ceiling: each round regains half of
the way to it, and after ten rounds just below it, the ceiling is forgotten and the size tried
again.

Prior art. TCP Vegas (Brakmo and Peterson 1994) compares with the lowest latency ever seen. Here
that is a trap, because a batching server is slower at 32 than at 1 and still much better off there.
Netflix's concurrency-limits has Gradient2, which compares with a slow average of the latency; the
average takes a standing queue for normal, and the limit drifts up. BBR (Cardwell and others 2016)
spends a round at a lower size now and then to get a true base, as here; its maximum and minimum
filters suit packets, not replies whose lengths vary tenfold, where any extreme is an accident.
CUBIC (Ha, Rhee and Xu 2008) waits below the last refusal, as here. Plain AIMD on refusals alone, as
in concurrency-limits, never notices a server that queues and does not refuse.
"""

import math
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
        self.size = self._warmup = max(least, min(start, most))
        #: A size, and how long calls took there.
        self._anchor: tuple[int, _Latencies] | None = None
        #: The size to go back to after a round at a lower size that gives an anchor.
        self._resume_size: int | None = None
        #: Busy rounds since the anchor was set.
        self._rounds = 0
        #: What the next raise adds, and what the last one added.
        self._step = self.size
        self._last_raise = 0
        #: A size that was refused, and how many rounds were spent just below it.
        self._ceiling: int | None = None
        self._rounds_held = 0
        #: When the last refusal cut the size, and whether a round without another has passed since.
        self._cut_at = -1
        self._clean_since_cut = True
        # The round so far: calls seen, of which the first `_warmup` do not count; of those that
        # count, how many had waited, and the sums of their latencies and of the squares.
        self._seen = self._waited = self._total = self._squares = 0
        #: Whether all slots were taken at some point in it; if not, calls wait for a child's slots.
        self._full = False

    def ended(self, outcome: str, *, started: int, now: int, waited: bool, full: bool) -> None:
        """Take in the end of a call: see `asyncbucket.engine.node.Sizer`."""
        if outcome == "overloaded" and started > self._cut_at:
            self._refused(now)
        if outcome != "ok":
            return
        self._seen += 1
        self._full |= full
        counted = self._seen - self._warmup
        if counted <= 0:
            return
        self._waited += waited
        self._total += now - started
        self._squares += (now - started) ** 2
        if counted < max(self.size, _SAMPLE):
            return
        mean = max(self._total / counted, 1.0)
        variance = max(self._squares / counted - mean * mean, 0.0)
        latencies = _Latencies(mean, math.sqrt(variance / counted) / mean)
        if latencies.error <= _MAX_ERROR or counted >= _MAX_ROUND * self.size:
            busy = self._full and self._waited * 2 >= counted
            self._begin_round()
            self._clean_since_cut = True
            self._end_round(latencies, busy=busy)

    def _refused(self, now: int) -> None:
        """Cut the size, because the server refused a call that was admitted after the latest cut."""
        size = self.size if self._resume_size is None else self._resume_size
        self._ceiling, self._rounds_held = size, 0
        if self._clean_since_cut:
            self._resize(int(min(size * _BACKOFF, size - self._last_raise)))
        else:
            self._resize(int(size * _HALF))
        self._cut_at = now
        self._clean_since_cut = False
        self._step, self._last_raise, self._resume_size = 1, 0, None
        self._begin_round()

    def _begin_round(self) -> None:
        self._warmup = self.size
        self._seen = self._waited = self._total = self._squares = 0
        self._full = False

    def _end_round(self, latencies: "_Latencies", *, busy: bool) -> None:
        """Choose the next size by how long the calls of a round took at this size."""
        if self._resume_size is not None:
            self._set_anchor(latencies)
            self._resize(self._resume_size)
            self._resume_size = None
            return
        if self._anchor is None:
            self._set_anchor(latencies)
        elif self.size < self._anchor[0]:
            slower = latencies.rise_from(self._anchor[1]) > _NEAR
            self._set_anchor(latencies)
            self._rounds = _PROBE_EVERY if slower else 0  # if so, calls may queue at this size, too
        size, base = self._anchor or (self.size, latencies)
        slope = latencies.rise_from(base) / max(math.log(self.size / size), _NEAR)
        if slope >= _STEEP:
            self._cut(base.mean / latencies.mean)
        elif busy:
            self._grow_or_probe(latencies, slope)

    def _grow_or_probe(self, latencies: "_Latencies", slope: float) -> None:
        """Stay, grow, or look again at a lower size."""
        self._rounds += 1
        if self._rounds >= _PROBE_EVERY and self.size > self.least:
            self._resume_size = self.size
            self._resize(int(self.size * _PROBE))
        elif slope < _FLAT:
            if self._anchor is not None and self.size >= self._anchor[0] * _FAR:
                self._set_anchor(latencies)
            self._raise()
        else:
            self._step, self._last_raise = max(1, self._step // 2), 0

    def _set_anchor(self, latencies: "_Latencies") -> None:
        self._anchor = (self.size, latencies)
        self._rounds = 0

    def _cut(self, fraction: float) -> None:
        """Cut the size to what the server carries at the anchor's latency, plus a short queue."""
        fraction = max(fraction * _QUEUE, _HALF)
        self._step, self._last_raise = 1, 0
        self._resize(min(int(self.size * fraction), self.size - 1))
        if self._anchor is not None and self.size > self._anchor[0]:  # it may be queued itself
            self._rounds = _PROBE_EVERY

    def _raise(self) -> None:
        """Grow by the step, which doubles, or by half of the way to a size that was refused."""
        step = self._step
        if self._ceiling is not None:
            step = (self._ceiling - self.size) // 2
            if step < 1:
                self._rounds_held += 1
                self._last_raise = 0
                if self._rounds_held < _HOLD:
                    return
                self._ceiling, step = None, 1
        before = self.size
        self._resize(before + step)
        self._last_raise = self.size - before
        self._step = min(2 * step, self.size)

    def _resize(self, size: int) -> None:
        before, self.size = self.size, max(self.least, min(size, self.most))
        self._warmup = max(before, self.size)


class _Latencies(NamedTuple):
    """How long the calls of a round took (mean, in ns), and the relative standard error of the mean."""

    mean: float
    error: float

    def rise_from(self, base: "_Latencies") -> float:
        """Return the logarithm of the ratio of the means, less what may be chance."""
        return math.log(self.mean / base.mean) - math.hypot(self.error, base.error)
