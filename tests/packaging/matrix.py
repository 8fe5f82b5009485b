"""Install the wheel as users do, once with each extra alone, and ask what it promises.

``python tests/packaging/matrix.py DIST`` takes the wheel and the source distribution from a folder,
makes a fresh environment for each of the Pythons and extras, installs from the index that pip is
set up with, and runs `promises.py` in it. `make test-wheel` builds them first. Needs a network, and
minutes: the tests beside this one ask what can be asked without.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PROMISES = Path(__file__).with_name("promises.py")
#: Without extras, and with each of those that users install.
ALONE = (
    *("none", "llama-index", "openai", "http", "batch", "redis", "prometheus", "otel", "testing"),
    *("proxy", "cli", "plot", "all"),
)


def main() -> int:
    """Try all of it; return 1 if anything is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, help="where the wheel and the sdist are")
    parser.add_argument("--python", action="append", help="an interpreter; may be repeated")
    parser.add_argument("--extra", action="append", choices=ALONE, help="may be repeated")
    options = parser.parse_args()
    (wheel,), (source,) = options.dist.glob("*.whl"), options.dist.glob("*.tar.gz")
    tries = [(extra, wheel) for extra in options.extra or ALONE]
    # What the wheel holds, a build from the source distribution holds too.
    tries.append(("none", source))
    broken = [
        f"{archive.name} with {extra} on {python}"
        for python in options.python or [sys.executable]
        for extra, archive in tries
        if not _keeps_its_promises(python, extra, archive)
    ]
    print(f"broken: {', '.join(broken)}" if broken else "all promises are kept")
    return int(bool(broken))


def _keeps_its_promises(python: str, extra: str, archive: Path) -> bool:
    named = [] if extra == "none" else [extra]
    print(f"{archive.name} with {extra} on {python}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = str(Path(folder) / "bin" / "python")
        install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        wanted = f"{archive.resolve()}[{extra}]" if named else str(archive.resolve())
        subprocess.run([*install, wanted], check=True)
        promises = [inside, "-I", "-W", "error", str(PROMISES), *named]
        return subprocess.run(promises, check=False, cwd=folder, timeout=600).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
