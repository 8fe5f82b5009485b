"""Budgets: what calls inside may spend together is capped, whoever admits them."""

import asyncio
import contextlib
import contextvars
import functools
import gc
import math
import random
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

import asyncbucket
from asyncbucket import (
    Budget,
    BudgetExceeded,
    Cost,
    Limiter,
    Pool,
    QueueFull,
    WouldBlock,
    budget,
)
from asyncbucket.core.context import inherited
from asyncbucket.core.events import Refused, Released
from asyncbucket.core.levels import reserve_more
from asyncbucket.testing import VirtualTime


def in_micro_dollars(amounts: Mapping[str, float]) -> int:
    return round(amounts["usd"] * 1_000_000)


async def test_call_that_would_pass_the_budget_is_refused_with_numbers_and_remedy() -> None:
    limiter = Limiter(concurrency=5)
    with budget(usd=2.00, requests=100) as capped:
        async with limiter.acquire(usd=1.25) as lease:
            assert (capped.reserved["usd"], capped.spent["usd"], capped.left["usd"]) == (
                1.25,
                0,
                0.75,
            )
            with pytest.raises(BudgetExceeded) as error:
                await limiter.acquire(usd=0.80)
            lease.settle(usd=0.5)
        assert repr(capped) == "<Budget of 2 USD, 100 requests, 0.50 USD, 1 request spent>"
        assert (capped.spent, capped.left) == (
            {"usd": 0.5, "requests": 1},
            {"usd": 1.5, "requests": 99},
        )
    assert str(error.value) == (
        "this call may cost 0.80 USD, but the budget of 2 USD has only 0.75 USD left (0 USD spent, "
        "1.25 USD reserved by calls in flight); finish with what you have, make a cheaper call, or "
        "ask for a larger budget"
    )
    found = error.value
    assert found.budget is capped
    assert (found.resource, found.cap, found.spent) == ("usd", 2.0, 0)
    assert (found.reserved, found.cost) == (1.25, 0.8)
    assert inherited.get() is None


@pytest.mark.parametrize("way", ["await", "enter", "nowait", "sync", "agent"])
async def test_every_way_to_ask_is_capped_across_limiters(way: str) -> None:
    async def call(limiter: Limiter, tokens: int) -> None:
        if way in ("await", "agent"):
            lease = await limiter.acquire(tokens=tokens)
        elif way == "nowait":
            lease = limiter.acquire_nowait(tokens=tokens)
        elif way == "sync":
            lease = await asyncio.to_thread(limiter.acquire_sync, tokens=tokens)
        else:
            lease = await limiter.acquire(tokens=tokens).__aenter__()
        with lease:
            pass

    scope = asyncbucket.agent("a") if way == "agent" else contextlib.nullcontext()
    limiters = [Limiter("60k TPM"), Limiter("600 RPM"), Limiter().child("tools")]
    with budget(tokens=1_000) as capped, scope:
        for limiter in limiters:
            await call(limiter, 300)
        with pytest.raises(BudgetExceeded, match=r"cost 300 tokens, but .* only 100 tokens left"):
            await call(limiters[0], 300)
        await call(limiters[1], 100)
        assert capped.left == {"tokens": 0}
    assert [each.statistics().refused for each in limiters] == [1, 0, 0]
    assert [each.statistics().in_flight for each in limiters] == [0, 0, 0]
    await call(limiters[0], 300)


async def test_pool_is_capped_like_its_members() -> None:
    members = Limiter("60k TPM", name="a"), Limiter("60k TPM", name="b")
    pool = Pool(*members)
    with budget(tokens=1_000) as capped, asyncbucket.agent("a"):
        async with pool.acquire(tokens=600) as lease:
            assert lease.limiter in members
            lease.settle(tokens=500)
        with pytest.raises(BudgetExceeded):
            await pool.acquire(tokens=501)
        pool.acquire_nowait(tokens=500).release()
        with pytest.raises(BudgetExceeded):
            pool.acquire_nowait(tokens=1)
    assert dict(capped.spent) == {"tokens": 1_000}
    assert [each.statistics().in_flight for each in (pool, *members)] == [0, 0, 0]


async def test_nested_budgets_all_hold_and_tasks_inherit_them() -> None:
    limiter = Limiter()

    async def one() -> None:
        (await limiter.acquire(usd=0.4)).release()

    with budget(usd=1) as outer:
        with budget(usd=10) as wide, budget(usd=0.5, tokens=5) as inner:
            await asyncio.create_task(one())
            with pytest.raises(BudgetExceeded, match=r"budget of 0\.50 USD"):
                await asyncio.create_task(one())
        await one()
        with pytest.raises(BudgetExceeded, match="budget of 1 USD"):
            await one()
    spent = [in_micro_dollars(each.spent) for each in (outer, wide, inner)]
    assert spent == [800_000, 400_000, 400_000]
    assert [in_micro_dollars(each.reserved) for each in (outer, wide, inner)] == [0, 0, 0]


async def test_calls_in_line_hold_nothing_and_hopeless_ones_do_not_wait(time: VirtualTime) -> None:
    """Twenty calls may each reserve half of the budget, if one runs after the other."""
    limiter = Limiter(concurrency=1, clock=time.clock)

    began = time.now

    async def one() -> None:
        async with limiter.acquire(usd=0.5) as lease:
            await asyncio.sleep(1)
            lease.settle(usd=0.025)

    with budget(usd=1.0) as capped:
        await asyncio.gather(*(one() for _ in range(20)))
        assert (round(time.now - began), in_micro_dollars(capped.spent)) == (20, 500_000)
        async with limiter.acquire(usd=0.5):
            with pytest.raises(BudgetExceeded):  # whatever becomes of the one in flight
                await limiter.acquire(usd=0.51)
            assert (round(time.now - began), limiter.statistics().waiting) == (20, 0)


async def test_call_refused_at_its_admission_gives_everything_back(time: VirtualTime) -> None:
    limiter = Limiter("10k TPM", "10 RPM", concurrency=1, clock=time.clock)
    events: list[Any] = []
    limiter.observe(events.append)
    with budget(usd=1.0) as capped:
        first = await limiter.acquire(usd=0.6, tokens=100)
        second = asyncio.create_task(limiter.acquire(usd=0.6, tokens=5_000))
        await asyncio.sleep(0)
        other = Limiter(clock=time.clock)
        third = other.acquire_nowait(usd=0.4)  # while the second waits
        first.settle(usd=0.1)
        third.settle(usd=0.8)
        first.release()
        with pytest.raises(BudgetExceeded, match=r"0\.80 USD reserved by calls in flight"):
            await second
        assert [use.used for use in limiter.statistics().limits] == [100, 1]
        assert limiter.statistics().in_flight == 0
        assert in_micro_dollars(capped.reserved) == 800_000
        assert [type(event) for event in events[-2:]] == [Released, Refused]
        assert events[-1].reason == "budget"


@pytest.mark.parametrize("when", ["queue_full", "timeout", "cancelled", "would_block", "dropped"])
async def test_what_was_reserved_comes_back_exactly_once(time: VirtualTime, when: str) -> None:
    limiter = Limiter(
        concurrency=1, max_queue=0 if when == "queue_full" else None, clock=time.clock
    )
    with budget(usd=1.0, requests=50) as capped:
        held = limiter.acquire_nowait(usd=0.3)
        for _ in range(3):
            if when == "queue_full":
                with pytest.raises(QueueFull):
                    await limiter.acquire(usd=0.3)
            elif when == "timeout":
                with pytest.raises(TimeoutError):
                    await limiter.acquire(usd=0.3, timeout=1)
            elif when == "would_block":
                with pytest.raises(WouldBlock):
                    limiter.acquire_nowait(usd=0.3)
            else:
                task = asyncio.create_task(limiter.acquire(usd=0.3))
                await asyncio.sleep(0.1)
                if when == "dropped":
                    held.release()
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                if when == "dropped":
                    held = limiter.acquire_nowait(usd=0)
        held.release()
        assert in_micro_dollars(capped.spent) == 300_000
        assert (capped.reserved, capped.left["usd"]) == ({"usd": 0, "requests": 0}, 0.7)


async def test_late_and_repeated_settlements_and_dropped_leases_count_once() -> None:
    limiter = Limiter()
    with budget(usd=1.0) as capped:
        lease = await limiter.acquire(usd=0.5)
        lease.settle(usd=0.2)
        lease.settle(usd=0.3)
        lease.release()
        lease.release()
        lease.settle(usd=0.1)
        assert in_micro_dollars(capped.spent) == 100_000
        lease = await limiter.acquire(usd=0.5)
        del lease
        gc.collect()
        assert (in_micro_dollars(capped.spent), capped.reserved["usd"]) == (600_000, 0)


async def test_further_request_of_a_call_is_paid_for_by_all_budgets_or_by_none() -> None:
    limiter = Limiter()
    with budget(usd=1) as outer, budget(usd=0.5, requests=9) as inner:
        async with limiter.acquire(usd=0.2) as lease:
            await reserve_more(lease, {"requests": 1, "usd": 0.2}, blocking=False)
            assert (inner.reserved, outer.reserved) == ({"usd": 0.4, "requests": 2}, {"usd": 0.4})
            with pytest.raises(BudgetExceeded, match=r"may cost 0.20 USD, but .* 0.10 USD left"):
                await reserve_more(lease, {"requests": 1, "usd": 0.2}, blocking=False)
            assert (inner.reserved, outer.reserved) == ({"usd": 0.4, "requests": 2}, {"usd": 0.4})
            lease.settle(requests=2, usd=0.3)
    assert (inner.spent, outer.spent) == ({"usd": 0.3, "requests": 2}, {"usd": 0.3})
    async with limiter.acquire(usd=0.2) as lease:
        await reserve_more(lease, {"usd": 7}, blocking=False)  # nothing caps it


async def test_overdrawn_budget_refuses_what_follows_but_what_costs_nothing() -> None:
    limiter = Limiter()
    with budget(usd=1.0) as capped:
        async with limiter.acquire(usd=0.9) as lease:
            lease.settle(usd=1.5)
        assert capped.left["usd"] == -0.5
        with pytest.raises(BudgetExceeded, match=r"has only 0 USD left \(1\.50 USD spent\)"):
            await limiter.acquire(usd=0.000_001)
        await limiter.acquire(tokens=5)


async def test_cap_is_never_passed_at_any_concurrency(time: VirtualTime) -> None:
    """Calls use at most what they reserved, wait, are cancelled, time out, and nest."""
    rng = random.Random(7)
    limiters = [
        Limiter("60 RPM", concurrency=5, clock=time.clock),
        Limiter(concurrency=3, max_queue=5, clock=time.clock),
        Limiter(clock=time.clock),
    ]
    outer = budget(usd=1.0)
    truth = 0
    ended: list[str] = []

    async def one() -> None:
        nonlocal truth
        reserved = rng.randrange(1_000, 60_000)
        try:
            await asyncio.sleep(rng.uniform(0, 60))
            call = rng.choice(limiters).acquire(
                usd=reserved / 1e6, tokens=rng.randrange(100), timeout=rng.choice([None, 5])
            )
            async with call as lease:
                await asyncio.sleep(rng.uniform(0, 3))
                used = rng.randrange(reserved)
                truth += used
                lease.settle(usd=used / 1e6)
                ended.append("ok")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        except asyncbucket.AsyncBucketError as error:
            ended.append(type(error).__name__)
        assert sum(in_micro_dollars(each) for each in (outer.spent, outer.reserved)) <= 1_000_000

    with outer:
        tasks = [asyncio.create_task(one()) for _ in range(200)]
        for task in rng.sample(tasks, 30):
            asyncio.get_running_loop().call_later(rng.uniform(0, 60), task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
    assert {"ok", "cancelled", "BudgetExceeded"} <= set(ended)
    assert outer.reserved["usd"] == 0
    # A call that is cancelled in flight may have been made: it has spent what it reserved.
    assert 0 < truth <= in_micro_dollars(outer.spent) <= 1_000_000


def test_threads_and_loops_share_a_budget() -> None:
    limiter, shared = Limiter(), budget(usd=0.5)
    passed: list[int] = []

    def work() -> None:
        for _ in range(100):
            with contextlib.suppress(BudgetExceeded), limiter.acquire_sync(usd=0.001):
                passed.append(1)

    with shared:
        copies = [contextvars.copy_context() for _ in range(8)]
    threads = [threading.Thread(target=copy.run, args=(work,)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(passed), shared.left["usd"]) == (500, 0)


async def asked_later(_: BudgetExceeded) -> float:
    await asyncio.sleep(1)
    return 2.0


def asked_now(_: BudgetExceeded) -> float:
    return 2.0


def asked_in_vain(_: BudgetExceeded) -> Any:
    return "yes"


@pytest.mark.parametrize("ask", [asked_now, asked_later])
async def test_on_exceeded_may_raise_the_cap_and_is_asked_once(
    time: VirtualTime, ask: Callable[[BudgetExceeded], Any]
) -> None:
    questions: list[str] = []

    def counted(error: BudgetExceeded) -> float | Awaitable[float]:
        questions.append(str(error))
        answer: float | Awaitable[float] = ask(error)
        return answer

    limiter = Limiter(concurrency=10, clock=time.clock)

    async def one() -> None:
        async with limiter.acquire(usd=0.2):
            await asyncio.sleep(1)

    with budget(usd=1.0, on_exceeded=counted) as capped:
        await asyncio.gather(*(one() for _ in range(8)))
        assert (len(questions), dict(capped.cap)) == (1, {"usd": 2.0})
        with pytest.raises(BudgetExceeded, match="budget of 2 USD"):  # asked, and not raised
            await limiter.acquire(usd=0.5)
    assert len(questions) == 2
    assert limiter.statistics().in_flight == 0


def test_on_exceeded_of_a_blocking_call_is_a_plain_function() -> None:
    limiter = Limiter()
    with budget(requests=1, on_exceeded=lambda error: error.cap + 1) as capped:
        for _ in range(3):
            limiter.acquire_sync().release()
        assert dict(capped.spent) == {"requests": 3}
        with pytest.raises(BudgetExceeded):  # nothing is asked where nobody may wait
            limiter.acquire_nowait()
    with (
        budget(requests=0, on_exceeded=asked_later),
        pytest.raises(TypeError, match="plain function"),
    ):
        limiter.acquire_sync()
    refused = pytest.raises(TypeError, match=r"new cap, such as 5.0, or None, not 'yes'")
    with budget(requests=0, on_exceeded=asked_in_vain), refused:
        limiter.acquire_sync()
    with budget(requests=0, on_exceeded=lambda _: None), pytest.raises(BudgetExceeded):
        limiter.acquire_sync()


@pytest.mark.parametrize("fails", [False, True])
async def test_on_exceeded_that_fails_or_is_cancelled_leaves_nothing_behind(
    time: VirtualTime, *, fails: bool
) -> None:
    limiter = Limiter(concurrency=3, clock=time.clock)

    async def ask(_: BudgetExceeded) -> None:
        await asyncio.sleep(2 if fails else 1e9)
        raise OSError("nobody can be asked")

    with budget(usd=0.5, on_exceeded=ask) as capped:
        held = await limiter.acquire(usd=0.4)
        asking = [asyncio.create_task(limiter.acquire(usd=0.4)) for _ in range(2)]
        await asyncio.sleep(1)
        assert limiter.statistics().in_flight == 3  # they may hold their slots
        for each in () if fails else asking:
            each.cancel()
        for each in asking:
            with pytest.raises(OSError if fails else asyncio.CancelledError):
                await each
        held.release()
    assert (limiter.statistics().in_flight, in_micro_dollars(capped.spent)) == (0, 400_000)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({}, ValueError, "needs a cap: give e.g. usd=2.00"),
        ({"usd": -1}, ValueError, "usd must be finite and not negative"),
        ({"usd": math.nan}, ValueError, "usd must be finite"),
        ({"tokens": "5"}, TypeError, "tokens must be a number, not str"),
        ({"usd": 1, "on_exceeded": 5}, TypeError, "on_exceeded must be a function of the error"),
    ],
)
def test_invalid_budget_is_refused(given: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        budget(**given)


def test_budget_is_entered_once_and_decorates_nothing() -> None:
    once = budget(usd=1)
    with once:
        pass
    with pytest.raises(RuntimeError, match=r"or budget\(\) again"), once:
        pass
    assert isinstance(once, Budget)


def test_dollars_are_given_and_shown_in_dollars_and_counted_in_micro_dollars() -> None:
    assert Cost(usd=1.1)["usd"] == 1_100_000
    assert Cost(usd=0.000_000_1)["usd"] == 1
    assert repr(Cost(usd=0.5, requests=2)) == "Cost(requests=2, usd=0.5)"
    limiter = Limiter("2 USD/hour")
    limiter.acquire_nowait(usd=1.999).release()
    used = limiter.statistics().limits[0]
    assert (used.used, used.available) == (1_999_000, 1_000)
    assert "1.999 used, 0.001 available" in limiter.statistics()._repr_html_()
    with pytest.raises(asyncbucket.CostExceedsLimit) as error:
        limiter.acquire_nowait(usd=3)
    assert str(error.value) == (
        "cost of 3 USD exceeds the limit of 2 USD per 3,600 s and can never pass; raise the limit or "
        "split the request"
    )
    with pytest.raises(
        WouldBlock, match=r"a call of 0.50 USD cannot pass without waiting: USD binds"
    ):
        limiter.acquire_nowait(usd=0.5)
    assert "USD allows 163 such calls an hour (2 USD per 3,600 s)" in str(
        limiter.explain(usd=0.0123)
    )


async def test_debt_of_dollars_holds_back_what_follows(time: VirtualTime) -> None:
    limiter, began = Limiter("1 USD/hour", clock=time.clock), time.now
    async with limiter.acquire(usd=0.5) as lease:
        lease.settle(usd=1.5)
    async with limiter.acquire(usd=0.5):
        assert time.now - began > 3_600


async def test_lease_that_is_awaited_again_keeps_what_it_reserved() -> None:
    limiter = Limiter()
    with budget(usd=1) as capped:
        lease = await limiter.acquire(usd=0.5)
        for state in ("reserved", "spent"):
            with pytest.raises(RuntimeError, match="serves one call"):
                await lease
            assert (getattr(capped, state)["usd"], capped.left["usd"]) == (0.5, 0.5)
            lease.release()


@pytest.mark.parametrize("way", ["async", "blocking"])
async def test_nobody_is_asked_about_calls_that_are_made_to_answer(way: str) -> None:
    """An agent may decide, whose own calls the budget pays for."""
    limiter, asked = Limiter(), list[float]()

    def ask_blocking(error: BudgetExceeded) -> float:
        asked.append(error.cost)
        with contextlib.suppress(BudgetExceeded):
            limiter.acquire_sync(usd=5)
        return 2

    async def ask(error: BudgetExceeded) -> float:
        asked.append(error.cost)
        with contextlib.suppress(BudgetExceeded):
            await limiter.acquire(usd=5)
        return 2

    with budget(usd=1, on_exceeded=ask if way == "async" else ask_blocking) as capped:
        if way == "async":
            (await limiter.acquire(usd=2)).release()
        else:
            limiter.acquire_sync(usd=2).release()
    assert (asked, capped.spent) == ([2], {"usd": 2})


def test_cap_that_another_thread_has_raised_meanwhile_is_no_refusal() -> None:
    limiter, asked = Limiter(), threading.Barrier(2)

    def ask(error: BudgetExceeded) -> float:
        asked.wait(5)
        return error.cap + 4

    with budget(usd=1, on_exceeded=ask) as capped:
        copies = [contextvars.copy_context() for _ in range(2)]
    call = functools.partial(limiter.acquire_sync, usd=2)  # a lease that is dropped is over
    threads = [threading.Thread(target=copy.run, args=(call,)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (capped.cap, capped.spent) == ({"usd": 5}, {"usd": 4})


async def test_call_refused_while_another_thread_holds_the_lock_gives_its_slot_back() -> None:
    limiter = Limiter(concurrency=2)
    pacer = limiter._node.pacer

    def hold(is_held: threading.Event) -> None:
        with pacer:
            is_held.set()
            tick.wait(0.02)

    def refuse(_: BudgetExceeded) -> None:
        is_held = threading.Event()
        threading.Thread(target=hold, args=(is_held,)).start()
        is_held.wait()

    tick = threading.Event()
    with budget(usd=1, on_exceeded=refuse):
        async with limiter.acquire(usd=0.6):
            with pytest.raises(BudgetExceeded):
                await limiter.acquire(usd=0.6)
            assert limiter.statistics().in_flight == 1
