"""Every row of the failure tables in the docs has its test."""

import re
from pathlib import Path

HERE = Path(__file__).parent
#: The tests that every store must pass.
SUITE = HERE / "conformance"
PAGE = HERE.parents[1] / "docs" / "shared-stores.md"
PAGES = (PAGE, PAGE.with_name("sqlite-store.md"))


def test_tests_named_in_failure_table_exist() -> None:
    there = {
        name
        for file in (*HERE.glob("test_*.py"), *SUITE.glob("*.py"))
        for name in re.findall(
            r"^ *(?:async )?def (test_\w+)", file.read_text("utf-8"), re.MULTILINE
        )
    }
    lines = [line for page in PAGES for line in page.read_text("utf-8").splitlines()]
    rows = [line for line in lines if "`test_" in line]
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert len(rows) >= 30
    assert named - there == set()


def test_acl_in_docs_is_the_tested_one() -> None:
    page, test = PAGE.read_text("utf-8"), (HERE / "test_redis_places.py").read_text("utf-8")
    shown = re.search(r"ACL SETUSER limits on >password (.*?)\n\n", page, re.DOTALL)
    used = re.search(r"RULES = \((.*?)\)", test, re.DOTALL)
    assert shown is not None
    assert used is not None
    assert shown[1].split() == re.sub(r'"', "", used[1]).split()
