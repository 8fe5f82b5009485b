"""The run itself: feed, workers, files and books, from the first line to the last."""

import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

import anyio
import httpx

from asyncbucket.batch import amap
from asyncbucket.cli.run.books import restore, snapshot
from asyncbucket.cli.run.feed import Task, tasks
from asyncbucket.cli.run.job import STANDARD, Job
from asyncbucket.cli.run.ledger import Ledger
from asyncbucket.cli.run.output import Errors, answer, failure, to_standard_output
from asyncbucket.cli.run.screen import Screen
from asyncbucket.cli.run.send import UNREACHABLE, HTTPFailure, Reply, Sender, Stopped
from asyncbucket.cli.run.tally import Tally
from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import counted
from asyncbucket.providers.errors import EXHAUSTED
from asyncbucket.retry import classify

#: Seconds between two updates of what is done.
_SAVE_INTERVAL: Final = 0.5
#: Statuses that any other request would get, too: because of the key or the account.
_FATAL: Final = frozenset({401, 402})
_UNAUTHORIZED: Final = 401
#: A key that may send no line, or one prompt that a moderator or a firewall turned away.
_FORBIDDEN: Final = 403
#: Statuses of a server, or of a path on it, that is not the API; or of one line's model.
_WRONG_SERVER: Final = frozenset({404, 405})
#: This many failures in a row, each after its own attempts, are an outage, which ends the run.
_OUTAGE_FAILURES: Final = 50


class Run:
    """One run, continuing where the last one stopped.

    Args:
        job: what is to be done.
        tally: counts while it runs.
        screen: shows the progress.
    """

    def __init__(self, job: Job, tally: Tally, screen: Screen) -> None:
        self._job = job
        self._tally = tally
        self._screen = screen
        self._ledger = Ledger(
            None if job.out == STANDARD else Path(job.out),
            job.checkpoint,
            job.settings,
            restart=job.restart,
        )
        self._errors = Errors(job.errors_file)
        self._stopped = anyio.Event()
        #: Consecutive requests, since the last answer, that failed in a way that all others may.
        self._failures_in_a_row = 0
        self.limiter = Limiter(*job.limits, concurrency=job.concurrency, name="run")
        self._sender = Sender(job, self.limiter, self._ledger, tally)

    async def run(self) -> None:
        """Send all lines that are not answered; on Ctrl-C, finish only those in flight."""
        with self._ledger as ledger, contextlib.closing(self._errors):
            restore(self.limiter, ledger.admissions(), saved=ledger.bookings())
            try:
                ledger.save(snapshot(self.limiter))
                async with self._sender:
                    with _on_signal(self._begin_stop):
                        await self._work()
            finally:
                ledger.save(snapshot(self.limiter))

    async def _work(self) -> None:
        """Do all the work.

        Raises:
            Exception: the original one, not in a group.
        """
        try:
            await self._work_together()
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None

    async def _work_together(self) -> None:
        feed = tasks(self._job, self._ledger, self._errors, self._tally)
        async with anyio.create_task_group() as group:
            group.start_soon(self._save_regularly)
            group.start_soon(self._screen.show_until_cancelled, self._tally, self.limiter)
            with anyio.CancelScope() as reading:
                group.start_soon(self._end_when_stopped, reading)
                async with amap(self.limiter, self._send_task, feed, paced=True) as results:
                    async for _ in results:
                        pass
            group.cancel_scope.cancel()

    async def _send_task(self, task: Task) -> None:
        reply = Reply()
        try:
            await self._sender.send(task.request, reply)
        except Stopped:
            return
        except (AsyncBucketError, HTTPFailure, httpx.HTTPError, httpx.InvalidURL) as error:
            self._write_failure(task, error, reply)
        else:
            self._write_answer(task, reply)

    def _write_answer(self, task: Task, reply: Reply) -> None:
        """Write an answer as soon as it arrives, with nothing in between."""
        line = answer(
            key=task.key,
            line=task.request.line,
            custom_id=task.request.custom_id,
            status=reply.status,
            request_id=reply.request_id,
            body=reply.body,
            usage=reply.usage,
            attempts=reply.attempts,
            waited=reply.waited,
        )
        if self._job.out == STANDARD:
            if not to_standard_output(line):
                self._stop()
                return
        else:
            self._ledger.write(task.key, line)
        sent, received = reply.tokens()
        self._failures_in_a_row = 0
        self._tally.answered += 1
        self._tally.input_tokens += sent
        self._tally.output_tokens += received

    def _write_failure(self, task: Task, error: Exception, reply: Reply) -> None:
        tally, response = self._tally, None
        code, message = type(error).__name__, str(error) or "no more is known"
        if isinstance(error, HTTPFailure):
            code, message = error.code, error.message
            response = {
                "status_code": error.status_code,
                "request_id": error.request_id,
                "body": error.body,
            }
        message = self._job.without_key(message)
        tally.failed += 1
        tally.count_reason(f"{code}: {message}"[:200])
        line = failure(
            line=task.request.line,
            custom_id=task.request.custom_id,
            code=code,
            message=message,
            response=response,
            attempts=reply.attempts,
            waited=reply.waited,
        )
        self._errors.write(self._job.without_key(line.decode()).encode())
        self._stop_if_hopeless(error)

    def _stop_if_hopeless(self, error: Exception) -> None:
        """Stop if every further request would fail, too."""
        tally, status = self._tally, getattr(error, "status_code", None)
        unreachable = isinstance(error, UNREACHABLE)
        hopeless, wrong_server = status in _FATAL, unreachable or status in _WRONG_SERVER
        if isinstance(error, HTTPFailure):
            hopeless |= error.code in EXHAUSTED
            wrong_server |= error.is_from_another_server
        hopeless |= wrong_server and not (tally.answered or (tally.earlier and not unreachable))
        self._failures_in_a_row += wrong_server or status == _FORBIDDEN or classify(error).retry
        if self._failures_in_a_row >= _OUTAGE_FAILURES:
            hopeless = True
        if hopeless and tally.fatal is None:
            text = f"{str(error) or type(error).__name__} ({self._job.shown_api_base})"
            if unreachable:
                text += "; see that it runs, or correct --api-base"
            elif wrong_server:
                text += "; correct --api-base or --model"
            elif status == _UNAUTHORIZED:
                text += "; correct the key, or name its variable with --key-from"
            tally.fatal = self._job.without_key(text)
            self._stop()

    def _stop(self) -> None:
        self._tally.stopping = True
        self._stopped.set()
        self._sender.stop()

    def _begin_stop(self) -> bool:
        """Begin to stop; return whether that is new."""
        if self._tally.stopping:
            return False
        self._stop()
        under_way = self._sender.under_way
        if under_way:
            are, them = ("are", "them") if under_way > 1 else ("is", "it")
            self._screen.print_line(
                f"stopping when {counted(under_way, 'requests')} under way {are} answered; "
                f"Ctrl-C again to drop {them}"
            )
        return True

    async def _end_when_stopped(self, reading: anyio.CancelScope) -> None:
        """End the reading, which may wait for ever for the next line of a pipe."""
        await self._stopped.wait()
        while self._sender.under_way:
            await self._sender.request_ended.wait()
        reading.cancel()

    async def _save_regularly(self) -> None:
        while True:
            await anyio.sleep(_SAVE_INTERVAL)
            self._ledger.save(snapshot(self.limiter))


@contextlib.contextmanager
def _on_signal(stop: Callable[[], bool]) -> Generator[None]:
    """Make the first SIGINT or SIGTERM call ``stop``, and the second cancel this task."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def on_signal(task: "asyncio.Task[object]") -> None:
        if not stop():
            task.cancel()

    signals = [signal.SIGINT, signal.SIGTERM]
    with contextlib.ExitStack() as undo:
        # Windows' loop has no handlers: there, Ctrl-C cancels at once.
        with contextlib.suppress(NotImplementedError):
            for number in signals:
                loop.add_signal_handler(number, functools.partial(on_signal, task))
                undo.callback(loop.remove_signal_handler, number)
        yield
