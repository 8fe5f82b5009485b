"""What one run has done so far, counted while it runs."""

import time
from collections import Counter
from dataclasses import dataclass, field

from asyncbucket.cli.demo.traffic import Traffic
from asyncbucket.core.limiter import Limiter


@dataclass(slots=True)
class Tally:
    """Count what agents and batches do; `limiter` is None in the run without asyncbucket."""

    limiter: Limiter | None = None
    traffic: Traffic = field(default_factory=Traffic)
    #: Agents and batches that have begun.
    begun: int = 0
    agents_finished: int = 0
    batches_finished: int = 0
    #: How often each kind of error ended an agent or a batch; the first failed call ends one.
    failures: Counter[str] = field(default_factory=Counter[str])
    #: Seconds and binding limit of every call that had to wait for its admission.
    waits: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    started_ns: int = 0
    ended_ns: int = 0
    interrupted: bool = False

    @property
    def failed(self) -> int:
        """Calls that failed for good."""
        return self.failures.total()

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran; 0 before it starts."""
        if not self.started_ns:
            return 0.0
        return ((self.ended_ns or time.monotonic_ns()) - self.started_ns) * 1e-9

    @property
    def waiting(self) -> int:
        """Calls that wait: in the limiter's line, or in a client's back-off."""
        if self.limiter is not None:
            return self.limiter.statistics().waiting
        finished = self.agents_finished + self.batches_finished + self.failed
        return max(0, self.begun - finished - self.traffic.in_flight)
