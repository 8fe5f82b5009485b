"""Things around a transport that undo pacing; each is mentioned once in the log.

Layers above it may pay for the same call, or retry it; and its limiter may be one of many alike.
"""

import logging
from typing import Any, Final

from asyncbucket.by_loop import DUPLICATE_LIMITERS, WARNING_THRESHOLD
from asyncbucket.core.levels import is_under
from asyncbucket.core.limiter import Limiter
from asyncbucket.nesting import paying_limiter

_RETRY_COUNT: Final = "x-stainless-retry-count"
#: The headers that carry keys: of OpenAI and most others, Anthropic, Azure.
_KEY_HEADERS: Final = ("authorization", "x-api-key", "api-key")

_log: Final = logging.getLogger("asyncbucket")


class Layers:
    """Look for layers above a transport of ``limiter``, and log what to change."""

    __slots__ = ("_counted", "_limiter", "_warned", "seen_failure")

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        #: Whether the limiter was counted among similar ones.
        self._counted = False
        self._warned: set[str] = set()
        #: Whether a call has failed; before that, no SDK retries.
        self.seen_failure = False

    def have_paid(self, limiter: Limiter) -> bool:
        """Tell whether a paced model above has already paid for the request, and warn once."""
        payer = paying_limiter(limiter)
        if payer is None:
            return False
        if is_under(payer, limiter):
            self._warn_once(
                "held",
                "a model that is paced by limiter %r has an HTTP client paced by it, too: calls are "
                "charged once, by the model; give it a plain client, or don't wrap it",
                self._limiter.name,
            )
        else:
            self._warn_once(
                f"held {limiter.name}",
                "a model that is paced by limiter %r has an HTTP client paced by %r below it: calls "
                "are charged once, by the model, so the limits of %r are not kept; wrap the model "
                "by that child, or don't wrap it",
                *(payer.name, limiter.name, limiter.name),
            )
        return True

    def check(self, request: Any) -> None:
        """Warn once if an SDK above retries by itself, or if many similar limiters are made."""
        if not self._counted:
            self._counted = True
            self._count(request)
        if self.seen_failure and request.headers.get(_RETRY_COUNT, "0") != "0":
            self._warn_once(
                "retries",
                "the SDK above the transport of limiter %r tries failed calls again by itself: "
                "each attempt is charged and waits in line after the SDK's own back-off; if "
                "anything above it retries too, pass max_retries=0 to the SDK",
                self._limiter.name,
            )

    def _count(self, request: Any) -> None:
        key = next(filter(None, map(request.headers.get, _KEY_HEADERS)), None)
        if DUPLICATE_LIMITERS.is_one_too_many(self._limiter, key, request.url.host):
            _log.warning(
                "%d limiters like %r were made for the same host and key: one that is made for each "
                "request remembers nothing, and limits nothing; make it and its client once, when "
                "the program starts",
                *(WARNING_THRESHOLD, self._limiter),
            )

    def _warn_once(self, topic: str, message: str, *args: object) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            _log.warning(message, *args)
