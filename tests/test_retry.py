import asyncio
import gc
import logging
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import httpx
import openai
import pytest
import stamina
import stamina.instrumentation

from asyncbucket import Limiter, Pool, QueueFull, deadline
from asyncbucket.attempt import Attempt
from asyncbucket.pools import PoolLease
from asyncbucket.providers.learn import Refusals
from asyncbucket.retry import Retrier, Retry
from asyncbucket.testing import VirtualTime, virtual_time
from asyncbucket.waiting import ASYNC, IO, SYNC, run
from tests.http.conftest import BLOCKS

T = TypeVar("T")
REQUEST = httpx.Request("POST", "http://provider.test/v1/chat/completions")
SECRET = "sk-very-secret"


def status_error(status: int, *, text: str = "no", **headers: str) -> openai.APIStatusError:
    """Make the error that OpenAI's SDK raises for a status; `_` in a header's name means `-`."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx.Response(status, headers=names, request=REQUEST)
    return openai.APIStatusError(text, response=response, body={"type": "requests"})


class Stage:
    """A limiter on virtual time, and a retrier whose random number is always the same."""

    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self.run = time.run
        self.limiter = Limiter(concurrency=1, name="openai", clock=time.clock)
        #: When attempts were made.
        self.times: list[float] = []

    def retrier(self, policy: Retry | None = None, *, chance: float = 0.0) -> Retrier:
        return Retrier(policy or Retry(), self.limiter, chance=lambda: chance)

    def script(self, *lines: object) -> Callable[[], str]:
        """Return an attempt that raises or returns what ``lines`` say, the last one for ever."""
        left = list(lines)

        def play() -> str:
            self.times.append(self.time.now)
            line = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(line, BaseException):
                raise line
            return str(line)

        return play

    def call(self, retrier: Retrier, *lines: object, is_sync: bool = False, **options: Any) -> str:
        """Make a call of either kind, whose attempts say ``lines``."""
        play = self.script(*lines)
        if is_sync:
            reply: str = run(retrier.call(lambda _: SYNC.call(play), io=SYNC, **options))
            return reply
        return self.run(retrier.call(as_async(play), **options))


def as_async(play: Callable[[], T]) -> Callable[[Attempt], Coroutine[Any, Any, T]]:
    async def attempt(_: Attempt) -> T:
        return play()

    return attempt


@pytest.fixture(name="stage")
def open_stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with virtual_time() as time:
        monkeypatch.setattr("time.sleep", time.advance)
        yield Stage(time)


either_kind = pytest.mark.parametrize("is_sync", [False, True])


def test_policy_is_read_from_attempts_retries_bool_none_or_itself() -> None:
    policy = Retry(max_wait=5)
    assert Retry.of(policy) is Retry.times(policy) is policy
    assert [Retry.of(each).attempts for each in (None, True, False, 3)] == [5, 5, 1, 3]
    assert [Retry.times(each).attempts for each in (None, True, False, 0, 3)] == [5, 5, 1, 1, 4]
    with pytest.raises(ValueError, match="retries must be at least 0, which means none, not -1"):
        Retry.times(-1)


def test_retrier_without_stamina_says_so(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncbucket.retry.stamina", None)
    stage.limiter.transport(retries=0)
    with pytest.raises(ImportError, match=r'needs stamina: pip install "asyncbucket\[http\]"'):
        stage.limiter.transport()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attempts": 0}, "attempts must be at least 1, not 0; 1 or retry=False means no retry"),
        ({"attempts": 2.5}, "attempts must be a whole number, not 2.5"),
        ({"max_wait": float("nan")}, "max_wait must be at least 0 and at most 604800, not nan"),
        ({"jitter": 1.5}, "jitter must be at least 0 and at most 1, not 1.5"),
        ({"jitter": "0"}, "jitter must be a number, not '0'"),
    ],
)
def test_invalid_retry_policy_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        _ = Retry(**wrong)
    assert str(caught.value) == message


@either_kind
@pytest.mark.parametrize(
    ("failures", "chance", "times"),
    [
        ([status_error(500)] * 4, 1.0, [0.0, 1.0, 3.0, 7.0, 15.0]),
        ([status_error(500)] * 4, 0.0, [0.0, 0.5, 1.5, 3.5, 7.5]),
        ([status_error(503, retry_after="8")], 1.0, [0.0, 8.8]),
        ([status_error(503, retry_after="120")], 1.0, [0.0, 120.0]),
    ],
)
def test_failed_call_is_retried_when_the_server_says_or_after_doubling_waits(
    stage: Stage, failures: list[Exception], chance: float, times: list[float], *, is_sync: bool
) -> None:
    assert stage.call(stage.retrier(chance=chance), *failures, "reply", is_sync=is_sync) == "reply"
    assert stage.times == times


TOO_LONG = "the provider asks to wait 7,200 s, and Retry(max_wait=120) allows no more"


@either_kind
@pytest.mark.parametrize(
    ("status", "headers", "times", "tried", "reason"),
    [
        (500, {}, [0, 1, 3, 7, 15], "5 times in 15.0 s", "Retry(attempts=5) allows no more"),
        (400, {}, [0], "once in 0.0 s", "HTTP 400 (requests) is not retried"),
        (503, {"retry_after": "7200"}, [0], "once in 0.0 s", TOO_LONG),
    ],
)
def test_last_error_is_raised_as_it_is_with_a_note_that_says_why(
    stage: Stage,
    status: int,
    headers: dict[str, str],
    times: list[float],
    tried: str,
    reason: str,
    *,
    is_sync: bool,
) -> None:
    error = status_error(status, **headers)
    with pytest.raises(openai.APIStatusError) as caught:
        stage.call(stage.retrier(chance=1.0), error, is_sync=is_sync)
    assert caught.value is error
    assert error.__cause__ is error.__context__ is None
    assert stage.times == pytest.approx(times)
    assert error.__notes__ == [f"asyncbucket: tried {tried}; gave up: {reason}"]


@pytest.mark.parametrize("error", [ValueError("yours"), QueueFull("ours")])
def test_error_of_caller_or_limiter_is_not_retried(stage: Stage, error: Exception) -> None:
    with pytest.raises(type(error)):
        stage.call(stage.retrier(), error)
    assert (stage.times, hasattr(error, "__notes__")) == ([0], False)


async def test_no_attempt_begins_after_the_deadline(stage: Stage) -> None:
    error = status_error(503, retry_after="20")
    with pytest.raises(openai.APIStatusError), deadline(30):
        await stage.retrier().call(as_async(stage.script(error)))
    assert stage.times == [0, 20]
    assert "gave up: the next attempt is due in 20 s, the deadline in 10 s" in error.__notes__[0]


@pytest.mark.parametrize("policy", [Retry(attempts=1), Retry(max_wait=5.0), None])
def test_429_pauses_limiter_even_if_its_call_gives_up_or_stamina_is_switched_off(
    stage: Stage, policy: Retry | None
) -> None:
    stamina.set_active(policy is not None)
    try:
        with pytest.raises(openai.APIStatusError):
            stage.call(stage.retrier(policy), status_error(429, retry_after="7"))
    finally:
        stamina.set_active(True)
    assert stage.limiter.statistics().paused == 7


def test_reply_of_a_retried_call_is_dropped_without_the_collector(stage: Stage) -> None:
    """A dropped stream would else keep its slot."""

    class Reply:
        pass

    def attempt() -> Reply:
        stage.times.append(stage.time.now)
        if len(stage.times) < 3:
            raise status_error(500)
        return Reply()

    gc.disable()
    try:
        reply = weakref.ref(stage.run(stage.retrier().call(as_async(attempt))))
        assert reply() is None
    finally:
        gc.enable()


async def test_slot_that_a_failed_attempt_dropped_is_free_for_the_next(stage: Stage) -> None:
    limiter = Limiter(concurrency=1)

    async def attempt(_: Attempt) -> None:
        __ = await limiter.acquire(timeout=0)  # as a stream that is half read
        stage.times.append(stage.time.now)
        if len(stage.times) < 3:
            raise status_error(500)

    await stage.retrier().call(attempt)
    assert len(stage.times) == 3


def test_retries_obey_staminas_testing_mode(stage: Stage) -> None:
    with stamina.set_testing(True, attempts=3), pytest.raises(openai.APIStatusError):
        stage.call(stage.retrier(), status_error(500))
    assert stage.times == [0.0] * 3


@pytest.mark.parametrize("seconds", [0.5, 1.2])
async def test_cancellation_is_never_retried(stage: Stage, seconds: float) -> None:
    """Neither of an attempt nor of a back-off."""

    async def attempt(_: Attempt) -> None:
        stage.times.append(stage.time.now)
        await asyncio.sleep(1)
        raise status_error(500)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await stage.retrier().call(attempt)
    assert (stage.times, stage.time.now) == ([0.0], seconds)


async def test_refused_retry_raises_provider_error_and_holds_no_slot(stage: Stage) -> None:
    first = status_error(503)

    async def attempt(_: Attempt) -> None:
        async with stage.limiter.acquire(deadline=2.0):
            stage.limiter.pause(60)
            raise first

    retried = asyncio.ensure_future(stage.retrier(chance=1.0).call(attempt))
    await asyncio.sleep(0.5)
    assert stage.limiter.statistics().in_flight == 0
    with pytest.raises(openai.APIStatusError) as caught:
        await retried
    assert caught.value is first
    (note,) = first.__notes__
    assert note.startswith(
        "asyncbucket: tried once in 1.0 s; gave up: no other attempt was admitted: "
    )
    assert "59" in note


@pytest.mark.parametrize(("attempts", "times"), [(3, [0, 1, 2, 3, 4]), (1, [0])])
async def test_429_met_by_others_is_no_attempt(stage: Stage, attempts: int, times: Any) -> None:
    """The other call meets the first two waves first."""

    async def attempt(tried: Attempt) -> None:
        tried.sent.at = stage.time.now
        raise status_error(429, retry_after="1")

    async def counted(tried: Attempt) -> None:
        stage.times.append(stage.time.now)
        await attempt(tried)

    other = stage.retrier(Retry(attempts=2)).call(attempt)
    ours = stage.retrier(Retry(attempts=attempts)).call(counted)
    await asyncio.gather(other, ours, return_exceptions=True)
    assert stage.times == times


@pytest.mark.parametrize(("others_pass", "tries"), [(False, 3), (True, 5)])
async def test_429_while_others_pass_is_half_an_attempt(
    stage: Stage, *, others_pass: bool, tries: int
) -> None:
    async def attempt(_: Attempt) -> None:
        stage.times.append(stage.time.now)
        raise status_error(429)

    async def others() -> None:
        while others_pass:
            await asyncio.sleep(0.1)
            Refusals.of(stage.limiter).succeeded(stage.time.now)

    passing = asyncio.create_task(others())
    with pytest.raises(openai.APIStatusError):
        await stage.retrier(Retry(attempts=3)).call(attempt)
    passing.cancel()
    assert len(stage.times) == tries


@pytest.mark.parametrize(("share", "calls", "attempts"), [(1.0, 300, 400), (0.2, 1_500, 1_875)])
async def test_retry_budget_covers_random_errors_but_an_outage_only_by_a_tenth(
    stage: Stage, share: float, calls: int, attempts: int
) -> None:
    tried: list[int] = []
    chance = random.Random(1)
    retrier = Retrier(Retry(attempts=30), stage.limiter, chance=chance.random)

    async def attempt(_: Attempt) -> str:
        tried.append(1)
        await asyncio.sleep(60)  # longer than stamina's own time-out, which is off
        if chance.random() < share:
            raise status_error(500)
        return "reply"

    replies: list[str | BaseException] = []
    for _ in range(10):
        made = (retrier.call(attempt) for _ in range(calls // 10))
        replies += await asyncio.gather(*made, return_exceptions=True)
    failed = [reply for reply in replies if isinstance(reply, openai.APIStatusError)]
    notes = {note for error in failed for note in error.__notes__}
    assert len(tried) == pytest.approx(attempts, rel=0.05 if share < 1 else 0)
    assert len(failed) == (calls if share == 1 else 0)
    assert any("gave up: the retry budget is spent" in note for note in notes) is (share == 1)


async def test_429s_spend_no_budget_and_fail_calls_after_max_wait(stage: Stage) -> None:
    """Sixty calls would else make 300 attempts, one after each pause of two minutes: ten hours."""
    retrier = stage.retrier(Retry(budget=0))
    failed: dict[float, openai.APIStatusError] = {}

    async def call(script: Callable[[], str]) -> None:
        async def paced(_: Attempt) -> str:
            async with stage.limiter.acquire():
                return script()

        with pytest.raises(openai.APIStatusError) as caught:
            await retrier.call(paced)
        failed[stage.time.now] = caught.value

    await asyncio.gather(*(call(stage.script(status_error(429))) for _ in range(60)))
    assert list(failed) == [127 + 120 * n for n in range(60)]
    assert failed[127].__notes__ == [
        "asyncbucket: tried once in 127.0 s; gave up: the provider has refused every call for 127 s"
    ]
    assert len(stage.times) == 70  # the first three refusals may have been accidents


@either_kind
def test_stamina_instrumentation_shows_users_callable_and_provider_error(
    stage: Stage, caplog: pytest.LogCaptureFixture, *, is_sync: bool
) -> None:
    """As for any code that uses stamina: its log, its hooks and what Prometheus makes of them."""
    caplog.set_level(logging.DEBUG)
    seen: list[Any] = []
    error, tried = status_error(500, text=SECRET), openai.OpenAI(api_key="k").models.list

    hook: Any = seen.append
    for hooks in (None, [hook]):
        stamina.instrumentation.set_on_retry_hooks(hooks)
        stage.call(stage.retrier(chance=1.0), error, "reply", is_sync=is_sync, tried=tried)
    stamina.instrumentation.set_on_retry_hooks(None)
    (details,) = seen
    assert details.name == "openai.resources.models.Models.list"
    assert (details.args, details.kwargs, details.wait_for) == ((), {}, 1.0)
    assert details.caused_by is error
    lines = [(r.name, r.getMessage()) for r in caplog.records if r.name != "asyncio"]
    assert lines == [("stamina", "stamina.retry_scheduled")]


def test_retries_print_nothing_where_no_log_is_set_up() -> None:
    """The message is a bare name, and everything else is in attributes that Python would not print."""
    program = "import asyncbucket.retry, logging; logging.getLogger('stamina').warning('scheduled')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("attempts", "times"), [(1, [0]), (2, [0, 0, 0]), (4, [0, 0, 0, pytest.approx(2)])]
)
async def test_call_may_try_each_member_at_once(stage: Stage, attempts: int, times: Any) -> None:
    """When all are out, the policy says when to go on."""
    members = [Limiter(name=f"m{number}", clock=stage.time.clock) for number in range(3)]
    pool, asked = Pool(*members), list[str]()

    async def attempt(attempt: Attempt) -> None:
        lease = await attempt.admit()
        assert isinstance(lease, PoolLease)
        asked.append(lease.limiter.name)
        stage.times.append(stage.time.now)
        lease.member_failed("ConnectError")
        raise httpx.ConnectError("refused")

    with pytest.raises(httpx.ConnectError) as caught:
        await Retrier(Retry(attempts=attempts), pool, chance=lambda: 0).call(attempt)
    assert stage.times == times
    assert len({*asked}) == min(3, len(asked))
    note = caught.value.__notes__[-1]
    assert note.startswith("asyncbucket: pool 'pool': 'm0': left out for ")


# --- one function serves callers that wait and callers that block ---


async def work(io: IO, numbers: object, limiter: Limiter) -> list[object]:
    """Do everything that may wait through ``io``."""
    with await io.admit(limiter.acquire()) as lease:
        found = [await io.next_item(numbers, "end") for _ in range(3)]
    return [*found, lease.released]


@BLOCKS
async def test_one_function_serves_async_and_blocking_callers() -> None:
    async def numbers() -> object:
        yield 1
        yield 2

    limiter, expected = Limiter("10 RPS"), [1, 2, "end", True]
    assert await ASYNC.function(work)(ASYNC, numbers(), limiter) == expected
    assert SYNC.function(work)(SYNC, iter((1, 2)), limiter) == expected
    assert SYNC.function(work).__name__ == "work"


def test_blocking_function_that_suspends_is_refused_and_closed() -> None:
    closed = []

    async def wait() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append(True)

    with pytest.raises(RuntimeError, match="wait was to block, but suspended: it must wait by its"):
        run(wait())
    assert closed == [True]
