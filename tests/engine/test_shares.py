"""Fair shares among the children of a limiter: of what it costs, by weight, and nobody starves."""

import asyncio
import collections
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

import asyncbucket
from asyncbucket import Limit, Limiter
from asyncbucket.engine.context import Priority
from asyncbucket.testing import VirtualTime, assert_never_over
from tests.engine.conftest import HELD, cancel, start, start_all

#: When a call passed, whose it was, and what it used.
Passed = list[tuple[float, str, int]]
Price = Callable[[], int]


async def saturate(
    time: VirtualTime,
    until: float,
    *callers: tuple[Limiter, int | Price],
    latency: float = 0.0,
    used: float = 1.0,
) -> Passed:
    """Let one caller for each pair ask for so many tokens again and again; return who passed when.

    Calls last ``latency`` on average, and use a part of what they reserve.
    """
    passed: Passed = []
    chance = random.Random(5)

    async def caller(limiter: Limiter, price: int | Price) -> None:
        while True:
            reserved = price if isinstance(price, int) else price()
            spent = round(used * reserved)
            async with limiter.acquire(tokens=reserved) as lease:
                passed.append((time.now, limiter.name.removeprefix("key/"), spent))
                if latency:
                    await asyncio.sleep(2 * latency * chance.random())
                if used < 1:
                    lease.settle(tokens=spent)
            if time.now >= until:
                break

    await asyncio.gather(*(caller(*each) for each in callers))
    return passed


def count(passed: Passed, since: float = 0, until: float = math.inf) -> collections.Counter[str]:
    """Return how many calls each made from ``since`` on, and before ``until``."""
    return collections.Counter(name for when, name, _ in passed if since <= when < until)


#: Tokens a minute of the key that tenants share, and its burst.
TPM, BURST = 60_000, 3_000
MINUTES = 10


async def share_a_key(
    time: VirtualTime,
    weights: list[float],
    callers: list[int],
    prices: list[Price],
    *,
    limits: tuple[str, ...] = (f"{TPM} TPM burst {BURST}",),
    **how: float,
) -> tuple[list[int], float]:
    """Let tenants saturate one key for ten minutes; the first does not count.

    Return what each got, and the part of the key that was used.
    """
    key = Limiter(*limits, name="key", clock=time.clock)
    tenants = [key.child(str(number), weight=weight) for number, weight in enumerate(weights)]
    each = zip(tenants, prices, callers, strict=True)
    asking = [(tenant, price) for tenant, price, calls in each for _ in range(calls)]
    passed = await saturate(time, 60 * MINUTES, *asking, **how)
    assert_never_over([(round(when * 1e9), cost) for when, _, cost in passed], Limit("tokens", TPM))
    got = [0] * len(weights)
    for when, name, spent in passed:
        got[int(name)] += spent if 60 <= when < 60 * MINUTES else 0
    return got, sum(got) / (TPM * (MINUTES - 1))


#: Weights and callers of tenants, and how their calls go.
CROWDS: dict[str, tuple[list[float], list[int], dict[str, Any]]] = {
    "one heavy and 99 light": ([1.0] * 100, [200] + [2] * 99, {"latency": 0.5}),
    "so, unpaced": ([1.0] * 100, [200] + [20] * 99, {"limits": (f"{TPM} TPM",)}),
    "so, with requests": ([1.0] * 100, [200] + [20] * 99, {"limits": (f"{TPM} TPM", "900 RPM")}),
    "weights": ([1.0, 2.0, 4.0], [20] * 3, {}),
    "weights, refunds": ([1.0, 2.0, 4.0], [20] * 3, {"latency": 0.2, "used": 0.5}),
    "weights, unpaced": ([1.0, 2.0, 4.0], [200] * 3, {"limits": (f"{TPM} TPM",)}),
    "weights, one caller each": ([1.0, 2.0, 4.0], [1] * 3, {}),
}


@pytest.mark.heavy
@pytest.mark.parametrize("crowd", CROWDS)
async def test_tenants_get_cost_in_proportion_to_weights(time: VirtualTime, crowd: str) -> None:
    chance, (weights, callers, how) = random.Random(5), CROWDS[crowd]
    light = (
        (lambda: chance.randint(20, 120)) if len(weights) > 3 else lambda: chance.randint(50, 300)
    )
    heavy = (lambda: chance.randint(400, 800)) if len(weights) > 3 else light
    prices = [heavy, *[light] * (len(weights) - 1)]
    got, use = await share_a_key(time, weights, callers, prices, **how)
    parts = [each / weight for each, weight in zip(got, weights, strict=True)]
    jain = sum(parts) ** 2 / (len(parts) * sum(part * part for part in parts))  # 1 if all are equal
    assert jain >= (0.99 if len(weights) > 3 else 0.9985)
    assert use >= 0.985 or callers[0] == 1 or "900 RPM" in how.get("limits", ())


@pytest.fixture(name="key")
def ten_a_second(time: VirtualTime) -> Limiter:
    return Limiter("10 RPS burst 1", name="key", clock=time.clock)


async def test_share_of_idle_child_goes_to_its_sibling(time: VirtualTime, key: Limiter) -> None:
    a, b = [(key.child("a"), 0)] * 20, [(key.child("b"), 0)] * 20
    assert count(await saturate(time, 100, *a, *b), 60, 100)["a"] == pytest.approx(200, abs=2)
    assert count(await saturate(time, 200, *a), 105, 200)["a"] == pytest.approx(945, abs=4)
    assert count(await saturate(time, 300, *a, *b), 205, 300)["b"] == pytest.approx(472, abs=8)


@pytest.mark.heavy
@pytest.mark.parametrize("rpm", [5, 8, 9])
async def test_child_below_its_share_gets_what_it_may(time: VirtualTime, rpm: int) -> None:
    minutes = 60
    key = Limiter("50 RPM", name="key", clock=time.clock)
    children = (*(key.child(f"{n}") for n in range(4)), key.child("slow", rpm=rpm))
    got = count(await saturate(time, 60 * minutes, *[(child, 0) for child in children * 3]))
    slow = got.pop("slow")
    assert slow >= 0.97 * 60 / (60 / rpm + 60 / 50) * minutes
    assert max(got.values()) - min(got.values()) <= 6
    assert slow + sum(got.values()) >= 0.99 * 50 * minutes


async def test_child_held_up_long_is_only_one_call_ahead_of_sibling(time: VirtualTime) -> None:
    key = Limiter("1 RPS burst 1", name="key", clock=time.clock)
    quota = key.child("quota", Limit("requests", 20, per=1000, burst=20))
    passed = await saturate(time, 1200, *[(quota, 0), (key.child("free"), 0)] * 5)
    later = [name for when, name, _ in passed if when > 500]
    first = later.index("quota")
    assert first > 400
    for end in range(first, first + 40):
        ahead = 2 * later[first : end + 1].count("quota") - (end + 1 - first)
        assert -1 <= ahead <= 3


async def test_costly_call_does_not_starve_among_cheap_siblings(time: VirtualTime) -> None:
    key = Limiter("1000 TPM", name="key", clock=time.clock)
    cheap, costly = key.child("cheap"), key.child("costly")
    passed = await saturate(time, 1200, *[(cheap, 20)] * 20, (costly, 900))
    when = [0.0, *(when for when, name, _ in passed if name == "costly")]
    assert len(when) > 7
    assert max(later - earlier for earlier, later in itertools.pairwise(when)) <= 2 * 60 * HELD + 1


@pytest.mark.heavy
@pytest.mark.parametrize("rate", [9, 10, 12, 20])
async def test_new_children_starve_no_old_one(time: VirtualTime, key: Limiter, rate: int) -> None:
    """Of those that came later, at most as many as were waiting, plus four dozen, pass first."""
    passed: list[float] = []
    most = 0

    async def old(limiter: Limiter) -> None:
        nonlocal most
        while time.now < 200:
            asked, waiting = time.now, key.statistics().waiting
            await limiter.acquire()
            most = max(most, sum(came >= asked for came in passed) - waiting)

    async def new(limiter: Limiter) -> None:
        came = time.now
        await limiter.acquire()
        passed.append(came)

    async with asyncio.TaskGroup() as group:
        group.create_task(old(key.child("old")))
        for number in range(200 * rate):
            group.create_task(new(key.child(f"new {number}")))
            await asyncio.sleep(1 / rate)
    assert len(passed) == 200 * rate
    assert most <= 45


@pytest.mark.parametrize("weight", [1, 0.1, 0.01])
async def test_calls_of_light_child_delay_no_newcomer(time: VirtualTime, weight: float) -> None:
    """One that was alone counts its calls a hundredfold; those who come later share from then on."""
    key = Limiter("10 RPS burst 1", name="key", clock=time.clock)
    light, busy, late = key.child("light", weight=weight), key.child("busy"), key.child("late")
    went: list[str] = []

    async def call(limiter: Limiter) -> None:
        await limiter.acquire()
        went.append(limiter.name)

    calls = await start_all(call(light) for _ in range(3))
    await asyncio.sleep(0.15)
    calls += await start_all(call(busy) for _ in range(300))
    await asyncio.sleep(0.2)
    calls += await start_all(call(late) for _ in range(3))
    await asyncio.sleep(20)
    assert went.index(late.name) <= 5
    cancel(*calls)


@pytest.mark.heavy
@pytest.mark.parametrize("who", ["siblings", "the parent's own", "a priority"])
async def test_refunds_are_credited_to_limiter_that_reserved(time: VirtualTime, who: str) -> None:
    got = {"thrifty": 0, "honest": 0}

    async def caller(limiter: Limiter, name: str, used: int, priority: int) -> None:
        while time.now < 200:
            async with limiter.acquire(tokens=500, priority=priority) as lease:
                got[name] += used
                lease.settle(tokens=used)

    key = Limiter(f"{TPM} TPM burst 1000", clock=time.clock)
    thrifty = key if who == "the parent's own" else key.child("thrifty")
    urgent = int(who == "a priority")
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(caller(thrifty, "thrifty", 50, 0))
            group.create_task(caller(key.child("honest"), "honest", 500, urgent))
    fair = 1 / 9 if who == "a priority" else 1 / 2
    assert got["thrifty"] / sum(got.values()) == pytest.approx(fair, rel=0.06)


async def test_call_cancelled_at_handover_does_not_count_in_its_share(time: VirtualTime) -> None:
    key = Limiter("60 tokens/60s burst 10", clock=time.clock)
    chat, tools = key.child("chat"), key.child("tools")
    went: list[str] = []

    async def call(limiter: Limiter, tokens: int) -> None:
        await limiter.acquire(tokens=tokens)
        went.append(limiter.name)

    held = key.acquire_nowait(tokens=10)
    costly = await start(call(chat, 10))
    calls = await start_all(call(each, 1) for each in (tools, chat) * 30)
    held.settle(tokens=0)
    await asyncio.sleep(0)  # it was admitted, but its task has not run yet
    costly.cancel()
    await asyncio.sleep(20.5)
    assert key.statistics().cancelled == 1
    assert went.count(chat.name) == went.count(tools.name) == 15
    cancel(*calls)


@pytest.mark.parametrize("how", [{"rps": 10}, {"concurrency": 1}])
async def test_changed_weight_applies_while_calls_wait(time: VirtualTime, how: Any) -> None:
    key = Limiter(**how, name="key", clock=time.clock)
    a, b = key.child("a"), key.child("b")
    asyncio.get_running_loop().call_at(20, lambda: b.reconfigure(weight=3))
    passed = await saturate(time, 60, *[(a, 0), (b, 0)] * 20, latency=0.1)
    before, after = count(passed, 0, 20), count(passed, 20, 60)
    assert before["a"] == pytest.approx(before["b"], abs=3)
    assert after["b"] == pytest.approx(3 * after["a"], abs=8)
    a.reconfigure(weight=2)  # nobody waits there now


async def test_price_of_call_is_its_largest_part_of_any_short_term_limit(time: VirtualTime) -> None:
    """A tenth of a second of requests or a second of tokens; limits of days do not count."""
    limits = ("600 RPM", "150 requests/90s", "100 RPD", "60k TPM burst 1k", "10 images/s")
    key = Limiter(*limits, name="key", clock=time.clock)
    calls = [(key.child("small"), 0)] * 50 + [(key.child("large"), 1_000)] * 10
    went: list[int] = []

    async def call(limiter: Limiter, tokens: int) -> None:
        async with limiter.acquire(tokens=tokens):
            went.append(tokens)

    key.pause(1)
    await asyncio.gather(*(call(*each) for each in calls))
    firsts = [place for place, tokens in enumerate(went) if tokens]
    assert all(9 <= later - earlier <= 13 for earlier, later in itertools.pairwise(firsts[:5]))


# --- urgent calls go first, and nobody starves ---


async def ask(limiter: Limiter, priority: Priority | None, served: list[Any]) -> None:
    async with limiter.acquire(priority=priority):
        served.append(priority)


async def served_to(
    priorities: tuple[Priority, ...], time: VirtualTime, *, callers: int, seconds: int
) -> list[Any]:
    served: list[Any] = []
    limiter = Limiter("10 RPS burst 1", clock=time.clock)

    async def caller(priority: Priority) -> None:
        while time.now < seconds:
            await ask(limiter, priority, served)

    await asyncio.gather(*(caller(each) for each in priorities for _ in range(callers)))
    return served


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("priorities", "parts"),
    [
        (("batch", "interactive"), (1 / 9, 8 / 9)),
        (("batch", "normal"), (1 / 9, 8 / 9)),
        (("batch", "normal", "interactive"), (1 / 73, 8 / 73, 64 / 73)),
        ((-100, 100), (1 / 9, 8 / 9)),
    ],
)
async def test_each_priority_gets_its_guaranteed_share(
    time: VirtualTime, priorities: tuple[Priority, ...], parts: tuple[float, ...]
) -> None:
    served = await served_to(priorities, time, callers=5, seconds=200)
    for priority, part in zip(priorities, parts, strict=True):
        assert served.count(priority) / len(served) == pytest.approx(part, abs=0.012)
    places = [place for place, each in enumerate(served[15:1_900]) if each == priorities[0]]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert max(gaps) <= 1 / parts[0] + 1


async def test_priority_comes_from_call_then_context_then_limiter(time: VirtualTime) -> None:
    key = Limiter("1 RPS burst 1", clock=time.clock)
    nightly = key.child("nightly", priority="batch")
    served: list[str] = []

    async def call(name: str, limiter: Limiter, priority: Priority | None = None) -> None:
        async with limiter.acquire(priority=priority):
            served.append(name)

    await key.acquire()
    async with asyncio.TaskGroup() as group:
        group.create_task(call("batch by its limiter", nightly))
        group.create_task(call("batch by the limiter above", nightly.child("below")))
        with asyncbucket.priority("interactive"):
            group.create_task(call("inherited", nightly))
            group.create_task(call("normal by its own word", nightly, "normal"))
        group.create_task(call("urgent by its own word", nightly, 50))
        await time.all_blocked()
    assert served == [
        "urgent by its own word",
        "inherited",
        "normal by its own word",
        "batch by its limiter",
        "batch by the limiter above",
    ]


# --- under full load, a limiter uses at least 99 % of its limits, and never exceeds them ---


def used_of(limit: Limit, passed: Passed, seconds: float) -> float:
    """Assert that a limit is kept; return which part of it was used after the first window."""
    trace = [(round(at * 1e9), n if limit.resource == "tokens" else 1) for at, _, n in passed]
    assert_never_over(trace, limit)
    later = sum(amount for when, amount in trace if limit.per <= when / 1e9 < seconds)
    return later / (limit.amount / limit.per * (seconds - limit.per))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("limits", "most", "options", "share"),
    [
        (["60 RPM"], 0, {}, 0.99),
        (["10/s"], 0, {}, 0.99),
        (["1000 requests/10s burst 1000"], 0, {}, 0.99),
        (["60k TPM"], 600, {}, 0.99),
        (["60k TPM burst 1000"], 300, {}, 0.99),
        (["60k TPM"], 12_000, {}, 0.89),  # up to a fifth of the limit
        (["1200 RPM", "60k TPM"], 200, {"latency": 1.5, "concurrency": 50}, 0.99),
        (["300 RPM", "60k TPM"], 200, {"latency": 1.5, "concurrency": 50}, 0.99),
        (["1200 RPM", "120k TPM"], 200, {"latency": 1.5, "concurrency": 10}, 0.98),
        (["60k TPM"], 600, {"latency": 0.2, "used": 1 / 3}, 0.98),
    ],
)
async def test_whichever_limit_binds_is_used_to_99_percent_and_none_is_exceeded(
    time: VirtualTime, limits: list[str], most: int, options: dict[str, Any], share: float
) -> None:
    chance = random.Random(7)
    limiter = Limiter(*limits, concurrency=options.pop("concurrency", None), clock=time.clock)
    seconds = (20 if share < 0.9 else 6) * limiter.limits[-1].per
    caller = (limiter, (lambda: chance.randint(1, most)) if most else 0)
    passed = await saturate(time, seconds, *[caller] * 200, **options)
    used = [used_of(limit, passed, seconds) for limit in limiter.limits]
    if limiter.concurrency:
        used.append(len(passed) * options["latency"] / (limiter.concurrency * time.now))
    assert share <= max(used) <= 1.01
