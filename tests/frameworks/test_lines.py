"""The lines that `doctor` and `Limiter.wrap` name are those of the page, and they name them."""

from pathlib import Path

import pytest

from asyncbucket import Limiter
from asyncbucket.cli import doctor
from asyncbucket.frameworks import FRAMEWORKS, Framework

PAGE = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text("utf-8")


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.package)
def test_page_has_the_lines_and_the_version(framework: Framework) -> None:
    assert [line for line in framework.lines if line not in PAGE] == []
    assert f" {framework.package} " in PAGE
    assert framework.lines or framework.unpaced


def a_class_of(module: str) -> type[object]:
    """Return a class that a framework might have."""
    return type("Model", (), {"__module__": f"{module}.models"})


@pytest.mark.parametrize(
    "framework",
    [each for each in FRAMEWORKS if each.module],
    ids=lambda framework: framework.package,
)
def test_wrap_names_what_paces_a_framework(framework: Framework) -> None:
    class Mine(a_class_of(framework.module or "")):  # type: ignore[misc]
        pass

    with pytest.raises(TypeError, match=r"^\S+\.Mine can't be wrapped; what paces ") as caught:
        Limiter("60 RPM").wrap(Mine())

    assert framework.name in str(caught.value)
    assert framework.how in str(caught.value)


def test_doctor_tells_what_paces_each_framework_it_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"mcp": "2.3.0", "langchain-anthropic": "1.7.10", "unknown": "1"}
    monkeypatch.setattr(doctor, "version_of", found.get)

    anthropic, mcp = doctor.frameworks()

    assert mcp == ("MCP", "good", "2.3.0, paced by session = limiter.wrap(session)", None)
    assert anthropic == (
        "LangChain's ChatAnthropic",
        "note",
        "1.7.10 is not paced as it is: it takes no HTTP client",
        "the subclass in the documentation, frameworks.html",
    )
