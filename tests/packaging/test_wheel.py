"""The wheel and the source distribution hold what they should, and their metadata says so."""

import ast
import configparser
import email.message
import functools
import os
import re
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.conftest import python
from tests.packaging.conftest import FOR_DEVELOPERS, ROOT, build

PROMISES = Path(__file__).with_name("promises.py")
#: Modules of the standard library that the core needs, and asyncio has not loaded.
ALSO = {
    *("_bisect", "_decimal", "bisect", "copy", "dataclasses", "decimal", "fractions", "gc"),
    *("_datetime", "datetime"),
    *("numbers", "org", "org.python", "org.python.core"),  # copy looks for Jython
}


def info(unpacked: Path, name: str) -> str:
    (folder,) = unpacked.glob("*.dist-info")
    return (folder / name).read_text("utf-8")


@pytest.fixture
def metadata(unpacked: Path) -> email.message.Message:
    return Parser().parsestr(info(unpacked, "METADATA"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        ours = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert ours == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "asyncbucket").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "asyncbucket/py.typed" in ours
    assert any(name.endswith(".lua") for name in ours)


def test_all_extra_installs_what_user_extras_install(metadata: email.message.Message) -> None:
    lines = [line.partition(";") for line in metadata.get_all("Requires-Dist", [])]
    extras = set(metadata.get_all("Provides-Extra", []))

    def requirements(extra: str) -> set[str]:
        return {name.strip() for name, _, marker in lines if f"extra == '{extra}'" in marker}

    users = extras - FOR_DEVELOPERS - {"all"}
    assert extras >= FOR_DEVELOPERS
    assert requirements("all") == {name for extra in users for name in requirements(extra)}
    assert all("extra ==" in marker for _, _, marker in lines)


def test_entry_points_are_in_the_wheel(unpacked: Path) -> None:
    points = configparser.ConfigParser()
    points.read_string(info(unpacked, "entry_points.txt"))
    named = [value for section in points.sections() for _, value in points.items(section)]
    assert named == ["asyncbucket.cli:main", "asyncbucket.testing.pytest_plugin"]


def test_sdist_builds_the_same_wheel(wheel: Path, source: Path, tmp_path: Path) -> None:
    rebuilt = build("wheel", tree=source, into=tmp_path)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(rebuilt) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
        assert [name for name in ours.namelist() if ours.read(name) != theirs.read(name)] == []


@pytest.mark.parametrize("folder", ["tests/engine", "benchmarks", "docs", "examples", "."])
def test_source_distribution_holds_what_packagers_need(source: Path, folder: str) -> None:
    """With tests, docs and licence, a distribution can build and test from it alone."""
    kinds = {".py", ".md", ".toml", ""}
    ours = {
        file.name
        for file in (ROOT / folder).iterdir()
        if file.is_file() and file.suffix in kinds and not file.name.startswith(".")
    }
    theirs = {file.name for file in (source / folder).iterdir()}
    assert ours <= theirs
    assert folder != "." or {"LICENSE", "Makefile", "CHANGELOG.md", "SECURITY.md"} <= theirs


def alone(unpacked: Path, *arguments: str) -> str:
    """Return what a program prints that has the wheel and the standard library alone."""
    env = {**os.environ, "WHEEL": str(unpacked)}
    done = python("-I", "-S", "-B", "-W", "error", *arguments, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_core_works_without_extras_and_the_rest_names_its_install_command(unpacked: Path) -> None:
    """Calls are paced, planned, shared and shown; everything else names its `pip install`."""
    assert alone(unpacked, str(PROMISES)).count(": ok") >= 11


def test_import_loads_only_the_core_and_few_stdlib_modules(unpacked: Path) -> None:
    """Beyond asyncio it loads its own core, and a few small modules of the standard library."""
    code = (
        f"import asyncio, sys; sys.path.insert(0, {str(unpacked)!r}); before = set(sys.modules);"
        "import asyncbucket; print(*sorted(sys.modules.keys() - before))"
    )
    loaded = set(alone(unpacked, "-c", code).split())
    assert "asyncbucket.engine.limiter" in loaded
    assert {name for name in loaded if not name.startswith("asyncbucket")} <= ALSO
    parts = {name.rpartition(".")[0] for name in loaded if name.count(".") > 1}
    assert parts == {"asyncbucket.engine"}, "a part that few need"


# --- Extras install what their parts of the package import, and nothing that no part imports ---


PACKAGE = ROOT / "asyncbucket"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
#: Which extras a part of the package may rely on; the longest matching path counts.
SERVES = {
    "": (),
    "batch": ("batch",),
    "cli": ("cli",),
    "cli/plan.py": ("cli", "plot"),
    "http": ("http",),
    "http_server.py": ("proxy",),
    "llama_index": ("llama-index",),
    "cli/proxy": ("proxy",),
    "retry.py": ("llama-index",),
    "stores/redis.py": ("redis",),
    "telemetry/to_opentelemetry.py": ("otel",),
    "telemetry/to_prometheus.py": ("prometheus",),
    "testing": ("testing",),
}
#: Distributions for the user's own imports, or for use without an import of ours.
FOR_THE_USER = {
    "openai": {"llama-index-llms-openai", "llama-index-embeddings-openai", "openai"},
    # What httpx's clients, streams and errors contain is read without importing its classes.
    "llama-index": {"httpx"},
    "http": {"httpx"},
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def modules() -> list[tuple[str, str]]:
    """Return each file of the package, with each library that it imports."""
    return [
        (file.relative_to(PACKAGE).as_posix(), name)
        for file in sorted(PACKAGE.rglob("*.py"))
        for name in sorted(imported(ast.parse(file.read_text("utf-8"))))
        if name not in sys.stdlib_module_names and name != "asyncbucket"
    ]


def imported(node: ast.AST) -> set[str]:
    names: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            names.add((child.module or "").partition(".")[0])
        elif not isinstance(child, ast.expr):
            names |= imported(child)
    return names


def named(extra: str) -> set[str]:
    found: set[str] = set()
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "asyncbucket":
            found.update(*map(named, requirement.extras))
        else:
            found.add(canonical(requirement.name))
    return found


@functools.cache
def required_by(name: str) -> frozenset[str]:
    """Return the distributions that one requires by itself on this system."""
    try:
        lines = requires(name) or []
    except PackageNotFoundError:  # not on this Python or system
        return frozenset()
    wanted = [Requirement(line) for line in lines]
    return frozenset(
        canonical(each.name)
        for each in wanted
        if each.marker is None or each.marker.evaluate({"extra": ""})
    )


def installed_by(names: set[str]) -> set[str]:
    """Return the distributions, and all that they require in turn."""
    found = names.union(*map(required_by, names))
    return found if found == names else installed_by(found)


#: The distributions that bring each module; it takes most of a second to find them.
distributions = functools.cache(packages_distributions)


def providers_of(module: str) -> set[str]:
    return {canonical(name) for name in distributions().get(module, [])}


def extras_of(path: str) -> tuple[str, ...]:
    parts = [part for part in SERVES if not part or path == part or path.startswith(f"{part}/")]
    return SERVES[max(parts, key=len)]


@pytest.mark.parametrize(("path", "module"), modules())
def test_extra_installs_every_module_its_part_imports(path: str, module: str) -> None:
    """No ModuleNotFoundError is possible after an extra was installed."""
    providers = providers_of(module)
    there = installed_by({name for extra in extras_of(path) for name in named(extra)})
    assert providers, f"{module} is not installed here, so nobody can say who brings it"
    assert providers & there, f"{path} imports {module}, which {extras_of(path)} do not install"


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - FOR_DEVELOPERS - {"all"}))
def test_every_distribution_of_an_extra_is_used(extra: str) -> None:
    """Nobody downloads what nothing imports; a part that moves must be changed here, too."""
    providers = {name for _, module in modules() for name in providers_of(module)}
    own = {canonical(Requirement(line).name) for line in EXTRAS[extra]} - {"asyncbucket"}
    assert own - providers <= FOR_THE_USER.get(extra, set())
    assert all((PACKAGE / part).exists() for part in SERVES)
