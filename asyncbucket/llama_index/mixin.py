"""What paced LLMs, embedding models and tools have in common."""

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from llama_index.core.schema import BaseComponent

from asyncbucket.core.limiter import Limiter
from asyncbucket.llama_index.clients import (
    is_client,
    is_made_for_other,
    is_reporting,
    make_reporting,
    without_retries,
)
from asyncbucket.llama_index.copies import reduce
from asyncbucket.llama_index.estimate import Estimator
from asyncbucket.llama_index.held import note_client
from asyncbucket.llama_index.misuse import warn_of_misuse
from asyncbucket.llama_index.pacing import Pacing
from asyncbucket.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Generator

_PACING: Final = "_asyncbucket_pacing"


class _NoRetries:
    """Read as 0 on an instance, whatever its field says: only one layer retries, and it is ours.

    The field's own value stays where it is, so it is serialised, copied and set as before. On the
    class there is no value, as with any pydantic field: a property would count as a subclass's
    default.
    """

    def __get__(self, model: object, owner: type | None = None) -> int:
        if model is None:
            raise AttributeError("max_retries")
        return 0

    def __set__(self, model: object, value: int) -> None:
        vars(model)["max_retries"] = value


class LimiterAttribute:
    """Return the limiter of a paced model or tool, unless that has its own ``limiter`` attribute.

    There is no ``__set__``, so an instance attribute, such as a pydantic field, comes first. On the
    class there is no value, for the same reason as above.
    """

    def __init__(self, find: Callable[[Any], Limiter]) -> None:
        self._find = find

    def __get__(self, paced: object, owner: type | None = None) -> Limiter:
        if paced is None:
            raise AttributeError("limiter")
        return self._find(paced)


class Paced:
    """The part of a paced model that is neither LLM nor embedding.

    The class is not a pydantic model, so mixing it in adds no field, changes no default, and leaves
    its methods alone: LlamaIndex puts spans around what a *model's* class overrides. Helpers that
    override nothing are functions: as methods they could hide the model's own of that name.
    """

    # To a type checker, both are fields of the model's class.
    if not TYPE_CHECKING:  # pragma: no branch - always so at run time
        max_retries = _NoRetries()
        limiter = LimiterAttribute(lambda model: pacing_of(model).limiter)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        mro = cls.__mro__
        if BaseComponent in mro[: mro.index(Paced)]:
            bases = sorted(cls.__bases__, key=lambda base: not issubclass(base, Paced))
            right_order = ", ".join(base.__name__ for base in bases)
            raise TypeError(
                f"{cls.__name__} would not be paced: the methods of a class that comes first hide the "
                f"mixin's; write class {cls.__name__}({right_order})"
            )

    def __init__(
        self,
        *args: Any,
        limiter: Limiter,
        retry: Retry | int | None = None,
        estimator: Estimator | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the model from all other arguments, paced by ``limiter``."""
        super().__init__(*args, **kwargs)
        pacing = Pacing(limiter, retry=retry, estimator=estimator)
        warn_of_misuse(self, limiter, attempts=pacing.retrier.policy.attempts)
        bind(self, pacing)

    def _get_client(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()  # some models have it
        make = functools.partial(base._get_client, *args, **kwargs)  # noqa: SLF001 - an override
        return _reporting_client(self, "_client", make)

    def _get_aclient(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        make = functools.partial(base._get_aclient, *args, **kwargs)  # noqa: SLF001 - as above
        return _reporting_client(self, "_aclient", make)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return reduce(self, pacing_of(self))

    def __repr_args__(self) -> "Generator[tuple[str | None, Any]]":
        """Show what helps a reader; a model's fields include its API key."""
        for name in ("model", "model_name"):
            if name in vars(self):
                yield name, vars(self)[name]
                break
        yield "limiter", pacing_of(self).limiter


def paced_subclass(mixin: type[Any], cls: type[Any], **names: Any) -> type[Any]:
    """Return a subclass of ``mixin`` and ``cls`` with ``names``, in the module of ``cls``."""
    names |= {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": f"Paced{cls.__qualname__}",
    }
    return types.new_class(f"Paced{cls.__name__}", (mixin, cls), {}, lambda ns: ns.update(names))


def pacing_of(model: Paced) -> Pacing:
    """Return the pacing of ``model``."""
    return cast("Pacing", _private(model)[_PACING])


def bind(model: object, pacing: Pacing) -> None:
    """Pace ``model``, of a class with `Paced`: keep ``pacing`` and clients that do not retry.

    Both are kept among pydantic's private values. They are no fields, so they appear in no schema,
    dump, hash of an ingestion cache, or request.
    """
    private = {
        name: without_retries(value) if is_client(value) else value
        for name, value in _private(model).items()
    }
    object.__setattr__(model, "__pydantic_private__", {**private, _PACING: pacing})


def _reporting_client(model: object, kept_as: str, make: Callable[[], Any]) -> Any:
    """Make a client report if it was made under our `max_retries`; those in fields are the user's.

    If the model keeps it, a copy of the model, which may have another key, makes one of its own.
    """
    note_client(reports=True)  # making it sends nothing, even if that fails
    private, fields = _private(model), vars(model)
    if is_made_for_other(private.get(kept_as), fields):
        private[kept_as] = None
    is_kept = private.get(kept_as) is not None
    client = make()
    if not any(client is value for value in fields.values()):
        client = make_reporting(client, None if is_kept else fields)
    note_client(reports=is_reporting(client))
    return client


def unpaced_private(model: object) -> dict[str, Any]:
    """Return the private values of ``model`` without ours."""
    return {name: value for name, value in _private(model).items() if name != _PACING}


def _private(model: object) -> dict[str, Any]:
    private: dict[str, Any] | None = getattr(model, "__pydantic_private__", None)
    return private or {}
