"""What the tests of telemetry share: a limiter that only says what a test tells it."""

from collections.abc import Callable
from typing import Any

import pytest

from asyncbucket import Limit, LimitUse, Statistics
from asyncbucket.core.events import Callback, Event, Observers

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}


class ScriptedLimiter:
    """A limiter that can be watched, and says and shows what a test wants."""

    def __init__(self, name: str = "openai", parent: "ScriptedLimiter | None" = None) -> None:
        self.name = name
        self.parent = parent
        self.children: dict[str, ScriptedLimiter] = {}
        self.observers = Observers()
        self.numbers: dict[str, Any] = {"waiting": 0, "in_flight": 0, "concurrency": None}
        self.used: list[tuple[Limit, int]] = []

    def child(self, name: str) -> "ScriptedLimiter":
        """Make a child."""
        child = ScriptedLimiter(f"{self.name}/{name}", self)
        self.children[name] = child
        return child

    def observe(self, callback: Callback) -> Callable[[], None]:
        """Call back with the events that `say` makes."""
        return self.observers.add(callback)

    def say(self, kind: type[Event], **what: Any) -> None:
        """Make an event."""
        event = kind(limiter=self.name, at=1.0, **what)
        above: ScriptedLimiter | None = self
        while above is not None:
            above.observers.emit(event)
            above = above.parent

    def statistics(self) -> Statistics:
        """Show the numbers that the test has set."""
        uses = tuple(
            LimitUse(limit, used=used, available=limit.amount - used) for limit, used in self.used
        )
        return Statistics(
            name=self.name,
            admitted=0,
            refused=0,
            cancelled=0,
            paused=0.0,
            upstream_429=0,
            overridden=0,
            limits=uses,
            **self.numbers,
        )


@pytest.fixture
def limiter() -> ScriptedLimiter:
    """Return a limiter that says what a test tells it."""
    return ScriptedLimiter()


@pytest.fixture
def make_limiter() -> Callable[[str], ScriptedLimiter]:
    """Return a function that makes such limiters by name."""
    return ScriptedLimiter
