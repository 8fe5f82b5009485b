import logging
from typing import Any, cast

import pytest

from asyncbucket import Limiter, events, telemetry

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}
LINES: list[tuple[type[events.Event], dict[str, Any], str]] = [
    (
        events.Queued,
        {"cost": COST, "waiting": 4},
        "openai: a call of 1 request, 900 tokens waits, 4 wait",
    ),
    (
        events.Admitted,
        {"cost": COST, "waited": 1.834, "bound_by": "input_tokens", "waiting": 3, "in_flight": 20},
        (
            "openai: a call of 1 request, 900 tokens passed after 1.83 s for input tokens; "
            "3 wait, 20 in flight"
        ),
    ),
    (
        events.Admitted,
        {"cost": COST, "waited": 2.0, "bound_by": "paused", "waiting": 0, "in_flight": 1},
        (
            "openai: a call of 1 request, 900 tokens passed after 2 s for the end of a pause; "
            "none wait, 1 in flight"
        ),
    ),
    (
        events.Admitted,
        {"cost": {"requests": 1}, "waited": 0.0, "bound_by": None, "waiting": 0, "in_flight": 1},
        "openai: a call of 1 request passed; none wait, 1 in flight",
    ),
    (
        events.Refused,
        {"cost": COST, "reason": "would_block", "bound_by": "tokens", "retry_after": 3.25},
        (
            "openai: a call of 1 request, 900 tokens was refused: would block, bound by tokens; "
            "free in 3.25 s"
        ),
    ),
    (
        events.Refused,
        {"cost": COST, "reason": "queue_full", "bound_by": None, "retry_after": None},
        "openai: a call of 1 request, 900 tokens was refused: queue full",
    ),
    (
        events.Cancelled,
        {"cost": COST, "waited": 1_200.4},
        "openai: a call of 1 request, 900 tokens gave up after 1,200 s",
    ),
    (
        events.Settled,
        {"reserved": COST, "used": {"tokens": 700, "output_tokens": 100}},
        "openai: a call used 700 tokens of 900 reserved, 100 output tokens of 300 reserved",
    ),
    (
        events.Released,
        {"cost": COST, "held": 1.2, "outcome": "ok"},
        "openai: a call ended after 1.2 s: ok",
    ),
    (events.Paused, {"seconds": 2.0, "reason": "429"}, "openai: nobody passes for 2 s: 429"),
    (events.Paused, {"seconds": 2.0, "reason": ""}, "openai: nobody passes for 2 s"),
    (
        events.Retried,
        {"attempt": 1, "error": "HTTP 429", "delay": 2.1},
        "openai: attempt 1 failed (HTTP 429), again in 2.1 s",
    ),
    (
        events.LimitLearned,
        {"limit": "500 requests per 60 s"},
        "openai: the provider announces 500 requests per 60 s",
    ),
    (events.LimitChanged, {"limit": "concurrency 12"}, "openai: the limit is now concurrency 12"),
    (
        events.StoreLost,
        {"reason": "ConnectionError"},
        "openai: the shared store cannot be reached: ConnectionError",
    ),
    (events.StoreRecovered, {"seconds": 0.5}, "openai: the shared store is back after 0.5 s"),
]


@pytest.mark.parametrize(("kind", "what", "line"), LINES)
def test_event_is_logged_as_one_readable_line(
    limiter: Limiter,
    caplog: pytest.LogCaptureFixture,
    kind: type[events.Event],
    what: dict[str, Any],
    line: str,
    say: Any,
) -> None:
    telemetry.logging(limiter)
    with caplog.at_level(logging.DEBUG, "asyncbucket"):
        say(limiter, kind, **what)

    assert [record.getMessage() for record in caplog.records] == [line]


def test_every_kind_of_event_has_a_log_line() -> None:
    kinds = {kind for kind in vars(events).values() if isinstance(kind, type)}
    kinds = {kind for kind in kinds if issubclass(kind, events.Event)} - {events.Event}

    assert {kind for kind, _, _ in LINES} == kinds


@pytest.mark.parametrize(
    ("waited", "level"), [(0.0, "DEBUG"), (1.499, "DEBUG"), (1.5, "INFO"), (60.0, "INFO")]
)
def test_wait_from_threshold_on_is_logged_at_info(
    limiter: Limiter,
    caplog: pytest.LogCaptureFixture,
    waited: float,
    level: str,
    say: Any,
    admit: Any,
) -> None:
    telemetry.logging(limiter, threshold=1.5)
    with caplog.at_level(logging.DEBUG, "asyncbucket"):
        admit(limiter, waited=waited, bound_by="tokens")
        say(limiter, events.Cancelled, cost=COST, waited=waited)
        say(limiter, events.Released, cost=COST, held=waited, outcome="ok")

    assert [record.levelname for record in caplog.records] == [level, level, "DEBUG"]


def test_log_record_carries_event_fields_by_name(
    limiter: Limiter, caplog: pytest.LogCaptureFixture, admit: Any
) -> None:
    telemetry.logging(limiter)
    with caplog.at_level(logging.DEBUG, "asyncbucket"):
        admit(limiter, waited=1.8, bound_by="tokens", waiting=3, in_flight=20)

    (record,) = caplog.records
    assert record.name == "asyncbucket.events"
    assert {key: value for key, value in vars(record).items() if key.startswith("asyncbucket")} == {
        "asyncbucket.event": "Admitted",
        "asyncbucket.limiter": "openai",
        "asyncbucket.at": 1.0,
        "asyncbucket.cost": {
            "requests": 1,
            "tokens": 900,
            "input_tokens": 600,
            "output_tokens": 300,
        },
        "asyncbucket.waited": 1.8,
        "asyncbucket.bound_by": "tokens",
        "asyncbucket.waiting": 3,
        "asyncbucket.in_flight": 20,
    }


def test_lines_go_to_logger_given_as_object_or_name(
    limiter: Limiter, caplog: pytest.LogCaptureFixture, say: Any
) -> None:
    telemetry.logging(limiter, logger=logging.getLogger("mine"))
    telemetry.logging(limiter, logger="too")
    with caplog.at_level(logging.DEBUG):
        say(limiter.child("chat"), events.Paused, seconds=1.0, reason="429")

    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("mine", "openai/chat: nobody passes for 1 s: 429"),
        ("too", "openai/chat: nobody passes for 1 s: 429"),
    ]


def test_invalid_threshold_logger_or_limiter_is_refused_at_once(limiter: Limiter) -> None:
    for threshold in (-1, float("nan"), "1", None, True):
        with pytest.raises(
            ValueError, match="threshold must be a number of seconds from 0 on, not"
        ):
            telemetry.logging(limiter, threshold=cast("float", threshold))
    for logger in (7, None, logging):
        with pytest.raises(TypeError, match="logger must be a logger or its name, not"):
            telemetry.logging(limiter, logger=cast("Any", logger))
    for watch in (telemetry.logging, telemetry.opentelemetry, telemetry.llama_index):
        with pytest.raises(TypeError, match="only a limiter can be watched, not str"):
            watch(cast("Any", "openai"))


def test_nothing_is_logged_below_the_level_or_when_switched_off(
    limiter: Limiter, caplog: pytest.LogCaptureFixture, say: Any
) -> None:
    off = telemetry.logging(limiter)
    with caplog.at_level(logging.INFO, "asyncbucket"):
        say(limiter, events.Released, cost=None, held=1.0, outcome="ok")
    off()
    with caplog.at_level(logging.DEBUG, "asyncbucket"):
        say(limiter, events.Released, cost=COST, held=1.0, outcome="ok")

    assert caplog.records == []
