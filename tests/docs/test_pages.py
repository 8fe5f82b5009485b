"""What README and docs show runs as a reader would run it: the blocks of a page in order.

The blocks of one page share a namespace and an event loop, `await` is allowed at the top level, and
the working directory is a fresh one. A `text` block is what the block before it printed. A page says
in HTML comments, which no reader sees, what it needs beyond that:

- `<!-- run: real -->` anywhere on the page: the machine's clock, and the bundled provider behind the
  address and key that OpenAI's clients find in the environment. Otherwise time is virtual: limiters
  and loops that the page makes run on it, so a page that waits for hours takes milliseconds. What
  such a page sets in LlamaIndex's `Settings` ends with it.
- `<!-- run: server -->`: the same, and a Valkey or Redis server at ``$LIMITS_URL``.
- `<!-- run: frameworks -->`: not here but by tests/frameworks, section by section: each needs packages that
  `make frameworks` installs.
- `<!-- skip: next "the reason" -->` before a block: it is shown, not run.
"""

import ast
import asyncio
import contextlib
import gc
import inspect
import io
import re
from collections.abc import Callable, Coroutine, Generator
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias
from unittest import SkipTest

import pytest
from sybil import Document, Example
from sybil.evaluators.python import pad
from sybil.parsers.myst import CodeBlockParser, SkipParser

from asyncbucket import Limiter, TokenBucket
from asyncbucket.testing import RateLimitedProvider, virtual_time
from tests.stores.conftest import SERVER, RunningServer

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (ROOT / "README.md", ROOT / "docs" / "llms.txt", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in page.parts
    and "```python" in (text := page.read_text("utf-8"))
    and "<!-- run: frameworks -->" not in text
)

PRINTED = "__printed__"

Run: TypeAlias = Callable[[Coroutine[Any, Any, object]], object]


def code_evaluator(run: Run) -> Callable[[Example], None]:
    """Make a function that executes a block; `run` drives it where it awaits."""

    def evaluate(example: Example) -> None:
        source = pad(example.parsed, example.line + example.parsed.line_offset)
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, example.path, "exec", flags=flags, dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            awaiting = eval(code, example.namespace)  # noqa: S307 - our own documentation
            if inspect.iscoroutine(awaiting):
                _ = run(awaiting)
        example.namespace[PRINTED] = printed.getvalue()

    return evaluate


def evaluate_output(example: Example) -> None:
    """Compare a `text` block with what the block before it printed."""
    assert example.namespace[PRINTED].rstrip() == example.parsed.rstrip(), f"at {example.line}"


def run_page(page: Path, run: Run) -> None:
    """Run every block of `page`; one that asks to be skipped must say why."""
    blocks = CodeBlockParser("python", code_evaluator(run))
    outputs = CodeBlockParser("text", evaluate_output)
    document = Document.parse(str(page), blocks, outputs, SkipParser())
    document.namespace["__name__"] = "__main__"
    for example in document.examples():
        with contextlib.suppress(SkipTest):
            example.evaluate()


@contextlib.contextmanager
def on_virtual_time(patch: pytest.MonkeyPatch) -> Generator[Run]:
    """Put the loops and limiters that a page makes on one virtual clock."""
    with virtual_time() as time:
        patch.setattr("asyncio.events.new_event_loop", time.new_loop)
        for make in (Limiter.__init__, TokenBucket.__init__):
            defaults = make.__kwdefaults__
            assert defaults is not None
            patch.setitem(defaults, "clock", time.clock)
        yield time.run


@contextlib.contextmanager
def on_real_time(patch: pytest.MonkeyPatch) -> Generator[Run]:
    """Run a page on the machine's clock, with the bundled provider where clients find it."""
    settings = vars(import_module("llama_index.core").Settings)
    for name in settings:
        patch.setitem(settings, name, settings[name])
    with RateLimitedProvider() as provider, asyncio.Runner() as runner:
        patch.setenv("OPENAI_API_BASE", provider.base_url)
        patch.setenv("OPENAI_BASE_URL", provider.base_url)
        patch.setenv("OPENAI_API_KEY", "test-key")
        yield runner.run


@contextlib.contextmanager
def with_server(patch: pytest.MonkeyPatch) -> Generator[Run]:
    """Run a page on the machine's clock with a server for shared limits."""
    if SERVER is None:
        pytest.skip("NO SERVER: install valkey-server (or redis-server) to run this page")
    with RunningServer(Path.cwd()) as server, on_real_time(patch) as run:
        patch.setenv("LIMITS_URL", server.url)
        yield run


STAGES = {"virtual": on_virtual_time, "real": on_real_time, "server": with_server}


def stage_of(page: Path) -> str:
    """Return how a page asks to be run."""
    asked = re.search(r"<!--+ run: (\w+) --+>", page.read_text("utf-8"))
    return asked[1] if asked else "virtual"


#: Pages that ask for another stage than virtual time wait on the machine's clock, as readers do.
STAGED = [
    pytest.param(page, marks=[pytest.mark.real_clock] if stage_of(page) != "virtual" else [])
    for page in PAGES
]


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("page", STAGED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_code_block_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader who types what a page shows sees no error."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, STAGES[stage_of(page)](patch) as run:
        patch.syspath_prepend(ROOT / "tests" / "stores")  # where a page imports `conformance` from
        run_page(page, run)
    # A page leaves its clients open, as LlamaIndex does; they must not warn in another test.
    _ = gc.collect()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_skipped_block_gives_a_reason(page: Path) -> None:
    """No example breaks unnoticed behind a skip without a reason."""
    skips = re.findall(r"<!--+ skip: next(.*?)--+>", page.read_text("utf-8"))
    assert [skip for skip in skips if not re.search(r'"[^"]+"', skip)] == []
