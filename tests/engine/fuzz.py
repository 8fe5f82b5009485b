"""Random histories of a tree of limiters, and an oracle that knows nothing of how the core counts.

A history has limiters at any depth, perhaps a pool with members that are also used directly and may
fail, conversations, tenants, limits with bursts and without, slots, priorities, deadlines,
cancellations, settlements, pauses, changed limits, days that begin anew, and a clock that jumps. Everything runs on virtual time. The oracle writes down what each call took at each level, and
checks:

- every window of every limit, and every interval of every bucket, at every level, whenever a call
  was admitted; no more calls in flight than there are slots; nobody passes during a pause;
- order: of the calls of one limiter and priority, none passes one that came first; with agents, that
  holds within an agent, and in a pool among the calls that a member can ever take;
- nobody is admitted after its deadline, or waits while every call that may be next has room;
- a call that is above a limit wherever it may go is refused as such, and no other is;
- shares: while calls of two tenants, or of two children, wait at the same limiter with the same
  priority, neither is ahead by more than two calls of each. So it is in every fifth history, in
  which nothing but the root has limits, and calls cost what they reserved;
- in the end nobody waits, nothing is in flight, and all limits are full again.

`test_histories.py` plays some hundreds of them. This script plays as many as there is time for::

    python -m tests.engine.fuzz --seconds 600
    python -m tests.engine.fuzz --seed 12345
"""

import argparse
import asyncio
import contextlib
import contextvars
import functools
import itertools
import random
import sys
import time as real_time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from asyncbucket import (
    AcquireTimeout,
    CostExceedsLimit,
    Lease,
    Limit,
    Limiter,
    Pool,
    WouldBlock,
    agent,
)
from asyncbucket.pools import PoolLease
from asyncbucket.testing import DeadlockError, VirtualTime, virtual_time

SECOND = 1_000_000_000
#: How long a window may remember a call, in windows; and how late (ns) a dispatch may be.
MEMORY = Fraction(517, 512)
LATE = 3_000_000
#: In the same instant, what was given back comes first, and debts come last.
BACK, ADMITTED, DEBT = range(3)
#: After so long everything must be over.
LONG = 20_000_000.0
LIMITS: tuple[tuple[Limit, ...], ...] = (
    (),
    (),
    (Limit("tokens", 100, per=10),),
    (Limit("tokens", 60, per=20, burst=15),),
    (Limit("requests", 6, per=5, burst=6),),
    (Limit("requests", 4, per=3), Limit("tokens", 80, per=15)),
    (Limit("requests", 20, per=100), Limit("tokens", 50, per=10, burst=7)),
    (Limit("tokens", 90, per="day", resets="00:01 UTC"),),
)


@dataclass(eq=False)
class Entry:
    """Units that a call has booked of one resource at one time."""

    date: int
    units: int
    #: Whether it was admitted, not owed.
    admitted: bool = True


@dataclass(eq=False)
class Call:
    """What is known of one call."""

    number: int
    path: tuple[str, ...]
    costs: dict[str, int]
    priority: int
    asked: int
    deadline: int | None
    #: Whose calls go in order of arrival: everyone's or, in a history with agents, one agent's.
    agent: int = -1
    when: int | None = None
    #: Whether it may wait for the member of its conversation, out of line.
    is_sticky: bool = False
    #: When it gave up or was refused.
    gone: int | None = None
    ended: int | None = None
    task: asyncio.Task[None] | None = None
    entries: dict[str, list[Entry]] = field(default_factory=dict)

    @property
    def line(self) -> tuple[str, int, int]:
        """The calls that go in order of arrival."""
        return self.path[0], self.priority, self.agent

    @property
    def waits(self) -> bool:
        return self.when is None and self.gone is None


@dataclass
class Level:
    """One limiter: what it allowed since when, and the calls at it and below."""

    name: str
    #: For each resource and window: since when which limit.
    limits: dict[tuple[str, float], list[tuple[int, Limit]]] = field(default_factory=dict)
    slots: list[tuple[int, int]] = field(default_factory=list)
    pauses: list[tuple[int, int]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    #: What a call costs here: `Node.work`; and its weight beside its siblings.
    work: Callable[[dict[str, int]], float] = len
    weight: float = 1.0
    #: Changes of what is booked: when, in which order, what, the call's resource, its entry, units.
    changes: list[tuple[int, int, str, Call, Entry, int]] = field(default_factory=list)


def in_force(history: list[tuple[int, Any]], start: int, end: int) -> list[Any]:
    """Return all that was in force at any time from ``start`` to ``end``."""
    began = [value for since, value in history if since < start][-1:]
    return began + [value for since, value in history if start <= since <= end] or [history[0][1]]


def refilled(history: list[tuple[int, Limit]], start: int, end: int) -> Fraction:
    """Return how many units flow into a bucket from ``start`` to ``end``."""
    total = Fraction(0)
    for (since, limit), (until, _) in zip(history, [*history[1:], (end, None)], strict=True):
        span = min(until, end) - max(since, start)
        total += max(span, 0) * Fraction(limit.units, limit.window)
    return total


def burst_of(limit: Limit) -> int:
    """Return how many units may pass at once."""
    return limit.units if limit.burst_units is None else limit.burst_units


def counts(limit: Limit, date: int, now: int, span: Fraction | int = 1) -> bool:
    """Tell whether a limit counts at ``now`` what was booked at ``date``; time begins at 00:00 UTC."""
    calendar = limit.calendar
    if calendar is None:
        return now - limit.window * span < date
    return calendar.number(now) == calendar.number(date)


class Oracle:
    """Write down what happens, and judge it."""

    def __init__(self) -> None:
        self.levels: dict[str, Level] = {}
        self.calls: list[Call] = []
        #: If the root is a pool, the names of its members.
        self.members: tuple[str, ...] = ()
        #: From when to when the loop was blocked.
        self.jumps: list[tuple[int, int]] = []

    def know(self, limiter: Limiter, now: int) -> Level:
        """Note a limiter and what it allows."""
        level = self.levels.get(limiter.name)
        if level is None:
            node = limiter._node
            level = Level(limiter.name, work=node.work, weight=node.standing.weight)
            self.levels[limiter.name] = level
            self.note_terms(limiter, now)
        return level

    def note_terms(self, limiter: Limiter, now: int) -> None:
        level = self.levels[limiter.name]
        is_new = not (level.limits or level.calls)
        is_pool = isinstance(limiter, Pool) and limiter.parent is None
        for limit in () if is_pool else limiter.limits:
            history = level.limits.setdefault(limit.key, [])
            if not history:  # what was booked before a limit was set does not count
                history.append((now if is_new else now + 1, limit))
            elif history[-1][1] != limit:
                history.append((now, limit))
        slots = None if is_pool else limiter.concurrency
        if slots is not None and (not level.slots or level.slots[-1][1] != slots):
            level.slots.append((now, slots))

    def above(self, call: Call) -> Iterator[Level]:
        return (self.levels[name] for name in call.path)

    def takers(self, call: Call) -> tuple[str, ...]:
        """Return the roots of which any may take the call."""
        is_of_pool = bool(self.members) and call.path[0] not in self.members
        return self.members if is_of_pool else call.path[-1:]

    def can_take(self, name: str, call: Call, since: int, until: int) -> bool:
        """Tell whether the cost was within a limiter's limits all the time."""
        return all(
            call.costs.get(resource, 0) <= limit.units
            for (resource, _), history in self.levels[name].limits.items()
            for limit in in_force(history, since, until)
        )

    def can_pass(self, call: Call, since: int, until: int) -> bool:
        """Tell whether the cost was within the limits all the time on one way at least."""
        return all(self.can_take(name, call, since, until) for name in call.path) and any(
            self.can_take(name, call, since, until) for name in self.takers(call)
        )

    # --- what happens ---

    def asked(self, call: Call) -> None:
        self.calls.append(call)
        for level in self.above(call):
            level.calls.append(call)

    def admitted(self, call: Call, when: int, lease: Lease) -> None:
        call.when = when
        if isinstance(lease, PoolLease):
            call.path = (*call.path, lease.limiter.name)
            self.levels[lease.limiter.name].calls.append(call)
        for resource, units in call.costs.items():
            entry = Entry(when, units)
            call.entries[resource] = [entry]
            self._change(when, ADMITTED, resource, call, entry, units)

    def settled(self, call: Call, used: dict[str, int], now: int) -> None:
        for resource, units in used.items():
            entries = call.entries.setdefault(resource, [])
            delta = units - sum(entry.units for entry in entries)
            if delta > 0:
                entries.append(Entry(now, delta, admitted=False))
                self._change(now, DEBT, resource, call, entries[-1], delta)
            while delta < 0:
                entry = next(each for each in reversed(entries) if each.units)
                back = min(entry.units, -delta)
                delta += back
                entry.units -= back
                self._change(now, BACK, resource, call, entry, -back)

    def _change(
        self, when: int, order: int, resource: str, call: Call, entry: Entry, units: int
    ) -> None:
        for level in self.above(call):
            level.changes.append((when, order, resource, call, entry, units))

    # --- judging ---

    def check(self) -> None:
        """Assert that everything that was promised held at any time."""
        for level in self.levels.values():
            for (resource, _), history in level.limits.items():
                self._check_limit(level, resource, history)
            self._check_slots(level)
            for since, until in level.pauses:
                for call in level.calls:
                    assert not (since < (call.when or 0) < until), (level.name, call)
        self._check_order()
        for call in self.calls:
            if call.deadline is not None and call.when is not None and call.when != call.asked:
                # After a jump over the deadline, who could have passed in time does.
                in_time = [to for at, to in self.jumps if at <= call.deadline < to]
                assert call.when <= max([call.deadline, *in_time]), f"late: {call}"

    def _check_limit(self, level: Level, resource: str, history: list[tuple[int, Limit]]) -> None:
        # A bucket begins where a limit begins to be paced.
        paced: list[tuple[int, Limit]] = []
        booked: dict[Entry, int] = {}
        # Calls from before it was set do not count, whatever they report later.
        changes = [
            each
            for each in level.changes
            if each[2] == resource and (each[3].when or 0) >= history[0][0]
        ]
        for when, order, _, call, entry, units in sorted(changes, key=lambda each: each[:2]):
            booked[entry] = booked.get(entry, 0) + units
            if order != ADMITTED or not units:
                continue
            total = sum(n for each, n in booked.items() if counts(history[0][1], each.date, when))
            most = max(limit.amount for limit in in_force(history, when, when))
            assert total <= most, f"{level.name}: {total} {resource} of {most} at {when}: {call}"
            paced = [each for each in history if each[0] <= when]
            while any(burst_of(limit) == limit.amount for _, limit in paced):
                paced.pop(0)
            if paced:
                # What went before it was paced, be it in the same instant, does not count.
                began = paced[0][0] + (paced[0] is not history[0])
                counted = {entry: left for entry, left in booked.items() if entry.date >= began}
                self._check_bucket(level, counted, paced, when, call)

    def _check_bucket(
        self,
        level: Level,
        booked: dict[Entry, int],
        history: list[tuple[int, Limit]],
        when: int,
        call: Call,
    ) -> None:
        dated = sorted((each.date, n) for each, n in booked.items() if n and each.date <= when)
        total = 0
        for date, units in reversed(dated):
            total += units
            together = max(left for each, left in dated if each == date)
            # Units that are missing stay missing when the burst changes.
            bursts = [*map(burst_of, in_force(history, date, when))]
            raised = sum(max(0, b - a) for a, b in itertools.pairwise(bursts))
            room = max(bursts[0], together) + raised + refilled(history, date, when)
            assert total <= room, f"{level.name}: {total} of {room} from {date} to {when}: {call}"

    def _check_slots(self, level: Level) -> None:
        if not level.slots:
            return
        begun = sorted(call.when for call in level.calls if call.when is not None)
        ended = sorted(call.ended for call in level.calls if call.ended is not None)
        for number, when in enumerate(begun, 1):
            if when < level.slots[0][0]:
                continue
            open_calls = number - sum(end <= when for end in ended)
            most = max(in_force(level.slots, when, when))
            assert open_calls <= most, f"{level.name}: {open_calls} of {most} slots at {when}"

    def _check_order(self) -> None:
        lines: dict[tuple[str, int, int], list[Call]] = {}
        for call in self.calls:
            lines.setdefault(call.line, []).append(call)
        for calls in lines.values():
            latest: dict[str, int] = {}
            for call in reversed(calls):
                over = call.gone if call.when is None else call.when
                if over is None:
                    continue
                for name in self.takers(call):
                    passed = latest.get(name, over) < over
                    passed = passed and self.can_take(name, call, call.asked, over)
                    assert not passed, f"overtaken at {name}: {call}"
                if call.when is not None:
                    latest[call.path[-1]] = min(call.when, latest.get(call.path[-1], call.when))

    def check_shares(self) -> None:
        """Assert that those who wait side by side get their shares, within two calls."""
        flows: dict[tuple[str, int], dict[str, list[Call]]] = {}
        for call in self.calls:
            for below, name in itertools.pairwise(("", *call.path)):
                flows.setdefault((name, call.priority), {}).setdefault(below, []).append(call)
        for (name, _), beside in flows.items():
            if name in self.members:
                continue
            for one, other in itertools.combinations(beside, 2):
                self._check_shares(self.levels[name], {each: beside[each] for each in (one, other)})

    def _check_shares(self, level: Level, flows: dict[str, list[Call]]) -> None:
        #: At each instant: whose number of waiting calls changes, by how many, and what it gets.
        changes: dict[int, list[tuple[str, int, float]]] = {}
        bound = 0.0
        for name, calls in flows.items():
            weight = self.levels[name].weight if name else 1.0
            costs = [level.work(call.costs) / weight for call in calls]
            bound += 2 * max(costs) * max(1, len(self.members))
            for call, cost in zip(calls, costs, strict=True):
                over = call.gone if call.when is None else call.when
                assert over is not None
                changes.setdefault(call.asked, []).append((name, 1, 0.0))
                got = 0.0 if call.when is None else cost
                changes.setdefault(over, []).append((name, -1, got))
        first = next(iter(flows))
        waiting, ahead = dict.fromkeys(flows, 0), [0.0]
        for _, together in sorted(changes.items()):
            gains = sum(got if name == first else -got for name, _, got in together)
            lost = [name for name, change, _ in together if change < 0]
            # Within an instant nobody knows the order, and who has nothing left to wait needs no share.
            both_wait = all(waiting[name] > lost.count(name) for name in flows)
            ahead = [*ahead, ahead[-1] + gains] if both_wait else [0.0]
            assert max(ahead) - min(ahead) <= bound + 1e-9, (
                f"{level.name}: {[*flows]} get {ahead}, more than {bound:g} apart"
            )
            for name, change, _ in together:
                waiting[name] += change

    # --- is anybody stuck? ---

    def assert_nobody_is_stuck(self, now: int) -> None:
        """Assert, while all tasks are blocked, that not every call that may be next has room.

        A call that is next at a limit may wait for it, and others behind it.
        """
        root = next(iter(self.levels.values()))
        for name in self.members or (root.name,):
            heads: dict[tuple[str, int, int], Call] = {}
            for call in self.calls:
                if call.waits and name in self.takers(call):
                    # What is in force from now on.
                    assert self.can_pass(call, now + 1, now + 1), f"waits for ever: {call}"
                    if self.can_take(name, call, now + 1, now + 1):
                        heads.setdefault(call.line, call)
            direct = [call for call in heads.values() if call.path[0] in self.members]
            others = [call for call in heads.values() if call not in direct]
            may, must = self._below(root, others, now)
            may += direct
            stuck = (must or direct) and all(
                self.has_room(self.levels[name], call, now) for call in may
            )
            assert not stuck, f"stuck at {now}, {name}: {may}"

    def _below(self, level: Level, heads: list[Call], now: int) -> tuple[list[Call], bool]:
        """Return the calls that may be next at ``level``, and whether there must be one."""
        may = [call for call in heads if call.path[0] == level.name]
        must = bool(may)
        below = {call.path[call.path.index(level.name) - 1] for call in heads if call not in may}
        for name in sorted(below):
            child = self.levels[name]
            inside, some = self._below(child, [each for each in heads if name in each.path], now)
            may += inside
            must = must or (some and all(self.has_room(child, call, now) for call in inside))
        return may, must

    def has_room(self, level: Level, call: Call, now: int) -> bool:
        """Tell whether a level is sure to have had room for a call for a little while."""
        open_calls = sum(each.when is not None and each.ended is None for each in level.calls)
        if level.slots and open_calls >= level.slots[-1][1]:
            return False
        if any(until > now - LATE for _, until in level.pauses):
            return False
        return all(
            self._fits(level, history, call.costs.get(history[0][1].resource, 0), now - LATE)
            for history in level.limits.values()
        )

    def _fits(self, level: Level, history: list[tuple[int, Limit]], units: int, now: int) -> bool:
        since, limit = history[-1]
        if not units:
            return True
        if units > burst_of(limit) or since > now:  # it has to earn the rest at the head
            return False
        booked: dict[Entry, int] = {}
        taken: dict[Entry, int] = {}
        for _, _, resource, call, entry, delta in level.changes:
            if resource == limit.resource:
                booked[entry] = booked.get(entry, 0) + delta
                taken[entry] = max(taken.get(entry, 0), booked[entry])
                if (call.when or 0) <= history[0][0]:  # it gives nothing back to a later limit
                    booked[entry] = taken[entry]
        held = sum(left for entry, left in booked.items() if counts(limit, entry.date, now, MEMORY))
        if limit.resets:  # and debts of earlier days
            held += sum(left for entry, left in taken.items() if not entry.admitted)
        if held + units > limit.units:
            return False
        if burst_of(limit) == limit.units and all(entry.admitted for entry in taken):
            return True  # else debts are paid as by a bucket
        slowest = min(Fraction(limit.units, limit.window) for _, limit in history)
        missing, last = Fraction(0), 0  # as if nothing had ever been given back
        for date, left in sorted((entry.date, left) for entry, left in taken.items()):
            missing = max(Fraction(0), missing - (date - last) * slowest) + left
            last = max(last, date)
        missing -= max(0, now - last) * slowest
        return missing + units <= burst_of(limit)


class History:
    """One random history; the same seed gives the same."""

    def __init__(self, time: VirtualTime, seed: int) -> None:
        self.time, self.seed = time, seed
        self.chance = random.Random(seed)
        #: Whether shares are compared: see above.
        self.compares = random.Random(f"shares {seed}").random() < 0.2
        #: What happens with pools alone.
        self.of_pools = random.Random(f"pools {seed}")
        self.oracle = Oracle()
        self.number = 0
        self.root = self._new_limiter("default")
        #: If the root is a pool, its members.
        self.members: list[Limiter] = []
        if self.chance.random() < 0.3:
            self.members = [self.root, *map(self._new_limiter, "ab"[: self.chance.randint(1, 2)])]
            prefer: Any = self.chance.choice(["first", "least_used"])
            self.root = Pool(*self.members, name="pool", prefer=prefer)
            self.oracle.members = tuple(member.name for member in self.members)
        self.limiters = [self.root]
        self.tasks: list[asyncio.Task[None]] = []
        #: Agents that run: their scopes, and the contexts inside; None if the history has none.
        self.agents: dict[int, tuple[Any, contextvars.Context]] | None = (
            {} if self.chance.random() < 0.4 else None
        )
        for number in range(self.chance.randint(0, 5)):
            node = self.chance.choice(self.limiters)
            limits, slots = self._some_limits(), None if self.compares else self._slots()
            weight = self.chance.choice([1.0, 1.0, 0.5, 4.0])
            self.limiters.append(node.child(str(number), *limits, concurrency=slots, weight=weight))
        self.limiters += self.members
        for limiter in self.limiters:
            if limiter not in self.members and self.chance.random() < 0.3:
                limiter.per_key(*self._some_limits(), alive=self.chance.choice([0, 1, 1_000]))
            self.oracle.know(limiter, 0)

    def _new_limiter(self, name: str) -> Limiter:
        limits, clock = self.chance.choice(LIMITS), self.time.clock
        slots = self._slots()
        return Limiter(*limits, concurrency=slots, name=name, clock=clock, wall_clock=clock)

    def _some_limits(self) -> tuple[Limit, ...]:
        return () if self.compares else self.chance.choice(LIMITS)

    def _slots(self) -> int | None:
        return self.chance.choice([None, None, 1, 2, 5])

    @property
    def now(self) -> int:
        return self.time.clock()

    async def play(self) -> None:
        """Do some sixty random things, and then let everything come to its end."""
        moves = [self.ask] * 12 + [self.ask_at_once] * 2 + [self.cancel] * 2
        moves += [self.pause, self.change, self.jump, *[self.start_or_end_agent] * 3]
        if self.compares:
            moves = [each for each in moves if each not in (self.change, self.jump)]
        for _ in range(self.chance.randint(10, 60) * (1 + 3 * self.compares)):
            self.chance.choice(moves)()
            await self.wait_a_little()
        deadline = self.now + int(LONG * SECOND)
        timeout = 7.0
        while pending := [task for task in self.tasks if not task.done()]:
            await asyncio.wait(pending, timeout=timeout)
            timeout *= 1.05
            await self.look()
            assert self.now < deadline, f"still waiting: {pending}"
        for task in self.tasks:
            task.result()
        self.oracle.check()
        if self.compares:
            self.oracle.check_shares()
        for scope, inside in (self.agents or {}).values():
            inside.run(scope.__exit__, None, None, None)
        await self.check_rest()

    async def wait_a_little(self) -> None:
        kind = self.chance.random()
        if kind < 0.5:
            for _ in range(self.chance.randint(0, 4)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self.chance.choice([0.1, 1.0, 3.3]) * self.chance.random())
            await self.look()

    async def look(self) -> None:
        await self.time.all_blocked()
        states = self.root.states() if isinstance(self.root, Pool) else []
        sticky = any(call.waits and call.is_sticky for call in self.oracle.calls)
        if not (sticky or any(state.reason for state in states)):
            self.oracle.assert_nobody_is_stuck(self.now)

    def _call(self) -> tuple[Limiter, Call, dict[str, Any]]:
        chance = self.chance
        limiter = chance.choice(self.limiters)
        if chance.random() < 0.2 and limiter not in self.members:
            limiter = limiter.key(f"tenant {chance.randint(0, 2)}")
        levels: list[Limiter] = []
        level: Limiter | None = limiter
        while level is not None:
            levels.append(level)
            level = level.parent
        for level in reversed(levels):
            self.oracle.know(level, self.now)
        tokens, requests = chance.choice([0, 1, 5, 10, 20, 45]), chance.choice([1, 1, 1, 2])
        above = [limit for member in self.members for limit in member.limits]
        if above and not self.compares and self.of_pools.random() < 0.3:  # too much for a member
            limit = self.of_pools.choice(above)
            tokens = limit.units + 1 if limit.resource == "tokens" else 0
            requests = limit.units + 1 if limit.resource == "requests" else 1
        call = Call(
            number=len(self.oracle.calls),
            path=tuple(each.name for each in levels),
            costs={"requests": requests, "tokens": tokens},
            priority=chance.choice([0, 0, 0, 1, -1]),
            asked=self.now,
            deadline=None,
        )
        return limiter, call, {"requests": requests, "tokens": tokens}

    def ask(self) -> None:
        limiter, call, amounts = self._call()
        timeout = self.chance.choice([None, None, None, 0.5, 5.0, 30.0])
        inside = contextvars.copy_context()
        if self.agents is not None:
            self.number += 1
            call.agent = self.number  # an agent of one call
            if self.agents and self.chance.random() < 0.8:
                call.agent = self.chance.choice(list(self.agents))
                inside = self.agents[call.agent][1]
        if isinstance(limiter, Pool) and not self.compares and self.of_pools.random() < 0.2:
            call.is_sticky = True
            amounts["sticky"] = self.of_pools.choice("pqr")
            self.number += 1
            call.agent = self.number
        acquire: Callable[..., Lease] = limiter.acquire
        lease = inside.run(acquire, **amounts, timeout=timeout, priority=call.priority)
        call.task = self.start(self.run(lease, call, timeout))

    def start_or_end_agent(self) -> None:
        """Let an agent come or go, perhaps before its calls are over."""
        if self.agents is None:
            return
        if self.agents and self.chance.random() < 0.4:
            scope, inside = self.agents.pop(self.chance.choice(list(self.agents)))
            inside.run(scope.__exit__, self.chance.choice([None, OSError]), None, None)
            return
        expects = self.chance.choice([None, None, 0, 30, 200])
        scope = agent(kind=self.chance.choice("ab"), expects=expects)
        inside = contextvars.copy_context()
        inside.run(scope.__enter__)
        self.number += 1
        self.agents[self.number] = scope, inside

    def start(self, running: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.tasks.append(asyncio.get_running_loop().create_task(running))
        return self.tasks[-1]

    async def run(self, lease: Lease, call: Call, timeout: float | None) -> None:
        call.asked = self.now  # it stands in line from now on
        if self.agents is not None and call.agent not in self.agents:  # over: the call is alone
            self.number += 1
            call.agent = self.number
        if timeout is not None:
            call.deadline = self.now + round(timeout * SECOND)
        self.oracle.asked(call)
        try:
            await lease
        except (AcquireTimeout, CostExceedsLimit) as error:
            call.gone = min(self.now, call.deadline or self.now)
            is_refused = isinstance(error, CostExceedsLimit)
            can_pass = self.oracle.can_pass(call, call.asked, self.now)
            assert not (is_refused and can_pass), f"refused, though within limits: {call}"
            return
        except asyncio.CancelledError:
            call.gone = self.now if call.gone is None else call.gone
            return
        self.oracle.admitted(call, lease._when, lease)
        await self.use(lease, call)

    async def use(self, lease: Lease, call: Call) -> None:
        try:
            await self.settle_and_end(lease, call)
        except asyncio.CancelledError:
            if call.ended is None:
                call.ended = self.now
            lease.failed()

    async def settle_and_end(self, lease: Lease, call: Call) -> None:
        chance = self.chance
        for _ in range(0 if self.compares else chance.choice([0, 0, 1, 1, 2])):
            await asyncio.sleep(chance.choice([0, 0.3, 4]))
            tokens = chance.randint(0, 70)
            lease.settle(tokens=tokens)
            self.oracle.settled(call, {"tokens": tokens}, self.now)
        await asyncio.sleep(chance.choice([0, 0, 0.5, 5]))
        call.ended = self.now
        ends = [lease.release, lease.overloaded, lease.failed, lease._undo, None]
        end = chance.choice(ends[:3] if self.compares else ends)
        if isinstance(lease, PoolLease) and not self.compares and self.of_pools.random() < 0.05:
            end = functools.partial(lease.member_failed, "HTTP 500")
        if end is not None:
            end()
        if end == lease._undo:
            self.oracle.settled(call, {"tokens": 0, "requests": 0}, self.now)
        elif end is not None and not self.compares and chance.random() < 0.2:
            await asyncio.sleep(chance.choice([1, 30]))
            lease.settle(tokens=1)
            self.oracle.settled(call, {"tokens": 1}, self.now)

    def ask_at_once(self) -> None:
        limiter, call, amounts = self._call()
        free = not any(each.waits for each in self.oracle.calls) and all(
            self.oracle.has_room(level, call, self.now) for level in self.oracle.above(call)
        )
        if isinstance(self.root, Pool) and call.path[-1] == self.root.name:
            failed = {state.name for state in self.root.states() if state.reason}
            names = set(self.oracle.members) - failed
            levels = [self.oracle.levels[name] for name in names]
            free = free and any(self.oracle.has_room(each, call, self.now) for each in levels)
        unstarted = any(not task.done() for task in self.tasks)
        try:
            lease = limiter.acquire_nowait(**amounts)
        except (WouldBlock, CostExceedsLimit):
            assert not free or unstarted, f"refused without reason: {call}"
            return
        self.oracle.asked(call)
        self.oracle.admitted(call, self.now, lease)
        call.priority = 0
        self.start(self.use(lease, call))  # not to be cancelled before it has begun

    def cancel(self) -> None:
        tasks = [call for call in self.oracle.calls if call.task and not call.task.done()]
        if tasks:
            call = self.chance.choice(tasks)
            assert call.task is not None
            call.task.cancel()
            if call.waits:
                call.gone = self.now

    def pause(self) -> None:
        limiter = self.chance.choice(self._with_limits())
        seconds = self.chance.choice([0.0, 0.5, 4.0])
        limiter.pause(seconds)
        pauses = self.oracle.levels[limiter.name].pauses
        pauses.append((self.now, self.now + int(seconds * SECOND)))

    def _with_limits(self) -> list[Limiter]:
        """Return the limiters that have limits of their own: all but a pool."""
        if self.compares:
            return self.members or [self.root]
        return self.limiters[bool(self.members) :]

    def change(self) -> None:
        limiter = self.chance.choice(self._with_limits())
        limits: list[Limit] = []
        for limit in limiter.limits:
            factor = self.chance.choice([0.5, 1, 2])
            amount = max(1, round(limit.amount * self.chance.choice([0.8, 1, 1.5])))
            burst = limit.burst and max(1, min(amount, round(factor * limit.burst)))
            limits.append(replace(limit, amount=amount, burst=burst))
        known = {limit.key for limit in limits}
        limits += [each for each in self._some_limits() if each.key not in known]
        slots = None if limiter.concurrency is None else self.chance.choice([1, 2, 5])
        limiter.reconfigure(*limits, concurrency=slots)
        self.oracle.note_terms(limiter, self.now)

    def jump(self) -> None:
        """Block the loop."""
        before = self.now
        self.time.advance(self.chance.choice([0.02, 1.0, 6.0, 200.0]) * self.chance.random())
        jumps = self.oracle.jumps
        if jumps and jumps[-1][1] == before:
            before, _ = jumps.pop()
        jumps.append((before, self.now))

    async def check_rest(self) -> None:
        """Assert that nothing is left over."""
        await asyncio.sleep(LONG)
        for limiter in self.limiters:
            now = limiter.statistics()
            assert (now.waiting, now.in_flight) == (0, 0), now
            assert now.agents is None or not now.agents.running, now
            for use in now.limits:
                assert (use.used, use.available) == (0, burst_of(use.limit)), now


def play(seed: int) -> None:
    """Play the history of a seed.

    Raises:
        AssertionError: a promise was broken; the message begins with the seed.
    """
    with virtual_time() as time:
        history = History(time, seed)
        try:
            time.run(history.play())
        except (AssertionError, DeadlockError) as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def main() -> int:
    """Play histories until the time is up; show the seeds of those that broke a promise."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    if options.seed is not None:
        play(options.seed)
        return 0
    end, failed, played = real_time.monotonic() + options.seconds, 0, 0
    first = random.SystemRandom().randrange(10**12)
    while real_time.monotonic() < end:
        with contextlib.suppress(KeyboardInterrupt):
            try:
                play(first + played)
            except AssertionError as error:
                failed += 1
                sys.stdout.write(f"{error}\n")
        played += 1
    sys.stdout.write(f"{played:,} histories from seed {first}, {failed} broke a promise\n")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
