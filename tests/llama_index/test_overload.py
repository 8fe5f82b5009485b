"""With concurrency="auto", wrapped models tell the limiter when the server is overloaded."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import httpx
import openai
import pytest
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse
from llama_index.core.llms import LLM
from llama_index.core.llms.mock import MockLLM
from pydantic import PrivateAttr

from asyncbucket import Limiter
from asyncbucket.core.events import Event, Paused
from asyncbucket.testing import virtual_time

REQUEST = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")


class BusyLLM(MockLLM):
    """A model whose server is too busy."""

    error: ClassVar[Exception] = openai.InternalServerError(
        "busy", response=httpx.Response(503, request=REQUEST), body={"message": "busy"}
    )

    def complete(self, *_: Any, **__: Any) -> Any:
        raise self.error

    async def acomplete(self, *_: Any, **__: Any) -> Any:
        raise self.error

    async def astream_chat(self, *_: Any, **__: Any) -> Any:
        raise self.error


class PickyLLM(BusyLLM):
    """A model whose server rejects its requests as wrong."""

    error = openai.BadRequestError(
        "wrong", response=httpx.Response(400, request=REQUEST), body={"message": "wrong"}
    )


class SlowlyRefusedLLM(MockLLM):
    """A model whose first calls are refused, each after its own time (s)."""

    _refusals: list[float] = PrivateAttr(default_factory=lambda: [0.0, 2.0, 5.0])

    async def _refuse(self) -> None:
        if self._refusals:
            await asyncio.sleep(self._refusals.pop(0))
            raise openai.RateLimitError(
                "slowly", response=httpx.Response(429, request=REQUEST), body=None
            )

    async def acomplete(self, *_: Any, **__: Any) -> Any:
        await self._refuse()
        return CompletionResponse(text="hello")

    async def astream_chat(self, *args: Any, **kwargs: Any) -> Any:
        await self._refuse()
        return await super().astream_chat(*args, **kwargs)


async def ask(llm: LLM) -> None:
    """Make an asynchronous call."""
    await llm.acomplete("hello")


async def ask_sync(llm: LLM) -> None:
    """Make a call that blocks."""
    llm.complete("hello")


async def ask_for_stream(llm: LLM) -> None:
    """Read a stream."""
    async for _ in await llm.astream_chat([ChatMessage("hello")]):
        pass


@pytest.mark.parametrize("how", [ask, ask_sync, ask_for_stream])
@pytest.mark.parametrize(("model", "slots"), [(BusyLLM, 3), (PickyLLM, 4)])
async def test_overload_error_cuts_slots_and_bad_request_does_not(
    how: Callable[[LLM], Awaitable[None]], model: type[BusyLLM], slots: int
) -> None:
    """Calls and streams cut it after a 503, but not after a 400."""
    limiter = Limiter(concurrency="auto")
    llm = limiter.wrap(model(max_tokens=None), retry=False)
    with pytest.raises(type(model.error)):
        await how(llm)
    assert limiter.concurrency == slots
    assert limiter.statistics().in_flight == 0


@pytest.mark.parametrize("how", [ask, ask_for_stream])
def test_late_refusals_of_one_wave_cause_one_pause(
    how: Callable[[LLM], Awaitable[None]],
) -> None:
    """Calls in flight at the first refusal say nothing about the time after its pause."""
    with virtual_time() as time:
        limiter = Limiter(concurrency=3, clock=time.clock)
        llm = limiter.wrap(SlowlyRefusedLLM(max_tokens=None))
        pauses: list[float] = []

        def hear(event: Event) -> None:
            if isinstance(event, Paused) and event.seconds:
                pauses.append(event.seconds)

        limiter.observe(hear)

        async def main() -> None:
            await asyncio.gather(*(how(llm) for _ in range(3)))

        time.run(main())
    assert pauses == [1.0]
