"""The reference is complete: every public name of the package, every method of a limiter."""

import inspect
from pathlib import Path

import asyncbucket
from asyncbucket import Limiter

PAGE = (Path(__file__).parents[2] / "docs" / "reference.md").read_text("utf-8")


def test_what_a_limiter_inherits_is_shown() -> None:
    """`wrap`, `transport` and `amap` are what most people look for, and stand in a base class."""
    limiter = PAGE.split(".. autoclass:: asyncbucket.Limiter\n")[1].split("\n\n")[0]

    assert ":inherited-members:" in limiter


def test_every_public_name_has_a_docstring_to_show() -> None:
    """What has none would be left out without a word."""
    public = [getattr(asyncbucket, name) for name in asyncbucket.__all__]
    public += [member for name, member in inspect.getmembers(Limiter) if not name.startswith("_")]

    assert [each for each in public if not inspect.getdoc(each)] == []
