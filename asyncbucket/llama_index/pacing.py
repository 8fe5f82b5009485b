"""How one model is paced, and one call of it: admitted, held, retried, settled.

The guard against paying twice is `asyncbucket.nesting`, which the models share with the transports
beneath them. Here its note also carries the usage, which is looked for once a call: in what the SDK
received, or else in the reply, or else in the replies of methods called inside (something may have
been made of those). A method that calls others several times makes that many requests; calls within
those are part of them. The note also knows the SDK's stream, to close the request: that stream is
part of a reference cycle, so closing the model's stream, which only drops it, leaves the provider
at work until the garbage collector runs.
"""

import contextlib
import functools
import inspect
import operator
import weakref
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeAlias

from asyncbucket.core.context import inherited, put_back
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import effective_limiter, in_force, is_under, provider_of
from asyncbucket.core.limiter import Limiter
from asyncbucket.llama_index.estimate import DefaultEstimator, Estimate, Estimator
from asyncbucket.llama_index.events import admit
from asyncbucket.nesting import HeldLease, holding, innermost_held_lease
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


class NestedMethod:
    """One method that is called inside a paced call, with the methods it calls."""

    __slots__ = ("usage",)

    def __init__(self) -> None:
        #: What its replies say was used.
        self.usage: Usage | None = None

    def note(self, usage: Usage | None) -> None:
        """Keep what a reply, or a part of one, says was used."""
        self.usage = _merged(self.usage, usage)


class HeldCall(HeldLease):
    """Note that a model's call runs in this context under a lease of ``limiter``."""

    __slots__ = ("_stream", "hides_usage", "methods", "reports_requests", "usages")

    def __init__(self, limiter: Limiter, lease: Lease, header_reader: HeaderReader) -> None:
        super().__init__(limiter, lease, header_reader)
        #: Methods called inside.
        self.methods: list[NestedMethod] = []
        #: What each of the SDK's replies said was used.
        self.usages: list[Usage | None] = []
        # A weak reference, because a pooled connection keeps this note for good.
        self._stream: weakref.ref[Any] | None = None
        #: Whether it sends its requests by a client that reports them.
        self.reports_requests = False
        #: Whether a stream was asked for its usage by us, not by the user.
        self.hides_usage = False

    def add_method(self) -> NestedMethod:
        """Note a method that is called inside: each but the first adds a request."""
        method = NestedMethod()
        self.methods.append(method)
        self.pay_for(len(self.methods))
        return method

    def actual_usage(self, find: Callable[[], Usage | None]) -> Usage | None:
        """Return what the call used: what the SDK saw, or what the methods inside or ``find`` say.

        What the provider's limits do not count is left out.
        """
        usage = _total(self.usages)
        if usage is None or len(self.methods) > self.requests:
            usage = _merged(usage, _total([each.usage for each in self.methods]) or find())
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


def _total(usages: list[Usage | None]) -> Usage | None:
    known = [usage for usage in usages if usage is not None]
    return functools.reduce(operator.add, known) if known else None


def _merged(one: Usage | None, other: Usage | None) -> Usage | None:
    return other if one is None else one | other


def held_call(limiter: Limiter) -> HeldCall | None:
    """Return the note of a lease in this context that counts at ``limiter``, or None."""
    held = innermost_held_lease()
    while held is not None:
        if (
            isinstance(held, HeldCall)
            and held.lease is not None
            and (held.limiter is limiter or is_under(held.limiter, limiter))
        ):
            return held
        held = held.outer
    return None


_METHOD: Final[ContextVar[NestedMethod | None]] = ContextVar("asyncbucket nested", default=None)


def method_in(held: HeldCall) -> NestedMethod:
    """Return the method inside the call of ``held`` that runs here, or a new one."""
    method = _METHOD.get()
    return method if method is not None and method in held.methods else held.add_method()


@contextlib.contextmanager
def inside(method: NestedMethod) -> Generator[None]:
    """Make everything that is called in a ``with`` block part of ``method``."""
    token = _METHOD.set(method)
    try:
        yield
    finally:
        put_back(_METHOD, token)


class Pacing:
    """Pace the calls of one model; copies of the model share it."""

    __slots__ = ("asks_for_usage", "estimator", "header_reader", "limiter", "options", "retrier")

    def __init__(
        self,
        limiter: Limiter,
        *,
        retry: Retry | int | None = None,
        estimator: Estimator | None = None,
    ) -> None:
        if not isinstance(limiter, Limiter):
            raise TypeError(f"limiter= takes a Limiter, not {limiter!r}")
        methods = ("chat", "completion", "embedding")
        if isinstance(estimator, type) or not (
            estimator is None or any(hasattr(estimator, name) for name in methods)
        ):
            raise TypeError(
                f"an estimator must have chat(), completion() or embedding(), whichever are asked, and "
                f"{estimator!r} has none"
            )
        self.limiter = limiter
        #: The options as given, to pace a copy alike.
        self.options: dict[str, Any] = {"retry": retry, "estimator": estimator}
        self.estimator = DefaultEstimator() if estimator is None else estimator
        # A refusal concerns all who share the provider's limits.
        self.retrier = Retrier(Retry.of(retry), provider_of(limiter), caller=limiter)
        #: What reads the headers of replies, if the HTTP client passes them on.
        self.header_reader = HeaderReader(limiter)
        #: Whether streams ask the provider for the usage; off for good once it refuses.
        self.asks_for_usage = True

    def copy_for(self, limiter: Limiter, options: dict[str, Any]) -> Self:
        """Return a pacing for ``limiter`` with the same options, except those given."""
        new = type(self)(limiter, **self.options | options)
        if new.options["estimator"] is None:
            new.estimator = self.estimator  # it has learned from the replies so far
        return new

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return this object: a copy of a model spends from the same budget."""
        return self

    async def call(self, call: Call) -> Any:
        """Return the reply, paced and retried; inside a paced call, without pacing."""
        held = held_call(self.limiter)
        if held is None:
            return await self.retry(call, functools.partial(self._attempt, call, call.estimate()))
        method = method_in(held)
        if method is _METHOD.get():
            reply = await call.io.call(call.send)
        else:
            with inside(method):
                reply = await call.io.call(call.send)
        if method.usage is None and not held.usages:
            method.note(call.read(reply))
        return reply

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
