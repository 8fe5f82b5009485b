"""Which calls get in: limits, slots and scripted failures, decided in one step at one instant.

A call is admitted by all limits or charged by none. A refused call costs nothing; an admitted one
is charged even if it fails. All public methods may be called from any thread.
"""

import random
import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import Unpack

from asyncbucket.core.wording import read_count
from asyncbucket.testing.provider.policies import Policy, make_policy
from asyncbucket.testing.provider.settings import Failure, Options, Settings, settings_of
from asyncbucket.testing.provider.statistics import Arrival, ProviderStatistics

TOO_MANY_REQUESTS = 429
FIXED_AT_START = frozenset({"policy", "minute", "seed", "history", "port", "clock"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call was refused for rate.

    Attributes:
        reason: "requests", "tokens" or "concurrency".
        limit: The limit that refuses it.
        used: How much of it is used.
        requested: What the call asked for.
        wait: Nanoseconds until it would pass; None if waiting doesn't help or it is unknown.
    """

    reason: str
    limit: int
    used: int
    requested: int
    wait: int | None


class Admission:
    """Decide about calls, and keep a record of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._policies: dict[str, Policy] = {}
        self._scripted: deque[tuple[Failure, int]] = deque()
        self._rng = random.Random(settings.seed)  # noqa: S311 - repeatable, not secret
        self._arrivals: deque[Arrival] = deque(maxlen=settings.history)
        self._request_ids: set[str] = set()
        self._refused: Counter[str] = Counter()
        self._endpoints: Counter[str] = Counter()
        self._admitted = self._errors = self._invalid = self._tokens = 0
        self._in_flight = self._peak = self._disconnected = self._duplicates = 0
        self._set_limits()

    def enter(
        self, endpoint: str, tokens: int, *, request_id: str | None = None
    ) -> Refusal | Failure | None:
        """Admit a call or say why not; None means that it is in and must `leave`.

        A call with a `Failure` other than 429 is in as well, and must `leave`, too.
        """
        with self._lock:
            now = self.settings.clock()
            outcome = self._decide(tokens, now)
            admitted = not _is_refusal(outcome)
            self._endpoints[endpoint] += 1
            self._arrivals.append(Arrival(now, endpoint, tokens, admitted))
            if admitted:
                self._charge(tokens, now, request_id)
                self._errors += outcome is not None
            else:
                reason = outcome.reason if isinstance(outcome, Refusal) else "scripted"
                self._refused[reason] += 1
            return outcome

    def leave(self, *, disconnected: bool = False) -> None:
        """Give the slot of an admitted call back."""
        with self._lock:
            self._in_flight -= 1
            self._disconnected += disconnected

    def note_invalid(self) -> None:
        """Count a call that was refused unread."""
        with self._lock:
            self._invalid += 1

    def budget(self) -> list[tuple[str, int, int, int]]:
        """Return for each limit its name, amount, what remains, and nanoseconds until it is full."""
        with self._lock:
            now = self.settings.clock()
            return [
                (name, policy.limit, policy.remaining(now), policy.reset(now))
                for name, policy in self._policies.items()
            ]

    def statistics(self) -> ProviderStatistics:
        """Take a consistent snapshot."""
        with self._lock:
            return ProviderStatistics(
                requests=sum(self._endpoints.values()),
                admitted=self._admitted,
                refused_429=dict(self._refused),
                errors=self._errors,
                invalid=self._invalid,
                tokens=self._tokens,
                in_flight=self._in_flight,
                peak_in_flight=self._peak,
                disconnected=self._disconnected,
                duplicates=self._duplicates,
                endpoints=dict(self._endpoints),
            )

    def arrivals(self) -> list[Arrival]:
        """Copy the latest arrivals, oldest first."""
        with self._lock:
            return list(self._arrivals)

    def fail_next(self, count: int, failure: Failure) -> None:
        """Let the next `count` calls fail, after those scripted before; 0 forgets all of them.

        Raises:
            ValueError: If `count` is not a whole number from 0 on.
        """
        read_count(count, "count")
        with self._lock:
            if count:
                self._scripted.append((failure, count))
            else:
                self._scripted.clear()

    def reconfigure(self, **options: Unpack[Options]) -> None:
        """Change settings while running; what was used stays used.

        Raises:
            ValueError: For a bad value, or a setting that is fixed at the start.
        """
        fixed = sorted(FIXED_AT_START & options.keys())
        if fixed:
            raise ValueError(f"{', '.join(fixed)} can't change while the provider runs")
        with self._lock:
            self.settings = settings_of(options, self.settings)
            self._set_limits()

    def _set_limits(self) -> None:
        settings = self.settings
        now = settings.clock()
        for name, limit in (("requests", settings.rpm), ("tokens", settings.tpm)):
            if limit is None:
                self._policies.pop(name, None)
            elif name in self._policies:
                self._policies[name].resize(limit, now)
            else:
                self._policies[name] = make_policy(
                    settings.policy, limit, minute=settings.minute_ns, now=now
                )

    def _refusal(self, tokens: int, now: int) -> Refusal | None:
        slots = self.settings.concurrency
        if slots is not None and self._in_flight >= slots:
            return Refusal("concurrency", slots, self._in_flight, 1, None)
        worst = None
        for name, policy in self._policies.items():
            amount = tokens if name == "tokens" else 1
            wait = policy.wait(amount, now)
            if wait == 0 or (worst and (worst.wait is None or (wait and wait <= worst.wait))):
                continue
            used = policy.limit - policy.remaining(now)
            worst = Refusal(name, policy.limit, used, amount, wait)
        return worst

    def _charge(self, tokens: int, now: int, request_id: str | None) -> None:
        for name, policy in self._policies.items():
            policy.charge(tokens if name == "tokens" else 1, now)
        self._admitted += 1
        self._tokens += tokens
        self._in_flight += 1
        self._peak = max(self._peak, self._in_flight)
        if request_id is not None:
            self._duplicates += request_id in self._request_ids
            self._request_ids.add(request_id)

    def _decide(self, tokens: int, now: int) -> Refusal | Failure | None:
        failure = self._scripted[0][0] if self._scripted else self._always
        if failure is None or failure.status != TOO_MANY_REQUESTS:
            refusal = self._refusal(tokens, now)
            if refusal is not None:
                return refusal
        if failure is None:
            return self._random_failure()
        self._consume_script()
        return failure

    def _consume_script(self) -> None:
        if self._scripted:
            failure, count = self._scripted.popleft()
            if count > 1:
                self._scripted.appendleft((failure, count - 1))

    @property
    def _always(self) -> Failure | None:
        status = self.settings.always
        return None if status is None else Failure(status)

    def _random_failure(self) -> Failure | None:
        rate = self.settings.error_rate
        return Failure(500) if rate and self._rng.random() < rate else None


def _is_refusal(outcome: Refusal | Failure | None) -> bool:
    if isinstance(outcome, Failure):
        return outcome.status == TOO_MANY_REQUESTS
    return outcome is not None
