"""The boundaries that readers of the code rely on."""

import ast
import asyncio
import importlib
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, Final

import pytest

import asyncbucket
from asyncbucket import Limiter

ROOT = Path(__file__).parents[1]
EXTRAS = {
    *("httpx", "httpx2", "llama_index", "openai", "opentelemetry", "prometheus_client", "redis"),
    *("rich", "stamina", "typer"),
}
PUBLIC_NAMES = {
    *("AcquireTimeout", "AsyncBucketError", "BucketStatistics", "Budget", "BudgetExceeded"),
    *("Cost", "CostExceedsLimit", "Explanation", "Lease", "Limit", "LimitSyntaxError"),
    *("LimitUse", "Limiter", "Plan", "Pool", "Price", "QueueFull", "Statistics", "StoreError"),
    *("TokenBucket", "UnknownPrice", "Waits", "WouldBlock", "agent", "budget", "deadline"),
    *("errors", "events", "pace", "plan", "presets", "prices", "priority", "settings"),
    *("sticky", "tenant"),
}

MEMBERS: Final = (FunctionType, staticmethod, classmethod, property)


def in_fresh_interpreter(code: str) -> list[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def core_modules() -> list[str]:
    pyproject: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = pyproject["tool"]["importlinter"]["contracts"]
    (core,) = (c["source_modules"] for c in contracts if c["id"] == "standard-library-core")
    found = (name.replace(".", "/") for name in core)
    files = [
        file
        for name in found
        for file in (*ROOT.glob(f"{name}.py"), *sorted(ROOT.glob(f"{name}/*.py")))
    ]
    return ["asyncbucket", *(_module(file) for file in files)]


def _module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_packages(module: str) -> set[str]:
    file = importlib.import_module(module).__file__
    assert file is not None
    names: set[str] = set()
    for node in ast.parse(Path(file).read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "asyncbucket")
    return {name.partition(".")[0] for name in names}


def test_importing_asyncbucket_loads_no_optional_library() -> None:
    loaded = in_fresh_interpreter("import asyncbucket, sys; print(*sys.modules)")
    assert "asyncbucket.core.limiter" in loaded
    assert EXTRAS & set(loaded) == set()


def test_core_imports_only_the_standard_library() -> None:
    known = {*sys.stdlib_module_names, "asyncbucket"}
    foreign = {module: imported_packages(module) - known for module in core_modules()}
    assert {module: names for module, names in foreign.items() if names} == {}


def frames_of(call: Callable[[], Coroutine[Any, Any, object]]) -> list[str]:
    """Return the module of the core that each Python frame of ``call`` is of."""
    core, found = str(ROOT / "asyncbucket" / "core"), list[str]()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(core):
            found.append(Path(frame.f_code.co_filename).stem)

    async def main() -> None:
        running: Any = await call()
        sys.setprofile(note)
        try:
            await running()
        finally:
            sys.setprofile(None)

    asyncio.run(main())
    return found


async def idle() -> Any:
    return passing_at_once(await used_limiter(), used=None)


async def settled() -> Any:
    return passing_at_once(await used_limiter(), used=80)


async def contended() -> Any:
    """A call that waits for the only slot."""
    return waiting_for_slot(await used_limiter(), {})


async def contended_child() -> Any:
    """The same of a child with a limit of its own, with a priority and a deadline."""
    child = (await used_limiter()).child("chat", rpm=100)
    return waiting_for_slot(child, {"priority": 1, "timeout": 30})


async def used_limiter() -> Limiter:
    """Return a limiter that has worked out what its calls pass."""
    limiter = Limiter("500 RPM", "200k TPM", concurrency=1)
    for _ in range(2):
        async with limiter.acquire(tokens=100):
            pass
    return limiter


def passing_at_once(limiter: Limiter, *, used: int | None) -> Any:
    """Return what makes a call that does not wait."""

    async def run() -> None:
        async with limiter.acquire(tokens=100) as lease:
            if used is not None:
                lease.settle(tokens=used)

    return run


def waiting_for_slot(limiter: Limiter, options: dict[str, Any]) -> Any:
    """Return what makes a call wait until a slot is released."""
    held = limiter.acquire_nowait(tokens=100)

    async def call() -> None:
        async with limiter.acquire(tokens=100, **options):
            pass

    async def run() -> None:
        waiting = asyncio.ensure_future(call())
        for _ in range(3):
            await asyncio.sleep(0)
        held.release()
        await waiting

    return run


@pytest.mark.parametrize(
    ("call", "frames", "modules"),
    [(idle, 12, 5), (settled, 32, 8), (contended, 100, 8), (contended_child, 190, 10)],
)
def test_call_passes_few_frames_in_few_modules(
    call: Callable[[], Coroutine[Any, Any, object]], frames: int, modules: int
) -> None:
    """It can be followed by one person; moving code cannot meet it."""
    found = frames_of(call)
    assert len(found) <= frames
    assert len(set(found)) <= modules


def test_package_exports_exactly_the_expected_names() -> None:
    """Nobody adds or removes a public name by accident."""
    assert sorted(asyncbucket.__all__) == sorted(PUBLIC_NAMES)


def test_public_names_and_their_members_are_documented() -> None:
    """Every public method and property says what it does, itself or where it was declared."""
    public = {name: getattr(asyncbucket, name) for name in PUBLIC_NAMES}
    assert [name for name, each in public.items() if not each.__doc__] == []
    assert [
        f"{name}.{member}"
        for name, each in public.items()
        if inspect.isclass(each)
        for member in dir(each)
        if not member.startswith("_")
        and isinstance(inspect.getattr_static(each, member), MEMBERS)
        and not inspect.getdoc(getattr(each, member))
    ] == []


def test_subpackages_load_on_first_access() -> None:
    assert in_fresh_interpreter("import asyncbucket; print(asyncbucket.telemetry.__name__)") == [
        "asyncbucket.telemetry"
    ]
    assert asyncbucket.testing is sys.modules["asyncbucket.testing"]
