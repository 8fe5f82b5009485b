"""Wrapped models reserve dollars, settle them by usage, and end well under a budget."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAI
from openai import BadRequestError

from asyncbucket import BudgetExceeded, Limiter, Pool, Price, budget
from asyncbucket.engine.events import Released
from asyncbucket.llama_index import Retry
from asyncbucket.testing import RateLimitedProvider
from tests.llama_index.conftest import API_BASE, MESSAGES, FakeAPI, Reader, ask, make_openai

#: A token costs a micro-dollar, so the provider's own count of tokens is one of dollars.
PRICES = {"gpt-4o-mini": Price(input=1, output=1), "gpt-4o": Price(input=20, output=20)}


def micro(amounts: Mapping[str, float]) -> int:
    return round(amounts["usd"] * 1e6)


@pytest.mark.parametrize("name", ["chat", "stream_complete"])
def test_call_reserves_the_most_it_can_cost_and_settles(name: str, api: FakeAPI) -> None:
    limiter = Limiter("1 USD/day", prices=PRICES)
    reserved: list[int] = []
    limiter.observe(
        lambda event: reserved.append(event.cost["usd"]) if isinstance(event, Released) else None
    )
    llm = limiter.wrap(make_openai(model="gpt-4o-mini-2024-07-18", max_tokens=50), retry=1)
    with budget(usd=0.01) as capped:
        reply = getattr(llm, name)(MESSAGES if "chat" in name else "hi")
        list(reply) if "stream" in name else None
    assert limiter.statistics().limits[0].used == micro(capped.spent) == api.tokens
    assert 50 + len(api.requests[0].content) <= reserved[0] < 400  # a token is a byte


def test_retried_call_spends_what_the_provider_charges(api: FakeAPI) -> None:
    api.refuse(500, times=2)
    limiter = Limiter(prices=PRICES)
    llm = limiter.wrap(make_openai(max_tokens=50), retry=Retry(attempts=3, backoff=0.001))
    with budget(usd=0.01, requests=5) as capped:
        llm.chat(MESSAGES)
    assert micro(capped.spent) == api.tokens
    assert (capped.spent["requests"], micro(capped.reserved)) == (3, 0)


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


def voting(cls: Any, *, api_base: str = API_BASE) -> Any:
    return cls(model="gpt-4o-mini", api_key="k", api_base=api_base, max_tokens=50)


@pytest.mark.parametrize("cls", [Voting, Delegating])
@pytest.mark.parametrize(
    ("cap", "requests"), [({"usd": 0.004}, 3), ({"usd": 0.0006}, 1), ({"requests": 2}, 2)]
)
async def test_each_of_several_requests_within_a_call_is_reserved_or_refused(
    api: FakeAPI, reader: Reader, cls: Any, cap: Any, requests: int
) -> None:
    """Each may cost some 400 micro-dollars."""
    llm = Limiter(prices=PRICES).wrap(voting(cls))
    refused = contextlib.nullcontext() if requests == 3 else pytest.raises(BudgetExceeded)
    with budget(**cap) as capped, refused:
        await reader.call(llm, "chat", [ChatMessage("hi " * 30)])
    assert len(api.requests) == requests
    assert all(capped.spent[name] <= most for name, most in cap.items())


def test_call_in_a_pool_costs_what_its_members_model_does(api: FakeAPI) -> None:
    members = [Limiter(name=name, concurrency=1, prices=PRICES) for name in "ab"]
    pool = Pool(*members, prefer="first")
    llm = pool.wrap([make_openai(max_tokens=50), make_openai(model="gpt-4o", max_tokens=50)])
    with budget(usd=1) as first:
        llm.chat(MESSAGES)
    with budget(usd=1) as second, pool.members[0].acquire_sync():
        llm.chat(MESSAGES)
    assert [body["model"] for body in api.bodies] == ["gpt-4o-mini", "gpt-4o"]
    assert micro(first.spent) == api.tokens // 2
    assert micro(second.spent) == 20 * micro(first.spent)


def test_refusal_of_a_calls_last_request_refunds_none_before(api: FakeAPI) -> None:
    api.script = [None, None]
    api.refuse(400)
    llm = Limiter(prices=PRICES).wrap(voting(Voting))
    with budget(usd=1) as capped, pytest.raises(BadRequestError):
        llm.chat(MESSAGES)
    assert micro(capped.spent) >= api.tokens > 0


async def test_requests_of_a_call_that_leave_together_do_not_exceed_a_cap() -> None:
    class Together(OpenAI):
        async def achat(self, *_: Any, **__: Any) -> Any:
            return await asyncio.gather(*(self.acomplete("hi") for _ in range(9)))

    async with RateLimitedProvider(latency=0.05) as provider:
        llm = Limiter(prices=PRICES).wrap(voting(Together, api_base=provider.base_url))
        with budget(usd=0.001) as capped, pytest.raises(BudgetExceeded):
            await llm.achat(MESSAGES)
        await asyncio.sleep(0.1)
        assert provider.statistics().requests < 5
    assert micro(capped.spent) <= 1_000


async def test_agents_end_with_an_answer_or_with_the_budget_and_sums_are_exact() -> None:
    ends, budgets = list[object](), list[Any]()

    async def lookup(question: str) -> str:
        """Look something up."""
        return f"nothing about {question}"

    async def run(llm: Any, number: int) -> None:
        agent = FunctionAgent(llm=llm, tools=[FunctionTool.from_defaults(async_fn=lookup)])
        with budget(usd=0.000_9 if number % 2 else 0.000_2) as capped:
            budgets.append(capped)
            try:
                ends.append(str(await ask(agent, f"question {number}")))
            except BudgetExceeded as error:
                ends.append(error)

    provider = RateLimitedProvider(latency=(0.0, 0.01), charge="usage", reply_tokens=20)
    async with provider:
        llm = Limiter(concurrency=8, prices=PRICES).wrap(make_openai(api_base=provider.base_url))
        with budget(usd=1) as whole:
            await asyncio.gather(*(run(llm, number) for number in range(12)))
        await llm._get_aclient().close()
    tokens = provider.statistics().tokens
    assert tokens == micro(whole.spent) == sum(micro(each.spent) for each in budgets)
    assert {micro(each.reserved) for each in budgets} == {0}
    assert len(ends) == 12
    assert {type(end) for end in ends} == {str, BudgetExceeded}
