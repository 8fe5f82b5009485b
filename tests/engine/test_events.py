"""The stream of events: what observers of a limiter hear, and how they are called."""

import asyncio
import contextlib
import dataclasses
import pickle
from typing import Any

import pytest

from asyncbucket import (
    AcquireTimeout,
    CostExceedsLimit,
    Limit,
    Limiter,
    QueueFull,
    WouldBlock,
    events,
)
from asyncbucket.engine.events import (
    Admitted,
    Cancelled,
    Event,
    LimitChanged,
    LimitLearned,
    Observers,
    Paused,
    Queued,
    Refused,
    Released,
    Retried,
    Settled,
)
from asyncbucket.levels import emit
from asyncbucket.testing import VirtualTime
from tests.conftest import python
from tests.engine.conftest import all_blocked, start

ADMITTED = Admitted(
    limiter="openai/chat",
    at=12.5,
    cost={"requests": 1, "tokens": 900},
    waited=1.8,
    bound_by="tokens",
    waiting=3,
    in_flight=20,
)
KINDS = [
    kind
    for kind in (getattr(events, name) for name in dir(events))
    if isinstance(kind, type) and issubclass(kind, Event)
]


@pytest.mark.parametrize("kind", KINDS)
def test_event_is_frozen_plain_value_that_names_its_limiter_and_instant(kind: type[Event]) -> None:
    fields: dict[str, Any] = {field.name: "x" for field in dataclasses.fields(kind)}
    event = kind(**fields)
    assert event == kind(**fields) == pickle.loads(pickle.dumps(event))  # noqa: S301 - our own
    assert {"limiter", "at"} <= fields.keys()
    assert not hasattr(event, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, "limiter", "other")  # noqa: B010 - what type checkers refuse


# --- observers ---


def test_observers_are_called_in_order_until_they_are_removed() -> None:
    """Removing one twice, or one of two registrations of a callback, removes no other."""
    observers, seen = Observers(), list[str]()
    assert not observers  # so that no events are made

    def first(_: Event) -> None:
        seen.append("first")

    stops = [observers.add(first), observers.add(lambda _: seen.append("second"))]
    stops.append(observers.add(first))
    for expected in (["first", "second", "first"], ["second", "first"], ["first"], []):
        observers.emit(ADMITTED)
        assert seen == expected
        seen.clear()
        if expected:
            stop = stops.pop(0)
            assert (stop(), stop()) == (True, False)
    assert not observers


def test_observer_that_raises_is_logged_once_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    """Its repr may hold a secret; Ctrl-C ends the program, as it does elsewhere."""
    raises: list[type[BaseException]] = [*[RuntimeError] * 3, KeyboardInterrupt]

    class Sender:
        def __repr__(self) -> str:
            return "Sender(key='sk-canary')"

        def __call__(self, _: Event) -> None:
            raise raises.pop(0)("disk full")

    observers = Observers()
    seen: list[Event] = []
    observers.add(Sender())
    observers.add(seen.append)
    for _ in range(3):
        observers.emit(ADMITTED)
    assert len(seen) == 3
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("asyncbucket", "ERROR")
    assert (
        "<locals>.Sender raised on Admitted; its later errors are not reported"
        in record.getMessage()
    )
    assert record.exc_info
    assert str(record.exc_info[1]) == "disk full"
    assert "sk-canary" not in caplog.text
    with pytest.raises(KeyboardInterrupt):
        observers.emit(ADMITTED)


async def watch(_: Event) -> None: ...


class Watch:
    """An object whose call is a coroutine."""

    async def __call__(self, _: Event) -> None: ...


@pytest.mark.parametrize(
    ("callback", "name"),
    [(None, "NoneType"), ("print", "str"), (watch, "watch"), (Watch(), "Watch")],
)
def test_observer_that_cannot_be_called_like_function_is_refused(callback: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"must be a plain function of an event, not {name}; one"):
        Observers().add(callback)


def test_warning_reaches_stderr_when_logging_is_not_configured() -> None:
    code = "import asyncbucket, logging; logging.getLogger('asyncbucket').warning('look here')"
    done = python("-W", "error", "-c", code, check=True)
    assert (done.stdout, done.stderr) == ("", "look here\n")


# --- what they hear of a limiter ---


async def test_events_of_call_come_in_order(time: VirtualTime) -> None:
    heard: list[Event] = []
    limiter = Limiter("60 RPM burst 1", "1k TPM", name="openai", clock=time.clock)
    limiter.observe(heard.append)
    (await limiter.acquire(tokens=10)).release()
    async with limiter.acquire(tokens=100) as lease:
        lease.settle(tokens=40)
        lease.settle(tokens=50)
        await asyncio.sleep(2)
    cost = {"requests": 1, "tokens": 100, "input_tokens": 100, "output_tokens": 100}
    used = {**cost, "tokens": 50}
    common: Any = {"limiter": "openai", "at": 1.0}
    admitted: Any = {"waited": 1.0, "bound_by": "requests", "waiting": 0, "in_flight": 1}
    assert heard[2:] == [
        Queued(limiter="openai", at=0.0, cost=cost, waiting=1),
        Admitted(**common, cost=cost, **admitted),
        Settled(**common, reserved=cost, used={"tokens": 40}, corrects={}),
        Settled(**common, reserved=cost, used={"tokens": 50}, corrects={"tokens": 40}),
        Released(limiter="openai", at=3.0, cost=cost, held=2.0, outcome="ok", used=used),
    ]
    assert [type(event) for event in heard[:2]] == [Admitted, Released]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (asyncio.CancelledError(), "failed"),
        (AcquireTimeout("another limiter's"), "failed"),
        (TimeoutError("slow"), "overloaded"),
    ],
)
async def test_outcome_is_told(
    time: VirtualTime, error: BaseException | None, outcome: str
) -> None:
    heard: list[Any] = []
    limiter = Limiter(clock=time.clock)
    limiter.observe(heard.append)
    expected = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with expected, limiter.acquire_sync():
        if error:
            raise error
    with expected:
        async with limiter.acquire():
            if error:
                raise error
    assert [heard[1].outcome, heard[3].outcome] == [outcome] * 2


async def test_refusal_events_say_why(time: VirtualTime) -> None:
    heard: list[Any] = []
    limiter = Limiter("2 RPM burst 1", max_queue=1, clock=time.clock)
    limiter.observe(heard.append)
    await limiter.acquire()
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait()
    with pytest.raises(AcquireTimeout):
        await limiter.acquire(timeout=1)
    waiting = await start(limiter.acquire())
    with pytest.raises(QueueFull):
        await limiter.acquire()
    with pytest.raises(CostExceedsLimit):
        await limiter.acquire(requests=3)
    refused = [event for event in heard if isinstance(event, Refused)]
    told = [(e.reason, e.bound_by, e.retry_after, e.cost["requests"]) for e in refused]
    waits = {"would_block": 30, "timeout": 30, "queue_full": 60}
    bound = [(why, "requests", pytest.approx(wait), 1) for why, wait in waits.items()]
    assert told == [*bound, ("too_costly", None, None, 3)]
    waiting.cancel()
    await all_blocked()
    assert heard[-1] == Cancelled(limiter="default", at=0.0, cost={"requests": 1}, waited=0)


async def test_events_reach_only_observers_of_limiter_and_those_above(time: VirtualTime) -> None:
    heard: dict[str, list[str]] = {"key": [], "chat": [], "tools": [], "agent": []}
    key = Limiter(name="key", clock=time.clock)
    chat, tools = key.child("chat"), key.child("tools")
    agent = chat.child("agent")
    for limiter, told in zip((key, chat, tools, agent), heard.values(), strict=True):
        limiter.observe(
            lambda event, told=told: told.append(f"{event.limiter} {type(event).__name__}")  # type: ignore[misc]
        )
    (await agent.acquire()).release()
    (await key.acquire()).release()
    below = ["key/chat/agent Admitted", "key/chat/agent Released"]
    above = [*below, "key Admitted", "key Released"]
    assert heard == {"key": above, "chat": below, "tools": [], "agent": below}


async def test_events_show_star_in_place_of_tenant(time: VirtualTime) -> None:
    heard: list[str] = []
    key = Limiter(name="key", clock=time.clock)
    key.observe(lambda event: heard.append(event.limiter))
    for number in range(10):
        (await key.acquire(tenant=f"tenant {number}")).release()
    (await key.key("tenant 3").child("chat").acquire()).release()
    (await key.child("model").acquire(tenant="acme")).release()
    assert heard == ["key/*"] * 20 + ["key/*/chat"] * 2 + ["key/model/*"] * 2


def test_pauses_limit_changes_and_adapter_events_reach_observers(time: VirtualTime) -> None:
    heard: list[Any] = []
    key = Limiter(name="key", clock=time.clock)
    stop = key.observe(heard.append)
    child = key.child("child", rpm=10)
    child.pause(3, reason="429")
    child.reconfigure("20 RPM", concurrency=4)
    child.reconfigure(weight=2)
    for _ in range(2):
        key.learn(Limit("requests", 500))
    emit(child, Retried(limiter=child.name, at=0.0, attempt=1, error="HTTP 429", delay=3.0))
    stop()
    child.pause(5)
    assert heard == [
        Paused(limiter="key/child", at=0.0, seconds=3, reason="429"),
        LimitChanged(limiter="key/child", at=0.0, limit="20 requests per 60 s"),
        LimitChanged(limiter="key/child", at=0.0, limit="concurrency 4"),
        LimitLearned(limiter="key", at=0.0, limit="500 requests per 60 s"),
        Retried(limiter="key/child", at=0.0, attempt=1, error="HTTP 429", delay=3.0),
    ]


async def test_observer_may_call_limiter_and_change_its_observers(time: VirtualTime) -> None:
    """No lock is held while an observer runs; its errors do no harm."""
    limiter = Limiter("60 RPM burst 1", name="key", clock=time.clock)
    seen: list[Any] = []
    later: list[Event] = []

    def look(_: Event) -> None:
        seen.append((limiter.statistics().admitted, limiter.explain().wait, limiter.child("other")))
        limiter.observe(later.append)
        stop()
        raise ValueError

    stop = limiter.observe(look)
    for _ in range(2):
        (await limiter.acquire()).release()
    assert [admitted for admitted, *_ in seen] == [1]
    assert [type(event) for event in later] == [Released, Queued, Admitted, Released]


@pytest.mark.parametrize("what", ["lease", "waiter"])
def test_what_the_collector_ends_is_reported_with_next_event(time: VirtualTime, what: str) -> None:
    """Not at once, because any lock may be held when the collector runs."""
    heard: list[Any] = []
    key = Limiter(concurrency=1, clock=time.clock)
    limiter = key.child("child")
    key.observe(heard.append)

    async def wait() -> None:
        call = limiter.acquire().__await__()
        call.send(None)
        time.advance(3)
        call.close()
        assert type(heard[-1]) is Queued

    lease = limiter.acquire_nowait()
    if what == "waiter":
        time.run(wait())
    else:
        time.advance(3)
        del lease
        assert type(heard[-1]) is Admitted
    limiter.pause(0)
    ended = heard[-2]
    assert type(ended) is (Cancelled if what == "waiter" else Released)
    assert (ended.held if isinstance(ended, Released) else ended.waited) == 3.0
