"""What comes out: one item, and what became of it."""

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


class Entry(NamedTuple):
    """One item on its way in."""

    number: int
    input: Any
    #: The key by which a checkpoint recognizes it.
    key: bytes = b""
    #: What the checkpoint has for it: a tuple of one result, because that may be None.
    stored: tuple[Any] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Item(Generic[T, R]):
    """One item that went in, and its result or error.

    Attributes:
        index: its place among the items, from 0.
        input: the item itself.
        error: what ``fn`` raised, or why it was not admitted; None if it has a result.
        restored: whether the result comes from a checkpoint, without a call.
    """

    index: int
    input: T
    _result: R | None = None
    error: Exception | None = None
    restored: bool = False

    @property
    def result(self) -> R:
        """What ``fn`` returned; for an item that failed, this raises its error."""
        if self.error is not None:
            raise self.error
        return cast("R", self._result)

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return self.error is None

    def __repr__(self) -> str:
        outcome = f"result={self._result!r}" if self.error is None else f"error={self.error!r}"
        restored = ", restored" if self.restored else ""
        return f"<Item {self.index}: {self.input!r}, {outcome}{restored}>"
