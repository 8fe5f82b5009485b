"""Copies of paced models in pickles, and what paces them.

LlamaIndex pickles models to spread work over processes (``IngestionPipeline(num_workers=2)``). A
limiter cannot be pickled: its budget lives in this process. What stands for it in a pickle is its
passport, by which it is recognized. A passport that comes back into this process stands for the
limiter that it was issued for, so the copy shares the original's. In another process it stands for
a limiter made there on the same terms, with those above it, always the same one for all copies, and
a warning says what that means; with a store, the processes share the limits.
"""

import os
import uuid
import warnings
from typing import Any, Final, NamedTuple

from llama_index.core.schema import BaseComponent

from asyncbucket.core.levels import terms_of
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.llama_index.pacing import PACING, pacing_of
from asyncbucket.waiting import Lock

_LOCK: Final = Lock()
#: The keys of limiters that were pickled. A pickle carries no references, so each process must find
#: its limiters by name.
_KEYS: Final[dict[Limiter, str]] = {}
#: Limiters by the id of a process and the key that stands for them there.
_LIMITERS: Final[dict[tuple[int, str], Limiter]] = {}


class _Passport(NamedTuple):
    """Stand for a limiter in a pickle, with those above it."""

    key: str
    #: Its own name, without those above it.
    name: str
    limits: tuple[Limit, ...]
    #: Everything else it was made with, by keyword.
    terms: dict[str, Any]
    parent: "_Passport | None"

    @classmethod
    def of(cls, limiter: Limiter) -> "_Passport":
        """Return the passport of ``limiter``, with its limits as they are now."""
        with _LOCK:
            key = _KEYS.setdefault(limiter, uuid.uuid4().hex)
            _LIMITERS[os.getpid(), key] = limiter
        parent = limiter.parent
        return cls(
            key=key,
            name=limiter.name if parent is None else limiter.name.rpartition("/")[2],
            limits=limiter.limits,
            terms=terms_of(limiter),
            parent=None if parent is None else cls.of(parent),
        )

    def limiter(self) -> Limiter:
        """Return the limiter that this stands for here; warn if it was just made."""
        here = os.getpid(), self.key
        with _LOCK:
            if here not in _LIMITERS:
                _LIMITERS[here] = self._remade()
            return _LIMITERS[here]

    def _remade(self) -> Limiter:
        if self.parent is not None:
            parent = self.parent.limiter()
            make = parent.key if self.name.startswith("*") else parent.child
            return make(self.name, *self.limits, **self.terms)
        limiter = Limiter(*self.limits, name=self.name, **self.terms)
        if "store" not in self.terms:
            warnings.warn(
                f"{limiter!r} came from another process with a copy of a model; together the processes "
                f"may use several times the limits; give each process its share of them, or all of "
                f"them one Limiter(store=...)",
                RuntimeWarning,
                stacklevel=2,
            )
        return limiter


def reduce(model: Any, _: object) -> tuple[Any, ...]:
    """Return what ``pickle`` needs to make a copy of a paced model.

    LlamaIndex's own ``__getstate__`` deletes from the live object whatever cannot be pickled, so the
    state is taken from a twin here.
    """
    cls: Any = type(model).__bases__[1]
    twin, pacing = cls.__new__(cls), pacing_of(model)
    if pacing.models:
        raise TypeError(
            f"a model of pool {pacing.limiter.name!r} cannot be pickled: make pool and model in each "
            f"process; members with store= share their limits"
        )
    private = {name: each for name, each in model.__pydantic_private__.items() if name != PACING}
    set_state(twin, model, dict(vars(model)), private or None)
    state = BaseComponent.__getstate__(twin)
    return _restore, (cls, state, _Passport.of(pacing.limiter), pacing.options)


def _restore(cls: Any, state: Any, passport: _Passport, options: dict[str, Any]) -> object:
    model = cls.__new__(cls)
    model.__setstate__(state)
    return passport.limiter().wrap(model, **options)


def set_state(model: Any, source: Any, fields: dict[str, Any], private: Any) -> None:
    """Give ``model`` the state of ``source``, but with ``fields`` and ``private``."""
    object.__setattr__(model, "__dict__", fields)
    object.__setattr__(model, "__pydantic_private__", private)
    for name in ("__pydantic_extra__", "__pydantic_fields_set__"):
        object.__setattr__(model, name, getattr(source, name))
