"""Observe what a limiter does: in the log, in Prometheus, in OpenTelemetry, in LlamaIndex's traces.

Each function switches one of them on for a limiter and all limiters below it, and returns a
function that switches it off again. They are observers (`Limiter.observe`), so they may be
combined; an error in one of them is logged once and disturbs no call.

>>> from asyncbucket import telemetry
>>> off = telemetry.prometheus(limiter)
>>> off()

`serve_stats` shows it to other programs on this machine, and `Trace` keeps the latest admissions.

Nothing that is shown holds a prompt, a key or the name of a tenant: a limiter is named by its path,
such as ``openai/chat``, and all its tenants share the name ``openai/chat/*``.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from asyncbucket.core.limiter import Limiter
from asyncbucket.telemetry.metrics import check_source
from asyncbucket.telemetry.stats import StatsServer, report, serve_stats
from asyncbucket.telemetry.to_llama_index import llama_index
from asyncbucket.telemetry.to_logging import logging
from asyncbucket.telemetry.trace import Trace

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider
    from prometheus_client import CollectorRegistry

__all__ = [
    "StatsServer",
    "Trace",
    "llama_index",
    "logging",
    "opentelemetry",
    "prometheus",
    "report",
    "serve_stats",
]


def prometheus(
    limiter: Limiter, *, registry: "CollectorRegistry | None" = None, max_limiters: int = 100
) -> Callable[[], None]:
    """Count into Prometheus metrics, which a scrape of ``registry`` shows.

    Any number of limiters may share a registry. A limiter's numbers include those of the limiters
    below it, as in its statistics. In prometheus_client's multiprocess mode the gauges are missing:
    what waits now is known to its own process alone.

    Args:
        limiter: the limiter to observe.
        registry: what to register with; by default prometheus_client's own ``REGISTRY``.
        max_limiters: how many limiters a registry tells apart; further children count only in the
            limiters above them, and others are labelled ``other``.

    Raises:
        ImportError: prometheus_client is not installed; the message names the extra.
        ValueError: this registry already observes the limiter, or one above or below it, so its
            calls would count twice; or ``max_limiters`` is not a whole number from 1 on.
        TypeError: ``limiter`` is not a limiter, or ``registry`` is not a registry.
    """
    check_source(limiter)
    try:
        from asyncbucket.telemetry.to_prometheus import watch
    except ModuleNotFoundError as error:
        raise ImportError(
            f'Prometheus metrics need {error.name}: pip install "asyncbucket[prometheus]"'
        ) from error
    return watch(limiter, registry, max_limiters=max_limiters)


def opentelemetry(
    limiter: Limiter,
    *,
    meter_provider: "MeterProvider | None" = None,
    tracer_provider: "TracerProvider | None" = None,
    attributes: Mapping[str, str] | None = None,
    max_limiters: int = 100,
) -> Callable[[], None]:
    """Measure with OpenTelemetry, and make a span of each wait within the span of the caller.

    The metrics are named like ASP.NET's, which are stable, with the prefix ``asyncbucket``:
    ``asyncbucket.rate_limiting.request.time_in_queue`` and so on. The span of a wait is not a span
    of inference and has no ``gen_ai.usage.*``, so beside an instrumentation of the model nothing is
    counted twice.

    Args:
        limiter: the limiter to observe.
        meter_provider: where metrics go; by default the global one.
        tracer_provider: where spans go; by default the global one.
        attributes: further attributes of each span, such as ``{"gen_ai.request.model": "gpt-4o"}``.
            A limiter named like a provider, ``openai`` or ``anthropic``, gives its spans
            ``gen_ai.provider.name`` by itself.
        max_limiters: how many limiters a meter provider tells apart, as for `prometheus`.

    Raises:
        ImportError: opentelemetry-api is not installed; the message names the extra.
        ValueError: as for `prometheus`, for the meter provider.
        TypeError: ``limiter`` is not a limiter.
    """
    check_source(limiter)
    try:
        from asyncbucket.telemetry.to_opentelemetry import watch
    except ModuleNotFoundError as error:
        raise ImportError(
            f'OpenTelemetry needs {error.name}: pip install "asyncbucket[otel]"'
        ) from error
    return watch(
        limiter,
        meter_provider,
        tracer_provider,
        attributes=attributes or {},
        max_limiters=max_limiters,
    )
