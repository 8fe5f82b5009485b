"""The dry run: read all lines, send none, and say how long they would take and cost."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from asyncbucket.cli.run.feed import tasks
from asyncbucket.cli.run.job import Job
from asyncbucket.cli.run.ledger import Ledger
from asyncbucket.cli.run.output import Errors
from asyncbucket.cli.run.report import reasons
from asyncbucket.cli.run.request import Request
from asyncbucket.cli.run.screen import dollars
from asyncbucket.cli.run.tally import Tally
from asyncbucket.core.cost import Cost
from asyncbucket.core.wording import counted
from asyncbucket.providers.forecast import FORESEEN
from asyncbucket.providers.profiles import Call, Profile, profile_named, profile_of
from asyncbucket.providers.request import request_size

if TYPE_CHECKING:
    from asyncbucket.plan import Plan

#: How many costs are kept for the plan: enough for any distribution, and little memory.
_SAMPLES: Final = 20_000


@dataclass(slots=True)
class Estimate:
    """What was found in the lines."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    #: Whether some reply is unlimited, and so counts as `FORESEEN`.
    unbounded: bool = False
    costs: list[Cost] = field(default_factory=list[Cost])

    def add(self, request: Request, cost: Cost, rng: random.Random) -> None:
        """Count a call; a random sample of many costs is kept."""
        self.calls += 1
        self.input_tokens += cost.get("input_tokens", 0)
        # What may be written and has to be paid, even if a provider charges less at admission.
        parsed_request = request_size(request.path, request.body)
        self.output_tokens += parsed_request.output(FORESEEN)
        self.unbounded |= parsed_request.writes and parsed_request.max_output is None
        if len(self.costs) < _SAMPLES:
            self.costs.append(cost)
        elif (index := rng.randrange(self.calls)) < _SAMPLES:
            self.costs[index] = cost


async def estimate(job: Job, tally: Tally) -> Estimate:
    """Read the lines that would be sent."""
    host = urlsplit(job.api_base).hostname or ""
    profile = profile_of(host) if job.profile is None else profile_named(job.profile)
    found, rng = Estimate(), random.Random(0)  # noqa: S311 - a sample, no secret
    resumes = job.resumes
    with Ledger(
        Path(job.out) if resumes else None, job.checkpoint if resumes else None, job.settings
    ) as ledger:
        async for task in tasks(job, ledger, Errors(None), tally):
            cost = _cost(profile, task.request, host)
            if cost is not None:
                found.add(task.request, cost, rng)
    return found


def _cost(profile: Profile, request: Request, host: str) -> Cost | None:
    return profile.cost(Call("POST", host, request.path, request.body, FORESEEN))


def plan_calls(job: Job, found: Estimate, *, latency: float) -> "Plan | None":
    """Return the plan of the calls that were found; None if there are none."""
    if not found.calls:
        return None
    from asyncbucket.plan import plan

    return plan(
        *job.limits,
        calls=found.calls,
        tokens=found.costs,
        # Requests that take no time take no slots.
        concurrency=None if job.concurrency == "auto" or not latency else job.concurrency,
        latency=latency,
    )


def describe(job: Job, tally: Tally, found: Estimate, planned: "Plan | None") -> str:
    """Say how long the calls take, what binds, and what they cost."""
    earlier = f", {tally.earlier:,} answered earlier" if tally.earlier else ""
    bad = f", {tally.bad:,} bad" if tally.bad else ""
    lines = [f"{counted(found.calls, 'requests')} to send{earlier}{bad}"]
    if planned is not None:
        lines.append(str(planned))
        most = f"({FORESEEN} for a reply without max_tokens)" if found.unbounded else "at most"
        # Named separately, as it may exceed the plan's tokens: limits count those beforehand.
        tokens = (
            f"to pay for: about {counted(found.input_tokens, 'tokens')} in, "
            f"{found.output_tokens:,} out {most}"
        )
        cost = _dollars(job, found)
        lines.append(tokens if cost is None else f"{tokens}: {dollars(cost)}")
    return "\n".join([*lines, *reasons(tally)])


def as_dict(job: Job, tally: Tally, found: Estimate, planned: "Plan | None") -> dict[str, Any]:
    """Return the same in values that JSON can hold."""
    return {
        "requests": found.calls,
        "answered_earlier": tally.earlier,
        "bad": tally.bad,
        "input_tokens": found.input_tokens,
        "output_tokens": found.output_tokens,
        "cost": _dollars(job, found),
        "plan": None if planned is None else planned.as_dict(),
        "reasons": dict(tally.reasons),
    }


def _dollars(job: Job, found: Estimate) -> float | None:
    """Return what the calls cost if replies are as long as allowed, if the price is known."""
    return None if job.price is None else job.price.of(found.input_tokens, found.output_tokens)
