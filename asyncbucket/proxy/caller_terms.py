"""On which terms a caller waits: its tenant, its priority, its agent, and how long.

They come in headers, such as ``asyncbucket-tenant: acme``. Or a caller's key is its tenant: of a key
the proxy keeps a hash, keyed by random bytes that last as long as the process.

Nobody says when an agent is over. So it is once it has had no open call for a minute.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from asyncbucket.core.context import Agent, InheritedScope, deadline, read_priority, read_text
from asyncbucket.proxy.error_replies import ProxyError

Headers: TypeAlias = list[tuple[bytes, bytes]]

#: The headers that are the proxy's own begin like this; the provider gets none of them.
OWN: Final = b"asyncbucket-"
#: Where SDKs put the key: OpenAI's and most others, Anthropic's, Azure's, Google's.
_KEYS: Final = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key")
#: Where a provider expects it, by the protocol.
_EXPECTED: Final = {"anthropic": b"x-api-key", "google": b"x-goog-api-key"}
_BEARER: Final = b"Bearer "
#: An agent that has no open call for so many seconds is over.
_AGENT_IDLE: Final = 60.0
#: Metrics are kept by kind, and callers make them up: so many are told apart, others count as none.
_KINDS: Final = 100

#: Tenant, kind and name of an agent.
_AgentKey: TypeAlias = tuple[str | None, str | None, str]


@dataclass(slots=True)
class _RunningAgent:
    """An agent, how many of its calls are open, and what ends it if none is."""

    agent: Agent
    calls: int = 0
    end: asyncio.TimerHandle | None = None


class CallerTerms:
    """Put calls on the terms that their headers ask for."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._agents: dict[_AgentKey, _RunningAgent] = {}
        self._kinds: set[str] = set()

    @contextlib.contextmanager
    def applied(self, headers: Headers, *, tenants_by_key: bool) -> Generator[None]:
        """Put what is called inside on the terms in ``headers``, whose names are in lower case.

        Raises:
            ProxyError: a header cannot be read; the message names it.
        """
        terms = _own(headers)
        if tenants_by_key:
            if "tenant" in terms:
                raise ProxyError(
                    "asyncbucket-tenant: this proxy tells tenants by their keys, so leave it out"
                )
            terms["tenant"] = hashlib.blake2b(key_in(headers), key=self._salt).hexdigest()
        with contextlib.ExitStack() as scopes:
            if "timeout" in terms:
                scopes.enter_context(terms.pop("timeout"))
            if "agent" in terms:
                call = self._agent_calling(terms.get("tenant"), *terms["agent"])
                terms["agent"] = scopes.enter_context(call)
            if terms:
                scopes.enter_context(InheritedScope(**terms))
            yield

    @contextlib.contextmanager
    def _agent_calling(self, tenant: str | None, kind: str | None, name: str) -> Generator[Agent]:
        """Yield the agent of a tenant with this kind and name, while a call of it is open."""
        if kind is not None and len(self._kinds) < _KINDS:
            self._kinds.add(kind)
        kind = kind if kind in self._kinds else None
        loop, key = asyncio.get_running_loop(), (tenant, kind, name)
        run = self._agents.get(key)
        if run is None:
            run = self._agents[key] = _RunningAgent(Agent(name, kind, None))
        if run.end is not None:
            run.end.cancel()
        run.calls += 1
        try:
            yield run.agent
        finally:
            run.calls -= 1
            if not run.calls:
                run.end = loop.call_later(_AGENT_IDLE, self._end_agent, key)

    def _end_agent(self, key: _AgentKey) -> None:
        self._agents.pop(key).agent.end(ended_well=True)


def key_in(headers: Headers) -> bytes:
    """Return the caller's key; empty if there is none. ``headers`` are in lower case."""
    found = dict(reversed(headers))
    return next((found[name].removeprefix(_BEARER) for name in _KEYS if name in found), b"")


def with_key(headers: Headers, key: str, protocol: str) -> Headers:
    """Return ``headers`` with ``key`` wherever the caller's was, or where the provider expects it."""
    names = dict.fromkeys(name for name, _ in headers if name in _KEYS)
    names = names or {_EXPECTED.get(protocol, b"authorization"): None}
    keys = [(name, (_BEARER if name == b"authorization" else b"") + key.encode()) for name in names]
    return [(name, value) for name, value in headers if name not in _KEYS] + keys


def _own(headers: Headers) -> dict[str, Any]:
    """Return what the proxy's own headers say, as `InheritedScope` takes it; ``timeout`` is a scope."""
    found: dict[str, Any] = {}
    for name, value in headers:
        if name.startswith(OWN):
            what = name.removeprefix(OWN).decode("latin-1")
            if what not in _READERS:
                known = ", ".join(f"asyncbucket-{each}" for each in _READERS)
                raise ProxyError(f"asyncbucket-{what} is not a header of the proxy; known: {known}")
            try:
                found[what] = _READERS[what](value.decode("utf-8", "replace").strip())
            except ValueError as error:
                raise ProxyError(f"asyncbucket-{what}: {error}") from None
    return found


def _priority(text: str) -> int:
    with contextlib.suppress(ValueError):
        return read_priority(int(text))
    value: Any = text
    return read_priority(value)


def _agent(text: str) -> tuple[str | None, str]:
    kind, separator, name = text.rpartition("/")
    if not name or (separator and not kind):
        raise ValueError(f"{text!r} is neither NAME nor KIND/NAME, such as research/a17")
    return kind or None, name


def _timeout(text: str) -> Any:
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds, such as 30") from None
    return deadline(seconds)


_READERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "tenant": partial(read_text, what="a tenant"),
    "priority": _priority,
    "agent": _agent,
    "timeout": _timeout,
}
