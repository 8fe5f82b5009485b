"""Refusals, retries and pauses beside what LlamaIndex reports of models and agents."""

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import PrivateAttr

from asyncbucket import Limiter, events, telemetry


class _Handler(BaseEventHandler):
    _seen: list[BaseEvent] = PrivateAttr(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Handler"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self._seen.append(event)


@pytest.fixture
def seen() -> Iterator[list[BaseEvent]]:
    root, handler = get_dispatcher(), _Handler()
    before = list(root.event_handlers)
    root.add_event_handler(handler)
    yield handler._seen
    root.event_handlers[:] = before


def test_refusals_retries_and_pauses_are_reported_with_numbers(
    limiter: Limiter, seen: list[BaseEvent], say: Any, admit: Any
) -> None:
    refusal = {"reason": "timeout", "bound_by": "tokens", "retry_after": 3.0}
    retry = {"attempt": 1, "error": "HTTP 429", "delay": 2.0}
    pause = {"seconds": 2.0, "reason": "429"}
    telemetry.llama_index(limiter)
    admit(limiter, waited=1.8, bound_by="tokens")  # wrapped models report their waits by themselves
    say(limiter, events.Refused, **refusal)
    say(limiter, events.Retried, **retry)
    say(limiter, events.Paused, **pause)
    say(limiter, events.Released, held=1.0, outcome="ok")
    own = {"limiter", *refusal, *retry, *pause}
    told = [event.model_dump(include=own) for event in seen]
    assert told == [
        {"class_name": f"RateLimit{kind}Event", "limiter": "openai", **numbers}
        for kind, numbers in (("Refused", refusal), ("Retry", retry), ("Pause", pause))
    ]
