"""One model over several providers: each call is made with the model of the member that takes it."""

import asyncio
import operator
import pickle
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatResponse
from llama_index.core.callbacks import CallbackManager
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.anthropic import Anthropic
from llama_index.llms.openai import OpenAI

from asyncbucket import Limiter, Pool
from asyncbucket.llama_index import limiter_of
from tests.llama_index.conftest import (
    API_BASE,
    MESSAGES,
    PROMPT,
    Instrumentation,
    Person,
    Reader,
    ScriptedOpenAI,
    admitted,
    ask,
    charged,
    in_flight,
    make_azure,
    make_like,
    make_openai,
    make_responses,
)


def greet(name: str) -> str:
    """Greet."""
    return name


def break_down(api: ScriptedOpenAI) -> None:
    api.script.append(httpx.ConnectError("refused"))


TOOL = FunctionTool.from_defaults(greet)


@pytest.fixture
def pool() -> Pool:
    """Two members, of which the first one is preferred."""
    members = [Limiter("1000 RPM", "100k TPM", name=name, concurrency=2) for name in ("one", "two")]
    return Pool(*members, prefer="first")


@pytest.fixture
def llm(pool: Pool) -> OpenAI:
    llm: OpenAI = pool.wrap([make_openai(), make_azure()])
    return llm


def hosts_asked(api: ScriptedOpenAI) -> list[str]:
    """Return which model asked: OpenAI's and Azure's have paths of their own."""
    return ["two" if "/deployments/" in str(each.url) else "one" for each in api.requests]


def test_model_is_like_the_first(pool: Pool, llm: OpenAI) -> None:
    assert isinstance(llm, OpenAI)
    assert (llm.class_name(), llm.model, llm.metadata.is_function_calling_model) == (
        "openai_llm",
        "gpt-4o-mini",
        True,
    )
    assert limiter_of(llm) is pool
    assert pool.wrap([llm_a := make_openai(), make_azure()]).__dict__ is llm_a.__dict__


@pytest.mark.parametrize("member", ["one", "two"])
@pytest.mark.parametrize(
    ("method", "arguments", "shown"),
    [
        ("chat", (MESSAGES,), "hello there"),
        ("complete", ("hi",), "hello there"),
        ("chat_with_tools", ([TOOL], "hi"), "greet"),
        ("structured_predict", (Person, PROMPT), "Ada"),
        ("predict", (PROMPT,), "hello there"),
    ],
)
async def test_call_is_made_with_the_model_of_its_member(
    pool: Pool,
    llm: OpenAI,
    reader: Reader,
    openai_api: ScriptedOpenAI,
    member: str,
    method: str,
    arguments: Any,
    shown: str,
) -> None:
    if member == "two":
        pool.members[0].pause(60)
    kwargs = {"thing": "person"} if arguments[-1] is PROMPT else {}
    on_loop, here = getattr(llm, f"a{method}"), getattr(llm, method)

    reply = here(*arguments, **kwargs) if reader.is_sync else await on_loop(*arguments, **kwargs)

    assert shown in str(reply.model_dump() if isinstance(reply, ChatResponse) else reply)
    assert hosts_asked(openai_api) == [member]
    assert [admitted(each) for each in pool.members] == [member == "one", member == "two"]
    took = pool.members[member == "two"]
    assert charged(took) == [1, 18]  # as the usage says
    assert in_flight(pool) == in_flight(took) == 0


async def test_stream_is_read_from_its_member_and_ends_with_its_usage(
    pool: Pool, llm: OpenAI, reader: Reader, openai_api: ScriptedOpenAI
) -> None:
    openai_api.refuse(429, {"retry-after": "30"})

    items = await reader.read(llm)

    assert "".join(item.delta or "" for item in items) == "hellothere"
    assert hosts_asked(openai_api) == ["one", "two"]
    assert [charged(member)[0] for member in pool.members] == [1, 1]
    assert charged(pool.members[1]) == [1, 18]
    assert [member.statistics().paused > 0 for member in pool.members] == [True, False]
    assert in_flight(pool) == 0


async def test_stream_that_is_closed_or_cancelled_gives_its_slot_back(
    pool: Pool, llm: OpenAI, reader: Reader, openai_api: ScriptedOpenAI
) -> None:
    stream = await reader.begin(llm)
    await reader.next(stream)
    assert [in_flight(member) for member in pool.members] == [1, 0]
    await reader.close(stream)

    pool.pause(60)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await llm.achat(MESSAGES)

    assert [in_flight(pool), pool.statistics().waiting] == [0, 0]
    assert len(openai_api.requests) == 1


@pytest.mark.parametrize(
    "fail",
    [
        operator.methodcaller("refuse", 401, code="invalid_api_key"),
        operator.methodcaller("refuse", 429, code="insufficient_quota"),
        operator.methodcaller("refuse", 503),
        break_down,
    ],
    ids=["bad key", "empty account", "overloaded", "down"],
)
async def test_member_that_fails_is_left_out_and_its_call_made_with_another_model(
    pool: Pool,
    llm: OpenAI,
    reader: Reader,
    openai_api: ScriptedOpenAI,
    fail: Callable[[ScriptedOpenAI], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail(openai_api)

    replies = [await reader.call(llm.achat, llm.chat, MESSAGES) for _ in range(2)]

    assert [str(reply) for reply in replies] == ["assistant: hello there"] * 2
    assert hosts_asked(openai_api) == ["one", "two", "two"]
    assert [state.reason is None for state in pool.states()] == [False, True]
    assert sum("leaves out" in text for text in caplog.messages) == 1


async def test_errors_of_the_caller_and_the_last_error_of_all_members_are_raised(
    llm: OpenAI, openai_api: ScriptedOpenAI
) -> None:
    openai_api.refuse(400)
    with pytest.raises(openai.BadRequestError):
        await llm.achat(MESSAGES)
    openai_api.refuse(401, times=2)
    with pytest.raises(openai.AuthenticationError) as caught:
        await llm.achat(MESSAGES)

    assert hosts_asked(openai_api) == ["one", "one", "two"]
    tried, states = caught.value.__notes__
    assert "tried 2 times" in tried
    for name in ("one", "two"):
        assert f"{name!r}: left out for " in states


async def test_agents_and_structured_models_use_the_pool_and_a_run_is_one_agent(
    pool: Pool, llm: OpenAI, openai_api: ScriptedOpenAI
) -> None:
    structured = llm.as_structured_llm(Person)
    assert pool.wrap(structured) is structured
    reply = await structured.achat(MESSAGES)
    assert reply.raw == Person(name="Ada")
    chat = pool.child("chat")
    assert limiter_of(chat.wrap(llm)) is chat
    agent = pool.wrap(FunctionAgent(llm=chat.wrap(llm), tools=[], streaming=False))
    pool.members[0].pause(60)
    assert str(await ask(agent)) == "hello there"
    assert hosts_asked(openai_api) == ["one", "two"]
    agents = chat.statistics().agents
    assert agents is not None
    assert agents.running + agents.finished == 1


async def test_call_at_another_member_has_the_same_events_and_callbacks_that_are_set_later(
    pool: Pool, openai_api: ScriptedOpenAI, instrumentation: Instrumentation
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
    assert len(openai_api.requests) == 2


async def test_embeddings_come_from_any_member(
    pool: Pool, reader: Reader, openai_api: ScriptedOpenAI
) -> None:
    def make(key: str) -> OpenAIEmbedding:
        return OpenAIEmbedding(api_key=key, api_base=API_BASE)

    model = pool.wrap([make("one"), make("two")])
    await reader.call(model.aget_query_embedding, model.get_query_embedding, "hi")
    pool.members[0].pause(60)
    texts = ["a", "b", "c"]
    found = await reader.call(
        model.aget_text_embedding_batch, model.get_text_embedding_batch, texts
    )

    assert found == [[0.5, 0.5]] * 3
    keys = [each.headers["authorization"] for each in openai_api.requests]
    assert keys == ["Bearer one", "Bearer two"]
    assert [admitted(member) for member in pool.members] == [1, 1]


# --- what cannot be meant ---


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        (
            make_openai,
            TypeError,
            "one OpenAI calls one provider, and pool 'pool' has 2: wrap",
        ),
        (lambda: TOOL, TypeError, "a pool paces models: wrap a tool by a limiter of its own"),
        (lambda: [make_openai()], ValueError, r"in their order \('one', 'two'\), not 1"),
        (lambda: [make_openai(), TOOL], TypeError, "not FunctionTool beside OpenAI"),
        (
            lambda: [make_openai().as_structured_llm(Person)] * 2,
            TypeError,
            "wrap the models inside, and make the result structured afterwards",
        ),
        (lambda: [TOOL, TOOL], TypeError, "not FunctionTool beside FunctionTool"),
        (
            lambda: [make_openai(), MockEmbedding(embed_dim=2)],
            TypeError,
            "not MockEmbedding beside OpenAI",
        ),
        (
            lambda: [make_openai(), Anthropic(api_key="k")],
            TypeError,
            "Anthropic and OpenAI format tools and replies differently",
        ),
        (lambda: [make_openai(), make_responses()], TypeError, "OpenAIResponses and OpenAI format"),
        (lambda: [make_openai(), MockLLM()], TypeError, "MockLLM and OpenAI format tools"),
        (
            lambda: [make_openai(), Limiter("1 RPM").wrap(make_openai())],
            ValueError,
            "is paced already: give the pool what it was made of",
        ),
        (
            lambda: [OpenAIEmbedding(api_key="k"), OpenAIEmbedding(api_key="k", dimensions=5)],
            ValueError,
            "vectors of different models do not compare: dimensions is None at the first, and 5",
        ),
    ],
)
def test_models_that_cannot_serve_as_one_are_refused(
    pool: Pool, models: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pool.wrap(models())


@pytest.mark.parametrize("second", [make_azure, make_like, make_openai])
def test_models_of_one_family_may_differ(pool: Pool, second: Callable[[], Any]) -> None:
    assert isinstance(pool.wrap([make_openai(), second()]), OpenAI)


def test_model_of_a_pool_is_not_pickled(llm: OpenAI) -> None:
    with pytest.raises(TypeError, match="make pool and model in each process"):
        pickle.dumps(llm)


# --- calls inside calls ---


@pytest.mark.parametrize(("member", "paid"), [("one", [1, 0]), ("two", [1, 1])])
async def test_model_inside_pays_only_where_the_call_around_it_has_not(
    member: str, paid: list[int]
) -> None:
    one, two = (Limiter("1000 RPM", name=name, concurrency=1) for name in ("one", "two"))
    pool = Pool(one, two, prefer=lambda able: next(each for each in able if each.name == member))
    inner = one.wrap(MockLLM())

    class Forwarding(MockLLM):
        """A model that asks another one."""

        async def achat(self, messages: Any, **kwargs: Any) -> ChatResponse:
            reply: ChatResponse = await inner.achat(messages, **kwargs)
            return reply

    llm = pool.wrap([Forwarding(max_tokens=None), Forwarding(max_tokens=None)])

    await asyncio.wait_for(llm.achat(MESSAGES), 5)

    assert [admitted(one), admitted(two)] == paid
    assert (in_flight(one), in_flight(two)) == (0, 0)


async def test_tool_of_a_member_gives_up_its_slot_for_a_call_of_the_pool() -> None:
    member = Limiter("1000 RPM", name="one", concurrency=1)
    pool = Pool(member)
    llm = pool.wrap([MockLLM()])

    async def ask(question: str) -> str:
        return str(await llm.acomplete(question))

    tool: Any = member.child("tools").wrap(FunctionTool.from_defaults(async_fn=ask, name="ask"))

    assert str(await asyncio.wait_for(tool.acall("hi"), 5)) == "hi"
    assert (admitted(member), in_flight(member)) == (2, 0)
