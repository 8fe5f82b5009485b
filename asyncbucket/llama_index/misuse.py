"""Misuse that undoes pacing: a warning names it, with the remedy.

Retry decorators around a paced model's methods cannot be detected; the docs mention them.
"""

import contextvars
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from weakref import WeakSet

import asyncbucket
from asyncbucket.by_loop import DUPLICATE_LIMITERS, WARNING_THRESHOLD
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import in_seconds
from asyncbucket.llama_index.clients import is_client

#: What `llama_index.core.workflow` sets around each step of a workflow.
_STEP_VARIABLE: Final = "step_worker"
#: A call that waited no longer than this (s) was hardly cut off by a time-out.
_MIN_WAIT: Final = 1.0
#: Limiters for which the warning about a workflow's time-out has been logged.
_WARNED: Final[WeakSet[Limiter]] = WeakSet()

_log: Final = logging.getLogger("asyncbucket")
_PACKAGE: Final = str(Path(asyncbucket.__file__).parent)


def warn_of_misuse(model: Any, limiter: Limiter, *, attempts: int) -> None:
    """Warn of each thing that undoes the pacing of ``model``."""
    if getattr(model, "rate_limiter", None) is not None:
        _warn(
            f"{type(model).__name__} has a rate_limiter of its own: each call would wait there, too, "
            f"with its slot held and as part of the model's latency; make it without rate_limiter="
        )
    for name, retries in _other_retries(model) if attempts > 1 else ():
        _warn(
            f"{type(model).__name__}.{name} tries again by itself (max_retries={retries}): one call "
            f"may become {attempts} x {retries + 1} requests, of which the limiter sees {attempts}; "
            f"make it with max_retries=0, or wrap with retry=False"
        )
    model_id = tuple(str(getattr(model, name, "")) for name in ("model", "model_name", "api_base"))
    key = getattr(model, "api_key", None)
    if DUPLICATE_LIMITERS.is_one_too_many(limiter, key, type(model), model_id):
        _warn(
            f"{WARNING_THRESHOLD} limiters like {limiter!r} were made for the same model and key: "
            f"one that is made for each request remembers nothing, and limits nothing; make it once, "
            f"when the program starts, and wrap with that"
        )


def warn_of_time_out(limiter: Limiter, waited: float) -> None:
    """Warn once of a call in a workflow's step that was cancelled after waiting ``waited`` seconds.

    The workflow's own error does not mention the queue. Whether its time-out or the step's own code
    cancelled the call cannot be seen.
    """
    in_a_step = any(variable.name == _STEP_VARIABLE for variable in contextvars.copy_context())
    if waited > _MIN_WAIT and in_a_step and limiter not in _WARNED:
        _WARNED.add(limiter)
        _log.warning(
            "a call inside a workflow was cancelled when it had waited %s for limiter %r: if the workflow's "
            "time-out did that, it is shorter than the queue; make it with timeout=None, or run it inside "
            "asyncbucket.deadline(...), which says what binds",
            *(in_seconds(waited), limiter.name),
        )


def _other_retries(model: Any) -> Iterator[tuple[str, int]]:
    """Yield what retries inside ``model`` and may not be changed: the user's own fields."""
    private: dict[str, Any] = getattr(model, "__pydantic_private__", None) or {}
    replaced = {name for name, value in private.items() if is_client(value)}
    for name, value in {**vars(model), **private}.items():
        # No code of an unknown object is run: its properties may open connections.
        retries = inspect.getattr_static(value, "max_retries", None)
        if type(retries) is int and retries > 0 and name not in replaced:
            yield name, retries


def _warn(message: str) -> None:
    """Warn at the line that called asyncbucket."""
    frame, level = sys._getframe(), 1  # noqa: SLF001 - skip_file_prefixes exists from 3.12 on
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
