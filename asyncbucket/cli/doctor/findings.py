"""What a finding is."""

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """How good a finding is."""

    #: As it should be.
    GOOD = "good"
    #: It works, but could be better, or is worth knowing.
    NOTE = "note"
    #: Something does not work, or not as it should.
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """Say what was found about something and, unless it is good, what to do about it."""

    about: str
    state: State
    found: str
    remedy: str | None = None

    def __post_init__(self) -> None:
        """Make sure that every problem comes with a remedy."""
        assert self.state is State.GOOD or self.remedy, f"{self.found}: no remedy"


def good(about: str, found: str) -> Finding:
    """Return a finding that needs nothing done."""
    return Finding(about, State.GOOD, found)


def note(about: str, found: str, remedy: str) -> Finding:
    """Return a finding that is worth knowing."""
    return Finding(about, State.NOTE, found, remedy)


def bad(about: str, found: str, remedy: str) -> Finding:
    """Return a problem."""
    return Finding(about, State.BAD, found, remedy)
