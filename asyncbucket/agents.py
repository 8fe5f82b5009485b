"""Order the calls of one limiter by the agents that make them, so that agents finish early.

Whoever runs many agents on one key waits for agents, not for calls. Served by call, every agent
finishes near the end; with fair shares, too. So agents go in the order in which fair sharing
*would* finish them, after the fair sojourn protocol (Friedman and Henderson, SIGMETRICS 2003), and
most finish far earlier.

Virtual time V is what fair sharing would have given to each agent that waits: each call that passes
adds its work (`Node.work`, seconds of the limits), divided by the number of agents that have calls
waiting. An agent that arrives at V and needs ``size`` would finish at its *tag*, V + size. The
lowest tag goes first, and an agent's own calls go in order of arrival. A call outside any agent is
an agent of one call.

Nobody starves: if at most n others wait at a time, V reaches the tag of an agent after at most
(n + 1) x size of the limit's time, and from then on every newcomer's tag is later. In the paper, an
agent that is done counts until fair sharing would have finished it, too. In a closed loop, where the
next agent comes as soon as one is done, ever more of those would count, V would grow ever more
slowly, and newcomers would go first for ever. So only those count that wait. The price is part of
the gain where agents keep coming: their tags are later than the paper's.

An agent that makes no call for a while keeps its tag, unless V grows meanwhile by more than it has
used: what is beyond that is added to its tag. So whoever comes back after hours is no earlier than
its own use allows.

Sizes are learned. The expected size of an agent is the mean of its kind's latest runs; once the
agent has used more than that, it is the mean of those runs that were larger than what it has used.
If what it then still needs is at most half of what a new one of its kind needs, it keeps its tag:
it is nearly done, and to serve others first would let it wait for nothing. If no run was larger, the
agent pays as it goes: its tag is V at its arrival plus what it has used, which is fair sharing. As
long as nothing is known of a kind, its first agent gets more than its share, so that its size is
soon known for the others, who pay for that. So no kind waits for another one to become known.

All of this is called with the pacer's lock held, unless it says otherwise.
"""

import contextlib
import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import fsum
from typing import Any, Final, Self, TypeAlias

from asyncbucket.engine.context import Inherited, InheritedScope, inherited, read_text
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.events import AgentFinished, AgentStarted
from asyncbucket.engine.interfaces import Account, Admission
from asyncbucket.engine.meters import Amounts
from asyncbucket.engine.node import Node
from asyncbucket.engine.statistics import AgentKind, AgentStatistics

# Tenants share what is known of sizes; and an account is told more than it needs.
# ruff: noqa: ARG002, SLF001

#: How many finished runs are kept of a kind, and how many kinds.
_RUNS: Final = 200
_KINDS: Final = 200
#: What part of a new agent's size is little enough for one that runs to stay in its place.
_NEARLY_DONE: Final = 0.5
#: How many shares the first agent of an unknown kind gets at most, so that its size is known soon.
_PILOT: Final = 4.0

_Sizes: TypeAlias = deque[float]


@dataclass(eq=False, repr=False, slots=True)
class Agent:
    """One run of an agent: what its calls have in common."""

    name: str | None
    kind: str | None
    expects: Mapping[str, int] | None
    is_over: bool = False
    #: What orders its calls, at each limiter that it used.
    limiters: list["Agents"] = field(default_factory=list)

    def end(self, *, ended_well: bool) -> None:
        """Tell the limiters that it is over."""
        self.is_over = True
        for agents in self.limiters:
            agents.end(self, ended_well=ended_well)

    def account(self, node: Node, amounts: Amounts) -> "AgentRun | None":
        """Return the run that pays for a call; None once it is over."""
        return None if self.is_over else account_of(self, node, amounts)


class AgentRun(Account):
    """One agent at one limiter, or one call that no agent makes."""

    def __init__(
        self, agents: "Agents", agent: Agent | None, size: float | None, number: int
    ) -> None:
        self._agents, self.agent = agents, agent
        #: When it made its first call here (ns).
        self.began = 0
        #: Its calls that wait; V when it came, and when its last call that waited was gone; what it has
        #: used, and with its first call if it is of unknown size; and its place in line.
        self.calls: set[Admission] = set()
        self.start = self.left = self.tag = agents.clock
        self.used = self.first = 0.0
        self.expect(size)
        #: Who goes first among equals: whoever came first.
        self.number = number

    def expect(self, size: float | None, shares: float = 1.0, first: float = 0.0) -> None:
        """Set what it is expected to use; None if nobody knows: then it pays as it goes.

        Beyond what it uses ``first``, it has so many fair shares.

        Its tag never falls, so that its calls stay in order, also if some got back what they had paid.
        """
        self.is_open = size is None
        self.size = self.used if size is None else size
        self.tag = max(self.tag, self.start + first + (self.size - first) / shares)

    def wait(self, lease: Admission) -> None:
        """Take in that a call waits; hearing it again changes nothing."""
        if not self.calls:
            self._agents.waiting += 1
            missed = max(0.0, self._agents.clock - self.left - self.used)
            self.start += missed
            self.tag += missed
        self.calls.add(lease)

    def gave_up(self, lease: Admission) -> None:
        if lease in self.calls:
            self.calls.remove(lease)
            self.left = self._agents.clock
            self._agents.waiting -= not self.calls

    def passed(self, lease: Admission, now: int) -> None:
        agents = self._agents
        work = agents.node.work(lease.amounts)
        agents.clock += work / max(1, agents.waiting)
        self.gave_up(lease)
        agents.correct(self, work)

    def settled(self, lease: Admission, before: Amounts, after: Amounts) -> None:
        work = self._agents.node.work
        self._agents.correct(self, work(after) - work(before))


class Agents:
    """Keep the agents that run at one limiter, and the sizes of those that finished."""

    def __init__(self, node: Node, above: "Agents | None") -> None:
        self.node = node
        #: What the latest runs of each kind have used.
        self._sizes: dict[str | None, _Sizes] = {} if above is None else above._sizes
        #: Those that run here; and those of each kind, in order of arrival.
        self.runs: dict[Agent, AgentRun] = {}
        self._running: dict[str | None, dict[Agent, AgentRun]] = {}
        self._finished = self._numbers = 0
        #: Virtual time; and how many runs have calls that wait.
        self.clock, self.waiting = 0.0, 0

    def run_of(self, agent: Agent, work: float) -> AgentRun | None:
        """Return the run of ``agent`` here, which begins with a first call of ``work``; None if it is over."""
        run = self.runs.get(agent)
        if run is None and not agent.is_over:
            run = self.runs[agent] = self.enter(agent, self._size_of(agent))
            run.first = work * run.is_open  # it needs at least its first call
            run.tag += run.first
            self._running.setdefault(agent.kind, {})[agent] = run
            run.began = self.node.pacer.clock()
            agent.limiters.append(self)
            self.node.pacer.notify_locked(self.node, AgentStarted, kind=agent.kind)
        return run

    def ahead(
        self, calls: Iterable[Any], agent: Agent | None, amounts: Amounts
    ) -> tuple[list[Any], int]:
        """Return which of ``calls`` would go before one of ``agent``, and how many other agents'."""
        run = None if agent is None else self.runs.get(agent)
        work = self.node.work(amounts)
        size = work if agent is None else self._size_of(agent)
        tag = self.clock + (work if size is None else size) if run is None else run.tag
        runs = [(call, run_of(call.lease)) for call in calls]
        before = [
            (call, theirs)
            for call, theirs in runs
            if theirs is None or call.line.node.standing.order is not self or theirs.tag <= tag
        ]
        agents = {theirs.agent for _, theirs in before if theirs is not None} - {None, agent}
        return [call for call, _ in before], len(agents)

    def _size_of(self, agent: Agent) -> float | None:
        """Return what an agent is expected to use that has just come."""
        told = agent.expects
        return self.expected(agent.kind) if told is None else self.node.work(told)

    def enter(self, agent: Agent | None, size: float | None) -> AgentRun:
        """Return a new run of an agent, or of a call that no agent makes."""
        self._numbers += 1
        return AgentRun(self, agent, size, self._numbers)

    def expected(self, kind: str | None, above: float = -1.0) -> float | None:
        """Return the mean size of finished runs that used more than ``above``; None if there is none."""
        sizes = [size for size in self._sizes.get(kind, ()) if size > above]
        return fsum(sizes) / len(sizes) if sizes else None

    def correct(self, run: AgentRun, work: float) -> None:
        """Take in what a call has paid or, if negative, got back."""
        run.used += work
        if run.used > run.size:
            self._resize(run)

    def _resize(self, run: AgentRun) -> None:
        """Expect more of an agent that has used more than expected."""
        if run.agent not in self.runs:
            return
        kind = run.agent.kind
        size = self.expected(kind, run.used)
        little = 0.0 if run.is_open else (self.expected(kind) or 0.0) * _NEARLY_DONE
        if size and size - run.used <= little:
            run.size = size
        else:
            run.expect(size, *self._shares(run, kind))

    def _shares(self, run: AgentRun, kind: str | None) -> tuple[float, float]:
        """Return how many shares an agent of unknown size has, and what it uses before that counts.

        The first of a kind has more, the others have less: all together as many as there are.
        """
        if kind in self._sizes:
            return 1.0, 0.0
        alike = self._running[kind]
        others = len(alike) - 1
        pilot = min(_PILOT, 1 + others / 2)
        is_first = run.agent is next(iter(alike))
        return (pilot, 0.0) if is_first else (1 - (pilot - 1) / others, run.first)

    def end(self, agent: Agent, *, ended_well: bool) -> None:
        """Forget an agent; one that ended well shows how large its kind is. Without the lock."""
        self.node.pacer.lock.do_and_tell(self._end_locked, agent, ended_well)

    def _end_locked(self, agent: Agent, ended_well: bool) -> None:  # noqa: FBT001 - `do` has no keywords
        run, alike = self.runs.pop(agent), self._running[agent.kind]
        del alike[agent]
        if not alike:
            del self._running[agent.kind]
        node, now = self.node, self.node.pacer.clock()
        if ended_well:
            self._finished += 1
            if agent.kind not in self._sizes and len(self._sizes) >= _KINDS:
                self._sizes.pop(next(iter(self._sizes)))
            self._sizes.setdefault(agent.kind, deque(maxlen=_RUNS)).append(run.used)
            for other in alike.values():
                if other.is_open and other.used < run.used:  # else it stays so
                    self._resize(other)
        seconds = (now - run.began) * 1e-9
        node.pacer.notify_locked(
            node, AgentFinished, kind=agent.kind, seconds=seconds, ended_well=ended_well
        )

    @property
    def applies(self) -> bool:
        """Whether calls go by agent now, because any runs."""
        return bool(self.runs)

    def arrange(self, calls: Iterable[Any]) -> "deque[Any] | CallsByAgent":
        """Return a line of ``calls``: by agent while any runs, else in order of arrival."""
        return CallsByAgent(self, calls) if self.runs else deque(sorted(calls))

    def statistics(self) -> AgentStatistics:
        """Return a frozen snapshot."""
        return AgentStatistics(
            running=len(self.runs),
            finished=self._finished,
            kinds={
                kind: AgentKind(
                    running=len(self._running.get(kind, ())),
                    known=len(self._sizes.get(kind, ())),
                    size=self.expected(kind),
                )
                for kind in {*self._running, *self._sizes}
            },
        )


class CallsByAgent:
    """Hold the calls of a line in the order of their agents' tags; to be used like a deque."""

    def __init__(self, agents: Agents, calls: Iterable[Any]) -> None:
        self._agents = agents
        #: A tag may have grown since: then the entry is put back when it is first.
        self._heap: list[tuple[float, int, int, Any, AgentRun]] = []
        for call in sorted(calls):
            self.append(call)

    def append(self, call: Any) -> None:
        """Add a call, unless it has given up meanwhile."""
        if call.done():
            return
        run = run_of(call.lease)
        if run is None:
            run = self._agents.enter(None, self._agents.node.work(call.amounts))
            call.lease.accounts = (*call.lease.accounts, run)
        run.wait(call.lease)
        heapq.heappush(self._heap, (run.tag, run.number, call.number, call, run))

    def popleft(self) -> Any:
        """Take the first call out."""
        first = self[0]
        heapq.heappop(self._heap)
        return first

    def __getitem__(self, index: int) -> Any:
        """Return the first call; no other can be asked for."""
        heap = self._heap
        while True:
            tag, number, _, call, run = heap[index]
            if call.done() or run.tag <= tag:
                return call
            heapq.heapreplace(heap, (run.tag, number, call.number, call, run))

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Any]:
        """Yield the calls in order."""
        return (call for *_, call, _ in sorted(self._heap))


def run_of(lease: Admission) -> AgentRun | None:
    """Return the run that a call is part of; None if it waits where no agent runs."""
    return next((each for each in lease.accounts if isinstance(each, AgentRun)), None)


def account_of(agent: Agent, node: Node, amounts: Amounts) -> AgentRun:
    """Return the run that pays for a call: the agent's, or one of its own if the agent is over."""
    with node.pacer.lock:
        agents = agents_of(node)
        work = node.work(amounts)
        return agents.run_of(agent, work) or agents.enter(None, work)


def agents_of(node: Node) -> Agents:
    """Return what orders the calls of a limiter by agent; tenants share what is known of sizes."""
    node = node.common or node
    agents = node.standing.order
    if not isinstance(agents, Agents):
        above = agents_of(node.parent) if node.parent is not None and "/*" in node.name else None
        agents = node.standing.order = Agents(node, above)
        for way in node.ways:
            way.standing.order = agents
    return agents


def running_agent(context: Inherited | None) -> Agent | None:
    """Return the agent whose run code in ``context`` is part of, until it is over."""
    payers = () if context is None else context.payers
    return next((each for each in payers if isinstance(each, Agent) and not each.is_over), None)


class _AgentScope(InheritedScope):
    """Make the calls inside those of one agent, unless they are another's already."""

    __slots__ = ()

    def __enter__(self) -> Self:
        if running_agent(inherited.get()) is not None:
            self._values = {}
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for agent in self._values.get("payers", ()):
            agent.end(ended_well=error[0] is None)


def agent(
    name: str | None = None, kind: str | None = None, expects: Cost | int | None = None
) -> contextlib.AbstractContextManager[None, None]:
    """Make all calls inside those of one agent, from which limiters see when agents will finish.

    A limiter under which several agents' calls wait serves them in the order in which fair sharing
    would finish the agents: see `asyncbucket.agents`. Agents finish far earlier on average
    than with calls in order of arrival, in the same total time. Scopes inside this one belong to
    it: a sub-agent is part of its agent.

    >>> with asyncbucket.agent("a17", kind="research"):
    ...     await workflow.run(...)

    Args:
        name: what you call this run; it is shown to nobody else.
        kind: what agents of about the same size have in common; their sizes are learned by kind.
            Telemetry shows it.
        expects: what all calls together will cost, if you know: a `Cost`, or a number of tokens.

    Raises:
        ValueError: ``name`` or ``kind`` is not a string, or is empty; ``expects`` is negative.
        TypeError: ``expects`` is not a `Cost` or a number.
    """
    read_label(name, "name")
    read_label(kind, "kind")
    if expects is not None and not isinstance(expects, Cost):
        expects = Cost(tokens=expects)
    return _AgentScope(payers=(Agent(name, kind, expects),))


def read_label(text: str | None, what: str) -> str | None:
    """Return the name or the kind of an agent, if there is one; see `read_text`."""
    return None if text is None else read_text(text, f"an agent's {what}")
