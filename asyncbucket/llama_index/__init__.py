"""LlamaIndex behind limits: `wrap` for models and tools, mixins for model classes of your own.

Read `asyncbucket.llama_index.wrap` first: how wrapping works, and why it works that way.
"""

try:
    from llama_index.core.llms.llm import LLM as _LLM
    from stamina import retry as _retry
except ModuleNotFoundError as error:
    raise ImportError(
        f'pacing LlamaIndex models needs {error.name}: pip install "asyncbucket[llama-index]"'
    ) from error
else:
    del _LLM, _retry  # imported only to see whether they are installed

from asyncbucket.llama_index.estimate import DefaultEstimator, Estimate, Estimator
from asyncbucket.llama_index.events import (
    RateLimitPauseEvent,
    RateLimitRefusedEvent,
    RateLimitRetryEvent,
    RateLimitWaitEvent,
)
from asyncbucket.llama_index.models import (
    RateLimitedEmbedding,
    RateLimitedLLM,
    RateLimitedMultiModalEmbedding,
)
from asyncbucket.llama_index.tools import ToolCost
from asyncbucket.llama_index.wrap import limiter_of, wrap
from asyncbucket.retry import Retry, RetryBudget

__all__ = [
    "DefaultEstimator",
    "Estimate",
    "Estimator",
    "RateLimitPauseEvent",
    "RateLimitRefusedEvent",
    "RateLimitRetryEvent",
    "RateLimitWaitEvent",
    "RateLimitedEmbedding",
    "RateLimitedLLM",
    "RateLimitedMultiModalEmbedding",
    "Retry",
    "RetryBudget",
    "ToolCost",
    "limiter_of",
    "wrap",
]
