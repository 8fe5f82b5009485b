"""Users of asyncbucket get its types: a module of theirs is checked against the wheel."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CONSUMER = Path(__file__).with_name("consumer.py").read_text("utf-8")
#: Checkers read httpx, httpx2 and the libraries beneath, on a machine that may be busy.
pytestmark = pytest.mark.timeout(300)
WRONG = "from asyncbucket import Limiter\nLimiter().acquire().nonsense\n"


@pytest.fixture(scope="module")
def python(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an interpreter whose asyncbucket is the wheel, with the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=variables))
    for installed in unpacked.iterdir():
        (packages / installed.name).symlink_to(installed)
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return mypy's cache folder."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("checker", "module", "says"),
    [
        ("mypy", CONSUMER, "Success"),
        ("basedpyright", CONSUMER, "0 errors"),
        ("mypy", WRONG, 'has no attribute "nonsense"'),
    ],
    ids=["consumer passes strict mypy", "consumer passes basedpyright", "the check can fail"],
)
def test_types_of_wheel_are_checked(
    python: Path, cache: Path, tmp_path: Path, checker: str, module: str, says: str
) -> None:
    """Each `assert_type` holds, and each wrong call is found; without the marker all would be Any."""
    (tmp_path / "consumer.py").write_text(module, "utf-8")
    options = [f"--python-executable={python}", f"--cache-dir={cache}", "--strict"]
    if checker == "basedpyright":
        options = ["--pythonpath", str(python), "--level=error"]
    done = subprocess.run(
        [sys.executable, "-m", checker, *options, "consumer.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=280,
    )
    assert says in done.stdout, done.stdout
