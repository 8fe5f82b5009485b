"""Tenants of limiters with a store: processes share their limits, too."""

import asyncio
import contextlib
import gc
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from asyncbucket import AcquireTimeout, Limit, Limiter
from asyncbucket.stores import open_store
from asyncbucket.stores.place import BookedMeter
from asyncbucket.testing import assert_never_over
from tests.stores.conftest import stop, take
from tests.stores.memory import MemoryStore

Limiters: TypeAlias = Callable[..., Limiter]

ROOT = "6000 RPM burst 6000"


def state_of(memory: MemoryStore, limiter: Limiter) -> Any:
    """Return what the store keeps of ``limiter``."""
    return memory.states[limiter.name].peek(memory.now())


def used(memory: MemoryStore, limiter: Limiter) -> list[int]:
    return [use.used for use in state_of(memory, limiter).limits]


@pytest.mark.parametrize("limits", [["20 requests/10s burst 4"], ["2k tokens/10s"]])
async def test_processes_share_the_limits_of_a_tenant_exactly_and_use_all(
    memory: MemoryStore, limits: list[str]
) -> None:
    admitted: list[tuple[float, int]] = []
    both = memory.limiters(2, ROOT)

    async def agent(limiter: Limiter) -> None:
        while True:
            async with limiter.acquire(tenant="acme", tokens=100):
                admitted.append((memory.seconds, 1))

    for limiter in both:
        limiter.per_key(*limits)
    agents = [asyncio.ensure_future(agent(limiter)) for limiter in both for _ in range(5)]
    await asyncio.sleep(30.5)
    await stop(*agents)
    for limiter in both:
        await limiter.aclose()
    assert_never_over(admitted, "20 requests/10s burst 20")
    assert len(admitted) in range(79, 85) if "tokens" in limits[0] else range(61, 66)
    counts = [limiter.key("acme").statistics().admitted for limiter in both]
    assert min(counts) >= 0.4 * len(admitted), "a process got less than its share"


async def test_tenant_that_has_used_its_limit_holds_up_no_other_and_books_nothing_at_the_root(
    memory: MemoryStore,
) -> None:
    one, two = memory.limiters(2, "100 requests/60s burst 100")
    for limiter in (one, two):
        limiter.per_key("2 RPM burst 2")
    for limiter in (one, two):
        await take(limiter, tenant="acme")
    late = [asyncio.ensure_future(take(each, tenant="acme")) for each in (one, two) * 20]
    await asyncio.sleep(0.1)
    for number in range(40):
        before = memory.seconds
        await take(two, tenant=f"other {number}")
        assert memory.seconds - before < 0.02
    await asyncio.sleep(0.2)
    assert used(memory, one) == [42]
    assert sum(each.done() for each in late) == 0
    assert one.key("acme").statistics().bound_by == "requests"
    await asyncio.sleep(62)
    assert sum(each.done() for each in late) == 2
    await stop(*late)
    await one.aclose()
    await two.aclose()


async def test_settled_cost_counts_at_the_tenant_and_at_the_root(memory: MemoryStore) -> None:
    one, two = memory.limiters(2, "10k TPM")
    for limiter in (one, two):
        limiter.per_key("1k TPM")
    async with one.acquire(tenant="acme", tokens=1_000) as lease:
        waits = asyncio.ensure_future(take(two, tenant="acme", tokens=900))
        await asyncio.sleep(1)
        lease.settle(tokens=100)
        await asyncio.wait_for(waits, 0.2)
    await asyncio.sleep(0.2)
    assert used(memory, one) == used(memory, one.key("acme")) == [1_000]
    await asyncio.sleep(3)
    assert state_of(memory, one.key("acme")).workers == 0
    lease.settle(tokens=3_000)
    await asyncio.sleep(0.2)
    assert used(memory, one) == used(memory, one.key("acme")) == [3_900]
    await one.aclose()
    await two.aclose()


async def test_saturated_root_is_shared_fairly_and_bookings_of_tenants_that_wait_stay_true(
    memory: MemoryStore,
) -> None:
    admitted: dict[str, list[tuple[float, int]]] = {name: [] for name in "abcd"}
    both = memory.limiters(2, "20 requests/10s burst 1")

    async def agent(limiter: Limiter, tenant: str) -> None:
        while True:
            async with limiter.acquire(tenant=tenant):
                admitted[tenant].append((memory.seconds, 1))

    for limiter in both:
        limiter.per_key("2 requests/s burst 2")
    agents = [
        asyncio.ensure_future(agent(limiter, tenant))
        for limiter in both
        for tenant in admitted
        for _ in range(2 if tenant != "d" else 8)
    ]
    await asyncio.sleep(30)
    await stop(*agents)
    counts = {name: len(calls) for name, calls in admitted.items()}
    assert sum(counts.values()) in range(59, 63)
    assert max(counts.values()) - min(counts.values()) <= 3, counts
    for calls in admitted.values():
        assert_never_over(calls, "2 requests/s burst 2")
    assert sum(used(memory, both[0])) <= 20
    for limiter in both:
        await limiter.aclose()


@pytest.mark.parametrize("root", ["1000 RPM burst 1", ROOT])
@pytest.mark.parametrize("turns", range(12))
async def test_call_cancelled_anywhere_on_its_way_leaves_nothing_booked(
    memory: MemoryStore, root: str, turns: int
) -> None:
    one, two = memory.limiters(2, root, concurrency=2)
    for limiter in (one, two):
        limiter.per_key("10 RPM burst 10", concurrency=1)
    await take(two, tenant="acme")
    calls = [asyncio.ensure_future(take(one, tenant="acme")) for _ in range(3)]
    for _ in range(turns):
        await asyncio.sleep(0.0007)
    await stop(*calls)
    passed = one.statistics().admitted
    await asyncio.sleep(0.5)
    assert used(memory, one) == used(memory, one.key("acme")) == [1 + passed]
    assert state_of(memory, one).slots == state_of(memory, one.key("acme")).slots == 0
    await asyncio.wait_for(take(two, tenant="acme"), 1)
    for limiter in (one, two):
        statistics = limiter.key("acme").statistics()
        assert (statistics.waiting, statistics.in_flight) == (0, 0)
        await limiter.aclose()


async def test_processes_share_the_slots_of_a_tenant(memory: MemoryStore) -> None:
    one, two = memory.limiters(2, concurrency=10)
    for limiter in (one, two):
        limiter.per_key(concurrency=2)
    leases = [await one.acquire(tenant="acme") for _ in range(2)]
    waits = asyncio.ensure_future(take(two, tenant="acme"))
    await take(two, tenant="other")
    await asyncio.sleep(20)
    assert not waits.done()
    leases[0].release()
    await asyncio.wait_for(waits, 0.1)
    leases[1].release()
    await asyncio.sleep(0.2)
    assert state_of(memory, one.key("acme")).slots == state_of(memory, one).slots == 0
    await one.aclose()
    await two.aclose()


async def test_limits_of_a_tenant_that_one_process_changes_hold_for_all(
    memory: MemoryStore,
) -> None:
    one, two = memory.limiters(2, ROOT)
    for limiter in (one, two):
        limiter.per_key("10 RPM burst 10")
        await take(limiter, tenant="acme")
    await asyncio.sleep(3)
    one.key("acme").reconfigure("3 RPM burst 3")
    await asyncio.sleep(3)
    await take(two, tenant="acme")
    assert two.key("acme").limits == (Limit("requests", 3, burst=3),)
    with pytest.raises(TimeoutError):
        await two.acquire(tenant="acme", timeout=1)
    await one.aclose()
    await two.aclose()


@pytest.mark.parametrize("earlier", [1, 0])
async def test_outage_leaves_each_process_its_share_of_a_tenants_limit(
    memory: MemoryStore, earlier: int
) -> None:
    both = memory.limiters(2, ROOT)
    admitted: list[tuple[float, int]] = []

    async def agent(limiter: Limiter) -> None:
        while True:
            async with limiter.acquire(tenant="acme"):
                admitted.append((memory.seconds, 1))

    for limiter in both:
        limiter.per_key("10 requests/10s burst 10")
        await take(limiter)
        for _ in range(earlier):
            async with limiter.acquire(tenant="acme"):
                admitted.append((memory.seconds, 1))
    await asyncio.sleep(2)
    memory.gone = True
    agents = [asyncio.ensure_future(agent(limiter)) for limiter in both for _ in range(2)]
    await asyncio.sleep(25)
    alone = len(admitted)
    memory.gone = False
    await asyncio.sleep(21)
    await stop(*agents)
    for limiter in both:
        await limiter.aclose()
    assert_never_over(admitted, "10 requests/10s burst 10")
    assert alone >= 20, "the shares were not used"
    assert len(admitted) >= 40, "not all was used afterwards"


@pytest.mark.parametrize("seed", range(6))
async def test_random_calls_of_tenants_keep_all_limits_through_outages_and_leave_nothing(
    memory: MemoryStore, seed: int
) -> None:
    chance, booked = random.Random(seed), dict[str, list[float]]()
    memory.delay = chance.choice([0.001, 0.01, 0.05])
    limit = chance.choice(["8 requests/4s burst 8", "2 requests/s burst 2"])
    three = memory.limiters(3, "30 requests/5s burst 3", concurrency=4, on_outage="closed")
    for limiter in three:
        limiter.per_key(limit, "800 tokens/4s", concurrency=2)

    async def agent(limiter: Limiter) -> None:
        while True:
            await asyncio.sleep(chance.choice([0, 0.1, 2]))
            wait, tenant = chance.choice([0.003, 0.5, 9]), chance.choice("abc")
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(wait),
                    limiter.acquire(tenant=tenant, tokens=90) as lease,
                ):
                    for meter, resource in lease._route.meters:
                        if resource == "requests" and isinstance(meter, BookedMeter):
                            starts = booked.setdefault(meter._place.name, [])
                            starts.append(meter._reservation.booked_at * 1e-9)
                    await asyncio.sleep(chance.choice([0, 0.2, 1]))
                    lease.settle(tokens=chance.choice([40, 90]))

    agents = [asyncio.ensure_future(agent(limiter)) for limiter in three for _ in range(6)]
    for _ in range(6):
        await asyncio.sleep(4)
        memory.gone = seed % 2 == 1
        await asyncio.sleep(chance.choice([0.1, 1, 3]))
        memory.gone = False
    await stop(*agents)
    await asyncio.sleep(12)
    assert len(booked) == 4
    for name, starts in booked.items():
        kept = "30 requests/5s burst 30" if name == "openai" else limit
        assert_never_over([(start, 1) for start in sorted(starts)], kept)
    for name, state in memory.states.items():
        now = state.peek(memory.now())
        assert (now.slots, {use.used for use in now.limits}) == (0, {0})
        assert now.workers == (3 if name == "openai" else 0)
    for limiter in three:
        assert {
            (each.standing.waiting, each.slots.in_flight) for each in limiter._node.children or ()
        } == {(0, 0)}
        await limiter.aclose()


async def test_idle_tenants_leave_the_store_and_the_process(memory: MemoryStore) -> None:
    limiter = memory.limiter(ROOT)
    limiter.per_key("10 RPM burst 10", alive=10)
    await asyncio.gather(*(take(limiter, tenant=f"tenant {number}") for number in range(100)))
    await asyncio.sleep(3)
    sessions = [task for task in asyncio.all_tasks() if "store session" in task.get_name()]
    assert len(sessions) == 1, "a tenant is still at the store"
    for _ in range(50):
        await take(limiter, tenant="tenant 0")
        await asyncio.sleep(6)
    gc.collect()
    assert len(limiter._node.children or ()) <= 10
    assert {len(state.workers) for state in memory.states.values()} == {0, 1}
    await limiter.aclose()


async def test_use_that_is_settled_while_a_tenant_leaves_reaches_the_store(
    memory: MemoryStore,
) -> None:
    limiter = memory.limiter(ROOT)
    limiter.per_key("1k TPM")
    memory.delay = 0.05
    for number in range(30):
        lease = await limiter.acquire(tenant=f"tenant {number}", tokens=100)
        lease.release()
        await asyncio.sleep(number * 0.01)
        lease.settle(tokens=20)
    await asyncio.sleep(1)
    assert {used(memory, limiter.key(f"tenant {number}"))[0] for number in range(30)} == {20}
    await limiter.aclose()


@pytest.mark.parametrize("limits", ["3 RPM burst 3", "1500 TPM"])
async def test_many_tenants_share_their_limits_through_a_store(
    where: str, limits: str, limited: Limiters
) -> None:
    both, passed = [limited(where, ROOT) for _ in range(2)], Counter[str]()
    for limiter in both:
        limiter.per_key(limits)

    async def call(limiter: Limiter, tenant: str) -> None:
        async with limiter.acquire(tenant=tenant, tokens=500, timeout=4):
            passed[tenant] += 1

    threads = threading.active_count()
    tenants = [f"sk-secret-{number}" for number in range(10)]
    calls = [call(limiter, tenant) for _ in range(3) for limiter in both for tenant in tenants]
    told = await asyncio.gather(*calls, return_exceptions=True)
    assert set(map(type, told)) == {type(None), AcquireTimeout}
    assert passed == dict.fromkeys(tenants, 3)
    assert threading.active_count() <= threads + 2
    store = open_store(where)
    assert await store.names() == ["openai"]
    snapshot = await store.peek(both[0].key("sk-secret-0").name)
    assert snapshot is not None
    assert snapshot.limits[0].available == 0
    await store.aclose()


async def test_keys_of_tenants_are_small_expire_and_name_nobody(
    url: str, redis: Any, limited: Limiters
) -> None:
    limiter = limited(url, ROOT)
    limiter.per_key("3 RPM", "10k TPM")
    for number in range(20):
        async with limiter.acquire(tenant=f"sk-secret-{number}", tokens=500) as lease:
            lease.settle(tokens=400)
    connections = [each for each in redis.client_list() if "asyncbucket" not in each["name"]]
    assert len(connections) <= 3 + 1
    keys = [key for key in redis.scan_iter() if "/*" in key and key.endswith(":state")]
    assert len(keys) == 20
    for key in keys:
        assert key.startswith("asyncbucket:{openai}/*"), "it is on another node of a cluster"
        assert "secret" not in key
        assert redis.memory_usage(key, samples=0) <= 3_000
        assert 60 < redis.ttl(key) < 2 * 3_600
    await limiter.aclose()
