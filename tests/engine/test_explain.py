"""`explain` tells which limit binds, for how long, and what would have to change."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asyncbucket
from asyncbucket import Cost, CostExceedsLimit, Limiter
from asyncbucket.testing import VirtualTime, virtual_time
from tests.engine.conftest import HELD, cancel, start, start_all


async def test_explanation_names_what_binds_now_and_in_the_long_run(time: VirtualTime) -> None:
    limiter = Limiter("500 RPM burst 500", "200k TPM", clock=time.clock)
    in_the_long_run = (
        "; tokens allow 200 such calls a minute (200,000 tokens per 60 s); without that limit, "
        "requests would allow 500 a minute (500 requests per 60 s)"
    )
    assert str(limiter.explain(tokens=1_000)) == "a call would pass at once" + in_the_long_run
    await limiter.acquire(tokens=200_000)
    calls = await start_all(limiter.acquire(tokens=1_000) for _ in range(40))
    await asyncio.sleep(48)
    said = str(limiter.explain(tokens=1_000))
    assert said == "a call would wait 12.4 s behind 40 calls: tokens bind" + in_the_long_run
    with pytest.raises(CostExceedsLimit, match="200,001 tokens exceeds the limit of 200,000 tok"):
        limiter.explain(tokens=200_001)
    cancel(*calls)


def test_explanation_has_cost_and_rate_of_limits_tightest_first(time: VirtualTime) -> None:
    key = Limiter("100 RPD", "60k TPM", name="key", clock=time.clock)
    said = key.child("chat", "30 RPM").explain(input_tokens=50, output_tokens=100)
    assert said.cost == Cost(input_tokens=50, output_tokens=100)
    assert [(rate.limiter, rate.limit.resource, rate.calls) for rate in said.rates] == [
        ("key", "requests", pytest.approx(100 / 86_400)),
        ("key/chat", "requests", 0.5),
        ("key", "tokens", pytest.approx(60_000 / 150 / 60)),
    ]
    assert (said.wait, said.bound_by, said.ahead) == (0.0, None, 0)
    assert str(said) == (
        "a call would pass at once; requests allow 100 such calls a day (key: 100 requests per "
        "86,400 s); without that limit, requests would allow 43,200 a day (key/chat: 30 "
        "requests per 60 s, burst 3)"
    )


async def test_explanation_gives_no_time_when_slots_bind(time: VirtualTime) -> None:
    limiter = Limiter(concurrency=1, clock=time.clock)
    held = await limiter.acquire()
    assert str(limiter.explain()) == (
        "a call would wait until a slot is given back; no limit over time binds such calls"
    )
    waiting = await start(limiter.acquire())
    said = limiter.explain()
    assert str(said).startswith("a call would wait behind 1 call until a slot is given back")
    assert (said.wait, said.bound_by, said.ahead) == (None, "concurrency", 1)
    held.release()
    (await waiting).release()
    assert limiter.explain().wait == 0


async def test_explanation_names_what_most_of_the_wait_is_for(time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", clock=time.clock)
    await limiter.acquire()
    calls = await start_all(limiter.acquire() for _ in range(3))
    limiter.pause(30)
    said = limiter.explain()
    assert (said.wait, said.bound_by, said.ahead) == (33.0, "paused", 3)
    assert str(said).startswith("a call would wait 33 s behind 3 calls: the limiter is paused; ")
    cancel(*calls)


costs = st.lists(st.integers(1, 60), min_size=1, max_size=25)


@pytest.mark.heavy
@settings(deadline=None, max_examples=100)
@given(costs, st.integers(1, 60), st.floats(0, 70))
def test_explained_wait_in_line_is_exact(ahead: list[int], tokens: int, pause: float) -> None:

    async def main(time: VirtualTime) -> None:
        limiter = Limiter("60 TPM burst 20", "12 RPM burst 3", clock=time.clock)
        calls = [asyncio.ensure_future(limiter.acquire(tokens=each)) for each in ahead]
        await asyncio.sleep(pause)
        await time.all_blocked()
        said = limiter.explain(tokens=tokens)
        assert said.ahead == limiter.statistics().waiting
        lease = await limiter.acquire(tokens=tokens)
        assert said.wait == pytest.approx(lease.waited, abs=2e-9)
        assert (said.bound_by is None) == (lease.waited == 0)
        await asyncio.gather(*calls)

    with virtual_time() as time:
        time.run(main(time))


async def test_explained_wait_of_idle_child_is_upper_bound(time: VirtualTime) -> None:
    key = Limiter("60 RPM burst 1", clock=time.clock)
    poor, rich, third = key.child("poor", rpm=1), key.child("rich"), key.child("third")
    await poor.acquire()
    calls = [asyncio.ensure_future(poor.acquire()) for _ in range(5)]
    await asyncio.sleep(2)
    assert rich.explain().wait == 0
    assert rich.explain().bound_by is None
    assert poor.explain().wait == pytest.approx(6 * 60 * HELD - 2)
    calls += [asyncio.ensure_future(rich.acquire()) for _ in range(20)]
    await time.all_blocked()
    said = third.explain()
    assert said.wait is not None
    lease = await third.acquire()
    assert lease.waited <= said.wait + 1e-9
    assert said.wait <= 21
    cancel(*calls)


async def test_explanation_does_not_count_calls_that_go_later(time: VirtualTime) -> None:
    key = Limiter("10 RPS burst 1", clock=time.clock)
    calls = await start_all(key.acquire(priority="batch") for _ in range(100))
    calls += await start_all(key.acquire() for _ in range(10))
    poor = key.child("poor", rpm=1)
    calls += await start_all(poor.acquire() for _ in range(50))
    await asyncio.sleep(0.35)
    assert key.explain().ahead == pytest.approx(10, abs=4)
    with asyncbucket.priority("batch"):
        said = key.explain()
    assert said.ahead > 100
    assert said.wait == pytest.approx(11, abs=1)
    with asyncbucket.tenant("acme"), asyncbucket.priority("interactive"):
        assert key.explain().ahead == 0
    cancel(*calls)


async def test_explain_counts_call_above_burst_that_earned_its_turn(time: VirtualTime) -> None:
    key = Limiter("100 tokens/100s", clock=time.clock)
    key.acquire_nowait(tokens=90).release()
    costly = asyncio.ensure_future(key.child("a", "20 tokens/20s burst 5").acquire(tokens=15))
    await asyncio.sleep(9)
    assert key.child("b").explain(tokens=86).ahead == 0
    await asyncio.sleep(1)
    explanation = key.child("b").explain(tokens=86)
    assert (explanation.ahead, explanation.bound_by) == (1, "tokens")
    assert explanation.wait == pytest.approx(2 * 100 * HELD - 10)
    await costly
    await key.child("b").acquire(tokens=86)
    assert time.now == 2 * 100 * HELD


@pytest.mark.parametrize(
    ("limit", "cost", "says"),
    [
        ("1000 tokens/s", Cost(tokens=100), "tokens allow 10 such calls a second"),
        ("6 traffic/s", Cost(requests=0, traffic=3), "traffic allows 2 such calls a second"),
        ("100 ITPM", Cost(input_tokens=100), "input tokens allow 1 such call a minute (100 input"),
    ],
)
def test_explain_spells_names_and_numbers_as_people_do(limit: str, cost: Cost, says: str) -> None:
    assert says in str(Limiter(limit).explain(cost))


async def test_explained_wait_counts_no_slots_given_back_meanwhile(time: VirtualTime) -> None:
    """A line longer than the slots does not make slots bind while they are all free."""
    limiter = Limiter("500 RPM", "200k TPM", concurrency=20, clock=time.clock)

    async def call() -> None:
        async with limiter.acquire(tokens=2_000):
            await asyncio.sleep(0.5)

    calls = [asyncio.create_task(call()) for _ in range(200)]
    await asyncio.sleep(30)
    said = limiter.explain(tokens=2_000)
    assert (said.bound_by, said.ahead) == ("tokens", 100)
    lease = await limiter.acquire(tokens=2_000)
    assert said.wait == pytest.approx(lease.waited, abs=1.0) == pytest.approx(90.7, abs=1.0)
    await asyncio.gather(*calls)


async def test_calls_ahead_count_only_at_limits_of_what_they_cost(time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", "100 TPM", clock=time.clock)
    calls = await start_all(limiter.acquire() for _ in range(3))
    explanation = limiter.explain(tokens=100)
    assert (explanation.wait, explanation.bound_by) == (3.0, "requests")
    cancel(*calls)
