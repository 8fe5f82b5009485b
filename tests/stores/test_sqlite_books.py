"""The pure parts: the books, the verbs that change them, and both as text."""

from random import Random

import pytest

from asyncbucket import Limit
from asyncbucket.core.meters import Bucket, Window
from asyncbucket.feedback.pause import Pause
from asyncbucket.stores import Batch, Correction, Outcome, Terms
from asyncbucket.stores.sqlite import serialization, verbs
from asyncbucket.stores.sqlite.books import Books
from asyncbucket.stores.sqlite.clock import Reading, SharedClock
from asyncbucket.stores.sqlite.verbs import Commit, Configure, Heartbeat, Hold, Leave, Verb

SECOND = 1_000_000_000
LIFE = 30 * SECOND
TERMS = Terms(
    limits=(
        Limit("requests", 500, per=60, burst=7),
        Limit("tokens", 200_000, per=60),
        Limit("requests", 10_000, per=86_400),
    ),
    concurrency=6,
)


def some_verb(random: Random, starts: list[int]) -> Verb:
    """Return anything that a worker may do."""
    worker = random.choice("abc")
    match random.randrange(12):
        case 0:
            return Heartbeat(worker, LIFE, (f"{worker}:{random.randrange(20)}",))
        case 1:
            return Hold(random.randrange(SECOND), random.random() < 0.5)
        case 2:
            amount = random.choice([500, 501])
            return Configure(Terms(limits=(Limit("requests", amount, per=60, burst=7),)))
        case 3:
            return Configure(TERMS)
        case 4:
            return Leave(worker)
        case _:
            return some_commit(random, worker, starts)


def some_commit(random: Random, worker: str, starts: list[int]) -> Commit:
    """Return a batch of calls, with a correction of an earlier one."""
    call = {"requests": random.choice([1, 1, 9]), "tokens": random.randrange(9_000)}
    corrections = [
        Correction(start=start, booked=call, used={"requests": 0, "tokens": random.randrange(500)})
        for start in random.sample(starts, min(1, len(starts)))
    ]
    batch = Batch(
        corrections=tuple(corrections),
        released=(f"{worker}:{random.randrange(20)}",),
        calls=({**call, "concurrency": 1},) * random.randrange(4),
    )
    return Commit(worker, LIFE, batch)


@pytest.mark.parametrize("seed", range(8))
def test_books_rebuilt_from_journal_match_the_original(seed: int) -> None:
    """Books read from text at any point, and fed the journal since, give the same answers."""
    random = Random(seed)
    ours, now, starts = Books(TERMS), 0, [0]
    theirs = serialization.from_text(serialization.to_text(ours))
    for step in range(300):
        now += random.randrange(2 * SECOND)
        verb = some_verb(random, starts)
        ours_says = verbs.apply(verb, ours, now)
        assert verbs.apply(verbs.from_text(verbs.to_text(verb)), theirs, now) == ours_says
        assert ours.checksum() == theirs.checksum()
        if isinstance(verb, Commit):
            starts += [b.start for b in ours_says.bookings if b.outcome is Outcome.BOOKED]
        if step % 50 == seed:
            theirs = serialization.from_text(serialization.to_text(theirs))
        assert ours.should_ask("a", now + SECOND) == theirs.should_ask("a", now + SECOND)
    assert ours.peek(now) == theirs.peek(now)
    assert serialization.to_text(ours) == serialization.to_text(theirs)


def test_every_meter_field_is_saved_or_derived_from_terms() -> None:
    """Each new slot of a meter must be written, too, and only this test would tell."""
    follow = {"burst", "p", "q", "depth", "slack"}
    assert set(serialization.BUCKET) | follow == set(Bucket.__slots__)
    follow = {"amount", "window", "_grain", "_hold"}
    assert {*serialization.WINDOW, *follow, "lent"} == set(Window.__slots__)
    assert set(serialization.PAUSE) == set(Pause.__slots__)
    held_otherwise = {"terms", "limits", "gates", "line", "turns", "pause"}
    assert set(serialization.BOOKS) | held_otherwise == set(vars(Books(TERMS)))


def test_asking_whose_turn_it_is_does_not_change_books() -> None:
    """Processes look at different instants, and must still keep the same books."""
    books = Books(TERMS)
    verbs.apply(Commit("a", LIFE, Batch(calls=({"concurrency": 1},) * 7)), books, 0)
    before = serialization.to_text(books)
    assert books.should_ask("a", 90 * SECOND)
    assert not books.should_ask("a", SECOND)
    assert serialization.to_text(books) == before


def test_unknown_journal_entry_is_refused() -> None:
    """A journal entry of another version must not be guessed at."""
    with pytest.raises(ValueError, match=r'no such entry: \["sing"\]'):
        verbs.from_text('["sing"]')


def test_bookings_of_lost_file_are_charged_to_its_successor() -> None:
    """A successor copied from some of ours is charged the rest; a fresh one is charged it all."""
    limit = Terms(limits=(Limit("requests", 100, per=60, burst=10),))
    ours = Books(limit)
    ours.commit("a", Batch(calls=({"requests": 2},)), 0, life=LIFE)
    origin = serialization.from_text(serialization.to_text(ours))
    copied, afresh = serialization.from_text(serialization.to_text(ours)), Books(limit)
    ours.commit("a", Batch(calls=({"requests": 3},)), 0, life=LIFE)
    for each in (copied, afresh):
        each.commit("b", Batch(calls=({"requests": 4},)), 0, life=LIFE)
    copied.absorb(ours, 0, origin=origin)
    assert (copied.peek(0).limits[0].used, copied.peek(0).limits[0].available) == (9, 1)
    afresh.absorb(ours, 0, origin=Books(limit))
    assert (afresh.peek(0).limits[0].used, afresh.peek(0).limits[0].available) == (9, 1)


class Hands:
    """A wall clock and a steady one that are turned by hand."""

    def __init__(self) -> None:
        self.wall = 1_000 * SECOND
        self.steady = 50 * SECOND

    def clock(self, boot: str) -> SharedClock:
        """Return the clock of a process that starts now."""
        return SharedClock(wall=lambda: self.wall, steady=lambda: self.steady, boot=boot)

    def pass_by(self, seconds: int) -> None:
        """Advance both clocks."""
        self.wall += seconds * SECOND
        self.steady += seconds * SECOND


def test_shared_clock_starts_at_wall_clock_and_ignores_its_jumps() -> None:
    """Setting the wall clock forward or back changes nothing until the next boot."""
    hands = Hands()
    first = hands.clock("boot-1")
    reading = first.read(None)
    assert reading.last == 1_000 * SECOND
    for jump in (3_600, -7_200):
        hands.wall += jump * SECOND
        hands.pass_by(10)
        late = hands.clock("boot-1")
        reading = late.read(reading)
        assert first.read(reading) == reading
    assert reading.last == 1_020 * SECOND
    assert late.now() == reading.last


def test_shared_clock_resumes_from_wall_clock_after_reboot() -> None:
    """The steady clock starts again, and the time that the machine was off has passed."""
    hands = Hands()
    reading = hands.clock("boot-1").read(None)
    hands.steady = 0
    hands.wall += 3_600 * SECOND
    assert hands.clock("boot-2").read(reading).last == 4_600 * SECOND


@pytest.mark.parametrize("boot", ["boot-2", ""])
def test_shared_clock_keeps_advancing_if_wall_clock_is_set_back(boot: str) -> None:
    """After a boot with a wrong wall clock, time goes on from the last instant in the file."""
    hands = Hands()
    reading = hands.clock("boot-1").read(None)
    hands.wall = 0
    clock = hands.clock(boot)
    reading = clock.read(reading)
    assert reading.last == 1_000 * SECOND
    hands.pass_by(1)
    reading = clock.read(reading)
    assert reading.last == 1_001 * SECOND
    assert hands.clock(boot).read(reading) == Reading(boot, reading.ahead, reading.last)
