"""The dry run: it reads the lines that a run would read, sends none, and says how long they would take."""

import asyncio
import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from asyncbucket.cli.options import DONE, FAILED
from asyncbucket.cli.run.answers import Answers, Errors
from asyncbucket.cli.run.job import CONCURRENCY, Job
from asyncbucket.cli.run.screen import Tally, errors_of
from asyncbucket.cli.run.work import tasks
from asyncbucket.core.wording import counted, usd_written
from asyncbucket.http.pool_file import read_pool
from asyncbucket.plan import plan
from asyncbucket.plan.calls import read_call
from asyncbucket.providers.prices import Prices, read_prices
from asyncbucket.providers.profiles import profile_of

if TYPE_CHECKING:
    from asyncbucket.plan import Plan

#: Seconds that a request is taken to last.
_LATENCY: Final = 2.0


def dry_run(job: Job, *, as_json: bool) -> int:
    """Say what ``job`` would take, and return the exit status: 1 if lines cannot be answered.

    Raises:
        CostExceedsLimit: no line can ever pass the limits.
    """
    tally = Tally()
    prices = read_prices(job.prices)
    pool, endpoints = (None, {}) if job.pool is None else read_pool(job.pool)
    # In a pool, the first member's way to charge stands for all.
    base_url = next((each["base_url"] for each in endpoints.values()), job.api_base)
    costs = asyncio.run(_costs(job, tally, prices, urlsplit(base_url).hostname or ""))
    slots = None if job.concurrency == "auto" or pool else job.concurrency or CONCURRENCY
    planned = None
    if costs:
        planned = plan(*job.limits, tokens=costs, concurrency=slots, latency=_LATENCY, pool=pool)
    never = planned.refused if planned else 0
    others = {"answered_earlier": tally.answered_earlier, "too_costly": never, "bad": tally.bad}
    if as_json:
        to_send, told = {"to_send": len(costs) - never}, planned and planned.as_dict()
        print(json.dumps({**to_send, **others, "plan": told}, indent=2))  # noqa: T201
    else:
        words = [f"{counted(len(costs) - never, 'requests')} to send"]
        words += [f"{count:,} {name.replace('_', ' ')}" for name, count in others.items() if count]
        parts = [", ".join(words), tally.errors and errors_of(tally), planned, _over(job, planned)]
        print(*filter(None, parts), sep="\n")  # noqa: T201 - a command's output
    return FAILED if tally.bad or never else DONE


def _over(job: Job, planned: "Plan | None") -> str:
    """Say so if --max-usd may stop the run."""
    usd = None if planned is None else planned.usd
    if job.max_usd is None or usd is None or job.max_usd >= (usd.most or math.inf):
        return ""
    sure = "will" if job.max_usd < usd.least else "may"
    return f"--max-usd {usd_written(job.max_usd)} {sure} stop it before its end"


async def _costs(job: Job, tally: Tally, prices: Prices, host: str) -> list[Any]:
    """Return what each request that would be sent is charged at admission, and costs."""
    read = partial(read_call, profile=profile_of(host), model=None, prices=prices)
    with Answers(job.out_file, job.settings, restart=job.restart, read_only=True) as answers:
        return [
            read({"url": task.request.path, "body": task.request.body})
            async for task in tasks(job, answers, Errors(None), tally)
        ]
