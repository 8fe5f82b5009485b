"""On which terms a caller waits: its tenant, its priority, its agent, and how long.

They come in headers, such as ``asyncbucket-tenant: acme``. Or a caller's key is its tenant: of a key
the proxy keeps a hash, keyed by random bytes that last as long as the process.

Nobody says when an agent is over. So it is once it has made no call for a minute.
"""

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from asyncbucket.core.context import Agent, InheritedScope, deadline, read_priority
from asyncbucket.proxy.error_replies import CallerError
from asyncbucket.proxy.headers import OWN, Headers, key_in

_KNOWN: Final = ("tenant", "priority", "agent", "timeout")
#: An agent that makes no call for so many seconds is over.
_AGENT_IDLE: Final = 60.0


class CallerTerms:
    """Put calls on the terms that their headers ask for.

    Args:
        clock: seconds, by which agents are over.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._salt = secrets.token_bytes(32)
        self._agents = _RunningAgents(clock)

    @contextmanager
    def applied(self, headers: Headers, *, tenants_by_key: bool) -> Generator[None]:
        """Put what is called inside on the terms in ``headers``, whose names are in lower case.

        Raises:
            CallerError: a header cannot be read; the message names it.
        """
        asked = _own(headers)
        whose = asked.get("tenant")
        if tenants_by_key:
            if whose is not None:
                raise CallerError(
                    "asyncbucket-tenant: this proxy tells tenants by their keys, so leave it out"
                )
            whose = hashlib.blake2b(key_in(headers), key=self._salt).hexdigest()
        values: dict[str, Any] = {} if whose is None else {"tenant": whose}
        with ExitStack() as scopes:
            if "priority" in asked:
                values["priority"] = _read(asked, "priority", _priority)
            if "timeout" in asked:
                scopes.enter_context(_read(asked, "timeout", _deadline))
            if "agent" in asked:
                name = _read(asked, "agent", _agent)
                values["agent"] = scopes.enter_context(self._agents.calling(whose, name))
            if values:
                scopes.enter_context(InheritedScope(**values))
            yield


def _own(headers: Headers) -> Mapping[str, str]:
    """Return the values of the proxy's own headers."""
    found: dict[str, str] = {}
    for name, value in headers:
        if name.startswith(OWN):
            what, text = name.removeprefix(OWN).decode("latin-1"), value.decode("utf-8", "replace")
            if what not in _KNOWN:
                known = ", ".join(f"asyncbucket-{each}" for each in _KNOWN)
                raise CallerError(
                    f"asyncbucket-{what} is not a header of the proxy; it has {known}"
                )
            if not text.strip():
                raise CallerError(f"asyncbucket-{what} is empty: give a value, or leave it out")
            found[what] = text.strip()
    return found


def _read(asked: Mapping[str, str], what: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(asked[what])
    except ValueError as error:
        raise CallerError(f"asyncbucket-{what}: {error}") from None


def _priority(text: str) -> int:
    value: Any = int(text) if text.lstrip("+-").isdecimal() else text
    return read_priority(value)


def _agent(text: str) -> tuple[str | None, str]:
    kind, separator, name = text.rpartition("/")
    if not name or (separator and not kind):
        raise ValueError(f"{text!r} is neither NAME nor KIND/NAME, such as research/a17")
    return kind or None, name


def _deadline(text: str) -> Any:
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds, such as 30") from None
    return deadline(seconds)


#: Tenant, kind and name of an agent.
_AgentKey: TypeAlias = tuple[str | None, str | None, str]


@dataclass(slots=True)
class _RunningAgent:
    """An agent, how many of its calls are open, and when it last began or ended one."""

    agent: Agent
    calls: int = 0
    seen: float = 0.0


class _RunningAgents:
    """Know the agents that run, by tenant, kind and name; those that called longest ago come first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._runs: OrderedDict[_AgentKey, _RunningAgent] = OrderedDict()

    @contextmanager
    def calling(self, whose: str | None, named: tuple[str | None, str]) -> Generator[Agent]:
        """Yield the agent of a tenant with this kind and name, while a call of it is open."""
        self._end_idle()
        key = whose, *named
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _RunningAgent(Agent(named[1], named[0], None))
        run.calls += 1
        self._saw(key, run)
        try:
            yield run.agent
        finally:
            run.calls -= 1
            self._saw(key, run)

    def _saw(self, key: _AgentKey, run: _RunningAgent) -> None:
        run.seen = self._clock()
        self._runs.move_to_end(key)

    def _end_idle(self) -> None:
        while self._runs:
            key, run = next(iter(self._runs.items()))
            if self._clock() - run.seen < _AGENT_IDLE:
                return
            if run.calls:
                self._saw(key, run)
            else:
                del self._runs[key]
                run.agent.end(ended_well=True)
