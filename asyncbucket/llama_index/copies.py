"""Paced models that are pickled, and what paces the copy.

LlamaIndex pickles models to spread work over processes (``IngestionPipeline(num_workers=2)``). Its
own ``__getstate__`` deletes from the live object whatever cannot be pickled, so the state is taken
from a twin here.

A limiter cannot be pickled: its budget lives in this process. What stands for it in a pickle is its
passport, by which it is recognized. A passport that comes back into this process stands for the
limiter that it was issued for, so the copy shares the original's. In another process it stands for
a limiter made there on the same terms, with those above it, always the same one for all copies, and
a warning says what that means; with a store, the processes share the limits.
"""

import os
import threading
import uuid
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

from llama_index.core.schema import BaseComponent
from pydantic import BaseModel

from asyncbucket.core.levels import levels, terms_of
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit

if TYPE_CHECKING:
    from asyncbucket.llama_index.models import Paced
    from asyncbucket.llama_index.pacing import Pacing

_LOCK: Final = threading.RLock()
# A pickle carries no references, so each process must find its limiters by name.
_ISSUED: Final[WeakKeyDictionary[Limiter, str]] = WeakKeyDictionary()
_LIMITERS: Final[WeakValueDictionary[str, Limiter]] = WeakValueDictionary()
#: Limiters of other processes, as remade in the process of that id.
_REMADE: Final[dict[tuple[int, str], Limiter]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Passport:
    """Stand for a limiter in a pickle, with those above it."""

    key: str
    pid: int
    #: Its own name, without those above it.
    name: str
    limits: tuple[Limit, ...]
    #: Everything else it was made with, by keyword.
    terms: dict[str, Any]
    parent: "Passport | None"

    @classmethod
    def of(cls, limiter: Limiter) -> "Passport":
        """Return the passport of ``limiter``, with its limits as they are now."""
        parent = limiter.parent
        with _LOCK:
            key = _ISSUED.setdefault(limiter, uuid.uuid4().hex)
            _LIMITERS[key] = limiter
        return cls(
            key=key,
            pid=os.getpid(),
            name=limiter.name if parent is None else limiter.name.rpartition("/")[2],
            limits=limiter.limits,
            terms=terms_of(limiter),
            parent=None if parent is None else cls.of(parent),
        )

    def resolve(self) -> tuple[Limiter, bool]:
        """Return the limiter that this stands for here, and whether it was just made."""
        pid = os.getpid()
        with _LOCK:
            limiter = _LIMITERS.get(self.key) if self.pid == pid else None
            limiter = limiter or _REMADE.get((pid, self.key))
            if limiter is not None:
                return limiter, False
            if self.parent is None:
                limiter = Limiter(*self.limits, name=self.name, **self.terms)
            else:
                parent, _ = self.parent.resolve()
                make = parent.key if self.name.startswith("*") else parent.child
                limiter = make(self.name, *self.limits, **self.terms)
            _REMADE[pid, self.key] = limiter
            return limiter, True


def reduce(model: "Paced", pacing: "Pacing") -> tuple[Any, ...]:
    """Return what ``pickle`` needs to make a copy of ``model``, without changing ``model``."""
    from asyncbucket.llama_index.models import unpaced_private
    from asyncbucket.llama_index.wrap import plain_class

    cls: Any = plain_class(type(model))
    twin = cls.__new__(cls)
    object.__setattr__(twin, "__dict__", dict(vars(model)))
    for name in ("__pydantic_extra__", "__pydantic_fields_set__"):
        object.__setattr__(twin, name, getattr(model, name))
    object.__setattr__(twin, "__pydantic_private__", unpaced_private(model) or None)
    state = BaseComponent.__getstate__(twin)
    return _restore, (cls, state, Passport.of(pacing.limiter), pacing.options)


def _restore(
    cls: Any, state: dict[str, Any], passport: Passport, options: dict[str, Any]
) -> object:
    from asyncbucket.llama_index.models import Paced, bind
    from asyncbucket.llama_index.pacing import Pacing
    from asyncbucket.llama_index.wrap import wrap

    limiter, is_new = passport.resolve()
    *_, root = levels(limiter)
    if is_new and "store" not in terms_of(root):
        warnings.warn(
            f"this copy of {cls.__name__} came from another process, where {limiter.name!r} paces the "
            f"original; here {limiter!r} paces it, a limiter of this process alone, so that together "
            f"the processes may use several times the limits; give each process its share of them, or "
            f"all of them one Limiter(store=...)",
            RuntimeWarning,
            stacklevel=2,
        )
    model = cls.__new__(cls)
    if not issubclass(cls, Paced):
        model.__setstate__(state)
        return wrap(model, limiter, **options)
    try:
        model.__init__(limiter=limiter, **options, **state["__dict__"])
    except Exception:  # noqa: BLE001 - like LlamaIndex: a class may take other arguments
        BaseModel.__setstate__(model, state)
        bind(model, Pacing(limiter, **options))
    return model
