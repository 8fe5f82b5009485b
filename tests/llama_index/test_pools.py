"""One model over several providers: each call is made with the model of the member that takes it."""

import asyncio
import pickle
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import MockLLM
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from asyncbucket import Limiter, Pool
from asyncbucket.llama_index import limiter_of
from tests.llama_index.conftest import (
    API_BASE,
    MESSAGES,
    PROMPT,
    TOOL,
    FakeAPI,
    Instrumentation,
    Person,
    Reader,
    admitted,
    ask,
    charged,
    in_flight,
    make_anthropic,
    make_azure,
    make_like,
    make_openai,
    make_responses,
)


@pytest.fixture
def pool() -> Pool:
    """Two members, of which the first one is preferred."""
    members = [Limiter("1000 RPM", "100k TPM", name=name, concurrency=2) for name in ("one", "two")]
    return Pool(*members, prefer="first")


@pytest.fixture
def llm(pool: Pool) -> OpenAI:
    llm: OpenAI = pool.wrap([make_openai(), make_azure()])
    return llm


def hosts_asked(api: FakeAPI) -> list[str]:
    """Return which model asked: OpenAI's and Azure's have paths of their own."""
    return ["two" if "/deployments/" in str(each.url) else "one" for each in api.requests]


@pytest.mark.parametrize("member", ["one", "two"])
@pytest.mark.parametrize(
    "call",
    [("chat", MESSAGES), ("chat_with_tools", [TOOL], "hi"), ("structured_predict", Person, PROMPT)],
)
async def test_call_is_made_with_the_model_of_its_member(
    pool: Pool, llm: OpenAI, reader: Reader, api: FakeAPI, member: str, call: Any
) -> None:
    if member == "two":
        pool.members[0].pause(60)
    method, *arguments = call
    assert await reader.call(llm, method, *arguments)

    assert hosts_asked(api) == [member]
    took = pool.members[member == "two"]
    assert (admitted(pool.members[0]), charged(took)) == (member == "one", [1, api.tokens])
    assert in_flight(pool) == in_flight(took) == 0


async def test_stream_is_read_from_its_member_and_ends_with_its_usage(
    pool: Pool, llm: OpenAI, reader: Reader, api: FakeAPI
) -> None:
    api.refuse(429, {"retry-after": "30"})

    items = await reader.read(llm)

    assert "".join(item.delta or "" for item in items) == "You said: hi"
    assert hosts_asked(api) == ["one", "two"]
    assert [charged(member)[0] for member in pool.members] == [1, 1]
    assert charged(pool.members[1]) == [1, api.tokens]
    assert [member.statistics().paused > 0 for member in pool.members] == [True, False]
    assert in_flight(pool) == 0


async def test_member_that_fails_is_left_out_and_its_call_made_with_another_model(
    pool: Pool, llm: OpenAI, reader: Reader, api: FakeAPI
) -> None:
    api.script.append(httpx.ConnectError("refused"))

    replies = [await reader.call(llm, "chat", MESSAGES) for _ in range(2)]

    assert [str(reply) for reply in replies] == ["assistant: You said: hi"] * 2
    assert hosts_asked(api) == ["one", "two", "two"]
    assert [state.left_out == 0 for state in pool.states()] == [False, True]


async def test_agents_use_the_pool(pool: Pool, llm: OpenAI, api: FakeAPI) -> None:
    structured = llm.as_structured_llm(Person)
    assert pool.wrap(structured) is structured
    assert (await structured.achat(MESSAGES)).raw == Person(name="text")
    agent = pool.wrap(FunctionAgent(llm=pool.child("chat").wrap(llm), streaming=False))
    pool.members[0].pause(60)
    assert str(await ask(agent)) == "You said: look up 1 and 2"
    assert hosts_asked(api) == ["one", "two"]
    assert admitted(pool.children["chat"]) == 1


async def test_call_at_another_member_has_the_same_events_and_callbacks_that_are_set_later(
    pool: Pool, api: FakeAPI, instrumentation: Instrumentation
) -> None:
    second = make_azure()
    llm = pool.wrap([make_openai(), second])
    await second.achat(MESSAGES)
    plain = instrumentation.take()
    llm.callback_manager = manager = CallbackManager()  # pyright: ignore[reportEmptyAbstractUsage]
    pool.members[0].pause(60)

    await llm.achat(MESSAGES)

    assert instrumentation.take() == plain
    assert second.callback_manager is manager
    assert len(api.requests) == 2


async def test_embeddings_come_from_any_member(pool: Pool, reader: Reader, api: FakeAPI) -> None:
    model = pool.wrap([OpenAIEmbedding(api_key=key, api_base=API_BASE) for key in ("one", "two")])
    for _ in range(2):
        await reader.call(model, "get_query_embedding", "hi")
        pool.members[0].pause(60)
    keys = [each.headers["authorization"] for each in api.requests]
    assert keys == ["Bearer one", "Bearer two"]


# --- what cannot be meant ---


SERVE = (
    r"pool 'pool' needs one model for each member, in their order \('one', 'two'\), LLMs of one "
    r"family, .* with the same model_name and dimensions, .* paced already, or structured; not "
)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            make_openai,
            "one OpenAI calls one provider, and pool 'pool' has 2: wrap one model for each",
        ),
        (lambda: TOOL, "a tool by a limiter of its own"),
        (lambda: [make_openai()], f"{SERVE}OpenAI$"),
        (lambda: [TOOL, TOOL], f"{SERVE}FunctionTool, FunctionTool"),
        (lambda: [make_openai().as_structured_llm(Person)] * 2, f"{SERVE}StructuredLLM, "),
        (lambda: [make_openai(), make_anthropic()], f"{SERVE}OpenAI, Anthropic"),
        (lambda: [make_openai(), make_responses()], f"{SERVE}OpenAI, OpenAIResponses"),
        (lambda: [make_openai(), Limiter("1 RPM").wrap(make_openai())], f"{SERVE}OpenAI, OpenAI"),
        (lambda: [OpenAIEmbedding(api_key="k"), make_openai()], f"{SERVE}OpenAIEmbedding, OpenAI"),
        (
            lambda: [OpenAIEmbedding(api_key="k"), OpenAIEmbedding(api_key="k", dimensions=5)],
            f"{SERVE}OpenAIEmbedding, OpenAIEmbedding",
        ),
    ],
)
def test_unlike_models_are_refused(pool: Pool, models: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pool.wrap(models())


def test_model_of_a_pool_is_like_the_first_and_the_others_of_its_family(pool: Pool) -> None:
    for second in (make_azure(), make_like(), make_openai()):
        first = make_openai()
        llm = pool.wrap([first, second])
        assert (type(llm).__bases__[-1], limiter_of(llm)) == (OpenAI, pool)
        assert vars(llm) is vars(first)


def test_model_of_a_pool_is_not_pickled(llm: OpenAI) -> None:
    with pytest.raises(TypeError, match="make pool and model in each process"):
        pickle.dumps(llm)


# --- calls inside calls ---


@pytest.mark.parametrize(("member", "paid"), [("one", [1, 0]), ("two", [1, 1])])
async def test_inner_call_pays_only_where_the_outer_has_not(member: str, paid: list[int]) -> None:
    one, two = (Limiter("1000 RPM", name=name, concurrency=1) for name in ("one", "two"))
    pool = Pool(*(one, two) if member == "one" else (two, one), prefer="first")
    inner = one.wrap(MockLLM())

    class Forwarding(MockLLM):
        """A model that asks another one."""

        async def achat(self, *args: Any, **kwargs: Any) -> Any:
            return await inner.achat(*args, **kwargs)

    llm = pool.wrap([Forwarding(max_tokens=None), Forwarding(max_tokens=None)])

    await asyncio.wait_for(llm.achat(MESSAGES), 5)

    assert [admitted(one), admitted(two)] == paid
    assert (in_flight(one), in_flight(two)) == (0, 0)
