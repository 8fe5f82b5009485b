"""A limiter for each tenant, made on demand: few are kept, and nobody's quota is forgotten."""

import asyncio
import concurrent.futures
import gc
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket import AcquireTimeout, Limit, Limiter, WouldBlock
from asyncbucket.core.account import Account
from asyncbucket.core.levels import is_under
from asyncbucket.core.rest import put_to_rest_locked
from asyncbucket.testing import VirtualTime, assert_never_over, assert_within_bucket, virtual_time
from tests.core.conftest import FakeLock


def crowd_out(limiter: Limiter, *, times: int = 8) -> None:
    """Ask for enough other tenants that idle ones are put to rest."""
    for number in range(times):
        limiter.key(f"passer-by {number} of {limiter.now()}")


async def test_tenant_is_same_limiter_by_key_and_by_acquire(virtual_time: VirtualTime) -> None:
    key = Limiter("100 RPM", name="openai", clock=virtual_time.clock)
    key.per_key("2 RPM burst 2", concurrency=5)
    acme = key.key("acme")
    assert key.key("acme") is acme
    assert acme.parent is key
    assert acme.limits == (Limit("requests", 2, burst=2),)
    await acme.acquire()
    await key.acquire(tenant="acme")
    with pytest.raises(WouldBlock):
        key.acquire_nowait(tenant="acme")
    key.acquire_nowait(tenant="other")
    assert key.statistics().admitted == 3


async def test_telemetry_lists_only_tenants_with_calls(virtual_time: VirtualTime) -> None:
    key = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    assert key._busy_tenants() == []
    first, second = key.key("first"), key.key("second")
    key.key("idle")
    lease = await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    await virtual_time.all_blocked()
    assert key._busy_tenants() == [first, second]
    lease.release()
    assert key._busy_tenants() == [second]
    (await waiting).release()
    assert key._busy_tenants() == []


async def test_name_of_tenant_is_never_shown(virtual_time: VirtualTime) -> None:
    """It appears in no name, repr, error or statistics, and `children` does not list it."""
    key = Limiter(name="openai", clock=virtual_time.clock)
    secret = "jane@example.org"
    tenant = key.key(secret, "1 RPM")
    await tenant.acquire()
    with pytest.raises(WouldBlock) as error:
        tenant.acquire_nowait()
    for text in (tenant.name, repr(tenant), str(error.value), repr(tenant.statistics())):
        assert "jane" not in text
    assert tenant.name == f"openai/{tenant.name.removeprefix('openai/')}"
    assert tenant.name.startswith("openai/*")
    assert len(tenant.name) == len("openai/*") + 16
    assert dict(key.children) == {}
    assert key.key("\ud800").name != tenant.name


def test_tenant_keeps_its_own_terms_even_while_at_rest(virtual_time: VirtualTime) -> None:
    """They stay even while it is at rest; asking with other terms is an error, as for a child."""
    key = Limiter(name="key", clock=virtual_time.clock)
    key.per_key("100 RPM", alive=1)
    key.key("vip", rpm=500, weight=2)
    message = "this tenant exists on other terms: ask for it by name alone, and change it with key"
    for _ in range(2):
        assert key.key("vip").limits == (Limit("requests", 500),)
        assert key.key("vip", "500 RPM", weight=2).limits == (Limit("requests", 500),)
        with pytest.raises(ValueError, match=message):
            key.key("vip", rpm=5)
        crowd_out(key)
    key.key("usual")
    with pytest.raises(ValueError, match=message):
        key.key("usual", rpm=5)
    key.key("same", rpm=500, weight=2)
    keys = key._tenants()
    assert keys._own_terms["same"] is keys._own_terms["vip"]


def test_per_key_template_applies_only_to_later_tenants(virtual_time: VirtualTime) -> None:
    """A tenant that exists already keeps the terms it was made with."""
    key = Limiter(clock=virtual_time.clock)
    assert key.key("first").limits == ()
    key.per_key(rpm=10)
    assert key.key("first").limits == ()
    assert key.key("second").limits == (Limit("requests", 10),)
    with pytest.raises(ValueError, match="alive must be a whole number of at least 0, not -1"):
        key.per_key(alive=-1)
    with pytest.raises(ValueError, match="alive must be a whole number of at least 0, not None"):
        key.per_key(alive=None)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def test_tenant_asked_for_last_is_alive_even_with_alive_0(virtual_time: VirtualTime) -> None:
    """This holds with alive=0, too: old handles find the same account, which keeps its counts."""
    key = Limiter(clock=virtual_time.clock)
    key.per_key("10 RPM burst 10", alive=0)
    first, second = key.key("first"), key.key("second")
    for _ in range(3):
        first.acquire_nowait().release()
        second.acquire_nowait().release()
        assert len(key._tenants()) == 1
    assert [each.statistics().limits[0].used for each in (first, second)] == [3, 3]


async def test_old_handle_works_after_its_tenant_was_put_to_rest(virtual_time: VirtualTime) -> None:
    key = Limiter("1000 RPM", name="key", clock=virtual_time.clock)
    key.per_key("60 TPM", "10 RPM burst 5", alive=2)
    old = key.key("old")
    (await old.acquire(tokens=40)).release()
    methods: list[Callable[[], Any]] = [
        lambda: old.explain(tokens=1).cost,
        lambda: old.statistics().limits[0].used,
        lambda: repr(old),
        lambda: old.limits,
        lambda: old.acquire_nowait(tokens=0).release(),
        lambda: old.pause(0),
        lambda: old.observe_remaining(5, resource="images", per=1),
        lambda: old.learn(Limit("images", 3)),
        lambda: old.max_queue,
        lambda: old.acquire(tokens=1).close(),
    ]
    for method in methods:
        account = old._account
        crowd_out(key)
        assert account.retired
        assert len(key._tenants()) <= 3
        method()
        assert old.statistics().limits[0].used == 40
        await asyncio.sleep(0.1)
    crowd_out(key)
    waiting = asyncio.ensure_future(old.acquire(tokens=30))
    await virtual_time.all_blocked()
    assert not waiting.done()
    assert key.key("old").statistics().waiting == 1
    crowd_out(key)
    assert key.statistics().waiting == 1
    await waiting
    assert virtual_time.now >= 60


def test_old_and_new_handles_of_tenant_give_same_children(virtual_time: VirtualTime) -> None:
    key = Limiter(clock=virtual_time.clock)
    key.per_key("10 RPM burst 10", alive=1)
    old = key.key("acme")
    account = old._account
    crowd_out(key)
    assert account.retired
    new = key.key("acme")
    chat = old.child("chat", "2 RPM burst 2")
    assert new.child("chat") is chat
    assert new.children == old.children == {"chat": chat}
    assert is_under(old, new)
    assert is_under(chat, new)
    assert not is_under(new, chat)
    old.per_key("2 RPM burst 2")
    assert old.key("user") is new.key("user")
    for first, second in (
        (old.child("chat"), new.child("chat")),
        (old.key("user"), new.key("user")),
    ):
        first.acquire_nowait()
        second.acquire_nowait()
        for each in (first, second):
            with pytest.raises(WouldBlock):
                each.acquire_nowait()


async def test_busy_tenant_is_not_put_to_rest(virtual_time: VirtualTime) -> None:
    def idle(_: Limiter) -> None:
        pass

    key = Limiter(name="key", clock=virtual_time.clock)
    key.per_key("100 RPM", alive=1)
    reasons: list[tuple[bool, Callable[[Limiter], Any]]] = [
        (False, idle),
        (True, lambda limiter: limiter.acquire_nowait()),
        (True, lambda limiter: limiter.pause(1)),
        (True, lambda limiter: limiter.observe(print)),
        (False, lambda limiter: limiter.observe(print)()),
        (True, lambda limiter: limiter.reconfigure(rpm=50)),
        (True, lambda limiter: limiter.reconfigure(weight=2)),
        (True, lambda limiter: limiter.child("chat")),
        (True, lambda limiter: limiter.key("its own tenant")),
        (True, lambda limiter: limiter.observe_remaining(5, resource="requests", per=60)),
        (False, lambda limiter: limiter.acquire_nowait().release()),
    ]
    for number, (busy, why) in enumerate(reasons):
        limiter = key.key(f"tenant {number}")
        account, held = limiter._account, why(limiter)
        crowd_out(key, times=30)
        assert account.retired != busy, number
        del held


def test_learned_limit_of_tenant_survives_rest(virtual_time: VirtualTime) -> None:
    key = Limiter(clock=virtual_time.clock)
    key.per_key(alive=1)
    key.key("learned").learn(Limit("requests", 7))
    crowd_out(key)
    assert key.key("learned").limits == (Limit("requests", 7),)


@pytest.mark.parametrize("limits", [(), ("100 RPM",)], ids=["slots only", "slots and window"])
async def test_tenant_whose_admitted_call_has_not_run_yet_is_not_put_to_rest(
    virtual_time: VirtualTime, limits: tuple[str, ...]
) -> None:
    """Its slot is not given to another call meanwhile."""
    key = Limiter(clock=virtual_time.clock)
    key.per_key(*limits, concurrency=1, alive=1)
    held = await key.acquire(tenant="a")
    waiting = asyncio.ensure_future(key.acquire(tenant="a"))
    await virtual_time.all_blocked()
    held.release()
    account = key.key("a")._account
    while account.waiting:
        await asyncio.sleep(0)
        crowd_out(key)
    assert not account.retired
    lease = await waiting
    with pytest.raises(WouldBlock):
        key.acquire_nowait(tenant="a")
    lease.release()


async def test_debt_of_tenant_survives_rest(virtual_time: VirtualTime) -> None:
    """So is a debt to a bucket that lasts longer than the window remembers it."""
    key = Limiter(clock=virtual_time.clock)
    key.per_key("600 TPM burst 60", alive=1)
    await asyncio.sleep(1_000)
    debtor, twin = key.key("debtor"), key.child("twin", "600 TPM burst 60")
    for limiter in (debtor, twin):
        async with limiter.acquire(tokens=60) as lease:
            lease.settle(tokens=3_000)
    for _ in range(12):
        account = debtor._account
        crowd_out(key)
        assert account.retired
        assert debtor.statistics().limits[0].available == twin.statistics().limits[0].available
        await asyncio.sleep(29.5)
    assert len(key._tenants()._resting) <= 8


asks = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 30), st.sampled_from([0.0, 0.0, 0.3, 5.0, 40.0])),
    min_size=20,
    max_size=80,
)


@settings(deadline=None, max_examples=50)
@given(asks)
def test_rest_resets_no_limit_of_tenant(history: list[tuple[int, int, float]]) -> None:
    """Only three of six tenants are alive at a time, but each keeps its own limits."""
    traces: dict[int, list[tuple[int, int]]] = {}
    requests: dict[int, list[tuple[int, int]]] = {}

    async def call(time: VirtualTime, key: Limiter, tenant: int, tokens: int) -> None:
        async with key.acquire(tokens=tokens, tenant=f"tenant {tenant}"):
            traces.setdefault(tenant, []).append((time.clock(), tokens))
            requests.setdefault(tenant, []).append((time.clock(), 1))

    async def main(time: VirtualTime) -> None:
        key = Limiter("10k TPM", clock=time.clock)
        key.per_key("60 TPM", "30 RPM burst 4", concurrency=2, alive=3)
        async with asyncio.TaskGroup() as group:
            for tenant, tokens, pause in history:
                group.create_task(call(time, key, tenant, tokens))
                await asyncio.sleep(pause)
        now = key.statistics()
        assert (now.waiting, now.in_flight, now.admitted) == (0, 0, len(history))

    with virtual_time() as time:
        time.run(main(time))
    for tenant, trace in traces.items():
        assert_never_over(trace, Limit("tokens", 60))
        assert_never_over(requests[tenant], Limit("requests", 30, burst=4))
        assert_within_bucket(requests[tenant], rate=0.5, burst=4)


@pytest.mark.heavy
def test_memory_stays_bounded_however_many_tenants_come(virtual_time: VirtualTime) -> None:
    """Tenants gone for longer than their windows leave nothing behind."""
    gc.collect()
    tracemalloc.start()
    key = Limiter("1M RPM", clock=virtual_time.clock)
    key.per_key("10 RPM", "1k TPM", weight=2)

    def visit(count: int, start: int) -> None:
        for number in range(start, start + count):
            key.acquire_nowait(tokens=100, tenant=f"tenant {number}").release()
            virtual_time.advance(0.1)

    visit(4_000, 0)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    visit(6_000, 4_000)
    gc.collect()
    assert tracemalloc.get_traced_memory()[0] < before + 100_000
    assert before < 8_000_000
    tracemalloc.stop()
    visit(4_000, 10_000)
    keys = key._tenants()
    assert len(keys) == len(key._account.children) == 1_000
    assert len(keys._resting) <= 1_300
    assert not keys._own_terms


@pytest.mark.heavy
async def test_10_000_idle_children_cost_no_tasks_and_little_memory(
    virtual_time: VirtualTime,
) -> None:
    """A child takes under 2 kB, with or without a limit of its own."""
    key = Limiter("1000 RPM", clock=virtual_time.clock)
    gc.collect()
    tracemalloc.start()
    for prefix, limits in (("plain", ()), ("limited", ("10 RPM",))):
        before = tracemalloc.get_traced_memory()[0]
        for number in range(10_000):
            key.child(f"{prefix} {number}", *limits)
        gc.collect()
        each = (tracemalloc.get_traced_memory()[0] - before) / 10_000
        assert each < 2_048
    tracemalloc.stop()
    assert len(asyncio.all_tasks()) == 1
    assert len(key.children) == 20_000


def test_threads_asking_for_one_tenant_get_same_limiter() -> None:
    """The same holds for a child, so nobody has two quotas."""
    for _ in range(20):
        key = Limiter()
        key.per_key("5 RPM burst 5", alive=2)
        start = threading.Barrier(4)

        def ask(key: Limiter = key, start: threading.Barrier = start) -> tuple[Limiter, Limiter]:
            start.wait(20)
            return key.key("acme"), key.child("chat")

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = [job.result(20) for job in [pool.submit(ask) for _ in range(4)]]
        assert len({id(tenant) for tenant, _ in found}) == 1
        assert len({id(child) for _, child in found}) == 1
        assert len(key._account.children) == 2


def test_thread_asking_for_tenant_being_made_gets_same_limiter(virtual_time: VirtualTime) -> None:
    key = Limiter(clock=virtual_time.clock)
    keys, found = key._tenants(), []
    make = keys._make

    def slowly(*what: Any) -> Any:
        if not others:
            others.append(threading.Thread(target=lambda: found.append(key.key("acme"))))
            others[0].start()
            others[0].join(0.1)  # until it has been found, or was kept out for that long
        return make(*what)

    others: list[threading.Thread] = []
    keys._make = slowly
    acme = key.key("acme")
    others[0].join(20)
    assert found == [acme]


class Snatching(FakeLock):
    """A lock whose holder finds, the first few times, that another thread was faster."""

    def __init__(self, snatch: Callable[[], bool], *, times: int) -> None:
        super().__init__()
        self._snatch, self._times = snatch, times

    def acquire(self, blocking: bool = True) -> bool:  # noqa: FBT001, FBT002 - as `Lock.acquire`
        if self._times and self._snatch():
            self._times -= 1
        return super().acquire(blocking)


@pytest.mark.parametrize("how", ["nowait", "await", "refused", "line"])
async def test_call_is_booked_if_other_thread_puts_tenant_to_rest_meanwhile(
    virtual_time: VirtualTime, how: str
) -> None:
    key = Limiter(clock=virtual_time.clock)
    key.per_key("2 RPM burst 2", alive=1)
    tenant = key.key("a")
    tenant.acquire_nowait().release()
    if how in ("refused", "line"):
        tenant.acquire_nowait().release()

    def retire() -> bool:
        account = tenant._door._account
        if account.retired:
            return False
        now = virtual_time.clock()
        rest = put_to_rest_locked(account, now)
        assert rest is not None
        keys = key._tenants()
        del keys._limiters["a"]
        keys._resting["a"] = rest
        return True

    budget = key._budget
    budget.lock = Snatching(retire, times=2)  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    if how == "nowait":
        tenant.acquire_nowait().release()
    elif how == "await":
        (await tenant.acquire()).release()
    elif how == "refused":
        with pytest.raises(WouldBlock):
            tenant.acquire_nowait()
    else:
        with pytest.raises(AcquireTimeout):
            await tenant.acquire(timeout=1)
    assert tenant.statistics().limits[0].used == 2
    with pytest.raises(WouldBlock):
        key.acquire_nowait(tenant="a")


STEERED: dict[str, tuple[Callable[[Limiter], object], Callable[[Limiter], object]]] = {
    "pause": (lambda tenant: tenant.pause(60), lambda tenant: tenant.statistics().paused),
    "reconfigure": (
        lambda tenant: tenant.reconfigure(rpm=1),
        lambda tenant: tenant.limits[0].amount == 1,
    ),
    "observe_remaining": (
        lambda tenant: tenant.observe_remaining(0, resource="requests", per=60),
        lambda tenant: not tenant.statistics().limits[0].available,
    ),
    "learn": (lambda tenant: tenant.learn(Limit("images", 5)), lambda tenant: tenant.limits),
}


@pytest.mark.parametrize("how", STEERED)
def test_change_to_tenant_is_not_lost_to_concurrent_rest(how: str) -> None:
    """Otherwise a thread that asks for other tenants could make the change be forgotten."""
    steer, stands = STEERED[how]
    key = Limiter(clock=lambda: 0)
    key.per_key(*([] if how == "learn" else ["2 RPM burst 2"]), alive=1)
    tenant = key.key("a")
    others = threading.Thread(target=crowd_out, args=(key,))

    def in_between() -> bool:
        key._node.pacer.lock = plain
        others.start()
        others.join(0.1)  # until they are there, or were kept out for that long
        return True

    plain = key._node.pacer.lock
    key._node.pacer.lock = Snatching(in_between, times=1)  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    steer(tenant)
    others.join(20)
    assert stands(key.key("a"))


def test_tenant_of_tenant_keeps_its_use_through_rest(virtual_time: VirtualTime) -> None:
    """The quotas of an organisation's users are kept with it while it is at rest."""
    key = Limiter(clock=virtual_time.clock)
    key.per_key("100 RPM", alive=1)
    organisation = key.key("organisation")
    organisation.per_key("5 RPM burst 5", alive=1)
    organisation.key("user").acquire_nowait().release()
    crowd_out(key)
    crowd_out(organisation)
    user = key.key("organisation").key("user")
    assert user.statistics().limits[0].used == 1
    assert user.parent is organisation
    assert isinstance(user._account, Account)
    assert user._account.belongs_to_tenant


def test_tenant_comes_back_on_changed_template_with_its_use(virtual_time: VirtualTime) -> None:
    key = Limiter(clock=virtual_time.clock)
    key.per_key("100 RPM", "50 images/60s", alive=1)
    key.acquire_nowait(tenant="a", images=7).release()
    crowd_out(key)
    key.per_key("20 RPM", "60 TPM", alive=1)
    used = {use.limit.resource: use.used for use in key.key("a").statistics().limits}
    assert used == {"requests": 1, "tokens": 0}
