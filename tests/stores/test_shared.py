"""A limiter with a store as people use it: loops, threads, changes, refusals, and the order."""

import asyncio
import concurrent.futures
import gc
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import (
    AcquireTimeout,
    CostExceedsLimit,
    Lease,
    Limit,
    Limiter,
    StoreError,
    WouldBlock,
)
from asyncbucket.core.events import Event, LimitChanged, Released, StoreLost
from asyncbucket.feedback.adaptive import Adaptive
from asyncbucket.http import OPENAI
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.stores import Terms, open_store
from asyncbucket.stores.redis import RedisStore
from asyncbucket.stores.redis_ledger import RedisLedger
from asyncbucket.stores.sqlite import SQLiteLedger
from asyncbucket.testing import assert_never_over

HOLDING = """
import asyncio, sys
from asyncbucket import Limiter

async def main():
    limiter = Limiter(concurrency=2, store=sys.argv[1], name="killed", slot_ttl=1)
    leases = [await limiter.acquire() for _ in range(2)]
    print("held", flush=True)
    await asyncio.sleep(3)
    print("still held", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture(params=["server", "file"])
def where(request: pytest.FixtureRequest, path: Path) -> str:
    """Return the URL of each kind of store, empty."""
    if request.param == "file":
        return f"sqlite:///{path}?patience=5"
    return str(request.getfixturevalue("url"))


async def test_acquire_nowait_with_store_raises_would_block(where: str) -> None:
    """Limits in a store cannot be checked without waiting, and the wait is not known."""
    limiter = Limiter("10 RPM", store=where, name="nowait")
    with pytest.raises(WouldBlock, match="the store that keeps its limits has to be asked") as told:
        limiter.acquire_nowait()
    assert told.value.retry_after is None
    await limiter.aclose()


async def test_timeout_ends_wait_for_store_and_names_binding_limit(url: str) -> None:
    """The error names the resource and the wait, as without a store; nothing stays booked."""
    limiter = Limiter("10 RPM burst 1", concurrency=5, store=url, name="deadline")
    (await limiter.acquire()).release()
    begun = time.perf_counter()
    with pytest.raises(AcquireTimeout, match=r"requests bind for 5\.\d+ s more") as error:
        await limiter.acquire(timeout=0.2)
    assert time.perf_counter() - begun < 1.5
    assert error.value.bound_by == "requests"
    await asyncio.sleep(0.1)
    snapshot = await open_and_peek(url, "deadline")
    assert (snapshot.limits[0].used, snapshot.slots) == (1, 0)
    await limiter.aclose()


async def test_errors_say_when_other_limiters_hold_all_slots(where: str) -> None:
    """Nobody knows when they come back."""
    one = Limiter("1000 RPM", concurrency=1, store=where, name="held")
    two = Limiter("1000 RPM", concurrency=1, store=where, name="held")
    async with one.acquire():
        with pytest.raises(AcquireTimeout, match="all slots are taken") as error:
            await two.acquire(timeout=0.2)
        child = two.child("child", concurrency=3)
        waiting = asyncio.gather(*(take(child) for _ in range(3)))
        await asyncio.sleep(0.05)
        with pytest.raises(WouldBlock, match="all 3 slots are taken"):
            child.acquire_nowait()
    await waiting
    assert (error.value.bound_by, error.value.retry_after) == ("concurrency", None)
    await two.aclose()
    await one.aclose()


async def test_closing_limiter_fails_waiting_calls_with_store_error(where: str) -> None:
    """More calls wait than go to the store at once; those refused leave nothing booked."""
    limiter = Limiter("20/s burst 1", store=where, name="closes")
    (await limiter.acquire()).release()
    calls = [asyncio.ensure_future(take(limiter)) for _ in range(60)]
    await asyncio.sleep(0.02)

    await limiter.aclose()

    async with asyncio.timeout(5):
        ended = await asyncio.gather(*calls, return_exceptions=True)
    told = [error for error in ended if error is not None]
    assert all(isinstance(error, StoreError) for error in told)
    assert "was closed while this call waited: close it when all calls" in str(told[0])
    snapshot = await open_and_peek(where, "closes")
    assert (snapshot.limits[0].used, snapshot.workers) == (1 + len(calls) - len(told), 0)


async def test_closed_limiter_can_be_used_and_closed_again(url: str) -> None:
    """Later calls open the store again."""
    limiter = Limiter("20/s", store=url, name="again")
    for count in (1, 2):
        (await limiter.acquire()).release()
        assert (await open_and_peek(url, "again")).workers == 1
        await limiter.aclose()
        await limiter.aclose()
        snapshot = await open_and_peek(url, "again")
        assert (snapshot.limits[0].used, snapshot.workers) == (count, 0)


@pytest.mark.parametrize("turns", range(1, 12, 2))
async def test_cancelled_closing_is_completed_by_closing_again(turns: int, where: str) -> None:
    """Wherever it was cancelled, closing again completes it, and the limiter can be used again."""
    before, threads_before = asyncio.all_tasks(), threading.enumerate()
    limiter = Limiter("20/s", store=where, name="cancelled")
    (await limiter.acquire()).release()
    closing = asyncio.ensure_future(limiter.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)

    await limiter.aclose()

    assert (await open_and_peek(where, "cancelled")).workers == 0
    assert not [task for task in asyncio.all_tasks() - before if "asyncbucket" in task.get_name()]
    threads = [thread.name for thread in threading.enumerate() if thread not in threads_before]
    assert "asyncbucket sqlite" not in threads
    (await limiter.acquire()).release()
    await limiter.aclose()


async def test_store_object_passed_to_limiter_is_left_open(where: str) -> None:
    """It serves other limiters, calls that end late, and the same limiter if it is used again."""
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


async def test_limit_too_large_for_store_is_refused_at_once(url: str) -> None:
    """It is refused on creation and on change, with the numbers, and nothing changes anywhere."""
    message = (
        r"a store counts to 70,368,744,177,664: 1,000,000,000,000,000 tokens per .* is above; "
        r"lower the limit"
    )
    with pytest.raises(ValueError, match=message):
        Limiter("1000000000000000 TPM", store=url, name="big")
    limiter = Limiter("10 RPM", store=url, name="big")
    (await limiter.acquire()).release()

    with pytest.raises(ValueError, match=message):
        limiter.reconfigure("20 RPM", "1000000000000000 TPM")

    assert limiter.limits == (Limit("requests", 10),)
    assert len((await open_and_peek(url, "big")).limits) == 1
    await limiter.aclose()


async def test_limiter_with_store_refuses_adaptive_concurrency(url: str) -> None:
    """A limiter with a store cannot be given `concurrency="auto"` later, either."""
    limiter = Limiter("10 RPM", concurrency=4, store=url, name="fixed")

    with pytest.raises(ValueError, match="with a store, concurrency must be a number"):
        limiter.reconfigure(concurrency="auto")

    assert limiter.concurrency == 4
    limiter.reconfigure(concurrency=5)
    assert limiter.concurrency == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "1 to 200 printable characters and no braces"),
        ("a{b}", "1 to 200 printable characters and no braces"),
        ("x" * 5_000, "1 to 200 printable characters and no braces"),
        ("line\nbreak", "1 to 200 printable characters and no braces"),
        ("\ud800", "must be text that UTF-8 can write"),  # as without a store
    ],
)
@pytest.mark.parametrize("where", ["sqlite:///limits.db", "redis://127.0.0.1:6379/0"])
def test_name_unfit_for_stores_is_refused_when_limiter_is_made(
    where: str, name: str, message: str
) -> None:
    """The error comes before the first call, and shows only the beginning of a very long name."""
    with pytest.raises(ValueError, match=message) as refused:
        Limiter("10 RPM", store=where, name=name)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("slot_ttl", [0.09, 86_401, float("inf"), float("nan"), True, "30"])
@pytest.mark.parametrize("where", ["sqlite:///limits.db", "redis://127.0.0.1:6379/0", None])
def test_slot_ttl_must_be_between_100_ms_and_a_day(where: str | None, slot_ttl: Any) -> None:
    """This holds for every store, and without one: else the mistake would show in production."""
    with pytest.raises(ValueError, match=r"slot_ttl must be .* from 0\.1 to 86,400, a day, not"):
        Limiter("10 RPM", store=where, slot_ttl=slot_ttl)


@pytest.mark.parametrize("where", ["sqlite:///limits.db", None])
def test_unknown_outage_policy_is_refused(where: str | None) -> None:
    """This is checked even without a store."""
    unknown: Any = "half"
    with pytest.raises(
        ValueError, match="on_outage must be one of share, closed, open, not 'half'"
    ):
        Limiter("10 RPM", store=where, on_outage=unknown)


async def test_store_that_cannot_be_opened_fails_all_waiting_calls(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All waiting calls are told, whatever the store raises."""

    async def refuse(*_: object, **__: object) -> None:
        raise ValueError("not here")

    monkeypatch.setattr(RedisStore, "open", refuse)
    limiter = Limiter("10 RPM", store=url, name="refused")

    async with asyncio.timeout(5):
        ended = await asyncio.gather(*(take(limiter) for _ in range(30)), return_exceptions=True)

    assert {(type(error), str(error)) for error in ended} == {(StoreError, "not here")}
    await limiter.aclose()


async def test_refunds_and_slots_released_after_closing_reach_store(where: str) -> None:
    """The store hears of it at once, and limits that others have set meanwhile stay."""
    one = Limiter("1000 TPM", concurrency=2, store=where, name="late")
    two = Limiter("1000 TPM", concurrency=2, store=where, name="late")
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
    await two.aclose()
    snapshot = await open_and_peek(where, "late")
    assert (snapshot.terms.concurrency, snapshot.slots, snapshot.workers) == (1, 0, 0)


async def test_held_slot_survives_closing_and_reopening_of_limiter(url: str) -> None:
    """The next desk keeps it alive, and gives it back when the call has ended."""
    limiter = Limiter(concurrency=2, store=url, name="outlives", slot_ttl=0.3)
    lease = await limiter.acquire()
    await limiter.aclose()
    (await limiter.acquire()).release()
    await asyncio.sleep(0.6)
    assert (await open_and_peek(url, "outlives")).slots == 1
    lease.release()
    await asyncio.sleep(0.2)
    assert (await open_and_peek(url, "outlives")).slots == 0
    await limiter.aclose()


@pytest.mark.parametrize("verb", ["commit", "heartbeat", "changed"])
async def test_failed_desk_fails_waiting_calls_and_is_replaced(
    url: str, verb: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On an unforeseen error no call hangs, each desk logs one line, and later calls pass."""
    limiter = Limiter("1000/s", concurrency=2, store=url, name="odd", slot_ttl=0.3)
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
    assert set(said) == {"the desk of limiter odd has failed"}
    assert "ArithmeticError: odd" in caplog.text

    for lease in leases:
        lease.release()
    async with asyncio.timeout(5):
        (await limiter.acquire()).release()
    await limiter.aclose()


async def test_call_cancelled_at_admission_returns_slot_and_delays_nobody(
    url: str,
) -> None:
    """The admission comes in the same turn of the loop as the cancel, before the task knows."""
    limiter = Limiter("20/s burst 1", concurrency=9, store=url, name="as-it-goes")
    (await limiter.acquire()).release()
    calls = [asyncio.ensure_future(take(limiter)) for _ in range(3)]
    remote: Any = limiter._account.remote
    counter = remote.counter(asyncio.get_running_loop())
    async with asyncio.timeout(5):
        while not counter._reserved:  # noqa: ASYNC110 - nothing signals this
            await asyncio.sleep(0.002)
    waiter, reservation = next(iter(counter._reserved.items()))

    calls[0].cancel()
    counter.admit(waiter, reservation)

    async with asyncio.timeout(5):
        ended = await asyncio.gather(*calls, return_exceptions=True)
        await take(limiter)
    assert [type(each).__name__ for each in ended] == ["CancelledError", "NoneType", "NoneType"]
    await limiter.aclose()
    snapshot = await open_and_peek(url, "as-it-goes")
    assert (snapshot.limits[0].used, snapshot.slots) == (4, 0)


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize(("limit", "slots"), [("1000 TPM", None), ("1M TPM", 1)])
async def test_cancelled_call_does_not_hold_up_calls_behind_it(
    url: str, limit: str, slots: int | None, behind: int
) -> None:
    """This holds for calls that stood behind it, and for one that comes later."""
    limiter = Limiter(limit, concurrency=slots, store=url, name="gave-up")
    lease = await limiter.acquire(tokens=900)
    costly = asyncio.ensure_future(limiter.acquire(tokens=500))
    await asyncio.sleep(0.1)
    calls = [asyncio.ensure_future(take(limiter)) for _ in range(behind)]
    costly.cancel()
    await asyncio.sleep(0.1)
    lease.release()

    async with asyncio.timeout(5):
        await asyncio.gather(*calls, take(limiter))
    await limiter.aclose()


async def test_cancelled_call_does_not_reduce_share_of_its_child(url: str) -> None:
    """A child gets no less because a costly call of it went to the store and gave up."""
    key = Limiter("6000 TPM burst 100", store=url, name="shares")
    chat, tools = key.child("chat"), key.child("tools")
    went: list[str] = []

    async def call(limiter: Limiter) -> None:
        await take(limiter, tokens=5)
        went.append(limiter.name)

    await take(key, tokens=100)
    costly = asyncio.ensure_future(take(chat, tokens=100))
    await asyncio.sleep(0)
    calls = [asyncio.ensure_future(call(each)) for each in (tools, chat) * 60]
    await asyncio.sleep(0.1)
    costly.cancel()
    while len(went) < 80:  # noqa: ASYNC110 - nothing signals this
        await asyncio.sleep(0.01)
    assert abs(went.count(chat.name) - went.count(tools.name)) < 5
    for each in calls:
        each.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await key.aclose()


async def take(limiter: Limiter, *, tokens: int | None = None) -> None:
    """Make a call that takes no time."""
    async with limiter.acquire(tokens=tokens):
        pass


async def open_and_peek(url: str, name: str) -> Any:
    """Return a snapshot of a limiter, from outside."""
    store = open_store(url)
    snapshot = await store.peek(name)
    await store.aclose()
    assert snapshot is not None
    return snapshot


async def test_timed_out_call_does_not_hold_up_other_limiters(url: str) -> None:
    """Its place in the store's line is given up, so a small call elsewhere passes at once."""
    one = Limiter("1000 tokens/minute", store=url, name="gone")
    two = Limiter("1000 tokens/minute", store=url, name="gone")
    (await one.acquire(tokens=900)).release()
    with pytest.raises(AcquireTimeout):
        await one.acquire(tokens=500, timeout=0.1)
    begun = time.perf_counter()
    (await two.acquire(tokens=50, timeout=2)).release()
    assert time.perf_counter() - begun < 1.5
    await one.aclose()
    await two.aclose()


async def test_pause_and_new_limits_apply_to_all_limiters_on_store(where: str) -> None:
    """What one process learns from its provider, all others obey."""
    one = Limiter("1000 RPM burst 100", store=where, name="steer")
    two = Limiter("1000 RPM burst 100", store=where, name="steer")
    for limiter in (one, two):
        (await limiter.acquire()).release()
    one.pause(0.6, reason="429")
    await asyncio.sleep(0.1)
    lease = await two.acquire()
    assert 0.35 < lease.waited < 2.0
    assert lease.bound_by == "paused"
    lease.release()
    one.reconfigure("5 RPM burst 5")
    await asyncio.sleep(0.1)
    for _ in range(2):  # three were admitted before
        (await two.acquire(timeout=0.5)).release()
    with pytest.raises(AcquireTimeout):
        await two.acquire(timeout=0.5)
    assert two.limits == one.limits
    await one.aclose()
    await two.aclose()


@pytest.mark.parametrize("turns", range(8))
async def test_limits_changed_while_store_opens_reach_it(turns: int, where: str) -> None:
    """Whichever await it hits, the limits believed here are those that all processes obey.

    So is a pause, if the call was on its way to the store; else the call waits it out here first.
    """
    limiter = Limiter("1000 RPM burst 100", store=where, name="opens")
    call = asyncio.ensure_future(take(limiter))
    for _ in range(turns):
        await asyncio.sleep(0)
    limiter.reconfigure("10 RPM burst 10", concurrency=3)
    limiter.pause(0.6)
    await call
    await limiter.aclose()
    snapshot = await open_and_peek(where, "opens")
    assert snapshot.terms == Terms(limits=limiter.limits, concurrency=3)
    assert (snapshot.paused_until > 0) == (turns > 1)


def hold_first_change(patch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Delay the first change of limits; return an event for its start, and one that lets it go on."""
    begun, free = asyncio.Event(), asyncio.Event()
    kinds: tuple[Any, ...] = (RedisLedger, SQLiteLedger)
    for kind in kinds:
        configure = kind.configure

        async def hold(ledger: Any, terms: Terms, *, configure: Any = configure) -> None:
            if not begun.is_set():
                begun.set()
                await free.wait()
            await configure(ledger, terms)

        patch.setattr(kind, "configure", hold)
    return begun, free


async def test_later_of_two_limit_changes_wins(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the first takes to reach the store, the second does not overtake it."""
    begun, free = hold_first_change(monkeypatch)
    limiter = Limiter("1000 RPM burst 100", store=where, name="quick")
    await take(limiter)
    limiter.reconfigure("2000 RPM burst 100")
    await begun.wait()
    limiter.reconfigure("3000 RPM burst 100")
    call = asyncio.create_task(take(limiter))
    await asyncio.wait({call}, timeout=0.2)
    free.set()
    await call
    await take(limiter)
    assert limiter.limits == (Limit("requests", 3000, burst=100),)
    assert (await open_and_peek(where, "quick")).terms.limits == limiter.limits
    await limiter.aclose()


async def test_limit_change_that_reaches_store_last_wins_everywhere(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes believe the store, even if the first one's heartbeats bring the other change."""
    begun, free = hold_first_change(monkeypatch)
    one = Limiter("1000 RPM burst 100", store=where, name="last", slot_ttl=0.15)
    two = Limiter("1000 RPM burst 100", store=where, name="last")
    await take(one)
    await take(two)
    one.reconfigure("2000 RPM burst 100")
    await begun.wait()
    two.reconfigure("3000 RPM burst 100")
    await take(two)
    call = asyncio.create_task(take(one))
    await asyncio.wait({call}, timeout=0.2)
    free.set()
    await call
    for limiter in (one, two):
        await take(limiter)
    snapshot = await open_and_peek(where, "last")
    assert (
        one.limits == two.limits == snapshot.terms.limits == (Limit("requests", 2000, burst=100),)
    )
    await one.aclose()
    await two.aclose()


async def test_limit_changes_by_another_limiter_are_reported_as_events(where: str) -> None:
    """Each limit that has changed is reported once to observers."""
    one = Limiter("1000 RPM burst 100", "10k TPM", concurrency=9, store=where, name="told")
    two = Limiter("1000 RPM burst 100", "10k TPM", concurrency=9, store=where, name="told")
    told: list[Event] = []
    two.observe(lambda event: told.append(event) if isinstance(event, LimitChanged) else None)
    for limiter in (one, two):
        (await limiter.acquire()).release()
    one.reconfigure("500 RPM burst 100", concurrency=5)
    await asyncio.sleep(0.1)
    for _ in range(2):
        (await two.acquire()).release()
    limits = [event.limit for event in told if isinstance(event, LimitChanged)]
    assert limits == ["500 requests per 60 s", "concurrency 5"]
    await one.aclose()
    await two.aclose()


async def test_limit_dropped_by_another_limiter_no_longer_applies(where: str) -> None:
    """It does not come back with the next change, either: the latest change counts for all."""
    one = Limiter("100 RPM burst 100", "10 TPM", concurrency=2, store=where, name="fewer")
    (await one.acquire()).release()
    two = Limiter("100 RPM burst 100", store=where, name="fewer")
    for limiter in (two, one):
        (await limiter.acquire()).release()

    assert one.limits == two.limits == (Limit("requests", 100, burst=100),)
    assert one.concurrency is None
    (await one.acquire(tokens=11)).release()
    one.reconfigure("50 RPM burst 50")
    await asyncio.sleep(0.1)
    (await two.acquire(tokens=11)).release()
    assert one.limits == two.limits == (Limit("requests", 50, burst=50),)
    await one.aclose()
    await two.aclose()


async def test_limit_announced_by_provider_applies_to_all_limiters(where: str) -> None:
    """It is added where no limit was given; one beyond what the store can count limits nobody."""
    one = Limiter(store=where, name="learn")
    two = Limiter(store=where, name="learn")
    for limiter in (one, two):
        (await limiter.acquire()).release()
    for number in (10**15 - 1, 3):
        HeaderReader(one).read([(b"x-ratelimit-limit-requests", str(number).encode())], OPENAI)
    await asyncio.sleep(0.1)
    (await one.acquire(timeout=0.5)).release()
    with pytest.raises(AcquireTimeout, match="requests bind"):
        await two.acquire(timeout=0.5)
    assert one.limits == two.limits == (Limit("requests", 3, per=60),)
    await one.aclose()
    await two.aclose()


async def test_remaining_headers_count_only_for_limits_of_a_child(where: str) -> None:
    """The store's limits are those of all processes; a child's are in this one."""
    limiter = Limiter("600 RPM burst 600", store=where, name="heard")
    child = limiter.child("chat", "300 RPM burst 300")
    (await child.acquire()).release()
    said = {"x-ratelimit-limit-requests": "600", "x-ratelimit-remaining-requests": "0"}
    HeaderReader(limiter).read(said, OPENAI, since=limiter.now())
    assert limiter.explain().bound_by is None
    assert child.explain().bound_by is None
    assert limiter.statistics().limits[0].available == 599
    assert not limiter._account.headrooms, "worked out for nothing"
    HeaderReader(child).read(
        {**said, "x-ratelimit-limit-requests": "300"}, OPENAI, since=limiter.now()
    )
    assert child.explain().bound_by == "requests"
    assert limiter.explain().bound_by is None
    await limiter.aclose()


@pytest.mark.real_clock
async def test_units_freed_at_once_are_shared_by_waiting_limiters(where: str) -> None:
    """When a window frees its units at once, all waiting limiters get parts of similar size."""
    limiters = [Limiter("60 requests/2s burst 60", store=where, name="burst") for _ in range(3)]
    await asyncio.gather(*(take(limiters[0]) for _ in range(60)))
    calls = [[asyncio.ensure_future(take(each)) for _ in range(40)] for each in limiters]
    await asyncio.sleep(2.6)
    shares = [sum(call.done() for call in of_one) for of_one in calls]
    assert sum(shares) == 60
    assert min(shares) >= 10, shares  # half of an equal share: the machine may be busy
    for call in (call for of_one in calls for call in of_one):
        call.cancel()
    await asyncio.gather(*(call for of_one in calls for call in of_one), return_exceptions=True)
    for each in limiters:
        await each.aclose()


async def test_urgent_call_overtakes_calls_waiting_for_store(url: str) -> None:
    """Priorities work above the store: few calls are where they can no longer be overtaken."""
    limiter = Limiter("20/s burst 1", store=url, name="urgent")
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
    await limiter.aclose()


def test_limiter_keeps_count_across_asyncio_runs(url: str) -> None:
    """A script may call `asyncio.run` again with the same limiter; what was used stays used."""
    limiter = Limiter("3 RPM burst 3", store=url, name="again")

    async def once() -> None:
        (await limiter.acquire(timeout=2)).release()
        await limiter.aclose()

    for _ in range(3):
        asyncio.run(once())
    with pytest.raises(AcquireTimeout):
        asyncio.run(once())
    asyncio.run(limiter.aclose())


#: If a loop ends without closing the limiter, its connections are left to the garbage collector.
UNCLOSED = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore:loop is closed")


async def use_less(limiter: Limiter) -> None:
    """Make a call that uses a quarter of what it reserves, without closing the limiter."""
    async with limiter.acquire(tokens=400, timeout=2) as lease:
        lease.settle(tokens=100)


@UNCLOSED
def test_unclosed_run_leaves_slots_and_refunds_to_next_run(where: str) -> None:
    """Where each call has its own `asyncio.run`, the next run reports what came back last."""
    limiter = Limiter("1000 TPM", concurrency=2, store=where, name="forgets")
    for _ in range(6):
        asyncio.run(use_less(limiter))
    asyncio.run(limiter.aclose())
    gc.collect()
    snapshot = asyncio.run(open_and_peek(where, "forgets"))
    assert (snapshot.limits[0].used, snapshot.slots) == (600, 0)


@UNCLOSED
def test_unclosed_run_leaves_slots_and_refunds_to_synchronous_calls(where: str) -> None:
    """Their loop existed before and goes on: it reports what came back just as a new one does."""
    limiter = Limiter("1000 TPM", concurrency=1, store=where, name="mixes")
    for _ in range(3):
        limiter.acquire_sync(tokens=100, timeout=2).release()
        asyncio.run(use_less(limiter))
    limiter.acquire_sync(tokens=100, timeout=2).release()
    asyncio.run(limiter.aclose())
    gc.collect()

    assert asyncio.run(open_and_peek(where, "mixes")).limits[0].used == 700


@UNCLOSED
def test_store_object_used_on_second_loop_raises_store_error(url: str) -> None:
    """Connections belong to one loop; with a URL, each loop opens its own."""
    limiter = Limiter("10 RPM burst 10", store=open_store(url), name="foreign")

    async def once() -> None:
        (await limiter.acquire(timeout=2)).release()
        await limiter.aclose()

    asyncio.run(once())
    with pytest.raises(
        StoreError, match=r"made for another event loop, .*: give the limiter a URL"
    ):
        asyncio.run(once())
    with pytest.raises(StoreError, match="made for another event loop"):
        limiter.acquire_sync(timeout=2)
    gc.collect()


@UNCLOSED
def test_lease_can_be_released_after_its_loop_has_ended(where: str) -> None:
    """The store hears of it, whether released between runs, in another run, or by a thread."""
    limiter = Limiter("1000 TPM", concurrency=3, store=where, name="outlives")

    async def hold() -> Lease:
        return await limiter.acquire(tokens=100, timeout=2)

    async def release_beside(lease: Lease) -> None:
        passed = await hold()
        await asyncio.to_thread(lease.release)
        passed.release()
        leases = await asyncio.gather(hold(), hold(), hold())
        for each in leases:
            each.release()
        await asyncio.sleep(0.1)
        await limiter.aclose()

    between, beside = asyncio.run(hold()), asyncio.run(hold())
    between.settle(tokens=10)
    between.release()
    asyncio.run(release_beside(beside))
    gc.collect()
    snapshot = asyncio.run(open_and_peek(where, "outlives"))
    assert (snapshot.limits[0].used, snapshot.slots) == (510, 0)


def test_loops_and_threads_of_a_process_share_the_limit(url: str) -> None:
    """Two loops in two threads, and threads without a loop, together get all there is."""
    limiter = Limiter("12 RPM burst 12", store=url, name="threads")
    passed: list[str] = []

    def loop() -> None:
        async def work() -> None:
            for _ in range(4):
                (await limiter.acquire(timeout=5)).release()
                passed.append("loop")
            await limiter.aclose()

        asyncio.run(work())

    def plain() -> None:
        limiter.acquire_sync(timeout=5).release()
        passed.append("plain")

    threads = [threading.Thread(target=loop) for _ in range(2)]
    threads += [threading.Thread(target=plain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(passed) == ["loop"] * 8 + ["plain"] * 4
    with pytest.raises(AcquireTimeout):
        limiter.acquire_sync(timeout=0.3)
    asyncio.run(limiter.aclose())


def test_closing_disconnects_background_loop_unless_a_call_waits(url: str, redis_sync: Any) -> None:
    """Otherwise its connection and its heartbeats would go on as long as the program."""
    limiter = Limiter(concurrency=1, store=url, name="leaves")

    def connections() -> set[str]:
        return {client["id"] for client in redis_sync.client_list()}

    before = connections()
    for _ in range(2):  # later calls open it again
        lease = limiter.acquire_sync(timeout=5)
        assert connections() - before
        with concurrent.futures.ThreadPoolExecutor() as threads:
            waiting = threads.submit(limiter.acquire_sync, timeout=5)
            while not limiter.statistics().waiting:
                time.sleep(0.001)
            asyncio.run(limiter.aclose())
            lease.release()
            waiting.result().release()
        asyncio.run(limiter.aclose())
        while connections() - before:  # the server may notice it later
            time.sleep(0.001)


def test_pause_and_new_limits_reach_store_despite_resting_loop(url: str) -> None:
    """They are sent by a loop that runs; a resting loop would send nothing until it runs again."""
    limiter = Limiter("1000 RPM burst 100", store=url, name="rests")

    async def use() -> None:
        (await limiter.acquire()).release()

    async def use_and_steer() -> None:
        await use()
        limiter.pause(30)
        limiter.reconfigure("500 RPM burst 50")
        await limiter.aclose()

    resting = asyncio.new_event_loop()
    resting.run_until_complete(use())
    asyncio.run(use_and_steer())

    snapshot = asyncio.run(open_and_peek(url, "rests"))
    assert snapshot.paused_until - snapshot.now > 20e9
    assert snapshot.terms.limits == (Limit("requests", 500, burst=50),)
    resting.run_until_complete(limiter.aclose())
    resting.close()


@pytest.mark.real_clock
async def test_slots_of_killed_process_go_to_waiting_calls(where: str) -> None:
    """Its slots outlive their TTL while it sends heartbeats, and come back soon once it is dead."""
    command = sys.executable, "-X", "dev", "-c", HOLDING, where
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"held\n"
    limiter = Limiter(concurrency=2, store=where, name="killed", slot_ttl=1)
    waiting = asyncio.create_task(asyncio.wait_for(limiter.acquire(), 20))
    assert await process.stdout.readline() == b"still held\n"
    assert not waiting.done()
    process.kill()
    await process.wait()
    killed = time.monotonic()
    lease = await waiting
    assert time.monotonic() - killed < 2.0
    assert lease.bound_by == "concurrency"
    lease.release()
    await limiter.aclose()


async def test_refund_in_one_limiter_admits_call_of_another(where: str) -> None:
    """After a call used less than it reserved, another limiter need not wait for the window."""
    one = Limiter("1000 TPM", store=where, name="refund")
    two = Limiter("1000 TPM", store=where, name="refund")
    async with one.acquire(tokens=900) as lease:
        lease.settle(tokens=100)
    await two.acquire(tokens=800, timeout=5)
    await one.aclose()
    await two.aclose()


async def test_call_that_can_never_pass_raises_cost_exceeds_limit(where: str) -> None:
    """The error is the same as without a store."""
    limiter = Limiter("100 TPM", store=where, name="never")
    with pytest.raises(CostExceedsLimit, match="cost of 101 tokens exceeds the limit"):
        await limiter.acquire(tokens=101)
    await limiter.aclose()


async def test_cost_above_limit_known_only_to_store_is_refused(path: Path) -> None:
    """Another process has lowered the limit, and this one has not heard of it yet."""
    limiter = Limiter("1000 TPM", store=f"sqlite:///{path}?patience=5", name="lowered")
    (await limiter.acquire(tokens=1_000)).release()
    waiting = asyncio.ensure_future(limiter.acquire(tokens=500))
    remote: Any = limiter._account.remote
    counter = remote.counter(asyncio.get_running_loop())
    async with asyncio.timeout(5):
        while not (heads := counter.heads(1)):  # noqa: ASYNC110 - nothing signals this
            await asyncio.sleep(0.01)
    counter.refuse(heads[0], "tokens")
    with pytest.raises(CostExceedsLimit, match="cost of 500 tokens exceeds the limit that another"):
        await waiting
    await limiter.aclose()


async def test_refunds_admit_waiting_calls_before_window_ends(url: str) -> None:
    """Where estimates exceed use, what comes back serves the next call, as in one process."""
    limiter = Limiter("1000 tokens/minute", store=url, name="refund")
    done = 0

    async def call() -> None:
        nonlocal done
        async with limiter.acquire(tokens=500) as lease:
            await asyncio.sleep(0.05)
            lease.settle(tokens=100)
            done += 1

    calls = [asyncio.create_task(call()) for _ in range(8)]
    await asyncio.sleep(1.5)
    assert done >= 6, "refunds waited for the window"
    for task in calls:
        task.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await limiter.aclose()


async def test_explanation_uses_last_answer_of_store(where: str) -> None:
    """It does not promise that a call passes at once if the store would make it wait."""
    limiter = Limiter("9 RPM burst 9", "1000 TPM", concurrency=2, store=where, name="explained")
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
    await limiter.aclose()


async def test_explanation_counts_calls_waiting_at_store(where: str) -> None:
    """The wait known for the first of them is not given as that of a call behind all."""
    limiter = Limiter("10 RPM burst 1", store=where, name="ahead")
    (await limiter.acquire()).release()
    calls = [asyncio.create_task(take(limiter)) for _ in range(15)]
    await asyncio.sleep(0.1)
    held = limiter.explain()
    assert (held.ahead, held.wait, held.bound_by) == (15, None, "requests")
    assert str(held).startswith("a call would wait behind 15 calls: requests bind; ")
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert limiter.explain().ahead == 0
    await limiter.aclose()


async def test_statistics_report_use_of_all_limiters_on_store(url: str) -> None:
    """Used and available are totals of all processes."""
    one = Limiter("100 RPM burst 100", store=url, name="statistics")
    two = Limiter("100 RPM burst 100", store=url, name="statistics")
    for limiter in (one, two, one):
        (await limiter.acquire()).release()
    await asyncio.sleep(0.1)
    (use,) = one.statistics().limits
    assert (use.used, use.available) == (3, 97)
    await one.aclose()
    await two.aclose()
    assert one.statistics().limits == (use,), "forgotten when it was closed"


async def test_statistics_match_limits_whatever_their_order(where: str) -> None:
    """The order in which the store or other processes keep the limits does not matter."""
    one = Limiter("500 RPM burst 500", "20k TPM", "10k RPD", store=where, name="order")
    two = Limiter("20k TPM", "10k RPD", "500 RPM burst 500", store=where, name="order")
    for limiter in (one, two, one):
        (await limiter.acquire(tokens=70)).release()
    await asyncio.sleep(0.1)
    (await two.acquire(tokens=70)).release()
    used = {use.limit.keyword: (use.used, use.available) for use in two.statistics().limits}
    assert used == {"rpm": (4, 496), "tpm": (280, 19_720), "rpd": (4, 9_996)}
    (await one.acquire(tokens=70)).release()
    used = {use.limit.keyword: (use.used, use.available) for use in one.statistics().limits}
    assert used == {"rpm": (5, 495), "tpm": (350, 19_650), "rpd": (5, 9_995)}
    await one.aclose()
    await two.aclose()


async def test_child_limits_hold_when_calls_leave_the_store_line(where: str) -> None:
    """What leaves the store's line together counts together, however long it waited there."""
    limiter = Limiter("100 tokens/s", store=where, name="below")
    await take(limiter, tokens=100)
    child = limiter.child("child", "5 requests/s burst 2")
    trace = child.trace(last=12)

    async def call() -> None:
        async with child.acquire(tokens=1):
            pass

    async with asyncio.timeout(20), asyncio.TaskGroup() as calls:
        for _ in range(12):
            calls.create_task(call())
    left = trace.amounts("requests")
    assert_never_over(left, "5 requests/s burst 2")
    assert left[-1][0] - left[0][0] < 3_000_000_000, "left idle"
    assert child._account.limits["requests", 1].window.lent == 0
    await limiter.aclose()


async def test_wait_for_store_is_not_counted_as_call_latency(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no part of `held`, and the adaptive concurrency does not take it for latency."""
    limiter = Limiter("2 RPS burst 1", store=where, name="left")
    child = limiter.child("child", concurrency=(2, 9))
    held: list[float] = []
    took: list[float] = []

    def see(event: Event) -> None:
        if isinstance(event, Released):
            held.append(event.held)

    limiter.observe(see)

    def note(_: Adaptive, latency: int, **_how: bool) -> None:
        took.append(latency * 1e-9)

    monkeypatch.setattr(Adaptive, "succeeded", note)
    await asyncio.gather(take(child), take(child))
    assert len(held) == len(took) == 2
    assert max(held + took) < 0.2
    await limiter.aclose()


async def test_last_settlement_determines_what_a_call_used(where: str) -> None:
    """A debt that turned out smaller is given back; units used but never reserved are counted."""
    limiter = Limiter("100 tokens/minute", "9 images/minute", store=where, name="last word")

    async def available(*left: int) -> None:
        async with asyncio.timeout(5):
            while tuple(use.available for use in limiter.statistics().limits) != left:  # noqa: ASYNC110 - the store is told by and by
                await asyncio.sleep(0.01)

    lease = await limiter.acquire(tokens=10)
    lease.settle(tokens=130, images=4)
    await available(-30, 5)
    lease.settle(tokens=20)
    lease.settle(tokens=40, images=1)
    await available(60, 8)
    lease.settle(tokens=5)
    await available(95, 8)
    lease.undo()
    await available(100, 9)
    await limiter.aclose()
