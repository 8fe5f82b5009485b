"""A wrapped model is still the model: its class, its fields, its name; limiters and options apply."""

import asyncio
import copy
import multiprocessing
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import httpx
import openai
import pytest
from llama_index.core import Settings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI

import asyncbucket
from asyncbucket import AcquireTimeout, Limit, Limiter
from asyncbucket.levels import levels, terms_of
from asyncbucket.llama_index import DefaultEstimator, limiter_of
from asyncbucket.llama_index.paced import pacing_of
from asyncbucket.testing import RateLimitedProvider
from tests.llama_index.conftest import KEY, MESSAGES, FakeAPI, Person, admitted, make_openai


def predict_ada(*_: Any, **__: Any) -> Person:
    return Person(name="Ada")


@pytest.mark.parametrize(
    "inner",
    [make_openai(api_key=KEY), MockEmbedding(embed_dim=2), OpenAIEmbedding(api_key=KEY)],
    ids=lambda model: type(model).__name__,
)
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


def test_list_comes_back_as_paced_models_and_tools_in_order(limiter: Limiter) -> None:
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


def test_paced_model_is_wrapped_again_for_options_or_a_limiter_below(limiter: Limiter) -> None:
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
            rf"<Limiter '{other.name}', .* one of the limiters a child of the other",
        ):
            other.wrap(paced)


@pytest.mark.parametrize(
    ("thing", "options", "said"),
    [
        (openai.OpenAI(api_key="k"), {}, "wrapped, not OpenAI; .* http_client=limiter.http_client"),
        (MockLLM, {}, r"not the class MockLLM: wrap an object, MockLLM\(...\); wrap the llm"),
        (MockLLM(), {"estimator": 5}, r"estimator= takes an object with chat\(\), .*, not 5"),
        (MockLLM(), {"estimator": DefaultEstimator}, r"estimator= takes an object with chat\(\)"),
        (MockLLM(), {"cache": "first"}, """cache must be "count" or "lead", not 'first'"""),
        (MockLLM(), {"kind": "k"}, "kind= does not apply to MockLLM: kind= is for agents"),
        (FunctionTool.from_defaults(print), {"retry": 2}, "retry= does not apply to FunctionTool"),
    ],
)
def test_what_cannot_be_wrapped_so_is_refused(thing: Any, options: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        Limiter("1 RPM").wrap(thing, **options)


@pytest.mark.parametrize("inner", [MockLLM(max_tokens=2), FunctionTool.from_defaults(predict_ada)])
def test_copy_is_paced_by_the_same_limiter(limiter: Limiter, inner: Any) -> None:
    for calls, make_copy in enumerate((copy.copy, copy.deepcopy), start=1):
        twin: Any = make_copy(limiter.wrap(inner))
        assert twin.complete("hi") if isinstance(inner, LLM) else twin()
        assert (limiter_of(twin), admitted(limiter)) == (limiter, calls)


def test_methods_replaced_by_functions_of_other_names_are_paced(limiter: Limiter) -> None:
    class Replaced(MockLLM):
        structured_predict = predict_ada

    llm = limiter.wrap(Replaced(max_tokens=2))
    with patch.object(MockEmbedding, "_get_text_embedding", return_value=[0.5]):
        limiter.wrap(MockEmbedding(embed_dim=2)).get_text_embedding_batch(["a", "b"])
    assert llm.structured_predict(Person, PromptTemplate("")).name == "Ada"
    assert admitted(limiter) == 3


@pytest.mark.parametrize("name", ["complete", "chat", "structured_predict"])
async def test_call_without_argument_raises_the_models_error(limiter: Limiter, name: str) -> None:
    paced = limiter.wrap(MockLLM())
    with pytest.raises((TypeError, ValueError)) as plain:
        getattr(MockLLM(), name)()
    with pytest.raises(type(plain.value), match=re.escape(str(plain.value))):
        getattr(paced, name)()
    with pytest.raises(type(plain.value)):
        await getattr(paced, f"a{name}")()
    assert admitted(limiter) == 0


# --- a child: charged once a level, and no call waits for one that waits for it ---


async def test_model_does_not_deadlock_with_its_http_client_at_sibling(limiter: Limiter) -> None:
    provider = RateLimitedProvider()
    transport = limiter.child("http").transport(provider.mock_transport())
    async with httpx.AsyncClient(transport=transport) as client:
        llm = limiter.child("chat").wrap(make_openai(async_http_client=client))
        async with asyncio.timeout(60):
            await asyncio.gather(llm.acomplete("hi"), llm.acomplete("hi"))
    assert [admitted(each) for each in (limiter, *limiter.children.values())] == [4, 2, 2]
    assert (limiter.statistics().in_flight, limiter.statistics().overridden) == (0, 0)


async def test_429_at_a_child_pauses_highest_level_with_limits(api: FakeAPI) -> None:
    everything = Limiter(concurrency=100, name="all")
    openai = everything.child("openai", "100 RPM")
    heard: list[str] = []
    everything.observe(lambda event: heard.append(f"{type(event).__name__} {event.limiter}"))
    api.refuse(429, {"retry-after-ms": "1"})
    with asyncbucket.tenant("acme"):
        await openai.child("chat").wrap(make_openai()).achat(MESSAGES)
    assert [each for each in heard if each.startswith(("Paused", "Retried"))] == [
        "Paused all/openai",
        "Retried all/openai/chat/*",
    ]


async def test_refusals_no_transport_sees_teach_how_it_counts(limiter: Limiter) -> None:
    class RefusedError(Exception):
        status_code = 429
        headers: ClassVar = {"retry-after-ms": "1"}

    class Model(MockLLM):
        def complete(self, *args: Any, **kwargs: Any) -> Any:
            if replies.pop():
                raise RefusedError
            return super().complete(*args, **kwargs)

    replies = [False, True, True]
    await limiter.wrap(Model(max_tokens=None)).acomplete("hi")
    assert replies == []
    assert "the provider accepts 8 requests at once" in str(limiter.explain())


# --- pickles ---


def test_unpickled_model_shares_the_limiter_in_its_process_but_learns_by_itself() -> None:
    estimator = DefaultEstimator(str.split)
    estimator.observe(900)
    paced = Limiter("100 RPM").wrap(make_openai(), retry=2, estimator=estimator)
    twin: Any = pickle.loads(pickle.dumps(paced))  # noqa: S301 - our own
    assert limiter_of(twin) is limiter_of(paced)
    assert (type(twin), twin.to_dict()) == (type(paced), paced.to_dict())
    pacing: Any = pacing_of(twin)
    assert pacing.retrier.policy.attempts == 2
    assert pacing.estimator.completion(twin, "?", {}) == estimator.completion(paced, "?", {})
    pacing.estimator.observe(1_000)
    assert pacing.estimator.completion(twin, "?", {}).output_tokens == 1_000
    assert estimator.completion(paced, "?", {}).output_tokens == 900


def test_copies_of_models_of_a_tenant_share_its_limits_in_its_process() -> None:
    root = Limiter("100 RPM")
    for limiter in (root.key("acme", "7 RPM"), root.child("chat").key("acme"), root.child("chat")):
        copied: Any = limiter.wrap(MockLLM())
        for _ in range(2):  # and so do copies of copies
            copied = pickle.loads(pickle.dumps(copied))  # noqa: S301 - our own
            assert limiter_of(copied) is limiter


def terms(limiter: Any) -> list[Any]:
    if limiter is None:
        return []
    return [(limiter.name, limiter.limits, terms_of(limiter)), *terms(limiter.parent)]


def use(pickled: list[bytes]) -> tuple[list[list[Any]], list[int], list[str]]:
    """Call each model; return the limiters, what their root has admitted, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [pickle.loads(each) for each in pickled]  # noqa: S301 - our own
        for model in models:
            model.complete("hi")
    limiters = list(map(limiter_of, models))
    roots = [list(levels(limiter))[-1].statistics().admitted for limiter in limiters]
    said = [str(each.message) for each in caught if each.category is RuntimeWarning]
    return [terms(limiter) for limiter in limiters], roots, said


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_copies_in_another_process_share_one_rebuilt_tree(method: str, tmp_path: Path) -> None:
    root = Limiter("100 RPM burst 7", concurrency=5, name="openai", timeout=50, max_queue=90)
    acme = root.child("acme", "10k TPM", weight=3, priority="batch", max_queue=9)
    chat = acme.child("chat", "5k TPM", concurrency=2, timeout=20)
    tenant = root.key("acme", "7 RPM")
    store = f"sqlite:///{tmp_path}/limits.db?patience=5"
    shared = Limiter("2 RPM burst 2", name="shared", store=store).child("chat")
    llm = MockLLM(max_tokens=2)
    pickled = [pickle.dumps(each.wrap(llm)) for each in (chat, root, tenant, shared)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from 3.12 on
        with multiprocessing.get_context(method).Pool(1) as pool:
            seen, admitted, (said,) = pool.apply(use, (pickled,))
    assert seen[0] == terms(chat)
    assert seen[2][0][1] == (Limit("requests", 7),)
    assert admitted == [3, 3, 3, 1]
    assert said.startswith("<Limiter 'openai', ")
    assert "came from another process with a copy of a model; together the processes" in said
    assert root.statistics().admitted == 0
    shared.wrap(llm).complete("second")
    with pytest.raises(AcquireTimeout), asyncbucket.deadline(0.2):
        shared.wrap(llm).complete("third")


async def test_arguments_reach_an_override_as_they_were_given(limiter: Limiter) -> None:
    class Keywords(MockLLM):
        def structured_predict(self, *, output_cls: Any, prompt: Any, **_: Any) -> Any:
            return predict_ada(self, output_cls, prompt)

        async def achat(self, *, messages: Any, **_: Any) -> Any:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            return len(messages)

    llm: Any = limiter.wrap(Keywords(max_tokens=2))
    assert llm.structured_predict(output_cls=Person, prompt=PromptTemplate("")).name == "Ada"
    assert await llm.achat(messages=MESSAGES) == len(MESSAGES)
    assert admitted(limiter) == 2


async def test_wrong_arguments_of_a_stream_are_refused_at_the_call(limiter: Limiter) -> None:
    llm: Any = limiter.wrap(MockLLM(max_tokens=2))
    with pytest.raises(TypeError, match="positional argument"):
        llm.stream_chat(MESSAGES, "too many")
    with pytest.raises(TypeError, match="positional argument"):
        await llm.astream_chat(MESSAGES, "too many")
    assert [len(list(llm.stream_complete(prompt="a b c"))), admitted(limiter)] == [2, 1]
