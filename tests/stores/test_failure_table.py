"""Every row of the failure tables in the docs has its test, which a comment names."""

import re
from pathlib import Path

HERE = Path(__file__).parent
#: The tests that every store must pass.
SUITE = HERE / "conformance"
DOCS = HERE.parents[1] / "docs"


def test_tests_named_in_failure_table_exist() -> None:
    there = {
        name
        for file in (*HERE.glob("test_*.py"), *SUITE.glob("*.py"))
        for name in re.findall(
            r"^ *(?:async )?def (test_\w+)", file.read_text("utf-8"), re.MULTILINE
        )
    }
    page = (DOCS / "stores.md").read_text("utf-8")
    tables = re.findall(r"^## What can go wrong.*?(?=^## )", page, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\|(?! what happens|---).*", "".join(tables), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"\b(test_\w+)", row)}
    assert [row for row in rows if "<!-- test_" not in row] == []
    assert len(named) >= 37  # a row may stand for several failures
    assert named - there == set()


def test_acl_in_docs_is_the_tested_one() -> None:
    page = (DOCS / "stores.md").read_text("utf-8")
    test = (HERE / "test_redis_places.py").read_text("utf-8")
    shown = re.search(r"ACL SETUSER limits on >password (.*?)\n\n", page, re.DOTALL)
    used = re.search(r"RULES = \((.*?)\)", test, re.DOTALL)
    assert shown is not None
    assert used is not None
    assert shown[1].split() == re.sub(r'"', "", used[1]).split()
