import logging
from typing import Any

import pytest

from asyncbucket import Limiter, events, telemetry

TOTAL = {"requests": 1, "tokens": 900, "input_tokens": 900, "output_tokens": 900}
ADMITTED = {"waited": 1.8341, "bound_by": "tokens", "waiting": 3, "in_flight": 20}


@pytest.mark.parametrize(
    ("kind", "what", "line"),
    [
        (
            events.Admitted,
            {"cost": TOTAL, **ADMITTED},
            "Admitted requests=1 tokens=900 waited=1.834 bound_by='tokens' waiting=3 in_flight=20",
        ),
        (
            events.Refused,
            {"reason": "queue_full", "bound_by": None, "retry_after": None},
            "Refused requests=1 tokens=900 input_tokens=600 output_tokens=300 reason='queue_full'",
        ),
        (events.Paused, {"seconds": 2.0, "reason": "a\nb"}, r"Paused seconds=2.0 reason='a\nb'"),
    ],
)
def test_event_is_logged_as_one_line_of_its_fields_which_the_record_carries_too(
    limiter: Limiter, caplog: pytest.LogCaptureFixture, kind: Any, what: Any, line: str, say: Any
) -> None:
    telemetry.logging(limiter)
    with caplog.at_level(logging.DEBUG, "asyncbucket"):
        say(limiter, kind, **what)
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("asyncbucket.events", f"openai: {line}")
    fields = what | {"event": kind.__name__, "limiter": "openai", "at": 1.0}
    if "cost" in what:
        fields["cost"] = {"requests": 1, "tokens": 900}
    assert vars(record).items() >= {f"asyncbucket.{name}": fields[name] for name in fields}.items()


def test_waits_from_threshold_on_are_logged_at_info(
    limiter: Limiter, caplog: pytest.LogCaptureFixture, say: Any, admit: Any
) -> None:
    telemetry.logging(limiter, threshold=1.5)
    with caplog.at_level(logging.DEBUG, "asyncbucket"):
        for waited in (1.499, 1.5):
            admit(limiter, waited=waited)
            say(limiter, events.Cancelled, waited=waited)
        say(limiter, events.Released, held=9.0, outcome="ok")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["DEBUG", "DEBUG", "INFO", "INFO", "DEBUG"]


def test_lines_go_to_given_logger_until_switched_off(
    limiter: Limiter, caplog: pytest.LogCaptureFixture, say: Any
) -> None:
    telemetry.logging(limiter, logger=logging.getLogger("mine"))
    off = telemetry.logging(limiter, logger="too")
    with caplog.at_level(logging.INFO):
        say(limiter, events.Paused, seconds=1.0, reason="below the level")
    with caplog.at_level(logging.DEBUG):
        say(limiter.child("chat"), events.Paused, seconds=1.0, reason="429")
        off()
        say(limiter, events.StoreRecovered, seconds=1.0)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("mine", "openai/chat: Paused seconds=1.0 reason='429'"),
        ("too", "openai/chat: Paused seconds=1.0 reason='429'"),
        ("mine", "openai: StoreRecovered seconds=1.0"),
    ]
