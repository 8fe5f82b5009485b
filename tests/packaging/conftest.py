"""The distributions that users download, built from this tree without a network."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import python

ROOT = Path(__file__).parents[2]
#: Extras for those who work on asyncbucket; all others are for users.
FOR_DEVELOPERS = {"bench", "crewai", "dev", "docs", "frameworks", "peers", "test"}


def build(kind: str, *, tree: Path, into: Path) -> Path:
    python("-m", "hatchling", "build", "-t", kind, "-d", into, check=True, cwd=tree)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree=ROOT, into=tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)  # noqa: S202 - built a moment ago, from this tree
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = build("sdist", tree=ROOT, into=tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(built) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree
