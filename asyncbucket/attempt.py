"""One attempt at a call, as all adapters make it, and the note that it is in progress here.

A transport, a wrapped model or tool, a decorated function, a batch and an MCP session all do the
same: they acquire (`Attempt.admit`), send the call while a context variable says that it is in
progress (``with attempt``), and end its lease.

**Paying once.** Layers are stacked. LlamaIndex's public methods call each other: ``CustomLLM.achat``
calls ``chat``, which calls ``complete``, and each of them is paced. Beneath them there may be an
HTTP client whose transport is paced, too. The outermost layer pays, and a layer that finds its note
does not. A tool, a decorated function or a call of a batch pays for itself alone: what it calls pays
for itself, too.

**Giving slots back.** A tool may call a paced model, or another tool, or run a whole agent. While
it waits for that it does nothing itself, yet holds a slot. If both pass the same limiter, be it
only the root, the inner call may be waiting for that very slot: for ever, if all slots are held
this way. So before an inner call is admitted, the calls around it give back their slots, for good,
at the levels that both pass. At the others they keep them: of a child ``tools`` with two slots, no
more than two tools run, even if both call models of a sibling. What a call costs stays charged. A
model that calls another one gives up slots like a tool, unless its own call pays for that one.

**Retrying once.** Only the outermost layer retries. While it waits for an attempt, that attempt
says so, and a paced transport beneath makes a single attempt. The two share a `Sent`, so a refusal
that both see is counted once.

Two traps shape this module. First, a context outlives the call that ran in it: asyncio keeps a copy
for every connection that the call opened, and a task started inside keeps one for good. So an
attempt refers to its lease weakly (otherwise a pooled connection would hold a slot for ever), and
counts only until the lease is released. Second, a variable set in the body of an async generator
leaks into the code that iterates over it. So it is set around one step of the inner stream at a time.
"""

import weakref
from collections.abc import Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Final

from asyncbucket.engine.lease import Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.levels import (
    call_accepted,
    call_refused,
    counts_at,
    give_back,
    is_trying_slots,
    is_under,
    provider_of,
    undo,
)
from asyncbucket.pools import Pool, PoolLease
from asyncbucket.providers.errors import Verdict, classify
from asyncbucket.providers.learn import Effect, Refusals
from asyncbucket.providers.prefixes import Prompt
from asyncbucket.waiting import ASYNC, IO


@dataclass(slots=True, eq=False)
class Sent:
    """Hold what whoever retries a call has to know of its latest attempt."""

    #: When it was sent, in seconds of the limiter's clock; None until then.
    at: float | None = None
    #: The pool that admitted it, if one did, and the member that took it.
    pool: Pool | None = None
    member: Limiter | None = None
    #: The limiter that was paused already, if the attempt was refused for rate.
    paused: Limiter | None = None
    #: Whether it was refused in a wave that another call had met before.
    is_one_of_many: bool = False


class Attempt:
    """Make one attempt at a call; in a ``with`` block of this object, it is in progress.

    Args:
        limiter: the limiter that is asked.
        lease: what admitted it, if something did already; it is not kept alive.
        call: whose attempt it is: a tool, or what an adapter knows of the call.
        pays: whether it pays for the calls inside.
        sent: where it notes what whoever retries has to know.
    """

    __slots__ = (
        *("_lease", "_token", "call", "has_inner_calls", "is_part", "is_retried", "limiter"),
        *("member", "outer", "pays", "sent"),
    )

    def __init__(
        self,
        limiter: Limiter,
        lease: Lease | None = None,
        *,
        call: Any = None,
        pays: bool = False,
        sent: Sent | None = None,
    ) -> None:
        self.limiter, self.call, self.pays = limiter, call, pays
        self.sent = Sent() if sent is None else sent
        self.outer = IN_PROGRESS.get()
        #: The member of a pool that admitted it, if one did.
        self.member: Limiter | None = None
        self.has_inner_calls = False
        #: Whether it is only a part of the call around it, which has the same lease.
        self.is_part = False
        #: Whether the layer that retries waits for it.
        self.is_retried = False
        self._lease = None if lease is None else weakref.ref(lease)
        self._token: Token[Attempt | None] | None = None

    async def admit(
        self,
        io: IO = ASYNC,
        *,
        prompt: Prompt | None = None,
        conversation: str | None = None,
        **amounts: Any,
    ) -> Lease:
        """Wait for the admission, for which calls around this one give up slots.

        Args:
            io: how it waits.
            prompt: what is sent, if reading it from the provider's cache changes what it costs.
            conversation: what a pool takes for ``sticky`` if the caller gave none.
            amounts: what it costs, as for `Limiter.acquire`.

        Raises:
            Exception: as for `Limiter.acquire`.
        """
        limiter, outer, sent = self.limiter, self.outer, self.sent
        while outer is not None:
            outer.give_up_slot(limiter)
            outer = outer.outer
        lease: Lease = limiter.acquire(**amounts)
        if isinstance(lease, PoolLease):
            lease.sticky = lease.sticky or conversation
        if prompt is None:
            await (lease if io is ASYNC else io.admit(lease))
        else:
            await prompt.admit(lease, io)
        self._lease = weakref.ref(lease)
        sent.at = limiter.now()
        if isinstance(lease, PoolLease) and isinstance(limiter, Pool):
            sent.pool, sent.member = limiter, lease.limiter
            self.member = lease.limiter
        return lease

    def __enter__(self) -> None:
        self._token = IN_PROGRESS.set(self)

    def __exit__(self, *error: object) -> None:
        token, self._token = self._token, None
        try:
            if token is not None:
                IN_PROGRESS.reset(token)
        except ValueError:  # a generator may be closed in another context than it ran in
            pass

    @property
    def lease(self) -> Lease | None:
        """The lease, while it is held."""
        lease = None if self._lease is None else self._lease()
        return None if lease is None or lease.released else lease

    def give_up_slot(self, limiter: Limiter) -> None:
        """Give back the slots that a call of ``limiter``, inside this one, needs."""
        self.has_inner_calls = True
        lease = self.lease
        if lease is not None:
            give_back(lease, limiter)


#: The innermost attempt that is in progress.
IN_PROGRESS: Final[ContextVar[Attempt | None]] = ContextVar("asyncbucket attempt", default=None)


def in_progress() -> Iterator[Attempt]:
    """Yield the attempts that are in progress in this context, innermost first."""
    attempt = IN_PROGRESS.get()
    while attempt is not None:
        yield attempt
        attempt = attempt.outer


def paying(limiter: Limiter) -> Attempt | None:
    """Return the attempt in progress that pays for calls of ``limiter`` here, if one does."""
    attempt = IN_PROGRESS.get()
    while attempt is not None:
        lease = attempt.lease if attempt.pays else None
        if lease is not None and (counts_at(lease, limiter) or is_under(limiter, attempt.limiter)):
            return attempt
        attempt = attempt.outer
    return None


def retried() -> Attempt | None:
    """Return the attempt that this code is part of, if a layer above retries it."""
    attempt = IN_PROGRESS.get()
    while attempt is not None and not attempt.is_retried:
        attempt = attempt.outer
    return attempt


def is_running(tool: object) -> bool:
    """Tell whether a method of ``tool`` is running here: then another method is part of its call.

    Once another call was made inside, such as a model's, a further call of ``tool`` is a new one.
    """
    attempt = IN_PROGRESS.get()
    if attempt is None or attempt.call is not tool or attempt.has_inner_calls:
        return False
    return attempt.lease is not None


# --- how it ends ---


def answered(lease: Lease) -> None:
    """Note that a call succeeds, whose reply may take long: its limits were not used up.

    In a pool, its member works.
    """
    call_accepted(lease)
    if isinstance(lease, PoolLease):
        lease.member_works()


def end_refused(lease: Lease, verdict: Verdict, effect: Effect = "none") -> None:
    """End a call's lease as the verdict on its failure says; in a pool, its member may be left out.

    An accident is no overload, unless more slots are being tried: then it is taken for their result.
    """
    if verdict.member_failed and isinstance(lease, PoolLease):
        lease.member_failed(verdict.reason)
    elif verdict.overloaded and (effect != "accident" or is_trying_slots(lease)):
        lease.overloaded()
    else:
        lease.failed()


def take_refusal(
    lease: Lease,
    verdict: Verdict,
    sent: Sent,
    limiter: Limiter,
    *,
    learns: bool = True,
    in_flight: int = 0,
) -> Effect:
    """Pause whoever a refusal concerns, and have the limits learn from it; return what it is.

    Args:
        lease: the call's.
        verdict: what its refusal means.
        sent: where it is noted.
        limiter: what is paused.
        learns: whether the limits do.
        in_flight: see `Refusals.take_in`.
    """
    effect = Refusals.of(limiter).take_in(verdict, sent_at=sent.at, in_flight=in_flight)
    if effect in ("first", "later") and learns:
        call_refused(lease, limiter, verdict.resource)
    if verdict.pause is not None:
        sent.paused, sent.is_one_of_many = limiter, effect == "later"
    return effect


def end_failed(
    lease: Lease,
    error: BaseException,
    *,
    unsent: bool,
    sent: Sent | None = None,
    limiter: Limiter | None = None,
    learns: bool = True,
) -> None:
    """End a call's lease after ``error``: nothing is charged for what is known to be ``unsent``.

    A refusal by the provider of ``limiter`` is taken in, unless it was by a transport beneath; its
    limits learn from it if ``learns`` says so.
    """
    if unsent:
        undo(lease)
    try:
        verdict = classify(error)
        effect: Effect = "none"
        if sent is not None and limiter is not None and sent.paused is None:
            effect = take_refusal(lease, verdict, sent, provider_of(limiter), learns=learns)
        end_refused(lease, verdict, effect)
    finally:  # to look at an error may raise another
        lease.release()
