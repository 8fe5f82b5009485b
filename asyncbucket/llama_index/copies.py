"""Paced models that are pickled, and what paces the copy.

LlamaIndex pickles models to spread work over processes (``IngestionPipeline(num_workers=2)``). Its
own ``__getstate__`` deletes from the live object whatever cannot be pickled, so the state is taken
from a twin here. A limiter cannot be pickled: its budget lives in this process. A copy that comes
back into this process shares the original's limiter. In another process it gets a limiter made
there with the same limits, the same one for all copies, and a warning says what that means; with a
store, the processes share the limits.
"""

import warnings
from typing import TYPE_CHECKING, Any, Final

from llama_index.core.schema import BaseComponent
from pydantic import BaseModel

from asyncbucket.core.limiter import Limiter
from asyncbucket.llama_index.passports import Passport, Passports, is_shared

if TYPE_CHECKING:
    from asyncbucket.llama_index.mixin import Paced
    from asyncbucket.llama_index.pacing import Pacing

#: A pickle carries no references, so each process must find its limiters by name.
_PASSPORTS: Final = Passports()


def reduce(model: "Paced", pacing: "Pacing") -> tuple[Any, ...]:
    """Return what ``pickle`` needs to make a copy of ``model``, without changing ``model``."""
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

    limiter, is_new = _PASSPORTS.resolve(passport)
    if is_new and not is_shared(limiter):
        _warn(cls, limiter)
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


def _warn(cls: type, limiter: Limiter) -> None:
    warnings.warn(
        f"this copy of {cls.__name__} came from another process, where {limiter.name!r} paces the "
        f"original; here {limiter!r} paces it, a limiter of this process alone, so that together the "
        f"processes may use several times the limits; give each process its share of them, or "
        f"all of them one Limiter(store=...)",
        RuntimeWarning,
        stacklevel=3,
    )
