"""Agents are ordered, not calls: in the order in which fair shares would finish them."""

import asyncio
import contextlib
import gc
import statistics
import sys
from typing import Any

import pytest

from asyncbucket import Cost, Limiter, agent, priority, tenant
from asyncbucket.agents import Agents
from asyncbucket.engine.statistics import AgentStatistics
from asyncbucket.events import AgentFinished, AgentStarted, Event
from asyncbucket.testing import VirtualTime, virtual_time
from benchmarks.agents import MIXES, play

#: One call a second, one at a time.
RATE = "60 RPM burst 1"


def agents_of(limiter: Limiter) -> AgentStatistics:
    agents = limiter.statistics().agents
    assert agents is not None
    return agents


class Crowd:
    """Agents that make calls under one limiter; the names of those whose calls have passed."""

    def __init__(self, time: VirtualTime, limit: str = RATE) -> None:
        self.limiter = Limiter(limit, clock=time.clock)
        self.passed: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.limiter.pause(1)

    async def start(self, name: str, calls: int, **scope: Any) -> asyncio.Task[None]:
        """Start an agent whose calls are asked for at once; return when they wait."""

        async def one() -> None:
            async with self.limiter.acquire():
                self.passed.append(name)

        async def run() -> None:
            with agent(name, **scope):
                await asyncio.gather(*(one() for _ in range(calls)))

        task = asyncio.ensure_future(run())
        self.tasks.append(task)
        for _ in range(3):
            await asyncio.sleep(0)
        return task

    async def order(self) -> str:
        """Wait for all; return the names in the order in which their calls passed."""
        await asyncio.gather(*self.tasks)
        return "".join(self.passed)


@pytest.mark.parametrize(
    ("agents", "order"),
    [
        ({"a": (5, 5), "b": (2, 2), "c": (3, 3), "d": (2, 2)}, "bbddcccaaaaa"),
        ({"a": (4, None), "b": (4, None), "c": (4, None)}, "aaabbccabbcc"),
    ],
    ids=["shortest first", "the first shows how large they are, by two of three shares"],
)
async def test_agents_finish_as_fair_shares_would_finish_them(
    time: VirtualTime, agents: dict[str, tuple[int, int | None]], order: str
) -> None:
    crowd = Crowd(time)
    for name, (calls, size) in agents.items():
        await crowd.start(name, calls, expects=None if size is None else Cost(requests=size))
    assert await crowd.order() == order


async def test_newcomer_waits_for_those_that_would_finish_before_it(time: VirtualTime) -> None:
    crowd = Crowd(time)
    for name in "ab":
        await crowd.start(name, 10, expects=Cost(requests=10))
    await asyncio.sleep(8.5)
    for name, calls in ("s", 5), ("t", 7):
        await crowd.start(name, calls, expects=Cost(requests=calls))
    assert await crowd.order() == "a" * 8 + "s" * 5 + "a" * 2 + "b" * 10 + "t" * 7


async def test_sizes_are_learned_by_kind(time: VirtualTime) -> None:
    """An agent that has used more than its kind's mean is as large as those that used more, too."""
    crowd = Crowd(time, "600 RPM burst 1")
    for kind, calls in ("chat", 2), ("chat", 4), ("deep", 12):
        await (await crowd.start("-", calls, kind=kind))
    known = agents_of(crowd.limiter)
    assert (known.running, known.finished) == (0, 3)
    assert {kind: each.known for kind, each in known.kinds.items()} == {"chat": 2, "deep": 1}
    assert known.kinds["chat"].size == pytest.approx(0.3)
    assert known.kinds["deep"].size == pytest.approx(1.2)
    crowd.passed.clear()
    crowd.limiter.pause(1)
    await crowd.start("d", 4, kind="deep")
    await crowd.start("n", 4, kind="new")  # fair shares, whatever it will need
    await crowd.start("c", 4, kind="chat")  # 3 calls; from the fourth on, 4
    assert await crowd.order() == "nnnnccccdddd"


@pytest.mark.parametrize(
    ("earlier", "order"),
    [((8, 12), "a" * 12 + "b" * 12), ((2, 18), "a" * 11 + "b" * 11 + "ab")],
    ids=["nearly done, it goes on", "far from done, others go first"],
)
async def test_agent_above_the_mean_keeps_its_place_if_it_is_nearly_done(
    time: VirtualTime, earlier: tuple[int, int], order: str
) -> None:
    crowd = Crowd(time)
    for calls in earlier:  # 10 calls in the mean
        await (await crowd.start("-", calls, kind="k"))
    crowd.passed.clear()
    crowd.limiter.pause(1)
    for name in "ab":
        await crowd.start(name, 12, kind="k")
    assert await crowd.order() == order


async def test_each_way_to_ask_counts_as_settled_for_the_outermost_agent(time: VirtualTime) -> None:
    """Tenants share what is known of sizes; a call whose agent is over is one of its own."""
    limiter = Limiter("600 tokens/min", clock=time.clock)

    async def later() -> None:
        await asyncio.sleep(5)
        (await limiter.acquire(tokens=9)).release()

    tasks: list[asyncio.Task[None]] = []
    asks = limiter.acquire_nowait, limiter.acquire_sync
    for used, kind, ask in (400, "a", asks[0]), (40, "b", asks[1]), (0, "c", asks[0]):
        with tenant("acme"), agent(kind=kind), agent(kind="inner"):
            lease = ask(tokens=40)
            tasks.append(asyncio.ensure_future(later()))
            asked = limiter.acquire(tokens=1)
            if used:
                lease.settle(tokens=used)
        lease.settle(tokens=used)
        lease.settle(tokens=used + 50)  # too late
        await asked
    await asyncio.gather(*tasks)
    with tenant("globex"), agent(kind="a"):
        (await limiter.acquire(tokens=0)).release()
        known = agents_of(limiter.key("globex"))
    assert {kind: each.size for kind, each in known.kinds.items()} == {"a": 40, "b": 4, "c": 4}
    assert known.running == 1
    limiter._node.after_fork()
    assert limiter.key("acme").statistics().agents is None


async def test_call_outside_agents_is_an_agent_of_one_call(time: VirtualTime) -> None:
    """A stream of them that takes all there is does not starve an agent for ever."""
    crowd = Crowd(time)
    await crowd.start("a", 4, expects=Cost(requests=4))

    async def alone() -> None:
        async with crowd.limiter.acquire():
            crowd.passed.append(".")

    async def stream() -> None:
        for _ in range(20):
            crowd.tasks.append(asyncio.ensure_future(alone()))
            await asyncio.sleep(1)

    crowd.tasks.append(asyncio.ensure_future(stream()))
    await asyncio.sleep(20)
    assert await crowd.order() == "." * 6 + "aaaa" + "." * 14


class ClosedLoop:
    """Callers that never stop, and one research agent, at ten calls a second of 0.2 s each."""

    def __init__(self, time: VirtualTime, limit: str = "600 RPM") -> None:
        self.limiter = Limiter(limit, clock=time.clock)
        self.tasks: list[asyncio.Task[None]] = []

    async def call(self) -> None:
        async with self.limiter.acquire():
            await asyncio.sleep(0.2)

    async def caller(self) -> None:
        while True:
            await self.call()

    async def chat(self, pause: float = 0.0) -> None:
        """Make turns of three calls, each turn in a scope."""
        while True:
            with agent(kind="chat"):
                for _ in range(3):
                    await self.call()
                await asyncio.sleep(pause)

    async def quitter(self) -> None:
        """Give up before any call can pass, again and again."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    await self.call()

    async def research(self, expects: int | None) -> None:
        scope: dict[str, Any] = {} if expects is None else {"expects": Cost(requests=expects)}
        with agent(kind="research", **scope):
            for _ in range(300):
                await self.call()


@pytest.mark.parametrize("expects", [None, 300, 1], ids=["learned", "told", "told wrong"])
@pytest.mark.parametrize(
    ("crowd", "others"),
    [
        ({"caller": 20}, 20),
        ({"caller": 20, "sleeper": 5}, 20),
        ({"chat": 40}, 40),
        pytest.param({"caller": 20, "quitter": 20}, 40, marks=pytest.mark.heavy),
    ],
    ids=["callers", "idle scopes", "chats", "calls that give up"],
)
async def test_no_agent_starves_beside_callers_that_never_stop(
    time: VirtualTime, crowd: dict[str, int], others: int, expects: int | None
) -> None:
    """Beside n others, 30 s of calls take at most (n + 1) x 30 s, and the 60 s that they last."""
    loop = ClosedLoop(time)
    makes = {
        "caller": loop.caller,
        "sleeper": lambda: loop.chat(pause=1e6),
        "chat": loop.chat,
        "quitter": loop.quitter,
    }
    if expects is None:
        await loop.research(None)
    loop.tasks = [asyncio.ensure_future(makes[k]()) for k, n in crowd.items() for _ in range(n)]
    await asyncio.sleep(5)
    began = time.now
    await loop.research(expects)
    assert time.now - began <= (others + 1) * 30 + 60
    for task in loop.tasks:
        task.cancel()
    await asyncio.gather(*loop.tasks, return_exceptions=True)
    order = loop.limiter._node.standing.order
    assert isinstance(order, Agents)
    assert not order.waiting


async def test_agent_back_after_ten_minutes_keeps_only_what_it_used(time: VirtualTime) -> None:
    """Its hundred calls get no more than a fair share of the first minute: 600 / 21."""
    loop = ClosedLoop(time)
    loop.tasks = [asyncio.ensure_future(loop.caller()) for _ in range(20)]
    passed: list[str] = []

    async def one(name: str) -> None:
        async with loop.limiter.acquire():
            passed.append(name)

    with agent(expects=Cost(requests=101)):
        await one("old")
        await asyncio.sleep(600)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for _ in range(100):
                    group.create_task(one("old"))
    assert passed.count("old") <= 1 + 600 / 21
    for task in loop.tasks:
        task.cancel()


@pytest.mark.parametrize(
    ("kinds", "most"),
    [
        ([(10, 5)], 0.75),
        ([(100, 4)], 0.75),
        ([(25, 20), (25, 2)], 0.75),
        ([(25, 20), (1, 2)], 0.75),
        ([(50, 20), (50, 12), (50, 6)], 0.75),
        ([(3, 40), (30, 4)], 0.75),
        ([(2, 3), (2, 30)], 1.01),
        ([(1, 1 + number % 20) for number in reversed(range(40))], 1.01),
    ],
)
def test_first_agents_of_all_finish_early_too(kinds: list[tuple[int, int]], most: float) -> None:
    """In most mixes in three quarters of the mean time without scopes, and nowhere later than there."""
    means: dict[bool, float] = {}
    for scopes in (False, True):
        with virtual_time() as time:
            loop = ClosedLoop(time, "600 RPM burst 1")

            async def run(
                kind: int, calls: int, loop: ClosedLoop = loop, *, scopes: bool = scopes
            ) -> float:
                with agent(kind=f"{kind}") if scopes else contextlib.nullcontext():
                    for _ in range(calls):
                        await loop.call()
                return asyncio.get_running_loop().time()

            async def main() -> list[float]:
                runs = [run(k, calls) for k, (n, calls) in enumerate(kinds) for _ in range(n)]
                return await asyncio.gather(*runs)

            means[scopes] = statistics.fmean(time.run(main()))
    assert means[True] <= most * means[False]


async def test_cancelled_agents_leave_no_trace(time: VirtualTime) -> None:
    """Nor does one that fails teach a size; those that stay go on in order."""
    crowd = Crowd(time)
    doomed = [await crowd.start(name, 50, expects=Cost(requests=1)) for name in "xyz"]
    await crowd.start("a", 3, expects=Cost(requests=3))
    await crowd.start("b", 2, expects=Cost(requests=2))
    await asyncio.sleep(3.5)
    for task in doomed:
        task.cancel()
    await asyncio.gather(*doomed, return_exceptions=True)
    crowd.tasks = crowd.tasks[-2:]
    assert (await crowd.order())[-5:] == "bbaaa"
    now = crowd.limiter.statistics()
    assert (now.waiting, now.in_flight) == (0, 0)
    assert now.agents is not None
    assert (now.agents.running, now.agents.finished) == (0, 2)
    line = crowd.limiter._node.standing.lines[0]
    assert not line.calls
    order = crowd.limiter._node.standing.order
    assert isinstance(order, Agents)
    assert not order.waiting


async def test_10_000_agents_in_a_row_leave_no_memory(time: VirtualTime) -> None:
    limiter = Limiter("1M RPM", clock=time.clock)

    async def visit(count: int) -> int:
        for number in range(count):
            with agent(f"a{number}", kind=f"kind {number % 1_000}"):
                (await limiter.acquire()).release()
            time.advance(0.001)
        gc.collect()
        return sys.getallocatedblocks()

    before = await visit(2_500)
    assert await visit(10_000) < before + 1_000


async def test_tenants_priorities_children_stand_above_agents(time: VirtualTime) -> None:
    """Agents are ordered within one line only; what is known of sizes is shared by tenants."""
    crowd = Crowd(time)
    await (await crowd.start("-", 3, kind="k"))
    crowd.passed.clear()
    crowd.limiter.pause(1)
    with tenant("acme"):
        await crowd.start("a", 3, expects=Cost(requests=3))
        await crowd.start("b", 1, expects=Cost(requests=1))
    with tenant("globex"):
        await crowd.start("c", 4, expects=Cost(requests=4))
    with priority("interactive"):
        await crowd.start("u", 2, expects=Cost(requests=2))
    order = await crowd.order()
    assert order.startswith("uu")
    assert order[2:] in {"bcacacac", "cbcacaca"}


async def test_explain_says_how_many_agents_go_before(time: VirtualTime) -> None:
    crowd = Crowd(time)
    for name, calls in ("a", 4), ("b", 2):
        await crowd.start(name, calls, expects=Cost(requests=calls))
    alone = crowd.limiter.explain()
    assert (alone.ahead, alone.agents, alone.wait) == (0, 0, 1.0)
    with agent(kind="k", expects=Cost(requests=3)):
        asked = asyncio.ensure_future(crowd.limiter.acquire())
        await asyncio.sleep(0)
        assert "behind 3 calls of 1 agent: requests bind" in str(crowd.limiter.explain())
    await crowd.order()
    (await asked).release()


async def test_order_of_arrival_returns_when_no_agent_runs(time: VirtualTime) -> None:
    limiter = Limiter("60 TPM", clock=time.clock)
    held = await limiter.acquire(tokens=60)
    with agent():
        gone = asyncio.ensure_future(limiter.acquire(tokens=1))
        await asyncio.sleep(0)
    gone.cancel()
    calls = [asyncio.ensure_future(limiter.acquire(tokens=each)) for each in (50, 1)]
    await asyncio.sleep(0)
    held.settle(tokens=10)
    await asyncio.wait([*calls, gone], return_when=asyncio.FIRST_COMPLETED)
    assert ((await calls[0]).waited, calls[1].done()) == (0, False)
    await calls[1]


async def test_observers_hear_of_agents_but_not_their_names(time: VirtualTime) -> None:
    limiter = Limiter("60 RPM", clock=time.clock)
    heard: list[Event] = []
    limiter.observe(heard.append)
    for fails in (False, True):
        with contextlib.suppress(ZeroDivisionError), agent("secret name", kind="chat"):
            (await limiter.acquire()).release()
            await asyncio.sleep(2)
            assert 1 / (not fails)
    about = [each for each in heard if isinstance(each, (AgentStarted, AgentFinished))]
    assert [type(each).__name__ for each in about] == ["AgentStarted", "AgentFinished"] * 2
    assert [each.seconds for each in about if isinstance(each, AgentFinished)] == [2, 2]
    assert [each.ended_well for each in about if isinstance(each, AgentFinished)] == [True, False]
    assert {each.kind for each in about} == {"chat"}
    assert "secret name" not in repr(heard)


@pytest.mark.parametrize("turns", range(5))
async def test_call_cancelled_as_it_passes_costs_nothing(time: VirtualTime, turns: int) -> None:
    limiter = Limiter("600 RPM", concurrency=1, clock=time.clock)
    holder = await limiter.acquire()

    async def run() -> None:
        with agent(kind="k"):
            asked = asyncio.ensure_future(limiter.acquire())
            await asyncio.sleep(1)
            holder.release()
            for _ in range(turns):
                await asyncio.sleep(0)
            asked.cancel()
            for lease in await asyncio.gather(asked, return_exceptions=True):
                if not isinstance(lease, BaseException):
                    lease.settle(requests=0)
                    lease.release()

    await run()
    agents = agents_of(limiter)
    assert agents.kinds["k"].size == 0
    assert limiter.statistics().in_flight == 0


@pytest.mark.heavy
@pytest.mark.parametrize("name", MIXES)
def test_agents_finish_earlier_on_average_than_by_call_or_in_fair_shares(name: str) -> None:
    agents = MIXES[name](1)
    by_call, fair = play(agents, "by call"), play(agents, "fair shares")
    learned = play(agents, "by agent", earlier=MIXES[name](2)[:60])
    told = play(agents, "true sizes")
    if "mixed" in name:
        assert learned.mean <= min(0.45 * by_call.mean, 0.65 * fair.mean)
    assert learned.mean <= fair.mean
    assert told.mean <= 0.65 * fair.mean
    assert max(each.most for each in (by_call, fair, learned, told)) <= 400_000
    assert learned.makespan <= 1.02 * by_call.makespan
