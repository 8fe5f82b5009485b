"""The wheel and the source distribution hold what they should, and their metadata says so."""

import ast
import configparser
import email.message
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
#: Extras for those who work on asyncbucket; all others are for users.
FOR_DEVELOPERS = {"bench", "dev", "docs", "test"}


def info(unpacked: Path, name: str) -> str:
    """Return a file of the wheel's metadata."""
    (folder,) = unpacked.glob("*.dist-info")
    return (folder / name).read_text("utf-8")


@pytest.fixture
def metadata(unpacked: Path) -> email.message.Message:
    """Return the metadata that an index shows."""
    return Parser().parsestr(info(unpacked, "METADATA"))


def requirements(metadata: email.message.Message, extra: str) -> set[str]:
    """Return what an extra installs, according to the wheel."""
    condition = f"extra == '{extra}'"
    lines = metadata.get_all("Requires-Dist", [])
    return {line.partition(";")[0].strip() for line in lines if condition in line}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """It has all of `asyncbucket/`: modules, scripts of the Redis store, the typing marker."""
    with zipfile.ZipFile(wheel) as archive:
        ours = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert ours == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "asyncbucket").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "asyncbucket/py.typed" in ours
    assert any(name.endswith(".lua") for name in ours)


def test_wheel_without_extras_requires_nothing(metadata: email.message.Message) -> None:
    """All its requirements belong to extras."""
    assert [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each] == []


def test_all_extra_installs_exactly_what_user_extras_install(
    metadata: email.message.Message,
) -> None:
    """`asyncbucket[all]` leaves out no user's extra, and brings no developer's tool."""
    extras = set(metadata.get_all("Provides-Extra", []))
    wanted = {
        requirement
        for extra in extras - FOR_DEVELOPERS - {"all"}
        for requirement in requirements(metadata, extra)
    }

    assert extras >= FOR_DEVELOPERS
    assert requirements(metadata, "all") == wanted


def test_metadata_has_readme_licence_python_and_typing(metadata: email.message.Message) -> None:
    """They are the readme, the licence, the oldest Python and the marker for types."""
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text("utf-8").strip()


def test_entry_points_exist_in_the_wheel(unpacked: Path) -> None:
    """The command's function and the fixtures' module are in the wheel."""
    points = configparser.ConfigParser()
    points.read_string(info(unpacked, "entry_points.txt"))
    named = [value for section in points.sections() for _, value in points.items(section)]

    for target in named:
        module, _, function = target.partition(":")
        path = unpacked / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        defined = {getattr(node, "name", None) for node in ast.parse(file.read_text("utf-8")).body}
        assert not function or function in defined, target
    assert named == ["asyncbucket.cli:main", "asyncbucket.testing.pytest_plugin"]


def test_source_distribution_builds_the_same_wheel(wheel: Path, rebuilt: Path) -> None:
    """They are equal to the byte, except for the archive's time stamps."""
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(rebuilt) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
        assert [name for name in ours.namelist() if ours.read(name) != theirs.read(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "tests/core/test_limiter.py",
        "benchmarks/__main__.py",
        "docs/index.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "SECURITY.md",
    ],
)
def test_source_distribution_holds_what_packagers_need(source: Path, name: str) -> None:
    """With tests, docs and licence, a distribution can build and test from it alone."""
    assert (source / name).is_file()
