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

import dataclasses
from collections.abc import Callable
from importlib import import_module
from logging import DEBUG, INFO, Logger, getLogger
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.engine.events import Event
from asyncbucket.engine.limiter import Limiter
from asyncbucket.telemetry.metrics import as_given
from asyncbucket.telemetry.stats import StatsServer, Trace, report, serve_stats

if TYPE_CHECKING:
    from asyncbucket.telemetry.to_opentelemetry import opentelemetry
    from asyncbucket.telemetry.to_prometheus import prometheus

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

#: The extra that each of these needs.
_EXTRAS: Final = {"opentelemetry": "otel", "prometheus": "prometheus"}
#: Fields of events that are amounts by resource.
_AMOUNTS: Final = {"cost", "reserved", "used", "corrects"}


def logging(
    limiter: Limiter, *, threshold: float = 1.0, logger: Logger | str = "asyncbucket.events"
) -> Callable[[], None]:
    """Log each event as one line, with its fields as ``extra`` for structured logs.

    A wait of ``threshold`` or more is logged at INFO, everything else at DEBUG. An event's fields
    are attributes of the log record: ``asyncbucket.limiter``, ``asyncbucket.waited`` and so on.

    Args:
        limiter: the limiter to observe.
        threshold: the shortest wait, in seconds, that is logged at INFO.
        logger: where to log, a logger or its name.

    Raises:
        ValueError: ``threshold`` is not a number of seconds from 0 on.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0 s, not {threshold!r}")
    log = logger if isinstance(logger, Logger) else getLogger(logger)

    def observe(event: Event) -> None:
        level = INFO if getattr(event, "waited", -1.0) >= threshold else DEBUG
        if log.isEnabledFor(level):
            told: dict[str, Any] = {"event": type(event).__name__}
            for each in dataclasses.fields(event):
                value = getattr(event, each.name)
                told[each.name] = as_given(value) if each.name in _AMOUNTS else value
            # With a prefix, so that they cannot clash with the record's own attributes.
            extra = {f"asyncbucket.{name}": value for name, value in told.items()}
            log.log(level, "%s: %s", event.limiter, _line(told), extra=extra)

    return limiter.observe(observe)


def _line(told: dict[str, Any]) -> str:
    """Return the event and what is known of it: ``Admitted requests=1 waited=1.834``."""
    words = [told["event"]]
    for name, value in told.items():
        if name == "cost":
            words += [f"{resource}={amount}" for resource, amount in value.items()]
        elif name not in {"event", "limiter", "at"} and value not in (None, {}, ""):
            words.append(f"{name}={round(value, 3) if isinstance(value, float) else value!r}")
    return " ".join(words)


def llama_index(limiter: Limiter) -> Callable[[], None]:
    """Send refusals, pauses and retries through LlamaIndex's instrumentation.

    They are events of `asyncbucket.llama_index`, dispatched in the span of the code that asked for
    the admission. Wrapped models and tools report their waits by themselves, with or without this.

    Args:
        limiter: the limiter to observe.

    Raises:
        ImportError: LlamaIndex is not installed; the message names the extra.
    """
    from asyncbucket.llama_index.events import observe

    return observe(limiter)


def __getattr__(name: str) -> object:
    """Load what needs a library of its own on first use."""
    if name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.to_{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f'telemetry.{name} needs {error.name}: pip install "asyncbucket[{_EXTRAS[name]}]"'
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
