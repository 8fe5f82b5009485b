"""The dry run: read all lines, send none, and say how long they would take and cost."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from asyncbucket.cli.options import DONE, FAILED
from asyncbucket.cli.run.answers import Answers, Errors
from asyncbucket.cli.run.job import CONCURRENCY, Job
from asyncbucket.cli.run.screen import Tally, dollars, reasons
from asyncbucket.cli.run.work import tasks
from asyncbucket.core.cost import Cost
from asyncbucket.core.wording import counted
from asyncbucket.providers.forecast import FORESEEN
from asyncbucket.providers.profiles import Call, profile_of
from asyncbucket.providers.request import request_size

if TYPE_CHECKING:
    from asyncbucket.planning import Plan

#: How many costs are kept for the plan: enough for any distribution, and little memory.
_SAMPLES: Final = 20_000
#: Seconds that a call is taken to last.
_LATENCY: Final = 2.0


@dataclass(slots=True)
class Estimate:
    """What was found in the lines."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    #: Whether some reply is unlimited, and so counts as `FORESEEN`.
    unbounded: bool = False
    #: A random sample of the costs.
    costs: list[Cost] = field(default_factory=list[Cost])


async def estimate(job: Job, tally: Tally) -> Estimate:
    """Read the lines that would be sent."""
    host = urlsplit(job.api_base).hostname or ""
    profile = profile_of(host)
    found, rng = Estimate(), random.Random(0)  # noqa: S311 - a sample, no secret
    with Answers(job.out_file, job.settings, restart=job.restart, read_only=True) as answers:
        async for task in tasks(job, answers, Errors(None), tally):
            request = task.request
            cost = profile.cost(Call("POST", host, request.path, request.body, FORESEEN))
            found.calls += 1
            found.input_tokens += cost.get("input_tokens", 0)
            # What may be written and has to be paid, even if a provider charges less at admission.
            asked = request_size(request.path, request.body)
            found.output_tokens += asked.output(FORESEEN)
            found.unbounded |= asked.writes and asked.max_output is None
            if len(found.costs) < _SAMPLES:
                found.costs.append(cost)
            elif (index := rng.randrange(found.calls)) < _SAMPLES:
                found.costs[index] = cost
    return found


def dry_run(job: Job, *, as_json: bool = False) -> int:
    """Say what ``job`` would take, and return the exit status: 1 if lines are bad."""
    tally = Tally(price=job.price)
    found = asyncio.run(estimate(job, tally))
    planned = _plan(job, found)
    # The highest cost, if replies are as long as allowed.
    price = job.price
    cost = None if price is None else price.of(found.input_tokens, found.output_tokens)
    if as_json:
        print(json.dumps(_as_dict(tally, found, planned, cost), indent=2))  # noqa: T201 - a command's output
    else:
        print(_describe(tally, found, planned, cost))  # noqa: T201 - a command's output
    return FAILED if tally.bad else DONE


def _plan(job: Job, found: Estimate) -> "Plan | None":
    if not found.calls:
        return None
    from asyncbucket.planning import plan

    slots = job.concurrency or CONCURRENCY
    return plan(
        *job.limits,
        calls=found.calls,
        tokens=found.costs,
        concurrency=None if slots == "auto" else slots,
        latency=_LATENCY,
    )


def _describe(tally: Tally, found: Estimate, planned: "Plan | None", cost: float | None) -> str:
    """Say how long the calls take, what binds, and what they cost."""
    earlier = f", {tally.answered_earlier:,} answered earlier" if tally.answered_earlier else ""
    bad = f", {tally.bad:,} bad" if tally.bad else ""
    lines = [f"{counted(found.calls, 'requests')} to send{earlier}{bad}"]
    if planned is not None:
        most = f"({FORESEEN} for a reply without max_tokens)" if found.unbounded else "at most"
        # Named separately, as it may exceed the plan's tokens: limits count those beforehand.
        tokens = (
            f"to pay for: about {counted(found.input_tokens, 'tokens')} in, "
            f"{found.output_tokens:,} out {most}"
        )
        lines += [str(planned), tokens if cost is None else f"{tokens}: {dollars(cost)}"]
    return "\n".join([*lines, *reasons(tally.reasons)])


def _as_dict(
    tally: Tally, found: Estimate, planned: "Plan | None", cost: float | None
) -> dict[str, Any]:
    return {
        "requests": found.calls,
        "answered_earlier": tally.answered_earlier,
        "bad": tally.bad,
        "input_tokens": found.input_tokens,
        "output_tokens": found.output_tokens,
        "cost": cost,
        "plan": None if planned is None else planned.as_dict(),
        "reasons": dict(tally.reasons),
    }
