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

from importlib import import_module
from typing import TYPE_CHECKING, Final

from asyncbucket.telemetry.observers import Trace, llama_index, logging
from asyncbucket.telemetry.stats import StatsServer, report, serve_stats

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


def __getattr__(name: str) -> object:
    """Load what needs a library of its own on first use."""
    if name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value: object = getattr(import_module(f"{__name__}.to_{name}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'telemetry.{name} needs {error.name}: pip install "asyncbucket[{_EXTRAS[name]}]"'
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
