"""What the provider saw, as frozen values that also travel as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Arrival(NamedTuple):
    """One call, as the provider saw it.

    `(arrival.time_ns, arrival.tokens)` of the admitted ones is a trace for `assert_never_over`.
    """

    time_ns: int
    """When it was decided, on the provider's clock (`time.monotonic_ns()` unless set)."""
    endpoint: str
    """The end of the path, such as "chat/completions"."""
    tokens: int
    """What it was or would have been charged."""
    admitted: bool


@dataclass(frozen=True, slots=True)
class ProviderStatistics:
    """A snapshot of what the provider saw since it started.

    Attributes:
        requests: Calls at metered endpoints that could be read, admitted and refused ones.
        admitted: Calls that were charged, including those that then failed.
        refused_429: Refused calls by what refused them: "requests", "tokens", "concurrency",
            "scripted".
        errors: Admitted calls that were made to fail.
        invalid: Calls answered with 400, 401 or 404; they are charged nothing.
        tokens: Tokens charged.
        in_flight: Calls that are being answered now.
        peak_in_flight: The most at once.
        disconnected: Calls whose client went away before the end of the reply.
        duplicates: Admitted calls that carried an `x-request-id` seen before.
        endpoints: Requests of each endpoint.
    """

    requests: int = 0
    admitted: int = 0
    refused_429: Mapping[str, int] = field(default_factory=dict[str, int])
    errors: int = 0
    invalid: int = 0
    tokens: int = 0
    in_flight: int = 0
    peak_in_flight: int = 0
    disconnected: int = 0
    duplicates: int = 0
    endpoints: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def refused(self) -> int:
        """All calls answered with 429."""
        return sum(self.refused_429.values())
