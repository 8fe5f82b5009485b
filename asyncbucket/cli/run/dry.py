"""The dry run: it reads the lines that a run would read, sends none, and says how long they would take."""

import asyncio
import json
from typing import Final
from urllib.parse import urlsplit

from asyncbucket.cli.options import DONE, FAILED
from asyncbucket.cli.run.answers import Answers, Errors
from asyncbucket.cli.run.job import CONCURRENCY, Job
from asyncbucket.cli.run.screen import Tally, errors_of
from asyncbucket.cli.run.work import tasks
from asyncbucket.core.cost import Cost
from asyncbucket.core.wording import counted
from asyncbucket.plan import plan
from asyncbucket.providers.forecast import FORESEEN
from asyncbucket.providers.profiles import Call, profile_of

#: Seconds that a request is taken to last.
_LATENCY: Final = 2.0


def dry_run(job: Job, *, as_json: bool) -> int:
    """Say what ``job`` would take, and return the exit status: 1 if lines cannot be answered.

    Raises:
        CostExceedsLimit: no line can ever pass the limits.
    """
    tally = Tally()
    costs = asyncio.run(_costs(job, tally))
    slots = None if job.concurrency == "auto" else job.concurrency or CONCURRENCY
    planned = None
    if costs:
        planned = plan(*job.limits, tokens=costs, concurrency=slots, latency=_LATENCY)
    never = planned.refused if planned else 0
    others = {"answered_earlier": tally.answered_earlier, "too_costly": never, "bad": tally.bad}
    if as_json:
        to_send, told = {"to_send": len(costs) - never}, planned and planned.as_dict()
        print(json.dumps({**to_send, **others, "plan": told}, indent=2))  # noqa: T201
    else:
        words = [f"{counted(len(costs) - never, 'requests')} to send"]
        words += [f"{count:,} {name.replace('_', ' ')}" for name, count in others.items() if count]
        parts = [", ".join(words), tally.errors and errors_of(tally), planned]
        print(*filter(None, parts), sep="\n")  # noqa: T201 - a command's output
    return FAILED if tally.bad or never else DONE


async def _costs(job: Job, tally: Tally) -> list[Cost]:
    """Return what each request that would be sent is charged at admission."""
    host = urlsplit(job.api_base).hostname or ""
    charge = profile_of(host).cost
    with Answers(job.out_file, job.settings, restart=job.restart, read_only=True) as answers:
        return [
            charge(Call("POST", host, task.request.path, task.request.body, FORESEEN)) or Cost()
            async for task in tasks(job, answers, Errors(None), tally)
        ]
