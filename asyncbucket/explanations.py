"""What `Limiter.explain` says: what binds a call, how long it would wait, and what would help.

An explanation plays the line through, on copies of the meters: nothing is taken. It asks the same
function and the same store as whoever admits calls.
"""

import collections
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncbucket.agents import Agent, Agents
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import NEVER, Amounts, Route, admit, take
from asyncbucket.engine.node import Node
from asyncbucket.engine.queue import AnyWaiter, Line
from asyncbucket.engine.report import ways_of
from asyncbucket.engine.wording import counted, in_seconds, named, rounded, with_verb, written

if TYPE_CHECKING:
    from asyncbucket.engine.interfaces import Place
    from asyncbucket.engine.pacer import Pacer


@dataclass(frozen=True, slots=True)
class Rate:
    """Show how many calls like the one in question a limit admits in the long run."""

    #: The limiter with this limit: the one asked, or one above it.
    limiter: str
    limit: Limit
    #: Calls a second.
    calls: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Say which limit binds a call, how long it would wait, and what would have to change.

    ``print`` it: it reads as a sentence.
    """

    cost: Cost
    #: Seconds until such a call would pass, after all those ahead of it. None if that depends on a
    #: slot being given back, or on the store that keeps the limits, of which only the latest reply
    #: is known. Settling and cancelling shorten it. Where children or priorities share a limit, it
    #: is an estimate: calls that come later may go first, and so may this one.
    wait: float | None
    #: What most of the wait would be for: ``"requests"``, ``"tokens"``, ``"concurrency"``,
    #: ``"paused"``; None if it would pass at once.
    bound_by: str | None
    #: Calls that may go before it: those that wait, except less urgent ones and those held up by
    #: limits that do not apply to it.
    ahead: int
    #: How many such calls each limit admits in the long run, the tightest first.
    rates: tuple[Rate, ...]
    #: Agents whose calls go before it: see `asyncbucket.agent`.
    agents: int = 0
    #: How many such calls a second all members of a pool admit together; then ``rates`` has the
    #: tightest limit of each.
    together: float | None = None
    #: Why the limiter is paused, in brackets, if somebody said.
    why_paused: str = ""
    #: How the provider counts these limits, in sentences, as far as its replies have shown.
    beliefs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join([self._now(), *self._in_the_long_run(), *self.beliefs])

    def _now(self) -> str:
        behind = f" behind {counted(self.ahead, 'calls')}" if self.ahead else ""
        if self.agents:
            behind += f" of {counted(self.agents, 'agents')}"
        if self.bound_by is None:
            return f"a call would pass at once{behind}"
        if self.bound_by == "concurrency" and self.wait is None:
            return f"a call would wait{behind} until a slot is given back"
        why = with_verb(self.bound_by, "bind")
        if self.bound_by == "paused":
            why = f"the limiter is paused{self.why_paused}"
        for_so_long = "" if self.wait is None else f" {in_seconds(self.wait)}"
        return f"a call would wait{for_so_long}{behind}: {why}"

    def _in_the_long_run(self) -> list[str]:
        if not self.rates:
            return ["no limit over time binds such calls"]
        first, *others = self.rates
        unit, seconds = _unit(first)
        if self.together is not None:
            number = rounded(self.together * seconds)
            each = "; ".join(f"{rate.limiter}: {rate.limit}" for rate in self.rates)
            return [f"its members allow {number} such calls {unit} together ({each})"]
        number, what = rounded(first.calls * seconds), with_verb(first.limit.resource, "allow")
        calls = "call" if number == "1" else "calls"
        sentences = [f"{what} {number} such {calls} {unit} ({self._written(first)})"]
        for other in others[:1]:
            number, what = rounded(other.calls * seconds), named(other.limit.resource)
            without = f"without that limit, {what} would allow {number} {unit}"
            sentences.append(f"{without} ({self._written(other)})")
        return sentences

    def _written(self, rate: Rate) -> str:
        limit = rate.limit
        burst, text = limit.burst_units, str(limit)
        if burst is not None and burst < limit.units:
            text += f", burst {written(burst, limit.resource)}"
        several = any(other.limiter != rate.limiter for other in self.rates)
        return f"{rate.limiter}: {text}" if several else text


def explain_locked(
    node: Node, amounts: dict[str, int], priority: int, agent: Agent | None
) -> Explanation:
    """Explain what would happen to a call of these amounts; called with the lock held."""
    pacer: Pacer = node.pacer
    now = pacer.clock()
    before, agents = [call for call in _in_order(pacer) if call.line.priority >= priority], 0
    if isinstance(node.standing.order, Agents):
        before, agents = node.standing.order.ahead(before, agent, amounts)
    copies, ahead, when, waits = _simulate_line(node, now, before)
    due, binds, _ = _soonest_way(ways_of(node, amounts), amounts, when, when, copies)
    waits[binds] += due - when
    when = due
    ((bound_by, _),) = waits.most_common(1)
    if not _with_slots(ways_of(node, amounts)):
        when, bound_by = NEVER, "concurrency"
    rates = _rates(node, amounts)
    due, binds, ahead_in_store = _in_stores(node, amounts, now)
    if due > when:
        when, bound_by = due, binds
    return Explanation(
        cost=Cost.of(amounts),
        wait=None if when >= NEVER else (when - now) * 1e-9,
        bound_by=bound_by if when > now else None,
        ahead=ahead + ahead_in_store,
        rates=tuple(sorted(rates, key=lambda rate: rate.calls)),
        agents=agents,
        together=sum(rate.calls for rate in rates) if node.ways else None,
        why_paused=node.why_paused(),
        beliefs=tuple(_beliefs(node, amounts)),
    )


def _beliefs(node: Node, amounts: Amounts) -> Iterator[str]:
    """Yield what is known of how the provider counts such a call."""
    meters: list[Any] = [pair for each in ways_of(node, amounts) for pair in each.route.meters]
    for meter, resource in meters:
        if meter.learns and meter.belief is not None and amounts.get(resource):
            yield meter.belief.words(meter.limit)


def _with_slots(ways: list[Node]) -> list[Node]:
    """Return those on which a slot is free."""
    return [
        each for each in ways if all(level.in_flight < level.most for level in each.route.bounded)
    ]


def _soonest_way(
    ways: list[Node], amounts: Amounts, since: int, now: int, copies: dict[int, object]
) -> tuple[int, str | None, Route]:
    """Return when such a call could pass by copies of the meters, what binds, and which way."""
    routes = [_copied(each, copies) for each in _with_slots(ways) or ways[:1]]
    dues = [(*admit(each, amounts, since, now, book=False), each) for each in routes]
    return min(dues, key=lambda due: due[0])


def _copied(node: Node, copies: dict[int, object]) -> Route:
    """Return the route from a limiter through copies of its meters; slots count nowhere."""
    return Route((), copy.deepcopy(node.route.meters, copies))


def _in_order(pacer: "Pacer") -> list[AnyWaiter]:
    """Return all who wait: in order of arrival, but for lines that go by agent."""
    places: list[tuple[int, AnyWaiter]] = []
    for line in (line for tree in pacer.trees for line in tree.top.lines()):
        calls = [each for each in line.calls if line in each.lines and not each.done()]
        places += zip(sorted(waiter.number for waiter in calls), calls, strict=True)
    return list(dict.fromkeys(waiter for _, waiter in sorted(places, key=lambda place: place[0])))


def _simulate_line(
    node: Node, now: int, before: list[AnyWaiter]
) -> tuple[dict[int, object], int, int, collections.Counter[str | None]]:
    """Book all calls ahead in copies of the meters, in order.

    Return the copies, how many calls there are, when the last one passes, and how long they wait for
    what. Slots do not count: nobody knows when one comes back, and those that are free now will.
    """
    copies: dict[int, object] = {}
    # Lines whose first waits for limits that do not apply to the call.
    held_lines: set[Line] = set()
    waits: collections.Counter[str | None] = collections.Counter()
    ahead, when = 0, now
    passed = {level for way in node.ways or (node,) for level in way.path}
    for waiter in before:
        amounts = waiter.amounts
        for line in waiter.lines:
            others = [level for level in line.node.chain if level not in passed]
            own = [admit(level.own, amounts, line.since, now, book=False) for level in others]
            if any(due > now for due, _ in own):
                held_lines.add(line)
        lines = [line for line in waiter.lines if line not in held_lines]
        if not lines:
            continue
        ahead += 1
        since, ways = lines[0].since, [line.node for line in lines]
        due, binds, route = _soonest_way(ways, amounts, since, when, copies)
        if due > when:
            waits[binds] += due - when
            when = due
        take(route, amounts, when)
    return copies, ahead, when, waits


def _in_stores(node: Node, amounts: Amounts, now: int) -> tuple[int, str | None, int]:
    """Return when the store may admit such a call, what binds, and how many calls are ahead.

    It is `now` without a store. What is known is as last heard. `NEVER` means that it depends on
    the store, or on a slot being given back.
    """
    answers = [_in_store(level, level.place, amounts, now) for level in node.chain if level.place]
    due, binds, _ = max(answers, key=lambda answer: answer[0], default=(now, None, 0))
    return due, binds, sum(ahead for _, _, ahead in answers)


def _in_store(
    level: Node, place: "Place", amounts: Amounts, now: int
) -> tuple[int, str | None, int]:
    known, ahead = place.held_up(), sum(not each.done() for each in place.calls)
    if known is not None and known[0]:
        return (known[1] if ahead <= 1 else NEVER), known[0], ahead  # known of the first alone
    if level.slots.in_flight >= level.slots.most:
        return NEVER, "concurrency", ahead
    for use in place.use():
        if use.available < amounts.get(use.limit.resource, 0):
            return NEVER, use.limit.resource, ahead
    return now, None, ahead


def _rates(node: Node, amounts: Amounts) -> list[Rate]:
    if node.ways:
        each = (_rates(way, amounts) for way in ways_of(node, amounts))
        return [min(rates, key=lambda rate: rate.calls) for rates in each if rates]
    return [
        Rate(level.name, limit, _units(level, limit) / limit.per / amounts[limit.resource])
        for level in node.path
        for limit in (window.limit for window in level.limits.values())
        if amounts.get(limit.resource)
    ]


def _units(level: Node, limit: Limit) -> int:
    """Return how many units pass in a window in the long run: the limit, or what the provider takes."""
    beliefs = (meter.belief for meter in level.beside(limit.key))
    return min([limit.units, *(belief.rate for belief in beliefs if belief)])


def _unit(rate: Rate) -> tuple[str, int]:
    """Return a unit at least as long as the window, so that the rate is no fraction; and its seconds."""
    units = (("a second", 1), ("a minute", 60), ("an hour", 3_600))
    fit = (unit for unit in units if unit[1] >= rate.limit.per and rate.calls * unit[1] >= 1)
    return next(fit, ("a day", 86_400))
