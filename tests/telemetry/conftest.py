"""What the tests of telemetry share: a limiter, events that happen as a test says, and a scrape."""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from asyncbucket import Limiter
from asyncbucket.core.events import Admitted, Event
from asyncbucket.core.levels import emit, shown_name

Say: TypeAlias = Callable[..., None]

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}


def scrape(registry: CollectorRegistry) -> Counter[tuple[str, ...]]:
    """Return each sample by its name and the values of its labels, sorted by name."""
    return Counter(
        {
            (
                sample.name.removeprefix("asyncbucket_"),
                *(value for _, value in sorted(sample.labels.items())),
            ): sample.value
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            for sample in family.samples
        }
    )


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


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
