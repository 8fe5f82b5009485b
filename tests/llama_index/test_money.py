"""Wrapped models reserve dollars, settle them by usage, and end well under a budget."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse
from llama_index.core.llms import MockLLM
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from asyncbucket import BudgetExceeded, Limiter, Pool, Price, UnknownPrice, budget
from asyncbucket.core.events import Released
from asyncbucket.llama_index import Retry
from asyncbucket.testing import RateLimitedProvider
from tests.llama_index.conftest import API_BASE, MESSAGES, Reader, ScriptedOpenAI, ask, make_openai

PRICES = {"gpt-4o-mini": Price(input=0.15, cached=0.075, output=0.60)}
#: Of the scripted reply: 11 * 0.15 + 7 * 0.60 micro-dollars, rounded up.
SETTLED = 6


def micro(amounts: Mapping[str, float]) -> int:
    return round(amounts["usd"] * 1e6)


@pytest.mark.parametrize("name", ["chat", "complete", "stream_chat", "stream_complete"])
def test_every_method_reserves_and_settles_dollars(name: str, openai_api: ScriptedOpenAI) -> None:
    limiter = Limiter("1 USD/day", prices=PRICES)
    reserved: list[int] = []
    limiter.observe(
        lambda event: reserved.append(event.cost["usd"]) if isinstance(event, Released) else None
    )
    llm = limiter.wrap(make_openai(model="gpt-4o-mini-2024-07-18", max_tokens=50), retry=1)
    with budget(usd=0.01) as capped:
        reply = getattr(llm, name)(MESSAGES if "chat" in name else "hi")
        list(reply) if "stream" in name else None
    assert len(openai_api.requests) == 1
    assert limiter.statistics().limits[0].used == micro(capped.spent) == SETTLED
    assert 50 * 0.6 + 40 * 0.15 < reserved[0] < 80  # as many tokens of input as bytes


def test_refused_and_retried_calls_spend_what_the_provider_charges(
    openai_api: ScriptedOpenAI,
) -> None:
    openai_api.refuse(500, times=2)
    limiter = Limiter(prices=PRICES)
    llm = limiter.wrap(make_openai(max_tokens=50), retry=Retry(attempts=3, backoff=0.001))
    with budget(usd=0.01, requests=5) as capped:
        llm.chat(MESSAGES)
    assert (micro(capped.spent), capped.spent["requests"], micro(capped.reserved)) == (
        SETTLED,
        3,
        0,
    )


def test_embeddings_cost_what_they_send(openai_api: ScriptedOpenAI) -> None:
    limiter = Limiter(prices={"text-embedding-3-*": Price(input=1)})
    model = limiter.wrap(
        OpenAIEmbedding(model="text-embedding-3-small", api_key="k", api_base="https://llm.test/v1")
    )
    with budget(usd=0.001) as capped:
        model.get_text_embedding_batch(["hi", "there"])
    assert len(openai_api.requests) == 1
    assert 0 < micro(capped.spent) <= 7


class Voting(OpenAI):
    """A model that asks three times for each chat, beneath what is paced."""

    async def achat(self, messages: Any, **_: Any) -> Any:
        return [await super(Voting, self).achat(messages) for _ in range(3)][-1]

    def chat(self, messages: Any, **_: Any) -> Any:
        return [super(Voting, self).chat(messages) for _ in range(3)][-1]


class Delegating(OpenAI):
    """The same, by methods of the model that are paced."""

    async def achat(self, messages: Any, **_: Any) -> Any:
        return [await self.acomplete(messages[0].content) for _ in range(3)][-1]

    def chat(self, messages: Any, **_: Any) -> Any:
        return [self.complete(messages[0].content) for _ in range(3)][-1]


@pytest.mark.parametrize("cls", [Voting, Delegating])
@pytest.mark.parametrize(
    ("cap", "requests"),
    [({"usd": 0.000_13}, 3), ({"usd": 0.000_063}, 1), ({"requests": 2}, 2), ({"requests": 3}, 3)],
)
async def test_each_of_several_requests_within_a_call_is_reserved_or_refused(
    openai_api: ScriptedOpenAI, reader: Reader, cls: Any, cap: Any, requests: int
) -> None:
    """One may cost some 60 micro-dollars; once it is known that it cost 6, the rest is left."""
    llm = Limiter(prices=PRICES).wrap(
        cls(model="gpt-4o-mini", api_key="k", api_base=API_BASE, max_tokens=50)
    )
    refused = contextlib.nullcontext() if requests == 3 else pytest.raises(BudgetExceeded)
    with budget(**cap) as capped, refused:
        await reader.call(llm.achat, llm.chat, [ChatMessage("hi " * 30)])
    assert len(openai_api.requests) == requests
    assert all(capped.spent[name] <= most for name, most in cap.items())


def test_call_in_a_pool_costs_what_the_model_of_its_member_costs(
    openai_api: ScriptedOpenAI,
) -> None:
    prices = {**PRICES, "gpt-4o": Price(input=2.5, output=10)}
    pool = Pool(
        *(Limiter(name=name, concurrency=1, prices=prices) for name in "ab"), prefer="first"
    )
    llm = pool.wrap([make_openai(max_tokens=50), make_openai(model="gpt-4o", max_tokens=50)])
    spent = []
    for calls in ("first", "second"):
        with budget(usd=1) as capped, contextlib.ExitStack() as stack:
            if calls == "second":
                stack.enter_context(pool.members[0].acquire_sync())
            llm.chat(MESSAGES)
        spent.append(micro(capped.spent))
    assert [body["model"] for body in openai_api.bodies] == ["gpt-4o-mini", "gpt-4o"]
    assert spent == [SETTLED, 98]  # 11 * 2.5 + 7 * 10, rounded up


class Offline(MockLLM):
    """A model without an SDK, which asks three times for each chat, and is refused at last."""

    def complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        if prompt == "2":
            raise APIError
        usage = {"prompt_tokens": 11, "completion_tokens": 7}
        return CompletionResponse(text="hello", raw={"usage": usage})

    def chat(self, *_: Any, **__: Any) -> Any:
        return [self.complete(str(number)) for number in range(3)]


class APIError(Exception):
    """An error of a provider, as SDKs raise it."""

    status_code = 400


def test_refusal_of_the_last_request_of_a_call_does_not_refund_those_before() -> None:
    llm = Limiter(prices={"*": PRICES["gpt-4o-mini"]}).wrap(Offline(max_tokens=9))
    with budget(usd=1) as capped, pytest.raises(APIError):
        llm.chat(MESSAGES)
    assert micro(capped.spent) >= 2 * SETTLED


async def test_requests_of_a_call_that_leave_together_do_not_exceed_a_cap() -> None:
    class Together(OpenAI):
        async def achat(self, *_: Any, **__: Any) -> Any:
            return await asyncio.gather(*(self.acomplete("hi") for _ in range(9)))

    async with RateLimitedProvider(latency=0.05) as provider:
        llm = Limiter(prices=PRICES).wrap(
            Together(model="gpt-4o-mini", api_key="k", api_base=provider.base_url, max_tokens=50)
        )
        with budget(usd=0.000_2) as capped, pytest.raises(BudgetExceeded):
            await llm.achat(MESSAGES)
        await asyncio.sleep(0.1)
        assert provider.statistics().requests < 5
    assert micro(capped.spent) <= 200


def test_model_without_a_price_fails_where_dollars_count() -> None:
    llm = Limiter().wrap(MockLLM(max_tokens=3))
    llm.chat(MESSAGES)
    with budget(usd=1), pytest.raises(UnknownPrice, match="a model without a name"):
        llm.chat(MESSAGES)
    with budget(usd=1) as capped:
        Limiter(prices={"*": Price(input=0)}).wrap(MockLLM(max_tokens=3)).chat(MESSAGES)
        assert capped.spent["usd"] == 0


def test_agents_end_with_an_answer_or_with_the_budget_and_sums_are_exact() -> None:
    """Each token costs a micro-dollar, so the provider's own count of tokens is one of dollars."""
    ends: list[object] = []

    async def lookup(question: str) -> str:
        """Look something up."""
        return f"nothing about {question}"

    async def main() -> tuple[int, int, list[Any]]:
        options: Any = {"latency": (0.0, 0.01), "charge": "usage", "reply_tokens": 20}
        async with RateLimitedProvider(rpm=60_000, tpm=10_000_000, **options) as provider:
            limiter = Limiter(concurrency=8, prices={"gpt-4o-mini": Price(input=1, output=1)})
            llm = limiter.wrap(OpenAI(model="gpt-4o-mini", api_key="k", api_base=provider.base_url))
            tools: Any = [FunctionTool.from_defaults(async_fn=lookup)]
            budgets = []

            async def run(number: int) -> None:
                agent = FunctionAgent(llm=llm, tools=tools)
                with budget(usd=0.000_9 if number % 2 else 0.000_2) as capped:
                    budgets.append(capped)
                    try:
                        ends.append(str(await ask(agent, f"question {number}")))
                    except BudgetExceeded as error:
                        ends.append(error)

            with budget(usd=1) as whole:
                await asyncio.gather(*(run(number) for number in range(12)))
            return provider.statistics().tokens, micro(whole.spent), budgets

    tokens, spent, budgets = asyncio.run(main())
    assert tokens == spent == sum(micro(each.spent) for each in budgets)
    assert {micro(each.reserved) for each in budgets} == {0}
    assert len(ends) == 12
    assert {type(end) for end in ends} == {str, BudgetExceeded}
