"""LlamaIndex behind limits: `wrap` for models and tools.

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
from asyncbucket.llama_index.wrap import limiter_of, wrap
from asyncbucket.retry import Retry

__all__ = [
    "DefaultEstimator",
    "Estimate",
    "Estimator",
    "RateLimitPauseEvent",
    "RateLimitRefusedEvent",
    "RateLimitRetryEvent",
    "RateLimitWaitEvent",
    "Retry",
    "limiter_of",
    "wrap",
]
