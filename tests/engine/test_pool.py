"""One line over several limiters: late binding, order, preference, stickiness, members that fail."""

import asyncio
import collections
import logging
import random
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

import asyncbucket
from asyncbucket import AcquireTimeout, CostExceedsLimit, Limit, Limiter, Pool, WouldBlock, pools
from asyncbucket.testing import VirtualTime, assert_never_over
from tests.engine.conftest import (
    HELD,
    all_blocked,
    cancel,
    nothing_is_left,
    refused,
    start,
    start_all,
)

CORE = str(Path(pools.__file__).parent)
Trace = collections.defaultdict[str, list[tuple[float, int]]]


def members_of(time: VirtualTime, *rpm: int, **options: Any) -> list[Limiter]:
    """Return one limiter for each number of requests a minute, called a, b, c..."""
    return [
        Limiter(rpm=each, name=chr(97 + n), clock=time.clock, **options)
        for n, each in enumerate(rpm)
    ]


async def name_of_taker(pool: Pool, **call: Any) -> str:
    """Make one call, and return who took it."""
    async with pool.acquire(**call) as lease:
        return str(lease.limiter.name)


# --- late binding ---


@pytest.mark.parametrize("number", [2, pytest.param(20, marks=pytest.mark.heavy)])
async def test_all_members_are_used_and_none_exceeded(time: VirtualTime, number: int) -> None:
    chance = random.Random(number)
    members = members_of(time, *(chance.randint(30, 1_200 // number) for _ in range(number)))
    pool, started, took = Pool(*members), list[int](), Trace(list)

    async def call(which: int) -> None:
        async with pool.acquire() as lease:
            started.append(which)
            took[lease.limiter.name].append((time.now, 1))

    rate = sum(limit.amount for limit in pool.limits) / 60
    bursts = sum(limit.burst or 0 for limit in pool.limits)
    calls = round(rate * 180)
    await asyncio.gather(*(call(which) for which in range(calls)))
    assert started == sorted(started)
    assert (calls - bursts) / rate <= time.now <= (calls - bursts) / rate / 0.99
    for member in members:
        assert_never_over(took[member.name], member.limits[0])
    nothing_is_left(pool, *members)


async def test_costly_call_waits_for_a_large_member_and_holds_up_none(time: VirtualTime) -> None:
    small = Limiter("100 TPM", name="small", clock=time.clock)
    large = Limiter("1000 TPM", name="large", clock=time.clock)
    pool = Pool(small, large, prefer="first")
    assert await name_of_taker(pool, tokens=500) == "large"
    large.pause(30)
    costly = await start_all(name_of_taker(pool, tokens=n) for n in (600, 500))
    assert await name_of_taker(pool, tokens=60) == "small"
    both = await start(name_of_taker(pool, tokens=50))  # it waits for either, and there in turn
    assert await costly[0] == "large"
    assert time.now == pytest.approx(60 * HELD, abs=0.2)
    assert not costly[1].done()
    assert await both == "small"
    cancel(costly[1])
    await all_blocked()
    assert await name_of_taker(pool, tokens=400) == "large"  # at once
    assert time.now == pytest.approx(60 * HELD, abs=0.2)
    with pytest.raises(
        CostExceedsLimit,
        match=(
            r"cost of 1,001 tokens exceeds a limit everywhere \(100 tokens per 60 s at 'small', "
        ),
    ):
        await pool.acquire(tokens=1_001)
    too_costly = await start(pool.acquire(tokens=1_000))
    large.reconfigure(tpm=900)
    with pytest.raises(CostExceedsLimit):
        await too_costly
    nothing_is_left(pool, small, large)


async def test_members_paused_or_without_slots_are_passed_over(time: VirtualTime) -> None:
    a, b = members_of(time, 600, 600)
    pool = Pool(a, b, prefer="first")
    a.pause(5)
    assert await name_of_taker(pool) == "b"
    pool.pause(3)
    with refused(WouldBlock, "paused for 3 s", retry_after=3.0, bound_by="paused"):
        pool.acquire_nowait()
    assert (await name_of_taker(pool), time.now) == ("b", 3.0)
    b.pause(9)
    at_a, at_b = await start_all(each.acquire() for each in (a, b))  # each alone in its line
    await at_a
    assert time.now == 5.0
    cancel(at_b)


@pytest.mark.parametrize(("is_kept", "is_probe"), [(True, False), (False, True)])
async def test_call_cancelled_within_any_line_of_its_handover_takes_nothing(
    time: VirtualTime, *, is_kept: bool, is_probe: bool
) -> None:
    """As Ctrl-C may do, between any two lines; another call behind it gets its turn."""
    left = moment = 0

    def interrupt(frame: FrameType, *_: object) -> None:
        nonlocal left
        left -= frame.f_code.co_filename.startswith(CORE)
        if left == 0:
            cancel(first)

    while left <= 0:
        moment += 1
        a, b = members_of(time, 6_000, 6_000, concurrency=1)
        pool = Pool(a, b, prefer="first")
        held = [await pool.acquire(sticky="talk"), await pool.acquire()]
        keys = ("talk" if is_kept else None, None)
        first, second = await start_all(name_of_taker(pool, sticky=key) for key in keys)
        b.pause(60)
        if is_kept:
            held[1].release()
        await all_blocked()
        left = moment
        sys.setprofile(interrupt)
        try:
            held[0].member_failed("HTTP 500") if is_probe else held[0].release()
            await asyncio.wait([first, second], timeout=3)
        finally:
            sys.setprofile(None)
        held[1].release()
        assert first.cancelled() or first.result() == "a"
        assert second.result() == "a"
        nothing_is_left(pool, a, b)
        assert a.statistics().admitted in ([2, 3] if first.cancelled() else [3])
        assert a._node.pacer.waiting == 0
    assert moment > 50


@pytest.mark.parametrize("fails", [False, True])
async def test_call_out_of_line_may_give_up(time: VirtualTime, *, fails: bool) -> None:
    """Kept for its member, then next at each; its cost can never pass any more, or it is cancelled."""
    a, b = (Limiter("100 TPM", name=name, clock=time.clock) for name in "ab")
    pool = Pool(a, b, prefer="first")
    for member in "ab":
        sticky = "talk" if member == "a" else None
        assert await name_of_taker(pool, tokens=80, sticky=sticky) == member
    kept = await start(pool.acquire(tokens=90, sticky="talk"))
    for seconds in (1, 2):  # its patience ends after two
        await asyncio.sleep(seconds)
        assert not kept.done()
    behind = await start(pool.acquire(tokens=10))
    if fails:
        for each in (a, b):
            each.reconfigure(tpm=85)
        with pytest.raises(CostExceedsLimit):
            await kept
    else:
        cancel(kept)
        await all_blocked()
    assert behind.done() is not fails  # 80 of 85 are used
    (await behind).release()
    nothing_is_left(pool, a, b)


def test_calls_of_several_loops_and_threads_share_the_line() -> None:
    pool = Pool(*(Limiter(rps=100, name=name, concurrency=2) for name in "ab"))
    ended: list[str] = []

    async def calls() -> None:
        ended.extend([await name_of_taker(pool) for _ in range(10)])

    def thread() -> None:
        for _ in range(10):
            with pool.acquire_sync():
                ended.append("thread")

    threads = [threading.Thread(target=thread) for _ in range(3)]
    threads += [threading.Thread(target=asyncio.run, args=(calls(),)) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    assert len(ended) == 60
    nothing_is_left(pool, *pool.members)


async def test_member_used_directly_shares_with_the_pool_as_with_a_child(time: VirtualTime) -> None:
    a, b = members_of(time, 120, 60)
    pool = Pool(a, b)
    served: collections.Counter[str] = collections.Counter()

    async def caller(limiter: Limiter, name: str) -> None:
        while time.now < 300:
            async with limiter.acquire():
                served[name] += 1

    callers = [(a, "direct"), (a.child("other"), "other"), (pool, "pool")]
    await asyncio.gather(*(caller(*each) for each in callers for _ in range(20)))
    assert served["direct"] == pytest.approx(216, rel=0.06)
    assert served["other"] == pytest.approx(216, rel=0.06)
    assert served["pool"] == pytest.approx(216 + 306, rel=0.06)


async def test_newcomer_at_member_does_not_pass_waiting_pool(time: VirtualTime) -> None:
    (a,) = members_of(time, 60, concurrency=1)
    pool = Pool(a)
    held = await a.acquire()
    waiting = await start_all([pool.acquire()])
    held.release()
    with pytest.raises(WouldBlock):
        a.acquire_nowait()
    assert (await waiting[0]).limiter is a


async def test_urgent_calls_of_a_pool_pass_those_of_a_member_itself(time: VirtualTime) -> None:
    """As those of a child do: only one other call of each goes before six of them."""
    (a,) = members_of(time, 600, concurrency=1)
    pool, order = Pool(a), ""

    async def call(limiter: Limiter, name: str, priority: int) -> None:
        nonlocal order
        async with limiter.acquire(priority=priority):
            order += name

    held = await a.acquire()
    waiting = await start_all(call(*each, 0) for each in [(a, "d"), (pool, "p")] * 4)
    waiting += await start_all(call(pool, "u", 1) for _ in range(6))
    given_up = await start(call(pool, "v", 2))
    cancel(given_up)
    held.release()
    await asyncio.wait([*waiting, given_up])
    assert collections.Counter(order[:8]) == {"u": 6, "d": 1, "p": 1}
    assert "ddd" not in order
    assert "ppp" not in order  # afterwards they share as before


# --- limits of those who share a pool ---

#: What binds a child, and how many of sixty calls of 500 tokens and 0.25 USD may go at once.
SHARED: dict[str, tuple[dict[str, Any], int]] = {
    "slots": ({"concurrency": 1}, 1),
    "requests": ({"limits": ("2 RPM burst 2",)}, 2),
    "dollars": ({"limits": ("1 USD/day",)}, 4),
}


@pytest.mark.parametrize("sticky", [None, "talk"])
@pytest.mark.parametrize("kind", ["child", "tenant", "key"])
@pytest.mark.parametrize("limited", SHARED)
async def test_limits_below_a_pool_hold_at_all_members_together(
    time: VirtualTime, limited: str, kind: str, sticky: str | None
) -> None:
    """Also for calls that fit only some members, and for those that prefer one."""
    sizes = {"small": 100, "large": 100_000, "larger": 200_000}
    members = [Limiter(f"{tpm} TPM", name=name, clock=time.clock) for name, tpm in sizes.items()]
    pool = Pool(*members)
    terms, most = SHARED[limited]
    limits, given = terms.get("limits", ()), {k: v for k, v in terms.items() if k != "limits"}
    if kind == "tenant":
        pool.per_key(*limits, **given)
    place = pool.child("x", *limits, **given) if kind == "child" else pool
    place = pool.key("acme", *limits, **given) if kind == "key" else place
    tenant = "acme" if kind == "tenant" else None

    async def call() -> None:
        async with place.acquire(tokens=500, usd=0.25, tenant=tenant, sticky=sticky):
            admitted.append(time.now)
            await asyncio.sleep(0.5)

    admitted: list[float] = []
    calls = await start_all(call() for _ in range(60))
    assert len(admitted) == most
    await asyncio.sleep(0.25)
    assert len(admitted) == most
    cancel(*calls)


async def test_cheap_call_behind_many_for_one_member_goes_elsewhere(time: VirtualTime) -> None:
    small = Limiter("1k TPM", name="small", clock=time.clock)
    large = Limiter("10k TPM", name="large", clock=time.clock)
    pool = Pool(small, large)
    costly = await start_all(name_of_taker(pool, tokens=9_000) for _ in range(101))
    assert await name_of_taker(pool, tokens=100) == "small"
    assert time.now == 0
    cancel(*costly)


@pytest.mark.parametrize("prefer", ["first", "least_used"])
async def test_preference_decides_for_calls_that_waited_too(time: VirtualTime, prefer: Any) -> None:
    pool = Pool(*members_of(time, 6_000, 6_000), prefer=prefer)
    child = pool.child("x", "60 RPM burst 1")
    takers = await asyncio.gather(*(name_of_taker(child) for _ in range(6)))
    assert takers == [*("aaaaaa" if prefer == "first" else "ababab")]


# --- who is preferred ---


@pytest.mark.parametrize(
    ("prefer", "expected"), [("first", "aaaaaabbbb"), ("least_used", "abbbabbbab")]
)
async def test_free_member_is_preferred(time: VirtualTime, prefer: Any, expected: str) -> None:
    """A tenth of 60 and of 180 a minute may pass at once: 6 and 18."""
    pool = Pool(*members_of(time, 60, 180), prefer=prefer)
    assert [await name_of_taker(pool) for _ in range(10)] == [*expected]


# --- conversations ---


async def test_sticky_call_keeps_to_its_member_while_that_costs_little(time: VirtualTime) -> None:
    a, b = members_of(time, 60, 60, concurrency=1)
    pool = Pool(a, b, prefer="first", patience=2)
    a.pause(0.5)
    assert await name_of_taker(pool, sticky="talk") == "b"
    await asyncio.sleep(1)
    with asyncbucket.sticky("talk"):
        held = pool.acquire_nowait()
        other = pool.acquire_nowait()  # which cannot wait for its own
    assert (held.limiter, other.limiter) == (b, a)
    pool.pause(1)
    other.release()
    sticky, free = await start_all([name_of_taker(pool, sticky=key) for key in ("talk", "another")])
    await asyncio.sleep(1)
    assert (sticky.done(), await free) == (True, "a")  # "talk" was at a last
    talk = await start(pool.acquire(sticky="another"))
    b_only = await start(name_of_taker(pool, sticky="another"))
    held.release()
    await asyncio.sleep(1)
    assert not b_only.done()  # it waits for its own, though the other is free
    (await talk).release()
    assert await b_only == "a"


async def test_sticky_call_does_not_wait_for_a_member_that_is_too_small(time: VirtualTime) -> None:
    small = Limiter("100 TPM", name="small", clock=time.clock)
    large = Limiter("1k TPM", name="large", clock=time.clock)
    other = Limiter("1k TPM", name="other", clock=time.clock)
    pool = Pool(small, large, other, prefer="first")
    assert await name_of_taker(pool, tokens=10, sticky="talk") == "small"
    large.pause(1)
    other.pause(2)
    assert await name_of_taker(pool, tokens=500, sticky="talk") == "large"
    assert time.now == 1


async def test_sticky_call_goes_elsewhere_when_its_patience_ends(time: VirtualTime) -> None:
    a, b = members_of(time, 60, 60, concurrency=1)
    pool = Pool(a, b, prefer="first")
    assert await name_of_taker(pool, sticky="talk") == "a"
    held = await a.acquire()
    assert await name_of_taker(pool, sticky="talk", patience=0) == "b"
    assert await name_of_taker(pool, sticky="talk") == "b"  # where its cache is warm now
    held.release()
    assert await name_of_taker(pool, sticky="new") == "a"
    held = await a.acquire()
    asked = time.now
    asked_in = (0.5, None)
    hurried, patient = await start_all(
        name_of_taker(pool, sticky="new", timeout=each) for each in asked_in
    )
    pool.acquire_nowait().release()  # at b, though calls wait for a
    assert await hurried == "b"  # at the last moment
    assert time.now - asked == pytest.approx(0.5)
    assert await patient == "b"
    assert time.now - asked == pytest.approx(2.0)
    held.release()


@pytest.mark.parametrize(("patience", "taker"), [(100, "a"), (1, "b")])
async def test_call_out_of_line_shares(time: VirtualTime, patience: float, taker: str) -> None:
    """It is in the line of the member that it is kept for, or in all, though nobody waits in its own."""
    a, b = members_of(time, 60, 60, concurrency=1)
    pool = Pool(a, b, prefer="first", patience=patience)
    assert await name_of_taker(pool, sticky="talk") == "a"
    held = {"a": await a.acquire()}
    kept = await start(pool.acquire(sticky="talk"))
    held["b"] = await b.acquire()
    member = a if taker == "a" else b
    direct = await start_all(member.acquire() for _ in range(3))
    await asyncio.sleep(2)
    held[taker].release()
    for _ in range(2):
        await all_blocked()
        if not kept.done():
            (await direct.pop(0)).release()
            await asyncio.sleep(2)
    assert (await kept).limiter is member
    cancel(*direct)


async def test_pool_that_slept_at_a_member_is_asked_again(time: VirtualTime) -> None:
    """Its child's own limit held it up; then a call of another one comes."""
    a, b = members_of(time, 600, 600, concurrency=1)
    b.pause(1_000)
    pool = Pool(a, b)
    slow = pool.child("slow", "1/100s")
    (await slow.acquire()).release()
    held = await a.acquire()
    waiting = await start_all([slow.acquire(), a.acquire()])
    held.release()
    (await waiting[1]).release()
    waiting += await start_all([a.acquire(), a.acquire()])
    newcomer = await start(pool.acquire())
    (await waiting[2]).release()
    await asyncio.sleep(1)
    for each in (newcomer, waiting[3]):
        (await each).release()
    assert time.now < 5
    cancel(waiting[0])


async def test_children_of_a_pool_share_its_tokens_by_weight(time: VirtualTime) -> None:
    limits = "6k TPM burst 600", "12k TPM burst 600"
    pool = Pool(*(Limiter(each, name=each[:2], clock=time.clock) for each in limits))
    served: collections.Counter[str] = collections.Counter()

    async def caller(child: Pool, tokens: int) -> None:
        while time.now < 400:
            async with child.acquire(tokens=tokens):
                served[child.name] += tokens * (70 < time.now < 380)

    children = [(pool.child("light"), 50), (pool.child("heavy", weight=3), 100)]
    await asyncio.gather(*(caller(*each) for each in children for _ in range(10)))
    assert served["pool/heavy"] == pytest.approx(3 * served["pool/light"], rel=0.05)


async def test_latest_talks_are_kept(time: VirtualTime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_HOMES", 2)
    a, b = members_of(time, 600, 600)
    pool = Pool(a, b, prefer="first")
    for key in "xyz":
        assert await name_of_taker(pool, sticky=key) == "a"
    a.pause(1)
    assert await name_of_taker(pool, sticky="x") == "b"  # forgotten, so it does not wait for a
    assert time.now == 0
    assert await name_of_taker(pool, sticky="z") == "a"


async def test_sticky_call_does_not_wait_for_member_that_is_left_out(time: VirtualTime) -> None:
    a, b = members_of(time, 60, 60)
    pool = Pool(a, b, prefer="first")
    lease = await pool.acquire(sticky="talk")
    held = await a.acquire()
    a.pause(1.5)
    waiting = await start(name_of_taker(pool, sticky="talk"))
    assert not waiting.done()
    lease.member_failed("HTTP 401")
    assert await waiting == "b"
    held.release()


@pytest.mark.heavy
async def test_conversations_hit_warm_caches_at_full_throughput(time: VirtualTime) -> None:
    """At least 95 % of the hits of unlimited stickiness, at no more than 2 % lost throughput."""
    hits, seconds = {}, {}
    for patience in (2.0, 1e6, 0.0):
        began = time.now
        members = [
            Limiter(rpm=rpm, name=name, concurrency=8, clock=time.clock)
            for name, rpm in (("a", 300), ("b", 200), ("c", 100))
        ]
        pool = Pool(*members, patience=patience)
        talks = (hits_of_conversation(pool, which) for which in range(60))
        hits[patience] = sum(await asyncio.gather(*talks))
        seconds[patience] = time.now - began
    assert hits[2.0] >= 0.95 * hits[1e6]
    assert seconds[2.0] <= seconds[0.0] / 0.98
    assert hits[0.0] < 0.7 * hits[2.0]


async def hits_of_conversation(pool: Pool, which: int) -> int:
    """Make calls in a row; return how many hit the cache of the member that took the last."""
    chance, hits, warm_at = random.Random(which), 0, ""
    for _ in range(40):
        async with pool.acquire(sticky=f"talk {which}") as lease:
            hits += warm_at == lease.limiter.name
            warm_at = lease.limiter.name
            await asyncio.sleep(chance.uniform(0.2, 1.0))
    return hits


# --- members that fail ---


@pytest.mark.parametrize("is_dropped", [False, True])
async def test_member_that_fails_is_left_out_and_starts_slowly_until_a_call_ends_well(
    time: VirtualTime, caplog: pytest.LogCaptureFixture, *, is_dropped: bool
) -> None:
    a, b = members_of(time, 6_000, 6_000)
    pool = Pool(a, b, prefer="first")
    lease = await pool.acquire()
    others = [await pool.acquire() for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        lease.member_failed("HTTP 401")
        for other in others:  # which were in flight, and fail with it
            other.member_failed("HTTP 401")
    assert caplog.messages == ["pool 'pool' leaves out 'a': HTTP 401"]
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        began = time.now
        while (lease := await pool.acquire()).limiter is b:
            lease.release()
            await asyncio.sleep(0.25)
        assert time.now - began == pytest.approx(seconds, abs=0.26)
        assert await name_of_taker(pool) == "b"  # others follow little by little
        lease.member_failed("HTTP 401")
    await asyncio.sleep(60)
    lost = await pool.acquire()
    assert lost.limiter is a
    if is_dropped:
        del lost
    else:
        lost.failed()  # says nothing about the member
    assert await name_of_taker(pool) == "b"
    await asyncio.sleep(0.25)
    assert await name_of_taker(pool) == "a"  # which proves that it works
    held = [await pool.acquire() for _ in range(3)]
    assert {lease.limiter for lease in held} == {a}
    held[0].member_failed("HTTP 500")
    await asyncio.sleep(1)
    assert await name_of_taker(pool) == "a"  # it rested for 1 s, as at first


async def test_failing_member_still_serves_those_who_ask_it_alone(time: VirtualTime) -> None:
    a, b = (Limiter(concurrency=1, name=name, clock=time.clock) for name in "ab")
    lease = await Pool(a, b, prefer="first").acquire()
    waiting = await start(a.acquire())
    lease.member_failed("HTTP 500")
    (await waiting).release()
    assert time.now == 0


async def test_member_works_as_before_when_its_slow_start_is_over(time: VirtualTime) -> None:
    pool = Pool(*members_of(time, 6_000))
    (await pool.acquire()).member_failed("HTTP 500")
    held = await asyncio.gather(*(pool.acquire() for _ in range(600)))
    for lease in held:
        lease.release()
    (await pool.acquire()).member_failed("HTTP 500")
    assert [state.left_out for state in pool.states()] == [1]  # not 2 s: it counts as new


async def test_calls_wait_while_all_members_are_left_out(time: VirtualTime) -> None:
    a, b = members_of(time, 6_000, 6_000)
    pool = Pool(a, b)
    for _ in range(2):
        (await pool.acquire()).member_failed("ConnectError")
    with pytest.raises(WouldBlock):
        pool.acquire_nowait()
    waiting = await start_all([pool.acquire() for _ in range(5)])
    probes = [await each for each in waiting[:2]]
    assert not any(each.done() for each in waiting[2:])
    for probe in probes:
        probe.release()
    await asyncio.gather(*waiting)
    assert time.now == pytest.approx(1.0)


async def test_calls_fail_when_no_member_works_any_more(time: VirtualTime) -> None:
    pool = Pool(*members_of(time, 6_000, 6_000))
    pool.acquire_nowait().release()
    asked: Any = pool.acquire()
    asked.member_failed("too early")
    with pytest.raises(RuntimeError, match="no member has taken this call yet"):
        _ = asked.limiter
    for _ in range(7):
        (await pool.acquire()).member_failed("ConnectError")
    last = await pool.acquire()
    waiting = await start(pool.acquire())
    last.member_failed("ConnectError")
    with pytest.raises(AcquireTimeout, match="no member of pool"):
        await waiting
    says = "no member of pool 'pool' works: 'a': left out for 8 s more (ConnectError); 'b': left"
    with pytest.raises(AcquireTimeout, match=re.escape(says)) as caught:
        await pool.acquire()
    assert caught.value.retry_after == 8
    assert time.now == 7


# --- everything else is as with a limiter ---


async def test_children_tenants_and_agents_of_a_pool_are_pools(time: VirtualTime) -> None:
    pool = Pool(*members_of(time, 60, 60))
    child = pool.child("chat", concurrency=1)
    held = await child.acquire()
    waiting = await start(child.acquire())
    assert await name_of_taker(pool) in "ab"  # the child's own bound holds up nobody else
    held.release()
    (await waiting).release()
    child.reconfigure(concurrency=2)
    assert child.concurrency == 2
    child.learn(Limit("tokens", 5))  # which was given none
    child.pause(1)
    with asyncbucket.tenant("acme"), asyncbucket.agent(kind="research"):
        async with pool.acquire() as lease:
            lease.settle(requests=1)
    assert pool.key("acme").statistics().agents is not None
    assert (child.statistics().paused, child.limits) == (1, (Limit("tokens", 5),))
    with pytest.raises(CostExceedsLimit, match="exceeds the limit of 4 tokens"):
        pool.child("tools", "4 TPM").acquire_nowait(tokens=5)
    nothing_is_left(pool, child)


async def test_waiting_call_of_a_tenant_fails_as_its_pools_limits_fall(time: VirtualTime) -> None:
    """However often they have changed while no call came."""
    pool = Pool(*members_of(time, 60, 60, tpm=100))
    child = pool.child("chat")
    for _ in pool.members:
        pool.acquire_nowait(tokens=100).release()
    waiting = await start(child.acquire(tokens=45, tenant="acme"))
    for limit in "90 TPM", "40 TPM":
        child.reconfigure(limit)
    with pytest.raises(CostExceedsLimit, match="45 tokens exceeds the limit of 40"):
        await waiting
    assert time.now == 0


async def test_pool_shows_what_its_members_allow(time: VirtualTime) -> None:
    a = Limiter("60 RPM", "1k TPM", concurrency=2, name="a", clock=time.clock)
    b = Limiter("120 RPM", concurrency=3, name="b", clock=time.clock)
    pool = Pool(a, b)
    assert (pool.concurrency, Pool(*members_of(time, 9)).concurrency) == (5, None)
    assert pool.limits == (*a.limits, *b.limits)
    assert str(pool.explain(tokens=100)) == (
        "a call would pass at once; its members allow 130 such calls a minute together "
        "(a: 1,000 tokens per 60 s; b: 120 requests per 60 s)"
    )
    held = [await pool.acquire(tokens=100) for _ in range(5)]
    assert "wait until a slot is given back; its members allow" in str(pool.explain(tokens=100))
    a.pause(5)
    b.pause(7)
    now = pool.statistics()
    assert (now.admitted, now.in_flight, len(now.limits), now.paused) == (len(held), 5, 3, 5)
    assert [each.partition(":")[0] for each in str(now).split("\n")] == ["pool", "  a", "  b"]
    assert str(Pool(Limiter(name="d", clock=time.clock)).explain()) == (
        "a call would pass at once; no limit over time binds such calls"
    )


#: What is done with limiters a, one that is busy, and one of another clock; no type checker reads it.
POOL: Any = Pool
MISTAKES: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "no member": (lambda _: POOL(), ValueError, "a pool needs at least one limiter"),
    "text": (lambda t: POOL(t.a, "b"), TypeError, "a pool's members are limiters, not 'b'"),
    "pool": (lambda t: POOL(POOL(t.a)), TypeError, "a pool's members are limiters, not <Pool"),
    "child": (lambda t: POOL(t.a.child("c")), ValueError, "have no parents: 'a/c' is a child"),
    "twice": (lambda t: POOL(t.a, t.a), ValueError, "different names, not a, a"),
    "shared": (
        lambda t: (POOL(t.a), POOL(t.a)),
        RuntimeError,
        "'a' is a member of pool 'pool' alr",
    ),
    "busy": (lambda t: POOL(t.a, t.busy), RuntimeError, "make the pool before the first call"),
    "clock": (lambda t: POOL(t.a, t.other), ValueError, "need the same clock"),
    "prefer": (lambda t: POOL(t.a, prefer="best"), ValueError, "prefer must be 'least_used' or"),
    "patience": (lambda t: POOL(t.a, patience=-1), ValueError, "patience must be at least 0 s"),
    "limits": (lambda t: POOL(t.a).reconfigure(rpm=5), TypeError, "reconfigure a member, such"),
    "sticky": (lambda t: POOL(t.a).acquire(sticky=""), ValueError, "sticky must be a non-empty"),
    "call": (lambda t: POOL(t.a).acquire(patience=-1), ValueError, "patience must be at least"),
    "amount": (lambda t: POOL(t.a).acquire_nowait(x=1), TypeError, "this limiter counts"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_pool_refuses(time: VirtualTime, mistake: str) -> None:
    a, busy = members_of(time, 60, 60)
    _held = busy.acquire_nowait()
    make, error, says = MISTAKES[mistake]
    with pytest.raises(error, match=says):
        make(SimpleNamespace(a=a, busy=busy, other=Limiter(name="other")))
