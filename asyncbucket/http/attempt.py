"""One HTTP attempt, from its admission to the end of its reply: what both kinds of transport share.

The lease is given back by whatever happens first: the body is read to its end, it is closed, the
attempt fails, or the reply is dropped. With it the lease is dropped, which then releases itself.
"""

from collections.abc import Callable
from typing import Any, Final

from asyncbucket.core.lease import Lease
from asyncbucket.providers.errors import FIRST_ERROR, end_failed, never_sent
from asyncbucket.providers.forecast import OutputForecast
from asyncbucket.providers.learn import HeaderReader, header_pairs
from asyncbucket.providers.profiles import Call, Profile
from asyncbucket.providers.refusals import Refusals
from asyncbucket.providers.request import is_input_only, read_json, replies_of
from asyncbucket.providers.usage import Tail, Usage, find_usage, is_complete

#: If calls wait, many leave at once: calls this close together (s) may arrive in another order.
_REORDERING_LAG: Final = 0.2
#: A request that leaves this long (s) after its admission is dated anew: connecting takes time.
_REDATE_AFTER: Final = 0.002
_ENCODING: Final = b"content-encoding"


class Attempt:
    """Hold a lease until a reply's body is over, and note the usage that passes."""

    __slots__ = (
        "__weakref__",  # pyright: ignore[reportUninitializedInstanceVariable]
        "_call",
        "_encoding",
        "_ended",
        "_forecast",
        "_header_reader",
        "_lease",
        "_now",
        "_profile",
        "_refusals",
        "_reply",
        "_sent_at",
        "_settles",
        "_tail",
    )

    def __init__(
        self,
        lease: Lease,
        call: Call,
        profile: Profile,
        *,
        header_reader: HeaderReader,
        refusals: Refusals,
        forecast: OutputForecast,
        now: Callable[[], float],
        settles: bool,
    ) -> None:
        self._lease = lease
        self._call = call
        self._profile = profile
        self._header_reader = header_reader
        self._refusals = refusals
        self._forecast = forecast
        self._now = now
        self._sent_at = now()
        self._settles = settles
        self._ended = False
        self._reply: Any = None
        self._encoding: str | None = None
        self._tail: Tail | None = None

    def failed(self, error: BaseException) -> None:
        """End without a reply; a request that never left costs nothing."""
        end_failed(self._lease, error, unsent=never_sent(error))

    def request_sent(self) -> None:
        """Note that the request leaves only now."""
        now = self._now()
        if now - self._sent_at > _REDATE_AFTER:
            self._sent_at = now
            self._lease.sent()

    def headers_received(self, reply: Any) -> None:
        """Take in status and headers; the body follows."""
        self._reply = reply
        ok = reply.status_code < FIRST_ERROR
        if not ok or self._header_reader.is_due(self._sent_at):
            since = self._sent_at - (_REORDERING_LAG if self._lease.waited else 0.0)
            self._header_reader.read(reply.headers, self._profile, since=since, ok=ok)
        if ok:
            self._refusals.succeeded(self._sent_at)
            if not self._settles:
                return
        # A body that came with the reply, as in tests, is decoded already.
        self._encoding = None if reply.is_closed else _encoding(reply.headers)
        self._tail = Tail(encoded=self._encoding is not None)

    def chunk_received(self, chunk: bytes) -> None:
        """Take in a part of the body on its way to the client."""
        if self._tail is not None:
            self._tail.add(chunk)

    def body_ended(self, *, complete: bool) -> None:
        """End with the body, read to its end or cut off; a second call does nothing."""
        if self._ended:
            return
        self._ended = True
        tail, self._tail = self._tail, None
        try:
            if tail is None:
                return
            if self._reply.status_code >= FIRST_ERROR:
                self._judge(tail)
            else:
                self._settle(tail, complete=complete)
        finally:
            self._lease.release()
            self._reply = None

    def _judge(self, tail: Tail) -> None:
        """Tell the limiter what an error reply means, and release."""
        body = read_json(self._decode(tail))
        reply, sent_at = self._reply, self._sent_at
        verdict = self._refusals.judge(reply.status_code, reply.headers, body, sent_at=sent_at)
        if verdict.overloaded:
            self._lease.overloaded()
        else:
            self._lease.failed()

    def _settle(self, tail: Tail, *, complete: bool) -> None:
        end = self._decode(tail)
        if not complete and not is_complete(end):
            return
        head = tail.head if self._encoding is None else end  # complete and decoded
        events = head.lstrip()[:1] != b"{"
        usage = find_usage(end, head if events else b"") or find_usage(head)
        if usage is not None:
            if is_input_only(self._call.path):  # some report the total only
                usage = Usage(usage.total, 0, usage.total)
            amounts = self._profile.settled(self._call, usage)
            if amounts:
                if "tokens" not in amounts:  # else it would become the sum of input and output
                    amounts = {"tokens": self._lease.cost.get("tokens", 0), **amounts}
                self._lease.settle(**amounts)
            if usage.output_tokens:
                self._forecast.observe(-(-usage.output_tokens // replies_of(self._call.body)))

    def _decode(self, tail: Tail) -> bytes:
        """Return what is kept of the body, decoded by the client's own library if necessary."""
        raw = tail.read()
        if self._encoding is None:
            return raw
        headers = {"content-encoding": self._encoding}
        try:
            return bytes(type(self._reply)(200, headers=headers, content=raw).content)
        except Exception:  # noqa: BLE001 - cut off, or in an unknown encoding
            return b""


def _encoding(headers: Any) -> str | None:
    """Return the encoding of a body, or None."""
    for name, value in header_pairs(headers):
        if len(name) == len(_ENCODING) and name.lower() == _ENCODING:  # few names are this long
            return None if value == b"identity" else value.decode("latin-1")
    return None
