"""A wrapped model is still the model: its class, its fields, its name."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import openai
import pytest
from llama_index.core import Settings
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.llms import LLM, ChatMessage, CompletionResponse, MockLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI

from asyncbucket import Limiter, pace
from asyncbucket.llama_index import (
    DefaultEstimator,
    RateLimitedEmbedding,
    RateLimitedLLM,
    limiter_of,
)
from tests.llama_index.conftest import KEY, Person, admitted, charged, some_models


class PacedOpenAI(RateLimitedLLM, OpenAI):
    """A paced class, as the docs tell users to write it."""


class PacedMockEmbedding(RateLimitedEmbedding, MockEmbedding):
    """The same for an embedding model."""


def predict_ada(*_: Any, **__: Any) -> Person:
    return Person(name="Ada")


def named(model: object) -> str:
    return type(model).__name__


@pytest.mark.parametrize("inner", some_models(), ids=named)
def test_wrapped_model_keeps_its_class_and_serialises_like_the_inner_one(inner: Any) -> None:
    paced = Limiter("100 RPM").wrap(inner)

    assert isinstance(paced, type(inner))
    assert isinstance(paced, FunctionCallingLLM) == isinstance(inner, FunctionCallingLLM)
    assert paced.class_name() == inner.class_name()
    assert type(paced).__name__ == type(inner).__name__  # as spans are called
    assert paced.to_dict() == inner.to_dict()
    assert paced.to_payload() == inner.to_payload()
    assert type(paced).model_fields.keys() == type(inner).model_fields.keys()
    schema, inner_schema = type(paced).model_json_schema(), type(inner).model_json_schema()
    assert schema["properties"] == inner_schema["properties"]
    if isinstance(inner, BaseEmbedding):
        nodes = [TextNode(text="a")]
        assert get_transformation_hash(nodes, paced) == get_transformation_hash(nodes, inner)


def test_wrapping_leaves_inner_model_unchanged() -> None:
    client = AsyncOpenAI(api_key=KEY, max_retries=4)
    inner = OpenAI(api_key=KEY, max_retries=7, async_openai_client=client)
    fields, private = dict(vars(inner)), dict(inner.__pydantic_private__ or {})

    Limiter("100 RPM").wrap(inner)

    assert vars(inner) == fields
    assert inner.__pydantic_private__ == private
    assert inner._aclient is client
    assert (client.max_retries, type(client)) == (4, AsyncOpenAI)


def test_models_own_limiter_field_and_helpers_still_work() -> None:
    class Mine(MockLLM):
        limiter: str = "mine"

        def _get_client(self, region: str) -> str:
            return region

        def _stream(self, prompt: str) -> list[str]:
            return [prompt, self.limiter, self._get_client("eu")]

        def complete(self, prompt: str, *_: Any, **__: Any) -> CompletionResponse:
            return CompletionResponse(text=" ".join(self._stream(prompt)))

    limiter = Limiter("100 RPM")
    paced = limiter.wrap(Mine(max_tokens=None))

    assert paced.complete("hi").text == "hi mine eu"
    assert paced.chat([ChatMessage("hi")]).message.content == "user: hi\nassistant:  mine eu"
    assert admitted(limiter) == 2


def test_limiter_of_finds_the_limiter_of_whatever_is_paced() -> None:
    limiter = Limiter("100 RPM")
    paced: Any = limiter.wrap([MockLLM(), MockLLM().as_structured_llm(Person), print])

    assert [limiter_of(each) for each in paced] == [limiter] * 3
    with pytest.raises(TypeError, match=r"MockLLM.* is not paced: limiter.wrap\(...\) and pace"):
        limiter_of(MockLLM())


def test_wrapped_model_repr_shows_limiter_and_no_api_key() -> None:
    paced = Limiter("100 RPM", name="mine").wrap(OpenAI(model="gpt-4o-mini", api_key=KEY))

    assert repr(paced).startswith("OpenAI(model='gpt-4o-mini', limiter=<Limiter 'mine'")
    assert KEY not in repr(paced) + str(paced)


def test_rewrapping_with_options_returns_new_model_charged_once() -> None:
    limiter = Limiter("100 RPM")
    paced = limiter.wrap(MockLLM(max_tokens=2))

    again = limiter.wrap(paced, retry=1)
    again.complete("hi")

    assert limiter.wrap(paced) is paced is not again
    assert type(again) is type(paced)
    assert admitted(limiter) == 1


class Spec:
    """A tool spec."""

    def to_tool_list(self) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: AsyncOpenAI(api_key="k"),
            "is paced where it sends: AsyncOpenAI(http_client=limiter.http_client(), max_retries=0)",
        ),
        (
            lambda: openai.OpenAI(api_key="k"),
            "sends: OpenAI(http_client=limiter.http_client(sync=True), max_retries=0)",
        ),
        (lambda: "gpt-4o", "not str; pace other code by `async with"),
        (lambda: Limiter("1 RPM"), "not Limiter; pace other code by `async with"),
        (lambda: MockLLM, "not its class: limiter.wrap(MockLLM(...))"),
        (Spec, "wrap the tools of Spec: limiter.wrap(spec.to_tool_list())"),
        (
            lambda: FunctionAgent(name="f", description="f", llm=MockLLM(), tools=[]),
            "wrap what FunctionAgent is made of: its llm, and its tools if it has any",
        ),
    ],
)
def test_error_for_what_cannot_be_wrapped_names_the_remedy(
    make: Callable[[], Any], said: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        Limiter("100 RPM").wrap(make())


@pytest.mark.parametrize("estimator", [5, DefaultEstimator])
def test_object_that_is_not_an_estimator_is_refused(estimator: Any) -> None:
    with pytest.raises(TypeError, match=r"must have chat\(\), completion\(\) or embedding"):
        Limiter("1 RPM").wrap(MockLLM(), estimator=estimator)


def test_pace_creates_its_own_limiter() -> None:
    paced = pace(MockLLM(max_tokens=2), rpm=100, concurrency=2, name="own")

    paced.complete("hi")

    limiter = limiter_of(paced)
    assert (limiter.name, limiter.statistics().admitted, limiter.concurrency) == ("own", 1, 2)


def test_settings_and_agents_keep_wrapped_model_object() -> None:
    limiter = Limiter("100 RPM")
    llm, embed_model = limiter.wrap(OpenAI(api_key=KEY)), limiter.wrap(MockEmbedding(embed_dim=2))
    before = Settings._llm, Settings._embed_model
    try:
        Settings.llm, Settings.embed_model = llm, embed_model
        assert Settings.llm is llm
        assert Settings.embed_model is embed_model
    finally:
        Settings._llm, Settings._embed_model = before

    agents: list[Any] = [
        cls(name="a", description="a", llm=llm, tools=[]) for cls in (FunctionAgent, ReActAgent)
    ]
    workflow = AgentWorkflow(agents=agents[:1], root_agent="a")

    assert [each.llm is llm for each in (*agents, workflow.agents["a"])] == [True] * 3


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("inner", [MockLLM(max_tokens=2), FunctionTool.from_defaults(predict_ada)])
def test_copy_is_paced_by_the_same_limiter(make_copy: Any, inner: Any) -> None:
    limiter = Limiter("100 RPM")
    paced: Any = limiter.wrap(inner)

    twin = make_copy(paced)
    assert twin.complete("hi") if isinstance(inner, LLM) else twin()

    assert twin is not paced
    assert twin.limiter is limiter
    assert admitted(limiter) == 1


def test_mixin_class_takes_model_arguments_and_limiter() -> None:
    limiter = Limiter("100 RPM")

    llm = PacedOpenAI(model="gpt-4o-mini", api_key=KEY, max_retries=7, limiter=limiter)

    assert (llm.model, llm.limiter, llm.max_retries) == ("gpt-4o-mini", limiter, 0)
    assert llm.to_dict() == OpenAI(model="gpt-4o-mini", api_key=KEY, max_retries=7).to_dict()
    assert limiter.wrap(llm) is llm
    assert PacedOpenAI.model_fields.keys() == OpenAI.model_fields.keys()
    assert PacedOpenAI.model_fields["max_retries"].default == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "required keyword-only argument: 'limiter'"),
        ({"limiter": 500}, "limiter= takes a Limiter, not 500"),
    ],
)
def test_mixin_class_without_a_limiter_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        PacedOpenAI(api_key=KEY, **options)


@pytest.mark.parametrize(
    ("model", "mixin"), [(OpenAI, RateLimitedLLM), (MockEmbedding, RateLimitedEmbedding)]
)
def test_mixin_listed_after_model_class_is_refused(model: type[Any], mixin: type[Any]) -> None:
    right = rf"Mine would not be paced: .*; write class Mine\({mixin.__name__}, {model.__name__}\)$"

    with pytest.raises(TypeError, match=right):
        type("Mine", (model, mixin), {})


def test_fields_are_shared_with_the_inner_model_but_max_retries_reads_zero() -> None:
    inner = OpenAI(api_key=KEY)
    paced = Limiter("100 RPM").wrap(inner)
    manager: Any = Settings.callback_manager

    paced.callback_manager = manager
    inner.temperature = 0.7
    paced.max_retries = 8

    assert (inner.callback_manager, inner.max_retries) == (manager, 8)
    assert paced.temperature == 0.7
    object.__setattr__(paced, "max_retries", 9)

    assert (paced.max_retries, inner.max_retries, paced.to_dict()["max_retries"]) == (0, 9, 9)


def test_missing_llama_index_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['llama_index.core'] = None\n"
        "from asyncbucket import pace\n"
        "try: pace(object(), rpm=1)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert 'pip install "asyncbucket[llama-index]"' in done.stdout


def unnamed(function: Any) -> Any:
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


def embed_half(*_: Any) -> list[float]:
    return [0.5]


def test_methods_replaced_by_functions_of_other_names_are_paced() -> None:
    class Decorated(MockEmbedding):
        _get_text_embeddings = unnamed(MockEmbedding._get_text_embeddings)

    class Structured(MockLLM):
        structured_predict = unnamed(predict_ada)
        complete = unnamed(MockLLM.complete)

    limiter = Limiter("100 RPM")
    llm = limiter.wrap(Structured(max_tokens=2))

    limiter.wrap(Decorated(embed_dim=2)).get_text_embedding_batch(["a", "b"])
    with patch.object(MockEmbedding, "_get_text_embedding", new=embed_half):
        limiter.wrap(MockEmbedding(embed_dim=2)).get_text_embedding("a")
    assert llm.structured_predict(Person, PromptTemplate("")).name == "Ada"
    llm.complete("hi")

    assert charged(limiter) == [2 + 1 + 1 + 1]


@pytest.mark.parametrize("name", ["complete", "chat", "structured_predict"])
async def test_call_without_its_argument_raises_the_models_own_error(name: str) -> None:
    limiter = Limiter("100 RPM")
    paced = limiter.wrap(MockLLM())

    with pytest.raises((TypeError, ValueError)) as plain:
        getattr(MockLLM(), name)()
    with pytest.raises(type(plain.value), match=re.escape(str(plain.value))):
        getattr(paced, name)()
    with pytest.raises(type(plain.value)):
        await getattr(paced, f"a{name}")()

    assert admitted(limiter) == 0
