"""LlamaIndex behind limits: `wrap` for models and tools.

Read `asyncbucket.llama_index.wrap` first: how wrapping works, and why it works that way.
"""

try:
    from asyncbucket.llama_index.estimate import DefaultEstimator, Estimate, Estimator
    from asyncbucket.llama_index.events import (
        RateLimitPauseEvent,
        RateLimitRefusedEvent,
        RateLimitRetryEvent,
        RateLimitWaitEvent,
    )
    from asyncbucket.llama_index.wrap import limiter_of, wrap
    from asyncbucket.retry import Retry
except ModuleNotFoundError as error:
    raise ImportError(
        f'pacing LlamaIndex models needs {error.name}: pip install "asyncbucket[llama-index]"'
    ) from error

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
