"""Random histories of several workers, in which a store has to answer like the reference.

The reference is `asyncbucket.stores.state.State`, which is pure: it is told when each batch was
applied. Instants are whole microseconds, as all instants of the limits are.
"""

from random import Random

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Amounts
from asyncbucket.stores.state import State
from asyncbucket.stores.store import Batch, Correction, Ledger, LimitConfig, Receipt

from .place import MILLISECOND, amount_of, config

_WINDOW = 0.512
_REQUESTS = amount_of("requests", 64, _WINDOW, 8)
_TOKENS = amount_of("tokens", 500, _WINDOW)
_SLOW = amount_of("tokens", 2_048, 5.12, 100)
CONFIGS = (
    config(_REQUESTS, concurrency=6),
    config(_REQUESTS, _TOKENS),
    config(_TOKENS, concurrency=3),
    config(_REQUESTS, _TOKENS, _SLOW, concurrency=9),
    config(amount_of("requests", 32, _WINDOW, 4), _SLOW, concurrency=4),
    config(amount_of("tokens", 4_096, 10.24, 1_000)),
    config(concurrency=5),
    config(),
    config(amount_of("tokens", 1_500, 86_400)),
    LimitConfig(limits=(_REQUESTS, _TOKENS), concurrency=5, learned=True),
)
#: Those that a day's reset frees, 20 s from the start of the tests that set the time.
DAILY = (
    config(_TOKENS, Limit("tokens", 2_000, per="day", resets="11:07 UTC")),
    config(Limit("tokens", 900, per="day", burst=300, resets="11:07 UTC"), concurrency=4),
    config(Limit("tokens", 1_500, per="day", resets="11:06 UTC"), concurrency=4),
)


class History:
    """Make up batches, and compare the receipts; ``life`` (ns) is that of the workers' slots."""

    def __init__(self, seed: int, limits: LimitConfig, now: int, *, life: int) -> None:
        self.random = Random(seed)
        self.state = State(limits, now)
        self.life = life
        self.held: dict[str, int] = {}
        #: Calls that were booked after the last change, and how much each has used.
        self._booked: list[tuple[int, Amounts]] = []
        self._began = self._changed = now

    def batch(self, worker: str, *, new: LimitConfig | None = None) -> Batch:
        """Make up what ``worker`` says next."""
        random, held = self.random, self.held.get(worker, 0)
        if random.random() < 0.5:
            held = random.randint(0, held)
        self.held[worker] = held
        some = [tuple(map(self._call, range(n))) for n in (1, 1, 2, 4, 8)]
        calls = random.choice([(), (), *some])
        return Batch(
            config=new,
            pause=random.choice([0] * 30 + [1, 200, 900]) * MILLISECOND,
            corrections=tuple(self._correction() for _ in range(random.choice([0, 0, 1, 4]))),
            held=held,
            calls=calls,
            waiting=random.choice([1, 2, 50]),
        )

    def check(self, ledger: Ledger, batch: Batch, receipt: Receipt) -> None:
        """Compare what the store says with what the reference does."""
        expected = self.state.apply(ledger.worker, batch, receipt.now, life=self.life)
        assert receipt == expected, (ledger.worker, batch)
        for call, booking in zip(batch.calls, receipt.bookings, strict=True):
            if booking.start > self._changed:
                self._booked.append((booking.start, call))
            self.held[ledger.worker] += call.get("concurrency", 0) * (booking.start > 0)

    def forget_calls(self, now: int) -> None:
        """Correct no earlier calls: a bucket may forgo refunds of calls under earlier limits."""
        self._booked.clear()
        self._changed = max(now, self.state.last_start)

    def _call(self, _: int) -> Amounts:
        random = self.random
        call = {
            "requests": random.choice([0, 1, 1, 1, 1, 12, 65]),
            "tokens": random.choice([1, 20, 100, 400]),
            "concurrency": random.choice([0, 1, 1, 1]),
        }
        return {name: amount for name, amount in call.items() if amount or random.random() < 0.5}

    def _correction(self) -> Correction:
        if not self._booked:
            return Correction(start=0, booked={}, used={})
        index = self.random.randrange(max(0, len(self._booked) - 12), len(self._booked))
        start, amounts = self._booked[index]
        factor = self.random.choice([0, 0, 0.5, 1, 1.5])
        used = {name: int(amount * factor) for name, amount in amounts.items()}
        self._booked[index] = (start, used)
        dated = self.random.random() < 0.2
        if dated and factor > 1:  # it was taken elsewhere before
            start -= self.random.choice([0, 10, 1_000]) * MILLISECOND
            if self._began - 500 * MILLISECOND < start <= self._began:
                start = self._began + 1_000  # the store was opened a moment before the reference
        return Correction(start=start, booked=amounts, used=used, dated=dated)
