"""Paced models that are pickled, and what paces the copy.

LlamaIndex pickles models to spread work over processes (``IngestionPipeline(num_workers=2)``). Its
own ``__getstate__`` deletes from the live object whatever does not pickle, so the state is taken
from a twin here. A limiter cannot go along: its budget lives in this process. A copy that comes
back into this process shares the limiter of the original; one that arrives in another process gets
a limiter of its own there, with the same limits, the same one for all copies, and a warning says
what that means. Unless the limits are in a store: then it is the same ones.
"""

import os
import threading
import uuid
import warnings
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from llama_index.core.schema import BaseComponent
from pydantic import BaseModel

from asyncbucket.http.levels import levels
from asyncbucket.limiter import Limiter
from asyncbucket.limits import Limit

if TYPE_CHECKING:
    from asyncbucket.llama_index.mixin import Paced
    from asyncbucket.llama_index.pacing import Pacing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passport:
    """Stand for a limiter in a pickle, with those above it."""

    key: str
    pid: int
    #: Its own, without those above it.
    name: str
    limits: tuple[Limit, ...]
    #: All else that it was made with, by keyword.
    terms: dict[str, Any]
    parent: "_Passport | None"


@dataclass(slots=True)
class _Registry:
    """Know the limiters of this process by their passports."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    issued: weakref.WeakKeyDictionary[Limiter, _Passport] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    holders: weakref.WeakValueDictionary[str, Limiter] = field(
        default_factory=weakref.WeakValueDictionary
    )
    #: Limiters of other processes, as they were made anew in this one.
    immigrants: dict[tuple[int, str], Limiter] = field(default_factory=dict)

    def issue(self, limiter: Limiter) -> _Passport:
        """Return the passport of ``limiter``, with its limits as they are now."""
        with self.lock:
            return self._issue_locked(limiter)

    def _issue_locked(self, limiter: Limiter) -> _Passport:
        known, parent = self.issued.get(limiter), limiter.parent
        passport = self.issued[limiter] = _Passport(
            key=uuid.uuid4().hex if known is None else known.key,
            pid=os.getpid(),
            name=limiter.name if parent is None else limiter.name.rpartition("/")[2],
            limits=limiter.limits,
            terms=_terms_of(limiter),
            parent=None if parent is None else self._issue_locked(parent),
        )
        self.holders[passport.key] = limiter
        return passport

    def admit(self, passport: _Passport) -> tuple[Limiter, bool]:
        """Return the limiter that ``passport`` stands for here, and whether it was made just now."""
        with self.lock:
            return self._admit_locked(passport)

    def _admit_locked(self, passport: _Passport) -> tuple[Limiter, bool]:
        here = os.getpid()
        limiter = self.holders.get(passport.key) if passport.pid == here else None
        limiter = limiter or self.immigrants.get((here, passport.key))
        if limiter is not None:
            return limiter, False
        if passport.parent is None:
            limiter = Limiter(*passport.limits, name=passport.name, **passport.terms)
        else:
            parent, _ = self._admit_locked(passport.parent)
            make = parent.key if passport.name.startswith("*") else parent.child
            limiter = make(passport.name, *passport.limits, **passport.terms)
        self.immigrants[here, passport.key] = limiter
        return limiter, True


#: A pickle carries no references, so a process must know its limiters by name.
_REGISTRY: Final = _Registry()


def _terms_of(limiter: Limiter) -> dict[str, Any]:
    """Return what ``limiter`` was made with besides its name and its limits."""
    door = limiter._door  # noqa: SLF001 - what was said when it was made is asked for nowhere else
    found = door.account.adaptive
    terms: dict[str, Any] = {
        "concurrency": limiter.concurrency if found is None else (found.least, found.most),
        "max_queue": limiter.max_queue,
        "timeout": door.timeout,
    }
    if limiter.parent is not None:
        terms |= {"weight": door.account.weight, "priority": door.priority}
    if door.account.remote is not None:
        shared: Any = door.account.remote
        (store,) = shared.make.args
        if isinstance(store, str):  # a URL, by which another process comes to the same
            terms |= {"store": store, "on_outage": shared.on_outage, "slot_ttl": shared.slot_ttl}
    return terms


def _is_shared(limiter: Limiter) -> bool:
    """Tell whether other processes share the limits of ``limiter``."""
    *_, root = levels(limiter)
    return "store" in _terms_of(root)


def reduce(model: "Paced", pacing: "Pacing") -> tuple[Any, ...]:
    """Return what ``pickle`` needs to make a copy of ``model``, and leave ``model`` as it is."""
    from asyncbucket.llama_index.mixin import unpaced_private
    from asyncbucket.llama_index.wrap import plain_class

    cls: Any = plain_class(type(model))
    twin = cls.__new__(cls)
    object.__setattr__(twin, "__dict__", dict(vars(model)))
    for name in ("__pydantic_extra__", "__pydantic_fields_set__"):
        object.__setattr__(twin, name, getattr(model, name))
    object.__setattr__(twin, "__pydantic_private__", unpaced_private(model) or None)
    state = BaseComponent.__getstate__(twin)
    return _restore, (cls, state, _REGISTRY.issue(pacing.limiter), pacing.options)


def _restore(
    cls: Any, state: dict[str, Any], passport: _Passport, options: dict[str, Any]
) -> object:
    from asyncbucket.llama_index.mixin import Paced, bind
    from asyncbucket.llama_index.pacing import Pacing
    from asyncbucket.llama_index.wrap import wrap

    limiter, is_new = _REGISTRY.admit(passport)
    if is_new and not _is_shared(limiter):
        _warn(cls, limiter)
    model = cls.__new__(cls)
    if not issubclass(cls, Paced):
        model.__setstate__(state)
        return wrap(model, limiter, **options)
    try:
        model.__init__(limiter=limiter, **options, **state["__dict__"])
    except Exception:  # noqa: BLE001 - as LlamaIndex does: a class may take other arguments
        BaseModel.__setstate__(model, state)
        bind(model, Pacing(limiter, **options))
    return model


def _warn(cls: type, limiter: Limiter) -> None:
    warnings.warn(
        f"this copy of {cls.__name__} came from another process, where {limiter.name!r} paces the "
        f"original; here {limiter!r} paces it, a limiter of this process alone: together the "
        f"processes may use the limits several times over; give each process its share of them, "
        f"or Limiter(store=...) to all",
        RuntimeWarning,
        stacklevel=3,
    )
