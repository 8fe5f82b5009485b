"""One line for one model: a limiter of its own, and the model behind it."""

from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.core.terms import Concurrency, LimitKeywords

if TYPE_CHECKING:
    from os import PathLike

    from asyncbucket.llama_index.estimate import Estimator
    from asyncbucket.providers.prices import Prices
    from asyncbucket.retry import Retry

T = TypeVar("T")


def pace(  # noqa: PLR0913 - all but the limits by keyword
    obj: T,
    *limits: str | Limit,
    concurrency: Concurrency | None = None,
    name: str = "default",
    max_queue: int | None = None,
    timeout: float | None = None,
    store: Any = None,
    prices: "Prices | str | PathLike[str] | None" = None,
    retry: "Retry | int | None" = None,
    estimator: "Estimator | None" = None,
    **limits_by_keyword: Unpack[LimitKeywords],
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
        prices: see `Limiter`.
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
        prices=prices,
        **limits_by_keyword,
    )
    if not limiter.limits and limiter.concurrency is None:
        raise LimitSyntaxError("pace() without a limit would pace nothing: give e.g. rpm=500")
    return limiter.wrap(obj, retry=retry, estimator=estimator)
