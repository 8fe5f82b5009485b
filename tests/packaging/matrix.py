"""Install the wheel as users do, once with each extra alone, and ask what it promises.

``python tests/packaging/matrix.py DIST`` takes the wheel and the source distribution from a folder,
makes a fresh environment for each of the Pythons and extras, installs from the index that pip is
set up with, and runs `promises.py` in it. `make test-wheel` builds them first. Needs a network, and
minutes: the tests beside this one ask what can be asked without.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROMISES = Path(__file__).with_name("promises.py")
#: Without extras, and with each of those that users install.
ALONE = (
    *("none", "llama-index", "openai", "http", "batch", "redis", "prometheus", "otel", "testing"),
    *("proxy", "cli", "plot", "all"),
)
#: Milliseconds that `import asyncbucket` may add to `import asyncio`.
ALLOWED = 50.0


def main() -> int:
    """Try all of it; return 1 if anything is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, help="where the wheel and the sdist are")
    parser.add_argument("--python", action="append", help="an interpreter; may be repeated")
    parser.add_argument("--extra", action="append", choices=ALONE, help="may be repeated")
    options = parser.parse_args()
    failed = [
        what
        for what, ok in _tries(
            options.dist, options.python or [sys.executable], options.extra or list(ALONE)
        )
        if not ok
    ]
    print(f"broken: {', '.join(failed)}" if failed else "all promises are kept")
    return int(bool(failed))


def _tries(dist: Path, pythons: list[str], extras: list[str]) -> Iterator[tuple[str, bool]]:
    (wheel,) = dist.glob("*.whl")
    (source,) = dist.glob("*.tar.gz")
    for python in pythons:
        for extra in extras:
            yield _try(python, extra, wheel)
        # What the wheel holds, a build from the source distribution holds too.
        yield _try(python, "none", source)


def _try(python: str, extra: str, archive: Path) -> tuple[str, bool]:
    named = [] if extra == "none" else [extra]
    what = f"{archive.suffix[1:]} with {extra} on {_version(python)}"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = str(Path(folder) / "bin" / "python")
        start = time.monotonic()
        install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        wanted = f"{archive.resolve()}[{extra}]" if named else str(archive.resolve())
        subprocess.run([*install, wanted], check=True)
        took = time.monotonic() - start
        done = subprocess.run(
            [inside, "-I", "-W", "error", str(PROMISES), *named],
            check=False,
            cwd=folder,
            timeout=600,
        )
        heavy = extra == "none" and _import_costs(inside) > ALLOWED
    broken = done.returncode != 0 or heavy
    print(f"{what}: installed in {took:.0f} s, {'broken' if broken else 'ok'}", flush=True)
    return what, not broken


def _import_costs(python: str) -> float:
    """Return the CPU, in milliseconds, that `import asyncbucket` adds to `import asyncio`."""
    costs = [_cpu(python, "import asyncio, asyncbucket") for _ in range(9)]
    less = [_cpu(python, "import asyncio") for _ in range(9)]
    added = min(costs) - min(less)
    print(f"  core: its import takes {added:.0f} ms of CPU more than asyncio's", flush=True)
    return added


def _cpu(python: str, code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, "-I", "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used * 1_000


def _version(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
