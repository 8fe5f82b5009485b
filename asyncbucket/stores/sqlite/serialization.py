"""The books as text: the whole state of the meters, by name, as JSON.

What follows from the terms (rates, sizes) is not written, but computed from them.
"""

import json
from typing import Any, Final

from asyncbucket.stores.sqlite.books import Books
from asyncbucket.stores.sqlite.line import Line, Turn, Turns
from asyncbucket.stores.sqlite.verbs import terms_from_data, terms_to_data

#: The mutable state of each part. Together with what follows from the terms (and `Window.lent`,
#: which only the process itself knows) this is all; a test compares.
BUCKET: Final = ("tat", "full_at", "_dates", "_lows", "low")
WINDOW: Final = ("used", "_dates", "_units", "_last", "_recent", "_closes", "_forgotten")
PAUSE: Final = ("until", "_start", "_step", "_calls")
BOOKS: Final = ("edition", "slots", "workers", "last_start", "last_bound", "given")


def to_text(books: Books) -> str:
    """Return ``books`` as text."""
    data = _attributes_of(books, BOOKS)
    data["terms"] = terms_to_data(books.terms)
    data["pause"] = _attributes_of(books.pause, PAUSE)
    data["line"] = list(books.line)
    data["turns"] = list(books.turns)
    data["meters"] = [
        [_attributes_of(window, WINDOW), None if bucket is None else _attributes_of(bucket, BUCKET)]
        for _, window, bucket in books.limits.values()
    ]
    return json.dumps(data, separators=(",", ":"))


def from_text(text: str) -> Books:
    """Return the books that `to_text` wrote."""
    data = json.loads(text)
    books = Books(terms_from_data(data["terms"]))
    _set_attributes(books, BOOKS, data)
    _set_attributes(books.pause, PAUSE, data["pause"])
    books.line = Line(tuple(place) for place in data["line"])
    books.turns = Turns(Turn(*place) for place in data["turns"])
    for (_, window, bucket), (of_window, of_bucket) in zip(
        books.limits.values(), data["meters"], strict=True
    ):
        _set_attributes(window, WINDOW, of_window)
        if bucket is not None:
            _set_attributes(bucket, BUCKET, of_bucket)
    return books


def _attributes_of(part: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(part, name) for name in names}


def _set_attributes(part: object, names: tuple[str, ...], data: dict[str, Any]) -> None:
    for name in names:
        setattr(part, name, data[name])
