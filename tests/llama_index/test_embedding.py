"""Each request of an embedding model is paid for once, and what is in a cache is free."""

import asyncio
from typing import Any

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.embeddings.mock_embed_model import MockMultiModalEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.openai import OpenAIEmbedding

from asyncbucket import Limiter
from asyncbucket.llama_index import DefaultEstimator
from tests.llama_index.conftest import (
    API_BASE,
    Instrumentation,
    ScriptedOpenAI,
    admitted,
    charged,
    in_flight,
)

TEXTS = [f"text {number}" for number in range(6)]


class OnlySync(BaseEmbedding):
    """The least that users write: asynchronous methods fall back on the synchronous ones."""

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return [float(len(text))]


class Batching(OnlySync):
    """A model with its own batch method, which calls the single one."""

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [self._get_text_embedding(text) for text in texts]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.gather(*map(self._aget_text_embedding, texts))


def openai_embedding(**options: Any) -> OpenAIEmbedding:
    return OpenAIEmbedding(api_key="k", api_base=API_BASE, embed_batch_size=2, **options)


@pytest.fixture
def limiter() -> Limiter:
    return Limiter("1000 RPM", concurrency=1)


async def test_batch_text_and_query_are_one_admission_and_one_request_each(
    openai_api: ScriptedOpenAI, instrumentation: Instrumentation
) -> None:
    limiter = Limiter("1000 RPM")

    async def use(model: BaseEmbedding) -> None:
        await model.aget_text_embedding_batch(TEXTS)
        await asyncio.to_thread(model.get_text_embedding_batch, TEXTS)
        await model.aget_text_embedding("a")
        await model.aget_query_embedding("a")
        await model.aget_agg_embedding_from_queries(["a", "b"])
        await asyncio.to_thread(model.get_text_embedding, "a")
        await asyncio.to_thread(model.get_query_embedding, "a")

    await use(openai_embedding())
    plain = instrumentation.take()
    await use(limiter.wrap(openai_embedding()))
    assert instrumentation.take() == plain
    assert (admitted(limiter), in_flight(limiter)) == (12, 0)
    assert len(openai_api.requests) == 12 * 2


async def test_cached_embeddings_are_free(limiter: Limiter, openai_api: ScriptedOpenAI) -> None:
    model = limiter.wrap(openai_embedding(embeddings_cache=SimpleKVStore()))
    await model.aget_text_embedding_batch(TEXTS)
    cold = admitted(limiter), len(openai_api.requests)
    await model.aget_text_embedding_batch(TEXTS)
    await asyncio.to_thread(model.get_text_embedding_batch, TEXTS)
    await model.aget_text_embedding(TEXTS[0])
    await model.aget_query_embedding(TEXTS[0])
    assert cold == (3, 3)
    assert (admitted(limiter), len(openai_api.requests)) == (3, 3)


async def test_batch_is_settled_by_usage_that_sdk_receives(openai_api: ScriptedOpenAI) -> None:
    limiter = Limiter("100k TPM")
    estimator = DefaultEstimator()
    model = limiter.wrap(openai_embedding(), estimator=estimator)
    await model.aget_text_embedding_batch(["a word"] * 20)
    await asyncio.to_thread(model.get_text_embedding_batch, ["extraordinarily"] * 20)
    assert len(openai_api.requests) == 20
    assert charged(limiter) == [40 + 20]
    assert estimator.completion(MockLLM(), "hi", {}).output_tokens == 256


@pytest.mark.parametrize("make", [OnlySync, lambda: MockEmbedding(embed_dim=2)])
async def test_inherited_batch_method_costs_a_request_per_text(make: Any, limiter: Limiter) -> None:
    model = limiter.wrap(make())
    await model.aget_text_embedding_batch(TEXTS)
    assert admitted(limiter) == 6
    await asyncio.to_thread(model.get_text_embedding_batch, TEXTS)
    assert admitted(limiter) == 12


async def test_batch_split_into_requests_per_text_is_charged_for_each() -> None:
    limiter = Limiter("1000 RPM", "10k TPM", concurrency=1)
    model = limiter.wrap(Batching(embed_batch_size=2))
    await model.aget_text_embedding_batch(TEXTS)
    await asyncio.to_thread(model.get_text_embedding_batch, TEXTS)
    assert (admitted(limiter), charged(limiter)[0]) == (6, 12)


async def test_async_fallback_to_synchronous_embedding_does_not_block_loop() -> None:
    limiter = Limiter("1000 RPM", concurrency=1)
    model = limiter.wrap(OnlySync())
    lease = await limiter.acquire()
    waiting = asyncio.create_task(model.aget_text_embedding("a"))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    lease.release()
    assert await waiting == [1.0]
    assert admitted(limiter) == 2


class BatchingImages(MockMultiModalEmbedding):
    """A model with a batch method for images."""

    def _get_image_embeddings(self, img_file_paths: Any) -> list[list[float]]:
        return [[0.5] for _ in img_file_paths]

    async def _aget_image_embeddings(self, img_file_paths: Any) -> list[list[float]]:
        return self._get_image_embeddings(img_file_paths)


@pytest.mark.parametrize(("cls", "requests"), [(MockMultiModalEmbedding, 7), (BatchingImages, 5)])
async def test_images_cost_a_request_each_or_a_batch(
    limiter: Limiter, cls: Any, requests: int
) -> None:
    model = limiter.wrap(cls(embed_dim=2))
    await model.aget_image_embedding("a.png")
    await model.aget_image_embedding_batch(["a.png", "b.png"])
    await asyncio.to_thread(model.get_image_embedding, "a.png")
    await asyncio.to_thread(model.get_image_embedding_batch, ["a.png", "b.png"])
    await model.aget_text_embedding("text")
    assert admitted(limiter) == requests
