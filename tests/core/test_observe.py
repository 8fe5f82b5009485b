"""What observers of a limiter get, tested with real calls."""

import asyncio
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, Limit, Limiter, QueueFull, WouldBlock
from asyncbucket.core.events import (
    Admitted,
    Cancelled,
    Event,
    LimitChanged,
    LimitLearned,
    Paused,
    Queued,
    Refused,
    Released,
    Retried,
    Settled,
)
from asyncbucket.core.levels import emit
from asyncbucket.testing import VirtualTime


async def test_events_of_call_come_in_order(virtual_time: VirtualTime) -> None:
    heard: list[Event] = []
    limiter = Limiter("60 RPM burst 1", "1k TPM", name="openai", clock=virtual_time.clock)
    limiter.observe(heard.append)
    (await limiter.acquire(tokens=10)).release()
    async with limiter.acquire(tokens=100) as lease:
        lease.settle(tokens=40)
        lease.settle(tokens=50)
        await asyncio.sleep(2)
    cost = {"requests": 1, "tokens": 100, "input_tokens": 100, "output_tokens": 100}
    assert heard[2:] == [
        Queued(limiter="openai", at=0.0, cost=cost, waiting=1),
        Admitted(
            limiter="openai",
            at=1.0,
            cost=cost,
            waited=1.0,
            bound_by="requests",
            waiting=0,
            in_flight=1,
        ),
        Settled(limiter="openai", at=1.0, reserved=cost, used={"tokens": 40}, corrects={}),
        Settled(
            limiter="openai", at=1.0, reserved=cost, used={"tokens": 50}, corrects={"tokens": 40}
        ),
        Released(limiter="openai", at=3.0, cost=cost, held=2.0, outcome="ok"),
    ]
    assert [type(event) for event in heard[:2]] == [Admitted, Released]


async def test_refusal_events_say_why(virtual_time: VirtualTime) -> None:
    heard: list[Any] = []
    limiter = Limiter("2 RPM burst 1", max_queue=1, clock=virtual_time.clock)
    limiter.observe(heard.append)
    await limiter.acquire()
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait()
    with pytest.raises(AcquireTimeout):
        await limiter.acquire(timeout=1)
    waiting = asyncio.ensure_future(limiter.acquire())
    await virtual_time.all_blocked()
    with pytest.raises(QueueFull):
        await limiter.acquire()
    with pytest.raises(CostExceedsLimit):
        await limiter.acquire(requests=3)
    waiting.cancel()
    await virtual_time.all_blocked()
    refused = [event for event in heard if isinstance(event, Refused)]
    assert [(e.reason, e.bound_by, e.retry_after) for e in refused] == [
        ("would_block", "requests", pytest.approx(30)),
        ("timeout", "requests", pytest.approx(30)),
        ("queue_full", "requests", pytest.approx(30)),
        ("too_costly", None, None),
    ]
    assert [event.cost["requests"] for event in refused] == [1, 1, 1, 3]
    assert isinstance(heard[-1], Cancelled)
    assert (heard[-1].cost, heard[-1].waited) == ({"requests": 1}, 0)


async def test_events_reach_only_observers_of_limiter_and_those_above(
    virtual_time: VirtualTime,
) -> None:
    heard: dict[str, list[str]] = {"key": [], "chat": [], "tools": [], "agent": []}
    key = Limiter(name="key", clock=virtual_time.clock)
    chat, tools = key.child("chat"), key.child("tools")
    agent = chat.child("agent")
    for limiter in (key, chat, tools, agent):
        name = limiter.name.rpartition("/")[2]
        limiter.observe(
            lambda event, name=name: heard[name].append(  # type: ignore[misc]
                f"{event.limiter} {type(event).__name__}"
            )
        )
    (await agent.acquire()).release()
    (await key.acquire()).release()
    below = ["key/chat/agent Admitted", "key/chat/agent Released"]
    assert heard == {
        "key": [*below, "key Admitted", "key Released"],
        "chat": below,
        "tools": [],
        "agent": below,
    }


async def test_events_show_star_in_place_of_tenant(virtual_time: VirtualTime) -> None:
    heard: list[str] = []
    key = Limiter(name="key", clock=virtual_time.clock)
    key.per_key("100 RPM", alive=1)
    key.observe(lambda event: heard.append(event.limiter))
    for number in range(10):
        (await key.acquire(tenant=f"tenant {number}")).release()
    (await key.key("tenant 3").child("chat").acquire()).release()
    (await key.child("model").acquire(tenant="acme")).release()
    assert heard == ["key/*"] * 20 + ["key/*/chat"] * 2 + ["key/model/*"] * 2


def test_pauses_limit_changes_and_adapter_events_reach_observers(virtual_time: VirtualTime) -> None:
    heard: list[Any] = []
    key = Limiter(name="key", clock=virtual_time.clock)
    stop = key.observe(heard.append)
    child = key.child("child", rpm=10)
    child.pause(3, reason="429")
    child.reconfigure("20 RPM", concurrency=4)
    child.reconfigure(weight=2)
    key.learn(Limit("requests", 500))
    key.learn(Limit("requests", 500))
    emit(child, Retried(limiter=child.name, at=0.0, attempt=1, error="HTTP 429", delay=3.0))
    stop()
    stop()
    child.pause(5)
    assert heard == [
        Paused(limiter="key/child", at=0.0, seconds=3, reason="429"),
        LimitChanged(limiter="key/child", at=0.0, limit="20 requests per 60 s"),
        LimitChanged(limiter="key/child", at=0.0, limit="concurrency 4"),
        LimitLearned(limiter="key", at=0.0, limit="500 requests per 60 s"),
        Retried(limiter="key/child", at=0.0, attempt=1, error="HTTP 429", delay=3.0),
    ]


async def test_observer_may_call_limiter(virtual_time: VirtualTime) -> None:
    """No lock is held while an observer runs; its errors are reported once, and do no harm."""
    limiter = Limiter("60 RPM burst 1", name="key", clock=virtual_time.clock)
    seen: list[tuple[int, str]] = []

    def look(_: Event) -> None:
        seen.append((limiter.statistics().admitted, str(limiter.explain().wait)))
        limiter.child("another")
        raise ValueError

    limiter.observe(look)
    (await limiter.acquire()).release()
    (await limiter.acquire()).release()
    assert [admitted for admitted, _ in seen] == [1, 1, 1, 2, 2]


def test_garbage_collected_lease_is_reported_with_next_event(virtual_time: VirtualTime) -> None:
    """It is told with the next event, because any lock may be held when the collector runs."""
    heard: list[Any] = []
    key = Limiter(concurrency=1, clock=virtual_time.clock)
    limiter = key.child("child")
    key.observe(heard.append)
    lease = limiter.acquire_nowait()
    virtual_time.advance(4)
    del lease
    assert [type(event) for event in heard] == [Admitted]
    limiter.acquire_nowait().release()
    assert [type(event) for event in heard] == [Admitted, Released, Admitted, Released]
    assert (heard[1].held, heard[1].outcome) == (4.0, "failed")


def test_outcome_of_lease_is_reported_even_if_lock_was_held(virtual_time: VirtualTime) -> None:
    """The next holder of the lock does the postponed work, and sends its events."""
    heard: list[Any] = []
    limiter = Limiter(concurrency=3, clock=virtual_time.clock)
    limiter.observe(heard.append)
    leases = [limiter.acquire_nowait() for _ in range(3)]
    with limiter._node.pacer:
        leases[0].release()
        leases[1].overloaded()
        leases[2].failed()
    limiter.acquire_nowait()
    released = [event.outcome for event in heard if isinstance(event, Released)]
    assert released == ["ok", "overloaded", "failed"]


async def test_closed_waiter_is_reported_as_cancelled_with_next_event(
    virtual_time: VirtualTime,
) -> None:
    heard: list[Any] = []
    limiter = Limiter("2 RPM burst 1", clock=virtual_time.clock)
    await limiter.acquire()
    limiter.observe(heard.append)
    waiting = limiter.acquire()
    waiting.send(None)
    virtual_time.advance(3)
    waiting.close()
    assert [type(event) for event in heard] == [Queued]
    limiter.pause(0)
    assert [type(event) for event in heard] == [Queued, Cancelled, Paused]
    assert heard[1].waited == 3.0


def test_no_events_are_made_without_observers(
    virtual_time: VirtualTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = Limiter(clock=virtual_time.clock)
    stop = limiter.observe(lambda _: None)
    stop()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Event, "__init__", fail)
    monkeypatch.setattr(Admitted, "__init__", fail)
    limiter.acquire_nowait().release()
