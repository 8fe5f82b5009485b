"""How one model or tool is paced, and one call of it: admitted, held, retried, settled.

The guard against paying twice is `asyncbucket.nesting`, which the models share with the transports
beneath them. Here its note also carries the usage, which is looked for once a call: in what the SDK
received, or else in the replies of methods called inside, or else in the reply. A method that calls
others several times makes that many requests; calls within those are part of them. (A stream that
is read inside a call is not counted, unless the SDK reports its request.) The note also knows the
SDK's stream, to close the request: that stream is part of a reference cycle, so closing the model's
stream, which only drops it, leaves the provider at work until the garbage collector runs.

A tool's call is simpler: it is admitted as one request, and never retried, because only its author
knows what it has done by then. What it holds while it makes calls itself: see `asyncbucket.nesting`.
"""

import functools
import inspect
import operator
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeAlias

from asyncbucket.core.context import put_back
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import (
    counts_at,
    effective_limiter,
    limits_by_way,
    provider_of,
    reserve_more,
    sent,
)
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.pool import PoolLease
from asyncbucket.llama_index.estimate import DefaultEstimator, Estimate, Estimator
from asyncbucket.llama_index.events import report_wait
from asyncbucket.nesting import HeldLease, give_up_slots, held_leases, is_running
from asyncbucket.providers.errors import end_failed, never_sent, was_refused
from asyncbucket.providers.prices import model_of, price_here, within_limits
from asyncbucket.providers.profiles import excess_of
from asyncbucket.providers.usage import Usage
from asyncbucket.retry import Retrier, Retry, Sent
from asyncbucket.waiting import ASYNC, IO, SYNC

if TYPE_CHECKING:
    import weakref

    from asyncbucket.providers.prices import Price
    from asyncbucket.providers.profiles import Profile

#: Where a paced model or tool keeps its `Pacing`.
PACING: Final = "_asyncbucket_pacing"
#: Finds the usage in a reply, or in a part of one.
Reader: TypeAlias = Callable[[Any], Usage | None]


def no_usage(_: object) -> None:
    """Return None: what such a reply says comes from the model, not from the provider."""


class Method(NamedTuple):
    """How calls of one of a model's methods are paced."""

    #: The name of its first argument.
    argument: str
    #: Estimates a call from an estimator, the model, and what the method is called with.
    estimate: Callable[..., Estimate]
    read: Reader = no_usage
    #: Whether what a class inherits from LlamaIndex's base calls other paced methods, which pay.
    by_others: bool = False


@dataclass(slots=True)
class ModelCall:
    """One call of a model."""

    io: IO
    method: Method
    model: Any
    #: The model's own method, and its name.
    own: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    #: What it is sent with besides, if the provider takes it.
    options: Mapping[str, Any] = field(default_factory=dict)
    sent: Sent | None = None
    #: The member of a pool that has taken it.
    member: Limiter | None = None

    def send(self, **options: Any) -> Awaitable[Any]:
        """Send it."""
        return self.io.call(self.own, *self.args, **self.kwargs, **options)

    def at_member(self, models: Mapping[Limiter, Any]) -> "ModelCall":
        """Return the admitted call as it is made: in a pool, of the model of the member that took it."""
        model = None if self.member is None else models.get(self.member)
        if model is None:
            return self
        if hasattr(self.model, "callback_manager"):  # frameworks set it late, and only there
            model.callback_manager = self.model.callback_manager
        return replace(self, own=getattr(super(type(model), model), self.name))

    def estimate(self, estimator: Estimator) -> Estimate:
        """Estimate what it will cost."""
        return self.method.estimate(estimator, self.model, *self.args, **self.kwargs)


class HeldCall(HeldLease):
    """Note that a model's call runs in this context, and what its requests show.

    Args:
        limiter: the limiter that was asked.
        lease: the lease that pays.
        provider: the limiter that has the provider's limits: in a pool, the member.
        price: what the model costs; None if nothing counts dollars.
        usd: what was reserved for the first request.
    """

    def __init__(
        self,
        limiter: Limiter,
        lease: Lease,
        *,
        provider: Limiter,
        price: "Price | None" = None,
        usd: float = 0.0,
    ) -> None:
        super().__init__(limiter, lease)
        self.price = price
        self.provider = provider
        self._usd = usd
        #: What the requests so far cost at most, or cost if that is known.
        self._due = 0.0
        #: Methods of models that were called inside, by which the call may make more requests.
        self._methods = 0
        #: Requests that were seen to leave, and requests that the lease pays for.
        self._requests = 0
        self._paid_requests = 0
        #: When its latest request left, in seconds of the limiter's clock.
        self.sent_at: float | None = None
        #: The SDK's own stream that this call reads, if it was seen: its usage is added as it passes.
        #: A weak reference, because a pooled connection keeps this note for good.
        self.stream: weakref.ref[Any] | None = None
        #: What each of the SDK's replies said was used, or each of the methods' called inside.
        self.usages: list[Usage | None] = []
        #: Whether a stream was asked for its usage by us, not by the user.
        self.hides_usage = False
        #: The profile of the provider that its requests go to, once one was seen to leave.
        self.profile: Profile | None = None

    async def call_inside(self, call: ModelCall, usd: float) -> Any:
        """Call a method inside: each but the first adds a request; those in it are part of it.

        Args:
            call: the call of the method.
            usd: what it costs at most.

        Raises:
            BudgetExceeded: a budget cannot pay for a further request.
        """
        self._methods += 1
        await self._pay_for(self._methods, usd, call.io)
        token = INSIDE.set(self)
        try:
            reply = await call.send()
        finally:
            put_back(INSIDE, token)
        usage = call.method.read(reply)
        if self.price is not None and usage is not None:
            self._due += self.price.of(usage) - usd
        if not self._requests:  # otherwise the SDK's replies say it
            self.usages.append(usage)
        return reply

    async def request_prepared(self, io: IO) -> None:
        """Count a request that is about to leave, and date the booking to now.

        Raises:
            BudgetExceeded: it is not the first, and a budget cannot pay for it.
        """
        lease = self.lease
        if lease is not None:
            self._requests += 1
            await self._pay_for(self._requests, self._usd, io)
            sent(lease)

    def note_usage(self, usage: Usage | None) -> None:
        """Note what one of the SDK's replies says was used."""
        self.usages.append(usage)
        if self.price is not None and usage is not None and not self._methods:
            self._due += self.price.of(usage) - self._usd

    def request_sent(self) -> None:
        """Date the booking to now, when the request really goes out."""
        self.sent_at = self.limiter.now()
        lease = self.lease
        if lease is not None:
            sent(lease)

    async def _pay_for(self, requests: int, usd: float, io: IO) -> None:
        """Make the lease pay for ``requests`` requests, unless it does so already.

        The last costs ``usd`` at most. A call that sends its texts one by one has reserved enough
        for all of them.
        """
        lease = self.lease
        if lease is None or requests <= self._paid_requests:
            return
        due, reserved = self._due + usd, max(self._usd, self._due)
        if requests > 1:
            more = {"requests": requests - self._paid_requests, "usd": max(0.0, due - reserved)}
            await reserve_more(lease, more, blocking=io is SYNC)
            used: dict[str, float] = {"requests": requests}
            if self.price is not None:
                used["usd"] = max(reserved, due)
            lease.settle(**used)  # at once, lest another thread finds less reserved in between
        self._paid_requests, self._due = requests, due

    def failed(self, lease: Lease, error: BaseException) -> None:
        """End the call's lease; a request that found no connection costs nothing."""
        # The SDK's own error says only that there was no connection; its cause says why.
        if self.price is not None and self._paid_requests <= 1 and was_refused(error):
            lease.settle(usd=0)
        only = self._requests == 1 and self.sent_at is None
        end_failed(lease, error, unsent=only and never_sent(error.__cause__))

    async def close_stream(self, io: IO) -> None:
        """Close the SDK's stream, and with it the request. Idempotent."""
        stream = None if self.stream is None else self.stream()
        closing = None if stream is None else stream.close()
        if io is ASYNC and inspect.isawaitable(closing):  # not so if the model reads it in a thread
            await closing


#: The call of which a method inside runs in this context.
INSIDE: Final[ContextVar[HeldCall | None]] = ContextVar("asyncbucket inside", default=None)


def held_call(limiter: Limiter) -> HeldCall | None:
    """Return the note of a model's call in this context that counts at ``limiter``, or None."""
    for held in held_leases():
        lease = held.lease if isinstance(held, HeldCall) else None
        if lease is not None and counts_at(lease, limiter):
            assert isinstance(held, HeldCall)
            return held
    return None


class Pacing:
    """Pace the calls of one model or tool; its copies share this object.

    Args:
        limiter: what admits the calls.
        retry: how a model's failed calls are retried; see `Retry.of`.
        estimator: what estimates the cost of a model's calls.
        models: if the limiter is a pool, the paced models with which its members but the first are
            called.
    """

    def __init__(
        self,
        limiter: Limiter,
        *,
        retry: Retry | int | None = None,
        estimator: Estimator | None = None,
        models: Mapping[Limiter, Any] | None = None,
    ) -> None:
        self.limiter = limiter
        self.models: Mapping[Limiter, Any] = {} if models is None else models
        self.estimator = DefaultEstimator() if estimator is None else estimator
        needed = ("chat", "completion", "embedding")
        if isinstance(estimator, type) or not all(hasattr(self.estimator, each) for each in needed):
            raise TypeError(
                f"estimator= takes an object with chat(), completion() and embedding(), not {estimator!r}"
            )
        # A refusal concerns all who share the provider's limits.
        self.retrier = Retrier(Retry.of(retry), provider_of(limiter), caller=limiter)
        #: Whether streams ask the provider for the usage; off for good once it refuses.
        self.asks_for_usage = True

    @property
    def options(self) -> dict[str, Any]:
        """What paces a copy alike; the estimator has learned from the replies so far."""
        return {"retry": self.retrier.policy, "estimator": self.estimator}

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return this object: a copy of a model or tool spends from the same budget."""
        return self

    async def call_tool(self, io: IO, tool: object, send: "functools.partial[Any]") -> Any:
        """Return what ``send()`` returns, paced; inside a call of the same tool, without pacing."""
        if is_running(tool):
            return await io.call(send)
        lease = await self._acquire(io)
        with lease, HeldLease(self.limiter, lease, tool=tool):
            return await io.call(send)

    async def call(self, call: ModelCall, held: HeldCall | None) -> Any:
        """Return the reply, paced and retried; inside a call that pays, without pacing."""
        if held is None:
            attempt = functools.partial(self._attempt, call, call.estimate(self.estimator))
            return await self.retry(call, attempt)
        usd = 0.0
        if held.price is not None:
            usd = self._usd(call.estimate(self.estimator), held.price)
        return await held.call_inside(call, usd)

    async def retry(self, call: ModelCall, attempt: Callable[[], Any]) -> Any:
        """Return what ``attempt()`` returns, one attempt at ``call``, after as many as it takes."""
        call.sent = Sent()
        return await self.retrier.call(attempt, io=call.io, tried=call.own, sent=call.sent)

    async def _attempt(self, call: ModelCall, estimate: Estimate) -> Any:
        lease, held = await self.admit(call, estimate)
        try:
            with held:
                reply = await call.at_member(self.models).send()
            self.settle(held, lambda: call.method.read(reply))
        except BaseException as error:
            held.failed(lease, error)
            raise
        lease.release()
        return reply

    async def admit(self, call: ModelCall, estimate: Estimate) -> tuple[Lease, HeldCall]:
        """Wait for the admission of a call that costs ``estimate``; note when it leaves."""
        amounts, prices, usd = self._amounts(estimate), {}, 0.0
        if estimate.input_tokens or estimate.output_tokens:
            prices = self._prices(call)
        if prices:
            usd = amounts["usd"] = max(self._usd(estimate, price) for price in prices.values())
        lease = await self._acquire(call.io, **amounts)
        assert call.sent is not None
        call.sent.admitted(self.limiter, lease)
        call.member = lease.limiter if isinstance(lease, PoolLease) else None
        provider = call.member or self.limiter
        price = prices.get(call.member, prices.get(None))
        return lease, HeldCall(self.limiter, lease, provider=provider, price=price, usd=usd)

    def _prices(self, call: ModelCall) -> "dict[Limiter | None, Price]":
        """Return what the call costs by the member of a pool that may take it, else by None.

        There is nothing if nothing counts dollars.
        """
        models: list[tuple[Limiter | None, Any]] = [(None, call.model), *self.models.items()]
        found = {
            member: price_here(self.limiter, model_of(model, call.kwargs))
            for member, model in models
        }
        return {member: price for member, price in found.items() if price is not None}

    def _usd(self, estimate: Estimate, price: "Price") -> float:
        """Return the dollars to reserve: the most that the call can cost, if its output is limited."""
        if estimate.foreseen:
            usd = price.at_most(estimate.input_tokens, estimate.output_tokens)
            return within_limits(self.limiter, usd)
        at_most = estimate.input_at_most or estimate.input_tokens
        return price.at_most(at_most, estimate.output_tokens)

    async def _acquire(self, io: IO, **amounts: float) -> Lease:
        """Wait for the admission of a call, for which calls around it give up slots."""
        give_up_slots(self.limiter)
        lease = await io.acquire(self.limiter, **amounts)
        report_wait(self.limiter, lease)
        return lease

    def _amounts(self, estimate: Estimate) -> dict[str, float]:
        """Return the tokens to reserve; a guess of the output must not make a call impossible."""
        if not isinstance(estimate, Estimate):
            raise TypeError(f"{self.estimator!r} returned {estimate!r}; it must return an Estimate")
        sent, received = estimate.input_tokens, estimate.output_tokens
        if estimate.foreseen:
            cost = {"input_tokens": sent, "output_tokens": received, "tokens": sent + received}
            excess = excess_of(cost, limits_by_way(effective_limiter(self.limiter)))
            received = max(0, received - excess)
        return {"input_tokens": sent, "output_tokens": received}

    def settle(self, held: HeldCall, find: Callable[[], Usage | None]) -> None:
        """Correct the reservation to what a whole reply used, as was noted or as ``find`` says."""
        usages = [usage for usage in held.usages if usage is not None]
        usages = usages or [usage for usage in [find()] if usage is not None]
        lease = held.lease
        if lease is None or not usages:
            return
        usage = functools.reduce(operator.add, usages)
        counted = usage if held.profile is None else held.profile.counted(usage)
        used: dict[str, Any] = {
            "input_tokens": counted.input_tokens,
            "output_tokens": counted.output_tokens,
        }
        if held.price is not None:
            # Each request has its own price: long prompts have another, and parts are rounded up.
            used["usd"] = sum(map(held.price.of, usages))
        lease.settle(**used)
        observe = getattr(self.estimator, "observe", None)
        if usage.output_tokens and observe is not None:  # embeddings teach nothing
            observe(usage.output_tokens)


def pacing_of(paced: Any) -> Pacing:
    """Return the pacing of a paced model or tool."""
    private: Mapping[str, Any] = getattr(paced, "__pydantic_private__", None) or {}
    pacing: Pacing | None = private.get(PACING) or vars(paced).get(PACING)
    if pacing is None:
        name = type(paced).__name__
        raise TypeError(
            f"this {name} was made by the class of a paced one, so no limiter paces it: "
            f"make a plain {name}, and wrap that"
        )
    return pacing
