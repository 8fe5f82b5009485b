"""Every row of the failure table in the docs has its test."""

import re
from pathlib import Path

HERE = Path(__file__).parent
#: The tests that every store must pass.
SUITE = HERE / "conformance"
PAGE = HERE.parents[1] / "docs" / "shared-stores.md"


def test_tests_named_in_failure_table_exist() -> None:
    """The tests that a row names exist."""
    there = {
        name
        for file in (*HERE.glob("test_*.py"), *SUITE.glob("*.py"))
        for name in re.findall(
            r"^ *(?:async )?def (test_\w+)", file.read_text("utf-8"), re.MULTILINE
        )
    }
    rows = [row for row in PAGE.read_text("utf-8").splitlines() if "`test_" in row]
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert len(rows) >= 15
    assert named - there == set()


def test_acl_in_docs_is_the_tested_one() -> None:
    """The ACL in the docs is that of the login in the TLS test."""
    page, test = PAGE.read_text("utf-8"), (HERE / "test_redis_places.py").read_text("utf-8")
    shown = re.search(r"ACL SETUSER limits on >password (.*?)\n\n", page, re.DOTALL)
    used = re.search(r"RULES = \((.*?)\)", test, re.DOTALL)
    assert shown is not None
    assert used is not None
    assert shown[1].split() == re.sub(r'"', "", used[1]).split()
