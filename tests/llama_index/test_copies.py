"""A paced model can be pickled, and the original stays intact."""

import multiprocessing
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.llms import MockLLM

import asyncbucket
from asyncbucket import AcquireTimeout, Limit, Limiter
from asyncbucket.core.levels import terms_of
from asyncbucket.llama_index import DefaultEstimator, limiter_of
from asyncbucket.llama_index.pacing import pacing_of
from tests.llama_index.conftest import some_models


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
