"""What every test relies on."""

import asyncio
import contextlib
import functools
import gc
import importlib
import inspect
import os
import pathlib
import pkgutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

import pytest

import asyncbucket.engine
import asyncbucket.feedback

if TYPE_CHECKING:
    from asyncbucket.testing import VirtualTime

# Set before anything that reads them is imported: no test reaches beyond this machine, and none
# depends on the key, the proxy or the terminal of the person who runs it.
OUTSIDE = (
    *("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "OPENAI_API_BASE", "OPENAI_API_KEY"),
    *("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"),
)
for name in OUTSIDE:
    for spelling in (name, name.lower()):
        _ = os.environ.pop(spelling, None)
os.environ["NO_PROXY"] = "*"
os.environ["COLUMNS"] = "80"

# Background processes may ignore Ctrl-C, and so would the programs that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)


def python(
    *arguments: "str | os.PathLike[str]", **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run an interpreter of its own, and return what it said."""
    usual: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 120}
    return subprocess.run([sys.executable, *arguments], **usual | options)  # noqa: PLW1510 - as above


#: What leans on the engine, as pyproject.toml's import contract lists it.
PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"
CONTRACTS = tomllib.loads(PYPROJECT.read_text("utf-8"))["tool"]["importlinter"]["contracts"]
CORE = {
    module.partition(".")[2]
    for contract in CONTRACTS
    if contract["id"] == "standard-library-core"
    for module in contract["source_modules"]
}
#: The folders whose tests are measured, if not all are: see `make test`.
MEASURED = os.environ.get("MEASURED", "").split()


async def until(is_so: Callable[[], object]) -> None:
    """Wait until something is so that no event tells of: in another thread, or in a server."""
    async with asyncio.timeout(90):  # many times what it takes, on a busy machine too
        while not is_so():  # noqa: ASYNC110 - there is nothing to await
            await asyncio.sleep(0.001)


def is_measured(item: pytest.Item) -> bool:
    """Tell whether the coverage of a test is of interest."""
    folder = item.path.relative_to(pathlib.Path(__file__).parent).parts[0]
    return item.get_closest_marker("heavy") is None and (not MEASURED or folder in MEASURED)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep collector and tracer from what is imported; together they would take half of the time.

    The core is imported before, because its own lines are to be measured.
    """
    for package in (asyncbucket.engine, asyncbucket.feedback):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for module in pkgutil.iter_modules(asyncbucket.__path__):
        if module.name in CORE:
            importlib.import_module(f"asyncbucket.{module.name}")
    gc.disable()
    try:
        with untraced() if MEASURED else contextlib.nullcontext():
            return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_scanned() -> None:
    """Keep the collector from what earlier modules left; many tests call it."""
    _ = gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measure coverage only where it is of interest: a tracer makes a test three times as slow."""
    with contextlib.nullcontext() if is_measured(item) else untraced():
        return (yield)


@contextlib.contextmanager
def untraced() -> Generator[None]:
    """Measure nothing, neither here nor in processes that are started."""
    tracer, in_threads = sys.gettrace(), threading.gettrace()
    if tracer is None:
        yield
        return
    sys.settrace(None)
    threading.settrace(None)
    in_processes = os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    try:
        yield
    finally:
        sys.settrace(tracer)
        threading.settrace(in_threads)
        if in_processes is not None:
            os.environ["COVERAGE_PROCESS_CONFIG"] = in_processes


#: Fixtures that are on virtual time, and `run` a test there.
ON_VIRTUAL_TIME = {"time", "virtual_time", "memory", "bench", "stage"}


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> list[pytest.Function] | None:
    """Run an async test that takes ``virtual_time``, or something of a folder that is on it, there."""
    if not (name.startswith("test_") and inspect.iscoroutinefunction(obj)):
        return None
    taken = ON_VIRTUAL_TIME & inspect.signature(obj).parameters.keys()
    if not taken:
        return None
    test = _run_on_virtual_time(obj, taken.pop())
    setattr(collector.obj, name, test)
    return list(collector._genfunctions(name, test))


def _run_on_virtual_time(
    test: Callable[..., Coroutine[Any, Any, None]], name: str
) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        time: VirtualTime = fixtures[name]
        time.run(test(**fixtures))

    return run
