"""The run itself: requests are sent, answers and failures written, from the first line to the last.

The dry run reads the same lines, sends none, and says how long they would take.
"""

import asyncio
import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, urlsplit

import anyio
import httpx

from asyncbucket.batch import amap
from asyncbucket.batch.progress import standard_error
from asyncbucket.cli import INTERRUPTED
from asyncbucket.cli.options import CANNOT_RUN, DONE, FAILED
from asyncbucket.cli.run.answers import Answers, Errors
from asyncbucket.cli.run.job import CONCURRENCY, STANDARD, Job
from asyncbucket.cli.run.lines import BadLine, Request, count_lines, read_lines, read_request
from asyncbucket.cli.run.screen import Tally, errors_of, headline, show_progress, summary
from asyncbucket.cli.ui import Screen, silenced
from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import AsyncBucketError, StoreError
from asyncbucket.core.events import Admitted, Event
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import counted, one_line
from asyncbucket.providers.errors import EXHAUSTED, FIRST_ERROR, RATE_LIMITED
from asyncbucket.providers.forecast import FORESEEN
from asyncbucket.providers.profiles import Call, profile_of
from asyncbucket.providers.usage import read_usage
from asyncbucket.retry import Retrier, Retry, Sent

_MAX_MESSAGE: Final = 500
#: The error code of a reply that does not come from the API.
_NO_JSON: Final = "no_json"
#: What parsing an unreadable reply raises; too deep nesting raises the latter.
_JSON_ERRORS: Final = (ValueError, RecursionError)
#: Connections kept for the next request. For each request httpcore compares idle ones in pairs: a
#: hundred of them would take more time than everything else together.
_MAX_IDLE: Final = 32
#: Seconds for a reply.
_TIMEOUT: Final = 600.0
_UNAUTHORIZED: Final = 401
#: Statuses that any other request would get, too: because of the key or the account.
_FATAL: Final = frozenset({_UNAUTHORIZED, 402})
#: Statuses of a request that is wrong in itself, whatever becomes of others.
_OF_ONE_REQUEST: Final = frozenset({400, 413, 422})
#: This many failures in a row, each after its own attempts, end the run.
_MAX_FAILURES_IN_A_ROW: Final = 50
#: Seconds that a request is taken to last in a dry run.
_LATENCY: Final = 2.0
#: Longer than requests under way take.
_DAY: Final = 86_400.0


class HTTPFailure(Exception):  # noqa: N818 - a reply that is an error
    """Carry a reply that is an error, or not JSON, in a form that `asyncbucket.retry` reads."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.status_code: int = response.status_code
        try:
            self.body: Any = response.json()
        except _JSON_ERRORS:
            self.body = response.text[:_MAX_MESSAGE]
        error = self.body.get("error") if isinstance(self.body, dict) else None
        error = error if isinstance(error, dict) else {}
        text = error.get("message") or self.body
        self.error_code = str(error.get("code") or error.get("type") or f"http_{self.status_code}")[
            :64
        ]
        if self.status_code < FIRST_ERROR:  # the API would have answered in JSON
            self.error_code, text = _NO_JSON, f"the reply is not JSON: {text or 'it is empty'}"
        self.message = str(text or "no reason given")[:_MAX_MESSAGE]
        super().__init__(f"HTTP {self.status_code}: {self.message}")


@dataclass(slots=True)
class Task:
    """A request that is not answered yet, and what became of it so far."""

    request: Request
    key: bytes
    attempts: int = 0
    #: Whether an attempt was admitted and is not over.
    under_way: bool = False
    sent: Sent = field(default_factory=Sent)


_CURRENT: Final[ContextVar[Task | None]] = ContextVar("asyncbucket_run", default=None)


async def tasks(job: Job, answers: Answers, errors: Errors, tally: Tally) -> AsyncGenerator[Task]:
    """Yield what is to be sent; lines that are answered or cannot be read are counted and skipped."""
    number = 0
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
                if bad.is_fatal and not tally.done:
                    raise ValueError(str(bad)) from None
                tally.bad += 1
                tally.count_error("bad_line", f"line {number}: {bad}")
                error = {"code": "bad_line", "message": str(bad)}
                errors.write(line=number, custom_id=bad.custom_id, error=error)
                continue
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
        self._under_way = 0
        #: Requests since the last answer that failed in a way that all others may.
        self._failures_in_a_row = 0
        store = f"sqlite:///{quote(str(job.limits_file))}" if job.out_file and job.limits else None
        #: Its limits are in a store, which remembers across runs what was admitted.
        self._root = Limiter(*job.limits, name="run", store=store)
        #: Slots are this process's own: a store would keep those of a killed run for a while.
        self._limiter = self._root.child("calls", concurrency=job.concurrency or CONCURRENCY)
        self._retrier = Retrier(Retry(attempts=job.attempts), self._root, caller=self._limiter)
        base, mark, query = job.api_base.partition("?")
        self._base = base.rstrip("/")
        #: Appended to each path, such as the version of Azure's API.
        self._query = mark + query
        self._client: httpx.AsyncClient = self._limiter.http_client(
            family="httpx",
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_IDLE),
            headers=_headers(job),
        )

    async def run(self) -> None:
        """Send all lines that are not answered; on Ctrl-C, finish only those in flight."""
        sending = anyio.CancelScope()
        beside = (
            asyncio.create_task(show_progress(self._screen, self._tally, self._root)),
            asyncio.create_task(self._end_when_stopped(sending)),
        )
        stop_observing = self._limiter.observe(self._on_event)
        try:
            with _on_signal(self._begin_stop), sending:
                feed = tasks(self._job, self._answers, self._errors, self._tally)
                async with (
                    self._client,
                    amap(self._limiter, self._send, feed, paced=True) as results,
                ):
                    async for _ in results:
                        pass
        finally:
            for task in beside:
                task.cancel()
            stop_observing()
            self._tally.requests = self._root.statistics().admitted
            with anyio.CancelScope(shield=True):
                await self._root.aclose()

    def _on_event(self, event: Event) -> None:
        task = _CURRENT.get()
        if isinstance(event, Admitted) and task is not None:
            task.sent.at = event.at
            task.under_way = True
            self._under_way += 1

    async def _send(self, task: Task) -> None:
        _CURRENT.set(task)
        attempt = functools.partial(self._attempt, task)
        try:
            response, body = await self._retrier.call(attempt, sent=task.sent)
        except StoreError:
            raise
        except (AsyncBucketError, HTTPFailure, httpx.HTTPError, httpx.InvalidURL) as error:
            self._write_failure(task, error)
        else:
            self._write_answer(task, response, body)

    async def _attempt(self, task: Task) -> tuple[httpx.Response, Any]:
        task.attempts += 1
        url = self._base + task.request.path.removeprefix("/v1") + self._query
        content = json.dumps(task.request.body, ensure_ascii=False)
        try:
            response = await self._client.post(
                url, content=content.encode("utf-8", "backslashreplace")
            )
        finally:
            self._under_way -= task.under_way
            task.under_way = False
        self._tally.refused_429 += response.status_code == RATE_LIMITED
        if response.status_code >= FIRST_ERROR:
            raise HTTPFailure(response)
        try:
            return response, response.json()
        except _JSON_ERRORS:
            raise HTTPFailure(response) from None

    def _write_answer(self, task: Task, response: httpx.Response, body: Any) -> None:
        """Write an answer as soon as it arrives, with nothing in between."""
        usage = body.get("usage") if isinstance(body, dict) else None
        usage = usage if isinstance(usage, dict) else None
        members = _members(task, response=_described(response, body), usage=usage)
        has_reader = self._answers.write(task.key, members)
        if not has_reader or self._answers.trouble is not None:
            self._stop()
        if has_reader:
            self._failures_in_a_row = 0
            self._tally.count_answer(read_usage(usage))

    def _write_failure(self, task: Task, error: Exception) -> None:
        code, message, response = type(error).__name__, str(error) or "no more is known", None
        if isinstance(error, HTTPFailure):
            code, message = error.error_code, error.message
            response = _described(error.response, error.body)
        self._tally.failed += 1
        self._tally.count_error(code, self._job.without_key(message))
        members = _members(task, response=response, error={"code": code, "message": message})
        self._errors.write(hide=self._job.without_key, **members)
        self._stop_if_hopeless(error)

    def _stop_if_hopeless(self, error: Exception) -> None:
        """Stop if every further request would fail, too."""
        reply = error if isinstance(error, HTTPFailure) else None
        status, code = (reply.status_code, reply.error_code) if reply else (0, "")
        self._failures_in_a_row += status not in _OF_ONE_REQUEST
        is_account = status in _FATAL or code in EXHAUSTED
        if self._tally.fatal is None and (
            is_account or self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW
        ):
            remedy = "see that it runs, or correct --api-base or --model"
            if is_account:
                remedy = "correct the key in OPENAI_API_KEY, or see to the account"
            text = f"{str(error) or type(error).__name__} ({self._job.shown_api_base}); {remedy}"
            self._tally.fatal = self._job.without_key(text)
            self._stop()

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

    async def _end_when_stopped(self, sending: anyio.CancelScope) -> None:
        """End what waits: in line, in a back-off, or for the next line of a pipe."""
        await self._stopped.wait()
        while self._under_way:  # noqa: ASYNC110 - it changes with each request
            await anyio.sleep(0.02)
        sending.cancel()


def _members(task: Task, **members: Any) -> dict[str, Any]:
    """Return the members of the line of a request that was sent."""
    ids = {"custom_id": task.request.custom_id, "line": task.request.line}
    return {**ids, **members, "attempts": task.attempts}


def _described(response: httpx.Response, body: Any) -> Mapping[str, Any]:
    request_id = response.headers.get("x-request-id", "")  # which the provider's support asks for
    return {"status_code": response.status_code, "request_id": request_id, "body": body}


def _headers(job: Job) -> dict[str, str]:
    headers = {"content-type": "application/json", "user-agent": "asyncbucket-run"}
    if job.api_key is not None:
        azure = (urlsplit(job.api_base).hostname or "").endswith(".azure.com")
        name, prefix = ("api-key", "") if azure else ("authorization", "Bearer ")
        headers[name] = prefix + job.api_key
    return headers


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


def dry_run(job: Job) -> int:
    """Say what ``job`` would take, and return the exit status: 1 if lines are bad."""
    from asyncbucket.plan import plan

    tally = Tally()
    costs = asyncio.run(_costs(job, tally))
    slots = job.concurrency or CONCURRENCY
    earlier = f", {tally.answered_earlier:,} answered earlier" if tally.answered_earlier else ""
    bad = f", {tally.bad:,} bad" if tally.bad else ""
    print(f"{counted(len(costs), 'requests')} to send{earlier}{bad}")  # noqa: T201
    if tally.errors:
        print(errors_of(tally))  # noqa: T201 - a command's output
    if costs:
        concurrency = None if slots == "auto" else slots
        planned = plan(*job.limits, tokens=costs, concurrency=concurrency, latency=_LATENCY)
        print(planned)  # noqa: T201 - a command's output
    return FAILED if tally.bad else DONE


async def _costs(job: Job, tally: Tally) -> list[Cost]:
    """Return what each request that would be sent is charged at admission."""
    host = urlsplit(job.api_base).hostname or ""
    charge = profile_of(host).cost
    with Answers(job.out_file, job.settings, restart=job.restart, read_only=True) as answers:
        return [
            charge(Call("POST", host, task.request.path, task.request.body, FORESEEN))
            async for task in tasks(job, answers, Errors(None), tally)
        ]


def run(job: Job, *, quiet: bool = False, as_json: bool = False) -> int:
    """Run ``job`` and return the exit status: 0, 1 if lines failed, 2 if none can succeed, 130.

    Raises:
        ValueError: the file of answers is in use, or was made otherwise.
        OSError, StoreError: a file cannot be written.
    """
    tally = Tally()
    screen = Screen(
        standard_error(), quiet=quiet, shared=job.out == STANDARD and sys.stdout.isatty()
    )
    with (
        Answers(job.out_file, job.settings, restart=job.restart) as answers,
        contextlib.closing(Errors(job.errors_file)) as errors,
    ):
        if job.source != STANDARD:
            tally.total = count_lines(job.source)
        screen.say(headline(job, tally))
        started = time.monotonic()
        try:
            with silenced(), screen:  # what logs say is counted and shown
                asyncio.run(Run(job, tally, screen, answers, errors).run())
        except (KeyboardInterrupt, asyncio.CancelledError):
            tally.stopped = True
        tally.seconds = round(time.monotonic() - started, 3)
        answers.check()
    screen.say(summary(job, tally))
    if tally.fatal is not None:
        screen.say(f"error: no request succeeds: {one_line(tally.fatal)}", always=True)
    if answers.trouble is not None:
        screen.say(f"error: {answers.trouble}", always=True)
    if as_json:
        print(json.dumps(tally.as_dict(), indent=2))  # noqa: T201 - a command's output
    if tally.fatal is not None:
        return CANNOT_RUN
    if tally.stopped and answers.trouble is None:
        return INTERRUPTED
    return FAILED if tally.failed or tally.bad or answers.trouble else DONE
