"""With concurrency="auto", wrapped models tell the limiter when the server is overloaded."""

from typing import Any

import httpx
import openai
import pytest
from llama_index.core.llms.mock import MockLLM
from pydantic import PrivateAttr

from asyncbucket import Limiter
from tests.llama_index.conftest import Reader, in_flight


class FailingLLM(MockLLM):
    """A model whose server answers with an error."""

    _error: Exception = PrivateAttr()

    def __init__(self, status: int) -> None:
        super().__init__(max_tokens=None)
        request = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")
        response = httpx.Response(status, request=request)
        self._error = openai.APIStatusError("failed", response=response, body=None)

    def complete(self, *_: Any, **__: Any) -> Any:
        raise self._error

    async def acomplete(self, *_: Any, **__: Any) -> Any:
        raise self._error

    stream_chat, astream_chat = complete, acomplete


@pytest.mark.parametrize(("status", "slots"), [(503, 3), (400, 4)])
async def test_overload_error_cuts_slots_and_bad_request_does_not(
    reader: Reader, status: int, slots: int
) -> None:
    for streaming in (False, True):
        limiter = Limiter(concurrency="auto")
        llm = limiter.wrap(FailingLLM(status), retry=False)
        with pytest.raises(openai.APIStatusError):
            await (
                reader.read(llm) if streaming else reader.call(llm.acomplete, llm.complete, "hi")
            )
        assert limiter.concurrency == slots
        assert in_flight(limiter) == 0
