"""The dry run: read all lines, send none, and say how long they would take and cost."""

import asyncio
import json
import random
from typing import TYPE_CHECKING, Final
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
    from asyncbucket.plan import Plan

#: How many costs are kept for the plan: enough for any distribution, and little memory.
_SAMPLES: Final = 20_000
#: Seconds that a call is taken to last.
_LATENCY: Final = 2.0


def dry_run(job: Job, *, as_json: bool = False) -> int:
    """Say what ``job`` would take, and return the exit status: 1 if lines are bad."""
    tally = Tally(price=job.price)
    costs, unbounded = asyncio.run(_read(job, tally))
    planned = _plan(job, tally, costs) if costs else None
    if as_json:
        found = tally.as_dict() | {"plan": None if planned is None else planned.as_dict()}
        print(json.dumps(found, indent=2))  # noqa: T201 - a command's output
    else:
        print(_describe(tally, planned, unbounded=unbounded))  # noqa: T201 - a command's output
    return FAILED if tally.bad else DONE


async def _read(job: Job, tally: Tally) -> tuple[list[Cost], bool]:
    """Count the requests that would be sent, and their tokens if replies are as long as allowed.

    Return a random sample of what they cost, and whether some reply is unlimited.
    """
    host = urlsplit(job.api_base).hostname or ""
    profile, rng = profile_of(host), random.Random(0)  # noqa: S311 - a sample, no secret
    costs: list[Cost] = []
    unbounded = False
    with Answers(job.out_file, job.settings, restart=job.restart, read_only=True) as answers:
        async for task in tasks(job, answers, Errors(None), tally):
            request = task.request
            call = Call("POST", host, request.path, request.body, FORESEEN)
            cost = profile.cost(call) or Cost()
            tally.requests += 1
            tally.input_tokens += cost.get("input_tokens", 0)
            # What may be written and has to be paid, even if a provider charges less at admission.
            asked = request_size(request.path, request.body)
            tally.output_tokens += asked.output(FORESEEN)
            unbounded |= asked.writes and asked.max_output is None
            if len(costs) < _SAMPLES:
                costs.append(cost)
            elif (index := rng.randrange(tally.requests)) < _SAMPLES:
                costs[index] = cost
    return costs, unbounded


def _plan(job: Job, tally: Tally, costs: list[Cost]) -> "Plan":
    from asyncbucket.plan import plan

    slots = job.concurrency or CONCURRENCY
    return plan(
        *job.limits,
        calls=tally.requests,
        tokens=costs,
        concurrency=None if slots == "auto" else slots,
        latency=_LATENCY,
    )


def _describe(tally: Tally, planned: "Plan | None", *, unbounded: bool) -> str:
    """Say how long the calls take, what binds, and what they cost."""
    earlier = f", {tally.answered_earlier:,} answered earlier" if tally.answered_earlier else ""
    bad = f", {tally.bad:,} bad" if tally.bad else ""
    lines = [f"{counted(tally.requests, 'requests')} to send{earlier}{bad}"]
    if planned is not None:
        most = f"({FORESEEN} for a reply without max_tokens)" if unbounded else "at most"
        cost = "" if tally.cost is None else f": {dollars(tally.cost)}"
        # Named separately, as it may exceed the plan's tokens: limits count those beforehand.
        paid = f"about {counted(tally.input_tokens, 'tokens')} in, {tally.output_tokens:,} out"
        lines += [str(planned), f"to pay for: {paid} {most}{cost}"]
    return "\n".join([*lines, *reasons(tally.reasons)])
