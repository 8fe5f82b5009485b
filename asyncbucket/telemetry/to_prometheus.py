"""Metrics for Prometheus: plain counters, a histogram, and gauges that are read at each scrape.

Gauges are read when somebody scrapes, because the use of a limit changes even if nothing happens.
"""

from collections.abc import Callable, Iterator
from typing import Final, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from asyncbucket.core import events
from asyncbucket.core.limiter import Limiter
from asyncbucket.telemetry.metrics import ACQUIRED, Add, Metrics

#: Waits may be as short as a burst's pace or as long as a minute's window plus a pause.
BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
#: An agent takes seconds or hours.
AGENT_BUCKETS: Final = (1, 5, 10, 30, 60, 120, 300, 600, 1_200, 1_800, 3_600, 7_200)
#: What is 0 from the first scrape of a limiter on, so that a rate sees the first refusal.
_ZEROS: Final = (
    *(("ended", (how,)) for how in (*get_args(events.Outcome), *get_args(events.Reason))),
    ("ended", ("cancelled",)),
    *(("tokens", (kind,)) for kind in ("reserved", "used", "refunded")),
    *((metric, ()) for metric in ("spent_usd", "upstream_429", "retries")),
)


def prometheus(limiter: Limiter, *, registry: CollectorRegistry = REGISTRY) -> Callable[[], None]:
    """Count into Prometheus metrics, which a scrape of ``registry`` shows.

    Any number of limiters may share a registry; those of one name share their numbers. A limiter's
    numbers include those of the limiters below it, as in its statistics. When it is switched off,
    its gauges disappear, and its counters stay where they are. In prometheus_client's multiprocess
    mode the gauges are missing: what waits now is known to its own process alone.

    Each child has labels of its own. Use `Limiter.key` for users or tenants: they share one.

    Args:
        limiter: the limiter to observe.
        registry: what to register with; by default prometheus_client's own ``REGISTRY``.

    Raises:
        ImportError: prometheus_client is not installed; the message names the extra.
        ValueError: this registry already observes the limiter, or one above or below it, so its
            calls would count twice.
    """
    return PrometheusMetrics.of(registry).watch(limiter)


class PrometheusMetrics(Metrics, Collector):
    """All metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        registry.register(self)  # first: a limiter that is seen by a scrape begins at 0 in it

        def counter(name: str, text: str, *labels: str) -> Counter:
            labels = ("limiter", *labels)
            return Counter(f"asyncbucket_{name}_total", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
            labels = ("limiter", *labels)
            return Histogram(
                f"asyncbucket_{name}_seconds", text, labels, registry=registry, buckets=buckets
            )

        waits = "Seconds between asking and admission, by what bound the call."
        agents = "Seconds from an agent's first call to its end, by kind of agent."
        self._wait = histogram("wait", waits, "bound_by", buckets=BUCKETS)
        self._agents = histogram("agent", agents, "kind", "outcome", buckets=AGENT_BUCKETS)
        self._counters = {
            "ended": counter("requests", "Calls by how they ended.", "outcome"),
            "tokens": counter("tokens", "Tokens reserved, used, and refunded by settling.", "kind"),
            "spent_usd": counter("spent_usd", "US dollars that calls have cost."),
            "upstream_429": counter("upstream_429", "Calls that the provider refused for rate."),
            "retries": counter("retries", "Failed calls that are tried again."),
        }

    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add:
        if metric == "waited" and values[0] == ACQUIRED:
            return self._wait.labels(label, values[1]).observe
        if metric == "agents":
            return self._agents.labels(label, *values).observe
        counter = self._counters.get(metric)
        return _ignore if counter is None else counter.labels(label, *values).inc

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"asyncbucket_{name}", text, labels=["limiter", *labels])

        queued = gauge("queued_requests", "Calls that wait for their admission now.")
        in_flight = gauge("in_flight_requests", "Calls admitted and not yet over.")
        agents = gauge("running_agents", "Agents that call the limiter itself and are not over.")
        used = gauge("limit_used_ratio", "Share of a limit in use, 1 for all of it.", "limit")
        for label, load in self.loads().items():
            for metric, values in _ZEROS:
                self.adder(metric, label, values)
            queued.add_metric([label], load.queued)
            in_flight.add_metric([label], load.in_flight)
            agents.add_metric([label], load.agents)
            for limit, share in load.used.items():
                used.add_metric([label, limit], share)
        yield from (queued, in_flight, agents, used)

    def describe(self) -> Iterator[Metric]:
        """Give the names, by which a registry refuses others like them and selects what is asked."""
        return self.collect()


def _ignore(_: float) -> None:
    """Add to what Prometheus does not show."""
