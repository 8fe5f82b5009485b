"""A wrapped model is still the model: its class, its fields, its name; limiters and options apply."""

import asyncio
import contextlib
import copy
import multiprocessing
import pickle
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import openai
import pytest
from llama_index.core import Settings, SummaryIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.llms import LLM, CustomLLM, MockLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI

import asyncbucket
from asyncbucket import AcquireTimeout, CostExceedsLimit, Limit, Limiter, pace
from asyncbucket.core.levels import terms_of
from asyncbucket.llama_index import DefaultEstimator, limiter_of
from asyncbucket.llama_index.pacing import pacing_of
from asyncbucket.testing import RateLimitedProvider
from tests.llama_index.conftest import (
    KEY,
    MESSAGES,
    Person,
    ScriptedOpenAI,
    admitted,
    charged,
    make_openai,
    some_models,
)


def predict_ada(*_: Any, **__: Any) -> Person:
    return Person(name="Ada")


@pytest.mark.parametrize("inner", some_models(), ids=lambda model: type(model).__name__)
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


def test_wrapping_leaves_inner_model_and_its_client_unchanged() -> None:
    client = AsyncOpenAI(api_key=KEY, max_retries=4)
    inner = OpenAI(api_key=KEY, max_retries=7, async_openai_client=client)
    fields, private = dict(vars(inner)), dict(inner.__pydantic_private__ or {})
    Limiter("100 RPM").wrap(inner)
    assert vars(inner) == fields
    assert inner.__pydantic_private__ == private
    assert inner._aclient is client
    assert (client.max_retries, type(client)) == (4, AsyncOpenAI)


def test_fields_are_shared_with_the_inner_model_but_max_retries_reads_zero() -> None:
    inner = OpenAI(api_key=KEY)
    paced = Limiter("100 RPM").wrap(inner)
    manager: Any = Settings.callback_manager
    paced.callback_manager = manager
    inner.temperature = 0.7
    paced.max_retries = 8
    assert (inner.callback_manager, inner.max_retries) == (manager, 8)
    assert (paced.temperature, paced.max_retries, paced.to_dict()["max_retries"]) == (0.7, 0, 8)


def test_list_comes_back_as_paced_models_and_tools_in_order() -> None:
    limiter = Limiter("100 RPM")
    things = [MockLLM(), MockLLM().as_structured_llm(Person), predict_ada]
    paced: Any = limiter.wrap(things)
    assert [type(each).__name__ for each in paced] == ["MockLLM", "StructuredLLM", "FunctionTool"]
    assert [limiter_of(each) for each in paced] == [limiter] * 3
    assert paced[2].metadata.name == "predict_ada"
    assert things[2] is predict_ada
    assert isinstance(limiter.wrap(tuple(things)), tuple)
    assert limiter.wrap([]) == []
    assert all(a is b for a, b in zip(limiter.wrap(paced), paced, strict=True))
    with pytest.raises(TypeError, match=r"MockLLM.* is not paced: limiter.wrap\(...\) and pace"):
        limiter_of(MockLLM())


def test_model_made_by_the_class_of_a_paced_one_says_that_nothing_paces_it() -> None:
    paced = Limiter("100 RPM").wrap(MockLLM(max_tokens=2))
    for made in (type(paced)(max_tokens=2), type(paced).from_dict(paced.to_dict())):
        with pytest.raises(TypeError, match="this MockLLM was made by the class of a paced one"):
            made.complete("hi")


def test_wrapped_model_repr_shows_limiter_and_no_api_key() -> None:
    paced = Limiter("100 RPM", name="mine").wrap(OpenAI(model="gpt-4o-mini", api_key=KEY))
    assert repr(paced).startswith("OpenAI(model='gpt-4o-mini', limiter=<Limiter 'mine'")
    assert KEY not in repr(paced) + str(paced)


def test_paced_model_is_wrapped_again_for_options_or_a_limiter_below() -> None:
    limiter = Limiter("100 RPM")
    acme = limiter.child("acme")
    paced = limiter.wrap(MockLLM(max_tokens=2), retry=2)
    below, estimated = acme.wrap(paced), limiter.wrap(paced, estimator=DefaultEstimator())
    again = limiter.wrap(below, retry=1)
    for each in (below, estimated, again):
        each.complete("hi")
    assert limiter.wrap(paced) is paced
    assert limiter.wrap(below) is below
    assert type(below) is type(estimated) is type(paced)
    assert [limiter_of(each) for each in (below, estimated, again)] == [acme, limiter, acme]
    attempts = [pacing_of(each).retrier.policy.attempts for each in (below, estimated, again)]
    assert attempts == [2, 2, 1]
    assert pacing_of(again).estimator is pacing_of(paced).estimator
    assert [admitted(each) for each in (limiter, acme)] == [3, 2]


@pytest.mark.parametrize("thing", [MockLLM(), FunctionTool.from_defaults(predict_ada)])
def test_paced_object_is_refused_by_sibling_and_unrelated_limiter(thing: Any) -> None:
    limiter = Limiter("100 RPM", name="openai")
    paced = limiter.child("chat").wrap(thing)
    for other in (limiter.child("embeddings"), Limiter("100 RPM", name="b")):
        with pytest.raises(
            ValueError,
            match=rf"paced by <Limiter 'openai/chat', .* already and can't be paced by "
            rf"<Limiter '{other.name}', .* make one of them a child of the other",
        ):
            other.wrap(paced)


@pytest.mark.parametrize(
    ("thing", "what"),
    [
        (openai.OpenAI(api_key="k"), "OpenAI"),
        ("gpt-4o", "str"),
        (MockLLM, "the class MockLLM"),
        (SummaryIndex([]), "SummaryIndex"),
    ],
)
def test_error_for_what_cannot_be_wrapped_names_the_remedies(thing: Any, what: str) -> None:
    said = (
        rf"tool or agent can be wrapped, not {what}; wrap the llm and the tools of an engine, .*"
        r"spec.to_tool_list\(\) of .* http_client=limiter.http_client\(\); pace other code by `async"
    )
    with pytest.raises(TypeError, match=said):
        Limiter("100 RPM").wrap(thing)


@pytest.mark.parametrize(
    ("thing", "options", "said"),
    [
        (MockLLM(), {"estimator": 5}, r"estimator= takes an object with chat\(\), .*, not 5"),
        (MockLLM(), {"estimator": DefaultEstimator}, r"estimator= takes an object with chat\(\)"),
        (print, {"retry": 2}, "retry= is for models: a tool is never tried again"),
    ],
)
def test_options_that_do_not_apply_are_refused(thing: Any, options: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Limiter("1 RPM").wrap([thing], **options)


def test_pace_creates_its_own_limiter() -> None:
    paced = pace(MockLLM(max_tokens=2), rpm=100, concurrency=2, name="own")
    paced.complete("hi")
    limiter = limiter_of(paced)
    assert (limiter.name, limiter.statistics().admitted, limiter.concurrency) == ("own", 1, 2)


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("inner", [MockLLM(max_tokens=2), FunctionTool.from_defaults(predict_ada)])
def test_copy_is_paced_by_the_same_limiter(make_copy: Any, inner: Any) -> None:
    limiter = Limiter("100 RPM")
    paced: Any = limiter.wrap(inner)
    twin = make_copy(paced)
    assert twin.complete("hi") if isinstance(inner, LLM) else twin()
    assert twin is not paced
    assert limiter_of(twin) is limiter
    assert admitted(limiter) == 1


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


# --- a child: charged once a level, and no call waits for one that waits for it ---


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


# --- pickles ---


@pytest.mark.parametrize("inner", some_models(), ids=lambda model: type(model).__name__)
def test_unpickled_model_shares_the_limiter_within_a_process(inner: Any) -> None:
    limiter = Limiter("100 RPM")
    paced = limiter.wrap(inner, retry=2)
    twin = pickle.loads(pickle.dumps(paced))  # noqa: S301 - our own
    assert limiter_of(twin) is limiter
    assert pacing_of(twin).retrier.policy.attempts == 2
    assert type(twin) is type(paced)
    assert twin.to_dict() == paced.to_dict()


@pytest.mark.parametrize("tokenizer", [None, str.split])
def test_pickled_copy_keeps_estimator_and_its_forecast(tokenizer: Any) -> None:
    estimator = DefaultEstimator(tokenizer)
    estimator.observe(900)
    paced = Limiter("100 RPM").wrap(MockLLM(), estimator=estimator)
    pickled = pickle.dumps(paced)
    twin: Any = pickle.loads(pickled)  # noqa: S301 - our own
    assert len(pickled) < 10_000  # the tokenizer's file is in every process
    copy: Any = pacing_of(twin).estimator
    assert copy.completion(twin, "a word", {}) == estimator.completion(paced, "a word", {})
    copy.observe(1_000)
    assert copy.completion(twin, "?", {}).output_tokens == 1_000
    assert estimator.completion(paced, "?", {}).output_tokens == 900


def tree() -> tuple[Limiter, Limiter]:
    root = Limiter("100 RPM burst 7", concurrency=5, name="openai", timeout=50, max_queue=90)
    acme = root.child("acme", "10k TPM", weight=3, priority="batch", max_queue=9)
    return root, acme.child("chat", "5k TPM", concurrency=2, timeout=20)


def terms(limiter: Limiter) -> list[Any]:
    level: Limiter | None = limiter
    found: list[Any] = []
    while level is not None:
        found.append((level.name, level.limits, terms_of(level)))
        level = level.parent
    return found


def _unpickle(pickled: list[bytes]) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [pickle.loads(each) for each in pickled]  # noqa: S301 - our own
    models[0].complete("hi")
    models[1].complete("hi")
    chat, root, tenant = map(limiter_of, models)
    return {
        "terms": terms(chat),
        "admitted": [root.statistics().admitted, chat.statistics().admitted],
        "tree": chat.parent and chat.parent.parent is root is tenant.parent,
        "tenant": tenant.limits,
        "warnings": [str(each.message) for each in caught if each.category is RuntimeWarning],
    }


def _spend(pickled: bytes) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = pickle.loads(pickled)  # noqa: S301 - our own
        twin.complete("one")
        twin.complete("two")
    return [str(each.message) for each in caught if each.category is RuntimeWarning]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_copies_in_another_process_share_one_rebuilt_limiter_tree_and_a_store(
    method: str, tmp_path: Path
) -> None:
    root, chat = tree()
    llm = MockLLM(max_tokens=2)
    pickled = [pickle.dumps(each.wrap(llm)) for each in (chat, root, root.key("acme", "7 RPM"))]
    store = f"sqlite:///{tmp_path}/limits.db?patience=5"
    shared = Limiter("3 RPM burst 3", name="shared", store=store).child("chat").wrap(llm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from 3.12 on
        with multiprocessing.get_context(method).Pool(1) as pool:
            seen = pool.apply(_unpickle, (pickled,))
            assert pool.apply(_spend, (pickle.dumps(shared),)) == []
    assert seen["terms"] == terms(chat)
    assert seen["admitted"] == [2, 1]
    assert seen["tree"]
    assert seen["tenant"] == (Limit("requests", 7),)
    (warning,) = seen["warnings"]
    assert warning.startswith("<Limiter 'openai', ")
    assert "came from another process with a copy of a model; together the processes" in warning
    assert "give each process its share" in warning
    assert root.statistics().admitted == 0
    shared.complete("three")
    with (
        pytest.raises(AcquireTimeout, match="a call of 1 request cannot pass"),
        asyncbucket.deadline(0.2),
    ):
        shared.complete("four")
