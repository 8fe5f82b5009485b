"""One limiter's state in a file: its limits, its slots, its line, and what each batch does to them.

Nothing here waits, reads a clock or knows of files. `asyncbucket.stores.store` has the rules; the
script that servers run (``lua/``) follows the same ones, and the same names.
"""

import json
import math
from dataclasses import astuple, dataclass
from typing import Final

from asyncbucket.engine.meters import NEVER, Amounts, Window
from asyncbucket.engine.statistics import LimitUse
from asyncbucket.stores.store import (
    FAR,
    LATE,
    SLOT,
    Batch,
    Booking,
    Correction,
    LimitConfig,
    Receipt,
    Snapshot,
)

#: Who does not know its turn asks by itself this many ns later than the one before it.
STEP: Final = 500_000_000
#: The shortest time (ns) before a worker asks again on account of the clock alone.
SOON: Final = 5_000_000
#: How much work (ns) is booked at a time.
TURN: Final = 40_000_000
#: So many workers of the line are looked at, behind the first.
AHEAD: Final = 8
#: The work (us) of a call that no limit prices.
UNPRICED: Final = 1_000
#: A state is kept for at least this long (ns); no instant in a file is later.
_MIN_LIFE: Final = 60_000_000_000
_FOREVER: Final = (1 << 63) - 1
_US: Final = 1_000


@dataclass(slots=True)
class Worker:
    """What is known of a worker: until when it lives, what it holds, and what it waits for."""

    until: int
    #: How many slots it holds.
    held: int = 0
    #: The virtual time (ns of work for each caller) at which it may be served.
    tag: int = 0
    #: How many of its callers wait.
    weight: int = 0
    #: What its first call costs, None if none waits; and what that waits for.
    need: dict[str, int] | None = None
    bound_by: str | None = None
    #: Since when it has been the first; 0 while others come first.
    first_since: int = 0
    #: When it asks again: when its turn comes, or by itself.
    due: int = 0

    @property
    def is_full(self) -> bool:
        """Whether it waits for a slot."""
        return self.bound_by == SLOT

    def wait(self, need: Amounts | None, bound_by: str | None, weight: int) -> None:
        """Note what it waits for; nothing if ``need`` is None."""
        if need is None:
            self.first_since = 0
        self.need = None if need is None else dict(need)
        self.bound_by, self.weight = bound_by, weight


class State:
    """Keep the limits, slots and line of one limiter; all instants are ns of one clock."""

    def __init__(self, config: LimitConfig, now: int = 0) -> None:
        #: What the wall clock shows minus the store's; set before each use.
        self.ahead = 0
        self.config = LimitConfig()
        self._per_unit: dict[str, float] = {}
        self.windows: dict[tuple[str, float], Window] = {}
        self.workers: dict[str, Worker] = {}
        self.paused_until = self.last_start = 0
        self.last_bound: str | None = None
        #: The tag of whom was served last, and the last one that was given to a worker on joining the line.
        self.virtual = self.joined = 0
        #: When a worker came last that was not known.
        self.grown = 0
        self.configure(config, now - 1)  # what is booked from now on may come back

    def configure(self, config: LimitConfig, now: int) -> None:
        """Put ``config`` in force, keeping what was booked under limits that stay."""
        if config == self.config:
            return
        before, self.windows = self.windows, {}
        date = max(now, self.last_start)
        for limit in config.limits:
            window = before.get(limit.key) or Window(limit, began=date, wall=self._wall)
            window.reshape(limit, date)
            self.windows[limit.key] = window
        self.config, self._per_unit = config, config.work

    def _wall(self, now: int) -> int:
        return now + self.ahead

    def apply(self, worker: str, batch: Batch, now: int, *, life: int) -> Receipt:
        """Do what ``batch`` says; ``life`` (ns) is how long ``worker`` may be silent."""
        self._expire(now)
        if batch.config is not None:
            self.configure(batch.config.after(self.config), now)
        if batch.pause:
            self.paused_until = max(self.paused_until, now + batch.pause)
        for correction in batch.corrections:
            self.correct(correction, max(now, self.last_start))
        if worker not in self.workers:
            self.workers[worker], self.grown = Worker(0), now
        me = self.workers[worker]
        me.until, me.held = now + life, batch.held or 0
        turn = Turn(self, worker, now)
        bookings = turn.run(batch.calls, batch.waiting)
        left = self._left(now)
        rivals = self.short() - me.is_full
        return Receipt(
            now=now,
            bookings=bookings,
            ask_at=turn.ask_at,
            left=left,
            workers=len(self.workers),
            steady=now - self.grown,
            in_line=me.need is not None,
            soonest=turn.soonest,
            crowded=rivals > 0 or 2 * self.free() < (self.config.concurrency or 0),
        )

    def leave(self, worker: str, now: int) -> None:
        """Forget ``worker``, its place and its slots."""
        self.workers.pop(worker, None)
        self.call(now)

    def line(self) -> list[str]:
        """Return the workers that wait, by virtual time."""
        waiting = [name for name, each in self.workers.items() if each.need is not None]
        return sorted(waiting, key=lambda name: (self.workers[name].tag, name))

    def due(self, worker: str) -> int:
        """Return when a worker's turn comes; `NEVER` if it does not wait."""
        me = self.workers.get(worker)
        return NEVER if me is None or me.need is None else me.due

    def _slots(self) -> int:
        return NEVER if self.config.concurrency is None else self.config.concurrency

    def free(self) -> int:
        """Return how many slots are free."""
        return self._slots() - sum(each.held for each in self.workers.values())

    def share(self) -> int:
        """Return how many slots a worker may hold while another waits for one."""
        claims = sum(each.held > 0 or each.need is not None for each in self.workers.values())
        return -(-self._slots() // max(1, claims))

    def short(self) -> int:
        """Return how many workers wait for a slot."""
        return sum(each.is_full for each in self.workers.values())

    def work(self, amounts: Amounts) -> float:
        """Return how much work (us of the limit that binds most) a call is."""
        works = (amounts.get(name, 0) * each for name, each in self._per_unit.items())
        return max(works, default=0) or UNPRICED

    def earliest(self, amounts: Amounts, now: int, since: int = 0) -> tuple[int, str | None]:
        """Return when a call may start, after all that is booked, and what it waits for.

        A call above a burst earns the excess while it is first in line: since ``since``, or else
        since now.
        """
        start = max(now, self.last_start)
        bound_by = self.last_bound if start > now else None
        earned_since = since or start
        for window in self.windows.values():
            amount = amounts.get(window.limit.resource)
            if amount and (due := window.earliest(amount, earned_since)) > start:
                start, bound_by = due, window.limit.resource
        if self.paused_until > start:
            return self.paused_until, "paused"
        return start, bound_by

    def book(self, amounts: Amounts, start: int, bound_by: str | None = None) -> None:
        """Book a call in all limits."""
        for window in self.windows.values():
            if amount := amounts.get(window.limit.resource):
                window.book(amount, start)
        self.last_start, self.last_bound = start, bound_by

    def peek(self, now: int) -> Snapshot:
        """Return what there is, for people."""
        self._expire(now)
        left = zip(self.windows.values(), self._left(now), strict=True)
        counted = self.config.concurrency is not None
        return Snapshot(
            now=now,
            config=self.config,
            limits=tuple(LimitUse(each.limit, each.used, units) for each, units in left),
            slots=sum(each.held for each in self.workers.values()) if counted else 0,
            paused_until=self.paused_until,
            last_start=self.last_start,
            workers=len(self.workers),
        )

    def expires_at(self, now: int) -> int:
        """Return from when on there is nothing left to remember, if nothing else happens."""
        ends = [now + _MIN_LIFE, self.paused_until, *(each.until for each in self.workers.values())]
        last = max(now, self.last_start)
        for window in self.windows.values():
            debt = 0 if window.pace is None else window.pace.tat // window.pace.q
            ends += [last + 3 * window.limit.window, debt]  # by the calendar, debts of a month
        return min(max(ends), _FOREVER)

    def to_text(self) -> str:
        """Return the state as JSON, whose integers are exact however long."""
        return json.dumps(
            {
                "config": self.config.to_dict(),
                "windows": [window.state() for window in self.windows.values()],
                "workers": {name: astuple(each) for name, each in self.workers.items()},
                "last": [self.paused_until, self.last_start, self.last_bound],
                "line": [self.virtual, self.joined, self.grown],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_text(cls, text: str) -> "State":
        """Return the state that `to_text` wrote."""
        data = json.loads(text)
        state = cls(LimitConfig.from_dict(data["config"]))
        for window, kept in zip(state.windows.values(), data["windows"], strict=True):
            window.restore(kept)
        state.workers = {name: Worker(*each) for name, each in data["workers"].items()}
        state.paused_until, state.last_start, state.last_bound = data["last"]
        state.virtual, state.joined, state.grown = data["line"]
        return state

    def _left(self, now: int) -> tuple[int, ...]:
        for window in self.windows.values():
            window.available(now)  # which makes it forget
        return tuple(window.amount - window.used for window in self.windows.values())

    def _expire(self, now: int) -> None:
        for name in [name for name, each in self.workers.items() if each.until <= now]:
            del self.workers[name]

    def correct(self, correction: Correction, now: int) -> None:
        """Change what was booked; what was used beyond it is owed from ``now`` on, or from its date."""
        for resource, used in correction.used.items():
            more = used - correction.booked.get(resource, 0)
            for window in self.windows.values():
                if window.limit.resource != resource:
                    continue
                if more < 0:
                    window.unbook(-more, correction.start, left=used)
                elif more > 0 and correction.dated:
                    window.fill(more, correction.start, now)
                elif more > 0:
                    window.owe(more, now)

    def heads(self, now: int) -> list[str]:
        """Return those whose turn is next; who is late leaves the line."""
        found: list[str] = []
        for name in self.line()[: AHEAD + 1]:
            each = self.workers[name]
            if each.due < now - LATE:
                each.wait(None, None, 0)
            else:
                found.append(name)
        return found

    def call(self, now: int) -> None:
        """Note whose turn it is: as many as there are free slots, or the first that waits for units."""
        free = self.free()
        for each in map(self.workers.__getitem__, self.heads(now)):
            has_share = each.held >= self.share() and self.short() > 1
            if each.need is None or (each.is_full and (free <= 0 or has_share)):
                continue
            start = 0 if each.is_full else self.earliest(each.need, now, each.first_since)[0] - FAR
            come = max(now, start)
            if come < each.due - SOON:
                each.due = come
            if not each.is_full:
                return
            free -= 1


class Turn:
    """One batch's calls on their way through the state: booked in order, until one has to wait."""

    def __init__(self, state: State, worker: str, now: int) -> None:
        self._state, self._worker, self._now = state, worker, now
        self._me = me = state.workers[worker]
        if me.need is not None:
            me.due = now  # whenever it comes, it stands where it stood
        else:
            state.joined = max(state.joined + 1, state.virtual)  # in order of arrival
            me.tag = max(me.tag, state.joined)
        #: Who comes before it, how many others wait, and how much (us of work) it got.
        self._first: Worker | None = None
        self._others, self._is_contended = 0, False
        self._work = 0.0
        #: Calls that would start later than this have to ask again.
        self._latest = 0
        self.ask_at = self.soonest = 0

    def run(self, calls: tuple[Amounts, ...], weight: int) -> tuple[Booking, ...]:
        """Return the answers."""
        state, me = self._state, self._me
        if calls:
            self._first = self._before()
        self._is_contended = state.short() > me.is_full
        self._others = len(state.line()) - (me.need is not None)
        answers: list[Booking] = []
        stop: Booking | None = None
        need: Amounts = {}
        for amounts in calls:
            answer = stop or self._answer(amounts)
            answers.append(answer)
            if not (answer.start or answer.exceeds or stop):
                stop, need = answer, amounts
        if self._work:
            weights = sum(each.weight for each in state.workers.values()) - me.weight + weight
            state.virtual = max(state.virtual, me.tag) + math.floor(self._work * 1_000 / weights)
            me.tag += math.floor(self._work * 1_000 / weight)
        bound_by = stop.bound_by if stop else None
        me.wait(need if stop else None, bound_by, weight if stop else 0)
        me.due = self._now
        state.call(self._now)
        if stop:
            self._wait(need)
        return tuple(answers)

    def _before(self) -> Worker | None:
        """Return who comes before it: not who waits for a slot, and has its share of them."""
        for each in map(self._state.workers.__getitem__, self._state.heads(self._now)):
            if each is self._me or each.tag > self._me.tag:
                return None
            if not each.is_full or each.held < self._state.share():
                return each
        return None

    def _answer(self, amounts: Amounts) -> Booking:
        """Book a call, or say what it has to wait for."""
        state, now, me = self._state, self._now, self._me
        for window in state.windows.values():
            if amounts.get(window.limit.resource, 0) > window.amount:
                return Booking(bound_by=window.limit.resource, exceeds=True)
        slot = bool(amounts.get(SLOT))
        start, bound_by = state.earliest(amounts, now, 0 if self._work else me.first_since)
        is_full = self._is_contended and me.held >= state.share()
        if slot and (state.free() <= 0 or is_full):
            return Booking(bound_by=SLOT)
        if self._first is not None:
            return Booking(bound_by=bound_by or self._first.bound_by)
        later = Booking(bound_by=bound_by)
        if not self._work:
            if start > now + FAR:
                self.ask_at = start - FAR
                return later
            self._latest = start + TURN
        elif start > self._latest or (self._others and self._work * _US >= TURN):
            self.ask_at = max(now, state.last_start - (FAR if self._others else TURN))
            return later
        state.book(amounts, start, bound_by if start > now else None)
        self._work += state.work(amounts)
        me.held += slot
        return Booking(start, bound_by)

    def _wait(self, amounts: Amounts) -> None:
        """Say when to ask again for a first call that could not be booked; those before it have been called."""
        state, now, me = self._state, self._now, self._me
        if me.is_full or self._first is not None or self._work:
            me.first_since = 0
        elif not me.first_since:
            me.first_since = max(now, state.last_start)
        line = state.line()
        if rank := line.index(self._worker):
            self.ask_at = max(now, state.workers[line[0]].due) + rank * STEP
        elif me.is_full:
            self.ask_at = now + STEP
        me.due = self.ask_at
        self.soonest = max(now, state.last_start, state.paused_until)
        if not any(each.held for each in state.workers.values()):  # else they may give all back
            self.soonest, _ = state.earliest(amounts, now, me.first_since)
