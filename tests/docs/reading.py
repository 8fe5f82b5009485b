"""How hard pages are to read: `make docs` prints it, and the tests hold every page to the bounds.

What is measured is prose: paragraphs and the items of lists. Code, comments, tables and headings
have no sentences; tables and headings have words, though. A sentence is passive if a form of *be* or
*get* comes right before a participle, or with one adverb between the two.
"""

import re
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]

#: Words a sentence on average; passive sentences among all; words a page, outside *Understand*.
SENTENCE: Final = 22
PASSIVE: Final = 0.15
PAGE: Final = 1_200

_FENCE: Final = re.compile(r"^ *(```+|~~~+).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
_COMMENT: Final = re.compile(r"<!--.*?-->", re.DOTALL)
_TAG: Final = re.compile(r"</?\w[^>]*>")
_LINK: Final = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ROLE: Final = re.compile(r"\{\w+\}`([^`<]*)[^`]*`")
_CODE: Final = re.compile(r"`+[^`]+`+")
#: Where another sentence begins: behind a stop, with a capital, a digit, a quote or something set apart.
_STOP: Final = re.compile(r"(?<=[.!?])[)*\"']*\s+(?=[(*\"']*[A-Z0-9§])")
_WORD: Final = re.compile(r"[\w§]+(?:[.,'/-]\w+)*")
_ITEM: Final = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")

_IRREGULAR: Final = (
    "begun bound broken brought built caught chosen cut done drawn driven drunk fed felt forgotten "
    "found given had heard held hidden hit kept known laid led left lent lost made meant met paid put "
    "read run said seen sent set shown shut sold spent split spread taken taught thought thrown told "
    "understood withdrawn won worn written"
)
_PASSIVE: Final = re.compile(
    r"\b(?:am|is|are|was|were|be|been|being|gets?|got|isn't|aren't|wasn't|weren't)\s+"
    rf"(?:(?:not|never|also|still|often|only|already|then|just|all|both|\w+ly)\s+)?"
    rf"(?:\w{{2,}}[^e\W]ed|{_IRREGULAR.replace(' ', '|')})\b",
    re.IGNORECASE,
)


def read(text: str) -> tuple[int, list[str]]:
    """Return how many words a page of Markdown has, and its sentences."""
    text = _FENCE.sub("\n\n", _COMMENT.sub("", text))
    for mark, words in (_ROLE, r"\1"), (_LINK, r"\1"), (_TAG, ""), (_CODE, "§"):
        text = mark.sub(words, text)
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith(("|", "#", ":::", ">")):
            paragraphs.append([])
            continue
        if _ITEM.match(line):
            paragraphs.append([])
        paragraphs[-1].append(_ITEM.sub("", line).strip())
    sentences = [
        sentence
        for paragraph in paragraphs
        for sentence in _STOP.split(" ".join(paragraph))
        if _WORD.search(sentence)
    ]
    return len(_WORD.findall(text)), sentences


def pages() -> list[Path]:
    """Return README and the pages of the docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def to_understand() -> set[str]:
    """Return the pages that may be long: those that index.md has under *Understand*."""
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.MULTILINE | re.DOTALL)
    return {
        name.rpartition("<")[2].strip("> ")
        for tree in trees
        if ":caption: Understand\n" in tree
        for name in tree.splitlines()
        if name and not name.startswith(":")
    }


def faults(page: Path) -> list[str]:
    """Say what makes a page hard to read."""
    words, sentences = read(page.read_text("utf-8"))
    mean = sum(len(_WORD.findall(each)) for each in sentences) / max(1, len(sentences))
    passive = [each for each in sentences if _PASSIVE.search(each)]
    share = len(passive) / max(1, len(sentences))
    found: list[str] = []
    if mean > SENTENCE:
        longest = max(sentences, key=len)
        found.append(f"{mean:.1f} words a sentence, not {SENTENCE}; as in: {longest}")
    if share >= PASSIVE:
        listed = "\n  ".join(passive)
        found.append(f"{share:.0%} passive sentences, not {PASSIVE:.0%}:\n  {listed}")
    if page.parent.name == "docs" and page.stem not in to_understand() and words > PAGE:
        found.append(f"{words:,} words, not {PAGE:,}: cut it, or make two pages of it")
    return found


def main() -> int:
    """Print what makes pages hard to read; return 1 if anything does."""
    hard = {page.name: found for page in pages() if (found := faults(page))}
    for name, found in hard.items():
        print(name, *found, sep="\n  ")
    return int(bool(hard))


if __name__ == "__main__":
    sys.exit(main())
