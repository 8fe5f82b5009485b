"""How one model is paced, and one call of it: admitted, held, retried, settled.

The guard against paying twice is `asyncbucket.nesting`, which the models share with the transports
beneath them. Here its note also carries the usage, which is looked for once a call: in what the SDK
received, or else in the replies of methods called inside, or else in the reply. A method that calls
others several times makes that many requests; calls within those are part of them. (A stream that
is read inside a call is not counted, unless the SDK reports its request.) The note also knows the
SDK's stream, to close the request: that stream is part of a reference cycle, so closing the model's
stream, which only drops it, leaves the provider at work until the garbage collector runs.
"""

import functools
import inspect
import operator
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeAlias

from asyncbucket.core.context import inherited, put_back
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import effective_limiter, in_force, is_under, provider_of
from asyncbucket.core.limiter import Limiter
from asyncbucket.llama_index.estimate import DefaultEstimator, Estimate, Estimator
from asyncbucket.llama_index.events import admit
from asyncbucket.nesting import HeldLease, held_leases, holding
from asyncbucket.providers.errors import end_failed, never_sent
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.usage import Usage, usage_of
from asyncbucket.retry import Retrier, Retry, Sent
from asyncbucket.waiting import ASYNC, IO

#: Finds the usage in a reply.
Reader: TypeAlias = Callable[[Any], Usage | None]


def usage_in(reply: Any) -> Usage | None:
    """Return the usage in one of LlamaIndex's replies, if there is any."""
    if getattr(reply, "raw", None) is None and not getattr(reply, "additional_kwargs", None):
        return None
    return usage_of(reply)


def no_usage(_: object) -> None:
    """Return None: what such a reply says comes from the model, not from the provider."""


@dataclass(slots=True)
class Call:
    """One call of a model."""

    io: IO
    #: Sends it: the model's own method with its arguments.
    send: Callable[..., Any]
    estimate: Callable[[], Estimate]
    #: Finds the usage in a reply, or in a part of one.
    read: Reader
    #: What it is sent with besides, if the provider takes it.
    options: Mapping[str, Any]
    sent: Sent = field(default_factory=Sent)


class HeldCall(HeldLease):
    """Note that a model's call runs in this context under a lease of ``limiter``."""

    __slots__ = ("_methods", "_stream", "hides_usage", "reports_requests", "usages")

    def __init__(self, limiter: Limiter, lease: Lease, header_reader: HeaderReader) -> None:
        super().__init__(limiter, lease, header_reader)
        self._methods = 0
        #: What each of the SDK's replies said was used, or each of the methods' called inside.
        self.usages: list[Usage | None] = []
        # A weak reference, because a pooled connection keeps this note for good.
        self._stream: weakref.ref[Any] | None = None
        #: Whether it sends its requests by a client that reports them.
        self.reports_requests = False
        #: Whether a stream was asked for its usage by us, not by the user.
        self.hides_usage = False

    async def call_inside(self, call: Call) -> Any:
        """Call a method inside: each but the first adds a request, and those in it none."""
        if _INSIDE.get() is self:
            return await call.io.call(call.send)
        self._methods += 1
        self.pay_for(self._methods)
        token = _INSIDE.set(self)
        try:
            reply = await call.io.call(call.send)
        finally:
            put_back(_INSIDE, token)
        if not self.requests:  # otherwise the SDK's replies say it
            self.usages.append(call.read(reply))
        return reply

    def actual_usage(self, find: Callable[[], Usage | None]) -> Usage | None:
        """Return what the call used, as was noted or as ``find`` says.

        What the provider's limits do not count is left out.
        """
        known = [usage for usage in self.usages if usage is not None]
        usage = functools.reduce(operator.add, known) if known else find()
        if usage is None or self.profile is None:
            return usage
        return self.profile.counted(usage)

    def failed(self, lease: Lease, error: BaseException) -> None:
        """End the call's lease; a call that is known to have sent nothing costs nothing."""
        if self.requests:
            # The SDK's own error says only that there was no connection; its cause says why.
            only = self.requests == 1 and self._sent_at is None
            unsent = only and never_sent(error.__cause__)
        else:
            unsent = self.reports_requests
        end_failed(lease, error, unsent=unsent)

    @property
    def is_streaming(self) -> bool:
        """Whether the SDK's own stream was seen, whose usage is added as it passes."""
        return self._stream is not None

    def note_stream(self, stream: object) -> None:
        """Note the SDK's own stream that this call reads."""
        self._stream = weakref.ref(stream)

    async def close_stream(self, io: IO) -> None:
        """Close the SDK's stream, and with it the request. Idempotent."""
        stream = None if self._stream is None else self._stream()
        closing = None if stream is None else stream.close()
        if io is ASYNC and inspect.isawaitable(closing):  # not so if the model reads it in a thread
            await closing


#: The call of which a method inside runs in this context.
_INSIDE: Final[ContextVar[HeldCall | None]] = ContextVar("asyncbucket inside", default=None)


def held_call(limiter: Limiter) -> HeldCall | None:
    """Return the note of a lease in this context that counts at ``limiter``, or None."""
    for held, _ in held_leases():
        if isinstance(held, HeldCall) and is_under(held.limiter, limiter):
            return held
    return None


class Terms:
    """How one model or tool is paced; its copies share it."""

    __slots__ = ("limiter", "options")

    def __init__(self, limiter: Limiter, **options: Any) -> None:
        if not isinstance(limiter, Limiter):
            raise TypeError(f"limiter= takes a Limiter, not {limiter!r}")
        self.limiter = limiter
        #: The options as given, to pace a copy alike.
        self.options = options

    def copy_for(self, limiter: Limiter, options: Mapping[str, Any]) -> Self:
        """Return the same for ``limiter`` with the same options, except those given."""
        return type(self)(limiter, **{**self.options, **options})

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return this object: a copy of a model or tool spends from the same budget."""
        return self


class Pacing(Terms):
    """Pace the calls of one model."""

    __slots__ = ("asks_for_usage", "estimator", "header_reader", "retrier")

    def __init__(
        self,
        limiter: Limiter,
        *,
        retry: Retry | int | None = None,
        estimator: Estimator | None = None,
    ) -> None:
        super().__init__(limiter, retry=retry, estimator=estimator)
        methods = ("chat", "completion", "embedding")
        if isinstance(estimator, type) or not (
            estimator is None or any(hasattr(estimator, name) for name in methods)
        ):
            raise TypeError(
                f"an estimator must have chat(), completion() or embedding(), whichever are asked, and "
                f"{estimator!r} has none"
            )
        self.estimator = DefaultEstimator() if estimator is None else estimator
        # A refusal concerns all who share the provider's limits.
        self.retrier = Retrier(Retry.of(retry), provider_of(limiter), caller=limiter)
        #: What reads the headers of replies, if the HTTP client passes them on.
        self.header_reader = HeaderReader(limiter)
        #: Whether streams ask the provider for the usage; off for good once it refuses.
        self.asks_for_usage = True

    def copy_for(self, limiter: Limiter, options: Mapping[str, Any]) -> Self:
        """Return the same for ``limiter`` with the same options, except those given."""
        new = super().copy_for(limiter, options)
        if new.options["estimator"] is None:
            new.estimator = self.estimator  # it has learned from the replies so far
        return new

    async def call(self, call: Call) -> Any:
        """Return the reply, paced and retried; inside a paced call, without pacing."""
        held = held_call(self.limiter)
        if held is not None:
            return await held.call_inside(call)
        return await self.retry(call, functools.partial(self._attempt, call, call.estimate()))

    async def retry(self, call: Call, attempt: Callable[[], Any]) -> Any:
        """Return what ``attempt()`` returns, one attempt at ``call``, after as many as it takes."""
        terms = inherited.get()
        left = None if terms is None else terms.seconds_left()
        return await self.retrier.call(
            attempt,
            io=call.io,
            deadline=None if left is None else self.limiter.now() + left,
            tried=call.send,
            sent=call.sent,
        )

    async def _attempt(self, call: Call, estimate: Estimate) -> Any:
        lease, held = await self.admit(call, estimate)
        try:
            with holding(held):
                reply = await call.io.call(call.send)
            self.settle(lease, held.actual_usage(functools.partial(call.read, reply)))
        except BaseException as error:
            held.failed(lease, error)
            raise
        lease.release()
        return reply

    async def admit(self, call: Call, estimate: Estimate) -> tuple[Lease, HeldCall]:
        """Wait for the admission of a call that costs ``estimate``; note when it leaves."""
        lease = await admit(call.io, self.limiter, self._amounts(estimate))
        call.sent.at = self.limiter.now()
        return lease, HeldCall(self.limiter, lease, self.header_reader)

    def _amounts(self, estimate: Estimate) -> dict[str, float]:
        """Return the tokens to reserve; a guess of the output must not make a call impossible."""
        if not isinstance(estimate, Estimate):
            raise TypeError(f"{self.estimator!r} returned {estimate!r}; it must return an Estimate")
        output = estimate.output_tokens
        for limit in in_force(effective_limiter(self.limiter)) if estimate.foreseen else ():
            if limit.resource == "output_tokens":
                output = min(output, limit.amount)
            elif limit.resource == "tokens":
                output = min(output, limit.amount - estimate.input_tokens)
        return {"input_tokens": estimate.input_tokens, "output_tokens": max(0, output)}

    def settle(self, lease: Lease, usage: Usage | None) -> None:
        """Correct the reservation to what a whole reply used, if that is known."""
        if usage is not None:
            lease.settle(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
            observe = getattr(self.estimator, "observe", None)
            if usage.output_tokens and observe is not None:  # embeddings teach nothing
                observe(usage.output_tokens)
