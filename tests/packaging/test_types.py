"""Users of asyncbucket get its types: a module of theirs is checked against the wheel."""

import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import python
from tests.docs.test_lists import PROGRAMS

CONSUMER = Path(__file__).with_name("consumer.py").read_text("utf-8")
#: Checkers read httpx, httpx2 and the libraries beneath, on a machine that may be busy.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def interpreter(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an interpreter whose asyncbucket is the wheel, with the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=variables))
    for installed in unpacked.iterdir():
        (packages / installed.name).symlink_to(installed)
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("mypy --strict --python-executable={python} --cache-dir={cache}", "Success: no issues"),
        ("basedpyright --level=error --pythonpath={python}", "0 errors, "),
    ],
    ids=["mypy", "basedpyright"],
)
def test_users_programs_and_those_of_the_first_page_are_checked_against_the_wheel(
    interpreter: Path, tmp_path: Path, pytestconfig: Any, command: str, says: str
) -> None:
    """Each `assert_type` holds, and wrong calls are found; without the marker all would be Any."""
    for number, program in enumerate([CONSUMER, *PROGRAMS]):
        (tmp_path / f"program_{number}.py").write_text(program, "utf-8")
    # One of the two reads LlamaIndex: that takes half of the time.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-llama_index.*]\nfollow_imports = skip", "utf-8"
    )
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', "utf-8")
    cache = pytestconfig.cache.mkdir("mypy")  # the libraries are read once, not in every run
    given = command.format(python=interpreter, cache=cache).split()
    done = python("-m", *given, ".", cwd=tmp_path, timeout=280)
    assert says in done.stdout, done.stdout
