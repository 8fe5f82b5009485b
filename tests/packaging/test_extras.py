"""Extras install what their parts of the package import, and nothing that no part imports."""

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.packaging.conftest import FOR_DEVELOPERS, ROOT

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
