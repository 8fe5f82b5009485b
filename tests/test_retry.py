import asyncio
import functools
import logging
import math
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import httpx
import openai
import pytest
import stamina
import stamina.instrumentation
from stamina.instrumentation import RetryDetails

from asyncbucket import AcquireTimeout, CostExceedsLimit, Limiter, QueueFull
from asyncbucket.providers.headers import WEEK
from asyncbucket.providers.refusals import Refusals
from asyncbucket.retry import Retrier, Retry, RetryBudget, Sent, Verdict, classify
from asyncbucket.testing import VirtualTime, virtual_time
from asyncbucket.testing.provider import RateLimitedProvider

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


class Script:
    """An attempt that raises or returns what the script says, repeating its last line for ever."""

    def __init__(self, *lines: object, clock: Callable[[], int]) -> None:
        self.lines = list(lines)
        self.clock = clock
        self.times: list[float] = []

    def play(self) -> str:
        self.times.append(self.clock() / 1e9)
        line = self.lines.pop(0) if len(self.lines) > 1 else self.lines[0]
        if isinstance(line, BaseException):
            raise line
        return str(line)

    async def __call__(self) -> str:
        return self.play()


class Stage:
    """A retrier on virtual time, whose random number is always the same."""

    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self.limiter = Limiter(concurrency=1, name="openai", clock=time.clock)

    def retrier(self, policy: Retry | None = None, *, chance: float = 0.0) -> Retrier:
        return Retrier(policy or Retry(), self.limiter, chance=lambda: chance)

    def script(self, *lines: object) -> Script:
        return Script(*lines, clock=self.time.clock)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        return self.time.run(main)


@pytest.fixture(name="stage")
def open_stage() -> Iterator[Stage]:
    """Provide virtual time, with a limiter of one slot on it."""
    with virtual_time() as time:
        yield Stage(time)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_transient_statuses_are_retried(status: int) -> None:
    """Time-outs, conflicts, rate limits and server errors may go away."""
    verdict = classify(status_error(status))

    assert verdict.retry
    assert verdict.rate_limited == (status == 429)
    assert verdict.reason == f"HTTP {status} (requests)"


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
def test_other_client_errors_are_not_retried(status: int) -> None:
    """A wrong request would get the same answer again."""
    assert not classify(status_error(status, retry_after="1")).retry


@pytest.mark.parametrize(
    "code", ["insufficient_quota", "billing_not_active", "billing_hard_limit_reached"]
)
def test_exhausted_quota_is_not_retried(code: str) -> None:
    """A 429 because credit has run out is final, and no reason for other calls to pause."""
    expected = Verdict(retry=False, reason=f"HTTP 429 ({code})")

    assert classify(status_error(429, code)) == expected


def test_exhausted_quota_in_nested_body_is_not_retried() -> None:
    """Some SDKs keep the whole body, with the error inside."""
    error = status_error(429)
    error.body = {"type": "error", "error": {"code": None, "type": "insufficient_quota"}}
    vars(error).update(code=None, type=None)

    assert classify(error) == Verdict(retry=False, reason="HTTP 429 (insufficient_quota)")


def test_x_should_retry_header_can_only_forbid_a_retry() -> None:
    """`x-should-retry: false` is obeyed; `true` does not make a client error worth repeating."""
    assert not classify(status_error(429, x_should_retry="false")).retry
    assert not classify(status_error(400, x_should_retry="true")).retry
    assert classify(status_error(503, x_should_retry="true")).retry


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after_ms": "1500", "retry_after": "9"}, 1.5),
        ({"retry_after": "9"}, 9.0),
        ({"retry_after": "Fri, 31 Dec 9999 23:59:59 GMT"}, WEEK),
        *(({"retry_after": value}, None) for value in ("nan", "inf", "-1", "1_0", "0", "²", "")),
        ({}, None),
    ],
)
def test_retry_after_prefers_milliseconds_and_ignores_nonsense(
    headers: dict[str, str], seconds: float | None
) -> None:
    """Milliseconds take precedence over seconds or a date; nonsense and 0 mean no wait."""
    raw = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    error = status_error(429)
    error.response = httpx.Response(429, headers=raw, request=REQUEST)

    assert classify(error).retry_after == seconds


@pytest.mark.parametrize(
    "error",
    [
        openai.APIConnectionError(request=REQUEST),
        openai.APITimeoutError(request=REQUEST),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
        ConnectionResetError(),
        TimeoutError(),
    ],
)
def test_lost_connections_and_timeouts_are_retried(error: Exception) -> None:
    """Errors without a status are recognized by the names of their classes."""
    timed_out = isinstance(error, (openai.APITimeoutError, httpx.ReadTimeout, TimeoutError))
    name = type(error).__name__
    assert classify(error) == Verdict(retry=True, reason=name, overloaded=timed_out)


def test_plain_httpx_errors_are_judged_by_status() -> None:
    """`raise_for_status` gives an error whose response has the status."""
    response = httpx.Response(503, headers={"retry-after": "2"}, request=REQUEST)
    error = httpx.HTTPStatusError("no", request=REQUEST, response=response)

    assert classify(error) == Verdict(
        retry=True, reason="HTTP 503", retry_after=2.0, overloaded=True
    )


def test_errors_of_other_sdks_are_judged_by_status() -> None:
    """The status is found under any of its usual names; no headers are needed."""
    for name in ("status_code", "status", "code"):
        error = RuntimeError("no")
        vars(error)[name] = 503
        assert classify(error) == Verdict(retry=True, reason="HTTP 503", overloaded=True)


def test_status_and_headers_on_error_itself_are_read() -> None:
    """An error of aiohttp has no response, but has the status and the headers itself."""
    kind = pytest.importorskip("aiohttp").ClientResponseError
    error = kind(None, (), status=429, headers=httpx.Headers({"Retry-After": "7"}))

    verdict = classify(error)

    assert (verdict.retry, verdict.rate_limited, verdict.retry_after) == (True, True, 7.0)


def test_botocore_errors_are_judged_by_status_or_code() -> None:
    """Bedrock's status, code and headers are in dictionaries; errors in its streams have a code."""
    errors = pytest.importorskip("botocore.exceptions")

    def answered(status: int, code: str) -> Any:
        reply = {"HTTPStatusCode": status, "HTTPHeaders": {"retry-after": "3"}}
        return errors.ClientError({"Error": {"Code": code}, "ResponseMetadata": reply}, "Converse")

    broken = errors.EventStreamError({"Error": {"Code": "throttlingException"}}, "ConverseStream")

    assert classify(answered(429, "ThrottlingException")) == Verdict(
        retry=True,
        reason="HTTP 429 (throttlingexception)",
        retry_after=3.0,
        rate_limited=True,
        overloaded=True,
    )
    assert not classify(answered(400, "ValidationException")).retry
    assert classify(broken).rate_limited
    assert classify(errors.ConnectionClosedError(endpoint_url="https://bedrock.test")).retry


def test_error_event_in_stream_is_judged_by_its_code() -> None:
    """The stream's status was 200; what went wrong is told by the event."""
    limited = openai.APIError("no", REQUEST, body={"code": "rate_limit_exceeded"})
    invalid = openai.APIError("no", REQUEST, body={"code": "invalid_prompt"})
    overloaded = openai.APIStatusError(
        "no",
        response=httpx.Response(200, request=REQUEST),
        body={"error": {"type": "overloaded_error"}},
    )

    assert classify(limited) == Verdict(
        retry=True, reason="rate_limit_exceeded", rate_limited=True, overloaded=True
    )
    assert classify(overloaded) == Verdict(retry=True, reason="overloaded_error", overloaded=True)
    assert not classify(invalid).retry


def test_connection_error_with_permanent_cause_is_not_retried() -> None:
    """A wrong URL or header is not a lost connection, though the SDK calls it one."""
    error = openai.APIConnectionError(request=REQUEST)
    error.__cause__ = httpx.UnsupportedProtocol("no scheme")
    ring = openai.APIConnectionError(request=REQUEST)
    ring.__cause__ = httpx.ConnectError("refused")
    ring.__cause__.__cause__ = ring

    assert not classify(error).retry
    assert classify(ring).retry


def test_limiter_refusal_as_cause_of_sdk_error_is_not_retried() -> None:
    """The SDK reports a lost connection; only `__cause__` counts, not `__context__`."""
    error = openai.APIConnectionError(request=REQUEST)
    error.__cause__ = CostExceedsLimit("ours")
    later = openai.APIConnectionError(request=REQUEST)
    later.__context__ = QueueFull("ours")

    assert not classify(error).retry
    assert classify(later).retry


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("yours"), KeyError("k"), FileNotFoundError(), RuntimeError()),
        *(AcquireTimeout("ours"), QueueFull("ours"), CostExceedsLimit("ours")),
        *(asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(500), GeneratorExit()),
    ],
)
def test_caller_errors_limiter_errors_and_exits_are_not_retried(error: BaseException) -> None:
    """Not the caller's errors, not the limiter's, and nothing that is not an `Exception`."""
    assert not classify(error).retry


def test_verdict_reason_omits_free_text_from_provider() -> None:
    """A code that is more than a word is left out: reasons are logged."""
    error = status_error(500, f"key {SECRET}\n", text=SECRET)
    error.body = {"code": f"key {SECRET}\n", "type": "x" * 65}
    vars(error).update(code=None, type=None)

    assert classify(error).reason == "HTTP 500"


def test_retry_of_accepts_policy_attempts_bool_or_none() -> None:
    """It takes a policy, a number of attempts, False for none, and True or None for the default."""
    assert Retry.of(None) == Retry.of(True) == Retry()
    assert Retry().attempts == 5
    assert Retry.of(False) == Retry(attempts=1)
    assert Retry.of(3) == Retry(attempts=3)
    policy = Retry(max_wait=5)
    assert Retry.of(policy) is policy


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"attempts": 0},
            "attempts must be at least 1, not 0; 1 or retry=False means no retry",
        ),
        ({"attempts": 2.5}, "attempts must be a whole number, not 2.5"),
        ({"attempts": True}, "attempts must be a whole number, not True"),
        ({"max_wait": math.nan}, "max_wait must be at least 0 and at most 604800, not nan"),
        ({"max_wait": math.inf}, "max_wait must be at least 0 and at most 604800, not inf"),
        ({"backoff": -1}, "backoff must be at least 0 and at most 604800, not -1"),
        ({"jitter": 1.5}, "jitter must be at least 0 and at most 1, not 1.5"),
        ({"jitter": "0"}, "jitter must be a number, not '0'"),
        ({"budget": 5}, "budget must be a RetryBudget, not 5"),
    ],
)
def test_invalid_retry_policy_is_refused(wrong: dict[str, Any], message: str) -> None:
    """The message names the wrong value and what would be right."""
    with pytest.raises((TypeError, ValueError)) as caught:
        _ = Retry(**wrong)

    assert str(caught.value) == message


def test_negative_retry_budget_is_refused() -> None:
    """A budget may be zero or infinite, but not negative."""
    _ = RetryBudget(capacity=0, per_success=math.inf)
    with pytest.raises(ValueError, match="the retry budget's capacity must be at least 0, not -1"):
        _ = RetryBudget(capacity=-1)


def test_failed_call_is_retried_after_doubling_waits(stage: Stage) -> None:
    """The waits are 1, 2, 4 and 8 s, or half of each at the luckiest; then the reply comes."""
    for chance, times in ((1.0, [0.0, 1.0, 3.0, 7.0, 15.0]), (0.0, [15.0, 15.5, 16.5, 18.5, 22.5])):
        script = stage.script(*[status_error(500)] * 4, "reply")

        assert stage.run(stage.retrier(chance=chance).call(script)) == "reply"
        assert script.times == times


def test_last_error_is_raised_unwrapped_with_a_note(stage: Stage) -> None:
    """After five attempts the caller sees the provider's error, and what was done about it."""
    errors = [status_error(500) for _ in range(5)]
    script = stage.script(*errors)

    with pytest.raises(openai.APIStatusError) as caught:
        stage.run(stage.retrier(chance=1.0).call(script))

    assert caught.value is errors[-1]
    assert len(script.times) == 5
    assert caught.value.__notes__ == [
        "asyncbucket: tried 5 times in 15.0 s; gave up: Retry(attempts=5) allows no more"
    ]
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert not any(hasattr(error, "__notes__") for error in errors[:-1])


def test_client_error_fails_at_once(stage: Stage) -> None:
    """A 400 would not go away by waiting."""
    script = stage.script(status_error(400))

    with pytest.raises(openai.APIStatusError) as caught:
        stage.run(stage.retrier().call(script))

    assert script.times == [0.0]
    assert caught.value.__notes__ == [
        "asyncbucket: tried once in 0.0 s; gave up: HTTP 400 (requests) is not retried"
    ]


def test_caller_errors_pass_through_without_a_note(stage: Stage) -> None:
    """An error that has nothing to do with the provider gets no note."""
    script = stage.script(ValueError("yours"))

    with pytest.raises(ValueError, match="yours") as caught:
        stage.run(stage.retrier().call(script))

    assert not hasattr(caught.value, "__notes__")
    assert len(script.times) == 1


def test_retries_can_be_switched_off(stage: Stage) -> None:
    """With one attempt an error is final, and the note says why."""
    script = stage.script(status_error(503))

    with pytest.raises(openai.APIStatusError) as caught:
        stage.run(stage.retrier(Retry.of(False)).call(script))

    assert caught.value.__notes__ == [
        "asyncbucket: tried once in 0.0 s; gave up: Retry(attempts=1) allows no more"
    ]


@pytest.mark.parametrize(("chance", "again"), [(0.0, 8.0), (0.5, 8.4), (1.0, 8.8)])
def test_retry_after_gets_a_tenth_of_jitter(stage: Stage, chance: float, again: float) -> None:
    """The next attempt is never earlier than the server says, and at most a tenth later."""
    script = stage.script(status_error(503, retry_after="8"), "reply")

    assert stage.run(stage.retrier(chance=chance).call(script)) == "reply"
    assert script.times == [0.0, again]


def test_jitter_does_not_exceed_max_wait(stage: Stage) -> None:
    """A server that asks for exactly the longest wait gets exactly that."""
    script = stage.script(status_error(503, retry_after="120"), "reply")

    assert stage.run(stage.retrier(chance=1.0).call(script)) == "reply"
    assert script.times == [0.0, 120.0]


def test_retry_after_above_max_wait_fails_at_once(stage: Stage) -> None:
    """A call told to come back in five minutes is not kept waiting for two."""
    script = stage.script(status_error(503, retry_after="300"))

    with pytest.raises(openai.APIStatusError) as caught:
        stage.run(stage.retrier().call(script))

    assert script.times == [0.0]
    assert caught.value.__notes__ == [
        (
            "asyncbucket: tried once in 0.0 s; gave up: the provider asks to wait 300 s, "
            "and Retry(max_wait=120) allows no more"
        )
    ]


def test_note_writes_out_long_wait_in_seconds(stage: Stage) -> None:
    """A provider whose daily limit is used up asks for hours."""
    with pytest.raises(openai.APIStatusError) as caught:
        stage.run(stage.retrier().call(stage.script(status_error(503, retry_after="7200"))))

    assert "the provider asks to wait 7,200 s, and" in caught.value.__notes__[0]


def test_retry_due_after_deadline_fails_at_once(stage: Stage) -> None:
    """The deadline is an instant of the limiter's clock; no call sleeps if it cannot make it."""
    script = stage.script(status_error(503, retry_after="8"))

    with pytest.raises(openai.APIStatusError) as caught:
        stage.run(stage.retrier().call(script, deadline=10.0))

    assert script.times == [0.0, 8.0]
    assert stage.time.now == 8.0
    assert caught.value.__notes__ == [
        (
            "asyncbucket: tried 2 times in 8.0 s; gave up: "
            "the next attempt is due in 8 s, the deadline in 2 s"
        )
    ]


def test_nan_deadline_fails_rather_than_hangs(stage: Stage) -> None:
    """A deadline that cannot be compared allows no waiting."""
    script = stage.script(status_error(503))

    with pytest.raises(openai.APIStatusError):
        stage.run(stage.retrier().call(script, deadline=math.nan))

    assert script.times == [0.0]


@pytest.mark.parametrize("value", ["nan", "inf", "-5", "1e400", "9" * 60])
def test_hostile_retry_after_never_hangs_the_call(stage: Stage, value: str) -> None:
    """A wait that is not a number counts as none; one that is far too long ends the call."""
    script = stage.script(status_error(503, retry_after=value), "reply")

    try:
        _ = stage.run(stage.retrier(chance=1.0).call(script))
    except openai.APIStatusError:
        assert script.times == [0.0]
    else:
        assert script.times == [0.0, 1.0]


def test_attempt_that_took_an_hour_is_retried(stage: Stage) -> None:
    """Stamina's own time-out of 45 s is off: an attempt that took an hour is tried again."""
    attempts: list[float] = []

    async def attempt() -> str:
        attempts.append(stage.time.now)
        await asyncio.sleep(3600)
        if len(attempts) == 1:
            raise status_error(500)
        return "reply"

    assert stage.run(stage.retrier(chance=1.0).call(attempt)) == "reply"
    assert attempts == [0.0, 3601.0]


@pytest.mark.parametrize("seconds", [0.5, 1.2])
def test_cancellation_is_never_retried(stage: Stage, seconds: float) -> None:
    """A cancel ends the call, whether in an attempt (first second) or in a back-off (the next)."""
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


def test_asyncio_timeout_around_call_ends_it(stage: Stage) -> None:
    """`asyncio.timeout` turns its cancellation into a TimeoutError, which is not retried here."""
    script = stage.script(status_error(503, retry_after="60"))

    async def main() -> None:
        async with asyncio.timeout(10):
            await stage.retrier().call(script)

    with pytest.raises(TimeoutError):
        stage.run(main())
    assert script.times == [0.0]
    assert stage.time.now == 10.0


def test_no_slot_is_held_during_back_off(stage: Stage) -> None:
    """With one slot, a call that backs off lets the next one pass."""
    passed: list[tuple[str, float]] = []
    failing = iter([True, False])

    async def attempt() -> None:
        async with stage.limiter.acquire():
            passed.append(("retried", stage.time.now))
            if next(failing):
                raise status_error(503, retry_after="5")

    async def other() -> None:
        async with stage.limiter.acquire():
            passed.append(("other", stage.time.now))

    async def main() -> None:
        _ = await asyncio.gather(stage.retrier().call(attempt), other())

    stage.run(main())
    assert passed == [("retried", 0.0), ("other", 0.0), ("retried", 5.0)]


def test_429_pauses_all_users_of_limiter(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """While the provider wants no calls, no other user of the limiter makes any."""
    others: list[float] = []
    script = stage.script(status_error(429, retry_after="7"), "reply")

    async def other() -> None:
        async with stage.limiter.acquire():
            others.append(stage.time.now)

    async def main() -> None:
        call = asyncio.ensure_future(stage.retrier(chance=1.0).call(script))
        await asyncio.sleep(1)
        await asyncio.gather(other(), call)

    stage.run(main())
    assert script.times == [0.0, 7.7]
    assert others == [7.0]
    assert stage.limiter.statistics().upstream_429 == 1
    assert [r.getMessage() for r in caplog.records if r.name == "asyncbucket"] == [
        (
            "limiter 'openai' pauses for 7 s: the provider refused a call (429); "
            "its limits may be lower than yours, or others use the same key"
        )
    ]


@pytest.mark.parametrize("policy", [Retry(attempts=1), Retry(max_wait=5.0)])
def test_429_pauses_limiter_even_if_its_own_call_gives_up(stage: Stage, policy: Retry) -> None:
    """Even the last attempt makes others wait, though never longer than `max_wait`."""
    script = stage.script(status_error(429, retry_after="7"))

    with pytest.raises(openai.RateLimitError):
        stage.run(stage.retrier(policy).call(script))

    assert stage.limiter.statistics().paused == min(7.0, policy.max_wait)


def test_server_error_does_not_pause_limiter(stage: Stage) -> None:
    """An error of one call says nothing about the others."""
    with pytest.raises(openai.APIStatusError):
        stage.run(stage.retrier(Retry(attempts=1)).call(stage.script(status_error(503))))

    assert stage.limiter.statistics().paused == 0


def refused(retry_after: float | None = None, *, whole_after: float | None = None) -> Verdict:
    """Return the verdict on a 429."""
    return Verdict(
        retry=True,
        reason="HTTP 429",
        retry_after=retry_after,
        whole_after=whole_after,
        rate_limited=True,
    )


def test_wave_of_429s_doubles_the_pause_only_once(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """Without Retry-After, the pause doubles from wave to wave, not from refusal to refusal."""
    retrier = stage.retrier()
    pauses: list[float] = []

    async def main() -> None:
        for _ in range(4):
            pauses.append(retrier.pause(refused()))
            await asyncio.sleep(pauses[-1] / 4)
            for _ in range(50):
                retrier.pause(refused())
            retrier.succeeded()  # a reply that was already under way does not end the series
            await asyncio.sleep(stage.limiter.statistics().paused)
        retrier.succeeded()
        pauses.append(retrier.pause(refused()))

    stage.run(main())
    assert pauses == [1.0, 2.0, 4.0, 8.0, 1.0]
    assert stage.limiter.statistics().upstream_429 == 4 * 51 + 1
    assert len(caplog.records) == 1  # more waves in the same minute are only logged for debugging


def test_late_429_of_call_sent_before_a_pause_starts_no_new_one(stage: Stage) -> None:
    """It does not matter when it comes; a call of unknown start counts as a new wave."""
    retrier = stage.retrier(Retry(attempts=1))
    script = stage.script(status_error(429))
    sent = Sent()
    pauses: list[float] = []

    def call(at: float | None) -> None:
        sent.at = at
        with pytest.raises(openai.RateLimitError):
            retrier.call_sync(script.play, sent=sent)
        pauses.append(stage.limiter.statistics().paused)

    async def main() -> None:
        call(0.0)
        await asyncio.sleep(2)
        call(0.0)
        call(None)

    stage.run(main())
    assert pauses == [1.0, 0.0, 2.0]


def test_retriers_and_transport_on_one_limiter_share_429_waves(stage: Stage) -> None:
    """With two models and a transport on one limiter, a pause doubles once, and success counts."""
    first, second = stage.retrier(), stage.retrier()
    transport = Refusals(stage.limiter)
    pauses: list[float] = []

    async def main() -> None:
        for _ in range(3):
            pauses.append(first.pause(refused()))
            assert second.pause(refused()) == transport.pause(None) == pauses[-1]
            await asyncio.sleep(pauses[-1])
        transport.succeeded()
        pauses.append(second.pause(refused()))

    stage.run(main())
    assert pauses == [1.0, 2.0, 4.0, 1.0]


def test_pause_without_retry_after_lasts_at_most_until_limits_reset(stage: Stage) -> None:
    """However many waves there were, it lasts no longer than the provider says."""
    retrier = stage.retrier()
    pauses: list[float] = []

    async def main() -> None:
        for _ in range(4):
            pauses.append(retrier.pause(refused(whole_after=3.0)))
            await asyncio.sleep(pauses[-1])

    stage.run(main())
    assert pauses == [1.0, 2.0, 3.0, 3.0]


def test_429_under_adaptive_concurrency_is_retried_after_back_off(stage: Stage) -> None:
    """Where it only costs slots, the call itself waits as it does after a server error."""
    stage.limiter.reconfigure(concurrency="auto")
    script = stage.script(status_error(429), "reply")

    assert stage.run(stage.retrier(chance=1.0).call(script)) == "reply"
    assert script.times == [0.0, 1.0]


def test_longest_retry_after_in_a_wave_sets_the_pause(stage: Stage) -> None:
    """In one wave of refusals the longest wait counts; a shorter one changes nothing."""
    retrier = stage.retrier()
    for asked in (2.0, 6.0, 3.0):
        _ = retrier.pause(refused(asked))

    assert stage.limiter.statistics().paused == 6.0


def test_endless_429s_pause_for_at_most_max_wait(stage: Stage) -> None:
    """Even after two thousand waves the pause is a number, and at most the longest one."""
    retrier = stage.retrier()

    async def main() -> None:
        for _ in range(2000):
            await asyncio.sleep(retrier.pause(refused()))

    stage.run(main())
    assert retrier.pause(refused()) == 120.0


def test_limiter_refusal_passes_through_without_a_note(stage: Stage) -> None:
    """A call that is not admitted in time never reached the provider: the error is its own."""
    stage.limiter.pause(60)

    async def attempt() -> None:
        _ = await stage.limiter.acquire(timeout=1)

    with pytest.raises(AcquireTimeout) as caught:
        stage.run(stage.retrier().call(attempt))

    assert not hasattr(caught.value, "__notes__")


def test_provider_error_is_raised_if_limiter_refuses_the_retry(stage: Stage) -> None:
    """If the limiter leaves no time for a second attempt, the error of the first one is raised."""
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


def faulty(share: float, chance: random.Random, tried: list[int]) -> Callable[[], Awaitable[str]]:
    """Make an attempt that fails at once at random, or answers after a second."""

    async def attempt() -> str:
        tried.append(1)
        if chance.random() < share:
            raise status_error(500)
        await asyncio.sleep(1)
        return "reply"

    return attempt


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("share", "agents", "seed"), [(0.15, 300, 1), (0.2, 100, 2), (0.2, 300, 3)]
)
def test_retry_budget_survives_20_percent_random_errors(
    stage: Stage, share: float, agents: int, seed: int
) -> None:
    """At 15 and 20 % errors and hundreds of calls at once, the budget never runs out."""
    retrier = Retrier(Retry(attempts=30), stage.limiter, chance=random.Random(seed).random)
    tried: list[int] = []
    attempt = faulty(share, random.Random(seed), tried)

    async def agent() -> list[str]:
        return [await retrier.call(attempt) for _ in range(10)]

    async def main() -> list[list[str]]:
        return await asyncio.gather(*(agent() for _ in range(agents)))

    replies = stage.run(main())
    assert sum(map(len, replies)) == agents * 10
    assert len(tried) == pytest.approx(agents * 10 / (1 - share), rel=0.05)


def test_retry_budget_limits_outage_to_a_tenth_more_attempts(stage: Stage) -> None:
    """A thousand calls into an outage make 100 retries; the error says that the budget is spent."""
    tried: list[int] = []
    attempt = faulty(1.0, random.Random(0), tried)
    retrier = stage.retrier()

    async def main() -> list[str | BaseException]:
        calls = (retrier.call(attempt) for _ in range(1000))
        return await asyncio.gather(*calls, return_exceptions=True)

    results = stage.run(main())
    assert len(tried) == 1100
    assert {type(result) for result in results} == {openai.APIStatusError}
    notes = {note for result in results for note in getattr(result, "__notes__", ())}
    assert any("gave up: the retry budget is spent" in note for note in notes)
    assert repr(retrier) == "<Retrier 5 attempts, 0 retries in the budget>"


def test_successes_refill_retry_budget_up_to_its_capacity(stage: Stage) -> None:
    """Two successes pay for one retry, and no more is saved than the capacity."""
    retrier = stage.retrier(Retry(budget=RetryBudget(capacity=2)))
    assert [retrier._spend() for _ in range(3)] == [True, True, False]
    retrier.succeeded()
    assert not retrier._spend()
    retrier.succeeded()
    assert retrier._spend()
    for _ in range(100):
        retrier.succeeded()
    assert [retrier._spend() for _ in range(3)] == [True, True, False]


def test_retries_after_429_do_not_spend_the_budget(stage: Stage) -> None:
    """A whole wave of 429s is tried again after its pause, however small the budget."""
    retrier = stage.retrier(Retry(budget=RetryBudget(capacity=0)))
    refused = [stage.script(status_error(429, retry_after="1"), "reply") for _ in range(300)]

    async def main() -> list[str]:
        return await asyncio.gather(*(retrier.call(script) for script in refused))

    assert stage.run(main()) == ["reply"] * 300


def test_call_that_always_gets_429_makes_five_attempts(stage: Stage) -> None:
    """A provider that always refuses is asked five times, after pauses of 1, 2, 4 and 8 s."""
    script = stage.script(status_error(429))

    with pytest.raises(openai.RateLimitError) as caught:
        stage.run(stage.retrier().call(script))

    assert script.times == [0.0, 1.0, 3.0, 7.0, 15.0]
    assert caught.value.__notes__ == [
        "asyncbucket: tried 5 times in 15.0 s; gave up: Retry(attempts=5) allows no more"
    ]


def test_429s_without_end_fail_calls_after_max_wait_not_after_all_attempts(stage: Stage) -> None:
    """Sixty calls would else make 300 attempts, one after each pause of two minutes: ten hours."""
    retrier = stage.retrier()
    scripts = [stage.script(status_error(429)) for _ in range(60)]
    failed: dict[float, openai.RateLimitError] = {}

    async def paced(script: Script) -> str:
        async with stage.limiter.acquire():
            return await script()

    async def call(script: Script) -> None:
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
    assert sum(len(script.times) for script in scripts) == 67


@pytest.fixture(name="hook_details")
def record_hook_details() -> Iterator[list[RetryDetails]]:
    """Instrument stamina, and record what its hook is told."""
    seen: list[RetryDetails] = []

    def record(details: RetryDetails) -> None:
        seen.append(details)

    stamina.instrumentation.set_on_retry_hooks([record])
    yield seen
    stamina.instrumentation.set_on_retry_hooks(None)


def test_stamina_hook_is_told_of_each_retry(stage: Stage, hook_details: list[RetryDetails]) -> None:
    """An application that instruments stamina hears of our retries as of its own."""
    error = status_error(500)
    _ = stage.run(stage.retrier(chance=1.0).call(stage.script(error, "reply")))

    (details,) = hook_details
    assert (details.retry_num, details.wait_for, details.caused_by) == (1, 1.0, error)


def test_stamina_metrics_name_users_callable_and_provider_error(
    stage: Stage,
) -> None:
    """Prometheus shows the user's names, not ours, which would mean nothing on a dashboard."""
    prometheus = pytest.importorskip("prometheus_client")
    instrumentation = stamina.instrumentation
    client = openai.OpenAI(api_key="k", max_retries=0)
    script = stage.script(status_error(500), "reply")
    instrumentation.set_on_retry_hooks([instrumentation.PrometheusOnRetryHook])
    try:
        tried = functools.partial(client.chat.completions.create, messages=[])
        _ = stage.run(stage.retrier().call(script, tried=tried))
    finally:
        instrumentation.set_on_retry_hooks(None)

    retries = prometheus.REGISTRY.get_sample_value(
        "stamina_retries_total",
        {
            "callable": "openai.resources.chat.completions.completions.Completions.create",
            "retry_num": "1",
            "error_type": "openai.APIStatusError",
        },
    )
    assert retries == 1


@pytest.mark.parametrize("is_sync", [True, False])
def test_stamina_hook_gets_name_of_retried_callable_by_default(
    stage: Stage,
    hook_details: list[RetryDetails],
    is_sync: bool,  # noqa: FBT001 - pytest passes it so
) -> None:
    """An object that is called goes by the name of its class."""
    script = stage.script(status_error(500), "reply")
    retrier = stage.retrier(Retry(backoff=0.0))
    if is_sync:
        retrier.call_sync(functools.partial(script.play))
    else:
        _ = stage.run(retrier.call(script))

    (details,) = hook_details
    assert details.name == f"{__name__}.Script{'.play' if is_sync else ''}"
    assert (details.args, details.kwargs) == ((), {})


def test_retry_logs_one_debug_line_besides_staminas(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither message quotes anything from the provider."""
    caplog.set_level(logging.DEBUG)
    script = stage.script(status_error(500, text=SECRET), "reply")
    _ = stage.run(stage.retrier(chance=1.0).call(script))

    lines = [(r.name, r.getMessage()) for r in caplog.records if r.name != "asyncio"]
    assert lines == [
        ("asyncbucket", "attempt 1: HTTP 500 (requests); again in 1 s"),
        ("stamina", "stamina.retry_scheduled"),
    ]


@pytest.mark.parametrize("is_sync", [True, False])
def test_retries_obey_staminas_switches(stage: Stage, *, is_sync: bool) -> None:
    """Off, a call is tried once; in testing mode, as often as that says, without waiting."""

    def call(script: Script) -> str:
        if is_sync:
            return stage.retrier().call_sync(script.play)
        return stage.run(stage.retrier().call(script))

    def attempts(script: Script) -> int:
        with pytest.raises(openai.APIStatusError) as caught:
            call(script)
        assert caught.value is error
        assert set(script.times) == {0.0}
        return len(script.times)

    error = status_error(500)
    stamina.set_active(False)
    try:
        assert attempts(stage.script(error)) == 1
    finally:
        stamina.set_active(True)
    with stamina.set_testing(True, attempts=3):
        assert attempts(stage.script(error)) == 3


def test_429_pauses_limiter_while_stamina_is_switched_off(stage: Stage) -> None:
    """No retry is made, reported or charged, but the provider's wish concerns everyone."""
    retrier = stage.retrier()
    told: list[str] = []
    stage.limiter.observe(lambda event: told.append(type(event).__name__))
    stamina.set_active(False)
    try:
        with pytest.raises(openai.RateLimitError):
            stage.run(retrier.call(stage.script(status_error(429, retry_after="7"))))
    finally:
        stamina.set_active(True)

    assert told == ["Paused"]
    assert stage.limiter.statistics().paused == 7
    assert "100 retries in the budget" in repr(retrier)


def test_sync_calls_retry_like_async_calls(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits, notes and the limiter's own refusals are the same as in asynchronous calls."""
    monkeypatch.setattr("time.sleep", stage.time.advance)
    retrier = stage.retrier(chance=1.0)
    script = stage.script(status_error(500), "reply")
    assert retrier.call_sync(script.play) == "reply"
    assert script.times == [0.0, 1.0]

    always = stage.script(status_error(500))
    with pytest.raises(openai.APIStatusError) as caught:
        retrier.call_sync(always.play)
    assert caught.value.__notes__ == [
        "asyncbucket: tried 5 times in 15.0 s; gave up: Retry(attempts=5) allows no more"
    ]

    refusal = QueueFull("ours")
    with pytest.raises(QueueFull) as refused:
        retrier.call_sync(stage.script(refusal).play)
    assert refused.value is refusal

    first = status_error(500)
    with pytest.raises(openai.APIStatusError) as then_refused:
        retrier.call_sync(stage.script(first, refusal).play)
    assert then_refused.value is first


def test_threads_share_one_retry_budget() -> None:
    """Calls in several threads never spend the same retry twice."""
    retrier = Retrier(Retry(backoff=0.0, budget=RetryBudget(capacity=50)), Limiter("500 RPM"))
    tried: list[int] = []

    def attempt() -> None:
        tried.append(1)
        raise status_error(500)

    def work() -> None:
        for _ in range(50):
            with pytest.raises(openai.APIStatusError):
                retrier.call_sync(attempt)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tried) == 4 * 50 + 50


def test_retry_events_of_tenants_are_labelled_with_a_star(stage: Stage) -> None:
    """Events do not say which tenant it was, and the retry's event does not either."""
    tenant = stage.limiter.key("acme")
    heard: set[str] = set()
    stage.limiter.observe(lambda event: heard.add(f"{type(event).__name__} {event.limiter}"))
    retrier = Retrier(Retry(), tenant, chance=lambda: 0.0)

    async def play() -> str:
        async with tenant.acquire():
            return await script()

    script = stage.script(status_error(503), "answer")
    stage.run(retrier.call(play))
    assert heard == {"Admitted openai/*", "Released openai/*", "Retried openai/*"}


@pytest.mark.real_clock
async def test_every_call_is_answered_at_15_percent_errors() -> None:
    """Over real HTTP, requests are calls plus failures, and no call ends in an error."""
    retrier = Retrier(Retry(backoff=0.01), Limiter("100k RPM burst 1000", concurrency=32))
    async with (
        RateLimitedProvider(error_rate=0.15, latency=0.005, seed=7) as provider,
        openai.AsyncOpenAI(base_url=provider.base_url, api_key="test-key", max_retries=0) as client,
    ):

        async def call(number: int) -> str | None:
            reply = await retrier.call(
                lambda: client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": f"question {number}"}]
                )
            )
            return reply.choices[0].message.content

        replies = await asyncio.gather(*map(call, range(200)))
        seen = provider.statistics()

    assert replies == [f"You said: question {number}" for number in range(200)]
    assert seen.requests == 200 + seen.errors
    assert seen.errors > 20
