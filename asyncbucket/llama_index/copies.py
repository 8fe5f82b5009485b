"""Paced models that are pickled, and what paces the copy.

LlamaIndex pickles models to spread work over processes (``IngestionPipeline(num_workers=2)``). Its
own ``__getstate__`` deletes from the live object whatever does not pickle, so the state is taken
from a twin here. A limiter cannot go along: its budget lives in this process. A copy that comes
back into this process shares the limiter of the original; one that arrives in another process gets
a limiter of its own there, with the same limits, the same one for all copies, and a warning says
what that means. Unless the limits are in a store: then it is the same ones.
"""

import warnings
from typing import TYPE_CHECKING, Any, Final

from llama_index.core.schema import BaseComponent
from pydantic import BaseModel

from asyncbucket.limiter import Limiter
from asyncbucket.limiter.passports import Passport, Passports, is_shared

if TYPE_CHECKING:
    from asyncbucket.llama_index.mixin import Paced
    from asyncbucket.llama_index.pacing import Pacing

#: A pickle carries no references, so a process must know its limiters by name.
_PASSPORTS: Final = Passports()


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
    return _restore, (cls, state, _PASSPORTS.issue(pacing.limiter), pacing.options)


def _restore(
    cls: Any, state: dict[str, Any], passport: Passport, options: dict[str, Any]
) -> object:
    from asyncbucket.llama_index.mixin import Paced, bind
    from asyncbucket.llama_index.pacing import Pacing
    from asyncbucket.llama_index.wrap import wrap

    limiter, is_new = _PASSPORTS.admit(passport)
    if is_new and not is_shared(limiter):
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
        f"original; here {limiter!r} paces it, a limiter of this process alone, so that together the "
        f"processes may use several times the limits; give each process its share of them, or "
        f"all of them one Limiter(store=...)",
        RuntimeWarning,
        stacklevel=3,
    )
