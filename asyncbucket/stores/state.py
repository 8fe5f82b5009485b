"""One limiter's state in a file: its limits, its slots, its line, and what each batch does to them.

Nothing here waits, reads a clock or knows of files. `asyncbucket.stores.store` has the rules; the
script that servers run (``lua/``) follows the same ones, and the same names.
"""

import json
from dataclasses import asdict, astuple, dataclass, field
from typing import Final

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import NEVER, Amounts, Window
from asyncbucket.engine.statistics import LimitUse
from asyncbucket.feedback.pause import Pause
from asyncbucket.stores.store import (
    FAR,
    GRACE,
    SLOT,
    Batch,
    Booking,
    Correction,
    LimitConfig,
    Outcome,
    Receipt,
    Snapshot,
)

#: A worker takes back slots that it gives back, until another has waited this long (ns) for each.
ROUND: Final = 20_000_000
#: In line, a worker asks by itself this many ns after the one before it should have come.
STEP: Final = 500_000_000
#: The shortest time (ns) before a worker asks again on account of the clock alone.
SOON: Final = 5_000_000
#: A state is kept for at least this long (ns); no instant in a file is later.
_MIN_LIFE: Final = 60_000_000_000
_FOREVER: Final = (1 << 63) - 1


@dataclass(slots=True)
class Worker:
    """What is known of a worker: until when it lives, and how many slots it holds."""

    until: int
    held: int = 0


@dataclass(slots=True)
class Place:
    """A worker's place in line: since when, and what its first call costs and waits for."""

    worker: str
    since: int
    amounts: dict[str, int] = field(default_factory=dict)
    #: For how many slots it waits.
    wanted: int = 0
    bound_by: str | None = None
    #: Since when it has been the first with this call; 0 while others come first.
    first_since: int = 0
    #: When it asks again: when its turn comes, or by itself.
    due: int = 0


class State:
    """Keep the limits, slots and line of one limiter; all instants are ns of one clock."""

    def __init__(self, config: LimitConfig, now: int = 0) -> None:
        #: What the wall clock shows minus the store's; set before each use.
        self.ahead = 0
        self.config = LimitConfig()
        self.windows: dict[tuple[str, float], Window] = {}
        self.workers: dict[str, Worker] = {}
        self.line: list[Place] = []
        self.pause = Pause()
        self.last_start = 0
        self.last_bound: str | None = None
        self.configure(config, now)

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
        self.config = config
        for place in self.line:  # they look anew
            place.due = now

    def _wall(self, now: int) -> int:
        return now + self.ahead

    def apply(self, worker: str, batch: Batch, now: int, *, life: int) -> Receipt:
        """Do what ``batch`` says; ``life`` (ns) is how long ``worker`` may be silent."""
        self._expire(now)
        if batch.config is not None:
            self.configure(batch.config.after(self.config), now)
        if batch.pause:
            self.pause.begin(now + batch.pause, now, gradually=batch.gradually)
        for correction in batch.corrections:
            self.correct(correction, max(now, self.last_start))
        me = self.workers.setdefault(worker, Worker(0))
        me.until, before = now + life, me.held
        me.held = batch.held or 0
        bookings: tuple[Booking, ...] = ()
        ask_at = soonest = 0
        if batch.calls is not None:
            admission = Admission(self, worker, now, gave=before - me.held)
            bookings = admission.run(batch.calls, batch.horizon)
            ask_at, soonest = admission.ask_at, admission.soonest
        self.call(now)
        is_waited_for = any(each.bound_by == SLOT and each.worker != worker for each in self.line)
        return Receipt(
            now=now,
            bookings=bookings,
            ask_at=ask_at,
            left=self._left(now),
            workers=len(self.workers),
            in_line=self.place_of(worker) is not None,
            soonest=soonest,
            crowded=is_waited_for or 2 * self.free() < (self.config.concurrency or 0),
        )

    def leave(self, worker: str, now: int) -> None:
        """Forget ``worker``, its place and its slots."""
        self._forget(worker)
        self.call(now)

    def _forget(self, worker: str) -> None:
        self.workers.pop(worker, None)
        self.line = [place for place in self.line if place.worker != worker]

    def place_of(self, worker: str) -> Place | None:
        """Return the place of ``worker`` in line."""
        return next((place for place in self.line if place.worker == worker), None)

    def _slots(self) -> int:
        return NEVER if self.config.concurrency is None else self.config.concurrency

    def free(self) -> int:
        """Return how many slots are free."""
        return self._slots() - sum(each.held for each in self.workers.values())

    def share(self, *others: str) -> int:
        """Return how many slots a worker may hold while another with fewer waits."""
        contenders = {name for name, each in self.workers.items() if each.held}
        contenders.update(others, (place.worker for place in self.line))
        return -(-self._slots() // max(1, len(contenders)))

    def reserved(self, place: Place, share: int) -> int:
        """Return how many free slots are kept for a worker in line: up to its share, at least 1."""
        return min(place.wanted, max(1, share - self.workers[place.worker].held))

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
        if self.pause.until > start:
            return self.pause.until, "paused"
        return start, bound_by

    def book(self, amounts: Amounts, start: int, bound_by: str | None = None) -> None:
        """Book a call in all limits."""
        for window in self.windows.values():
            if amount := amounts.get(window.limit.resource):
                window.book(amount, start)
        self.pause.book(1, start)
        self.last_start, self.last_bound = start, bound_by

    def peek(self, now: int) -> Snapshot:
        """Return what there is, for people."""
        self._expire(now)
        uses: list[LimitUse] = []
        date = max(now, self.last_start)  # nothing more starts before
        for window in self.windows.values():
            available = min(window.available(date), NEVER if date <= now else 0)
            uses.append(LimitUse(window.limit, window.used, available))
        counted = self.config.concurrency is not None
        return Snapshot(
            now=now,
            config=self.config,
            limits=tuple(uses),
            slots=sum(each.held for each in self.workers.values()) if counted else 0,
            paused_until=self.pause.until,
            last_start=self.last_start,
            workers=len(self.workers),
        )

    def expires_at(self, now: int) -> int:
        """Return from when on there is nothing left to remember, if nothing else happens."""
        ends = [now + _MIN_LIFE, self.pause.until, *(each.until for each in self.workers.values())]
        last = max(now, self.last_start)
        ends += [last + 3 * window.window for window in self.windows.values()]  # debts of a month
        return min(max(ends), _FOREVER)

    def to_text(self) -> str:
        """Return the state as JSON, whose integers are exact however long."""
        return json.dumps(
            {
                "config": asdict(self.config),
                "windows": [window.state() for window in self.windows.values()],
                "workers": {name: astuple(each) for name, each in self.workers.items()},
                "line": [astuple(place) for place in self.line],
                "pause": self.pause.state(),
                "last": [self.last_start, self.last_bound],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_text(cls, text: str) -> "State":
        """Return the state that `to_text` wrote."""
        data = json.loads(text)
        limits = tuple(Limit(**limit) for limit in data["config"].pop("limits"))
        state = cls(LimitConfig(limits=limits, **data["config"]))
        for window, kept in zip(state.windows.values(), data["windows"], strict=True):
            window.restore(kept)
        state.workers = {name: Worker(*each) for name, each in data["workers"].items()}
        state.line = [Place(*each) for each in data["line"]]
        state.pause.restore(data["pause"])
        state.last_start, state.last_bound = data["last"]
        return state

    def _left(self, now: int) -> tuple[int, ...]:
        for window in self.windows.values():
            window.available(now)  # which makes it forget
        return tuple(window.amount - window.used for window in self.windows.values())

    def _expire(self, now: int) -> None:
        for name in [name for name, each in self.workers.items() if each.until <= now]:
            self._forget(name)

    def correct(self, correction: Correction, debts_at: int) -> None:
        """Change what was booked; what was used beyond it is owed from ``debts_at`` on."""
        for resource, used in correction.used.items():
            more = used - correction.booked.get(resource, 0)
            for window in self.windows.values():
                if window.limit.resource == resource:
                    if more > 0:
                        window.owe(more, debts_at)
                    elif more < 0:
                        window.unbook(-more, correction.start, left=used)

    def in_order(self, line: list[Place], now: int, share: int) -> list[Place]:
        """Return those in ``line`` in the order of their turns, without those who missed theirs."""
        there = [place for place in line if place.due >= now - GRACE]
        there.sort(key=lambda place: self.workers[place.worker].held >= share)
        return there

    def call(self, now: int) -> None:
        """Note whose turn it is: as many as there are free slots, and the first that waits for units."""
        share, free, first = self.share(), self.free(), True
        for place in self.in_order(self.line, now, share):
            come = place.due
            if place.bound_by == SLOT:
                if free > 0:
                    free -= self.reserved(place, share)
                    come = now
            elif first:
                first = False
                start, _ = self.earliest(place.amounts, now, place.first_since)
                come = max(now, start - FAR)
            if come < place.due - SOON:
                place.due = come


class Admission:
    """One batch's calls on their way through the state: booked in order, until one has to wait."""

    def __init__(self, state: State, worker: str, now: int, *, gave: int) -> None:
        self._state = state
        self._worker = worker
        self._me = state.workers[worker]
        self._now = now
        #: Slots that the worker has just given back, and may take back.
        self._gave = gave
        self._share = state.share(worker)
        self._place = state.place_of(worker)
        #: The line, with this worker at its end if it does not stand there.
        self._line = state.line
        if self._place is None:
            self._line = [*state.line, Place(worker, now, due=now)]
        else:  # whenever it comes, it stands where it stood
            self._place.due = now
        self._booked = 0
        #: Whether calls passed others that came first, with slots that were given back.
        self._has_passed = False
        #: The first of those that wait for units before this worker.
        self._first: Place | None = None
        #: Calls that would start later than this have to ask again.
        self._latest_start = 0
        self.ask_at = self.soonest = 0

    def run(self, calls: tuple[Amounts, ...], horizon: int) -> tuple[Booking, ...]:
        """Return the answers."""
        answers: list[Booking] = []
        stop: Booking | None = None
        waiting: list[Amounts] = []
        for amounts in calls:
            exceeded = self._exceeded(amounts)
            if exceeded is not None:
                answers.append(Booking(Outcome.NEVER, bound_by=exceeded))
                continue
            answer = stop or self._answer(amounts, horizon)
            answers.append(answer)
            if answer.outcome is not Outcome.BOOKED:
                stop = answer
                waiting.append(amounts)
        self._settle_place(stop, waiting)
        return tuple(answers)

    def _exceeded(self, amounts: Amounts) -> str | None:
        for window in self._state.windows.values():
            if amounts.get(window.limit.resource, 0) > window.amount:
                return window.limit.resource
        return None

    def _answer(self, amounts: Amounts, horizon: int) -> Booking:
        """Book a call, or say what it has to wait for."""
        state, now, place = self._state, self._now, self._place
        slot = bool(amounts.get(SLOT))
        reserved = self._look_ahead()
        if slot and state.free() <= reserved:
            return Booking(Outcome.FULL, bound_by=SLOT)
        has_waited = place is not None and not self._booked and self._is_same(place, amounts)
        since = place.first_since if place is not None and has_waited else 0
        start, bound_by = state.earliest(amounts, now, since)
        if self._booked and start > self._latest_start:
            self.ask_at = max(now, state.last_start - horizon)
            return Booking(Outcome.LATER, bound_by=bound_by)
        if not self._booked:
            if self._first is not None:
                return Booking(Outcome.LATER, bound_by=bound_by or self._first.bound_by)
            if start > now + FAR:
                self.ask_at = start - FAR
                return Booking(Outcome.LATER, bound_by=bound_by)
            self._latest_start = start + horizon
        state.book(amounts, start, bound_by)
        self._booked += 1
        if slot:
            self._me.held += 1
            self._gave -= 1
        return Booking(Outcome.BOOKED, start, bound_by, slot)

    def _look_ahead(self) -> int:
        """Find who comes before this worker's next call; return how many slots are kept for them."""
        state, share, reserved = self._state, self._share, 0
        for place in state.in_order(self._line, self._now, share):
            held = state.workers[place.worker].held
            if place.worker == self._worker:
                break
            if self._gave > 0 and held >= self._me.held and self._now < place.since + held * ROUND:
                self._has_passed = True
            elif place.bound_by == SLOT:
                reserved += state.reserved(place, share)
            else:
                self._first = self._first or place
        return reserved

    def _settle_place(self, stop: Booking | None, waiting: list[Amounts]) -> None:
        """Leave the line, or stand in it: where it stood, or at the end if it was served."""
        state, place, now = self._state, self._place, self._now
        has_others = any(each is not place for each in state.line)
        is_full = stop is not None and stop.outcome is Outcome.FULL
        stays = stop is not None and (is_full or not self._booked or has_others)
        if place is not None and not (stays and (self._has_passed or not self._booked)):
            state.line.remove(place)
            place = None
        if stop is None or not stays:
            return
        if place is None:
            place = Place(self._worker, now)
            state.line.append(place)
        is_known = self._is_same(place, waiting[0])
        place.amounts, place.bound_by, place.due = dict(waiting[0]), stop.bound_by, now
        place.wanted = sum(1 for each in waiting if each.get(SLOT))
        if stop.outcome is Outcome.LATER and self._first is None and not self._booked:
            if not place.first_since or not is_known:
                place.first_since = max(now, state.last_start)
        else:
            place.first_since = 0
            order = state.in_order(state.line, now, self._share)
            first, behind = order[0], order.index(place)
            if behind:  # the first may be dead
                come = now if first.bound_by == SLOT else max(now, first.due)
                self.ask_at = come + behind * STEP
            else:  # a slot may expire
                others = [each.until for each in state.workers.values() if each is not self._me]
                self.ask_at = min(others, default=self._me.until)
        place.due = self.ask_at
        self.soonest = max(now, state.last_start, state.pause.until)
        if not any(each.held for each in state.workers.values()):  # else they may give all back
            self.soonest, _ = state.earliest(waiting[0], now, place.first_since)

    def _is_same(self, place: Place, amounts: Amounts) -> bool:
        """Return whether a call costs what ``place`` waits for."""
        resources = (window.limit.resource for window in self._state.windows.values())
        return all(place.amounts.get(each, 0) == amounts.get(each, 0) for each in resources)
