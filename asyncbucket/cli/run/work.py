"""The run itself: requests are sent, answers and failures written, from the first line to the last.

A dry run reads the same lines, sends none, and says how long they would take.
"""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl, quote, urlsplit

import anyio
import httpx

from asyncbucket.batch import amap
from asyncbucket.batch.progress import standard_error
from asyncbucket.cli import CANNOT_RUN, DONE, FAILED, INTERRUPTED, SPENT
from asyncbucket.cli.options import without_keys
from asyncbucket.cli.run import CONCURRENCY, FOR_GOOD, Job
from asyncbucket.cli.run.lines import Answers, Errors, Request, read_request
from asyncbucket.cli.run.screen import Tally, errors_of, headline, show_progress, summary
from asyncbucket.cli.ui import Screen, silenced
from asyncbucket.engine.errors import AcquireTimeout, AsyncBucketError, StoreError, UnknownPrice
from asyncbucket.engine.statistics import Statistics
from asyncbucket.engine.wording import USD, counted, in_given_unit, one_line
from asyncbucket.http.endpoints import keys_of, read_pool
from asyncbucket.limiter import Limiter
from asyncbucket.plan import plan
from asyncbucket.plan.calls import read_call
from asyncbucket.providers.errors import EXHAUSTED
from asyncbucket.providers.prices import read_prices
from asyncbucket.providers.profiles import profile_of
from asyncbucket.providers.request import any_json
from asyncbucket.providers.usage import read_usage
from asyncbucket.retry import Retry

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
#: Nobody is where requests go, or none of a pool's members can be used.
_NOWHERE: Final = (httpx.ConnectError, httpx.ConnectTimeout, AcquireTimeout)
#: This many failures in a row, each after its own attempts, end the run.
_MAX_FAILURES_IN_A_ROW: Final = 50
#: Longer than requests under way take.
_DAY: Final = 86_400.0
#: How often in a row something must be seen at an end: an answer, or a settlement, may be on its way.
_LOOKS: Final = 3

#: A request, and the key of its answer.
Task: TypeAlias = tuple[Request, bytes]


def tasks(job: Job, answers: Answers, errors: Errors, tally: Tally) -> Iterator[Task]:
    """Yield requests to be sent; lines that are answered or cannot be read are counted and skipped."""
    with job.source.open("rb") as file:
        for number, data in enumerate(file, 1):
            if tally.stopped:
                return
            try:
                request = read_request(number, data, job)
            except ValueError as bad:
                tally.bad += 1
                tally.count_error("bad_line", f"line {number}: {bad}")
                errors.write(line=number, error={"code": "bad_line", "message": str(bad)})
                continue
            if request is not None:
                key, done = answers.look_up(request)
                tally.answered_earlier += done
                if not done:
                    yield request, key


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
        #: Lines that are being sent: in line, under way, or in a back-off.
        self._sending = 0
        #: Requests since the last answer that failed in a way that all others may.
        self._failures_in_a_row = 0
        #: The store remembers across runs what was admitted.
        is_limited = job.all_limits or job.pool
        store = f"sqlite:///{quote(str(job.limits_file))}" if is_limited else None
        where: dict[str, Any]
        if job.pool is None:
            self._root = Limiter(*job.all_limits, name="run", store=store, prices=job.prices)
            self._keys, where = [job.api_key], address(job)
        else:
            self._root, endpoints = read_pool(job.pool, store=store)
            self._keys = [key for each in endpoints.values() for key in keys_of(each)]
            where = {"endpoints": endpoints}
        #: Slots are this process's own: a store would keep those of a killed run for a while.
        slots = job.concurrency or (CONCURRENCY if self._root.concurrency is None else None)
        self._limiter = self._root.child("calls", concurrency=slots)
        self._client: httpx.AsyncClient = self._limiter.http_client(
            family="httpx",
            retries=Retry(attempts=job.attempts),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_IDLE),
            **where,
        )

    async def run(self) -> None:
        """Send all lines that are not answered; on Ctrl-C, finish only those in flight."""
        sending = anyio.CancelScope()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows, where Ctrl-C ends it at once
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal, sending)
        beside = [
            asyncio.create_task(show_progress(self._screen, self._tally, self._root)),
            asyncio.create_task(self._watch(sending)),
        ]
        try:
            with sending:
                async with (
                    self._client,
                    amap(self._limiter, self._send, self._feed(), paced=True) as results,
                ):
                    async for _ in results:
                        pass
        finally:
            for each in beside:
                each.cancel()
            with anyio.CancelScope(shield=True):
                await self._root.aclose()
            # Now the store has heard of all that was settled.
            now = self._root.statistics()
            self._tally.requests, self._tally.refused_429 = now.admitted, now.upstream_429
            spent = (use.used for use in now.limits if use.limit.key == (USD, FOR_GOOD))
            self._tally.usd = next((in_given_unit(used, USD) for used in spent), None)

    def _feed(self) -> Iterator[Task]:
        """Yield what is to be sent; with the first of it, what can refuse a run has not done so."""
        found = tasks(self._job, self._answers, self._errors, self._tally)
        for number, task in enumerate(found):
            if number == 0:
                self._answers.check_room()
                self._screen.say(headline(self._job, self._tally, self._root))
            yield task

    async def _send(self, task: Task) -> None:
        request, key = task
        # A member of a pool may have another path before this one, and so may --api-base.
        path = request.path.removeprefix("/v1")
        self._sending += 1
        try:
            reply = await self._client.post(path, json=request.body)
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever fails a line is written and counted
            self._write_failure(request, type(error).__name__, str(error), error=error)
        else:
            body = any_json(reply.content) if reply.is_success else None
            if body is None:
                self._write_refusal(request, reply)
            else:
                self._write_answer(request, key, reply, body)
        finally:
            self._sending -= 1

    def _write_answer(self, request: Request, key: bytes, reply: httpx.Response, body: Any) -> None:
        """Write an answer as soon as it arrives, with nothing in between."""
        usage = body.get("usage") if isinstance(body, dict) else None
        usage = usage if isinstance(usage, dict) else None
        members = _members(request, response=_described(reply, body), usage=usage)
        self._answers.write(key, members)
        self._failures_in_a_row = 0
        self._tally.count_answer(read_usage(usage))

    def _write_refusal(self, request: Request, reply: httpx.Response) -> None:
        """Write why a reply is no answer."""
        text = without_keys(reply.text, *self._keys)
        body = any_json(text.encode()) or text[:_MAX_MESSAGE]
        told = body.get("error", body) if isinstance(body, dict) else body
        told = told if isinstance(told, dict) else {"message": told}
        code = str(told.get("code") or told.get("type") or f"http_{reply.status_code}")[:64]
        what = told.get("message") or "no reason given"
        if reply.is_success:
            code, what = "no_json", f"the reply is not JSON: {text or 'it is empty'}"
        message = f"HTTP {reply.status_code}: {what}"
        self._write_failure(request, code, message, response=_described(reply, body))

    def _write_failure(
        self,
        request: Request,
        code: str,
        message: str,
        *,
        response: Mapping[str, Any] | None = None,
        error: Exception | None = None,
    ) -> None:
        """Write why a line has no answer; end the run if others will have none, either."""
        message = without_keys(message or code, *self._keys)[:_MAX_MESSAGE]  # httpx may say no more
        self._tally.failed += 1
        self._tally.count_error(code, message)
        failure = {"code": code, "message": message}
        self._errors.write(**_members(request, response=response, error=failure))
        remedy = self._remedy(code, 0 if response is None else response["status_code"], error)
        if remedy is not None:
            fatal = f"{message} ({self._job.destination}); {remedy}"
            self._tally.fatal = self._tally.fatal or fatal
            self._stop()

    def _remedy(self, code: str, status: int, error: Exception | None) -> str | None:
        """Return what to do if no other request will succeed, either; None if one may."""
        if isinstance(error, UnknownPrice):
            return "write it to a file, and pass that as --prices"
        is_own = isinstance(error, (AsyncBucketError, ValueError))  # such as a body that is no JSON
        if status in _OF_ONE_REQUEST or (is_own and not isinstance(error, AcquireTimeout)):
            return None
        self._failures_in_a_row += 1
        is_account = status in _FATAL or code in EXHAUSTED
        # Each took many attempts: before the first answer, one such failure is enough. It is at any
        # time if the only key is refused, but another member of a pool may be back soon.
        is_certain = (is_account or isinstance(error, _NOWHERE)) and not self._tally.answered
        is_certain |= is_account and self._job.pool is None
        if not is_certain and self._failures_in_a_row < _MAX_FAILURES_IN_A_ROW:
            return None
        if is_account:
            return f"correct the key in {self._job.pool or 'OPENAI_API_KEY'}, or check the account"
        return f"check that it is running, or correct {self._job.pool or '--api-base'} or --model"

    def _stop(self) -> None:
        """Send no more requests; those under way go on."""
        self._tally.stopped = True
        self._limiter.pause(_DAY)

    def _on_signal(self, sending: anyio.CancelScope) -> None:
        """Begin to stop; drop what is under way if that is not new."""
        if self._tally.stopped:
            sending.cancel()
            return
        self._stop()
        under_way = self._under_way(self._root.statistics())
        if under_way:
            requests = counted(under_way, "requests")
            self._screen.say(f"stopping after {requests} under way; Ctrl-C again to drop them")

    async def _watch(self, sending: anyio.CancelScope) -> None:
        """Stop once the cap of dollars binds, and no call in flight can give any back.

        After a stop, end what waits when nothing is under way: in line, or in a back-off.
        """
        spent = idle = 0
        while idle < _LOOKS:
            await anyio.sleep(0.05)
            now = self._root.statistics()
            spent = spent + 1 if self._is_spent(now) else 0
            if spent >= _LOOKS and not self._tally.stopped:
                self._tally.out_of_usd = True
                self._stop()
            idle = idle + 1 if self._tally.stopped and not self._under_way(now) else 0
        sending.cancel()

    def _is_spent(self, now: Statistics) -> bool:
        """Tell whether all calls wait for the cap of dollars."""
        left = {use.limit.key: use.available for use in now.limits if use.limit.resource == USD}
        binds = now.bound_by == USD and min(left, key=left.__getitem__) == (USD, FOR_GOOD)
        return binds and self._sending == now.waiting

    def _under_way(self, now: Statistics) -> int:
        """Return how many requests are under way; calls that wait for a store are in flight, too."""
        return max(0, min(now.in_flight, self._sending - now.waiting))


def address(job: Job) -> dict[str, Any]:
    """Return where requests go, with which key, as options of an HTTP client."""
    url, key = urlsplit(job.base), job.api_key or "none"
    is_azure = (url.hostname or "").endswith(".azure.com")
    return {
        "base_url": url._replace(query="").geturl(),
        "params": parse_qsl(url.query),  # such as the version of Azure's API
        "headers": {"api-key": key} if is_azure else {"authorization": f"Bearer {key}"},
    }


def _members(request: Request, **members: Any) -> dict[str, Any]:
    """Return the members of the line of a request that was sent."""
    return {"custom_id": request.custom_id, "line": request.line, **members}


def _described(reply: httpx.Response, body: Any) -> Mapping[str, Any]:
    request_id = reply.headers.get("x-request-id", "")  # which the provider's support asks for
    return {"status_code": reply.status_code, "request_id": request_id, "body": body}


def run(job: Job) -> int:
    """Run ``job`` and return the exit status: 0, 1 if lines failed, 2 if none can succeed, 130.

    Raises:
        ValueError: the file of answers is in use, or was made otherwise.
        OSError, StoreError: a file cannot be written.
    """
    tally = Tally()
    new = [path for path in (job.errors_file, job.limits_file) if not path.exists()]
    console = standard_error()
    console.quiet = job.quiet
    screen = Screen(console)
    with Answers(job.out, job.settings) as answers:
        errors = Errors(job.errors_file)
        with job.source.open("rb") as file:  # a gigabyte takes about a second
            tally.total = sum(not line.isspace() for line in file)
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
            tally.refused |= tally.fatal is not None and not tally.answered
            if tally.requests or not tally.refused:
                screen.say(summary(job, tally))
            for path in new if tally.refused else ():
                path.unlink(missing_ok=True)
    console.quiet = False
    return _report(job, tally, screen)


def _report(job: Job, tally: Tally, screen: Screen) -> int:
    """Say what went wrong, print the summary as JSON if asked for, and return the exit status."""
    if tally.fatal is not None:
        screen.say(f"error: no request succeeds: {one_line(tally.fatal)}")
    if job.as_json:
        print(json.dumps(tally.as_dict(), indent=2))  # noqa: T201 - a command's output
    if tally.fatal is not None:
        return CANNOT_RUN
    if tally.stopped:
        return SPENT if tally.out_of_usd else INTERRUPTED
    return FAILED if tally.failed or tally.bad else DONE


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

    answers = Answers(job.out, job.settings)
    answers.read()
    costs: list[Any] = [
        read({"url": request.path, "body": request.body})
        for request, _ in tasks(job, answers, Errors(None), tally)
    ]
    planned = None
    if costs:
        slots = None if job.concurrency == "auto" or pool else job.concurrency or CONCURRENCY
        planned = plan(*job.limits, tokens=costs, concurrency=slots, latency=_LATENCY, pool=pool)
    never = planned.refused if planned else 0
    to_send = len(costs) - never
    others = {"answered_earlier": tally.answered_earlier, "too_costly": never, "bad": tally.bad}
    if job.as_json:
        told = {"to_send": to_send, **others, "plan": planned and planned.as_dict()}
        print(json.dumps(told, indent=2))  # noqa: T201 - a command's output
    else:
        words = [f"{counted(to_send, 'requests')} to send"]
        words += [f"{count:,} {name.replace('_', ' ')}" for name, count in others.items() if count]
        parts = [", ".join(words), tally.errors and errors_of(tally), planned]
        print(*filter(None, parts), sep="\n")  # noqa: T201 - a command's output
    return FAILED if tally.bad or never else DONE
