"""A model or tool behind a child is charged once per level, and can be moved further down."""

import asyncio
import contextlib
from typing import Any

import httpx
import pytest
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.tools import FunctionTool

import asyncbucket
from asyncbucket import CostExceedsLimit, Limiter
from asyncbucket.llama_index import RateLimitedLLM, limiter_of
from asyncbucket.llama_index.models import pacing_of
from asyncbucket.testing import RateLimitedProvider
from tests.llama_index.conftest import MESSAGES, ScriptedOpenAI, admitted, make_openai


def add(a: int, b: int) -> int:
    return a + b


def test_child_may_be_a_name_or_any_descendant_and_nothing_else() -> None:
    limiter = Limiter("100 RPM", name="openai")
    deep = limiter.child("acme").child("chat")

    named = [limiter_of(limiter.wrap(MockLLM(), child="chat")) for _ in range(2)]
    assert named == [limiter.children["chat"]] * 2
    for child in (deep, limiter.key("acme"), limiter):
        assert limiter_of(limiter.wrap(MockLLM(), child=child)) is child
    with pytest.raises(ValueError, match=r"<Limiter 'openai', .*> is not under <Limiter 'openai/"):
        deep.wrap(MockLLM(), child=limiter)


def test_paced_model_can_be_moved_to_a_descendant() -> None:
    limiter = Limiter("100 RPM")
    first = limiter.wrap(MockLLM(max_tokens=3), retry=2)
    acme = limiter.child("acme")

    second = acme.wrap(first)
    third = limiter.wrap(first, child="chat")
    second.complete("hi")
    third.complete("hi")

    assert type(second) is type(first)
    assert isinstance(second, RateLimitedLLM)
    assert second.limiter is acme
    assert isinstance(first, RateLimitedLLM)
    assert pacing_of(second).options["retry"] == 2
    assert pacing_of(second).estimator is pacing_of(first).estimator
    assert [admitted(each) for each in (limiter, acme, limiter.children["chat"])] == [2, 1, 1]


def test_paced_tool_moved_to_a_descendant_keeps_its_cost() -> None:
    limiter = Limiter("100 RPM", "100 images/m")
    tool = limiter.wrap(FunctionTool.from_defaults(add), cost={"images": 2})

    moved = limiter.wrap(tool, child="tools")
    moved(a=1, b=2)

    assert [admitted(each) for each in (limiter, limiter.children["tools"])] == [1, 1]
    assert limiter.statistics().limits[1].used == 2


@pytest.mark.parametrize("thing", [MockLLM(), FunctionTool.from_defaults(add)])
def test_paced_object_is_refused_by_sibling_and_unrelated_limiter(thing: Any) -> None:
    limiter = Limiter("100 RPM", name="openai")
    paced = limiter.wrap(thing, child="chat")

    for other in (limiter.child("embeddings"), Limiter("100 RPM", name="b")):
        with pytest.raises(
            ValueError,
            match=rf"<Limiter 'openai/chat', .* paced already and can't be paced by "
            rf"<Limiter '{other.name}', .* make one of them a child of the other",
        ):
            other.wrap(paced)


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


def test_inner_model_is_not_charged_where_outer_model_has_paid() -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    inner = limiter.wrap(MockLLM(max_tokens=2))

    limiter.wrap(Outer(inner=inner), child="chat").complete("hi")

    assert [admitted(each) for each in (limiter, limiter.children["chat"])] == [1, 1]


@pytest.mark.parametrize(("outside", "inside"), [(None, "chat"), ("router", "chat")])
def test_inner_model_at_child_does_not_wait_for_outer_models_slot(
    outside: str | None, inside: str
) -> None:
    limiter = Limiter("100 RPM", concurrency=1, timeout=5)
    inner = limiter.wrap(MockLLM(max_tokens=2), child=inside)
    outer = limiter.wrap(Outer(inner=inner), child=outside)

    assert outer.complete("hi").text == "text text"
    assert [each.delta for each in outer.stream_complete("hi")] == ["text ", "text"]

    now = limiter.statistics()
    assert (now.admitted, now.in_flight, now.overridden) == (4, 0, 0)
    assert limiter.children[inside].statistics().admitted == 2
    assert "concurrency 0/1" in repr(limiter)


async def test_model_does_not_deadlock_with_its_http_client_at_sibling() -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    provider = RateLimitedProvider()
    transport = limiter.child("http").transport(provider.mock_transport())
    async with httpx.AsyncClient(transport=transport) as client:
        plain = make_openai(async_http_client=client)
        llm = limiter.wrap(plain, child="chat")
        async with asyncio.timeout(60):
            await asyncio.gather(llm.acomplete("hi"), llm.acomplete("hi"))

    assert [admitted(each) for each in (limiter, *limiter.children.values())] == [4, 2, 2]
    assert (limiter.statistics().in_flight, limiter.statistics().overridden) == (0, 0)


def test_output_forecast_is_cut_to_lowest_limit_of_any_level() -> None:
    limiter = Limiter("100 TPM")
    chat = limiter.child("chat", "10k TPM")

    limiter.wrap(MockLLM(), child=chat).complete("hi")

    assert [admitted(each) for each in (limiter, chat)] == [1, 1]
    with pytest.raises(CostExceedsLimit, match="exceeds the limit of 100 tokens"):
        limiter.wrap(MockLLM(max_tokens=200), child=chat).complete("hi")


async def test_429_at_a_child_pauses_the_highest_level_with_limits(
    openai_api: ScriptedOpenAI,
) -> None:
    everything = Limiter(concurrency=100)
    openai = everything.child("openai", "100 RPM")
    acme = openai.child("acme", rpm=50)
    openai_api.refuse(429, {"retry-after": "30"})

    with pytest.raises(Exception, match="scripted"):
        await openai.wrap(make_openai(), child=acme, retry=False).achat(MESSAGES)

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
    llm = limiter.wrap(make_openai(), child="chat")

    with asyncbucket.tenant("acme") if tenant else contextlib.nullcontext():
        await llm.achat(MESSAGES)

    assert heard.count(f"Admitted openai/chat{tenant}") == 2
    assert [each for each in heard if each.startswith("Retried")] == [
        f"Retried openai/chat{tenant}"
    ]
