"""Does a function acquire from the limiter by itself? Then `amap` must not acquire for it, too.

A call must be admitted once. Twice would charge it twice, and worse: calls that hold a slot and
wait for a second one wait for ever. So `amap` does not acquire for:

- a method of a model that the limiter wraps, ``llm.acomplete``;
- a function that `Limiter.paced` decorates;
- a function that refers to one of these, or to a client on a paced transport, or calls ``acquire``,
  ``amap`` or ``map`` of the limiter or of its child; this includes what its closure and its object
  hold under the names it uses, and the functions that it names.

A function that acquires from a limiter above or beside it, such as a model that the parent wraps,
is refused: its calls would be charged twice at what both pass, and wait there for slots that they
hold themselves.

This inspects code, and cannot see everything. ``cost=`` or ``paced=`` overrides it.
"""

import dis
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from asyncbucket.core.levels import is_under, levels
from asyncbucket.core.limiter import Limiter

#: How deep to look, and at how many objects.
_MAX_DEPTH: Final = 6
_MAX_OBJECTS: Final = 2_000
#: How many entries of a list or a dict to look at; models may be kept in one.
_MAX_ENTRIES: Final = 8
_ACQUIRING_METHODS: Final = frozenset({"acquire", "acquire_nowait", "acquire_sync", "amap", "map"})
_ATTRIBUTE_LOADS: Final = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LEAVES: Final = (str, bytes, int, float, complex, type(None), type, types.ModuleType, Limiter)


def acquires_itself(fn: Callable[..., object], limiter: Limiter) -> bool:
    """Tell whether a call of ``fn`` is admitted by ``limiter``, as far as its code shows.

    Raises:
        ValueError: it is admitted by a limiter above or beside it.
    """
    related: Limiter | None = None
    *_, root = levels(limiter)
    for acquired in _limiters_of(fn):
        if is_under(acquired, limiter):
            return True
        if is_under(acquired, root):
            related = acquired
    if related is not None:
        raise ValueError(
            f"{getattr(fn, '__qualname__', fn)} is paced by {related.name!r} already, and would be paced by "
            f"{limiter.name!r}, too: pace both by one limiter, or say by paced= or cost= who acquires"
        )
    return False


def _limiters_of(fn: object) -> Iterator[Limiter]:
    """Yield the limiters that admit a call of ``fn``, as far as its code shows."""
    seen: dict[int, object] = {}
    pending: deque[tuple[object, int]] = deque([(fn, 0)])
    while pending and len(seen) < _MAX_OBJECTS:
        value, depth = pending.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value  # kept alive, so that its id is not reused
        yield from _acquired_by(value)
        if depth < _MAX_DEPTH:
            pending.extend((part, depth + 1) for part in _parts(value))


def _acquired_by(value: object) -> Iterator[Limiter]:
    """Yield the limiter of a model or transport, or those from which code acquires."""
    if isinstance(value, types.MethodType):
        if isinstance(value.__func__, types.FunctionType):
            yield from _acquired_in(value.__func__, holder=value.__self__)
    elif isinstance(value, types.FunctionType):
        yield from _acquired_in(value)
    elif _is_ours(value) and isinstance(limiter := getattr(value, "limiter", None), Limiter):
        yield limiter


def _acquired_in(function: types.FunctionType, *, holder: object = None) -> Iterator[Limiter]:
    """Yield the limiters within reach, if the code acquires."""
    names = _names(function.__code__)
    if names & _ACQUIRING_METHODS and not _ACQUIRING_METHODS.isdisjoint(
        _attributes(function.__code__)
    ):
        reachable = [holder, *_referenced(function)]
        held = [
            getattr(candidate, "__dict__", {}).get(name)
            for candidate in reachable
            for name in names
        ]
        yield from (
            candidate for candidate in (*reachable, *held) if isinstance(candidate, Limiter)
        )


def _parts(value: Any) -> Iterator[object]:
    """Yield what ``value`` uses or holds, one step away."""
    if isinstance(value, types.FunctionType):
        yield from _referenced(value)
    elif isinstance(value, types.MethodType):
        yield from _parts_of_method(value)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        yield from list(value.values())[:_MAX_ENTRIES]
    elif isinstance(value, (list, tuple)):
        yield from value[:_MAX_ENTRIES]
    else:
        yield from getattr(value, "__dict__", {}).values()
        call = getattr(type(value), "__call__", None)  # noqa: B004 - the function itself is wanted
        if isinstance(call, types.FunctionType):
            yield types.MethodType(call, value)


def _parts_of_method(method: types.MethodType) -> Iterator[object]:
    """Yield what a method names, and the parts of its object that it uses."""
    function, holder = method.__func__, method.__self__
    if not isinstance(function, types.FunctionType):
        return
    yield from _referenced(function)
    # A decorated method is in the closure of its wrapper.
    wrapped = [
        inner for inner in _closure_values(function) if isinstance(inner, types.FunctionType)
    ]
    yield from (types.MethodType(inner, holder) for inner in wrapped)
    # An object of ours is recognized by its limiter, which is not among the names.
    if _is_ours(holder):
        yield holder
    for name in _names(function.__code__):
        if name in getattr(holder, "__dict__", {}):
            yield vars(holder)[name]
        elif isinstance(used := getattr(type(holder), name, None), types.FunctionType):
            yield types.MethodType(used, holder)


def _is_ours(value: object) -> bool:
    return any(cls.__module__.startswith("asyncbucket.") for cls in type(value).__mro__)


def _referenced(function: types.FunctionType) -> Iterator[object]:
    """Yield the globals that a function names, what its closure holds, and its defaults."""
    names = function.__globals__
    yield from (names[name] for name in _names(function.__code__) if name in names)
    yield from _closure_values(function)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _closure_values(function: types.FunctionType) -> Iterator[object]:
    """Yield what a function's closure holds."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _attributes(code: types.CodeType) -> Iterator[str]:
    """Yield the attributes that code, and code inside it, reads: so not the builtin ``map``."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _ATTRIBUTE_LOADS:
            yield instruction.argval
        elif isinstance(instruction.argval, types.CodeType):
            yield from _attributes(instruction.argval)


def _names(code: types.CodeType) -> set[str]:
    """Return the names in code, and in code inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
