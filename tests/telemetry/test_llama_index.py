"""Waits and refusals beside what LlamaIndex reports of models and agents."""

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import PrivateAttr

from asyncbucket import AcquireTimeout, Limiter, events, telemetry
from asyncbucket.llama_index import RateLimitPauseEvent, RateLimitRefusedEvent, RateLimitRetryEvent
from asyncbucket.testing import VirtualTime

COST = {"requests": 1, "tokens": 900}
dispatcher = get_dispatcher("tests.telemetry")


class _Handler(BaseEventHandler):
    _seen: list[BaseEvent] = PrivateAttr()

    def __init__(self, seen: list[BaseEvent]) -> None:
        super().__init__()
        self._seen = seen

    @classmethod
    def class_name(cls) -> str:
        return "Handler"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self._seen.append(event)


@pytest.fixture
def seen() -> Iterator[list[BaseEvent]]:
    root, heard = get_dispatcher(), list[BaseEvent]()
    before = list(root.event_handlers)
    root.add_event_handler(_Handler(heard))
    yield heard
    root.event_handlers[:] = before


def names(heard: list[BaseEvent]) -> list[str]:
    return [event.class_name() for event in heard]


def test_refusals_retries_and_pauses_are_reported_with_numbers(
    limiter: Limiter, seen: list[BaseEvent], say: Any, admit: Any
) -> None:
    telemetry.llama_index(limiter)
    admit(limiter, waited=1.8, bound_by="tokens")
    say(limiter, events.Refused, cost=COST, reason="timeout", bound_by="tokens", retry_after=3.0)
    say(limiter, events.Retried, attempt=1, error="HTTP 429", delay=2.0)
    say(limiter, events.Paused, seconds=2.0, reason="429")
    say(limiter, events.Released, cost=COST, held=1.0, outcome="ok")
    refused, retry, pause = seen  # wrapped models report their waits by themselves
    assert isinstance(refused, RateLimitRefusedEvent)
    assert (refused.limiter, refused.reason, refused.bound_by, refused.retry_after) == (
        *("openai", "timeout", "tokens", 3.0),
    )
    assert isinstance(retry, RateLimitRetryEvent)
    assert (retry.attempt, retry.error, retry.delay) == (1, "HTTP 429", 2.0)
    assert isinstance(pause, RateLimitPauseEvent)
    assert (pause.seconds, pause.reason) == (2.0, "429")
    assert names(seen) == [type(event).__name__ for event in seen]


async def test_refusal_event_is_in_the_span_of_its_caller(
    virtual_time: VirtualTime, seen: list[BaseEvent]
) -> None:
    limiter = Limiter(concurrency=1, name="mine", clock=virtual_time.clock)
    telemetry.llama_index(limiter)

    @dispatcher.span
    async def ask_by_hand() -> None:
        async with limiter.acquire(timeout=2):
            raise AssertionError("unreachable")

    async with limiter.acquire():
        with pytest.raises(AcquireTimeout):
            await ask_by_hand()
    (refused,) = [event for event in seen if isinstance(event, RateLimitRefusedEvent)]
    assert (refused.reason, refused.bound_by) == ("timeout", "concurrency")
    assert str(refused.span_id).startswith("test_refusal_event")
