"""A paced embedding model: each of its requests waits for one admission.

The methods that people call (``get_text_embedding_batch`` and the like) look into the embeddings
cache and split batches. What is left for the model goes to the private methods below, one request
each. Pacing there is exact with and without a cache: what is in the cache costs nothing.

The base class implements some of them by calling others. In that case ``_get_text_embeddings`` and
the like make one request a text, so each text pays for itself and the batch as such does not.
``_aget_text_embedding`` then calls its synchronous twin on the event loop: it pays without blocking
the loop, and the twin, called inside, does not pay again.

Whether a class's own batch method goes text by text shows only when it runs. So the batch is
admitted as one request, and each further text adds one: see `asyncbucket.llama_index.held`.
"""

# mypy: disable-error-code="safe-super"
# Some methods called by super() are abstract in LlamaIndex; what is paced is a concrete class.

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding

from asyncbucket.llama_index.estimate import Estimate
from asyncbucket.llama_index.mixin import Paced, pacing_of
from asyncbucket.llama_index.pacing import no_usage

if TYPE_CHECKING:
    from abc import ABC
    from dataclasses import InitVar

    from llama_index.core.schema import ImageType

    from asyncbucket.core.limiter import Limiter
    from asyncbucket.llama_index.estimate import Estimator
    from asyncbucket.retry import Retry

    class _Embedding(Paced, BaseEmbedding, ABC):
        """Let a type checker see what ``super()`` will find, and what a subclass is made with."""

        limiter: Limiter
        retry: InitVar[Retry | int | None] = None
        estimator: InitVar[Estimator | None] = None

    class _MultiModalEmbedding(_Embedding, MultiModalEmbedding, ABC):
        """The same for images."""

else:
    _Embedding = _MultiModalEmbedding = Paced


class RateLimitedEmbedding(_Embedding):
    """Pace an embedding model: put this mixin before the model's class, and pass the limiter.

    >>> class PacedEmbedding(RateLimitedEmbedding, OpenAIEmbedding):
    ...     '''OpenAI's embeddings under my limits.'''
    >>> embed_model = PacedEmbedding(limiter=limiter)

    `Limiter.wrap` does the same to an existing model. A batch of ``embed_batch_size`` texts is one
    request.
    """

    async def _aget_query_embedding(self, query: str) -> Embedding:
        send = functools.partial(super()._aget_query_embedding, query)
        return await pacing_of(self).call(send, _cost(self, [query]), read=no_usage)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        send = functools.partial(super()._aget_text_embedding, text)
        return await pacing_of(self).call(send, _cost(self, [text]), read=no_usage)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        send = functools.partial(super()._aget_text_embeddings, texts)
        if _is_inherited_from(BaseEmbedding, send):
            return await send()
        return await pacing_of(self).call(send, _cost(self, texts), read=no_usage)

    def _get_query_embedding(self, query: str) -> Embedding:
        send = functools.partial(super()._get_query_embedding, query)
        return pacing_of(self).call_sync(send, _cost(self, [query]), read=no_usage)

    def _get_text_embedding(self, text: str) -> Embedding:
        send = functools.partial(super()._get_text_embedding, text)
        return pacing_of(self).call_sync(send, _cost(self, [text]), read=no_usage)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        send = functools.partial(super()._get_text_embeddings, texts)
        if _is_inherited_from(BaseEmbedding, send):
            return send()
        return pacing_of(self).call_sync(send, _cost(self, texts), read=no_usage)


class RateLimitedMultiModalEmbedding(RateLimitedEmbedding, _MultiModalEmbedding):
    """Pace an embedding model for texts and images; an image costs a request and no tokens."""

    async def _aget_image_embedding(self, img_file_path: "ImageType") -> Embedding:
        send = functools.partial(super()._aget_image_embedding, img_file_path)
        return await pacing_of(self).call(send, _no_tokens, read=no_usage)

    async def _aget_image_embeddings(self, img_file_paths: "list[ImageType]") -> list[Embedding]:
        send = functools.partial(super()._aget_image_embeddings, img_file_paths)
        if _is_inherited_from(MultiModalEmbedding, send):
            return await send()
        return await pacing_of(self).call(send, _no_tokens, read=no_usage)

    def _get_image_embedding(self, img_file_path: "ImageType") -> Embedding:
        send = functools.partial(super()._get_image_embedding, img_file_path)
        return pacing_of(self).call_sync(send, _no_tokens, read=no_usage)

    def _get_image_embeddings(self, img_file_paths: "list[ImageType]") -> list[Embedding]:
        send = functools.partial(super()._get_image_embeddings, img_file_paths)
        if _is_inherited_from(MultiModalEmbedding, send):
            return send()
        return pacing_of(self).call_sync(send, _no_tokens, read=no_usage)


def _cost(model: Paced, texts: list[str]) -> Callable[[], Estimate]:
    def estimate() -> Estimate:
        return Estimate(input_tokens=pacing_of(model).estimator.embedding(texts), output_tokens=0)

    return estimate


def _no_tokens() -> Estimate:
    return Estimate(input_tokens=0, output_tokens=0)


def _is_inherited_from(base: type, send: "functools.partial[Any]") -> bool:
    """Tell whether a model inherits the method in ``send`` from ``base``, which calls others."""
    name: str = send.func.__name__
    return getattr(send.func, "__func__", None) is vars(base)[name]
