"""The recipes of the cookbook are short, and strict type checkers accept what people copy."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "cookbook.md"
RECIPES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
LONGEST = 15


def test_recipe_has_at_most_fifteen_lines() -> None:
    lengths = [len([line for line in recipe.splitlines() if line]) for recipe in RECIPES]

    assert len(lengths) >= 10
    assert max(lengths) <= LONGEST


@pytest.mark.heavy
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("checker", "options", "says"),
    [
        ("mypy", ["--strict"], "Success"),
        ("basedpyright", ["--level=error", f"--pythonpath={sys.executable}"], "0 errors"),
    ],
)
def test_strict_type_checkers_accept_recipes(
    checker: str, options: list[str], says: str, tmp_path: Path
) -> None:
    """Each recipe is checked as a program of its own."""
    for number, recipe in enumerate(RECIPES):
        (tmp_path / f"recipe_{number}.py").write_text(recipe, "utf-8")
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", checker, *options, "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert says in done.stdout, done.stdout + done.stderr
