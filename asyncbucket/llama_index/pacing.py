"""How one model is paced: its limiter, its retries, its estimates, and one call of it."""

import contextlib
import functools
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Self, TypeVar

from asyncbucket.core.context import inherited
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import effective_limiter, in_force, provider_of
from asyncbucket.core.limiter import Limiter
from asyncbucket.llama_index.estimate import DefaultEstimator, Estimate, Estimator, Observer
from asyncbucket.llama_index.events import admit, admit_sync
from asyncbucket.llama_index.held import HeldCall, held_call, nested
from asyncbucket.nesting import holding
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.usage import Usage, usage_of
from asyncbucket.retry import Retrier, Retry, Sent

T = TypeVar("T")


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

    async def call(
        self,
        send: Callable[[], Awaitable[T]],
        estimate: Callable[[], Estimate],
        *,
        read: Callable[[T], Usage | None] = usage_of,
    ) -> T:
        """Return what ``send()`` returns, paced and retried; inside a paced call, without pacing.

        ``read`` finds the usage in a reply. A reply made of what the model wrote has none, and must
        not be searched for it.
        """
        held = held_call(self.limiter)
        if held is None:
            sent = Sent()
            attempt = functools.partial(self._attempt, send, estimate(), read, sent)
            return await self.retrier.call(attempt, deadline=self.deadline(), tried=send, sent=sent)
        with nested(held) as method:
            reply = await send()
            method.note(read(reply))
        return reply

    def call_sync(
        self,
        send: Callable[[], T],
        estimate: Callable[[], Estimate],
        *,
        read: Callable[[T], Usage | None] = usage_of,
    ) -> T:
        """Do the same as `call`, on a thread that may be blocked."""
        held = held_call(self.limiter)
        if held is None:
            sent = Sent()
            attempt = functools.partial(self._attempt_sync, send, estimate(), read, sent)
            return self.retrier.call_sync(attempt, deadline=self.deadline(), tried=send, sent=sent)
        with nested(held) as method:
            reply = send()
            method.note(read(reply))
        return reply

    async def _attempt(
        self,
        send: Callable[[], Awaitable[T]],
        estimate: Estimate,
        read: Callable[[T], Usage | None],
        sent: Sent,
    ) -> T:
        with await self.admit(estimate, sent) as lease, self._held_call(lease) as held:
            with holding(held):
                reply = await send()
            self.settle(lease, held.actual_usage(read(reply)))
            return reply

    def _attempt_sync(
        self,
        send: Callable[[], T],
        estimate: Estimate,
        read: Callable[[T], Usage | None],
        sent: Sent,
    ) -> T:
        with self.admit_sync(estimate, sent) as lease, self._held_call(lease) as held:
            with holding(held):
                reply = send()
            self.settle(lease, held.actual_usage(read(reply)))
            return reply

    @contextlib.contextmanager
    def _held_call(self, lease: Lease) -> Generator[HeldCall]:
        """Tell ``lease`` how the call failed, if it does."""
        held = HeldCall(self.limiter, lease, self.header_reader)
        try:
            yield held
        except BaseException as error:
            held.failed(lease, error)
            raise

    async def admit(self, estimate: Estimate, sent: Sent) -> Lease:
        """Wait for the admission of a call that costs ``estimate``; note in ``sent`` when it leaves."""
        lease = await admit(self.limiter, self._amounts(estimate))
        sent.at = self.limiter.now()
        return lease

    def admit_sync(self, estimate: Estimate, sent: Sent) -> Lease:
        """Do the same as `admit`, on a thread that may be blocked."""
        lease = admit_sync(self.limiter, self._amounts(estimate))
        sent.at = self.limiter.now()
        return lease

    def settle(self, lease: Lease, usage: Usage | None) -> None:
        """Correct the reservation to what a whole reply used, if that is known."""
        if usage is not None:
            lease.settle(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
            # Embeddings have no reply to learn from.
            if usage.output_tokens and isinstance(self.estimator, Observer):
                self.estimator.observe(usage.output_tokens)

    def deadline(self) -> float | None:
        """Return until when another attempt may begin, in seconds of the limiter's clock."""
        inherited_terms = inherited.get()
        seconds_left = None if inherited_terms is None else inherited_terms.seconds_left()
        return None if seconds_left is None else self.limiter.now() + seconds_left

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

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return this object: a copy of a model spends from the same budget."""
        return self


def no_usage(_: object) -> None:
    """Return None: what such a reply says comes from the model, not from the provider."""
