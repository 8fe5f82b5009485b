"""A paced model can be pickled, and the original stays intact."""

import multiprocessing
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode
from llama_index.llms.openai import OpenAI

import asyncbucket
from asyncbucket import AcquireTimeout, Limit, Limiter
from asyncbucket.core.levels import terms_of
from asyncbucket.llama_index import DefaultEstimator, RateLimitedLLM
from asyncbucket.llama_index.models import pacing_of
from tests.llama_index.conftest import KEY, some_models


class PacedMock(RateLimitedLLM, MockLLM):
    """A class written by hand."""


@pytest.mark.parametrize("inner", some_models(), ids=lambda model: type(model).__name__)
def test_unpickled_model_shares_the_limiter_within_a_process(inner: Any) -> None:
    limiter = Limiter("100 RPM")
    paced = limiter.wrap(inner)

    twin = pickle.loads(pickle.dumps(paced))  # noqa: S301 - our own

    assert twin.limiter is limiter
    assert type(twin) is type(paced)
    assert twin.to_dict() == paced.to_dict()


def test_pickling_leaves_original_unchanged() -> None:
    limiter = Limiter("100 RPM")
    inner = OpenAI(api_key=KEY, completion_to_prompt=lambda prompt: prompt)
    paced = limiter.wrap(inner)
    client = paced._get_aclient()
    before = dict(vars(paced))

    pickle.dumps(paced)

    assert vars(paced) == vars(inner) == before
    assert paced._get_aclient() is client


def test_handwritten_paced_class_survives_pickling() -> None:
    limiter = Limiter("100 RPM")
    paced = PacedMock(max_tokens=3, limiter=limiter)
    paced.max_tokens = 2

    twin = pickle.loads(pickle.dumps(paced))  # noqa: S301 - our own

    assert type(twin) is PacedMock
    assert twin.limiter is limiter
    assert twin.max_tokens == 2
    assert str(twin.complete("hi"))


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
        first, second, tenant = [pickle.loads(each) for each in pickled]  # noqa: S301 - our own
    first.complete("hi")
    second.complete("hi")
    root = second.limiter
    return {
        "terms": terms(first.limiter),
        "admitted": [root.statistics().admitted, first.limiter.statistics().admitted],
        "tree": first.limiter.parent.parent is root is tenant.limiter.parent,
        "tenant": tenant.limiter.limits,
        "warnings": [str(each.message) for each in caught if each.category is RuntimeWarning],
    }


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_copies_in_another_process_share_one_rebuilt_limiter_tree(method: str) -> None:
    root, chat = tree()
    llm = MockLLM(max_tokens=2)
    acme = root.key("acme", "7 RPM")
    models = [root.wrap(llm, child=chat), root.wrap(llm), root.wrap(llm, child=acme)]
    pickled = [pickle.dumps(model) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from 3.12 on
        with multiprocessing.get_context(method).Pool(1) as pool:
            seen = pool.apply(_unpickle, (pickled,))

    assert seen["terms"] == terms(chat)
    assert seen["admitted"] == [2, 1]
    assert seen["tree"]
    assert seen["tenant"] == (Limit("requests", 7),)
    assert seen["warnings"][0].startswith(
        "this copy of MockLLM came from another process, where 'openai/acme/chat' paces"
    )
    assert "give each process its share" in seen["warnings"][0]
    assert root.statistics().admitted == 0


def _spend(pickled: bytes) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = pickle.loads(pickled)  # noqa: S301 - our own
        twin.complete("one")
        twin.complete("two")
    return [str(each.message) for each in caught if each.category is RuntimeWarning]


@pytest.mark.real_clock
def test_copy_in_another_process_shares_limit_in_a_store(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/limits.db?patience=5"
    limiter = Limiter("3 RPM burst 3", name="openai", store=store)
    paced = limiter.wrap(MockLLM(max_tokens=2), child="chat")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_spend, (pickle.dumps(paced),)) == []

    paced.complete("three")

    with (
        pytest.raises(AcquireTimeout, match="a call of 1 request cannot pass"),
        asyncbucket.deadline(0.2),
    ):
        paced.complete("four")


def test_unpickling_after_limiter_is_gone_recreates_it_with_warning() -> None:
    paced = Limiter("100 RPM", name="gone").wrap(MockLLM())
    pickled = pickle.dumps(paced)
    del paced

    with pytest.warns(RuntimeWarning, match="'gone'"):
        twin = pickle.loads(pickled)  # noqa: S301 - our own

    assert twin.limiter.name == "gone"


def test_ingestion_pipeline_runs_paced_model_in_worker_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of the workers: the one above
    limiter = Limiter("1000 RPM")
    model = limiter.wrap(MockEmbedding(embed_dim=2))
    pipeline = IngestionPipeline(transformations=[model])

    nodes = pipeline.run(nodes=[TextNode(text=f"text {n}") for n in range(4)], num_workers=2)

    assert [node.embedding for node in nodes] == [[0.5, 0.5]] * 4
    assert model.get_text_embedding("here") == [0.5, 0.5]
    assert limiter.statistics().admitted == 1
