"""A limiter for each tenant, made on demand: few are kept, and nobody's quota is forgotten."""

import asyncio
import concurrent.futures
import contextlib
import gc
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from asyncbucket import Limit, Limiter, Pool, WouldBlock, agent
from asyncbucket.levels import observe_remaining, terms_of
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import available, used

OTHER_TERMS = (
    "this tenant already exists on other terms: get it by name alone, and change it with key"
)


def crowd_out(limiter: Limiter) -> None:
    """Have others come, so that all tenants go that may."""
    for number in range(30):
        limiter.key(f"passer-by {number} of {limiter.now()}")
    gc.collect()


def test_tenant_is_one_limiter_by_key_and_acquire_and_its_name_is_hidden(time: VirtualTime) -> None:
    key = Limiter("100 RPM", name="openai", clock=time.clock)
    earlier = key.key("earlier")
    key.per_key("2 RPM burst 2", concurrency=5)  # for those that come from now on
    acme = key.key("jane@example.org")
    assert key.key("jane@example.org") is acme
    assert (acme.parent, dict(key.children)) == (key, {})
    assert (earlier.limits, acme.limits) == ((), (Limit("requests", 2, burst=2),))
    acme.acquire_nowait()
    key.acquire_nowait(tenant="jane@example.org")
    with pytest.raises(WouldBlock) as error:
        key.acquire_nowait(tenant="jane@example.org")
    key.acquire_nowait(tenant="other")
    assert key.statistics().admitted == 3
    for text in (acme.name, repr(acme), str(error.value), repr(acme.statistics())):
        assert "jane" not in text
    assert len(acme.name) == len("openai/*") + 16
    assert key.key("\ud800").name != acme.name


def test_tenant_keeps_its_own_terms_even_while_it_is_let_go(time: VirtualTime) -> None:
    key = Limiter(name="key", clock=time.clock)
    key.per_key("100 RPM", alive=1)
    key.key("vip", rpm=500, weight=2)
    for _ in range(2):
        assert key.key("vip").limits == (Limit("requests", 500),)
        assert key.key("vip", "500 RPM", weight=2).limits == (Limit("requests", 500),)
        with pytest.raises(ValueError, match=OTHER_TERMS):
            key.key("vip", rpm=5)
        crowd_out(key)
    key.key("usual")
    with pytest.raises(ValueError, match=OTHER_TERMS):
        key.key("usual", rpm=5)
    key.per_key(alive=3)
    kept = [weakref.ref(key.key(f"user {number}")) for number in range(5)]
    assert [each() is not None for each in kept] == [False, False, True, True, True]


def use(tenant: Limiter) -> None:
    tenant.acquire_nowait().release()


#: What may be done to a tenant, and what then holds for it.
DONE: dict[str, tuple[Callable[[Limiter], Any], Callable[[Limiter], object]]] = {
    "nothing": (lambda _: None, lambda tenant: used(tenant) == [0]),
    "watched once": (lambda tenant: tenant.observe(print)(), lambda _: True),
    "used": (use, lambda tenant: used(tenant) == [1]),
    "open call": (
        lambda tenant: tenant.acquire_nowait(requests=0, tokens=1),
        lambda tenant: tenant.statistics().in_flight == 1,
    ),
    "paused": (lambda tenant: tenant.pause(600), lambda tenant: tenant.statistics().paused),
    "observed": (lambda tenant: tenant.observe(print), lambda tenant: tenant._node.observers),
    "reconfigured": (
        lambda tenant: tenant.reconfigure(rpm=1, weight=2),
        lambda tenant: len(tenant.limits) == terms_of(tenant)["weight"] == 2,
    ),
    "learned": (lambda tenant: tenant.learn(Limit("tokens", 7)), lambda tenant: tenant.limits),
    "parent": (lambda tenant: tenant.child("chat"), lambda tenant: tenant.children),
    "of tenants": (
        lambda tenant: use(tenant.key("user", "5 RPH burst 5")),
        lambda tenant: used(tenant.key("user")) == [1],
    ),
    "told what is left": (
        lambda tenant: observe_remaining(tenant, 0, resource="requests", per=3_600),
        lambda tenant: not available(tenant),
    ),
}


@pytest.mark.parametrize("done", DONE)
@pytest.mark.parametrize("handle", ["dropped", "kept"])
def test_nothing_done_to_a_tenant_is_forgotten(time: VirtualTime, done: str, handle: str) -> None:
    """Nor to one that nobody has asked for since, but somebody holds: it stays the only one."""
    do, stands = DONE[done]
    key = Limiter(name="key", clock=time.clock)
    key.per_key(*([] if done == "learned" else ["100 RPH burst 100"]), alive=1)
    tenant = key.key("a")
    if handle == "kept":
        crowd_out(key)
        assert key.key("a") is tenant
    reference, held = weakref.ref(tenant), do(tenant)
    del tenant
    crowd_out(key)
    assert (reference() is None) == (done in {"nothing", "watched once"})
    assert stands(key.key("a"))
    del held


@pytest.mark.parametrize("how", ["asked early", "settled late", "settled later", "held"])
async def test_use_of_tenant_that_was_let_go_meanwhile_counts(time: VirtualTime, how: str) -> None:
    """Its call was asked for before it was let go, and is admitted later, or reports its use."""
    key = Limiter(clock=time.clock)
    key.per_key("100 tokens/h", alive=1)
    if how == "asked early":
        asked = [key.acquire(tokens=100, tenant=f"tenant {number}") for number in range(10)]
        crowd_out(key)
        while asked:
            (await asked.pop()).release()
    else:
        lease = key.acquire_nowait(tokens=10, tenant="tenant 0")
        lease.release()
        if how != "settled late":  # later than its window remembers
            await asyncio.sleep(2 * 3_600)
        crowd_out(key)
        lease.settle(tokens=100 if how == "settled late" else 110)
        if how != "held":
            del lease
    crowd_out(key)
    assert available(key.key("tenant 0")) == 0


async def test_debt_of_tenant_is_kept(time: VirtualTime) -> None:
    """So is a debt to a bucket that lasts longer than the window remembers it."""
    key = Limiter(clock=time.clock)
    key.per_key("600 TPM burst 60", alive=1)
    await asyncio.sleep(1_000)
    twin = key.child("twin", "600 TPM burst 60")
    for limiter in (key.key("debtor"), twin):
        async with limiter.acquire(tokens=60) as lease:
            lease.settle(tokens=3_000)
    del limiter, lease
    for _ in range(12):
        crowd_out(key)
        assert available(key.key("debtor")) == available(twin)
        await asyncio.sleep(29.5)


@pytest.mark.heavy
def test_memory_stays_bounded_however_many_tenants_come(time: VirtualTime) -> None:
    key = Limiter("1M RPM", clock=time.clock)
    key.per_key("10 RPM", "1k TPM", weight=2)

    def visit(count: int, start: int) -> int:
        for number in range(start, start + count):
            key.acquire_nowait(tokens=100, tenant=f"tenant {number}").release()
            time.advance(0.1)
        gc.collect()
        return sys.getallocatedblocks()  # small objects: tables of hashes may grow once more

    before = visit(2_000, 0)
    assert visit(3_000, 2_000) < before + 1_000


@pytest.mark.heavy
async def test_2_000_idle_children_cost_no_tasks_and_little_memory(time: VirtualTime) -> None:
    key = Limiter("1000 RPM", clock=time.clock)
    gc.collect()
    tracemalloc.start()
    for prefix, limits in (("plain", ()), ("limited", ("10 RPM",))):
        before = tracemalloc.get_traced_memory()[0]
        for number in range(2_000):
            key.child(f"{prefix} {number}", *limits)
        gc.collect()
        each = (tracemalloc.get_traced_memory()[0] - before) / 2_000
        assert each < 2_100
    tracemalloc.stop()
    assert len(asyncio.all_tasks()) == 1
    assert len(key.children) == 4_000


@pytest.fixture
def threads_take_turns_often() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("threads_take_turns_often")
def test_threads_asking_for_one_tenant_get_same_limiter() -> None:
    """Also those that are the first to ask for any."""
    for _ in range(100):
        key = Limiter()
        start = threading.Barrier(4)

        def ask(key: Limiter = key, start: threading.Barrier = start) -> tuple[Limiter, Limiter]:
            start.wait(20)
            return key.key("acme"), key.child("chat")

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = [job.result(20) for job in [pool.submit(ask) for _ in range(4)]]
        assert len({id(tenant) for tenant, _ in found}) == 1
        assert len({id(child) for _, child in found}) == 1


async def passes(limiter: Limiter, callers: dict[str, Any], seconds: float) -> dict[str, int]:
    """Return how many calls of each name passed, if each caller asks again and again."""
    passed = dict.fromkeys(callers, 0)

    async def caller(name: str, scope: Any, call: dict[str, Any]) -> None:
        with scope():
            while True:
                async with limiter.acquire(**call):
                    passed[name] += 1
                    await asyncio.sleep(0.5)

    tasks = [
        asyncio.ensure_future(caller(name, scope, call))
        for name, (many, scope, call) in callers.items()
        for _ in range(many)
    ]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert limiter.statistics().in_flight == 0
    return passed


@pytest.mark.parametrize("pooled", [False, True], ids=["per_key", "pool"])
async def test_tenant_gets_no_more_by_many_agents(time: VirtualTime, *, pooled: bool) -> None:
    limiter: Any = Limiter("300 RPM burst 1", name="a", clock=time.clock)
    if pooled:
        limiter = Pool(limiter, Limiter("300 RPM burst 1", name="b", clock=time.clock))
    callers = {
        "many": (100, partial(agent, kind="k"), {"tenant": "many"}),
        "one": (10, contextlib.nullcontext, {"tenant": "one"}),
    }
    passed = await passes(limiter, callers, 300)
    assert abs(passed["many"] - passed["one"]) <= 2


async def test_priorities_within_a_tenant_leave_the_others_their_shares(time: VirtualTime) -> None:
    """Its own urgent calls go first, eight to one; without ``"within"`` they do beside all."""
    callers: dict[str, Any] = {
        "good": (20, contextlib.nullcontext, {"tenant": "good"}),
        "evil": (20, contextlib.nullcontext, {"tenant": "evil", "priority": 1}),
        "evil's own": (20, contextlib.nullcontext, {"tenant": "evil"}),
    }
    fair, plain = (Limiter("120 RPM burst 1", clock=time.clock) for _ in range(2))
    fair.per_key(priority="within")
    passed = await passes(fair, callers, 900)
    both = passed["evil"] + passed["evil's own"]
    assert abs(passed["good"] - both) <= 2
    assert passed["evil"] == pytest.approx(both * 8 / 9, abs=2)
    passed = await passes(plain, callers, 900)
    assert passed["evil"] == pytest.approx(sum(passed.values()) * 8 / 9, abs=2)
    with pytest.raises(ValueError, match="priority must be"):
        fair.acquire(priority="within")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_finalizer_of_a_tenant_calls_no_clock(time: VirtualTime) -> None:
    """A clock may need what is gone then; what was used since is remembered all the same."""
    working = [True]

    def clock() -> int:
        assert working
        return time.clock()

    key = Limiter(clock=clock)
    key.per_key("2 RPM burst 2", alive=1)
    lease = key.acquire(tenant="acme")
    crowd_out(key)
    (await lease).release()
    working.clear()
    del lease
    gc.collect()
    working.append(True)
    crowd_out(key)
    assert available(key.key("acme")) == 1
