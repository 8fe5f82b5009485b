"""Read lines as they are wanted: a file of a million, or a pipe that somebody types into."""

import asyncio
import contextlib
import itertools
import os
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from asyncbucket.cli.run.job import STANDARD, Job
from asyncbucket.cli.run.ledger import Ledger
from asyncbucket.cli.run.output import Errors, failure
from asyncbucket.cli.run.request import BadLine, Request, read_request
from asyncbucket.cli.run.tally import Tally

_CHUNK: Final = 1 << 18
#: The longest line; a batch file of OpenAI's may have 200 MB in total.
_MAX_LINE: Final = 64 << 20


class Task(NamedTuple):
    """A request that is not answered yet."""

    request: Request
    key: bytes


async def tasks(job: Job, ledger: Ledger, errors: Errors, tally: Tally) -> AsyncGenerator[Task]:
    """Yield what is to be sent; lines that are answered or cannot be read are counted and skipped."""
    number = 0
    async for chunk in _chunks(job):
        if tally.stopping:
            return
        with ledger.looking_up():
            found = []
            for data in chunk:
                number += 1
                if job.max_lines is not None and number > job.max_lines:
                    break
                task = _task(number, data, job, ledger, errors, tally)
                if task is not None:
                    found.append(task)
        for task in found:
            if tally.stopping:
                return
            yield task
        if job.max_lines is not None and number >= job.max_lines:
            return


def _task(
    number: int, data: bytes | None, job: Job, ledger: Ledger, errors: Errors, tally: Tally
) -> Task | None:
    try:
        request = read_request(number, _complete_line(data), job)
        if request is None:
            return None
        key, done = ledger.look_up(request)
    except BadLine as bad:
        tally.bad += 1
        tally.reasons[f"line {number}: {bad}" if tally.bad <= 3 else "other bad lines"] += 1  # noqa: PLR2004 - a few tell enough
        line = failure(line=number, custom_id=bad.custom_id, code="bad_line", message=str(bad))
        errors.write(line)
        return None
    tally.earlier += done
    return None if done else Task(request, key)


def _complete_line(data: bytes | None) -> bytes:
    if data is None:
        raise BadLine(f"the line has more than {_MAX_LINE >> 20} MB")
    return data


async def _chunks(job: Job) -> AsyncIterator[list[bytes | None]]:
    """Yield the lines in each read, without their ends; None for one that is too long."""
    file: BinaryIO = sys.stdin.buffer if job.source == STANDARD else Path(job.source).open("rb")  # noqa: ASYNC230, SIM115 - closed below
    rest, skipping = b"", False
    try:
        while chunk := await _read(file.fileno()):
            first, *others = (rest + chunk).split(b"\n")
            if others:
                *complete, rest = others
                lines: list[bytes | None] = [None if skipping else first, *complete]
                skipping = False
                yield lines
            else:
                rest = b"" if skipping else first
            if len(rest) > _MAX_LINE:
                rest, skipping = b"", True
        if skipping or rest:
            yield [None if skipping else rest]
    finally:
        if job.source != STANDARD:
            file.close()


async def _read(descriptor: int) -> bytes:
    """Return the next data; empty at the end.

    It may take as long as a person types, and cannot be cancelled. So it runs in a thread that
    nobody waits for when everything else has ended.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bytes] = loop.create_future()

    def finish(data: bytes, error: OSError | None) -> None:
        if done.done():  # cancelled
            return
        if error is None:
            done.set_result(data)
        else:
            done.set_exception(error)

    def read() -> None:
        data, failed = b"", None
        try:
            data = os.read(descriptor, _CHUNK)
        except OSError as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it
            loop.call_soon_threadsafe(finish, data, failed)

    threading.Thread(target=read, name="asyncbucket run", daemon=True).start()
    return await done


def count_lines(path: str, most: int | None) -> int:
    """Return how many of the first lines are not empty; a gigabyte takes about a second."""
    with Path(path).open("rb") as file:
        return sum(not line.isspace() for line in itertools.islice(file, most))
