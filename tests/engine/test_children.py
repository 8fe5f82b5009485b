"""Trees of limiters: every level is kept, and a call waits only for what it passes."""

import asyncio

import pytest

from asyncbucket import Limit, Limiter, WouldBlock
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import HELD, all_blocked, cancel, start, start_all


async def test_child_at_its_limit_holds_up_neither_sibling_nor_parent(time: VirtualTime) -> None:
    key = Limiter("600 RPM", name="key", clock=time.clock)
    poor, rich = key.child("poor", rpm=1), key.child("rich")
    await poor.acquire()
    queue = await start_all(poor.acquire() for _ in range(50))
    rich.acquire_nowait()
    key.acquire_nowait()
    assert (await rich.acquire(timeout=0)).waited == 0
    with pytest.raises(WouldBlock) as error:
        poor.acquire_nowait()
    assert error.value.bound_by == "requests"
    assert time.now == 0
    assert [each.statistics().waiting for each in (key, poor, rich)] == [50, 50, 0]
    cancel(*queue)


async def test_limiter_names_what_binds_below_if_its_own_bind_nobody(time: VirtualTime) -> None:
    key = Limiter(concurrency=1, clock=time.clock)
    poor = key.child("poor", rpm=1)
    held, *queue = await start_all(poor.acquire() for _ in range(2)), key.acquire()
    waiting = await start_all(queue)
    assert key.statistics().bound_by == "concurrency"
    (await held[0]).release()
    (await waiting[0]).release()
    await asyncio.sleep(1)
    assert key.statistics().bound_by == "requests"
    cancel(*held)


async def test_call_behind_cousin_is_bound_by_same_resource(time: VirtualTime) -> None:
    key = Limiter("1000 RPS burst 1000", clock=time.clock)
    team = key.child("team", "10 tokens/10s")
    team.acquire_nowait(tokens=10).release()
    agent, other = team.child("agent"), team.child("other")
    costly, *free = await start_all([agent.acquire(tokens=5), team.acquire(), other.acquire()])
    for each in (key, team, agent, other):
        assert each.statistics().bound_by == "tokens"
    assert key.child("idle").statistics().bound_by is None
    for lease in await asyncio.gather(costly, *free):
        assert (lease.waited, lease.bound_by) == (10 * HELD, "tokens")
    assert team.statistics().waits["tokens"].count == 3


async def test_limiter_says_what_binds_its_own_calls_first(time: VirtualTime) -> None:
    team = Limiter(clock=time.clock).child("team", "10 tokens/10s")
    below = [team.child(str(number), rpm=1) for number in range(9)]
    for each in (team, *below):
        each.acquire_nowait(tokens=10 if each is team else 0)
    calls = await start_all(each.acquire() for each in below)
    calls += [await start(team.acquire(tokens=5))]
    said = [each.statistics().bound_by for each in (team, *below)]
    assert said == ["tokens", *["requests"] * 9]
    cancel(*calls)


@pytest.mark.parametrize("level", ["root", "middle"])
async def test_newcomer_does_not_pass_waiting_cousin(time: VirtualTime, level: str) -> None:
    root = Limiter("100 TPM" if level == "root" else "1M TPM", clock=time.clock)
    key = root if level == "root" else root.child("key", "100 TPM")
    await key.acquire(tokens=50)
    costly = await start(key.child("a").acquire(tokens=90))
    for cousin in (key, key.child("b"), key.child("own", "10 TPM").child("c")):
        with pytest.raises(WouldBlock):
            cousin.acquire_nowait(tokens=1)
    if level == "middle":
        root.acquire_nowait(tokens=1)
    await asyncio.sleep(1)
    cheap = await start(key.child("own").child("c").acquire(tokens=5))
    assert not cheap.done()
    await costly
    await cheap


async def test_calls_of_child_count_in_statistics_of_every_level_above(time: VirtualTime) -> None:
    key = Limiter("100 TPM", concurrency=3, name="key", clock=time.clock)
    child, other = key.child("child", concurrency=2), key.child("other")
    leases = [await child.acquire(tokens=20), await child.acquire(tokens=20)]
    waiting = await start(child.acquire(tokens=20))
    with pytest.raises(WouldBlock):
        child.acquire_nowait(tokens=20)
    for limiter in (child, key):
        now = limiter.statistics()
        assert (now.admitted, now.in_flight, now.waiting, now.refused) == (2, 2, 1, 1)
    leases[0].settle(requests=0, tokens=5)
    waiting.cancel()
    await all_blocked()
    child.pause(1, reason="429")
    for limiter in (child, key):
        now = limiter.statistics()
        assert (now.waiting, now.cancelled, now.upstream_429) == (0, 1, 1)
        assert now.refunded == {"requests": 1, "tokens": 15}
    for lease in leases:
        lease.release()
    assert [each.statistics().in_flight for each in (key, child, other)] == [0, 0, 0]
    assert (other.statistics().admitted, other.statistics().refused) == (0, 0)


def test_child_is_made_once(time: VirtualTime) -> None:
    """The same name, alone or with the same terms, returns it; other terms are an error."""
    key = Limiter("100 RPM", name="key", clock=time.clock)
    child = key.child("child", rpm=10, weight=2)
    assert key.child("child") is child
    assert key.child("child", "10 RPM", weight=2.0) is child
    with pytest.raises(
        ValueError, match="'key/child' already exists on other terms: get it by name"
    ):
        key.child("child", rpm=20)
    assert (child.parent, key.parent) == (key, None)
    assert (dict(key.children), dict(child.children)) == ({"child": child}, {})
    assert child.name == "key/child"
    assert child.limits == (Limit("requests", 10),)
    for name in key.children:  # more can be added meanwhile
        key.child(f"{name}b")
    assert list(key.children) == ["child", "childb"]


@pytest.mark.parametrize("by", ["units", "debt"])
async def test_costly_call_held_up_by_its_own_limit_is_not_next(time: VirtualTime, by: str) -> None:
    """The cheap one behind it passes as soon as the level above has room."""
    model = Limiter(clock=time.clock).child("model", Limit("tokens", 300, burst=60))
    tenant = model.child("tenant", tpm=40)
    lease = await tenant.acquire(tokens=1)
    await model.acquire(tokens=59)
    costly = await start(tenant.acquire(tokens=37))
    cheap = await start(model.acquire(tokens=3))
    if by == "units":
        await tenant.acquire(tokens=10, priority=-1)
        assert time.now == 2
    else:
        await asyncio.sleep(1)
        lease.settle(tokens=10)
    await cheap
    assert time.now == pytest.approx(2.6 if by == "units" else 2.4)
    await costly
    assert time.now > 60
