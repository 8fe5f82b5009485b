"""Children of limiters: fair among siblings, never over at any level, and nobody is forgotten."""

import asyncio
import collections
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, Limit, Limiter, WouldBlock
from asyncbucket.testing import VirtualTime, assert_never_over, virtual_time

#: Tokens a minute of the key that tenants share, and its burst.
TPM, BURST = 60_000, 3_000
MINUTES = 10

Price = Callable[[int, random.Random], int]


@dataclass
class Shared:
    """What tenants got of one key in ten minutes; the first minute does not count."""

    got: list[int]
    trace: list[tuple[int, int]] = field(default_factory=list)

    @property
    def use(self) -> float:
        """The part of the key that was used."""
        return sum(self.got) / (TPM * (MINUTES - 1))


def jain(shares: list[float]) -> float:
    """Return Jain's index of fairness: 1 if all are equal, 1/n if one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def share_a_key(
    weights: list[float],
    callers: list[int],
    price: Price,
    *,
    limits: tuple[str, ...] = (f"{TPM} TPM burst {BURST}",),
    latency: float = 0.0,
    used: float = 1.0,
) -> Shared:
    """Let tenants saturate one key; each caller asks again as soon as its call is over."""
    chance = random.Random(5)
    shared = Shared([0] * len(weights))

    async def caller(time: VirtualTime, limiter: Limiter, number: int) -> None:
        while time.now < 60 * MINUTES:
            reserved = price(number, chance)
            async with limiter.acquire(tokens=reserved) as lease:
                admitted, spent = time.now, round(used * reserved)
                shared.trace.append((time.clock(), spent))
                if latency:
                    await asyncio.sleep(2 * latency * chance.random())
                lease.settle(tokens=spent)
                if 60 <= admitted < 60 * MINUTES:
                    shared.got[number] += spent

    async def main(time: VirtualTime, key: Limiter) -> None:
        async with asyncio.TaskGroup() as group:
            for number, weight in enumerate(weights):
                tenant = key.child(f"tenant {number}", weight=weight)
                for _ in range(callers[number]):
                    group.create_task(caller(time, tenant, number))

    with virtual_time() as time:
        key = Limiter(*limits, clock=time.clock)
        time.run(main(time, key))
    assert_never_over(shared.trace, Limit("tokens", TPM))
    return shared


def huge_or_small(number: int, chance: random.Random) -> int:
    """Make the first tenant's calls costly, and all others cheap."""
    return chance.randint(400, 800) if number == 0 else chance.randint(20, 120)


def middling(_: int, chance: random.Random) -> int:
    """Cost something in between, whichever tenant asks."""
    return chance.randint(50, 300)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"latency": 0.5},
        {"limits": (f"{TPM} TPM", "900 RPM"), "callers": 20},
        {"limits": (f"{TPM} TPM",), "callers": 20},
    ],
    ids=["paced", "calls with latency", "with a request limit", "unpaced"],
)
def test_one_heavy_and_99_light_tenants_get_equal_shares(how: dict[str, Any]) -> None:
    callers = how.pop("callers", 2)
    shared = share_a_key([1.0] * 100, [200] + [callers] * 99, huge_or_small, **how)
    assert jain([float(got) for got in shared.got]) >= 0.99
    if "900 RPM" not in how.get("limits", ()):
        assert shared.use >= 0.99


@pytest.mark.heavy
@pytest.mark.parametrize(
    "how",
    [{}, {"latency": 0.2}, {"latency": 0.2, "used": 0.5}, {"limits": (f"{TPM} TPM",)}],
    ids=["instant calls", "calls with latency", "refunds", "unpaced"],
)
def test_children_get_cost_in_proportion_to_their_weights(how: dict[str, Any]) -> None:
    """Shares are 1 : 2 : 4 within 2 %, even if half of what was reserved is refunded."""
    callers = 200 if "limits" in how else 20
    weights = [1.0, 2.0, 4.0]
    shared = share_a_key(weights, [callers] * 3, middling, **how)
    assert shared.use >= 0.985
    for got, weight in zip(shared.got, weights, strict=True):
        assert got / sum(shared.got) == pytest.approx(weight / 7, rel=0.02)


@pytest.mark.heavy
def test_weights_hold_with_one_caller_per_child() -> None:
    """Weights hold within 5 % though each child has one call at a time, made again at once."""
    shared = share_a_key([1.0, 2.0, 4.0], [1, 1, 1], middling)
    for got, weight in zip(shared.got, (1, 2, 4), strict=True):
        assert got / sum(shared.got) == pytest.approx(weight / 7, rel=0.05)


@pytest.mark.heavy
async def test_share_of_idle_child_goes_to_its_sibling_at_once(virtual_time: VirtualTime) -> None:
    """While a sibling pauses, the other gets all; when it is back, it gets its half and no more."""
    passed: list[tuple[float, str]] = []

    async def caller(limiter: Limiter, *, resting: bool) -> None:
        while virtual_time.now < 300:
            if resting and 100 <= virtual_time.now < 200:
                await asyncio.sleep(200 - virtual_time.now)
            async with limiter.acquire():
                passed.append((virtual_time.now, limiter.name))

    def count(name: str, start: float, end: float) -> int:
        return sum(at >= start and at < end and who == name for at, who in passed)

    key = Limiter("10 RPS burst 1", name="key", clock=virtual_time.clock)
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b"):
            for _ in range(20):
                group.create_task(caller(key.child(name), resting=name == "b"))
    assert count("key/a", 60, 100) == pytest.approx(200, abs=2)
    assert count("key/a", 105, 200) == pytest.approx(945, abs=4)
    assert count("key/b", 203, 300) == pytest.approx(482, abs=8)


@pytest.mark.heavy
@pytest.mark.parametrize("rpm", [5, 8, 9])
async def test_child_below_its_share_gets_what_its_own_limit_allows(
    virtual_time: VirtualTime, rpm: int
) -> None:
    """A child that may call again waits for one call of the others at most, not for a round."""
    minutes = 60
    passed: collections.Counter[str] = collections.Counter()

    async def caller(limiter: Limiter) -> None:
        while virtual_time.now < 60 * minutes:
            await limiter.acquire()
            passed[limiter.name] += 1

    key = Limiter("50 RPM", name="key", clock=virtual_time.clock)
    async with asyncio.TaskGroup() as group:
        for child in (*(key.child(f"{n}") for n in range(4)), key.child("slow", rpm=rpm)):
            for _ in range(3):
                group.create_task(caller(child))
    slow = passed.pop("key/slow")
    assert slow >= 0.97 * 60 / (60 / rpm + 60 / 50) * minutes
    assert max(passed.values()) - min(passed.values()) <= 6
    assert slow + sum(passed.values()) >= 0.99 * 50 * minutes


@pytest.mark.parametrize(("burst", "calls"), [(1, 250), (2, 301)])
async def test_child_with_burst_of_one_loses_what_flows_in_while_key_is_busy(
    virtual_time: VirtualTime, burst: int, calls: int
) -> None:
    """With a burst of one it makes a call every so many whole gaps of its key: 40 ms, not 33."""
    passed: list[int] = []

    async def caller(limiter: Limiter) -> None:
        while virtual_time.now < 10:
            await limiter.acquire()
            if limiter is small and virtual_time.now < 10:
                passed.append(virtual_time.clock())

    key = Limiter("6000 RPM burst 1", clock=virtual_time.clock)

    small = key.child("small", f"1800 RPM burst {burst}")

    async with asyncio.TaskGroup() as group:
        for limiter in 3 * (key.child("busy"), small):
            group.create_task(caller(limiter))
    assert len(passed) == calls
    if burst == 1:
        assert {late - early for early, late in itertools.pairwise(passed)} == {40_000_000}


async def test_child_held_up_long_is_only_one_call_ahead_of_sibling(
    virtual_time: VirtualTime,
) -> None:
    """When its quota comes back all at once, it is not used up before others get their turns."""
    passed: list[tuple[float, str]] = []

    async def caller(limiter: Limiter) -> None:
        while virtual_time.now < 1200:
            await limiter.acquire()
            passed.append((virtual_time.now, limiter.name))

    key = Limiter("1 RPS burst 1", name="key", clock=virtual_time.clock)
    quota = key.child("quota", Limit("requests", 20, per=1000, burst=20))
    async with asyncio.TaskGroup() as group:
        for child in (quota, key.child("free")):
            for _ in range(5):
                group.create_task(caller(child))
    later = [name for when, name in passed if when > 500]
    first = later.index("key/quota")
    assert first > 400
    for end in range(first, first + 40):
        ahead = 2 * later[first : end + 1].count("key/quota") - (end + 1 - first)
        assert -1 <= ahead <= 3


@pytest.mark.parametrize(("tokens", "weight"), [(6_000, 1.0), (100, 0.01)])
async def test_costly_call_does_not_let_newcomers_overtake_waiting_child(
    virtual_time: VirtualTime, tokens: int, weight: float
) -> None:
    passed: list[str] = []

    async def call(child: Limiter, tokens: int = 100) -> None:
        async with child.acquire(tokens=tokens):
            passed.append(child.name)

    async def newcomers(key: Limiter, row: int) -> None:
        for number in range(60):
            await call(key.child(f"{row}-{number}"))

    key = Limiter("60k TPM burst 100", name="key", clock=virtual_time.clock)
    many, costly = key.child("many"), key.child("costly", weight=weight)
    async with asyncio.TaskGroup() as group:
        for _ in range(60):
            group.create_task(call(many))
        for row in range(10):
            group.create_task(newcomers(key, row))
        await asyncio.sleep(5)
        group.create_task(call(costly, tokens))
    turns = [place for place, name in enumerate(passed) if name == "key/many"]
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) <= 24


async def test_child_at_its_limit_holds_up_neither_sibling_nor_parent(
    virtual_time: VirtualTime,
) -> None:
    key = Limiter("600 RPM", name="key", clock=virtual_time.clock)
    poor, rich = key.child("poor", rpm=1), key.child("rich")
    await poor.acquire()
    queue = [asyncio.ensure_future(poor.acquire()) for _ in range(50)]
    await virtual_time.all_blocked()
    rich.acquire_nowait()
    key.acquire_nowait()
    assert (await rich.acquire(timeout=0)).waited == 0
    with pytest.raises(WouldBlock) as error:
        poor.acquire_nowait()
    assert error.value.bound_by == "requests"
    assert virtual_time.now == 0
    assert (poor.statistics().waiting, rich.statistics().waiting) == (50, 0)
    assert key.statistics().waiting == 50
    for call in queue:
        call.cancel()


async def test_lease_of_child_names_limit_that_bound_it_last(virtual_time: VirtualTime) -> None:
    """The child's own pace binds every second call for a moment, the key's tokens the others."""
    key = Limiter(Limit("tokens", 100, per=10), clock=virtual_time.clock)
    chat = key.child("chat", Limit("requests", 100, per=1, burst=1))
    leases = await asyncio.gather(*(chat.acquire(tokens=50) for _ in range(6)))
    assert [lease.bound_by for lease in leases] == [None, *["requests", "tokens"] * 2, "requests"]


async def test_call_behind_cousin_is_bound_by_same_resource(virtual_time: VirtualTime) -> None:
    """Its lease and the statistics say so, even though its own line was never first in line."""
    key = Limiter("1000 RPS burst 1000", clock=virtual_time.clock)
    team = key.child("team", "10 tokens/10s")
    team.acquire_nowait(tokens=10).release()
    costly = asyncio.ensure_future(team.child("agent").acquire(tokens=5))
    await asyncio.sleep(0)
    free = [asyncio.ensure_future(each.acquire()) for each in (team, team.child("other"))]
    await virtual_time.all_blocked()
    for each in (key, team, *team.children.values()):
        assert each.statistics().bound_by == "tokens"
    for lease in await asyncio.gather(costly, *free):
        assert (lease.waited, lease.bound_by) == (10 * 515 / 512, "tokens")
    assert team.statistics().waits["tokens"].count == 3


async def test_statistics_of_each_child_name_what_binds_it(virtual_time: VirtualTime) -> None:
    """A child names its own limits or those above; the parent names what holds up its next call."""
    key = Limiter("100 TPM", name="key", clock=virtual_time.clock)
    poor, rich, late = key.child("poor", rpm=1), key.child("rich"), key.child("late")

    def binding() -> list[str | None]:
        return [each.statistics().bound_by for each in (key, poor, rich, late)]

    await poor.acquire()
    calls = [asyncio.ensure_future(poor.acquire(priority=1)) for _ in range(2)]
    await virtual_time.all_blocked()
    assert binding() == ["requests", "requests", None, None]
    await rich.acquire(tokens=100)
    calls += [asyncio.ensure_future(each.acquire(tokens=100)) for each in (rich, late)]
    await virtual_time.all_blocked()
    assert binding() == ["tokens", "requests", "tokens", "tokens"]
    for call in calls:
        call.cancel()
    await virtual_time.all_blocked()
    assert binding() == [None] * 4


async def test_newcomer_does_not_pass_cousin_waiting_for_same_limit(
    virtual_time: VirtualTime,
) -> None:
    """While a child's costly call is next at a shared limit, a cousin's cheap one must wait."""
    key = Limiter("100 TPM", name="key", clock=virtual_time.clock)
    await key.acquire(tokens=50)
    costly = asyncio.ensure_future(key.child("a").acquire(tokens=90))
    await virtual_time.all_blocked()
    with pytest.raises(WouldBlock):
        key.child("b").acquire_nowait(tokens=1)
    with pytest.raises(WouldBlock):
        key.acquire_nowait(tokens=1)
    model = key.child("model", "10 TPM")
    await asyncio.sleep(1)
    cheap = asyncio.ensure_future(model.child("c").acquire(tokens=5))
    await virtual_time.all_blocked()
    assert not cheap.done()
    await costly
    await cheap


async def test_newcomer_does_not_pass_cousin_waiting_at_middle_level(
    virtual_time: VirtualTime,
) -> None:
    """Nobody overtakes the call that is next at a limit in the middle, though the root is free."""
    model = Limiter(name="key", clock=virtual_time.clock).child("model", "100 TPM")
    await model.acquire(tokens=50)
    costly = asyncio.ensure_future(model.child("a").acquire(tokens=90))
    await virtual_time.all_blocked()
    with pytest.raises(WouldBlock):
        model.child("b").acquire_nowait(tokens=1)
    assert model.parent is not None
    model.parent.acquire_nowait(tokens=1)
    await costly


async def test_grandchild_keeps_its_pace_while_costly_sibling_waits(
    virtual_time: VirtualTime,
) -> None:
    passed: list[float] = []

    async def caller(limiter: Limiter, tokens: int) -> None:
        while virtual_time.now < 1000:
            async with limiter.acquire(tokens=tokens):
                if tokens == 10:
                    passed.append(virtual_time.now)

    model = Limiter(clock=virtual_time.clock).child("model", Limit("tokens", 1000, per=100))
    slow = model.child("slow", Limit("requests", 1, per=30))
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(caller(model.child("costly"), 900))
        group.create_task(caller(slow, 10))
    assert len(passed) >= 25


async def test_costly_call_does_not_starve_among_cheap_siblings(virtual_time: VirtualTime) -> None:
    """A call for 90 % of the window is admitted once the others have had as much."""
    waits: list[float] = []

    async def cheap(limiter: Limiter) -> None:
        while virtual_time.now < 1200:
            await limiter.acquire(tokens=20)

    async def costly(limiter: Limiter) -> None:
        while virtual_time.now < 1000:
            lease = await limiter.acquire(tokens=900)
            waits.append(lease.waited)

    key = Limiter("1000 TPM", clock=virtual_time.clock)
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(cheap(key.child("cheap")))
        group.create_task(costly(key.child("costly")))
    assert len(waits) >= 7
    assert max(waits) <= 2 * 60 * 515 / 512 + 1


@pytest.mark.heavy
@pytest.mark.parametrize("rate", [9, 10, 12, 20])
async def test_endless_new_children_do_not_starve_old_child(
    virtual_time: VirtualTime, rate: int
) -> None:
    """However many new tenants come, only a few of their calls overtake one that waits.

    Calls go in order of arrival, give or take one round: of those that came later, at most as many
    as were waiting already, plus four dozen, pass first.
    """
    passed: list[tuple[float, float]] = []
    most = 0

    async def old(limiter: Limiter) -> None:
        nonlocal most
        assert limiter.parent is not None
        while virtual_time.now < 200:
            asked, waiting = virtual_time.now, limiter.parent.statistics().waiting
            await limiter.acquire()
            most = max(most, sum(came >= asked for came, _ in passed) - waiting)

    async def new(limiter: Limiter) -> None:
        came = virtual_time.now
        await limiter.acquire()
        passed.append((came, virtual_time.now))

    key = Limiter("10 RPS burst 1", clock=virtual_time.clock)
    async with asyncio.TaskGroup() as group:
        group.create_task(old(key.child("old")))
        for number in range(200 * rate):
            group.create_task(new(key.child(f"new {number}")))
            await asyncio.sleep(1 / rate)
    assert len(passed) == 200 * rate
    assert most <= 45


@pytest.mark.heavy
@pytest.mark.parametrize("who", ["siblings", "the parent's own", "a priority"])
async def test_refunds_are_credited_to_limiter_that_reserved(
    virtual_time: VirtualTime, who: str
) -> None:
    """A tenant that uses a tenth of what it reserves gets its share of use, not of reservations."""
    got = {"thrifty": 0, "honest": 0}

    async def caller(limiter: Limiter, name: str, used: int, priority: int) -> None:
        while virtual_time.now < 600:
            async with limiter.acquire(tokens=500, priority=priority) as lease:
                got[name] += used
                lease.settle(tokens=used)

    key = Limiter(f"{TPM} TPM burst 1000", clock=virtual_time.clock)
    thrifty = key if who == "the parent's own" else key.child("thrifty")
    urgent = int(who == "a priority")
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(caller(thrifty, "thrifty", 50, 0))
            group.create_task(caller(key.child("honest"), "honest", 500, urgent))
    fair = 1 / 9 if who == "a priority" else 1 / 2
    assert got["thrifty"] / sum(got.values()) == pytest.approx(fair, rel=0.05)


async def test_call_cancelled_at_handover_does_not_count_against_its_share(
    virtual_time: VirtualTime,
) -> None:
    """If a costly call is taken back before it began, its child is served no less for it."""
    key = Limiter("60 tokens/60s burst 10", clock=virtual_time.clock)
    chat, tools = key.child("chat"), key.child("tools")
    went: list[str] = []

    async def call(limiter: Limiter, tokens: int) -> None:
        await limiter.acquire(tokens=tokens)
        went.append(limiter.name)

    held = key.acquire_nowait(tokens=10)
    costly = asyncio.ensure_future(call(chat, 10))
    await asyncio.sleep(0)
    calls = [asyncio.ensure_future(call(each, 1)) for each in (tools, chat) * 30]
    await virtual_time.all_blocked()
    held.settle(tokens=0)
    await asyncio.sleep(0)  # it was admitted, but its task has not run yet
    costly.cancel()
    await asyncio.sleep(20.5)
    assert key.statistics().cancelled == 1
    assert went.count(chat.name) == went.count(tools.name) == 15
    for each in calls:
        each.cancel()


async def test_changed_weight_applies_while_calls_wait(virtual_time: VirtualTime) -> None:
    """Shares change from equal to 1 : 3, though no line was ever empty."""
    passed: collections.Counter[str] = collections.Counter()

    async def caller(name: str) -> None:
        while virtual_time.now < 60:
            await key.child(name).acquire()
            passed[name] += 1

    key = Limiter("10 RPS burst 1", clock=virtual_time.clock)
    async with asyncio.TaskGroup() as group:
        for name in ["a", "b"] * 20:
            group.create_task(caller(name))
        await asyncio.sleep(20)
        assert passed["a"] == pytest.approx(passed["b"], abs=3)
        key.child("b").reconfigure(weight=3)
        before = passed.copy()
        await asyncio.sleep(39)
        more = passed - before
        assert more["b"] == pytest.approx(3 * more["a"], abs=6)
    key.child("a").reconfigure(weight=2)  # nobody waits there now


async def test_changed_limits_at_every_level_apply_to_waiting_calls(
    virtual_time: VirtualTime,
) -> None:
    key = Limiter("100 TPM", name="key", clock=virtual_time.clock)
    child = key.child("child", tpm=10)
    grandchild = child.child("grandchild")
    first = asyncio.ensure_future(grandchild.acquire(tokens=10))
    second = asyncio.ensure_future(grandchild.acquire(tokens=10))
    await first
    await virtual_time.all_blocked()
    assert not second.done()
    child.reconfigure(tpm=20)
    assert (await second).waited == 0
    third = asyncio.ensure_future(grandchild.acquire(tokens=20))
    await virtual_time.all_blocked()
    key.reconfigure(tpm=15)
    with pytest.raises(CostExceedsLimit, match="20 tokens exceeds the limit of 15 tokens"):
        await third
    with pytest.raises(CostExceedsLimit, match="exceeds the limit of 15 tokens"):
        await grandchild.acquire(tokens=16)
    assert virtual_time.now == 0
    now = key.statistics()
    assert (now.admitted, now.waiting, now.refused) == (2, 0, 2)


async def test_calls_of_child_count_in_statistics_of_every_level_above(
    virtual_time: VirtualTime,
) -> None:
    """Admissions, refusals, cancellations, waiting, slots, refunds and 429s count at each level."""
    key = Limiter("100 TPM", concurrency=3, name="key", clock=virtual_time.clock)
    child, other = key.child("child", concurrency=2), key.child("other")
    leases = [await child.acquire(tokens=20), await child.acquire(tokens=20)]
    waiting = asyncio.ensure_future(child.acquire(tokens=20))
    await virtual_time.all_blocked()
    with pytest.raises(WouldBlock):
        child.acquire_nowait(tokens=20)
    with pytest.raises(AcquireTimeout):
        await child.acquire(tokens=20, timeout=1)
    for limiter in (child, key):
        now = limiter.statistics()
        assert (now.admitted, now.in_flight, now.waiting, now.refused) == (2, 2, 1, 2)
        assert now.limits == () or now.limits[0].used == 40
    assert other.statistics().admitted == other.statistics().refused == 0
    leases[0].settle(tokens=5)
    waiting.cancel()
    await virtual_time.all_blocked()
    child.pause(1, reason="429")
    for limiter in (child, key):
        now = limiter.statistics()
        assert (now.waiting, now.cancelled, now.upstream_429) == (0, 1, 1)
        assert now.refunded == {"tokens": 15}
    for lease in leases:
        lease.release()
    assert key.statistics().in_flight == child.statistics().in_flight == 0
    assert repr(child) == "<Limiter 'key/child', concurrency 0/2, 0 waiting>"


def test_child_is_made_once(virtual_time: VirtualTime) -> None:
    """The same name, alone or with the same terms, returns it; other terms are an error."""
    key = Limiter("100 RPM", name="key", clock=virtual_time.clock)
    child = key.child("child", rpm=10, weight=2)
    assert key.child("child") is child
    assert key.child("child", "10 RPM", weight=2.0) is child
    with pytest.raises(ValueError, match="'key/child' exists on other terms: ask for it by name"):
        key.child("child", rpm=20)
    assert child.parent is key
    assert key.parent is None
    assert dict(key.children) == {"child": child}
    assert dict(child.children) == {}
    assert child.name == "key/child"
    assert child.limits == (Limit("requests", 10),)


def test_children_can_be_added_while_iterating_over_them(virtual_time: VirtualTime) -> None:
    key = Limiter(clock=virtual_time.clock)
    key.child("a")
    for name in key.children:
        key.child(f"{name}b")
    assert list(key.children) == ["a", "ab"]


@pytest.mark.parametrize("name", ["", "a/b", "*a", 7])
def test_child_name_unfit_for_path_is_refused(name: Any) -> None:
    """It must be a string, not empty, without a slash, and without a star in front."""
    with pytest.raises(ValueError, match="a child's name must be a string without a slash"):
        Limiter().child(name)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"weight": 0}, "weight must be a number from 0.000001 to 1,000,000, not 0"),
        ({"weight": float("nan")}, "weight must be a number from 0.000001 to 1,000,000, not nan"),
        ({"weight": True}, "weight must be a number from 0.000001 to 1,000,000, not True"),
        ({"max_queue": -1}, "max_queue must be a whole number of at least 0, not -1"),
        ({"max_queue": 1.5}, "max_queue must be a whole number of at least 0, not 1.5"),
        ({"timeout": -1}, "timeout must be at least 0 s, not -1"),
        ({"priority": "urgent"}, "priority must be 'interactive', 'normal', 'batch' or a whole"),
        ({"concurrency": 0}, "concurrency must be a whole number"),
        ({"rpm": 0}, "must be a whole number of at least 1, not 0"),
        ({"speed": 1}, "speed"),
    ],
)
def test_invalid_terms_leave_no_child_behind(terms: dict[str, Any], message: str) -> None:
    limiter = Limiter()
    with pytest.raises(ValueError, match=message):
        limiter.child("child", **terms)
    assert not limiter.children


async def test_pause_holds_for_limiters_below_but_not_for_siblings(
    virtual_time: VirtualTime,
) -> None:
    """Pausing a child pauses its children; siblings and the parent go on."""
    key = Limiter(clock=virtual_time.clock)
    model, other = key.child("model"), key.child("other")
    model.pause(5)
    waiting = asyncio.ensure_future(model.child("tenant").acquire())
    await virtual_time.all_blocked()
    other.acquire_nowait()
    key.acquire_nowait()
    lease = await waiting
    assert (lease.waited, lease.bound_by) == (5.0, "paused")
    key.pause(5)
    waiting = asyncio.ensure_future(other.acquire())
    assert (await waiting).waited == 5.0


async def test_waiter_gets_slot_released_under_its_own_parent_only(
    virtual_time: VirtualTime,
) -> None:
    key = Limiter(concurrency=3, clock=virtual_time.clock)
    model = key.child("model", concurrency=1)
    uncle = await key.child("uncle").acquire()
    held = await model.child("a").acquire()
    waiting = asyncio.ensure_future(model.child("b").acquire())
    await virtual_time.all_blocked()
    uncle.release()
    await virtual_time.all_blocked()
    assert not waiting.done()
    held.release()
    lease = await waiting
    assert lease.bound_by == "concurrency"
    assert virtual_time.now == 0


async def test_costly_call_stops_being_next_once_its_child_runs_out_of_units(
    virtual_time: VirtualTime,
) -> None:
    model = Limiter(clock=virtual_time.clock).child("model", Limit("tokens", 300, burst=60))
    tenant = model.child("tenant", tpm=40)
    await model.acquire(tokens=60)
    costly = asyncio.ensure_future(tenant.acquire(tokens=37))
    await asyncio.sleep(0)
    cheap = asyncio.ensure_future(model.acquire(tokens=3))
    await asyncio.sleep(0)
    async with tenant.acquire(tokens=10, priority=-1):
        assert virtual_time.now == 2
    await cheap
    assert virtual_time.now == pytest.approx(2.6)
    await costly
    assert virtual_time.now > 60


async def test_costly_call_stops_being_next_once_its_child_is_in_debt(
    virtual_time: VirtualTime,
) -> None:
    model = Limiter(clock=virtual_time.clock).child("model", Limit("tokens", 300, burst=60))
    tenant = model.child("tenant", tpm=40)
    lease = await tenant.acquire(tokens=1)
    await model.acquire(tokens=59)
    costly = asyncio.ensure_future(tenant.acquire(tokens=37))
    await asyncio.sleep(0)
    cheap = asyncio.ensure_future(model.acquire(tokens=3))
    await asyncio.sleep(1)
    lease.settle(tokens=10)
    await cheap
    assert virtual_time.now == pytest.approx(2.4)
    await costly
    assert virtual_time.now > 60


@pytest.mark.parametrize("depth", [1, 2])
async def test_debt_of_one_child_lets_calls_of_others_go_at_once(
    virtual_time: VirtualTime, depth: int
) -> None:
    """The child that was next is held up by its own limit now, and nobody waits for it."""
    key = Limiter("10 tokens/h", clock=virtual_time.clock)
    above = key if depth == 1 else key.child("team")
    a, b = above.child("a", "5 requests/h burst 5"), above.child("b")
    await b.acquire(tokens=10)
    lease = await a.acquire()
    first = asyncio.ensure_future(a.acquire(tokens=1))
    await asyncio.sleep(1)
    second = asyncio.ensure_future(b.acquire())
    await asyncio.sleep(1)
    assert not second.done()
    lease.settle(requests=5)
    assert (await second).waited == 1
    first.cancel()
