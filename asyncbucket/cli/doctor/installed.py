"""What is installed: HTTP libraries, SDKs, nested retries, how texts are counted."""

import importlib
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final

from asyncbucket.cli.doctor.findings import Finding, bad, good, note

#: Each SDK: its package, its module, and the first major version that uses httpx2.
_SDKS: Final = (("openai", "openai", 3), ("anthropic", "anthropic", 1))
_FAMILIES: Final = ("httpx", "httpx2")
#: The packages of asyncbucket's extras that have a range of versions worth checking.
_CHECKED_PACKAGES: Final = (
    "llama-index-core",
    "stamina",
    "redis",
    "prometheus-client",
    "durationpy",
)

VersionLookup = Callable[[str], str | None]


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def http_families(lookup: VersionLookup = version_of) -> Iterator[Finding]:
    """Report which HTTP clients are installed."""
    found = {family: lookup(family) for family in _FAMILIES}
    if not any(found.values()):
        yield note(
            "HTTP",
            "neither httpx nor httpx2 is installed, so limiter.transport() has nothing to pace",
            "pip install httpx",
        )
        return
    versions = ", ".join(f"{family} {number}" for family, number in found.items() if number)
    yield good("HTTP", versions)
    if lookup("durationpy") is None:
        yield note(
            "HTTP",
            "headers that say durations such as 6m0s cannot be read",
            'pip install "asyncbucket[http]"',
        )


def sdks(lookup: VersionLookup = version_of) -> Iterator[Finding]:
    """Report which SDKs are installed, which HTTP library they use, and how often they retry."""
    for package, module, first_httpx2_major in _SDKS:
        number = lookup(package)
        if number is None:
            continue
        family = _FAMILIES[_major(number) >= first_httpx2_major]
        if lookup(family) is None:
            yield bad(
                package,
                f"{package} {number} sends by {family}, which is not installed",
                f"pip install --upgrade {package}",
            )
            continue
        yield good(package, f"{package} {number}, sends by {family}")
        yield from _retries_of(package, module)


def _retries_of(package: str, module: str) -> Iterator[Finding]:
    retries = getattr(importlib.import_module(module), "DEFAULT_MAX_RETRIES", 0)
    if retries:
        yield note(
            f"{package} retries",
            f"its clients try a call {retries + 1} times, beneath whatever else retries",
            "give max_retries=0 to a client on limiter.transport() or limiter.http_client(); "
            "wrapped LlamaIndex models see to it by themselves",
        )


def llama_index(lookup: VersionLookup = version_of) -> Iterator[Finding]:
    """Report the version of LlamaIndex, and which of its retries multiply."""
    number = lookup("llama-index-core")
    if number is None:
        return
    yield good("LlamaIndex", f"llama-index-core {number}")
    if lookup("llama-index-llms-openai") is not None:
        model = importlib.import_module("llama_index.llms.openai").OpenAI
        retries = model.model_fields["max_retries"].default
        yield note(
            "LlamaIndex retries",
            f"OpenAI(...) retries {retries} times around the SDK's own retries; that multiplies",
            "pace it with limiter.wrap(llm) or pace(llm, ...), which leaves one layer; "
            "unpaced models want max_retries=0",
        )


def ranges(
    lookup: VersionLookup = version_of,
    wanted: Callable[[], list[str] | None] = lambda: requires("asyncbucket"),
) -> Iterator[Finding]:
    """Compare versions with those that asyncbucket is tested with."""
    try:
        from packaging.requirements import Requirement

        lines = wanted() or []
    except (ModuleNotFoundError, PackageNotFoundError):  # without packaging, or in a source tree
        return
    for package in _CHECKED_PACKAGES:
        number = lookup(package)
        for requirement in map(Requirement, lines):
            if number is None or requirement.name != package:
                continue
            if not requirement.specifier.contains(number, prereleases=True):
                yield bad(
                    package,
                    f"{package} {number} is not in {requirement.specifier}, what asyncbucket is "
                    "tested with",
                    f'pip install "{package}{requirement.specifier}"',
                )
            break


def tokenizer(lookup: VersionLookup = version_of) -> Iterator[Finding]:
    """Report how texts are counted, and whether that may need the network."""
    if lookup("llama-index-core") is not None:
        from asyncbucket.llama_index.tokens import bundled_tokenizer

        if bundled_tokenizer() is None:
            yield note(
                "tokenizer",
                "wrapped models count tokens by characters: cl100k_base is not at hand",
                "pip install --upgrade llama-index-core tiktoken",
            )
        else:
            yield good("tokenizer", "cl100k_base from LlamaIndex's own files; no download")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if folder is not None and not os.path.isdir(folder):  # noqa: PTH112 - a text from outside
        yield note(
            "tokenizer",
            "TIKTOKEN_CACHE_DIR names no folder: tiktoken will download when LlamaIndex counts",
            "unset TIKTOKEN_CACHE_DIR, or fill the folder beforehand",
        )


def _major(number: str) -> int:
    found = re.match(r"\d+", number)
    return int(found[0]) if found else 0
