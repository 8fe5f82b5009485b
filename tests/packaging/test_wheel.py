"""The wheel and the source distribution hold what they should, and their metadata says so."""

import configparser
import email.message
import os
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

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


def test_all_extra_installs_what_user_extras_install_and_no_extra_nothing(
    metadata: email.message.Message,
) -> None:
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
