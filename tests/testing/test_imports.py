import importlib
import sys

import pytest

from asyncbucket import testing
from tests.conftest import python


def test_virtual_time_and_assertions_load_no_web_framework() -> None:
    script = """
import sys
from asyncbucket.testing import assert_never_over, virtual_time
import asyncbucket.testing.pytest_plugin
print(sorted({"starlette", "uvicorn", "openai", "httpx"} & sys.modules.keys()), virtual_time)
"""
    done = python("-c", script, check=True)
    assert done.stdout.startswith("[] <function virtual_time at ")


def test_every_public_name_of_testing_can_be_loaded() -> None:
    assert dir(testing) == sorted(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = getattr(testing, "nonsense")  # noqa: B009 - a type checker would see it


def test_missing_extra_error_names_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", dict[str, object]().get)
    monkeypatch.delitem(sys.modules, "asyncbucket.testing.provider", raising=False)
    with pytest.raises(
        ImportError, match=r'starlette and uvicorn: pip install "asyncbucket\[testing\]"$'
    ):
        importlib.import_module("asyncbucket.testing.provider")
