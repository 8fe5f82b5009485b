import asyncio
import logging
import math
import random
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar

import httpx
import openai
import pytest
import stamina
import stamina.instrumentation
from stamina.instrumentation import RetryDetails

from asyncbucket import Limiter, Pool, QueueFull
from asyncbucket.retry import Retrier, Retry, Sent
from asyncbucket.testing import VirtualTime, virtual_time
from asyncbucket.waiting import SYNC, run

T = TypeVar("T")
REQUEST = httpx.Request("POST", "http://provider.test/v1/chat/completions")
SECRET = "sk-very-secret"


def status_error(
    status: int, code: str | None = None, *, text: str = "no", **headers: str
) -> openai.APIStatusError:
    """Make the error that OpenAI's SDK raises for a status; `_` in a header's name means `-`."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx.Response(status, headers=names, request=REQUEST)
    kind = openai.RateLimitError if status == 429 else openai.APIStatusError
    return kind(text, response=response, body={"code": code, "type": "requests"})


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
            reply: str = run(retrier.call(partial(SYNC.call, play), io=SYNC, **options))
            return reply
        return self.run(retrier.call(as_async(play), **options))


def as_async(play: Callable[[], T]) -> Callable[[], Coroutine[Any, Any, T]]:
    async def attempt() -> T:
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
    with pytest.raises(TypeError, match=r"retries must be a whole number or a Retry, not 1\.5"):
        Retry.times(1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="retries must be at least 0, which means none, not -1"):
        Retry.times(-1)


def test_retrier_without_stamina_names_what_to_install(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncbucket.retry.stamina", None)
    stage.limiter.transport(retries=0)
    with pytest.raises(ImportError, match=r'needs stamina: pip install "asyncbucket\[http\]"'):
        stage.limiter.transport()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attempts": 0}, "attempts must be at least 1, not 0; 1 or retry=False means no retry"),
        ({"attempts": 2.5}, "attempts must be a whole number, not 2.5"),
        ({"attempts": True}, "attempts must be a whole number, not True"),
        ({"max_wait": math.nan}, "max_wait must be at least 0 and at most 604800, not nan"),
        ({"max_wait": math.inf}, "max_wait must be at least 0 and at most 604800, not inf"),
        ({"backoff": -1}, "backoff must be at least 0 and at most 604800, not -1"),
        ({"jitter": 1.5}, "jitter must be at least 0 and at most 1, not 1.5"),
        ({"jitter": "0"}, "jitter must be a number, not '0'"),
        ({"budget": -1}, "budget must be at least 0 and at most 1e+09, not -1"),
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
        ([status_error(503, retry_after="8")], 0.0, [0.0, 8.0]),
        ([status_error(503, retry_after="8")], 1.0, [0.0, 8.8]),
        ([status_error(503, retry_after="120")], 1.0, [0.0, 120.0]),
        ([status_error(503, retry_after="nan")], 1.0, [0.0, 1.0]),
    ],
)
def test_failed_call_is_retried_when_the_server_says_or_after_doubling_waits(
    stage: Stage, failures: list[Exception], chance: float, times: list[float], *, is_sync: bool
) -> None:
    assert stage.call(stage.retrier(chance=chance), *failures, "reply", is_sync=is_sync) == "reply"
    assert stage.times == times


TOO_LONG = (
    "tried once in 0.0 s; gave up: the provider asks to wait 7,200 s, and Retry(max_wait=120) allows "
    "no more"
)


@either_kind
@pytest.mark.parametrize(
    ("make_error", "options", "times", "note"),
    [
        (
            partial(status_error, 500),
            {},
            [0, 1, 3, 7, 15],
            "tried 5 times in 15.0 s; gave up: Retry(attempts=5) allows no more",
        ),
        (
            partial(status_error, 503),
            {"policy": Retry.of(False)},
            [0],
            "tried once in 0.0 s; gave up: Retry(attempts=1) allows no more",
        ),
        (
            partial(status_error, 400),
            {},
            [0],
            "tried once in 0.0 s; gave up: HTTP 400 (requests) is not retried",
        ),
        (partial(status_error, 503, retry_after="7200"), {}, [0], TOO_LONG),
        (
            partial(status_error, 503, retry_after="8"),
            {"policy": Retry(jitter=0), "deadline": 10.0},
            [0, 8],
            "tried 2 times in 8.0 s; gave up: the next attempt is due in 8 s, the deadline in 2 s",
        ),
        (partial(status_error, 503), {"deadline": math.nan}, [0], "the deadline in"),
        (partial(ValueError, "yours"), {}, [0], None),
        (partial(QueueFull, "ours"), {}, [0], None),
    ],
)
def test_last_error_is_raised_as_it_is_with_a_note_that_says_why(
    stage: Stage,
    make_error: Callable[[], Exception],
    options: dict[str, Any],
    times: list[float],
    note: str | None,
    *,
    is_sync: bool,
) -> None:
    error, deadline = make_error(), options.get("deadline")
    retrier = stage.retrier(options.get("policy"), chance=1.0)
    with pytest.raises(type(error)) as caught:
        stage.call(retrier, error, is_sync=is_sync, deadline=deadline)
    assert caught.value is error
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert stage.times == times
    notes = getattr(error, "__notes__", [])
    assert len(notes) == (note is not None)
    assert all(note in each for each in notes if note)


@pytest.mark.parametrize("policy", [Retry(attempts=1), Retry(max_wait=5.0), None])
def test_429_pauses_limiter_even_if_its_call_gives_up(stage: Stage, policy: Retry | None) -> None:
    told: list[str] = []
    stage.limiter.observe(lambda event: told.append(type(event).__name__))
    stamina.set_active(policy is not None)
    try:
        with pytest.raises(openai.RateLimitError):
            stage.call(stage.retrier(policy), status_error(429, retry_after="7"))
    finally:
        stamina.set_active(True)
    assert told == ["Paused"]
    assert stage.limiter.statistics().paused == (5 if policy and policy.max_wait == 5 else 7)


@either_kind
def test_retries_obey_staminas_switches(stage: Stage, *, is_sync: bool) -> None:
    def attempts() -> int:
        stage.times.clear()
        with pytest.raises(openai.APIStatusError) as caught:
            stage.call(stage.retrier(), error, is_sync=is_sync)
        assert caught.value is error
        assert set(stage.times) == {0.0}
        return len(stage.times)

    error = status_error(500)
    stamina.set_active(False)
    try:
        assert attempts() == 1
    finally:
        stamina.set_active(True)
    with stamina.set_testing(True, attempts=3):
        assert attempts() == 3


@pytest.mark.parametrize("seconds", [0.5, 1.2])
def test_cancellation_is_never_retried(stage: Stage, seconds: float) -> None:
    attempts: list[float] = []

    async def attempt() -> None:
        attempts.append(stage.time.now)
        await asyncio.sleep(1)
        raise status_error(500)

    async def main() -> None:
        task = asyncio.ensure_future(stage.retrier().call(attempt))
        await asyncio.sleep(seconds)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task

    stage.run(main())
    assert attempts == [0.0]
    assert stage.time.now == seconds


def test_no_slot_is_held_during_back_off(stage: Stage) -> None:
    passed: list[tuple[str, float]] = []
    failing = iter([True, False])

    async def attempt() -> None:
        async with stage.limiter.acquire():
            passed.append(("retried", stage.time.now))
            if next(failing):
                raise status_error(500, retry_after="5")

    async def other() -> None:
        async with stage.limiter.acquire():
            passed.append(("other", stage.time.now))

    async def main() -> None:
        _ = await asyncio.gather(stage.retrier().call(attempt), other())

    stage.run(main())
    assert passed == [("retried", 0.0), ("other", 0.0), ("retried", 5.0)]


def test_provider_error_is_raised_if_limiter_refuses_the_retry(stage: Stage) -> None:
    first = status_error(503)

    async def attempt() -> None:
        async with stage.limiter.acquire(deadline=2.0):
            stage.limiter.pause(60)
            raise first

    with pytest.raises(openai.APIStatusError) as caught:
        stage.run(stage.retrier(chance=1.0).call(attempt, deadline=2.0))
    assert caught.value is first
    (note,) = first.__notes__
    assert note.startswith(
        "asyncbucket: tried once in 1.0 s; gave up: no other attempt was admitted: "
    )
    assert "59" in note


@pytest.mark.parametrize(("share", "calls", "attempts"), [(1.0, 300, 400), (0.2, 1_500, 1_875)])
def test_retry_budget_covers_random_errors_but_an_outage_only_by_a_tenth(
    stage: Stage, share: float, calls: int, attempts: int
) -> None:
    tried: list[int] = []
    chance = random.Random(1)
    retrier = Retrier(Retry(attempts=30), stage.limiter, chance=chance.random)

    async def attempt() -> str:
        tried.append(1)
        await asyncio.sleep(60)  # longer than stamina's own time-out, which is off
        if chance.random() < share:
            raise status_error(500)
        return "reply"

    async def agent() -> list[str | BaseException]:
        return [
            reply
            for _ in range(10)
            for reply in await asyncio.gather(retrier.call(attempt), return_exceptions=True)
        ]

    async def main() -> list[list[str | BaseException]]:
        return await asyncio.gather(*(agent() for _ in range(calls // 10)))

    replies = [reply for each in stage.run(main()) for reply in each]
    failed = [reply for reply in replies if isinstance(reply, openai.APIStatusError)]
    notes = {note for error in failed for note in error.__notes__}
    assert len(tried) == pytest.approx(attempts, rel=0.05 if share < 1 else 0)
    assert len(failed) == (calls if share == 1 else 0)
    assert any("gave up: the retry budget is spent" in note for note in notes) is (share == 1)


def test_retries_after_429_do_not_spend_the_budget(stage: Stage) -> None:
    retrier = stage.retrier(Retry(budget=0))
    scripts = [stage.script(status_error(429, retry_after="1"), "reply") for _ in range(300)]

    async def main() -> list[str]:
        return await asyncio.gather(*(retrier.call(as_async(script)) for script in scripts))

    assert stage.run(main()) == ["reply"] * 300


def test_429s_without_end_fail_calls_after_max_wait_not_after_all_attempts(stage: Stage) -> None:
    """Sixty calls would else make 300 attempts, one after each pause of two minutes: ten hours."""
    retrier = stage.retrier()
    scripts = [stage.script(status_error(429)) for _ in range(60)]
    failed: dict[float, openai.RateLimitError] = {}

    async def paced(script: Callable[[], str]) -> str:
        async with stage.limiter.acquire():
            return script()

    async def call(script: Callable[[], str]) -> None:
        with pytest.raises(openai.RateLimitError) as caught:
            await retrier.call(lambda: paced(script))
        failed[stage.time.now] = caught.value

    async def main() -> None:
        await asyncio.gather(*(call(script) for script in scripts))

    stage.run(main())
    assert list(failed) == [127 + 120 * n for n in range(60)]
    assert failed[127].__notes__ == [
        "asyncbucket: tried once in 127.0 s; gave up: the provider has refused every call for 127 s"
    ]
    assert len(stage.times) == 67


@either_kind
def test_stamina_instrumentation_shows_users_callable_and_provider_error(
    stage: Stage, caplog: pytest.LogCaptureFixture, *, is_sync: bool
) -> None:
    """As for any code that uses stamina: its log, its hooks and what Prometheus makes of them."""
    caplog.set_level(logging.DEBUG)
    seen: list[RetryDetails] = []
    error, tried = status_error(500, text=SECRET), openai.OpenAI(api_key="k").models.list

    def record(details: RetryDetails) -> None:
        seen.append(details)

    for hooks in (None, [record]):
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


@pytest.mark.parametrize(("attempts", "made"), [(2, 4), (1, 1)])
def test_call_may_try_each_member_of_a_pool_once(stage: Stage, attempts: int, made: int) -> None:
    members = [Limiter(name=f"m{number}", clock=stage.time.clock) for number in range(4)]
    pool, sent, asked = Pool(*members), Sent(), set[str]()

    async def attempt() -> None:
        lease = await pool.acquire()
        sent.admitted(pool, lease)
        asked.add(lease.limiter.name)
        lease.member_failed("HTTP 401")
        raise status_error(401)

    with pytest.raises(openai.APIStatusError) as caught:
        stage.run(Retrier(Retry(attempts=attempts), pool).call(attempt, sent=sent))
    assert len(asked) == made
    assert "asyncbucket: pool 'pool': 'm0': left out for 1 s more" in caught.value.__notes__[-1]
