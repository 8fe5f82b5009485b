"""What the tests of telemetry share: a limiter, and events that happen as a test says."""

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from asyncbucket import Limiter
from asyncbucket.core.events import Admitted, Event
from asyncbucket.core.levels import emit, shown_name

Say: TypeAlias = Callable[..., None]

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}


@pytest.fixture
def limiter() -> Limiter:
    return Limiter(name="openai")


@pytest.fixture
def say() -> Say:
    """Let an event happen in a limiter; a call costs `COST` unless a test says otherwise."""

    def emit_event(limiter: Limiter, event_type: type[Event], **what: Any) -> None:
        if "cost" in event_type.__dataclass_fields__:
            what = {"cost": COST, **what}
        emit(limiter, event_type(limiter=shown_name(limiter), at=1.0, **what))

    return emit_event


@pytest.fixture
def admit(say: Say) -> Say:
    """Admit a call that waited for nothing, unless a test says otherwise."""

    def admit_call(limiter: Limiter, **what: Any) -> None:
        usual = {"waited": 0.0, "bound_by": None, "waiting": 0, "in_flight": 1}
        say(limiter, Admitted, **{**usual, **what})

    return admit_call
