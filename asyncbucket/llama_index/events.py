"""Queueing, as LlamaIndex's instrumentation shows it."""

from typing import ClassVar

from llama_index_instrumentation.base import BaseEvent
from pydantic import ConfigDict


class RateLimitWaitEvent(BaseEvent):
    """Say that a call waited for its admission, and for what.

    It comes before the event that starts the call (``LLMChatStartEvent`` and its like), so that a
    model's latency is the model's alone. A call that passed at once has none.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    #: Seconds between asking and admission.
    waited: float
    #: The resource that held it up: ``"requests"``, ``"tokens"``, ``"concurrency"``, ``"paused"``.
    bound_by: str | None
    #: The limiter's name.
    limiter: str

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex's handlers know an event by."""
        return "RateLimitWaitEvent"
