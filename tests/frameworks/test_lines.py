"""Each line of the table *Others, in one line* of docs/frameworks.md paces what it makes.

`make frameworks` has an environment with all of them but ag2, which asks for a newer openai than others
allow; elsewhere what is not installed is skipped.
"""

import asyncio
import contextlib
import importlib
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider
from tests.frameworks.test_frameworks import PAGE

pytestmark = [pytest.mark.real_clock, pytest.mark.filterwarnings("default")]

LINES: Mapping[str, str] = dict(
    re.findall(r"^\| ([\w-]+) [\d.]+ \| `(\w+\(.+)` \|$", PAGE, re.MULTILINE)
)
ASKED = [{"role": "user", "content": "Why?"}]


async def haystack(generator: Any) -> None:
    chat = importlib.import_module("haystack.dataclasses").ChatMessage
    await generator.run_async([chat.from_user("Why?")])


async def smolagents(model: Any) -> None:
    text = [{"type": "text", "text": "Why?"}]
    await asyncio.to_thread(model.generate, [{"role": "user", "content": text}])


async def ag2(config: Any) -> None:
    await importlib.import_module("ag2").Agent("poet", config=config).ask("Why?")


#: Where what a line makes is imported from, and how it is asked.
ASKS: Mapping[str, tuple[str, Callable[[Any], Awaitable[Any]]]] = {
    "mistralai": (
        "mistralai.client",
        lambda made: made.chat.complete_async(model="m", messages=ASKED),
    ),
    "groq": ("groq", lambda made: made.chat.completions.create(model="m", messages=ASKED)),
    "cohere": ("cohere", lambda made: made.chat(model="m", messages=ASKED)),
    "ollama": ("ollama", lambda made: made.chat(model="m", messages=ASKED)),
    "haystack-ai": ("haystack.components.generators.chat", haystack),
    "smolagents": ("smolagents", smolagents),
    "ag2": ("ag2.config", ag2),
}
#: Those whose API the bundled provider does not speak: it answers 404 or 401.
UNKNOWN = {"cohere", "ollama"}


def test_each_line_is_asked() -> None:
    assert LINES.keys() == ASKS.keys()


@pytest.mark.parametrize("package", ASKS)
async def test_line_paces_what_it_makes(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, ask = ASKS[package]
    try:
        module = importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{package} is not installed")
    with RateLimitedProvider() as provider:
        given = {
            "OPENAI_BASE_URL": provider.base_url,
            "GROQ_BASE_URL": provider.url,
            "CO_API_URL": provider.url,
            "OLLAMA_HOST": provider.url,
            "HAYSTACK_TELEMETRY_ENABLED": "False",
            **{f"{each}_API_KEY": "any" for each in ("OPENAI", "GROQ", "CO", "MISTRAL")},
        }
        for variable, value in given.items():
            monkeypatch.setenv(variable, value)
        limiter = Limiter("600 RPM", concurrency=3)
        line = LINES[package].replace("Mistral(", f'Mistral(server_url="{provider.url}", ')
        made_by = line.partition("(")[0]
        names = {made_by: getattr(module, made_by), "limiter": limiter}
        made = eval(line, names)  # noqa: S307 - our own documentation

        with contextlib.suppress(*[Exception] * (package in UNKNOWN)):
            await ask(made)

        assert limiter.statistics().admitted == 1
        assert limiter.statistics().in_flight == 0
        assert provider.statistics().requests == (package not in UNKNOWN)
