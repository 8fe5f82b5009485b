"""What workers do to the books, as values: applied at once, and written down for other processes."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from asyncbucket.core.limits import Limit
from asyncbucket.stores.sqlite.books import Books
from asyncbucket.stores.store import Batch, Correction, Terms


@dataclass(frozen=True, slots=True)
class Commit:
    """See `Books.commit`."""

    worker: str
    life: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """See `Books.heartbeat`."""

    worker: str
    life: int
    slots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hold:
    """See `Books.hold`."""

    span: int
    gradually: bool


@dataclass(frozen=True, slots=True)
class Configure:
    """See `Books.configure`."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class Leave:
    """See `Books.leave`."""

    worker: str


Verb: TypeAlias = Commit | Heartbeat | Hold | Configure | Leave


def apply(verb: Verb, books: Books, now: int) -> Any:
    """Apply ``verb`` to ``books`` at ``now``, and return its answer."""
    match verb:
        case Commit(worker, life, batch):
            return books.commit(worker, batch, now, life=life)
        case Heartbeat(worker, life, slots):
            return books.heartbeat(worker, slots, now, life=life)
        case Hold(span, gradually):
            return books.hold(span, now, gradually=gradually)
        case Configure(terms):
            return books.configure(terms, now)
        case Leave(worker):
            return books.leave(worker)


def to_text(verb: Verb) -> str:
    """Return ``verb`` as one line of JSON, whose integers are exact however long."""
    match verb:
        case Commit(worker, life, batch):
            data: list[Any] = [
                "commit",
                worker,
                life,
                [
                    [correction.start, dict(correction.booked), dict(correction.used)]
                    for correction in batch.corrections
                ],
                batch.released,
                [{name: n for name, n in amounts.items() if n} for amounts in batch.calls],
                batch.horizon,
            ]
        case Heartbeat(worker, life, slots):
            data = ["heartbeat", worker, life, slots]
        case Hold(span, gradually):
            data = ["hold", span, gradually]
        case Configure(terms):
            data = ["configure", terms_to_data(terms)]
        case Leave(worker):
            data = ["leave", worker]
    return json.dumps(data, separators=(",", ":"))


def from_text(text: str) -> Verb:
    """Return the verb that `to_text` wrote."""
    match json.loads(text):
        case ["commit", worker, life, corrections, released, calls, horizon]:
            batch = Batch(
                corrections=tuple(
                    Correction(start=start, booked=booked, used=used)
                    for start, booked, used in corrections
                ),
                released=tuple(released),
                calls=tuple(calls),
                horizon=horizon,
            )
            return Commit(worker, life, batch)
        case ["heartbeat", worker, life, slots]:
            return Heartbeat(worker, life, tuple(slots))
        case ["hold", span, gradually]:
            return Hold(span, gradually)
        case ["configure", terms]:
            return Configure(terms_from_data(terms))
        case ["leave", worker]:
            return Leave(worker)
        case _:
            raise ValueError(f"no such entry: {text[:80]}")


def terms_to_data(terms: Terms) -> dict[str, Any]:
    """Return ``terms`` in a form that JSON can hold."""
    return {
        "limits": [asdict(limit) for limit in terms.limits],
        "concurrency": terms.concurrency,
    }


def terms_from_data(data: Mapping[str, Any]) -> Terms:
    """Return the terms from which `terms_to_data` made ``data``."""
    limits: Iterable[dict[str, Any]] = data["limits"]
    return Terms(limits=tuple(Limit(**limit) for limit in limits), concurrency=data["concurrency"])
