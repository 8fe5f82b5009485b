"""Waits and refusals beside what LlamaIndex reports of models and agents."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.llms import MockLLM
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import PrivateAttr

from asyncbucket import AcquireTimeout, Limiter, events, telemetry
from asyncbucket.llama_index import (
    RateLimitPauseEvent,
    RateLimitRefusedEvent,
    RateLimitRetryEvent,
    RateLimitWaitEvent,
)
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
    """Return what LlamaIndex's instrumentation reports during the test."""
    root, heard = get_dispatcher(), list[BaseEvent]()
    before = list(root.event_handlers)
    root.add_event_handler(_Handler(heard))
    yield heard
    root.event_handlers[:] = before


def names(heard: list[BaseEvent]) -> list[str]:
    return [event.class_name() for event in heard]


@dispatcher.span
async def ask_by_hand(limiter: Limiter, **options: Any) -> None:
    """A step of a user's workflow that calls an API of its own."""
    async with limiter.acquire(**options):
        await asyncio.sleep(0.1)


def test_waits_refusals_retries_and_pauses_are_reported_with_numbers(
    limiter: Limiter, seen: list[BaseEvent], say: Any, admit: Any
) -> None:
    telemetry.llama_index(limiter)
    for waited in (0.0, 1.8):
        admit(limiter, waited=waited, bound_by="tokens")
    say(limiter, events.Refused, cost=COST, reason="timeout", bound_by="tokens", retry_after=3.0)
    say(limiter, events.Retried, attempt=1, error="HTTP 429", delay=2.0)
    say(limiter, events.Paused, seconds=2.0, reason="429")
    say(limiter, events.Released, cost=COST, held=1.0, outcome="ok")

    wait, refused, retry, pause = seen
    assert isinstance(wait, RateLimitWaitEvent)
    assert (wait.limiter, wait.waited, wait.bound_by) == ("openai", 1.8, "tokens")
    assert isinstance(refused, RateLimitRefusedEvent)
    assert (refused.reason, refused.bound_by, refused.retry_after) == ("timeout", "tokens", 3.0)
    assert isinstance(retry, RateLimitRetryEvent)
    assert (retry.attempt, retry.error, retry.delay) == (1, "HTTP 429", 2.0)
    assert isinstance(pause, RateLimitPauseEvent)
    assert (pause.seconds, pause.reason) == (2.0, "429")
    assert names(seen) == [type(event).__name__ for event in seen]


def test_wait_and_refusal_events_are_in_the_spans_of_their_callers(
    virtual_time: VirtualTime, seen: list[BaseEvent]
) -> None:
    limiter = Limiter(concurrency=1, name="mine", clock=virtual_time.clock)
    telemetry.llama_index(limiter)

    @dispatcher.span
    async def step() -> None:
        dispatcher.event(BaseEvent())
        await ask_by_hand(limiter)

    async def main() -> None:
        await asyncio.gather(*(step() for _ in range(3)))
        async with limiter.acquire():
            with pytest.raises(AcquireTimeout):
                await ask_by_hand(limiter, timeout=2)

    virtual_time.run(main())
    (refused,) = [event for event in seen if isinstance(event, RateLimitRefusedEvent)]
    assert (refused.reason, refused.bound_by) == ("timeout", "concurrency")
    assert str(refused.span_id).startswith("ask_by_hand-")
    spans = [event.span_id for event in seen if type(event) is BaseEvent]
    waits = [event for event in seen if isinstance(event, RateLimitWaitEvent)]
    assert [round(wait.waited, 6) for wait in waits] == [0.1, 0.2]
    assert len({wait.span_id for wait in waits}) == 2
    assert all(str(wait.span_id).startswith("ask_by_hand-") for wait in waits)
    assert len(set(spans)) == 3


def test_wait_of_wrapped_model_is_reported_once(
    virtual_time: VirtualTime, seen: list[BaseEvent]
) -> None:
    limiter = Limiter("2/s burst 1", name="mine", clock=virtual_time.clock)
    telemetry.llama_index(limiter)
    llm = limiter.wrap(MockLLM(max_tokens=3))

    async def main() -> None:
        await llm.acomplete("one")
        await llm.acomplete("two")
        await ask_by_hand(limiter)

    virtual_time.run(main())
    told = names(seen)
    assert told.count("RateLimitWaitEvent") == 2
    second = told.index("RateLimitWaitEvent")
    assert told[second + 1] == "LLMCompletionStartEvent"
    waits = [event for event in seen if isinstance(event, RateLimitWaitEvent)]
    assert [wait.waited for wait in waits] == [0.5, pytest.approx(0.5, abs=0.01)]
    assert str(waits[1].span_id).startswith("ask_by_hand-")


def test_wait_of_blocking_wrapped_model_is_reported_once(seen: list[BaseEvent]) -> None:
    """A blocking call waits on a background loop, and is still the same call.

    This uses the machine's clock, because threads do not wait in virtual time.
    """
    limiter = Limiter("50/s burst 1", name="mine")
    telemetry.llama_index(limiter)
    llm = limiter.wrap(MockLLM(max_tokens=3))

    llm.complete("one")
    llm.complete("two")

    assert names(seen).count("RateLimitWaitEvent") == 1
