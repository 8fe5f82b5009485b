import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from asyncbucket import Limit, TokenBucket, events, telemetry
from asyncbucket.telemetry import to_prometheus

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.telemetry.conftest import ScriptedLimiter

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}
#: Every metric, and its labels.
METRICS = {
    "asyncbucket_wait_seconds": {"limiter", "bound_by"},
    "asyncbucket_requests": {"limiter", "outcome"},
    "asyncbucket_tokens": {"limiter", "kind"},
    "asyncbucket_queued_requests": {"limiter"},
    "asyncbucket_in_flight_requests": {"limiter"},
    "asyncbucket_limit_used_ratio": {"limiter", "limit"},
    "asyncbucket_upstream_429": {"limiter"},
    "asyncbucket_retries": {"limiter"},
}


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Return what Prometheus reads: samples by name and label values, without creation times."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "le")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


def admit(limiter: "ScriptedLimiter", **what: Any) -> None:
    """Emit the event of an admitted call."""
    usual = {"cost": COST, "waited": 0.0, "bound_by": None, "waiting": 0, "in_flight": 1}
    limiter.say(events.Admitted, **{**usual, **what})


@pytest.fixture
def registry() -> CollectorRegistry:
    """Return a registry for this test only."""
    return CollectorRegistry()


def test_metric_names_and_labels_are_exactly_as_expected(
    limiter: "ScriptedLimiter", registry: CollectorRegistry
) -> None:
    telemetry.prometheus(limiter, registry=registry)
    limiter.numbers["concurrency"] = 5
    admit(limiter)
    limiter.say(events.Settled, reserved=COST, used={"tokens": 1})
    limiter.say(events.Released, cost=COST, held=1.0, outcome="ok")
    limiter.say(events.Paused, seconds=1.0, reason="429")
    limiter.say(events.Retried, attempt=1, error="HTTP 429", delay=1.0)

    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    labels = {
        family.name: {label for sample in family.samples for label in sample.labels} - {"le"}
        for family in families
        if not family.name.endswith("_created")
    }
    assert labels == METRICS
    assert all(family.documentation for family in families)
    assert {metric.name for metric in to_prometheus.PrometheusMetrics(1).describe()} == set(METRICS)


def test_wait_is_counted_by_binding_limit(
    limiter: "ScriptedLimiter", registry: CollectorRegistry
) -> None:
    telemetry.prometheus(limiter, registry=registry)
    admit(limiter, waited=1.5, bound_by="tokens")
    admit(limiter, waited=2.5, bound_by="tokens")
    admit(limiter)

    seen = scrape(registry)
    assert seen["asyncbucket_wait_seconds_count", "tokens", "openai"] == 2
    assert seen["asyncbucket_wait_seconds_sum", "tokens", "openai"] == 4.0
    assert seen["asyncbucket_wait_seconds_count", "none", "openai"] == 1


def test_call_is_counted_once_by_outcome(
    limiter: "ScriptedLimiter", registry: CollectorRegistry
) -> None:
    telemetry.prometheus(limiter, registry=registry)
    admit(limiter)
    for outcome in ("ok", "ok", "overloaded", "failed"):
        limiter.say(events.Released, cost=COST, held=1.0, outcome=outcome)
    for reason in ("would_block", "timeout", "queue_full", "too_costly"):
        limiter.say(events.Refused, cost=COST, reason=reason, bound_by=None, retry_after=None)
    limiter.say(events.Cancelled, cost=COST, waited=1.0)

    seen = scrape(registry)
    assert {
        key[2]: value for key, value in seen.items() if key[0] == "asyncbucket_requests_total"
    } == {
        "ok": 2,
        "overloaded": 1,
        "failed": 1,
        "would_block": 1,
        "timeout": 1,
        "queue_full": 1,
        "too_costly": 1,
        "cancelled": 1,
    }


def test_counters_begin_at_zero(limiter: "ScriptedLimiter", registry: CollectorRegistry) -> None:
    telemetry.prometheus(limiter, registry=registry)
    limiter.child("chat").say(events.Paused, seconds=1.0, reason="lunch")  # counts as no 429

    seen = scrape(registry)
    assert seen["asyncbucket_upstream_429_total", "openai"] == 0
    assert seen["asyncbucket_retries_total", "openai/chat"] == 0
    assert seen["asyncbucket_requests_total", "openai", "too_costly"] == 0
    assert seen["asyncbucket_tokens_total", "used", "openai/chat"] == 0


def test_tokens_are_counted_as_reserved_used_and_refunded(
    limiter: "ScriptedLimiter", registry: CollectorRegistry
) -> None:
    telemetry.prometheus(limiter, registry=registry)
    admit(limiter)
    admit(limiter, cost={"requests": 1})
    limiter.say(events.Settled, reserved=COST, used={"tokens": 700})
    limiter.say(events.Settled, reserved=COST, used={"tokens": 750}, corrects={"tokens": 700})
    limiter.say(events.Settled, reserved=COST, used={"tokens": 720}, corrects={"tokens": 750})
    limiter.say(events.Settled, reserved=COST, used={"requests": 2})

    seen = scrape(registry)
    assert seen["asyncbucket_tokens_total", "reserved", "openai"] == 900
    assert seen["asyncbucket_tokens_total", "used", "openai"] == 750  # a counter never falls
    assert seen["asyncbucket_tokens_total", "refunded", "openai"] == 200 + 30


def test_gauges_are_read_at_scrape_time(
    limiter: "ScriptedLimiter", registry: CollectorRegistry
) -> None:
    telemetry.prometheus(limiter, registry=registry)
    limiter.numbers.update(waiting=7, in_flight=3, concurrency=4)
    limiter.used = [
        (Limit.parse("500 RPM"), 125),
        (Limit.parse("200k TPM"), 220_000),
        (Limit.parse("3 images/10s"), 3),
    ]
    seen = scrape(registry)
    assert seen["asyncbucket_queued_requests", "openai"] == 7
    assert seen["asyncbucket_in_flight_requests", "openai"] == 3
    assert {key[1]: value for key, value in seen.items() if key[0].endswith("_ratio")} == {
        "rpm": 0.25,
        "tpm": 1.1,
        "images/10s": 1.0,
        "concurrency": 0.75,
    }

    limiter.numbers.update(waiting=0)
    assert scrape(registry)["asyncbucket_queued_requests", "openai"] == 0


def test_numbers_of_a_limiter_include_those_below_it(
    limiter: "ScriptedLimiter", registry: CollectorRegistry
) -> None:
    chat = limiter.child("chat")
    fast = chat.child("fast")
    telemetry.prometheus(limiter, registry=registry)
    limiter.numbers.update(waiting=10, in_flight=6, concurrency=8)
    chat.numbers.update(waiting=4, in_flight=3)
    for each in (limiter, chat, fast, fast):
        admit(each)

    seen = scrape(registry)
    gauges = ("asyncbucket_queued_requests", "asyncbucket_in_flight_requests")
    assert [seen[gauge, "openai"] for gauge in gauges] == [10, 6]
    assert [seen[gauge, "openai/chat"] for gauge in gauges] == [4, 3]
    assert seen["asyncbucket_limit_used_ratio", "concurrency", "openai"] == 0.75
    names = ("openai", "openai/chat", "openai/chat/fast")
    counts = [seen["asyncbucket_wait_seconds_count", "none", name] for name in names]
    assert counts == [4, 3, 2]


def test_limiter_watched_below_the_root_counts_for_itself_alone(
    limiter: "ScriptedLimiter", registry: CollectorRegistry
) -> None:
    chat = limiter.child("chat")
    telemetry.prometheus(chat, registry=registry)
    admit(chat)
    admit(limiter)

    seen = scrape(registry)
    assert {key[-1] for key in seen if key[0] == "asyncbucket_wait_seconds_count"} == {
        "openai/chat"
    }
    assert seen["asyncbucket_wait_seconds_count", "none", "openai/chat"] == 1


def test_limiters_beyond_max_limiters_are_not_told_apart(
    make_limiter: "Callable[[str], ScriptedLimiter]", registry: CollectorRegistry
) -> None:
    """Whoever names a limiter after each user has no more labels; no call is lost or counted twice."""
    limiter = make_limiter("openai")
    telemetry.prometheus(limiter, registry=registry, max_limiters=3)
    for number in range(1_000):
        admit(limiter.child(f"user-{number}"))
    for name in ("one", "two"):
        another = make_limiter(name)
        another.numbers["waiting"] = 2
        telemetry.prometheus(another, registry=registry)
        admit(another)

    seen = scrape(registry)
    counted = {key[-1]: seen[key] for key in seen if key[0] == "asyncbucket_wait_seconds_count"}
    assert counted == {"openai": 1_000, "openai/user-0": 1, "openai/user-1": 1, "other": 2}
    assert seen["asyncbucket_queued_requests", "other"] == 4
    assert len(seen) < 100


def test_limiters_share_registry_until_the_last_is_switched_off(
    make_limiter: "Callable[[str], ScriptedLimiter]", registry: CollectorRegistry
) -> None:
    one, two = make_limiter("openai"), make_limiter("anthropic")
    one.numbers["waiting"] = 1
    off_one = telemetry.prometheus(one, registry=registry)
    off_two = telemetry.prometheus(two, registry=registry)
    admit(one)
    admit(two)
    assert scrape(registry)["asyncbucket_wait_seconds_count", "none", "anthropic"] == 1

    off_one()
    off_one()
    admit(one)
    seen = scrape(registry)
    assert seen["asyncbucket_wait_seconds_count", "none", "openai"] == 1
    assert seen["asyncbucket_queued_requests", "openai"] == 0

    off_two()
    assert scrape(registry) == {}
    assert not one.observers
    assert not two.observers

    off_one()  # this one ended long ago: it takes nothing from a later watch
    telemetry.prometheus(one, registry=registry)
    off_two()
    assert scrape(registry)["asyncbucket_queued_requests", "openai"] == 1


@pytest.mark.parametrize(("first", "then"), [("root", "root"), ("root", "leaf"), ("leaf", "root")])
def test_watching_one_tree_twice_in_a_registry_is_refused(
    limiter: "ScriptedLimiter", registry: CollectorRegistry, first: str, then: str
) -> None:
    tree = {"root": limiter, "leaf": limiter.child("chat").child("fast")}
    off = telemetry.prometheus(tree[first], registry=registry)
    tree["leaf"].say(events.Paused, seconds=1.0, reason="lunch")

    with pytest.raises(ValueError, match="would count twice") as caught:
        telemetry.prometheus(tree[then], registry=registry)
    assert str(caught.value) == (
        f"this registry watches limiter {tree[first].name!r} already, and the calls of "
        f"{tree[then].name!r} would count twice; switch that off first"
    )

    off()
    telemetry.prometheus(tree[then], registry=registry)
    telemetry.prometheus(tree[first], registry=CollectorRegistry())
    admit(tree["leaf"])
    assert scrape(registry)["asyncbucket_wait_seconds_count", "none", "openai/chat/fast"] == 1
    root = scrape(registry).get(("asyncbucket_wait_seconds_count", "none", "openai"))
    assert root == (None if then == "leaf" else 1)


def test_invalid_watch_is_refused_and_leaves_registry_unchanged(
    limiter: "ScriptedLimiter", registry: CollectorRegistry
) -> None:
    for strange in (None, "openai", [limiter], TokenBucket(rate=1, burst=1)):
        with pytest.raises(
            TypeError, match=f"only a limiter can be watched, not {type(strange).__name__}"
        ):
            telemetry.prometheus(cast("Any", strange), registry=registry)
    for most in (0, -1, 1.5, "many", True):
        with pytest.raises(ValueError, match="max_limiters must be a whole number of at least 1"):
            telemetry.prometheus(limiter, registry=registry, max_limiters=cast("int", most))
    with pytest.raises(TypeError, match="prometheus_client's CollectorRegistry, not object"):
        telemetry.prometheus(limiter, registry=cast("Any", object()))
    assert generate_latest(registry) == b""
    telemetry.prometheus(limiter, registry=registry)()


def test_default_registry_is_that_of_prometheus_client(limiter: "ScriptedLimiter") -> None:
    off = telemetry.prometheus(limiter)
    assert b"asyncbucket_queued_requests" in generate_latest(REGISTRY)
    off()
    assert b"asyncbucket_" not in generate_latest(REGISTRY)


def test_missing_library_error_names_its_extra(
    limiter: "ScriptedLimiter", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "asyncbucket.telemetry.to_prometheus")
    with pytest.raises(ImportError) as caught:
        telemetry.prometheus(limiter)
    assert str(caught.value) == (
        'Prometheus metrics need prometheus_client: pip install "asyncbucket[prometheus]"'
    )


WORKER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from conftest import COST, ScriptedLimiter
from asyncbucket import Limit, Limiter, TokenBucket, events, telemetry
from asyncbucket.telemetry import to_prometheus

to_prometheus._WRITE_INTERVAL = 0.01
limiter = ScriptedLimiter("openai")
limiter.numbers.update(waiting=0, in_flight=0)
off = telemetry.prometheus(limiter)  # before the fork, as a server that preloads its application

def work(number):
    limiter.numbers.update(waiting=number, in_flight=1)
    limiter.used = [(Limit.parse("100 RPM"), 10 * number)]
    for _ in range(number):
        limiter.say(events.Admitted, cost=COST, waited=1.0, bound_by="tokens", waiting=0, in_flight=1)
        limiter.say(events.Released, cost=COST, held=1.0, outcome="ok")

children = []
ready, done = os.pipe(), os.pipe()
for number in (1, 2, 3):
    pid = os.fork()
    if pid == 0:
        work(number)
        time.sleep(0.2)  # the thread that writes the gauges runs in the child, too
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    children.append(pid)
for _ in children:
    os.read(ready[0], 1)

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
print("#####")
for pid in children:
    os.write(done[1], b"x")
for pid in children:
    os.waitpid(pid, 0)
    mark_process_dead(pid)
print(generate_latest(registry).decode())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_metrics_of_forked_workers_are_added_up(tmp_path: Path) -> None:
    """Counters of all processes are added up; gauges are those of the living ones.

    The processes are real, as only these have files of their own; they signal when they are ready.
    """
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    alive, dead = (
        {
            (sample.name, *(v for key, v in sorted(sample.labels.items()) if key != "le")): (
                sample.value
            )
            for family in text_string_to_metric_families(text.strip() + "\n")
            for sample in family.samples
        }
        for text in done.stdout.split("#####")
    )
    for seen in (alive, dead):
        assert seen["asyncbucket_requests_total", "openai", "ok"] == 6
        assert seen["asyncbucket_wait_seconds_count", "tokens", "openai"] == 6
        assert seen["asyncbucket_tokens_total", "reserved", "openai"] == 6 * 900
    assert alive["asyncbucket_queued_requests", "openai"] == 6
    assert alive["asyncbucket_in_flight_requests", "openai"] == 3
    assert alive["asyncbucket_limit_used_ratio", "rpm", "openai"] == 0.3
    assert dead["asyncbucket_queued_requests", "openai"] == 0


FORKER = """
import os, sys, threading, time
sys.path.insert(0, sys.argv[1])
from conftest import ScriptedLimiter
from asyncbucket import telemetry
from asyncbucket.telemetry import to_prometheus

to_prometheus._WRITE_INTERVAL = 0.01
lock, writing = threading.Lock(), threading.Event()

class Slow:
    def set(self, value):
        with lock:
            writing.set()
            time.sleep(0.2)

to_prometheus.Gauge.labels = lambda self, *labels: Slow()
limiter = ScriptedLimiter("openai")
off = telemetry.prometheus(limiter)
writing.wait()
pid = os.fork()
if pid == 0:
    os._exit(not lock.acquire(timeout=5))
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_waits_until_gauges_are_written(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FORKER, str(Path(__file__).parent)]
    subprocess.run(command, check=True, env=environment)


def test_gauge_thread_ends_when_watch_is_switched_off(
    limiter: "ScriptedLimiter", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/unused")
    monkeypatch.setattr(to_prometheus, "_WRITE_INTERVAL", 0.001)
    registry = CollectorRegistry()
    off = telemetry.prometheus(limiter, registry=registry)
    limiter.numbers.update(waiting=4)
    limiter.used = [(Limit.parse("100 RPM"), 10)]
    assert scrape(registry)["asyncbucket_queued_requests", "openai"] == 4
    threads = [each for each in threading.enumerate() if each.name == "asyncbucket gauges"]
    assert len(threads) == 1

    metrics = to_prometheus._COLLECTORS[registry]
    off()
    threads[0].join(timeout=10)
    assert not threads[0].is_alive()
    last = {sample.name: sample.value for metric in metrics.collect() for sample in metric.samples}
    assert last["asyncbucket_queued_requests"] == 0
    assert last["asyncbucket_limit_used_ratio"] == 0
