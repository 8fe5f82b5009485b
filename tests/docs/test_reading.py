"""Pages are easy to read: short, active sentences, and guides for one sitting."""

from pathlib import Path

import pytest

from tests.docs.reading import ROOT, faults, pages, read, to_understand


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_is_easy_to_read(page: Path) -> None:
    assert faults(page) == []


def test_docs_are_at_most_25_pages_and_20_000_words() -> None:
    """Code and what it prints come on top."""
    _, *guides = pages()
    assert len(guides) <= 25
    assert sum(read(page.read_text("utf-8"))[0] for page in guides) <= 20_000


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("so many words " * 8 + ".", "24.0 words a sentence, not 22"),
        (
            "It isn't logged. I do it, and it is red.\n\n```python\nx\n```",
            "50% passive sentences, not",
        ),
        ("It reads well. " * 401, "1,203 words, not 1,200"),
    ],
)
def test_hard_page_is_told_what_to_mend(tmp_path: Path, text: str, fault: str) -> None:
    page = tmp_path / "docs" / "guide.md"
    page.parent.mkdir()
    page.write_text(text)
    (found,) = faults(page)
    assert found.startswith(fault)


def test_only_pages_to_understand_may_be_long() -> None:
    assert {"guarantees", "architecture"} <= to_understand()
    assert "limits" not in to_understand()
