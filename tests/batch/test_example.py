"""The example of the docs, run as a reader runs it."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import python

EXAMPLE = Path(__file__).parents[2] / "examples" / "batch_with_resume.py"


@pytest.mark.real_clock
@pytest.mark.timeout(240)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_batch_pays_again_only_for_calls_in_flight(tmp_path: Path) -> None:
    done = python(str(EXAMPLE), cwd=tmp_path, env=os.environ | {"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    counts = re.search(r"(\d+) from the checkpoint, (\d+) asked for", done.stdout)
    assert counts is not None
    restored, called = map(int, counts.groups())
    assert restored + called == 300
    assert restored >= 100
    again = re.search(r"(\d+) were in flight at the kill", done.stdout)
    assert again is not None
    assert int(again[1]) <= 20
    assert "0 refused (429)" in done.stdout
