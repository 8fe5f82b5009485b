"""A paced model can be pickled, and the original stays intact."""

import multiprocessing
import os
import pickle
import warnings
from typing import Any

import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from asyncbucket import Limit, Limiter
from asyncbucket.llama_index import DefaultEstimator, RateLimitedLLM, copies
from asyncbucket.llama_index.mixin import pacing_of
from asyncbucket.retry import Retry

KEY = "sk-very-secret"


class PacedMock(RateLimitedLLM, MockLLM):
    """A class written by hand."""


class Stubborn(CustomLLM):
    """A model whose `__init__` does not take its own fields."""

    max_tokens: int = 3

    def __init__(self) -> None:
        super().__init__()

    @property
    def metadata(self) -> Any:
        return MockLLM().metadata

    def complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        return MockLLM().complete(prompt)

    def stream_complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        return MockLLM().stream_complete(prompt)


class PacedStubborn(RateLimitedLLM, Stubborn):
    """The same, paced."""

    def __init__(self, **kwargs: Any) -> None:
        limiter = kwargs.pop("limiter")
        if kwargs:
            raise TypeError("takes nothing else")
        super().__init__(limiter=limiter)


def models() -> list[Any]:
    """Return one model of each kind."""
    return [
        MockLLM(max_tokens=3),
        OpenAI(model="gpt-4o-mini", api_key=KEY, max_retries=7),
        MockEmbedding(embed_dim=2),
        OpenAIEmbedding(api_key=KEY),
        Stubborn(),
    ]


@pytest.mark.parametrize("inner", models(), ids=lambda model: type(model).__name__)
def test_unpickled_model_shares_the_limiter_within_a_process(inner: Any) -> None:
    """As with other copies, the copy spends from the same budget."""
    limiter = Limiter("100 RPM")
    paced = limiter.wrap(inner)

    twin = pickle.loads(pickle.dumps(paced))  # noqa: S301 - our own

    assert twin.limiter is limiter
    assert type(twin) is type(paced)
    assert twin.to_dict() == paced.to_dict()


def test_pickling_leaves_original_unchanged() -> None:
    """LlamaIndex removes from the live object what cannot be pickled; here a twin loses it."""
    limiter = Limiter("100 RPM")
    inner = OpenAI(api_key=KEY, completion_to_prompt=lambda prompt: prompt)
    paced = limiter.wrap(inner)
    client = paced._get_aclient()
    before = dict(vars(paced))

    pickle.dumps(paced)

    assert vars(paced) == vars(inner) == before
    assert paced._get_aclient() is client


@pytest.mark.parametrize("make", [PacedMock, PacedStubborn])
def test_handwritten_paced_class_survives_pickling(make: Any) -> None:
    """It keeps its class, its fields and its limiter, whatever its `__init__` takes."""
    limiter = Limiter("100 RPM")
    paced = make(limiter=limiter)
    paced.max_tokens = 2

    twin = pickle.loads(pickle.dumps(paced))  # noqa: S301 - our own

    assert type(twin) is make
    assert twin.limiter is limiter
    assert twin.max_tokens == 2
    assert str(twin.complete("hi"))


def test_pickled_copy_keeps_retry_options() -> None:
    """A copy retries as the original does."""
    paced = Limiter("100 RPM").wrap(MockLLM(), retry=Retry(attempts=2))

    twin = pickle.loads(pickle.dumps(paced))  # noqa: S301 - our own

    assert pacing_of(twin).retrier.policy.attempts == 2


@pytest.mark.parametrize("tokenizer", [None, str.split])
def test_pickled_copy_keeps_estimator_and_its_forecast(tokenizer: Any) -> None:
    """The copy begins with the same forecast and tokenizer; from then on each learns alone."""
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


def _unpickle(pickled: list[bytes]) -> dict[str, Any]:
    """Run in another process: return what paces the copies there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twins = [pickle.loads(each) for each in pickled]  # noqa: S301 - our own
        for twin in twins:
            twin.complete("hi")
    limiter: Limiter = twins[0].limiter
    return {
        "shared": all(twin.limiter is limiter for twin in twins),
        "limits": limiter.limits,
        "concurrency": limiter.concurrency,
        "name": limiter.name,
        "admitted": limiter.statistics().admitted,
        "pid": os.getpid(),
        "warnings": [str(w.message) for w in caught if w.category is RuntimeWarning],
    }


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_copies_in_another_process_share_one_new_limiter_and_warn_once(method: str) -> None:
    """They keep the limits together, and warn once that they do not share the original's."""
    limiter = Limiter("100 RPM burst 7", "10k TPM", concurrency=3, name="mine")
    pickled = [pickle.dumps(limiter.wrap(MockLLM(max_tokens=2))) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from 3.12 on
        with multiprocessing.get_context(method).Pool(1) as pool:
            seen = pool.apply(_unpickle, (pickled,))

    assert seen["pid"] != os.getpid()
    assert seen["shared"]
    assert seen["limits"] == (Limit("requests", 100, burst=7), Limit("tokens", 10_000))
    assert (seen["concurrency"], seen["name"], seen["admitted"]) == (3, "mine", 2)
    assert limiter.statistics().admitted == 0
    (said,) = seen["warnings"]
    assert said.startswith("this copy of MockLLM came from another process, where 'mine' paces")
    assert "give each process its share" in said


def test_unpickling_after_limiter_is_gone_recreates_it_with_warning() -> None:
    """An old pickle brings a limiter with the same limits, and warns about it."""
    paced = Limiter("100 RPM", name="gone").wrap(MockLLM())
    pickled = pickle.dumps(paced)
    del paced

    with pytest.warns(RuntimeWarning, match="'gone'"):
        twin = pickle.loads(pickled)  # noqa: S301 - our own

    assert twin.limiter.name == "gone"
    assert copies._PASSPORTS.remade


def test_ingestion_pipeline_runs_paced_model_in_worker_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`IngestionPipeline(num_workers=2)` works, and the model here is intact afterwards."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of the workers: the one above
    limiter = Limiter("1000 RPM")
    model = limiter.wrap(MockEmbedding(embed_dim=2))
    pipeline = IngestionPipeline(transformations=[model])

    nodes = pipeline.run(nodes=[TextNode(text=f"text {n}") for n in range(4)], num_workers=2)

    assert [node.embedding for node in nodes] == [[0.5, 0.5]] * 4
    assert model.get_text_embedding("here") == [0.5, 0.5]
    assert limiter.statistics().admitted == 1
