"""The face of a limiter: how calls ask, what they and the limiter tell."""

import asyncio
import copy
import pickle
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from asyncbucket import Cost, Limit, Limiter, TokenBucket, budget, pace
from asyncbucket.engine.statistics import LimitUse, Waits
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import HELD, cancel, start, used


async def test_acquire_can_be_awaited_or_entered(time: VirtualTime) -> None:
    limiter = Limiter("10 RPS burst 10", concurrency=2, clock=time.clock)
    kept = await limiter.acquire(tokens=5)
    async with limiter.acquire() as lease:
        assert limiter.statistics().in_flight == 2
        assert not lease.released
    assert lease.released
    async with kept as same:
        assert same is kept
    assert kept.released
    with limiter.acquire_nowait() as lease:
        assert not lease.released
    assert lease.released
    assert limiter.statistics().in_flight == 0


async def test_lease_takes_nothing_until_awaited_and_serves_one_call(time: VirtualTime) -> None:
    limiter = Limiter("10 RPS burst 10", clock=time.clock)
    asked = limiter.acquire()
    await asked.__aexit__(None, None, None)  # it was not entered
    assert limiter.statistics().admitted == 0
    lease = await asked
    for _ in "held", "over":
        with pytest.raises(RuntimeError, match=r"used already: call acquire\(\) for another"):
            await asked
        lease.release()
    async with limiter.acquire() as entered:
        with pytest.raises(RuntimeError, match="used already"):
            await entered.__aenter__()
    with pytest.raises(RuntimeError, match="used already"):
        await entered.__aenter__()
    assert limiter.statistics().admitted == 2
    limiter.pause(1)
    shared = limiter.acquire()
    first = await start(shared.__aenter__())
    with pytest.raises(RuntimeError, match="used already"):
        await shared
    assert (await first).waited == 1


async def test_acquisition_never_awaited_causes_warning(time: VirtualTime) -> None:
    """The warning names the caller's line; there is none once the limiter was used."""
    limiter = Limiter("5 RPM", clock=time.clock)
    for timeout in (None, 5.0):
        with pytest.warns(RuntimeWarning, match=r"never awaited.*`await limiter\.acquire") as told:
            limiter.acquire(timeout=timeout)
        assert told[0].filename == __file__
    acquisition = limiter.acquire()
    (await acquisition).release()
    del acquisition
    limiter.acquire()


async def test_lease_tells_what_it_waited_for_and_held_nothing_meanwhile(time: VirtualTime) -> None:
    limiter = Limiter("1 requests/2s", "100 TPM", concurrency=1, clock=time.clock)
    first = await limiter.acquire()
    assert (first.waited, first.bound_by) == (0.0, None)
    second = await start(limiter.acquire(tokens=7))
    await asyncio.sleep(5)
    assert used(limiter) == [0, 0]
    first.release()
    assert (await second).bound_by == "concurrency"
    (await second).release()
    for _ in range(2):
        third = await limiter.acquire()
        third.release()
        assert third.waited == pytest.approx(2 * HELD)
        assert third.bound_by == "requests"
    assert limiter.statistics().waits == {
        "concurrency": Waits(1, 5.0),
        "requests": Waits(2, pytest.approx(4 * HELD)),  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    }


async def test_cost_object_works_in_every_kind_of_acquire(time: VirtualTime) -> None:
    limiter = Limiter("10 images/s", "500 TPM", clock=time.clock)
    cost = Cost(tokens=100, images=2)
    assert limiter.acquire_nowait(cost).cost == cost
    assert limiter.acquire_sync(cost).cost == cost
    assert (await limiter.acquire(cost)).cost == cost
    assert used(limiter) == [6, 300]


async def test_statistics_are_frozen_snapshot(time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", concurrency=3, name="openai", clock=time.clock)
    lease = await limiter.acquire(tokens=60)
    waiting = await start(limiter.acquire(tokens=60))
    before = limiter.statistics()
    lease.settle(tokens=15)
    await waiting
    assert before.limits == (LimitUse(Limit("tokens", 100), used=60, available=40),)
    assert (before.admitted, before.waiting, before.in_flight) == (1, 1, 1)
    assert (before.name, before.concurrency, before.bound_by) == ("openai", 3, "tokens")
    after = limiter.statistics()
    assert after.refunded == {"tokens": 45}
    assert (after.admitted, after.waiting, after.in_flight) == (2, 0, 2)
    assert after.limits[0] == LimitUse(Limit("tokens", 100), used=75, available=25)


async def test_limiter_without_limits_clock_or_store_works() -> None:
    limiter = Limiter()
    for _ in range(100):
        limiter.acquire_nowait(tokens=10**9).release()
    await limiter.aclose()
    async with limiter.acquire(deadline=monotonic() + 5) as lease:
        assert lease.waited == 0
    assert limiter.statistics().admitted == 101


async def test_limiter_or_lease_entered_wrongly_is_refused_with_remedies() -> None:
    limiter = Limiter("5 RPM")
    with pytest.raises(TypeError, match=r"write `async with limiter\.acquire\(\):`"):
        async with limiter:
            pass  # pragma: no cover - never entered
    both = r"write `async with limiter\.acquire.*limiter\.acquire_sync"
    with pytest.raises(TypeError, match=both), limiter.acquire():
        pass  # pragma: no cover - never entered
    assert limiter.statistics().admitted == 0


async def test_repr_of_limiter_shows_name_limits_slots_and_waiting_calls(time: VirtualTime) -> None:
    clock = time.clock
    limiter = Limiter("14,400 RPD", "40k ITPM", concurrency=2, name="groq", clock=clock)
    held = [await limiter.acquire() for _ in range(2)]
    waiting = await start(limiter.acquire())
    assert repr(limiter) == (
        "<Limiter 'groq', 14,400 requests per 86,400 s, 40,000 input tokens per 60 s, "
        "concurrency 2/2, 1 waiting>"
    )
    cancel(waiting)
    del held
    assert repr(Limiter()) == "<Limiter 'default', 0 waiting>"
    child = Limiter("1 RPS", name="new", shadow=True).child("chat")
    assert repr(child) == "<Limiter 'new/chat' in shadow, 0 waiting>"


async def test_repr_of_lease_shows_state_cost_and_wait(time: VirtualTime) -> None:
    limiter = Limiter("1/s", clock=time.clock)
    await limiter.acquire()
    lease = limiter.acquire(tokens=5)
    assert repr(lease).startswith("<Lease asked ")
    with pytest.raises(RuntimeError, match="has not been admitted yet: await it, or enter it"):
        lease.settle(tokens=5)
    await lease
    cost = "Cost(requests=1, tokens=5, input_tokens=5, output_tokens=5)"
    assert repr(lease) == f"<Lease open {cost} waited=1.006 s bound_by=requests>"


def test_state_of_limiter_has_no_attributes_made_up_on_demand() -> None:
    node: Any = Limiter()._node
    with pytest.raises(AttributeError, match="limit_"):
        _ = node.limit_


def test_pace_wraps_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(limiter: Limiter, thing: str, **_: Any) -> Any:
        return thing, limiter.limits

    monkeypatch.setattr(Limiter, "wrap", wrap)
    paced: Any = pace("a model", rpm=60)
    assert paced == ("a model", (Limit("requests", 60),))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copy_is_the_same_object_and_none_is_pickled(copied: Callable[[Any], Any]) -> None:
    limiter = Limiter("60 RPM", concurrency=1)
    lease = limiter.acquire_nowait()
    each = [limiter, limiter.child("chat"), TokenBucket(1.0), budget(usd=1), lease]
    assert [*map(id, copied({"all": each})["all"])] == [*map(id, each)]
    while each:
        with pytest.raises(
            TypeError, match=r"belongs to its process .* share limits by store=\.\.\."
        ):
            pickle.dumps(each.pop())
    assert limiter.statistics().in_flight == 1
    copied(lease).release()
    assert limiter.statistics().in_flight == 0
