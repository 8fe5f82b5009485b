"""Misuse that undoes pacing, such as a second layer that retries: a warning names the remedy.

Clients of OpenAI's and Anthropic's SDKs are replaced by copies that do not retry, and the retries
of LlamaIndex's own classes are switched off by `max_retries`. What else retries is switched off
for each call where that is possible, and mentioned here where it isn't. (Retry decorators around a
paced model's methods cannot be detected; the docs mention them.)
"""

import functools
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncbucket

if TYPE_CHECKING:
    from asyncbucket.llama_index.pacing import Pacing

#: What retries beneath these classes, by module: the arguments that switch it off for one call, or
#: what to do about it. Of llama-index-llms-litellm 0.8 with litellm 1.110, and llama-index-llms-cohere
#: 0.9 with cohere 7.3.
_RETRYING: Final[Mapping[str, Mapping[str, Any] | str]] = {
    "llama_index.llms.litellm": {"num_retries": 0},
    "llama_index.llms.cohere": {"request_options": {"max_retries": 0}},
    "llama_index.embeddings.cohere": (
        "pass httpx_client=limiter.http_client(sync=True) and "
        "httpx_async_client=limiter.http_client() instead of wrapping it"
    ),
    "llama_index.embeddings.litellm": (
        "set DEFAULT_MAX_RETRIES=0 in the environment before litellm is imported"
    ),
    "llama_index.embeddings.together": (
        'use OpenAILikeEmbedding(api_base="https://api.together.xyz/v1"), which does not'
    ),
}
_BOTOCORE_REMEDY: Final = 'make it with botocore_config=Config(retries={"total_max_attempts": 1})'
_INTEGRATIONS: Final = ("llama_index.llms.", "llama_index.embeddings.")
_PACKAGE: Final = str(Path(asyncbucket.__file__).parent)


def unretried_options(llm: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that keep others from retrying a call of ``llm``, unless they are given."""
    options = _retrying(llm.__class__)
    if not isinstance(options, Mapping):
        return {}
    given = vars(llm).get("additional_kwargs") or {}
    return {k: v for k, v in options.items() if k not in kwargs and k not in given}


def warn_of_misuse(model: Any, pacing: "Pacing") -> None:
    """Warn of each thing that undoes the pacing of ``model``."""
    name = type(model).__name__
    if getattr(model, "rate_limiter", None) is not None:
        _warn(
            f"{name} has a rate_limiter of its own: each call would wait there, too, "
            f"with its slot held and as part of the model's latency; make it without rate_limiter="
        )
    remedy = _BOTOCORE_REMEDY if _has_retrying_botocore(model) else _retrying(model.__class__)
    if isinstance(remedy, str) and pacing.retrier.policy.attempts > 1:
        _warn(
            f"{name} tries failed requests again by itself, unseen by the limiter: {remedy}; "
            f"or wrap with retry=False, so that only one layer retries"
        )


def _has_retrying_botocore(model: Any) -> bool:
    """Tell whether a Bedrock model's client or its settings let botocore retry, as it does by default."""
    private: dict[str, Any] = getattr(model, "__pydantic_private__", None) or {}
    client = next((v for v in private.values() if type(v).__module__ == "botocore.client"), None)
    if client is None:
        return False
    retries = client.meta.config.retries or {}
    return bool(retries.get("total_max_attempts", retries.get("max_attempts", 1) + 1) > 1)


@functools.lru_cache(maxsize=256)
def _retrying(cls: Any) -> Mapping[str, Any] | str | None:
    """Return what is known of the integration that ``cls``, or one above it, is from."""
    modules = (base.__module__ for base in cls.__mro__)
    found = (each for each in modules if each.startswith(_INTEGRATIONS))
    return _RETRYING.get(".".join(next(found, "").split(".")[:3]))


def _warn(message: str) -> None:
    """Warn at the line that called asyncbucket."""
    frame, level = sys._getframe(), 1  # noqa: SLF001 - skip_file_prefixes exists from 3.12 on
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
