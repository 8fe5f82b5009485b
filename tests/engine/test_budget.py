"""Budgets: what calls inside may spend together is capped, whoever admits them."""

import asyncio
import contextlib
import contextvars
import gc
import pathlib
import pickle
import random
import threading
from collections.abc import Mapping
from typing import Any

import pytest

import asyncbucket
from asyncbucket import (
    AsyncBucketError,
    BudgetExceeded,
    Cost,
    Limiter,
    Pool,
    QueueFull,
    WouldBlock,
    budget,
)
from asyncbucket.budgets import _warn_of_no_call, _warn_of_unnamed_cost
from asyncbucket.engine.context import inherited
from asyncbucket.engine.events import Refused, Released
from asyncbucket.engine.interfaces import Account
from asyncbucket.engine.meters import Amounts
from asyncbucket.levels import is_learning, meet_provider, reserve_more
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import cancel, start, used


def in_micro_dollars(amounts: Mapping[str, float]) -> int:
    return round(amounts["usd"] * 1_000_000)


async def test_call_that_would_pass_the_budget_is_refused_with_numbers_and_remedy() -> None:
    limiter = Limiter(concurrency=5)
    with budget(usd=2.00, requests=100) as capped:
        async with limiter.acquire(usd=1.25) as lease:
            sums = [each["usd"] for each in (capped.reserved, capped.spent, capped.left)]
            assert sums == [1.25, 0, 0.75]
            with pytest.raises(BudgetExceeded) as error:
                await limiter.acquire(usd=0.80)
            lease.settle(usd=1)
        assert repr(capped) == "<Budget of 2 USD (1.0 spent), 100 requests (1 spent)>"
        assert capped.spent == {"usd": 1, "requests": 1}
        assert capped.left == {"usd": 1, "requests": 99}
    found = error.value
    assert str(found) == (
        "this call may cost 0.80 USD, but the budget of 2 USD has only 0.75 USD left (0 USD spent, "
        "1.25 USD reserved by calls in flight); finish with what you have, make a cheaper call, or "
        "ask for a larger budget"
    )
    assert (found.budget, found.resource) == (capped, "usd")
    assert (found.cap, found.spent, found.reserved, found.cost) == (2.0, 0, 1.25, 0.8)
    sent: BudgetExceeded = pickle.loads(pickle.dumps(found))  # noqa: S301 - by a worker process
    assert (str(sent), vars(sent)) == (str(found), {**vars(found), "budget": None})
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
            lease.settle(tokens=tokens)

    scope = asyncbucket.agent("a") if way == "agent" else contextlib.nullcontext()
    limiters = [Limiter("60k TPM"), Pool(Limiter("600 RPM", name="a")), Limiter().child("tools")]
    with budget(tokens=1_000) as capped, scope:
        for limiter in limiters:
            await call(limiter, 300)
        for limiter in limiters:
            with pytest.raises(BudgetExceeded, match=r"cost 300 tokens, .* only 100 tokens"):
                await call(limiter, 300)
        await call(limiters[1], 100)
        assert (capped.spent, capped.left) == ({"tokens": 1_000}, {"tokens": 0})
    assert [each.statistics().refused for each in limiters] == [1, 1, 1]
    assert [each.statistics().in_flight for each in limiters] == [0, 0, 0]
    await call(limiters[0], 300)


async def test_nested_budgets_all_hold_and_tasks_inherit_them() -> None:
    limiter = Limiter()

    async def one() -> None:
        (await limiter.acquire(usd=0.4)).release()

    with budget(usd=1) as outer:
        with budget(usd=10) as wide, budget(usd=0.5, tokens=5) as inner:
            await asyncio.create_task(one())
            with pytest.raises(BudgetExceeded, match=r"budget of 0\.50 USD"):
                await asyncio.create_task(one())
        for part in budget(input_tokens=8), budget(output_tokens=8):
            with part, pytest.raises(BudgetExceeded, match=r"budget of 8 (in|out)put"):
                await limiter.acquire(input_tokens=9, output_tokens=9)
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
        second = await start(limiter.acquire(usd=0.6, tokens=5_000))
        third = Limiter().acquire_nowait(usd=0.4)  # while the second waits
        third.settle(usd=0.8)
        first.settle(usd=0.1)
        first.release()
        with pytest.raises(BudgetExceeded, match=r"0\.80 USD reserved by calls in flight"):
            await second
        assert (used(limiter), limiter.statistics().in_flight) == ([100, 1], 0)
        assert in_micro_dollars(capped.reserved) == 800_000
    assert [type(event) for event in events[-2:]] == [Released, Refused]
    assert events[-1].reason == "budget"


@pytest.mark.parametrize("when", ["queue_full", "timeout", "cancelled", "would_block", "dropped"])
async def test_what_was_reserved_comes_back_exactly_once(time: VirtualTime, when: str) -> None:
    bound = 0 if when == "queue_full" else None
    limiter = Limiter(concurrency=1, max_queue=bound, clock=time.clock)
    with budget(usd=1.0, requests=50) as capped:
        held = limiter.acquire_nowait(usd=0.3)
        if when == "would_block":
            with pytest.raises(WouldBlock):
                limiter.acquire_nowait(usd=0.3)
        elif when in {"queue_full", "timeout"}:
            with pytest.raises((QueueFull, TimeoutError)):
                await limiter.acquire(usd=0.3, timeout=1)
        else:
            task = await start(limiter.acquire(usd=0.3))
            if when == "dropped":  # it has its admission, but has not run since
                held.release()
            cancel(task)
            with contextlib.suppress(asyncio.CancelledError):
                await task
        held.release()
        assert in_micro_dollars(capped.spent) == 300_000
        assert (capped.reserved, capped.left["usd"]) == ({"usd": 0, "requests": 0}, 0.7)


async def test_late_and_repeated_settlements_and_dropped_leases_count_once() -> None:
    limiter = Limiter()
    with budget(usd=1.0) as capped:
        lease = await limiter.acquire(usd=0.5)
        lease.settle(usd=0.2)
        lease.settle(usd=0.3)
        with pytest.raises(RuntimeError, match="serves one call"):
            await lease
        assert (capped.reserved["usd"], capped.left["usd"]) == (0.3, 0.7)
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
    with budget(usd=0.3, on_exceeded=lambda _: 2.0) as raised:
        async with limiter.acquire(usd=0.2) as lease:
            await reserve_more(lease, {"usd": 0.2}, blocking=False)
            assert (raised.reserved["usd"], raised.cap["usd"]) == (0.4, 2.0)


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
    """Calls use at most what they reserved, wait, are cancelled, and time out."""
    rng = random.Random(7)
    limiters = [
        Limiter("60 RPM", concurrency=5, clock=time.clock),
        Limiter(concurrency=3, max_queue=5, clock=time.clock),
    ]
    capped, used = budget(usd=1.0), list[int]()

    async def one() -> None:
        reserved = rng.randrange(1_000, 60_000)
        await asyncio.sleep(rng.uniform(0, 60))
        timeout = rng.choice([None, 5])
        with contextlib.suppress(BudgetExceeded, QueueFull, TimeoutError):
            async with rng.choice(limiters).acquire(usd=reserved / 1e6, timeout=timeout) as lease:
                await asyncio.sleep(rng.uniform(0, 3))
                used.append(rng.randrange(reserved))
                lease.settle(usd=used[-1] / 1e6)
        assert sum(in_micro_dollars(each) for each in (capped.spent, capped.reserved)) <= 1_000_000

    with capped:
        tasks = [asyncio.create_task(one()) for _ in range(200)]
        for task in rng.sample(tasks, 30):
            asyncio.get_running_loop().call_later(rng.uniform(0, 60), task.cancel)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in ended} == {type(None), asyncio.CancelledError}
    assert capped.reserved["usd"] == 0
    # A call that is cancelled in flight may have been made: it has spent what it reserved.
    assert 900_000 < sum(used) <= in_micro_dollars(capped.spent) <= 1_000_000


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
    assert (len(passed), shared.left["usd"], shared.calls) == (500, 0, 800)


def test_block_without_a_call_warns_once_unless_it_fails() -> None:
    _warn_of_no_call.cache_clear()
    with pytest.raises(KeyError), budget(usd=1):
        raise KeyError
    unseen = budget(usd=1)
    with pytest.warns(RuntimeWarning, match="without counting a call: it counts calls"), unseen:
        pass
    with budget(usd=1):
        pass
    assert unseen.calls == 0


@pytest.mark.parametrize("settled", [False, True])
async def test_block_of_calls_without_cost_warns_once(time: VirtualTime, *, settled: bool) -> None:
    _warn_of_unnamed_cost.cache_clear()
    limiter = Limiter("60 RPM", clock=time.clock)
    warned = pytest.warns(RuntimeWarning, match=r"budget of usd has .* any: .* acquire\(usd=")
    for told in (contextlib.nullcontext() if settled else warned, contextlib.nullcontext()):
        with told, budget(usd=1, requests=9):
            async with limiter.acquire(tokens=10) as lease:
                lease.settle(usd=0.5) if settled else lease.settle(tokens=10)


async def asked_later(_: BudgetExceeded) -> float:
    await asyncio.sleep(1)
    return 2.0


def asked_now(_: BudgetExceeded) -> float:
    return 2.0


def asked_in_vain(_: BudgetExceeded) -> Any:
    return "yes"


@pytest.mark.parametrize("ask", [asked_now, asked_later])
async def test_on_exceeded_may_raise_the_cap_and_is_asked_once(time: VirtualTime, ask: Any) -> None:
    """Also at the first call of an agent, which pays for all of its calls."""
    questions: list[str] = []

    def counted(error: BudgetExceeded) -> Any:
        questions.append(str(error))
        return ask(error)

    limiter = Limiter(concurrency=10, clock=time.clock)

    async def one() -> None:
        async with limiter.acquire(usd=0.2) as lease:
            await asyncio.sleep(1)
            lease.settle(requests=2)

    with budget(usd=0.1, on_exceeded=counted) as capped, asyncbucket.agent("a"):
        await asyncio.gather(*(one() for _ in range(8)))
        agents = limiter.statistics().agents
        assert agents is not None
        assert agents.running == 1
        assert (len(questions), dict(capped.cap)) == (1, {"usd": 2.0})
        refused = limiter.acquire(usd=0.5)
        with pytest.raises(BudgetExceeded, match="budget of 2 USD"):  # asked, and not raised
            await refused
        refused.settle(usd=0)  # in a `finally` block, say
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
    refused = pytest.raises(TypeError, match="plain function")
    with budget(requests=0, on_exceeded=asked_later), refused:
        limiter.acquire_sync()
    refused = pytest.raises(TypeError, match=r"new cap, such as 5.0, or None, not 'yes'")
    with budget(requests=0, on_exceeded=asked_in_vain), refused:
        limiter.acquire_sync()
    with budget(requests=0, on_exceeded=lambda _: None), pytest.raises(BudgetExceeded):
        limiter.acquire_sync()
    asked = budget(requests=0, on_exceeded=lambda error: error.cap > 9 and 5.0)
    with asked, pytest.raises(BudgetExceeded):
        limiter.acquire_sync()


@pytest.mark.parametrize("fails", [False, True])
async def test_failed_on_exceeded_leaves_nothing_behind(time: VirtualTime, *, fails: bool) -> None:
    limiter = Limiter(concurrency=3, clock=time.clock)

    async def ask(_: BudgetExceeded) -> None:
        await asyncio.sleep(2 if fails else 1e9)
        raise OSError("nobody can be asked")

    with budget(usd=0.5, on_exceeded=ask) as capped:
        held = await limiter.acquire(usd=0.4)
        asking = [asyncio.ensure_future(limiter.acquire(usd=0.4)) for _ in range(2)]
        await asyncio.sleep(1)
        assert limiter.statistics().in_flight == 1  # they hold no slot while they ask
        cancel(*([] if fails else asking))
        ended = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(each) for each in ended} == {OSError if fails else asyncio.CancelledError}
        held.release()
    assert (limiter.statistics().in_flight, in_micro_dollars(capped.spent)) == (0, 400_000)


async def test_on_exceeded_may_ask_under_the_same_limiter(time: VirtualTime) -> None:
    """The call that asks holds no slot meanwhile, waits again, and counts as admitted once."""
    limiter = Limiter("60 RPM", concurrency=1, clock=time.clock)

    async def ask(error: BudgetExceeded) -> float:
        async with limiter.acquire():  # a model decides
            await asyncio.sleep(3)
        return error.cap + 1

    with budget(usd=0.5, on_exceeded=ask) as capped:
        async with limiter.acquire(usd=0.4):
            asking = await start(limiter.acquire(usd=0.4))
            await asyncio.sleep(1)
        async with asyncio.timeout(10):
            lease = await asking
        assert limiter.statistics().in_flight == 1
        assert in_micro_dollars(capped.reserved) == 400_000
        lease.release()
    assert (limiter.statistics().admitted, limiter.statistics().in_flight) == (3, 0)


def test_dollars_are_given_and_shown_in_dollars_and_counted_in_micro_dollars() -> None:
    assert (Cost(usd=4.03)["usd"], Cost(usd=0.000_000_1)["usd"]) == (4_030_000, 1)
    assert repr(Cost(usd=0.5, requests=2)) == "Cost(requests=2, usd=0.5)"
    limiter = Limiter("2 USD/hour")
    limiter.acquire_nowait(usd=1.999).release()
    used = limiter.statistics().limits[0]
    assert (used.used, used.available) == (1_999_000, 1_000)
    assert "1.999 of 2 USD per 3,600 s used" in str(limiter.statistics())
    with pytest.raises(WouldBlock, match=r"a call of 0.50 USD cannot .*: USD binds"):
        limiter.acquire_nowait(usd=0.5)


async def test_nobody_is_asked_about_calls_that_are_made_to_answer() -> None:
    """An agent may decide, whose own calls the budget pays for."""
    limiter, asked = Limiter(), list[float]()

    async def ask(error: BudgetExceeded) -> float:
        asked.append(error.cost)
        with contextlib.suppress(BudgetExceeded):
            await limiter.acquire(usd=5)
        return 2

    with budget(usd=1, on_exceeded=ask) as capped:
        (await limiter.acquire(usd=2)).release()
    assert (asked, capped.spent) == ([2], {"usd": 2})


async def test_limits_in_a_store_learn_nothing_of_their_provider(tmp_path: pathlib.Path) -> None:
    limiter = Limiter("10 RPM", store=f"sqlite:///{tmp_path}/limits.db", name="openai")
    meet_provider(limiter)
    assert not is_learning(limiter)
    await limiter.aclose()


# --- whatever account a call has may refuse it, before it waits and when it has passed ---


class Refusing(Account):
    """Refuse calls from the n-th question on."""

    def __init__(self, after: int) -> None:
        self.after = after

    def refuses(self, amounts: Amounts) -> AsyncBucketError | None:  # noqa: ARG002 - all alike
        self.after -= 1
        return AsyncBucketError("refused here") if self.after < 0 else None


@pytest.mark.parametrize("after", [0, 1])
async def test_account_that_refuses_is_asked_once_and_nothing_is_kept(after: int) -> None:
    limiter = Limiter("10 RPM", concurrency=1)
    lease: Any = limiter.acquire()
    lease.accounts = (Refusing(after),)
    with pytest.raises(AsyncBucketError, match="refused here"):
        await lease
    now = limiter.statistics()
    assert (now.in_flight, now.limits[0].used) == (0, 0)


async def test_nowait_gives_back_what_an_account_refuses_after_the_admission() -> None:
    limiter = Limiter("10 RPM", concurrency=1)
    lease: Any = limiter.acquire()
    lease.accounts = (Refusing(1),)
    with pytest.raises(AsyncBucketError, match="refused here"):
        lease._take_now()
    assert limiter.statistics().in_flight == 0
    limiter.acquire_nowait().release()
