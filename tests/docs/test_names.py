"""What README and docs refer to exists: files, links, classes and their members."""

import functools
import inspect
import pkgutil
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in page.parts
)
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


@functools.cache
def source_of(class_name: str) -> str:
    """Return the text of a class and of those above it, or nothing if it is not ours."""
    for file in (ROOT / "asyncbucket").rglob("*.py"):
        if re.search(rf"^class {class_name}\b", file.read_text("utf-8"), re.MULTILINE):
            module = import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            classes = inspect.getmro(getattr(module, class_name))
            ours = [each for each in classes if each.__module__.startswith("asyncbucket.")]
            return "".join(map(inspect.getsource, ours))
    return ""


@each_page
def test_files_named_on_a_page_exist(page: Path) -> None:
    """Every path and link leads to a file."""
    text = page.read_text("utf-8")
    paths = re.findall(r"`((?:asyncbucket|tests|docs|benchmarks|examples)/[\w/.-]*)`", text)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_absolute_links_of_readme_lead_to_pages_and_files_of_this_tree() -> None:
    """README is also read where relative links lead nowhere."""
    text = (ROOT / "README.md").read_text("utf-8")
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    raw = urls["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    pages = re.findall(rf"{re.escape(urls['Documentation'])}([\w-]+)\.html", text)
    files = re.findall(rf"(?:{urls['Repository']}/blob/main/|{raw})([\w/.-]+)", text)
    assert len(pages) > 10
    assert [page for page in pages if not (ROOT / "docs" / f"{page}.md").exists()] == []
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert re.findall(r"(?:\]\(|src=\"|srcset=\")(?!https://)([^)\"]+)", text) == []


def test_readme_and_llms_txt_call_pages_by_their_titles() -> None:
    """The sidebar does so by itself."""
    for text in ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/llms.txt")):
        links = re.findall(r"\[([^\]]+)\]\((?:https://[^)]*/)?([\w-]+)\.html\)", text)
        pages = {page: (ROOT / "docs" / f"{page}.md").read_text("utf-8") for _, page in links}
        assert len(pages) > 10
        assert [title for title, page in links if f"# {title}\n" not in pages[page]] == []


@each_page
def test_class_members_named_on_a_page_exist(page: Path) -> None:
    """A renamed method must be renamed in the docs, too."""
    named = re.findall(r"`([A-Z]\w+)\.(\w+)(?:\([^`]*\))?`", page.read_text("utf-8"))
    texts = ((source_of(owner), owner, member) for owner, member in named)
    assert [
        f"{owner}.{member}"
        for text, owner, member in texts
        if text and not re.search(rf"\bdef {member}\b|\b{member}: |\b{member} = ", text)
    ] == []


def test_full_names_in_docstrings_exist() -> None:
    """`asyncbucket.some.name` can be looked up."""
    named = {
        name
        for file in (ROOT / "asyncbucket").rglob("*.py")
        for name in re.findall(r"(?<!`)`(asyncbucket(?:\.\w+)+)`", file.read_text("utf-8"))
    }
    for name in sorted(named):
        assert pkgutil.resolve_name(name) is not None
