"""With concurrency="auto", wrapped models tell the limiter when the server is overloaded."""

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
    """A model whose server rejects its requests as wrong."""

    error = openai.BadRequestError(
        "wrong", response=httpx.Response(400, request=REQUEST), body={"message": "wrong"}
    )


async def ask(llm: LLM) -> None:
    await llm.acomplete("hello")


async def ask_sync(llm: LLM) -> None:
    llm.complete("hello")


async def ask_for_stream(llm: LLM) -> None:
    async for _ in await llm.astream_chat([ChatMessage("hello")]):
        pass


@pytest.mark.parametrize("how", [ask, ask_sync, ask_for_stream])
@pytest.mark.parametrize(("model", "slots"), [(BusyLLM, 3), (PickyLLM, 4)])
async def test_overload_error_cuts_slots_and_bad_request_does_not(
    how: Callable[[LLM], Awaitable[None]], model: type[BusyLLM], slots: int
) -> None:
    limiter = Limiter(concurrency="auto")
    llm = limiter.wrap(model(max_tokens=None), retry=False)
    with pytest.raises(type(model.error)):
        await how(llm)
    assert limiter.concurrency == slots
    assert limiter.statistics().in_flight == 0
