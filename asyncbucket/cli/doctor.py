"""`asyncbucket doctor`: what is installed here, and whose clients retry by themselves."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import typer

#: Packages whose clients retry by themselves, and all whose versions matter.
_RETRYING: Final = ("openai", "anthropic", "llama-index-llms-openai")
_PACKAGES: Final = (
    *(*_RETRYING, "llama-index-core", "httpx", "httpx2"),
    *("stamina", "redis", "prometheus-client", "opentelemetry-api"),
)


def doctor() -> None:
    """Say what is installed, and which clients retry by themselves.

    Examples:
        asyncbucket doctor
    """
    number = version_of("asyncbucket") or "(not installed)"
    typer.echo(f"asyncbucket {number} on {sys.implementation.name} {platform.python_version()}")
    found = {name: here for name in _PACKAGES if (here := version_of(name))}
    typer.echo(f"packages: {', '.join(map(' '.join, found.items()))}")
    if retrying := ", ".join(name for name in _RETRYING if name in found):
        typer.echo(
            f"note: clients of {retrying} retry by themselves, and layers of retries multiply\n"
            f"      -> limiter.wrap(...) and pace(...) leave one layer; give other clients max_retries=0"
        )


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
