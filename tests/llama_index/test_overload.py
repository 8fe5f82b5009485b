"""A limiter that finds its concurrency hears from wrapped models what the server cannot take."""

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import httpx
import openai
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms import LLM
from llama_index.core.llms.mock import MockLLM

from asyncbucket import Limiter

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
    """A model whose server does not like what it is asked."""

    error = openai.BadRequestError(
        "wrong", response=httpx.Response(400, request=REQUEST), body={"message": "wrong"}
    )


async def ask(llm: LLM) -> None:
    """Make an async call."""
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
async def test_overload_cuts_the_number_of_slots(
    how: Callable[[LLM], Awaitable[None]], model: type[BusyLLM], slots: int
) -> None:
    """Calls, async or not, and streams: a 503 does, a 400 does not."""
    limiter = Limiter(concurrency="auto")
    llm = limiter.wrap(model(max_tokens=None), retry=False)
    with pytest.raises(type(model.error)):
        await how(llm)
    assert limiter.concurrency == slots
    assert limiter.statistics().in_flight == 0
