"""A wrapped model is still the model: its class, its fields, its name."""

import copy
import re
import subprocess
import sys
from typing import Any

import openai
import pytest
from llama_index.core import Settings
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.llms import LLM, ChatMessage, CompletionResponse, MockLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI
from pydantic import BaseModel

from asyncbucket import Limiter, pace
from asyncbucket.llama_index import (
    DefaultEstimator,
    RateLimitedEmbedding,
    RateLimitedLLM,
    RateLimitedMultiModalEmbedding,
    wrap,
)

KEY = "sk-very-secret"


class PacedOpenAI(RateLimitedLLM, OpenAI):
    """A paced class, as the docs tell users to write it."""


class PacedMockEmbedding(RateLimitedEmbedding, MockEmbedding):
    """The same for an embedding model."""


class Person(BaseModel):
    """What structured prediction fills in."""

    name: str


def models() -> list[Any]:
    """Return one model of each kind."""
    return [
        MockLLM(max_tokens=3),
        OpenAI(model="gpt-4o-mini", api_key=KEY, max_retries=7),
        MockEmbedding(embed_dim=2),
        OpenAIEmbedding(api_key=KEY),
    ]


def limiter_of(model: Any) -> Limiter:
    """Return the limiter of a wrapped model, an attribute unknown to type checkers."""
    limiter: Limiter = model.limiter
    return limiter


def named(model: object) -> str:
    """Return the name of a case."""
    return type(model).__name__


@pytest.mark.parametrize("inner", models(), ids=named)
def test_wrapped_model_keeps_its_class(inner: Any) -> None:
    """`isinstance`, which LlamaIndex relies on, gives the same answers."""
    paced = Limiter("100 RPM").wrap(inner)

    assert isinstance(paced, type(inner))
    assert isinstance(paced, LLM | BaseEmbedding)
    assert isinstance(paced, FunctionCallingLLM) == isinstance(inner, FunctionCallingLLM)
    assert paced.class_name() == inner.class_name()


@pytest.mark.parametrize("inner", models(), ids=named)
def test_wrapped_model_serialises_like_inner_model(inner: Any) -> None:
    """Dumps, payloads and schemas are equal, so that caches keyed by them stay valid."""
    paced = Limiter("100 RPM").wrap(inner)

    assert paced.to_dict() == inner.to_dict()
    assert paced.to_payload() == inner.to_payload()
    assert (
        type(paced).model_json_schema()["properties"]
        == (type(inner).model_json_schema()["properties"])
    )
    assert type(paced).model_fields.keys() == type(inner).model_fields.keys()


def test_wrapped_embedding_keeps_its_ingestion_cache_hash() -> None:
    """A cache filled by the plain model serves the paced one."""
    inner = MockEmbedding(embed_dim=2)
    nodes = [TextNode(text="a")]

    paced = Limiter("100 RPM").wrap(inner)

    assert get_transformation_hash(nodes, paced) == get_transformation_hash(nodes, inner)


def test_wrapping_leaves_inner_model_unchanged() -> None:
    """Wrapping does not change the fields, private values or retries of the inner model."""
    client = AsyncOpenAI(api_key=KEY, max_retries=4)
    inner = OpenAI(api_key=KEY, max_retries=7, async_openai_client=client)
    fields, private = dict(vars(inner)), dict(inner.__pydantic_private__ or {})

    Limiter("100 RPM").wrap(inner)

    assert vars(inner) == fields
    assert inner.__pydantic_private__ == private
    assert inner._aclient is client
    assert (client.max_retries, type(client)) == (4, AsyncOpenAI)


def test_inner_model_stays_unpaced() -> None:
    """Calling the inner model does not use the limiter."""
    limiter = Limiter("100 RPM")
    inner = MockLLM(max_tokens=3)
    limiter.wrap(inner)

    inner.complete("hi")

    assert limiter.statistics().admitted == 0


def test_fields_are_shared_with_the_inner_model() -> None:
    """What Settings or a user later writes to one of them, both have."""
    inner = OpenAI(api_key=KEY)
    paced = Limiter("100 RPM").wrap(inner)
    manager: Any = Settings.callback_manager

    paced.callback_manager = manager
    inner.temperature = 0.7

    assert inner.callback_manager is manager
    assert paced.temperature == 0.7


def test_models_own_limiter_field_and_helpers_still_work() -> None:
    """A class may have a field `limiter`, its own helpers, and a `_get_client` with arguments."""

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
    assert limiter.statistics().admitted == 2


@pytest.mark.parametrize(
    ("mixin", "kind"),
    [(RateLimitedLLM, LLM), (RateLimitedMultiModalEmbedding, MultiModalEmbedding)],
)
def test_mixin_adds_only_limiter_max_retries_and_client_getters(mixin: type, kind: type) -> None:
    """Any other name would hide what a user's class calls by it."""
    added = {name for base in mixin.__mro__[:-1] for name in vars(base)} - set(dir(kind))

    assert {name for name in added if not name.startswith("__")} == {
        "_abc_impl",
        "_get_aclient",
        "_get_client",
        "limiter",
        "max_retries",
    } - set(dir(kind))


def test_limiter_of_wrapped_model_is_not_a_serialised_field() -> None:
    """The limiter can be reached, and is in no dump."""
    limiter = Limiter("100 RPM", name="here")
    paced = limiter.wrap(OpenAI(api_key=KEY))

    assert limiter_of(paced) is limiter
    assert "here" not in str(paced.to_dict())
    assert "limiter" not in type(paced).model_fields


def test_wrapped_model_repr_shows_limiter_and_no_api_key() -> None:
    """A repr that lands in a log shows model and limiter, and no API key."""
    paced = Limiter("100 RPM", name="mine").wrap(OpenAI(model="gpt-4o-mini", api_key=KEY))

    assert repr(paced).startswith("PacedOpenAI(model='gpt-4o-mini', limiter=<Limiter 'mine'")
    assert KEY not in repr(paced) + str(paced)


def test_wrapping_twice_returns_same_object() -> None:
    """A model is paced by a limiter only once, however often it is wrapped."""
    limiter = Limiter("100 RPM")
    paced = limiter.wrap(MockLLM())

    assert limiter.wrap(paced) is paced


def test_rewrapping_with_options_returns_new_model_charged_once() -> None:
    """New options make a new object, whose calls are still charged once."""
    limiter = Limiter("100 RPM")
    paced = limiter.wrap(MockLLM(max_tokens=2))

    again = limiter.wrap(paced, retry=1)
    again.complete("hi")

    assert again is not paced
    assert type(again) is type(paced)
    assert limiter.statistics().admitted == 1


def test_wrapping_paced_model_by_second_limiter_is_refused() -> None:
    """Two queues in a row would hold one budget while waiting for the other."""
    paced = Limiter("100 RPM", name="a").wrap(MockLLM())

    with pytest.raises(ValueError, match=r"paced already and can't be paced by <Limiter 'b'"):
        Limiter("100 RPM", name="b").wrap(paced)


def test_models_of_one_class_share_one_paced_class() -> None:
    """Two models of the same class have the same paced class."""
    limiter = Limiter("100 RPM")

    assert type(limiter.wrap(MockLLM())) is type(limiter.wrap(MockLLM()))


def test_wrapping_structured_llm_paces_its_inner_model() -> None:
    """A structured LLM stays one; the model in it, which makes the requests, is paced."""
    limiter = Limiter("100 RPM")
    structured = MockLLM().as_structured_llm(Person)

    paced = limiter.wrap(structured)

    assert isinstance(paced, StructuredLLM)
    assert isinstance(paced.llm, RateLimitedLLM)
    assert not isinstance(structured.llm, RateLimitedLLM)
    assert limiter.wrap(paced) is paced


@pytest.mark.parametrize(("client", "sync"), [(AsyncOpenAI, ""), (openai.OpenAI, "sync=True")])
def test_error_for_sdk_client_tells_how_to_pace_it(client: type[Any], sync: str) -> None:
    """It is not a model of LlamaIndex, and is paced in another way."""
    remedy = f"{client.__name__}(http_client=limiter.http_client({sync}), max_retries=0)"
    with pytest.raises(TypeError, match=re.escape(f"is paced where it sends: {remedy}")):
        Limiter("100 RPM").wrap(client(api_key="k"))


@pytest.mark.parametrize("thing", ["gpt-4o", 3, None, object(), Limiter("1 RPM")], ids=named)
def test_wrapping_unsupported_object_is_refused(thing: object) -> None:
    """The error says what can be wrapped, and what to do with other code."""
    with pytest.raises(TypeError, match=rf"not {named(thing)}; pace other code by `async with"):
        Limiter("100 RPM").wrap(thing)


def test_wrapping_model_class_instead_of_instance_is_refused() -> None:
    """The message tells of the forgotten parentheses."""
    with pytest.raises(TypeError, match=r"not its class: limiter.wrap\(MockLLM\(...\)\)"):
        Limiter("100 RPM").wrap(MockLLM)


def test_pace_creates_its_own_limiter() -> None:
    """One line does it all, and the limiter can still be reached."""
    paced = pace(MockLLM(max_tokens=2), rpm=100, concurrency=2, name="own")

    paced.complete("hi")

    limiter = limiter_of(paced)
    assert (limiter.name, limiter.statistics().admitted, limiter.concurrency) == ("own", 1, 2)


def test_settings_and_agents_keep_wrapped_model_object() -> None:
    """LlamaIndex does not copy the model on the way, not even when it validates."""
    limiter = Limiter("100 RPM")
    llm, embed_model = limiter.wrap(OpenAI(api_key=KEY)), limiter.wrap(MockEmbedding(embed_dim=2))
    before = Settings._llm, Settings._embed_model
    try:
        Settings.llm, Settings.embed_model = llm, embed_model
        assert Settings.llm is llm
        assert Settings.embed_model is embed_model
    finally:
        Settings._llm, Settings._embed_model = before

    function_agent = FunctionAgent(name="f", description="f", llm=llm, tools=[])
    react_agent = ReActAgent(name="r", description="r", llm=llm, tools=[])
    workflow = AgentWorkflow(agents=[function_agent], root_agent="f")

    assert function_agent.llm is llm
    assert react_agent.llm is llm
    assert workflow.agents["f"].llm is llm
    assert llm.as_structured_llm(Person).llm is llm


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, BaseModel.model_copy])
def test_copy_is_paced_by_the_same_limiter(make_copy: Any) -> None:
    """A copied model spends from the budget of the original."""
    limiter = Limiter("100 RPM")
    paced = limiter.wrap(MockLLM(max_tokens=2))

    twin = make_copy(paced)
    twin.complete("hi")

    assert twin is not paced
    assert twin.limiter is limiter
    assert limiter.statistics().admitted == 1


def test_model_copy_update_changes_only_the_copy() -> None:
    """`model_copy(update=...)` changes only the copy."""
    paced = Limiter("100 RPM").wrap(OpenAI(api_key=KEY))

    twin = paced.model_copy(update={"model": "gpt-4o"})

    assert (twin.model, paced.model) == ("gpt-4o", "gpt-3.5-turbo")


def test_mixin_class_takes_model_arguments_and_limiter() -> None:
    """`PacedOpenAI(model=..., limiter=...)` takes the arguments of OpenAI and the limiter."""
    limiter = Limiter("100 RPM")

    llm = PacedOpenAI(model="gpt-4o-mini", api_key=KEY, max_retries=7, limiter=limiter)

    assert (llm.model, llm.limiter, llm.max_retries) == ("gpt-4o-mini", limiter, 0)
    assert llm.to_dict() == OpenAI(model="gpt-4o-mini", api_key=KEY, max_retries=7).to_dict()
    assert limiter.wrap(llm) is llm
    assert PacedOpenAI.model_fields.keys() == OpenAI.model_fields.keys()
    assert PacedOpenAI.model_fields["max_retries"].default == 3


def test_mixin_class_paces_its_calls() -> None:
    """A model of a mixin class pays for its calls."""
    limiter = Limiter("100 RPM")

    PacedMockEmbedding(embed_dim=2, limiter=limiter).get_text_embedding("hi")

    assert limiter.statistics().admitted == 1


def test_mixin_class_without_limiter_is_refused() -> None:
    """A paced class cannot be made without a limiter."""
    with pytest.raises(TypeError, match="required keyword-only argument: 'limiter'"):
        PacedOpenAI(api_key=KEY)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]  # the point


def test_mixin_class_with_non_limiter_argument_is_refused() -> None:
    """The error names the argument, and not some detail that fails later."""
    with pytest.raises(TypeError, match="limiter= takes a Limiter, not 500"):
        PacedOpenAI(api_key=KEY, limiter=500)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # the point


@pytest.mark.parametrize(
    ("model", "mixin"), [(OpenAI, RateLimitedLLM), (MockEmbedding, RateLimitedEmbedding)]
)
def test_mixin_listed_after_model_class_is_refused(model: type[Any], mixin: type[Any]) -> None:
    """It would be hidden by the model's methods, and pace nothing."""
    right = rf"Mine would not be paced: .*; write class Mine\({mixin.__name__}, {model.__name__}\)$"

    with pytest.raises(TypeError, match=right):
        type("Mine", (model, mixin), {})


def test_subclass_of_paced_class_keeps_default_max_retries() -> None:
    """The 0 that stops other layers from retrying must not become a default."""

    class Mine(PacedOpenAI):
        extra: int = 1

    assert Mine.model_fields["max_retries"].default == 3
    assert Mine(api_key=KEY, limiter=Limiter("1 RPM")).to_dict()["max_retries"] == 3


def test_setting_max_retries_changes_field_but_still_reads_zero() -> None:
    """Setting it changes the serialised field, but not who retries."""
    inner = OpenAI(api_key=KEY)
    paced = Limiter("100 RPM").wrap(inner)

    paced.max_retries = 8
    assert inner.max_retries == 8
    object.__setattr__(paced, "max_retries", 9)

    assert (paced.max_retries, inner.max_retries, paced.to_dict()["max_retries"]) == (0, 9, 9)


def test_missing_llama_index_error_names_the_extra() -> None:
    """Without LlamaIndex `pace` says what to install."""
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


def test_wrap_function_paces_model_by_given_limiter() -> None:
    """The function can be used without the method."""
    limiter = Limiter("100 RPM")

    paced = wrap(MockLLM(max_tokens=2), limiter)
    paced.chat([ChatMessage("hi")])

    assert limiter.statistics().admitted == 1


def test_error_for_agent_or_tool_spec_names_what_to_wrap() -> None:
    """An agent and a tool spec are neither model nor tool, but contain some."""

    class Spec:
        def to_tool_list(self) -> list[Any]:
            return []

    agent = FunctionAgent(name="f", description="f", llm=MockLLM(), tools=[])
    limiter = Limiter("1 RPM")
    with pytest.raises(TypeError, match=r"wrap the tools of Spec: limiter.wrap\(spec.to_tool_list"):
        limiter.wrap(Spec())
    with pytest.raises(TypeError, match="wrap what FunctionAgent is made of: its llm, and its too"):
        limiter.wrap(agent)


def test_wrapping_settings_creates_no_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Settings.llm` would make OpenAI's model if there is none, and fail without its key."""
    monkeypatch.setattr(Settings, "_llm", None)
    made: list[str] = []
    monkeypatch.setattr("llama_index.core.settings.resolve_llm", made.append)

    with pytest.raises(TypeError, match="wrap what _Settings is made of: its llm"):
        Limiter("1 RPM").wrap(Settings)
    assert not made


@pytest.mark.parametrize("estimator", [5, DefaultEstimator])
def test_object_that_is_not_an_estimator_is_refused(estimator: Any) -> None:
    """The error comes at once, not with the first call; a class is refused, too."""
    with pytest.raises(TypeError, match=r"must have chat\(\), completion\(\) or embedding"):
        Limiter("1 RPM").wrap(MockLLM(), estimator=estimator)
