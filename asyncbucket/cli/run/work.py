"""The run itself: requests are sent, answers and failures written, from the first line to the last.

A dry run reads the same lines, sends none, and says how long they would take.
"""

import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit

import anyio
import httpx

from asyncbucket.batch import amap
from asyncbucket.batch.progress import standard_error
from asyncbucket.cli import CANNOT_RUN, DONE, FAILED, INTERRUPTED, SPENT
from asyncbucket.cli.options import without_keys
from asyncbucket.cli.run.answers import Answers, Errors
from asyncbucket.cli.run.job import (
    CONCURRENCY,
    FOR_GOOD,
    STANDARD,
    BadLine,
    Job,
    NoModelError,
    Request,
    count_lines,
    read_lines,
    read_request,
)
from asyncbucket.cli.run.screen import Tally, errors_of, headline, show_progress, summary
from asyncbucket.cli.ui import Screen, silenced
from asyncbucket.core.errors import AcquireTimeout, AsyncBucketError, StoreError, UnknownPrice
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import USD, counted, in_given_unit, one_line, usd_written
from asyncbucket.http.pool_file import keys_of, read_pool
from asyncbucket.plan import plan
from asyncbucket.plan.calls import read_call
from asyncbucket.providers.details import Details
from asyncbucket.providers.errors import EXHAUSTED, RefusedReply, judge_reply
from asyncbucket.providers.prices import read_prices
from asyncbucket.providers.profiles import profile_of
from asyncbucket.providers.request import any_json
from asyncbucket.providers.usage import read_usage
from asyncbucket.retry import Retrier, Retry

_MAX_MESSAGE: Final = 500
#: Connections kept for the next request. For each request httpcore compares idle ones in pairs: a
#: hundred of them would take more time than everything else together.
_MAX_IDLE: Final = 32
#: Seconds that a dry run takes a reply to last.
_LATENCY: Final = 2.0
#: Statuses that any other request would get, too: because of the key or the account.
_FATAL: Final = frozenset({401, 402})
#: Statuses of a request that is wrong in itself, whatever becomes of others.
_OF_ONE_REQUEST: Final = frozenset({400, 413, 422})
#: This many failures in a row, each after its own attempts, end the run.
_MAX_FAILURES_IN_A_ROW: Final = 50
#: Who pays, by OpenAI's own variables, if a key may be used for several.
_ACCOUNTS: Final = {"OPENAI_ORG_ID": "openai-organization", "OPENAI_PROJECT_ID": "openai-project"}
#: Longer than requests under way take.
_DAY: Final = 86_400.0


class Task(NamedTuple):
    """A request that is not answered yet."""

    request: Request
    key: bytes


async def tasks(job: Job, answers: Answers, errors: Errors, tally: Tally) -> AsyncGenerator[Task]:
    """Yield what is to be sent; lines that are answered or cannot be read are counted and skipped."""
    number, begun = 0, False
    async for lines in read_lines(job.source):
        for data in lines:
            number += 1
            if tally.stopped:
                return
            try:
                request = read_request(number, data, job)
                if request is None:
                    continue
                key, done = answers.look_up(request)
            except BadLine as bad:
                if isinstance(bad, NoModelError) and not begun:
                    raise
                tally.bad += 1
                tally.count_error("bad_line", f"line {number}: {bad}")
                error = {"code": "bad_line", "message": str(bad)}
                errors.write(line=number, custom_id=bad.custom_id, error=error)
                continue
            begun = True
            tally.answered_earlier += done
            if not done:
                yield Task(request, key)


class Run:
    """One run, continuing where the last one stopped."""

    def __init__(
        self, job: Job, tally: Tally, screen: Screen, answers: Answers, errors: Errors
    ) -> None:
        self._job = job
        self._tally = tally
        self._screen = screen
        self._answers = answers
        self._errors = errors
        self._stopped = anyio.Event()
        #: Lines that are being sent: in line, under way, or in a back-off.
        self._sending = 0
        #: Requests since the last answer that failed in a way that all others may.
        self._failures_in_a_row = 0
        is_kept = job.out_file is not None and bool(job.all_limits or job.pool)
        #: The store remembers across runs what was admitted.
        store = f"sqlite:///{quote(str(job.limits_file))}" if is_kept else None
        self._root: Limiter
        where: dict[str, Any]
        if job.pool is None:
            self._root = Limiter(*job.all_limits, name="run", store=store, prices=job.prices)
            self._keys, where = [job.api_key], address(job)
        else:
            self._root, endpoints = read_pool(job.pool, store=store)
            self._keys = [key for each in endpoints.values() for key in keys_of(each)]
            where = {"endpoints": endpoints}
        #: Slots are this process's own: a store would keep those of a killed run for a while.
        slots = job.slots or (CONCURRENCY if self._root.concurrency is None else None)
        self._limiter = self._root.child("calls", concurrency=slots)
        self._retrier = Retrier(Retry(attempts=job.attempts), self._root, caller=self._limiter)
        self._client: httpx.AsyncClient = self._limiter.http_client(
            family="httpx",
            retries=0,  # a reply may break off, which the client's own retries do not see
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_IDLE),
            **where,
        )

    async def run(self) -> None:
        """Send all lines that are not answered; on Ctrl-C, finish only those in flight."""
        sending = anyio.CancelScope()
        beside = [
            asyncio.create_task(show_progress(self._screen, self._tally, self._root)),
            asyncio.create_task(self._end_when_stopped(sending)),
        ]
        if self._job.max_usd is not None:
            beside.append(asyncio.create_task(self._stop_when_spent()))
        try:
            with _on_signal(self._begin_stop), sending:
                async with (
                    self._client,
                    amap(self._limiter, self._send, self._feed(), paced=True) as results,
                ):
                    async for _ in results:
                        pass
        finally:
            for task in beside:
                task.cancel()
            with anyio.CancelScope(shield=True):
                await self._root.aclose()
            # Now the store has heard of all that was settled.
            now = self._root.statistics()
            self._tally.requests, self._tally.refused_429 = now.admitted, now.upstream_429
            spent = (use.used for use in now.limits if use.limit.key == (USD, FOR_GOOD))
            self._tally.usd = next((in_given_unit(used, USD) for used in spent), None)

    async def _feed(self) -> AsyncGenerator[Task]:
        """Yield what is to be sent; with the first of it, what can refuse a run has not done so."""
        is_first = True
        async for task in tasks(self._job, self._answers, self._errors, self._tally):
            if is_first:
                is_first = False
                self._answers.check_room()
                if self._job.source != STANDARD:
                    self._tally.total = count_lines(self._job.source)
                self._screen.say(headline(self._job, self._tally, self._root))
            yield task

    async def _send(self, task: Task) -> None:
        request = task.request
        reply: httpx.Response | None = None

        async def attempt() -> httpx.Response:
            # A member of a pool may have another path before this one, and so may --api-base.
            reply = await self._client.post(request.path.removeprefix("/v1"), json=request.body)
            if not reply.is_success:
                told = Details(any_json(reply.content), reply.headers)
                raise RefusedReply(reply, judge_reply(reply.status_code, told))
            return reply

        self._sending += 1
        try:
            reply = await self._retrier.call(attempt)
            body = reply.json()
        except RefusedReply as refused:
            self._write_failure(request, refused, refused.reply)
        except Exception as error:  # noqa: BLE001 - whatever fails a line is written and counted
            self._write_failure(request, error, reply)
        else:
            self._write_answer(task, reply, body)
        finally:
            self._sending -= 1

    def _write_answer(self, task: Task, reply: httpx.Response, body: Any) -> None:
        """Write an answer as soon as it arrives, with nothing in between."""
        usage = body.get("usage") if isinstance(body, dict) else None
        usage = usage if isinstance(usage, dict) else None
        members = _members(task.request, response=_described(reply, body), usage=usage)
        has_reader = self._answers.write(task.key, members)
        if not has_reader or self._answers.trouble is not None:
            self._stop()
        if has_reader:
            self._failures_in_a_row = 0
            self._tally.count_answer(read_usage(usage))

    def _write_failure(
        self, request: Request, error: Exception, reply: httpx.Response | None
    ) -> None:
        if isinstance(error, StoreError):
            raise error
        described: Mapping[str, Any] | None = None
        if reply is None:
            code = type(error).__name__
            message = str(error) or code  # httpx says no more of a timeout
        else:
            code, message, body = _refusal_in(reply, self._without_keys(reply.text))
            described = _described(reply, body)
        message = self._without_keys(message)[:_MAX_MESSAGE]
        self._tally.failed += 1
        self._tally.count_error(code, message)
        members = _members(request, response=described, error={"code": code, "message": message})
        self._errors.write(hide=self._without_keys, **members)
        status = 0 if reply is None else reply.status_code
        is_of_one = status in _OF_ONE_REQUEST or isinstance(error, AsyncBucketError)
        is_of_one |= reply is None and isinstance(
            error, ValueError
        )  # a body that cannot be encoded
        self._failures_in_a_row += not is_of_one
        pool, answered = self._job.pool, self._tally.answered
        is_account = status in _FATAL or code in EXHAUSTED
        # Each failure without a reply takes many attempts: before the first answer, one is enough.
        is_nowhere = not (status or is_of_one or answered)
        if pool is not None:  # which goes on until it gives up on all members: one may be back soon
            is_account &= not answered
            is_nowhere |= isinstance(error, AcquireTimeout)
        nowhere = (
            f"see that it runs, or correct {'--api-base' if pool is None else pool} or --model"
        )
        remedy = None
        if isinstance(error, UnknownPrice):
            remedy = "write it to a file, and pass that as --prices"
        elif is_account:
            remedy = f"correct the key in {pool or 'OPENAI_API_KEY'}, or see to the account"
        elif is_nowhere:
            remedy = nowhere
        self._tally.refused |= remedy is not None
        if remedy or self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
            fatal = f"{message} ({self._job.destination}); {remedy or nowhere}"
            self._tally.fatal = self._tally.fatal or fatal
            self._stop()

    def _without_keys(self, text: str) -> str:
        return without_keys(text, *self._keys)

    def _stop(self) -> None:
        """Send no more requests; those under way go on."""
        self._tally.stopped = True
        self._stopped.set()
        self._limiter.pause(_DAY)

    def _begin_stop(self) -> bool:
        """Begin to stop; return whether that is new."""
        if self._tally.stopped:
            return False
        self._stop()
        if self._under_way:
            requests = counted(self._under_way, "requests")
            self._screen.say(f"stopping after {requests} under way; Ctrl-C again to drop them")
        return True

    async def _stop_when_spent(self) -> None:
        """Stop once the cap of dollars binds, and no call in flight can give any back."""
        looks = 0
        while looks < 3:  # noqa: PLR2004 - a settlement may be on its way to the store
            await anyio.sleep(0.1)
            now = self._root.statistics()
            left = {use.limit.key: use.available for use in now.limits if use.limit.resource == USD}
            binds = now.bound_by == USD and min(left, key=left.__getitem__) == (USD, FOR_GOOD)
            looks = looks + 1 if binds and self._sending == now.waiting else 0
        self._tally.out_of_usd = True
        self._stop()

    async def _end_when_stopped(self, sending: anyio.CancelScope) -> None:
        """End what waits: in line, in a back-off, or for the next line of a pipe."""
        await self._stopped.wait()
        idle = 0
        while idle < 5:  # noqa: PLR2004 - an answer that is there takes a moment until it is written
            await anyio.sleep(0.02)
            idle = 0 if self._under_way else idle + 1
        sending.cancel()

    @property
    def _under_way(self) -> int:
        """How many requests are under way; calls that wait for a store count as in flight, too."""
        now = self._root.statistics()
        return max(0, min(now.in_flight, self._sending - now.waiting))


def address(job: Job) -> dict[str, Any]:
    """Return where requests go, with which key, as options of an HTTP client."""
    url, key = urlsplit(job.base), job.api_key or "none"
    is_azure = (url.hostname or "").endswith(".azure.com")
    headers = {"api-key": key} if is_azure else {"authorization": f"Bearer {key}"}
    accounts = {header: os.environ.get(name) for name, header in _ACCOUNTS.items()}
    return {
        "base_url": url._replace(query="").geturl(),
        "params": parse_qsl(url.query),  # such as the version of Azure's API
        "headers": headers | {header: text for header, text in accounts.items() if text},
    }


def _members(request: Request, **members: Any) -> dict[str, Any]:
    """Return the members of the line of a request that was sent."""
    return {"custom_id": request.custom_id, "line": request.line, **members}


def _described(reply: httpx.Response, body: Any) -> Mapping[str, Any]:
    request_id = reply.headers.get("x-request-id", "")  # which the provider's support asks for
    return {"status_code": reply.status_code, "request_id": request_id, "body": body}


def _refusal_in(reply: httpx.Response, text: str) -> tuple[str, str, Any]:
    """Return the code of a reply that is no answer, what it says, and its body, which is ``text``."""
    status, beginning = reply.status_code, text[:_MAX_MESSAGE]
    if reply.is_success:
        what = f"HTTP {status}: the reply is not JSON: {beginning or 'it is empty'}"
        return "no_json", what, beginning
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = beginning
    told = body.get("error", body) if isinstance(body, dict) else body
    told = told if isinstance(told, dict) else {"message": told}
    code = str(told.get("code") or told.get("type") or f"http_{status}")[:64]
    return code, f"HTTP {status}: {told.get('message') or 'no reason given'}", body


@contextlib.contextmanager
def _on_signal(stop: Callable[[], bool]) -> Generator[None]:
    """Make the first SIGINT or SIGTERM call ``stop``, and the second cancel this task."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def on_signal() -> None:
        if not stop():
            task.cancel()

    # Windows' loop has no handlers: there, Ctrl-C cancels at once.
    numbers = [] if sys.platform == "win32" else [signal.SIGINT, signal.SIGTERM]
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def run(job: Job) -> int:
    """Run ``job`` and return the exit status: 0, 1 if lines failed, 2 if none can succeed, 130.

    Raises:
        ValueError: the file of answers is in use, or was made otherwise; or no model is named.
        OSError, StoreError: a file cannot be written.
    """
    tally = Tally()
    screen = Screen(
        standard_error(), quiet=job.quiet, shared=job.out_file is None and sys.stdout.isatty()
    )
    with (
        Answers(job.out_file, job.settings, restart=job.restart) as answers,
        _tidied(job, tally),
        contextlib.closing(Errors(job.errors_file)) as errors,
    ):
        started = time.monotonic()
        try:
            with silenced(), screen:  # what logs say is counted and shown
                asyncio.run(Run(job, tally, screen, answers, errors).run())
        except (KeyboardInterrupt, asyncio.CancelledError):
            tally.stopped = True
        except Exception:
            tally.stopped, tally.refused = True, not tally.requests
            raise
        finally:
            tally.seconds = round(time.monotonic() - started, 3)
            tally.refused &= not tally.answered
            answers.check()
            if tally.requests or not tally.refused:
                screen.say(summary(job, tally))
    if tally.fatal is not None:
        screen.say(f"error: no request succeeds: {one_line(tally.fatal)}", always=True)
    if answers.trouble is not None:
        screen.say(f"error: {answers.trouble}", always=True)
    if job.as_json:
        print(json.dumps(tally.as_dict(), indent=2))  # noqa: T201 - a command's output
    if tally.fatal is not None:
        return CANNOT_RUN
    if tally.stopped and answers.trouble is None:
        return SPENT if tally.out_of_usd else INTERRUPTED
    return FAILED if tally.failed or tally.bad or answers.trouble else DONE


@contextlib.contextmanager
def _tidied(job: Job, tally: Tally) -> Generator[None]:
    """Remove what a run leaves beside its answers for nothing: all of it, if it was refused."""
    errors, limits = job.errors_file, job.limits_file
    new = [path for path in (errors, limits) if path and not path.exists()]
    try:
        yield
    finally:
        unused = [errors] if errors and not tally.errors else []
        for path in new if tally.refused else unused:
            path.unlink(missing_ok=True)


def dry_run(job: Job) -> int:
    """Say what ``job`` would take, and return the exit status: 1 if lines cannot be answered.

    Raises:
        CostExceedsLimit: no line can ever pass the limits.
    """
    tally = Tally()
    pool, endpoints = (None, {}) if job.pool is None else read_pool(job.pool)
    # In a pool, the first member's way to charge stands for all.
    base_url = next((each["base_url"] for each in endpoints.values()), job.base)
    profile = profile_of(urlsplit(base_url).hostname or "")
    read = partial(read_call, profile=profile, model=None, prices=read_prices(job.prices))

    async def costs_of_calls() -> list[Any]:
        """Return what each request that would be sent is charged at admission, and costs."""
        with Answers(job.out_file, job.settings, restart=job.restart, read_only=True) as answers:
            return [
                read({"url": task.request.path, "body": task.request.body})
                async for task in tasks(job, answers, Errors(None), tally)
            ]

    costs, planned, over = asyncio.run(costs_of_calls()), None, ""
    if costs:
        slots = None if job.slots == "auto" or pool else job.slots or CONCURRENCY
        planned = plan(*job.limits, tokens=costs, concurrency=slots, latency=_LATENCY, pool=pool)
        usd, cap = planned.usd, job.max_usd
        if cap is not None and usd is not None and cap < (usd.most or math.inf):
            sure = "will" if cap < usd.least else "may"
            over = f"--max-usd {usd_written(cap)} {sure} stop it before its end"
    never = planned.refused if planned else 0
    to_send = len(costs) - never
    others = {"answered_earlier": tally.answered_earlier, "too_costly": never, "bad": tally.bad}
    if job.as_json:
        told = {"to_send": to_send, **others, "plan": planned and planned.as_dict()}
        print(json.dumps(told, indent=2))  # noqa: T201 - a command's output
    else:
        words = [f"{counted(to_send, 'requests')} to send"]
        words += [f"{count:,} {name.replace('_', ' ')}" for name, count in others.items() if count]
        parts = [", ".join(words), tally.errors and errors_of(tally), planned, over]
        print(*filter(None, parts), sep="\n")  # noqa: T201 - a command's output
    return FAILED if tally.bad or never else DONE
