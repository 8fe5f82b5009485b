"""Which models a pool can serve as one, and what to say about others.

Calls are prepared by the first model's class, and its replies are read by it: tools, streams and
structured output have the format of its provider. So the others must be of its family, as
``AzureOpenAI`` is of ``OpenAI``'s. Embedding models only turn text into numbers, which are of use
beside those of the same model alone.
"""

from collections.abc import Sequence
from typing import Any, Final

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.tools import BaseTool

from asyncbucket.core.limiter import Limiter
from asyncbucket.core.pool import Pool

#: What LLMs of any provider have in common.
_COMMON: Final = frozenset({*CustomLLM.__mro__, *FunctionCallingLLM.__mro__})
_VECTORS_BY: Final = ("model_name", "dimensions")


def refuse_single(obj: Any, limiter: Limiter) -> None:
    """Refuse to pace a single model or a tool by a pool.

    Raises:
        TypeError: so it is.
    """
    if not isinstance(limiter, Pool):
        return
    if isinstance(obj, BaseTool):
        raise TypeError("a pool paces models: wrap a tool by a limiter of its own")
    raise TypeError(
        f"one {type(obj).__name__} calls one provider, and pool {limiter.name!r} has "
        f"{len(limiter.members)}: wrap one model for each member, pool.wrap([llm_a, llm_b]); or, "
        f"without wrapping it, make the model with clients of pool.http_client({{limiter: "
        f'{{"base_url": ..., "headers": ...}}}})'
    )


def check_models(models: Sequence[Any], pool: Pool) -> None:
    """Refuse models that cannot serve as one.

    Raises:
        ValueError: there is not one for each member, one is paced already, or embedding models
            differ.
        TypeError: one is no model, or they are of different families.
    """
    members = ", ".join(repr(member.name) for member in pool.members)
    if len(models) != len(pool.members):
        raise ValueError(
            f"pool {pool.name!r} needs one model for each member, in their order ({members}), not "
            f"{len(models)}"
        )
    first = models[0]
    for model in models:
        name = type(model).__name__
        if not isinstance(model, LLM if isinstance(first, LLM) else BaseEmbedding):
            raise TypeError(
                f"a pool wraps LLMs or embedding models, one for each member, not {name} beside "
                f"{type(first).__name__}"
            )
        if isinstance(model, StructuredLLM):
            raise TypeError("wrap the models inside, and make the result structured afterwards")
        if hasattr(model, "paced_by"):
            raise ValueError(f"{model!r} is paced already: give the pool what it was made of")
        if isinstance(first, BaseEmbedding):
            _check_embedding(first, model)
        elif not (set(type(model).__mro__) & set(type(first).__mro__)) - _COMMON:
            raise TypeError(
                f"{name} and {type(first).__name__} format tools and replies differently, so they "
                f"cannot serve as one model: use classes of one family, such as OpenAI, AzureOpenAI "
                f"and OpenAILike"
            )


def _check_embedding(first: Any, model: Any) -> None:
    for name in _VECTORS_BY:
        ours, theirs = getattr(first, name, None), getattr(model, name, None)
        if ours != theirs:
            raise ValueError(
                f"vectors of different models do not compare: {name} is {ours!r} at the first, and "
                f"{theirs!r} at another"
            )
