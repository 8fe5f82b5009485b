"""`asyncbucket run`: a file of requests or prompts in, a file of answers out, under your limits.

From the inside out: `job` says what can be typed and is to be done, and reads the lines, `answers` is
the file that comes out, `work` sends and writes, `screen` counts and shows.
"""

from typing import Any

import typer

from asyncbucket.cli import options
from asyncbucket.cli.run.job import Job


def run(**given: Any) -> None:
    """Send every line of a file to a model, under your limits.

    A line is a request of OpenAI's batch files, the body of one, or a prompt. Every answer is
    written once, as it arrives, with the custom_id and line of the request, as in OpenAI's output files.
    The key is read from OPENAI_API_KEY.
    With --pool, each request goes to whichever provider in that file can start it first.
    Killed and started again, it continues where it stopped and stays under the limits. Ctrl-C lets
    the requests under way finish; a second one drops them.

    Status: 0 when all lines are answered, 1 when some failed (the errors file says why), 2 when none
    can be, 3 when --max-usd stopped it, 130 after Ctrl-C.

    Examples:
        asyncbucket run prompts.txt -o answers.jsonl --model gpt-4o-mini --rpm 500
        asyncbucket run batch.jsonl -o out.jsonl --rpm 500 --max-usd 2.50 --dry-run
        asyncbucket run in.jsonl --concurrency 9 --api-base http://127.0.0.1:8000/v1
        grep -v '^#' a.txt | asyncbucket run - --model gpt-4o-mini --rpm 500 | jq .
    """
    job = Job(**given)
    job.check()
    from asyncbucket.cli.run import work

    raise typer.Exit(work.dry_run(job) if job.dry_run else work.run(job))


options.take_from(Job, run)
