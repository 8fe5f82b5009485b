"""The wheel in an interpreter that has the standard library and nothing else."""

import os
import subprocess
from pathlib import Path

from tests.conftest import python

PROMISES = Path(__file__).with_name("promises.py")
#: Modules of the standard library that the core needs, and asyncio has not loaded.
ALSO = {
    *("_bisect", "_decimal", "bisect", "copy", "dataclasses", "decimal", "fractions", "gc"),
    *("numbers", "org", "org.python", "org.python.core"),  # copy looks for Jython
}


def alone(unpacked: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(
        "-I", "-S", "-B", "-W", "error", *arguments, env={**os.environ, "WHEEL": str(unpacked)}
    )


def test_core_works_without_extras_and_the_rest_names_its_install_command(unpacked: Path) -> None:
    """Calls are paced, planned, shared and shown; everything else names its `pip install`."""
    done = alone(unpacked, str(PROMISES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") >= 12


def test_import_loads_only_the_core_and_few_stdlib_modules(unpacked: Path) -> None:
    """Beyond asyncio it loads its own core, and a few small modules of the standard library."""
    code = (
        f"import asyncio, sys; sys.path.insert(0, {str(unpacked)!r}); before = set(sys.modules);"
        "import asyncbucket; print(*sorted(sys.modules.keys() - before))"
    )
    done = alone(unpacked, "-c", code)
    loaded = set(done.stdout.split())
    assert "asyncbucket.core.limiter" in loaded
    assert {name for name in loaded if not name.startswith("asyncbucket")} <= ALSO
    parts = {name.rpartition(".")[0] for name in loaded if name.count(".") > 1}
    assert parts == {"asyncbucket.core"}, "a part that few need"
