"""The stream of events and its observers, without a limiter."""

import dataclasses
import logging
import pickle
import subprocess
import sys
from typing import Any

import pytest

from asyncbucket import events
from asyncbucket.core.events import Admitted, Event, Observers, Paused, Settled

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


def paused(seconds: float = 1.0) -> Paused:
    """Return an event that can be told apart by its number."""
    return Paused(limiter="openai", at=0.0, seconds=seconds, reason="429")


@pytest.mark.parametrize("kind", KINDS)
def test_event_is_frozen_value_without_instance_dict(kind: type[Event]) -> None:
    """No observer can change what the next one sees, and many events take little memory."""
    fields: dict[str, Any] = {field.name: "x" for field in dataclasses.fields(kind)}
    event, same = kind(**fields), kind(**fields)

    assert event == same
    assert not hasattr(event, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, "limiter", "other")  # noqa: B010 - what type checkers refuse


@pytest.mark.parametrize("kind", KINDS)
def test_event_names_its_limiter_and_instant(kind: type[Event]) -> None:
    assert {"limiter", "at"} <= {field.name for field in dataclasses.fields(kind)}
    assert kind.__doc__


def test_event_has_plain_values_and_survives_pickling() -> None:
    settled = Settled(limiter="openai", at=1.0, reserved={"tokens": 9}, used={"tokens": 7})

    assert dataclasses.asdict(settled) == {
        "limiter": "openai",
        "at": 1.0,
        "reserved": {"tokens": 9},
        "used": {"tokens": 7},
        "corrects": {},
    }
    assert pickle.loads(pickle.dumps(ADMITTED)) == ADMITTED  # noqa: S301 - our own


def test_event_repr_shows_all_fields() -> None:
    assert repr(ADMITTED) == (
        "Admitted(limiter='openai/chat', at=12.5, cost={'requests': 1, 'tokens': 900}, "
        "waited=1.8, bound_by='tokens', waiting=3, in_flight=20)"
    )


def test_observers_are_called_in_order_they_were_added() -> None:
    observers = Observers()
    seen: list[tuple[str, Event]] = []
    observers.add(lambda event: seen.append(("first", event)))
    observers.add(lambda event: seen.append(("second", event)))

    observers.emit(ADMITTED)

    assert seen == [("first", ADMITTED), ("second", ADMITTED)]
    assert all(event is ADMITTED for _, event in seen)


def test_removed_observer_gets_no_more_events() -> None:
    """Removing it twice, or one of two registrations of a callback, removes no other."""
    observers = Observers()
    seen: list[Event] = []
    first, second = observers.add(seen.append), observers.add(seen.append)

    first()
    first()
    observers.emit(ADMITTED)
    assert len(seen) == 1

    second()
    observers.emit(ADMITTED)
    assert len(seen) == 1


def test_observers_are_truthy_only_while_one_is_registered() -> None:
    """The core makes no events while there are no observers."""
    observers = Observers()
    assert not observers

    remove = observers.add(print)
    assert observers

    remove()
    assert not observers


def test_observer_that_raises_is_logged_once_and_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says which one, on what event and why; the other observers get every event."""
    observers = Observers()
    seen: list[Event] = []

    def faulty(_: Event) -> None:
        raise RuntimeError("disk full")

    observers.add(faulty)
    observers.add(seen.append)

    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            observers.emit(ADMITTED)

    assert len(seen) == 3
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("asyncbucket", "ERROR")
    assert record.getMessage() == (
        "observer test_observer_that_raises_is_logged_once_and_stops_no_other.<locals>.faulty "
        "raised on Admitted; later errors of it are not reported"
    )
    assert record.exc_info
    assert str(record.exc_info[1]) == "disk full"


def test_logged_observer_error_does_not_show_repr_of_observer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The repr of a callable object, such as a bound method or a partial, may hold a secret."""

    class Sender:
        def __repr__(self) -> str:
            return "Sender(key='sk-canary')"

        def __call__(self, _: Event) -> None:
            raise RuntimeError("unreachable")

    observers = Observers()
    observers.add(Sender())
    observers.emit(ADMITTED)

    assert "Sender raised on Admitted" in caplog.text
    assert "sk-canary" not in caplog.text


def test_keyboard_interrupt_in_observer_is_not_swallowed() -> None:
    """Ctrl-C while an observer runs ends the program, as it does elsewhere."""
    observers = Observers()

    def interrupted(_: Event) -> None:
        raise KeyboardInterrupt

    observers.add(interrupted)
    with pytest.raises(KeyboardInterrupt):
        observers.emit(ADMITTED)


def test_observer_may_add_and_remove_observers_while_it_is_called() -> None:
    """An event goes to the observers that were there when it was sent."""
    observers = Observers()
    seen: list[str] = []

    def once(_: Event) -> None:
        seen.append("once")
        remove()
        observers.add(lambda _: seen.append("new"))

    remove = observers.add(once)
    observers.emit(ADMITTED)
    assert seen == ["once"]

    observers.emit(ADMITTED)
    assert seen == ["once", "new"]


def test_observer_may_emit_events_itself() -> None:
    """Each event is delivered when it happens, and the first one is not lost."""
    observers = Observers()
    seen: list[float] = []

    def echo(event: Event) -> None:
        assert isinstance(event, Paused)
        seen.append(event.seconds)
        if event.seconds < 3:
            observers.emit(paused(event.seconds + 1))

    observers.add(echo)
    observers.emit(paused(1))

    assert seen == [1, 2, 3]


async def watch(_: Event) -> None: ...


class Watch:
    """An object whose call is a coroutine."""

    async def __call__(self, _: Event) -> None: ...


@pytest.mark.parametrize(
    ("callback", "why"),
    [
        (None, "an observer must be a function of an event; NoneType cannot be called"),
        ("print", "an observer must be a function of an event; str cannot be called"),
        (watch, "an observer must be a plain function, and watch is a coroutine function: let it"),
        (Watch(), "an observer must be a plain function, and Watch is a coroutine function: let"),
    ],
)
def test_observer_that_cannot_be_called_like_function_is_refused(callback: Any, why: str) -> None:
    """At once, not with the first event; a coroutine function would never be awaited."""
    with pytest.raises(TypeError, match=f"^{why}"):
        Observers().add(callback)


def test_warning_reaches_stderr_when_logging_is_not_configured() -> None:
    """Without any logging set up, warnings still go to standard error."""
    code = "import asyncbucket, logging; logging.getLogger('asyncbucket').warning('look here')"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "look here\n")
