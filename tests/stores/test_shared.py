"""A limiter with a store as people use it: loops, threads, changes, refusals, and the order."""

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from asyncbucket import AcquireTimeout, Cost, Limit, Limiter, Pool, StoreError, WouldBlock, agent
from asyncbucket.core.events import Event, LimitChanged, StoreLost
from asyncbucket.http import OPENAI
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.stores import LimitConfig, open_store
from asyncbucket.stores.pending import PendingUpdates
from asyncbucket.stores.redis import RedisLedger
from asyncbucket.testing import assert_never_over
from tests.stores.conformance.place import peek_at, terms

Limiters: TypeAlias = Callable[..., Limiter]


@pytest.fixture
def shared(where: str, limited: Limiters) -> Limiters:
    return functools.partial(limited, where)


async def test_acquire_nowait_with_store_raises_would_block(shared: Limiters) -> None:
    limiter = shared("10 RPM")
    with pytest.raises(WouldBlock, match="the store that keeps its limits has to be asked") as told:
        limiter.acquire_nowait()
    assert told.value.retry_after is None


async def test_calls_of_agents_go_to_the_store_in_the_order_of_the_agents(shared: Limiters) -> None:
    limiter = shared("60 requests/s burst 1")
    (await limiter.acquire()).release()
    limiter.pause(0.3)
    passed: list[str] = []

    async def call(name: str) -> None:
        async with limiter.acquire():
            passed.append(name)

    async def run(name: str, calls: int) -> None:
        with agent(name, expects=Cost(requests=calls)):
            await asyncio.gather(*(call(name) for _ in range(calls)))

    await asyncio.gather(run("a", 5), run("b", 2), run("c", 3))
    assert "".join(passed) == "bbcccaaaaa"


async def test_timed_out_call_does_not_hold_up_other_limiters(where: str, shared: Limiters) -> None:
    one, two = [shared("1000 tokens/minute", concurrency=5) for _ in range(2)]
    (await one.acquire(tokens=900)).release()
    begun = time.perf_counter()
    with pytest.raises(AcquireTimeout, match=r"tokens bind for (60\.\d|59\.\d+) s more") as error:
        await one.acquire(tokens=500, timeout=0.1)
    assert error.value.bound_by == "tokens"
    (await two.acquire(tokens=50, timeout=2)).release()
    assert time.perf_counter() - begun < 1.5
    await one.aclose()
    await two.aclose()
    snapshot = await peek_at(open_store(where))
    assert (snapshot.limits[0].used, snapshot.slots) == (950, 0)


async def test_call_that_cannot_start_before_its_deadline_fails_at_once(shared: Limiters) -> None:
    """Unless a call is open whose refund may let it start; and also behind one that waits for ever."""
    one, two = [shared("10 tokens/day") for _ in range(2)]
    lease = await one.acquire(tokens=10)
    hopeful = asyncio.ensure_future(two.acquire(tokens=5, timeout=600))
    patient = asyncio.ensure_future(two.acquire(tokens=5))
    await asyncio.sleep(0.1)
    assert not hopeful.done()
    lease.settle(tokens=5)
    lease.release()
    async with asyncio.timeout(10):
        (await hopeful).release()
        for tokens, options in ((5, {"timeout": 600}), (6, {"deadline": time.monotonic() + 600})):
            with pytest.raises(AcquireTimeout, match=r"tokens bind for 86,\d+ s more") as error:
                await two.acquire(tokens=tokens, **options)
            assert error.value.retry_after > 86_000
    assert not patient.done()
    patient.cancel()


async def test_errors_say_when_other_limiters_hold_all_slots(shared: Limiters) -> None:
    one, two = [shared("1000 RPM", concurrency=1) for _ in range(2)]
    async with one.acquire():
        with pytest.raises(AcquireTimeout, match="all slots are taken") as error:
            await two.acquire(timeout=1)
        child = two.child("child", concurrency=3)
        waiting = asyncio.gather(*(take(child) for _ in range(3)))
        await asyncio.sleep(0.05)
        with pytest.raises(WouldBlock, match="all 3 slots are taken"):
            child.acquire_nowait()
    await waiting
    assert (error.value.bound_by, error.value.retry_after) == ("concurrency", None)


async def test_closing_fails_waiting_calls_with_store_error(where: str, shared: Limiters) -> None:
    limiter = shared("20/s burst 1")
    (await limiter.acquire()).release()
    calls = [asyncio.ensure_future(take(limiter)) for _ in range(60)]
    await asyncio.sleep(0.02)
    await limiter.aclose()
    async with asyncio.timeout(5):
        ended = await asyncio.gather(*calls, return_exceptions=True)
    told = [error for error in ended if error is not None]
    assert all(isinstance(error, StoreError) for error in told)
    assert "was closed while this call waited: close it when all calls" in str(told[0])
    snapshot = await peek_at(open_store(where))
    assert (snapshot.limits[0].used, snapshot.workers) == (1 + len(calls) - len(told), 0)


@pytest.mark.parametrize("turns", [1, 4, 9])
async def test_cancelled_closing_is_completed_by_closing_again(
    turns: int, where: str, shared: Limiters
) -> None:
    before, threads_before = asyncio.all_tasks(), threading.enumerate()
    limiter = shared("20/s")
    (await limiter.acquire()).release()
    closing = asyncio.ensure_future(limiter.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await limiter.aclose()
    assert (await peek_at(open_store(where))).workers == 0
    assert not [task for task in asyncio.all_tasks() - before if "asyncbucket" in task.get_name()]
    threads = [thread.name for thread in threading.enumerate() if thread not in threads_before]
    assert "asyncbucket sqlite" not in threads
    (await limiter.acquire()).release()


async def test_store_object_passed_to_limiter_is_left_open(where: str) -> None:
    store = open_store(where)
    one = Limiter("20/s", concurrency=2, store=store, name="one")
    two = Limiter("20/s", store=store, name="two")
    lost: list[Event] = []
    two.observe(lost.append)
    late = await one.acquire()
    (await two.acquire()).release()
    await one.aclose()
    late.release()
    (await two.acquire()).release()
    await asyncio.sleep(0.2)
    snapshot = await store.peek("one")
    assert snapshot is not None
    assert (snapshot.slots, snapshot.workers) == (0, 0)
    assert not [event for event in lost if isinstance(event, StoreLost)]
    (await one.acquire()).release()
    await one.aclose()
    await two.aclose()
    await store.aclose()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": ""}, "1 to 200 printable characters and no braces"),
        ({"name": "a{b}"}, "1 to 200 printable characters and no braces"),
        ({"name": "x" * 5_000}, "1 to 200 printable characters and no braces"),
        ({"name": "line\nbreak"}, "1 to 200 printable characters and no braces"),
        ({"slot_ttl": 0.09}, r"slot_ttl must be .* from 0\.1 to 86,400, a day, not 0\.09"),
        ({"slot_ttl": float("nan")}, "slot_ttl must be a number of seconds"),
        ({"on_outage": "half"}, "on_outage must be one of share, closed, open, not 'half'"),
        ({"concurrency": "auto"}, "with a store, concurrency must be a number"),
        (
            {"tpm": 10**15},
            "a store counts to 70,368,744,177,664: 1,000,000,000,000,000 tokens per .* is above; lower",
        ),
    ],
)
async def test_what_no_store_keeps_is_refused_when_limiter_is_made_or_changed(
    url: str, options: dict[str, Any], why: str, limited: Limiters
) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        limited(url, **{"rpm": 10, **options})
    assert len(str(refused.value)) < 400
    limiter = limited(url, "10 RPM", concurrency=4)
    if options.keys() & {"concurrency", "tpm"}:
        with pytest.raises(ValueError, match=why):
            limiter.reconfigure("20 RPM", **options)
    assert (limiter.limits, limiter.concurrency) == ((Limit("requests", 10),), 4)


async def test_refunds_and_slots_released_after_closing_reach_store(
    where: str, shared: Limiters
) -> None:
    one, two = [shared("1000 TPM", concurrency=2) for _ in range(2)]
    leases = [await one.acquire(tokens=400) for _ in range(2)]
    waiting = asyncio.ensure_future(take(two, tokens=800))
    await asyncio.sleep(0.1)
    two.reconfigure(concurrency=1)
    await one.aclose()
    assert not waiting.done()
    for lease in leases:
        lease.settle(tokens=100)
        lease.release()
    async with asyncio.timeout(5):
        await waiting
    for limiter in (one, two):  # the first leaves with its last slot
        await limiter.aclose()
    snapshot = await peek_at(open_store(where))
    assert (snapshot.config.concurrency, snapshot.slots, snapshot.workers) == (1, 0, 0)


async def test_held_slot_survives_closing_and_reopening(where: str, shared: Limiters) -> None:
    limiter = shared(concurrency=2, slot_ttl=0.3)
    lease = await limiter.acquire()
    await limiter.aclose()
    (await limiter.acquire()).release()
    await asyncio.sleep(0.6)
    assert (await peek_at(open_store(where))).slots == 1
    lease.release()
    await asyncio.sleep(0.2)
    assert (await peek_at(open_store(where))).slots == 0


@pytest.mark.parametrize("verb", ["commit", "changed"])
async def test_failed_session_fails_waiting_calls_and_is_replaced(
    url: str,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limited: Limiters,
) -> None:
    limiter = limited(url, "1000/s", concurrency=2, slot_ttl=0.3)
    leases = [await limiter.acquire() for _ in range(2)]

    async def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("odd")

    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR, "asyncbucket"):
        patched.setattr(RedisLedger, verb, fail)
        calls = [asyncio.ensure_future(take(limiter)) for _ in range(30)]
        async with asyncio.timeout(5):
            ended = await asyncio.gather(*calls, return_exceptions=True)
    told = [error for error in ended if error is not None]  # others got a slot that had expired
    assert {type(error) for error in told} == {StoreError}
    assert "has failed, see the log: ask again, and report this error" in str(told[0])
    said = [record.getMessage().partition(";")[0] for record in caplog.records]
    assert 1 <= len(said) <= 30 / 8 + 1
    assert set(said) == {"the session of limiter openai has failed"}
    assert "ArithmeticError: odd" in caplog.text
    for lease in leases:
        lease.release()
    async with asyncio.timeout(5):
        (await limiter.acquire()).release()


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize(("limit", "slots"), [("1000 TPM", None), ("1M TPM", 1)])
async def test_cancelled_call_does_not_hold_up_calls_behind_it(
    limit: str, slots: int | None, behind: int, shared: Limiters
) -> None:
    limiter = shared(limit, concurrency=slots)
    lease = await limiter.acquire(tokens=900)
    costly = asyncio.ensure_future(limiter.acquire(tokens=500))
    await asyncio.sleep(0.1)
    calls = [asyncio.ensure_future(take(limiter)) for _ in range(behind)]
    costly.cancel()
    await asyncio.sleep(0.1)
    lease.release()
    async with asyncio.timeout(5):
        await asyncio.gather(*calls, take(limiter))


async def take(limiter: Limiter, *, tokens: int | None = None) -> None:
    async with limiter.acquire(tokens=tokens):
        pass


async def test_pause_and_new_limits_apply_to_all_limiters_on_store(shared: Limiters) -> None:
    one, two = [shared("1000 RPM burst 100", concurrency=9) for _ in range(2)]
    told: list[str] = []
    both = asyncio.Event()

    def note(event: Event) -> None:
        if isinstance(event, LimitChanged):
            told.append(event.limit)
            if len(told) == 2:
                both.set()

    two.observe(note)
    for limiter in (one, two):
        (await limiter.acquire()).release()
    one.pause(0.6, reason="429")
    await asyncio.sleep(0.1)
    lease = await two.acquire()
    assert 0.35 < lease.waited < 2.0
    assert lease.bound_by == "paused"
    lease.release()
    one.reconfigure("5 RPM burst 5", concurrency=5)
    async with asyncio.timeout(10):
        await both.wait()
    for _ in range(2):  # three were admitted before
        (await two.acquire(timeout=0.5)).release()
    with pytest.raises(AcquireTimeout):
        await two.acquire(timeout=0.5)
    assert two.limits == one.limits
    assert told == ["5 requests per 60 s", "concurrency 5"]


@pytest.mark.parametrize("turns", [0, 3])
async def test_limits_changed_while_store_opens_reach_it(
    turns: int, where: str, shared: Limiters
) -> None:
    limiter = shared("1000 RPM burst 100")
    call = asyncio.ensure_future(take(limiter))
    for _ in range(turns):
        await asyncio.sleep(0)
    limiter.reconfigure("10 RPM burst 10", concurrency=3)
    limiter.pause(0.6)
    await call
    await limiter.aclose()
    snapshot = await peek_at(open_store(where))
    assert snapshot.config == LimitConfig(limits=limiter.limits, concurrency=3)
    assert snapshot.paused_until > 0


def test_what_is_set_while_the_store_is_told_of_something_else_is_told_next() -> None:
    updates, (one, two) = PendingUpdates(), [terms(f"{number} RPM") for number in (1, 2)]
    updates.config = one
    updates.pause(5, gradually=True)
    batch, heard = updates.batch((), now=2, horizon=0)
    assert (batch.config, batch.pause, batch.gradually) == (one, 3, True)
    updates.config = two
    updates.pause(4, gradually=False)  # ends earlier
    heard()
    batch, heard = updates.batch((), now=2, horizon=0)
    assert (batch.config, batch.pause) == (two, 0)
    heard()
    assert not updates


async def test_limit_dropped_by_another_limiter_no_longer_applies(shared: Limiters) -> None:
    one = shared("100 RPM burst 100", "10 TPM", concurrency=2)
    (await one.acquire()).release()
    two = shared("100 RPM burst 100")
    for limiter in (two, one):
        (await limiter.acquire()).release()
    assert one.limits == two.limits == (Limit("requests", 100, burst=100),)
    assert one.concurrency is None
    (await one.acquire(tokens=11)).release()
    one.reconfigure("50 RPM burst 50")
    await asyncio.sleep(0.1)
    (await two.acquire(tokens=11)).release()
    assert one.limits == two.limits == (Limit("requests", 50, burst=50),)


async def test_remaining_headers_count_only_for_limits_of_a_child(shared: Limiters) -> None:
    limiter = shared("600 RPM burst 600")
    child = limiter.child("chat", "300 RPM burst 300")
    (await child.acquire()).release()
    left, limit = (b"x-ratelimit-remaining-requests", b"0"), b"x-ratelimit-limit-requests"
    HeaderReader(limiter).read([left, (limit, b"600")], OPENAI, since=limiter.now())
    assert limiter.explain().bound_by is None
    assert child.explain().bound_by is None
    assert limiter.statistics().limits[0].available == 599
    assert not limiter._node.extra, "worked out for nothing"
    HeaderReader(child).read([left, (limit, b"300")], OPENAI, since=limiter.now())
    assert child.explain().bound_by == "requests"
    assert limiter.explain().bound_by is None


@pytest.mark.real_clock
async def test_units_freed_at_once_are_shared_by_waiting_limiters(shared: Limiters) -> None:
    limiters = [shared("60 requests/s burst 60") for _ in range(3)]
    await asyncio.gather(*(take(limiters[0]) for _ in range(60)))
    calls = [[asyncio.ensure_future(take(each)) for _ in range(40)] for each in limiters]
    await asyncio.sleep(1.5)
    shares = [sum(call.done() for call in of_one) for of_one in calls]
    assert sum(shares) == 60
    assert min(shares) >= 10, shares  # half of an equal share: the machine may be busy
    for call in (call for of_one in calls for call in of_one):
        call.cancel()
    await asyncio.gather(*(call for of_one in calls for call in of_one), return_exceptions=True)


async def test_urgent_call_overtakes_calls_waiting_for_store(shared: Limiters) -> None:
    limiter = shared("20/s burst 1")
    order: list[str] = []

    async def call(name: str, **options: Any) -> None:
        async with limiter.acquire(**options):
            order.append(name)

    waiting = [asyncio.create_task(call("batch", priority=2)) for _ in range(60)]
    await asyncio.sleep(0.3)
    await call("urgent", priority=0)
    assert order.count("batch") < 40
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_explanation_uses_last_answer_of_store(shared: Limiters) -> None:
    limiter = shared("9 RPM burst 9", "1000 TPM", concurrency=2)
    lease = await limiter.acquire(tokens=900)
    assert str(limiter.explain(tokens=100)).startswith("a call would pass at once; ")
    short = limiter.explain(tokens=101)
    assert (short.wait, short.bound_by) == (None, "tokens")
    assert str(short).startswith("a call would wait: tokens bind; requests allow 9 such calls")
    other = await limiter.acquire(tokens=1)
    assert "concurrency 2/2" in repr(limiter)
    assert "would wait until a slot is given back" in str(limiter.explain(tokens=1))
    call = asyncio.create_task(take(limiter, tokens=200))
    await asyncio.sleep(0.1)
    held = limiter.explain(tokens=1)
    assert (held.wait, held.bound_by) == (None, "concurrency")
    other.release()
    await asyncio.sleep(0.1)
    held = limiter.explain(tokens=1)
    assert held.bound_by == "tokens"
    assert 50 < (held.wait or 0) < 61
    call.cancel()
    lease.release()


async def test_statistics_match_limits_whatever_their_order(shared: Limiters) -> None:
    one = shared("500 RPM burst 500", "20k TPM", "10k RPD")
    two = shared("20k TPM", "10k RPD", "500 RPM burst 500")
    for limiter in (one, two, one):
        (await limiter.acquire(tokens=70)).release()
    await asyncio.sleep(0.1)
    (await two.acquire(tokens=70)).release()
    used = {use.limit.keyword: (use.used, use.available) for use in two.statistics().limits}
    assert used == {"rpm": (4, 496), "tpm": (280, 19_720), "rpd": (4, 9_996)}
    (await one.acquire(tokens=70)).release()
    used = {use.limit.keyword: (use.used, use.available) for use in one.statistics().limits}
    assert used == {"rpm": (5, 495), "tpm": (350, 19_650), "rpd": (5, 9_995)}


async def test_child_limits_hold_when_calls_leave_the_store_line(shared: Limiters) -> None:
    limiter = shared("100 tokens/s")
    await take(limiter, tokens=100)
    child = limiter.child("child", "10 requests/s burst 2")
    trace = child.trace(last=12)

    async def call() -> None:
        async with child.acquire(tokens=1):
            pass

    async with asyncio.timeout(20), asyncio.TaskGroup() as calls:
        for _ in range(12):
            calls.create_task(call())
    left = trace.amounts("requests")
    assert_never_over(left, "10 requests/s burst 2")
    assert left[-1][0] - left[0][0] < 2_000_000_000, "left idle"


async def test_last_settlement_determines_what_a_call_used(shared: Limiters) -> None:
    limiter = shared("100 tokens/minute", "9 images/minute")

    async def available(*left: int) -> None:
        async with asyncio.timeout(30):
            while tuple(use.available for use in limiter.statistics().limits) != left:  # noqa: ASYNC110 - the store is told by and by
                await asyncio.sleep(0.01)

    lease: Any = await limiter.acquire(tokens=10)
    lease.settle(tokens=130, images=4)
    await available(-30, 5)
    lease.settle(tokens=20)
    lease.settle(tokens=40, images=1)
    await available(60, 8)
    lease.settle(tokens=5)
    await available(95, 8)
    lease._undo()
    await available(100, 9)


@pytest.mark.real_clock
async def test_pools_of_several_processes_share_the_members_in_a_store(shared: Limiters) -> None:
    """Two pools with members of the same names: the sum of the limits is used, and none is exceeded."""
    rates = {"a": 30, "b": 60}
    took: dict[str, list[tuple[float, int]]] = {name: [] for name in rates}

    async def call(pool: Pool) -> None:
        async with pool.acquire() as lease:
            took[lease.limiter.name].append((time.monotonic(), 1))

    pools = [
        Pool(
            *(
                shared(f"{rate} requests/s burst {rate // 10}", name=name)
                for name, rate in rates.items()
            )
        )
        for _ in range(2)
    ]
    began = time.monotonic()
    await asyncio.gather(*(call(pool) for pool in pools for _ in range(90)))
    assert time.monotonic() - began < 1.4 * (180 - 9) / 90
    for name, rate in rates.items():
        assert len(took[name]) == pytest.approx(180 * rate / 90, rel=0.2)
        most = round(1.1 * rate)  # tasks run late
        assert_never_over(took[name], Limit("requests", most, per=1, burst=most))
    for pool in pools:
        assert (pool.statistics().waiting, pool.statistics().in_flight) == (0, 0)


async def test_call_held_up_by_a_store_goes_to_another_member(shared: Limiters) -> None:
    members = [shared("3 requests/h burst 3", name=name) for name in "ab"]
    pool = Pool(*members, prefer="first")
    leases = await asyncio.wait_for(asyncio.gather(*(pool.acquire() for _ in range(6))), 10)
    assert sorted(lease.limiter.name for lease in leases) == [*"aaabbb"]
    waiting = asyncio.ensure_future(pool.acquire())
    await asyncio.sleep(0.2)
    waiting.cancel()
    await asyncio.wait([waiting])
    for lease in leases:
        lease.release()
    assert [each.statistics().in_flight for each in (pool, *members)] == [0, 0, 0]


@pytest.mark.real_clock
async def test_direct_calls_and_blocked_loops_at_a_store_do_not_hold_up_a_pool(
    shared: Limiters,
) -> None:
    a, b = shared("1 requests/h burst 1", name="a"), Limiter(concurrency=1, name="b")
    pool = Pool(a, b, prefer="first")
    at_b, at_a = [await asyncio.wait_for(pool.acquire(), 5) for _ in range(2)]
    direct = asyncio.ensure_future(a.acquire())

    async def wait_and_block() -> None:
        waiting = asyncio.ensure_future(pool.acquire())
        await asyncio.sleep(0.3)  # meanwhile the store holds it back
        time.sleep(1)  # noqa: ASYNC251
        (await waiting).release()

    blocked = asyncio.create_task(asyncio.to_thread(asyncio.run, wait_and_block()))
    await asyncio.sleep(0.5)
    at_b.release()
    began = time.monotonic()
    lease = await asyncio.wait_for(pool.acquire(), 5)
    assert (lease.limiter, time.monotonic() - began < 0.5) == (b, True)
    lease.release()
    await asyncio.wait_for(blocked, 5)
    at_a.release()
    direct.cancel()
    await asyncio.wait([direct])
    assert (pool.statistics().waiting, pool.statistics().in_flight) == (0, 0)
