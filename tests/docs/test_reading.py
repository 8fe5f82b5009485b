"""Pages are easy to read: short, active sentences, and guides for one sitting."""

from pathlib import Path

import pytest

from tests.docs.reading import ROOT, faults, pages, read, to_understand


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_is_easy_to_read(page: Path) -> None:
    assert faults(page) == []


def test_code_tables_and_comments_have_no_sentences() -> None:
    page = """
# A title. It counts as words alone
<!-- Nobody sees this. -->

One sentence with `code.that().dots` in it. Another, with a [link](http://a.b/c.d), e.g. this: {doc}`page`

- An item
  of two lines
- Another one

| a cell. Another. | is passed. |
|---|---|

```python
print("It is printed. It is not read.")
```
"""
    assert read(page).sentences == (
        "One sentence with § in it.",
        "Another, with a link, e.g. this: page",
        "An item of two lines",
        "Another one",
    )


def test_passive_is_a_form_of_be_before_a_participle() -> None:
    passive = ("The call was not admitted.", "It is often kept.", "It isn't logged.")
    active = ("The limiter admits the call.", "This is a need, and it is red.")
    assert read(" ".join(passive + active)).passive == passive


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("so many words " * 8 + ".", "24.0 words a sentence, not 22"),
        ("It is done. I do it.", "50% passive sentences, not 15%"),
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
