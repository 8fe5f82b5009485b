"""Limits change while calls wait."""

import asyncio

import pytest

from asyncbucket import CostExceedsLimit, Limit, Limiter, LimitSyntaxError, WouldBlock
from asyncbucket.levels import terms_of
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import start, start_all, used


@pytest.mark.parametrize("how", ["once", "twice", "cancelled", "at its deadline"])
async def test_lowered_limit_fails_waiting_call_above_it(time: VirtualTime, how: str) -> None:
    limiter = Limiter("100 TPM", clock=time.clock)
    first = await limiter.acquire(tokens=100)
    costly = await start(limiter.acquire(tokens=80, timeout=70))
    cheap = await start(limiter.acquire(tokens=50))
    if how == "at its deadline":
        limiter.pause(100)
        asyncio.get_running_loop().call_at(70, lambda: limiter.reconfigure(tpm=60))
        await asyncio.sleep(70)
    else:
        limiter.reconfigure(tpm=60)
    if how == "twice":
        limiter.reconfigure(tpm=50)
        limiter.pause(0)
    gone = how == "cancelled"
    if gone:
        costly.cancel()
    never = r"cost of 80 tokens exceeds .*60 tokens per 60 s.* and can never pass; raise"
    with pytest.raises((CostExceedsLimit, asyncio.CancelledError), match=None if gone else never):
        await costly
    now = limiter.statistics()
    assert (now.refused, now.cancelled) == (1 - gone, gone)
    first.settle(tokens=0)
    before = time.now
    await cheap
    assert time.now == (100 if how == "at its deadline" else before)


@pytest.mark.parametrize("level", range(3))
async def test_raised_limit_admits_waiting_call_at_once(time: VirtualTime, level: int) -> None:
    key = Limiter(clock=time.clock)
    chat = key.child("chat")
    agent = chat.child("agent")
    changed = (key, chat, agent)[level]
    changed.reconfigure("10 TPM")
    agent.acquire_nowait(tokens=10)
    waiting = await start(agent.acquire(tokens=10))
    await asyncio.sleep(1)
    changed.reconfigure("20 TPM")
    assert (await waiting).waited == 1


async def test_newly_set_slots_count_calls_in_flight(time: VirtualTime) -> None:
    limiter = Limiter(clock=time.clock)
    child = limiter.child("child")
    early = [await each.acquire(tokens=10) for each in (limiter, child, child)]
    assert limiter.concurrency is None
    child.reconfigure(concurrency=1)
    limiter.reconfigure("2/s burst 1", concurrency=2)
    waiting = await start(limiter.acquire())
    for in_flight in (3, 2):
        await time.all_blocked()
        assert not waiting.done()
        shown = f"<Limiter 'default', 2 requests per 1 s, concurrency {in_flight}/2, 1 waiting>"
        assert repr(limiter) == shown
        early.pop().release()
    (await waiting).release()
    (await child.acquire()).release()
    early[0].release()
    assert [each.statistics().in_flight for each in (limiter, child)] == [0, 0]


async def test_newly_set_slots_count_calls_just_admitted(time: VirtualTime) -> None:
    limiter = Limiter(clock=time.clock)
    child = limiter.child("child")
    limiter.pause(1)
    waiting = await start_all(child.acquire() for _ in range(3))
    time.advance(1)
    limiter.pause(0)  # look
    await asyncio.sleep(0)
    assert not any(call.done() for call in waiting)
    assert (limiter.statistics().in_flight, limiter.statistics().waiting) == (3, 0)
    limiter.reconfigure(concurrency=2)
    leases = await asyncio.gather(*waiting)
    leases.pop().release()
    with pytest.raises(WouldBlock, match="all 2 slots are taken"):
        child.acquire_nowait()
    leases.pop().release()
    child.acquire_nowait().release()
    leases.pop().release()
    assert limiter.statistics().in_flight == 0


def test_invalid_reconfigure_changes_nothing(time: VirtualTime) -> None:
    limiter = Limiter("60 RPM", concurrency=2, clock=time.clock)
    with pytest.raises(LimitSyntaxError):
        limiter.reconfigure("30 RPM", "nonsense")
    child = limiter.child("child", weight=2)
    for each in (limiter, child):
        with pytest.raises(ValueError, match="concurrency must be a whole number"):
            each.reconfigure("30 RPM", weight=9 if each is child else None, concurrency=0)
    assert terms_of(child)["weight"] == 2
    assert limiter.limits == (Limit("requests", 60),)
    assert limiter.concurrency == 2


@pytest.mark.parametrize("how", ["reconfigure", "learn"])
@pytest.mark.parametrize("pause", [0, 1])
def test_earlier_call_gives_new_limit_nothing_back(time: VirtualTime, how: str, pause: int) -> None:
    key = Limiter(clock=time.clock)
    early = key.child("child").acquire_nowait(tokens=40)
    time.advance(pause)
    if how == "learn":
        key.learn(Limit("tokens", 100))
    else:
        key.reconfigure("100 TPM")
    time.advance(1)
    late = key.acquire_nowait(tokens=50)
    early.settle(tokens=0)
    assert used(key) == [50]
    early.settle(tokens=30)
    assert used(key) == [80]
    late._undo()
    assert used(key) == [30]
