"""The recipes of the cookbook are short; what type checkers say of them is asked in test_types.py."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "cookbook.md"
RECIPES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
LONGEST = 15


def test_recipe_has_at_most_fifteen_lines() -> None:
    lengths = [len([line for line in recipe.splitlines() if line]) for recipe in RECIPES]
    assert len(lengths) >= 10
    assert max(lengths) <= LONGEST
