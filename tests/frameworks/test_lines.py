"""The lines that `doctor` and `Limiter.wrap` name are those of the page, and they name them."""

from pathlib import Path

import pytest

from asyncbucket import Limiter
from asyncbucket.cli import doctor
from asyncbucket.frameworks import FRAMEWORKS, Framework

WITH_CLASSES = {each.module: each for each in FRAMEWORKS if each.module}
PAGE = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text("utf-8")


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.package)
def test_page_has_the_lines_and_the_version(framework: Framework) -> None:
    assert [line for line in framework.lines if line not in PAGE] == []
    assert f" {framework.package} " in PAGE
    assert framework.lines or framework.unpaced


@pytest.mark.parametrize("module", WITH_CLASSES)
def test_wrap_names_what_paces_a_framework(module: str) -> None:
    framework = WITH_CLASSES[module]
    theirs = type("Model", (), {"__module__": f"{module}.models"})
    mine = type("Mine", (theirs,), {})()
    with pytest.raises(TypeError, match=r"^\S+\.Mine can't be wrapped; what paces ") as caught:
        Limiter("60 RPM").wrap(mine)
    assert framework.name in str(caught.value)
    assert framework.how in str(caught.value)


def test_doctor_tells_what_paces_each_framework_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"mcp": "2.3.0", "langchain-anthropic": "1.7.10", "unknown": "1"}
    monkeypatch.setattr(doctor, "version_of", found.get)
    assert [tuple(line) for line in doctor.frameworks()] == [
        (
            *("LangChain's ChatAnthropic", "note"),
            "1.7.10 is not paced as it is: it takes no HTTP client",
            "the subclass in the documentation, frameworks.html",
        ),
        ("MCP", "good", "2.3.0, paced by session = limiter.wrap(session)", None),
    ]
