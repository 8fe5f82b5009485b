"""The result of one half of the demo, in figures."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from asyncbucket.cli.demo.scenario import Scenario
from asyncbucket.cli.demo.tally import Tally
from asyncbucket.cli.demo.traffic import Arrival
from asyncbucket.core.limits import Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The figures of one run; times are seconds, `admitted_at` and `refused_at` since its start.

    Attributes:
        name: "without asyncbucket" or "with asyncbucket".
        paced: whether asyncbucket was used.
        interrupted: whether it was ended early; then all figures are "so far".
        agents: how many there were.
        agents_finished: how many finished.
        calls: calls of the agents and batches that were answered or failed for good.
        failed: those that failed for good, after the client's own retries.
        requests: HTTP requests.
        refused: HTTP requests that were answered with 429.
        seconds: wall time.
        shares: for each limit, the fraction of it that was used, from 0 to 1; see `share_used`.
        waits: how long admissions took, sorted, including calls that did not wait.
        bound_by: how many calls waited for what.
        failures: kinds of error and how often each ended an agent or a batch.
        admitted_at: when the provider admitted requests.
        refused_at: when it refused some.
    """

    name: str
    paced: bool
    interrupted: bool
    agents: int
    agents_finished: int
    calls: int
    failed: int
    requests: int
    refused: int
    seconds: float
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    waits: tuple[float, ...] = ()
    bound_by: Mapping[str, int] = field(default_factory=dict[str, int])
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    admitted_at: tuple[float, ...] = ()
    refused_at: tuple[float, ...] = ()

    @property
    def binding(self) -> tuple[str, float] | None:
        """The limit that was used most, and its fraction."""
        return max(self.shares.items(), key=lambda item: item[1], default=None)

    def wait(self, quantile: float) -> float | None:
        """Return a quantile of the waits (nearest rank), or None if none is known."""
        if not self.waits:
            return None
        return self.waits[max(0, math.ceil(quantile * len(self.waits)) - 1)]


def name_of(*, paced: bool) -> str:
    """Return a run's name on the screen and in the report."""
    return "with asyncbucket" if paced else "without asyncbucket"


def outcome_of(
    scenario: Scenario, tally: Tally, arrivals: Sequence[Arrival], *, tokens_known: bool
) -> Outcome:
    """Compute the figures of a run that is over."""
    start, seconds = tally.started_ns, tally.seconds
    admitted = [arrival for arrival in arrivals if arrival.admitted]
    waited = sorted(wait for wait, _ in tally.waits)
    at_once = 0
    if tally.limiter is not None:
        at_once = max(0, tally.limiter.statistics().admitted - len(waited))
    return Outcome(
        name=name_of(paced=tally.limiter is not None),
        paced=tally.limiter is not None,
        interrupted=tally.interrupted,
        agents=scenario.agents,
        agents_finished=tally.agents_finished,
        calls=tally.traffic.answered + tally.failed,
        failed=tally.failed,
        requests=tally.traffic.requests,
        refused=tally.traffic.refused,
        seconds=seconds,
        shares={
            limit.resource: share_used(limit, admitted, start_ns=start, seconds=seconds)
            for limit in scenario.limits
            if limit.resource == "requests" or tokens_known
        },
        waits=(0.0,) * at_once + tuple(waited),
        bound_by=dict(Counter(bound_by for _, bound_by in tally.waits).most_common()),
        failures=dict(tally.failures.most_common()),
        admitted_at=tuple((arrival.time_ns - start) * 1e-9 for arrival in admitted),
        refused_at=tuple(
            (arrival.time_ns - start) * 1e-9 for arrival in arrivals if not arrival.admitted
        ),
    )


def share_used(
    limit: Limit, admitted: Sequence[Arrival], *, start_ns: int, seconds: float
) -> float:
    """Return the fraction of a limit that was used within the wall time, from 0 to 1.

    The time is cut into windows of the limit; the last one is shorter, and allows less in
    proportion. Usage in a window counts up to the limit: a provider whose bucket is full at the
    start admits more then, and that must not make up for a time in which it was idle.
    """
    if seconds <= 0:
        return 0.0
    used: Counter[int] = Counter()
    for arrival in admitted:
        window = int((arrival.time_ns - start_ns) * 1e-9 / limit.per)
        used[window] += 1 if limit.resource == "requests" else arrival.tokens
    allowed = [
        limit.amount * min(1.0, (seconds - start) / limit.per)
        for start in (index * limit.per for index in range(math.ceil(seconds / limit.per)))
    ]
    counted = sum(min(used[window], amount) for window, amount in enumerate(allowed))
    return counted / sum(allowed)
