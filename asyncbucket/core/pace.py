"""`pace`: put one model behind a limiter of its own."""

from typing import Any, TypeVar

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.feedback.adaptive import Concurrency

T = TypeVar("T")


def pace(
    obj: T,
    *limits: str | Limit,
    concurrency: Concurrency | None = None,
    name: str = "default",
    max_queue: int | None = None,
    timeout: float | None = None,
    store: Any = None,
    retry: Any = None,
    estimator: Any = None,
    **limits_by_keyword: Any,
) -> T:
    """Return ``obj``, a LlamaIndex LLM, embedding model or tool, paced by a limiter of its own.

    >>> llm = pace(OpenAI(model="gpt-4o-mini"), rpm=500, tpm=200_000, concurrency=20)

    Args:
        obj: see `Limiter.wrap`.
        limits: see `Limiter`.
        concurrency: see `Limiter`.
        name: see `Limiter`.
        max_queue: see `Limiter`.
        timeout: see `Limiter`.
        store: see `Limiter`.
        retry: see `asyncbucket.llama_index.wrap`.
        estimator: see `asyncbucket.llama_index.wrap`.
        limits_by_keyword: see `Limiter`.

    Raises:
        LimitSyntaxError: a limit cannot be read, or there is none.
        TypeError: ``obj`` cannot be wrapped.
        ValueError: as for `Limiter`.
    """
    limiter = Limiter(
        *limits,
        concurrency=concurrency,
        name=name,
        max_queue=max_queue,
        timeout=timeout,
        store=store,
        **limits_by_keyword,
    )
    if not limiter.limits and limiter.concurrency is None:
        raise LimitSyntaxError("pace() without a limit would pace nothing: give e.g. rpm=500")
    options = {"retry": retry, "estimator": estimator}
    return limiter.wrap(obj, **{key: value for key, value in options.items() if value is not None})
