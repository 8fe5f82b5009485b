"""One HTTP attempt, from its admission to the end of its reply.

The lease is given back by whatever happens first: the body is read to its end, it is closed, the
attempt fails, or the reply is dropped. With it the lease is dropped, which then releases itself. A
refusal is read and judged at once, and the call is over, whether or not anybody looks at the reply;
and a GET for a stream of events, which may stay open as long as the program runs, is over with its
headers.
"""

from typing import Any, Final

from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import sent
from asyncbucket.http.bodies import Tail, read_ahead, reply_body
from asyncbucket.http.lanes import ReadRequest
from asyncbucket.providers.details import Details
from asyncbucket.providers.errors import (
    FIRST_ERROR,
    Verdict,
    answered,
    end_failed,
    end_refused,
    judge_reply,
    never_sent,
)
from asyncbucket.providers.request import (
    any_json,
    is_input_only,
    replies_of,
    reports_own_usage,
)
from asyncbucket.providers.usage import Usage, find_usage, is_complete
from asyncbucket.retry import Sent
from asyncbucket.waiting import IO

#: If calls wait, many leave at once: calls this close together (s) may arrive in another order.
_REORDERING_LAG: Final = 0.2
#: A request that leaves this long (s) after its admission is dated anew: connecting takes time.
_REDATE_AFTER: Final = 0.002


class Attempt:
    """Hold a lease until a call is over, and note the usage that passes.

    Args:
        read: the request.
        lease: what the attempt holds.
        noted: what the layer that retries reads.
    """

    def __init__(self, read: ReadRequest, lease: Lease, noted: Sent) -> None:
        if lease.waited:  # the loop may have been busy since the admission
            sent(lease)
        self._lane, self._call, self._profile, _, self._price, self._teaches = read
        self._lease = lease
        self._sent_at = self._lane.limiter.now()
        self._noted = noted
        noted.admitted(self._lane.limiter, lease)
        self._tail: Tail | None = None

    def failed(self, error: BaseException) -> None:
        """End without a reply; a request that never left costs nothing."""
        end_failed(self._lease, error, unsent=never_sent(error))

    def request_sent(self) -> None:
        """Note that the request leaves only now."""
        now = self._lane.limiter.now()
        if now - self._sent_at > _REDATE_AFTER:
            self._sent_at = self._noted.at = now
            sent(self._lease)

    async def replied(self, reply: Any, io: IO) -> Verdict | None:
        """Take in a reply; return what it means if its status is an error."""
        lane, call = self._lane, self._call
        ok = reply.status_code < FIRST_ERROR
        if self._teaches and (not ok or lane.header_reader.is_due(self._sent_at)):
            since = self._sent_at - (_REORDERING_LAG if self._lease.waited else 0.0)
            lane.header_reader.read(reply.headers, self._profile, since=since, ok=ok)
        if not ok:
            return await self._refused(reply, io)
        lane.refusals.succeeded(self._sent_at)
        answered(self._lease)
        if call.method == "GET" and "text/event-stream" in reply.headers.get("content-type", ""):
            self._lease.release()
        elif reports_own_usage(call.method, call.path) and (
            self._price is not None or lane.needs_usage(self._profile)
        ):
            self._tail = Tail(reply)
        if reply.is_closed:  # it came with its body, as in tests
            self.chunk_received(reply.content)
            self.body_ended(complete=True)
        else:
            reply.stream = reply_body(reply.stream, self)
        return None

    async def _refused(self, reply: Any, io: IO) -> Verdict | None:
        """Judge a failed reply, pause the limiter if need be, and note that for whoever retries."""
        if self._price is not None:
            self._lease.settle(usd=0)  # no provider charges for an error
        if not self._teaches:
            self._lease.failed()
            return None
        body, refusals = await read_ahead(reply, io), self._lane.refusals
        verdict = judge_reply(reply.status_code, Details(any_json(body), reply.headers))
        refusals.take_in(verdict, sent_at=self._sent_at)
        if verdict.pause is not None:
            self._noted.paused = refusals.limiter
        end_refused(self._lease, verdict)
        return verdict

    def chunk_received(self, chunk: bytes) -> None:
        """Take in a part of the body on its way to the client."""
        if self._tail is not None:
            self._tail.add(chunk)

    def body_ended(self, *, complete: bool) -> None:
        """End with the body, read to its end or cut off; a second call does nothing."""
        tail, self._tail = self._tail, None
        try:
            if tail is not None:
                head, end = tail.read()
                if complete or is_complete(end):
                    self._settle(head, end)
        finally:
            self._lease.release()

    def _settle(self, head: bytes, end: bytes) -> None:
        events = head.lstrip()[:1] != b"{"
        usage = find_usage(end, head if events else b"") or find_usage(head)
        if usage is None:
            return
        if is_input_only(self._call.path):  # some report the total only
            usage = Usage(usage.total, 0, usage.total)
        amounts: dict[str, float] = {**self._profile.settled(self._call, usage)}
        if amounts and "tokens" not in amounts:  # else it would become the sum of input and output
            amounts["tokens"] = self._lease.cost.get("tokens", 0)
        if self._price is not None:
            amounts["usd"] = self._price.of(usage)
        if amounts:
            self._lease.settle(**amounts)
        if usage.output_tokens:
            self._lane.forecast.observe(-(-usage.output_tokens // replies_of(self._call.body)))
