"""How one model or tool is paced, and one call or stream of it: admitted, held, retried, settled.

The guard against paying twice is `asyncbucket.attempt`, which the models share with the transports
beneath them. Here its note also carries the usage, which is looked for once a call: in what the SDK
received, or else in the replies of methods called inside, or else in the reply. A method that calls
others several times makes that many requests; calls within those are part of them. (A stream that
is read inside a call is not counted, unless the SDK reports its request.) The note also knows the
SDK's stream, to close the request: that stream is part of a reference cycle, so closing the model's
stream, which only drops it, leaves the provider at work until the garbage collector runs.

A tool's call is simpler: it is admitted as one request, and never retried, because only its author
knows what it has done by then. What it holds while it makes calls itself: see `asyncbucket.attempt`.

*Streams* are generators that take nothing before their first item is requested. Everything happens
at the first step: the admission, the model's own call, and the first item of its stream, which is
where OpenAI's 429 appears. Up to that point a failed attempt is retried like any call; after it
never, because the caller has seen a part of the answer.

However a stream ends, its request is closed, too. Otherwise the provider would have more calls in
flight than there are slots, because a model's stream may stop, or break off, before the provider
does. asyncio closes a dropped asynchronous generator only when its loop runs again; the slot must
not wait for that, so the generator stands behind an object that drops the lease.

The usage comes with a stream's last chunk; OpenAI sends it only if asked, so we ask if the user
does not, and `clients` leaves that chunk out.
"""

import contextlib
import functools
import inspect
import operator
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from llama_index_instrumentation.dispatcher import active_instrument_tags
from llama_index_instrumentation.span import active_span_id

from asyncbucket.attempt import IN_PROGRESS, Attempt, answered, end_failed, is_running
from asyncbucket.engine.context import inherited, put_back
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.wording import USD
from asyncbucket.levels import (
    counts_at,
    effective_limiter,
    excess_of,
    in_force,
    provider_of,
    reserve_more,
    sent,
)
from asyncbucket.llama_index.estimate import (
    BYTES_PER_TOKEN,
    DefaultEstimator,
    Estimate,
    Estimator,
    prompt_to_cache,
    turns_of,
)
from asyncbucket.llama_index.events import report_wait
from asyncbucket.pools import Pool
from asyncbucket.providers.errors import never_sent, was_refused
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.prefixes import (
    LEAST,
    CacheMode,
    Prefixes,
    Prompt,
    conversation_of,
    count_use,
    cuts_of,
    read_mode,
)
from asyncbucket.providers.prices import added_tokens, model_of, price_at, within_limits
from asyncbucket.providers.profiles import GENERIC
from asyncbucket.providers.usage import Usage
from asyncbucket.retry import Retrier, Retry
from asyncbucket.waiting import ASYNC, IO, SYNC, run

if TYPE_CHECKING:
    import weakref

    from asyncbucket.providers.prices import Price
    from asyncbucket.providers.profiles import Profile


#: What makes OpenAI's streams end with their usage.
_USAGE: Final = {"stream_options": {"include_usage": True}}
#: Marks the end of a stream, because None may be one of its items.
_END: Final[Any] = object()


def no_usage(_: object) -> None:
    """Return None: what such a reply says comes from the model, not from the provider."""


class Method(NamedTuple):
    """How calls of one of a model's methods are paced."""

    #: The name of its first argument.
    argument: str
    #: Estimates a call from an estimator, the model, and what the method is called with.
    estimate: Callable[..., Estimate]
    #: Finds the usage in a reply, or in a part of one.
    read: Callable[[Any], Usage | None] = no_usage
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
    #: Whether it is a stream that must be asked for its usage.
    asks_for_usage: bool = False

    def send(self, own: Callable[..., Any], **options: Any) -> Awaitable[Any]:
        """Send it, by ``own``, a model's own method."""
        make = own if self.io is ASYNC else self.io.awaiting(own)
        sending: Awaitable[Any] = make(*self.args, **self.kwargs, **options)
        return sending

    def estimate(self, estimator: Estimator) -> Estimate:
        """Estimate what it will cost."""
        kwargs = dict(self.kwargs)
        args = self.args or (kwargs.pop(self.method.argument),)
        return self.method.estimate(estimator, self.model, *args, **kwargs)


class Requests:
    """Note what the requests of one model's call show, and have its lease pay for each of them.

    Args:
        attempt: the attempt that they are part of, admitted.
        own: the method that makes the call.
        learn: whether the limits learn from the replies.
    """

    def __init__(self, attempt: Attempt, own: Callable[..., Any], *, learn: bool) -> None:
        #: In a pool, that of the member's model.
        self.own = own
        #: The limiter that has the provider's limits: in a pool, the member.
        self.provider = attempt.member or attempt.limiter
        self.learn = learn
        self._noted = attempt.sent
        #: What the model costs, and what was reserved for the first request, if dollars count.
        self.price: Price | None = None
        self.usd = 0.0
        #: What the requests so far cost at most.
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
        #: What is sent, until a reply says what of it was in the provider's cache.
        self.prompt: Prompt | None = None

    async def call_inside(self, attempt: Attempt, call: ModelCall, usd: float) -> Any:
        """Call a method inside: each but the first adds a request; those in it are part of it.

        Args:
            attempt: the attempt in which it is called.
            call: the call of the method.
            usd: what it costs at most.

        Raises:
            BudgetExceeded: a budget cannot pay for a further request.
        """
        self._methods += 1
        await self._pay_for(attempt.lease, self._methods, usd, call.io)
        part = Attempt(attempt.limiter, attempt.lease, call=self, pays=True)
        part.is_part = True
        with part:
            reply = await call.send(call.own)
        if not self._requests:  # otherwise the SDK's replies say it
            self.usages.append(call.method.read(reply))
        return reply

    async def prepared(self, attempt: Attempt, io: IO) -> None:
        """Count a request that is about to leave, and date the booking to now.

        Raises:
            BudgetExceeded: it is not the first, and a budget cannot pay for it.
        """
        lease = attempt.lease
        if lease is not None:
            self._requests += 1
            await self._pay_for(lease, self._requests, self.usd, io)
            sent(lease)

    def sent(self, attempt: Attempt) -> None:
        """Date the booking to now, when the request really goes out."""
        self.sent_at = attempt.limiter.now()
        lease = attempt.lease
        if lease is not None:
            sent(lease)

    async def _pay_for(self, lease: Lease | None, requests: int, usd: float, io: IO) -> None:
        """Make the lease pay for ``requests`` requests, unless it does so already.

        The last costs ``usd`` at most. A call that sends its texts one by one has reserved enough
        for all of them.
        """
        if lease is None or requests <= self._paid_requests:
            return
        due, reserved = self._due + usd, max(self.usd, self._due)
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
        only = self._requests == 1 and self.sent_at is None
        self.over()
        try:
            if self.price is not None and self._paid_requests <= 1 and was_refused(error):
                lease.settle(usd=0)
        finally:  # to look at an error may raise another
            unsent = only and never_sent(error.__cause__)
            end_failed(
                lease,
                error,
                unsent=unsent,
                sent=self._noted,
                limiter=self.provider,
                learns=self.learn,
            )

    def over(self) -> None:
        """Let another call lead, if this one did."""
        if self.prompt is not None:
            self.prompt.over()

    async def close_stream(self, io: IO) -> None:
        """Close the SDK's stream, and with it the request. Idempotent."""
        stream = None if self.stream is None else self.stream()
        closing = None if stream is None else stream.close()
        if io is ASYNC and inspect.isawaitable(closing):  # not so if the model reads it in a thread
            await closing


def call_around(limiter: Limiter) -> Attempt | None:
    """Return the attempt at a model's call in this context that counts at ``limiter``, or None."""
    attempt = IN_PROGRESS.get()
    while attempt is not None:
        lease = attempt.lease if isinstance(attempt.call, Requests) else None
        if lease is not None and counts_at(lease, limiter):
            return attempt
        attempt = attempt.outer
    return None


class Pacing:
    """Pace the calls of one model or tool; its copies share this object.

    Args:
        limiter: what admits the calls.
        retry: how a model's failed calls are retried; see `Retry.of`.
        estimator: what estimates the cost of a model's calls.
        models: if the limiter is a pool, the paced models with which its members but the first are
            called.
        cache: whether calls with a prompt prefix that is not in the provider's cache wait for one
            that leads.
        learn: whether the limits learn from the replies.
    """

    def __init__(
        self,
        limiter: Limiter,
        *,
        retry: Retry | int | None = None,
        estimator: Estimator | None = None,
        models: Mapping[Limiter, Any] | None = None,
        cache: CacheMode = "count",
        learn: bool = True,
    ) -> None:
        self.limiter = limiter
        self.models: Mapping[Limiter, Any] = {} if models is None else models
        self.estimator = DefaultEstimator() if estimator is None else estimator
        if not isinstance(self.estimator, Estimator) or isinstance(estimator, type):
            raise TypeError(
                f"estimator= takes an object with chat(), completion() and embedding(), not {estimator!r}"
            )
        # A refusal concerns all who share the provider's limits.
        self.retrier = Retrier(Retry.of(retry), provider_of(limiter), caller=limiter)
        self.cache, self.learn = read_mode(cache), learn
        #: How the provider counts, once a request was seen to leave.
        self.profile = GENERIC
        #: Whether streams ask the provider for the usage; off for good once it refuses.
        self.asks_for_usage = True

    @property
    def options(self) -> dict[str, Any]:
        """What paces a copy alike; the estimator has learned from the replies so far."""
        return {
            "retry": self.retrier.policy,
            "estimator": self.estimator,
            "cache": self.cache,
            "learn": self.learn,
        }

    def expect_headers(self) -> None:
        """Have the limits learn from the first call on: the model's SDK shows what it receives."""
        members = self.limiter.members if isinstance(self.limiter, Pool) else (self.limiter,)
        for limiter in members if self.learn else ():
            HeaderReader.of(limiter).expect()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return this object: a copy of a model or tool spends from the same budget."""
        return self

    async def call_tool(self, io: IO, tool: object, send: "functools.partial[Any]") -> Any:
        """Return what ``send()`` returns, paced; inside a call of the same tool, without pacing."""
        if is_running(tool):
            return await io.call(send)
        attempt = Attempt(self.limiter, call=tool)
        lease = await attempt.admit(io)
        if lease.waited:
            report_wait(self.limiter, lease)
        with lease, attempt:
            return await io.call(send)

    async def call(self, call: ModelCall, around: Attempt | None) -> Any:
        """Return the reply, paced and retried; inside a call that pays, without pacing."""
        if around is None:
            attempt = functools.partial(self._attempt, call, call.estimate(self.estimator))
            return await self.retrier.call(attempt, io=call.io, tried=call.own)
        requests: Requests = around.call
        price = requests.price
        usd = 0.0 if price is None else self._usd(call, call.estimate(self.estimator), price)
        return await requests.call_inside(around, call, usd)

    async def _attempt(self, call: ModelCall, estimate: Estimate, attempt: Attempt) -> Any:
        lease, requests = await self.admit(call, estimate, attempt)
        try:
            reply = await call.send(requests.own)
            answered(lease)
            self.settle(lease, requests, lambda: call.method.read(reply))
        except BaseException as error:
            requests.failed(lease, error)
            raise
        lease.release()
        return reply

    async def admit(
        self, call: ModelCall, estimate: Estimate, attempt: Attempt
    ) -> tuple[Lease, Requests]:
        """Wait for the admission of an attempt that costs ``estimate``."""
        amounts: dict[str, Any] = self._amounts(call, estimate)
        prompt, conversation = None, None
        if call.method.argument == "messages":
            messages = call.args[0] if call.args else call.kwargs["messages"]
            if not isinstance(self.limiter, Pool):
                body = prompt_to_cache(call.model, messages, call.kwargs)
                prompt = None if body is None else self._prompt(call, body)
            elif estimate.input_tokens >= LEAST:
                conversation = conversation_of(turns_of(messages), type(call.model).__name__)
        lease = await attempt.admit(call.io, prompt=prompt, conversation=conversation, **amounts)
        if lease.waited:
            report_wait(self.limiter, lease)
        attempt.call, attempt.pays = Requests(attempt, call.own, learn=self.learn), True
        requests: Requests = attempt.call
        requests.prompt = prompt
        model = self.models.get(requests.provider, call.model)
        if model is not call.model:
            requests.own = getattr(super(type(model), model), call.name)
            # Frameworks set it late, and only at the first model.
            model.callback_manager = call.model.callback_manager
        if USD in amounts:
            requests.price, requests.usd = self._price(call, model), amounts[USD]
        return lease, requests

    def _prompt(self, call: ModelCall, body: Mapping[str, Any]) -> Prompt:
        """Return what is sent by a chat that asks the provider to cache some of it."""
        site = f"{type(call.model).__name__} {model_of(call.model, call.kwargs)}"
        table, cuts = Prefixes.of(self.limiter), cuts_of(body, site)
        return Prompt(table, self.profile, cuts, self.cache == "lead")

    def _amounts(self, call: ModelCall, estimate: Estimate) -> dict[str, float]:
        """Return what to reserve; a guess of the output must not make a call impossible."""
        sent, received = estimate.input_tokens, estimate.output_tokens
        limits = in_force(effective_limiter(self.limiter))
        if estimate.foreseen:
            cost = {"input_tokens": sent, "output_tokens": received, "tokens": sent + received}
            excess = excess_of(cost, limits.by_way)
            received = max(received - excess, 0)
        amounts: dict[str, float] = {"input_tokens": sent, "output_tokens": received}
        if (sent or received) and limits.counts(USD):
            models = (call.model, *self.models.values())  # any of a pool's members may take it
            amounts[USD] = max(
                self._usd(call, estimate, self._price(call, each)) for each in models
            )
        return amounts

    def _price(self, call: ModelCall, model: Any) -> "Price":
        """Return the price of the call if ``model`` makes it."""
        return price_at(self.limiter, model_of(model, call.kwargs))

    def _usd(self, call: ModelCall, estimate: Estimate, price: "Price") -> float:
        """Return the dollars to reserve: the most that the call can cost, if its output is limited."""
        if estimate.foreseen:
            usd = price.at_most(estimate.input_tokens, estimate.output_tokens)
            return within_limits(self.limiter, usd)
        # A token has at least one byte.
        added = added_tokens(has_tools=bool(call.kwargs.get("tools")))
        at_most = estimate.input_tokens * BYTES_PER_TOKEN + added
        return price.at_most(at_most, estimate.output_tokens)

    def settle(self, lease: Lease, requests: Requests, find: Callable[[], Usage | None]) -> None:
        """Correct the reservation to what a whole reply used, as was noted or as ``find`` says."""
        usages = [*filter(None, requests.usages)] or [*filter(None, [find()])]
        if not usages:
            return
        usage = functools.reduce(operator.add, usages)
        if requests.prompt is not None:
            self.begun(lease, requests, usages)
        profile = requests.profile
        counted = usage if profile is None or profile.counts_cached else profile.counted(usage)
        used: dict[str, Any] = {
            "input_tokens": counted.input_tokens,
            "output_tokens": counted.output_tokens,
        }
        if requests.price is not None:
            # Each request has its own price: long prompts have another, and parts are rounded up.
            used["usd"] = sum(map(requests.price.of, usages))
        lease.settle(**used)
        if usage.cached_tokens or usage.cached_beside or usage.written_tokens:
            count_use(lease, usage, self.profile if profile is None else profile)
        observe = getattr(self.estimator, "observe", None)
        if usage.output_tokens and observe is not None:  # embeddings teach nothing
            observe(usage.output_tokens)

    def begun(self, lease: Lease, requests: Requests, usages: Sequence[Usage]) -> None:
        """Learn from the beginning of a reply what of its prompt was in the provider's cache."""
        self.profile = requests.profile or self.profile
        prompt, requests.prompt = requests.prompt, None
        if prompt is not None and len(usages) == 1:
            prompt.profile = self.profile
            prompt.replied(usages[0], lease)
        elif prompt is not None:  # of several requests nobody knows which read it
            prompt.over()

    async def stream(self, call: ModelCall, around: Attempt | None) -> Any:
        """Return the stream that the call gives, paced; inside a call that pays, without pacing."""
        if around is not None:
            return await self.start_stream(call, call.own, around.call)
        variables: list[ContextVar[Any]] = [inherited, active_span_id, active_instrument_tags]
        reading = _Reading(self, call, [(variable, variable.get()) for variable in variables])
        items = reading.items()
        return AsyncPacedStream(reading, items) if call.io is ASYNC else _on_this_thread(items)

    async def start_stream(
        self, call: ModelCall, own: Callable[..., Any], requests: Requests
    ) -> Any:
        """Start a stream; it is asked for its usage unless the provider has refused to say that."""
        requests.hides_usage = call.asks_for_usage and self.asks_for_usage
        return call.io.iterator(await call.send(own, **(_USAGE if requests.hides_usage else {})))


@dataclass(slots=True)
class _Reading:
    """A stream, and the attempt at it that is being read."""

    pacing: Pacing
    call: ModelCall
    #: The context in which it was requested: inherited terms, span and tags. Engines hand streams to
    #: threads and tasks of their own, which know none of these.
    context: list[tuple[ContextVar[Any], Any]]
    attempt: Attempt | None = None
    lease: Lease | None = None
    requests: Requests | None = None
    inner: Any = None
    usage: Usage | None = None

    async def items(self) -> AsyncGenerator[Any, None]:
        """Yield the items, under one lease from the first to the last."""
        pacing, call = self.pacing, self.call
        try:
            with self._as_requested():
                attempt = functools.partial(self._attempt, call.estimate(pacing.estimator))
                item = await pacing.retrier.call(attempt, io=call.io, tried=call.own)
            while item is not _END:
                yield item
                assert self.attempt is not None
                with self._as_requested(), self.attempt:
                    item = await self._next()
            # When the whole reply is there; for a broken stream the usage is never known.
            if self.lease is not None and self.requests is not None:
                pacing.settle(self.lease, self.requests, lambda: self.usage)
        except BaseException as error:
            await self._end(None if isinstance(error, GeneratorExit) else error)
            raise
        await self._end()

    async def _attempt(self, estimate: Estimate, attempt: Attempt) -> Any:
        """Make one attempt; return the first item, or the end."""
        pacing, call = self.pacing, self.call
        self.lease, requests = await pacing.admit(call, estimate, attempt)
        self.attempt, self.requests = attempt, requests
        try:
            self.inner = await pacing.start_stream(call, requests.own, requests)
            item = await self._next()
            answered(self.lease)
            if requests.prompt is not None:
                usages = [*filter(None, requests.usages or [self.usage])]
                if usages:
                    pacing.begun(self.lease, requests, usages)
        except BaseException as error:
            await self._end(error)
            if not (requests.hides_usage and "stream_options" in str(error)):
                raise
        else:
            return item
        pacing.asks_for_usage = False
        return await self._attempt(estimate, attempt)

    async def _next(self) -> Any:
        """Let the model's own stream go on."""
        item = await self.call.io.next_item(self.inner, _END)
        if self.requests is not None and self.requests.stream is None:
            usage = self.call.method.read(item)
            self.usage = self.usage if usage is None else usage | self.usage
        return item

    async def _end(self, error: BaseException | None = None) -> None:
        """Close the request, and give the slot back."""
        io, lease, requests, inner = self.call.io, self.lease, self.requests, self.inner
        self.attempt = self.lease = self.requests = self.inner = None
        if requests is None:
            return
        try:
            if hasattr(inner, "aclose" if io is ASYNC else "close"):
                await io.close(inner)
            await requests.close_stream(io)
        finally:
            if lease is not None:
                if error is None:
                    requests.over()
                    lease.release()
                else:
                    requests.failed(lease, error)

    @contextlib.contextmanager
    def _as_requested(self) -> Generator[None]:
        tokens = [(variable, variable.set(value)) for variable, value in self.context]
        try:
            yield
        finally:
            for variable, token in tokens:
                put_back(variable, token)


class AsyncPacedStream(AsyncGenerator[Any, None]):
    """Read a stream; if it is dropped, its slot comes back at once."""

    def __init__(self, reading: _Reading, items: AsyncGenerator[Any, None]) -> None:
        self._reading = reading
        self._items = items

    async def asend(self, value: None, /) -> Any:
        """Return the next item, like ``__anext__``."""
        return await self._items.asend(value)

    async def athrow(self, *error: Any) -> Any:
        """End the stream and raise; nobody inside would handle it."""
        return await self._items.athrow(*error)

    async def aclose(self) -> None:
        """End the stream and give the slot back. Idempotent."""
        await self._items.aclose()

    def __del__(self) -> None:
        # The lease releases itself, safely even if the garbage collector interrupts the limiter.
        self._reading.lease = None


def _on_this_thread(items: AsyncGenerator[Any, None]) -> Generator[Any, None, None]:
    """Yield ``items``, whose steps never suspend."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)  # or a loop that runs here would close it when it ends
    step = items.__anext__()
    sys.set_asyncgen_hooks(*hooks)
    try:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield run(step)
                step = items.__anext__()
    finally:
        run(items.aclose())
