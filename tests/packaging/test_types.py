"""Users of asyncbucket get its types: a module of theirs is checked against the wheel."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CONSUMER = Path(__file__).with_name("consumer.py")
#: Checkers read httpx, httpx2 and the libraries beneath, on a machine that may be busy.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def environment(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment whose asyncbucket is the wheel, with the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=variables))
    for installed in unpacked.iterdir():
        (packages / installed.name).symlink_to(installed)
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the option for mypy's cache folder."""
    return f"--cache-dir={tmp_path_factory.mktemp('cache')}"


def check(*command: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Run a type checker on the consumer, in a folder without settings."""
    consumer = where / "consumer.py"
    consumer.write_text(CONSUMER.read_text("utf-8"), "utf-8")
    return subprocess.run(
        [sys.executable, "-m", *command, str(consumer)],
        capture_output=True,
        text=True,
        check=False,
        cwd=where,
        timeout=280,
    )


def test_consumer_module_passes_strict_mypy(environment: Path, cache: str, tmp_path: Path) -> None:
    """Each `assert_type` holds, and each wrong call is found."""
    python = f"--python-executable={environment / 'bin' / 'python'}"
    done = check("mypy", "--strict", python, cache, where=tmp_path)

    assert done.returncode == 0, done.stdout


def test_consumer_module_passes_basedpyright(environment: Path, tmp_path: Path) -> None:
    """An independent checker agrees."""
    python = environment / "bin" / "python"
    done = check("basedpyright", "--pythonpath", str(python), "--level=error", where=tmp_path)

    assert done.returncode == 0, done.stdout


def test_mypy_reports_misuse_of_the_installed_types(
    environment: Path, cache: str, tmp_path: Path
) -> None:
    """The check above can fail: without the marker for types, the package would be Any."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from asyncbucket import Limiter\nLimiter().acquire().nonsense\n", "utf-8")
    python = f"--python-executable={environment / 'bin' / 'python'}"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", cache, python, str(wrong)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert 'has no attribute "nonsense"' in done.stdout
