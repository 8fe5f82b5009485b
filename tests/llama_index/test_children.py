"""A model behind a child is charged once per level, and waits for nobody that waits for it."""

import asyncio
import contextlib
from typing import Any

import httpx
import pytest
from llama_index.core.llms import CustomLLM, MockLLM

import asyncbucket
from asyncbucket import CostExceedsLimit, Limiter
from asyncbucket.testing import RateLimitedProvider
from tests.llama_index.conftest import MESSAGES, ScriptedOpenAI, admitted, make_openai


class Outer(CustomLLM):
    """A model that calls another one."""

    inner: Any

    @property
    def metadata(self) -> Any:
        return self.inner.metadata

    def complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        return self.inner.complete(prompt)

    def stream_complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        return self.inner.stream_complete(prompt)


@pytest.mark.parametrize("at_the_root", [True, False])
def test_inner_model_at_child_does_not_wait_for_outer_models_slot(*, at_the_root: bool) -> None:
    limiter = Limiter("100 RPM", concurrency=1, timeout=5)
    inner = limiter.child("chat").wrap(MockLLM(max_tokens=2))
    outer = (limiter if at_the_root else limiter.child("router")).wrap(Outer(inner=inner))
    assert outer.complete("hi").text == "text text"
    assert [each.delta for each in outer.stream_complete("hi")] == ["text ", "text"]
    now = limiter.statistics()
    assert (now.admitted, now.in_flight, now.overridden) == (4, 0, 0)
    assert limiter.children["chat"].statistics().admitted == 2


async def test_model_does_not_deadlock_with_its_http_client_at_sibling() -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    provider = RateLimitedProvider()
    transport = limiter.child("http").transport(provider.mock_transport())
    async with httpx.AsyncClient(transport=transport) as client:
        llm = limiter.child("chat").wrap(make_openai(async_http_client=client))
        async with asyncio.timeout(60):
            await asyncio.gather(llm.acomplete("hi"), llm.acomplete("hi"))
    assert [admitted(each) for each in (limiter, *limiter.children.values())] == [4, 2, 2]
    assert (limiter.statistics().in_flight, limiter.statistics().overridden) == (0, 0)


def test_output_forecast_is_cut_to_lowest_limit_of_any_level() -> None:
    limiter = Limiter("100 TPM")
    chat = limiter.child("chat", "10k TPM")
    chat.wrap(MockLLM()).complete("hi")
    assert [admitted(each) for each in (limiter, chat)] == [1, 1]
    with pytest.raises(CostExceedsLimit, match="exceeds the limit of 100 tokens"):
        chat.wrap(MockLLM(max_tokens=200)).complete("hi")


async def test_429_at_a_child_pauses_highest_level_with_limits(openai_api: ScriptedOpenAI) -> None:
    everything = Limiter(concurrency=100)
    openai = everything.child("openai", "100 RPM")
    acme = openai.child("acme", rpm=50)
    openai_api.refuse(429, {"retry-after": "30"})
    with pytest.raises(Exception, match="scripted"):
        await acme.wrap(make_openai(), retry=False).achat(MESSAGES)
    assert 25 < openai.statistics().paused <= 30
    assert everything.statistics().paused == acme.statistics().paused == 0


@pytest.mark.parametrize("tenant", ["", "/*"])
async def test_retried_event_names_limiter_that_admitted_the_call(
    openai_api: ScriptedOpenAI, tenant: str
) -> None:
    limiter = Limiter("100 RPM", name="openai")
    heard: list[str] = []
    limiter.observe(lambda event: heard.append(f"{type(event).__name__} {event.limiter}"))
    openai_api.refuse(503, {"retry-after-ms": "1"})
    llm = limiter.child("chat").wrap(make_openai())
    with asyncbucket.tenant("acme") if tenant else contextlib.nullcontext():
        await llm.achat(MESSAGES)
    assert heard.count(f"Admitted openai/chat{tenant}") == 2
    assert heard.count(f"Retried openai/chat{tenant}") == 1
