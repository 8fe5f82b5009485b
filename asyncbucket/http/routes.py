"""Which limiter a request is for, by its path and by the model that it names.

A key may have limits that differ from model to model and from endpoint to endpoint. Each of these
is a child of the transport's limiter; `Routes` decides which one a request is for.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeAlias

from asyncbucket.core.levels import is_under
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import shown
from asyncbucket.providers.profiles import Call

#: A child's name, or the child itself; None for the transport's own limiter.
Target: TypeAlias = str | Limiter | None
#: What people pass as ``routes=``.
Routing: TypeAlias = Mapping[str, Target] | Callable[[Call], Target]
#: A path and a model, each with wildcards, or None for any; and where such calls go.
_Rule: TypeAlias = tuple[str | None, str | None, Target]


class Routes:
    """Decide which limiter a call is for.

    Args:
        limiter: the limiter for calls that match nothing.
        routing: patterns with wildcards, of which the first match counts: a path begins with a
            slash (``"/v1/embeddings"``), anything else is a model (``"gpt-4o*"``), and both may be
            combined (``"/v1/chat/completions gpt-4o*"``); or a function of the `Call`.

    Raises:
        ValueError: a pattern is none of these, ``limiter`` has no child of that name, or a limiter
            is not below it.
        TypeError: a target is neither a name nor a limiter.
    """

    def __init__(self, limiter: Limiter, routing: Routing) -> None:
        self._limiter = limiter
        if isinstance(routing, Mapping):
            rules = [(*_parse(pattern), target) for pattern, target in routing.items()]
            for *_, target in rules:
                self._check(target)  # report mistakes at once
            self._choose: Callable[[Call], Target] = partial(_first_match, rules)
        elif callable(routing):
            self._choose = routing
        else:
            raise TypeError(
                f'routes must be a mapping such as {{"gpt-4o*": "big"}}, or a function of the call, '
                f"not {routing!r}"
            )

    def of(self, call: Call) -> Limiter:
        """Return the limiter that ``call`` is for."""
        return self._resolve(self._choose(call))

    def _check(self, target: Target) -> None:
        """Refuse unknown names: a misspelt one would become a child without limits."""
        if isinstance(target, str) and target not in self._limiter.children:
            known = ", ".join(self._limiter.children) or "none"
            raise ValueError(
                f"{self._limiter.name!r} has no child {target!r} (it has: {known}): correct the name, "
                f"or make it first by child({target!r}, ...)"
            )
        self._resolve(target)

    def _resolve(self, target: Target) -> Limiter:
        if target is None:
            return self._limiter
        if isinstance(target, str):
            return self._limiter.child(target)
        if not isinstance(target, Limiter):
            raise TypeError(f"a route must lead to a child or its name, not to {shown(target)}")
        if not is_under(target, self._limiter):
            raise ValueError(f"{target.name!r} is not a child of {self._limiter.name!r}")
        return target


def _first_match(rules: list[_Rule], call: Call) -> Target:
    named = call.body.get("model")
    for path, model, target in rules:
        if path is not None and not fnmatchcase(call.path, path):
            continue
        if model is None or (isinstance(named, str) and fnmatchcase(named, model)):
            return target
    return None


def _parse(pattern: str) -> tuple[str | None, str | None]:
    """Return the path and the model of a pattern."""
    parts = pattern.split() if isinstance(pattern, str) else []
    path = parts.pop(0) if parts and parts[0].startswith("/") else None
    model = parts.pop(0) if parts else None
    if parts or (path is None and model is None):
        raise ValueError(
            f'a route must be a path, a model, or both, such as "/v1/chat/completions gpt-4o*", '
            f"not {pattern!r}"
        )
    return path, model
