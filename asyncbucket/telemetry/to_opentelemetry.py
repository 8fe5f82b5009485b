"""Events as OpenTelemetry's metrics and spans.

The names are those of ASP.NET's rate limiting, the only ones of their kind that are stable in the
semantic conventions
(https://opentelemetry.io/docs/specs/semconv/dotnet/dotnet-aspnetcore-metrics/), with the prefix
``asyncbucket``: a dashboard for one can read the other.

A wait is a span of its own, made when it is over, within the span that was current where the call
asked. It says what the call waited for and, as in the GenAI conventions
(https://github.com/open-telemetry/semantic-conventions-genai), who the provider is, and any other
attributes given. It has no ``gen_ai.operation.name`` and no ``gen_ai.usage.*``: those mark an
inference, and a sum of inferences or tokens must not include a wait.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, TracerProvider

from asyncbucket.core.events import Admitted, Cancelled, Event, Queued, Refused
from asyncbucket.core.limiter import Limiter
from asyncbucket.telemetry.metrics import ACQUIRED, CANCELED, Add, Metrics, as_given
from asyncbucket.waiting import Lock

#: Buckets in seconds: ASP.NET's, and longer ones, because waits of minutes are common here.
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
#: Names by which the GenAI conventions know a provider.
PROVIDERS: Final = frozenset({
    "anthropic", "aws.bedrock", "azure.ai.inference", "azure.ai.openai", "cohere", "deepseek",
    "gcp.gemini", "gcp.gen_ai", "gcp.vertex_ai", "groq", "ibm.watsonx.ai", "mistral_ai",
    "moonshot_ai", "openai", "perplexity", "x_ai",
})  # fmt: skip

_SCOPE: Final = "asyncbucket"
_PREFIX: Final = "asyncbucket.rate_limiting."
_POLICY: Final = _PREFIX + "policy"
_RESULT: Final = _PREFIX + "result"
_BOUND_BY: Final = _PREFIX + "bound_by"
#: When the call of this context began to wait, by the wall clock in ns; 0 if it does not wait.
_waiting_since: Final[ContextVar[int]] = ContextVar("asyncbucket waiting since", default=0)


def watch(
    limiter: Limiter,
    meter_provider: MeterProvider | None,
    tracer_provider: TracerProvider | None,
    *,
    attributes: Mapping[str, str],
    max_limiters: int,
) -> Callable[[], None]:
    """Measure ``limiter``, and trace its waits, until the returned function is called."""
    meters = metrics.get_meter_provider() if meter_provider is None else meter_provider
    with _LOCK:
        instruments = _INSTRUMENTS.get(meters)
        if instruments is None:
            instruments = _INSTRUMENTS[meters] = Instruments(meters, max_limiters)
        stop_measuring = instruments.watch(limiter, "this meter provider")
    spans = Spans(trace.get_tracer(_SCOPE, tracer_provider=tracer_provider), attributes)
    stop_tracing = limiter.observe(spans.observe)

    def off() -> None:
        stop_tracing()
        stop_measuring()

    return off


class Instruments(Metrics):
    """All instruments of one meter provider; instruments cannot be removed, only fall silent."""

    def __init__(self, provider: MeterProvider, max_limiters: int) -> None:
        super().__init__(max_limiters)
        meter = provider.get_meter(_SCOPE)

        def histogram(name: str, text: str) -> Add:
            buckets = {"explicit_bucket_boundaries_advisory": BUCKETS}
            return meter.create_histogram(_PREFIX + name, "s", text, **buckets).record

        def counter(name: str, unit: str, text: str) -> Add:
            return meter.create_counter(_PREFIX + name, unit, text).add

        waited = histogram(
            "request.time_in_queue",
            "The time a request spent in a queue waiting to acquire a lease.",
        )
        held = histogram("request_lease.duration", "The time that a lease was held by a request.")
        asked = counter(
            "requests", "{request}", "Number of requests that tried to acquire a lease."
        )
        refused = counter(
            "upstream_refusals",
            "{request}",
            "Requests that the provider refused for rate all the same.",
        )
        retries = counter("retries", "{request}", "Requests that are tried again.")
        tokens = counter(
            "tokens",
            "{token}",
            "Tokens reserved by admissions; used and refunded, as they were settled.",
        )
        #: What records or adds a measurement, and its attributes besides the policy.
        self._records: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
            "waited": (waited, (_RESULT, _BOUND_BY)),
            "held": (held, (_PREFIX + "outcome",)),
            "asked": (asked, (_RESULT,)),
            "upstream_429": (refused, ()),
            "retries": (retries, ()),
            "tokens": (tokens, (_PREFIX + "kind",)),
        }
        meter.create_observable_up_down_counter(
            _PREFIX + "queued_requests",
            [self._observe_queued],
            "{request}",
            "Number of requests that are currently queued.",
        )
        meter.create_observable_up_down_counter(
            _PREFIX + "active_request_leases",
            [self._observe_active],
            "{request}",
            "Number of requests that currently hold a lease.",
        )
        meter.create_observable_gauge(
            _PREFIX + "limit.utilization",
            [self._observe_used],
            "1",
            "Share of a limit that is used now, 1 for all of it.",
        )

    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add | None:
        if metric not in self._records:
            return None
        add, names = self._records[metric]
        attributes = {_POLICY: label, **dict(zip(names, values, strict=True))}
        return lambda amount: add(amount, attributes)

    def _observe_queued(self, _: CallbackOptions) -> Iterable[Observation]:
        for label, load in self.loads().items():
            yield Observation(load.queued, {_POLICY: label})

    def _observe_active(self, _: CallbackOptions) -> Iterable[Observation]:
        for label, load in self.loads().items():
            yield Observation(load.in_flight, {_POLICY: label})

    def _observe_used(self, _: CallbackOptions) -> Iterator[Observation]:
        for label, load in self.loads().items():
            for limit, share in load.used.items():
                yield Observation(share, {_POLICY: label, _PREFIX + "limit": limit})


class Spans:
    """Make a span of each wait; a call that passes at once has none."""

    def __init__(self, tracer: Tracer, attributes: Mapping[str, str]) -> None:
        self._tracer = tracer
        self._attributes = attributes

    def observe(self, event: Event) -> None:
        """Remember when a wait begins, and make its span when it ends."""
        since = _waiting_since.get()
        if isinstance(event, Queued | Admitted | Refused | Cancelled):
            _waiting_since.set(time.time_ns() if isinstance(event, Queued) else 0)
        match event:
            case Admitted(waited=waited, bound_by=bound_by) if waited > 0:
                extra: dict[str, Any] = {_PREFIX + "queued_requests": event.waiting}
                self._span(event, ACQUIRED, bound_by, waited, extra)
            case Refused(reason=reason, bound_by=bound_by) if since:  # at once is no wait
                waited = (time.time_ns() - since) * 1e-9
                self._span(event, reason, bound_by, waited, {"error.type": reason})
            case Cancelled(waited=waited):
                self._span(event, CANCELED, None, waited, {})
            case _:
                pass

    def _span(
        self,
        event: Admitted | Refused | Cancelled,
        result: str,
        bound_by: str | None,
        waited: float,
        extra: Mapping[str, Any],
    ) -> None:
        now = time.time_ns()
        provider = event.limiter.partition("/")[0]
        provider_attributes = {"gen_ai.provider.name": provider} if provider in PROVIDERS else {}
        bound = {} if bound_by is None else {_BOUND_BY: bound_by}
        cost = {f"{_PREFIX}cost.{name}": amount for name, amount in as_given(event.cost).items()}
        wait_attributes = {_POLICY: event.limiter, _RESULT: result, **bound, **cost, **extra}
        span = self._tracer.start_span(
            f"wait {event.limiter}",
            kind=SpanKind.INTERNAL,
            start_time=now - round(waited * 1e9),
            attributes={**provider_attributes, **self._attributes, **wait_attributes},
        )
        if "error.type" in extra:
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)


#: A meter provider's instruments, made once: callbacks of a second set would never be called.
_INSTRUMENTS: Final["weakref.WeakKeyDictionary[MeterProvider, Instruments]"] = (
    weakref.WeakKeyDictionary()
)
_LOCK: Final = Lock()
