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

from asyncbucket.limiter import Limiter
from asyncbucket.limiter.levels import is_under, levels

#: How deep to look, and at how many objects.
_DEPTH: Final = 6
_MOST: Final = 2_000
#: How many entries of a list or a dict to look at; models may be kept in one.
_OF_MANY: Final = 8
_ACQUIRES: Final = frozenset({"acquire", "acquire_nowait", "acquire_sync", "amap", "map"})
_TAKES: Final = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LEAVES: Final = (str, bytes, int, float, complex, type(None), type, types.ModuleType, Limiter)


def acquires_itself(fn: Callable[..., object], limiter: Limiter) -> bool:
    """Tell whether a call of ``fn`` is admitted by ``limiter``, as far as its code shows.

    Raises:
        ValueError: it is admitted by a limiter above or beside it.
    """
    akin: Limiter | None = None
    *_, root = levels(limiter)
    for each in _limiters_of(fn):
        if is_under(each, limiter):
            return True
        if is_under(each, root):
            akin = each
    if akin is not None:
        raise ValueError(
            f"{getattr(fn, '__qualname__', fn)} is paced by {akin.name!r} already, and would be paced by "
            f"{limiter.name!r}, too: pace both by one limiter, or say by paced= or cost= who acquires"
        )
    return False


def _limiters_of(fn: object) -> Iterator[Limiter]:
    """Yield the limiters that admit a call of ``fn``, as far as its code shows."""
    seen: dict[int, object] = {}
    rest: deque[tuple[object, int]] = deque([(fn, 0)])
    while rest and len(seen) < _MOST:
        value, depth = rest.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value  # kept alive, so that its id is not reused
        yield from _acquired_by(value)
        if depth < _DEPTH:
            rest.extend((each, depth + 1) for each in _parts(value))


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
    if names & _ACQUIRES and not _ACQUIRES.isdisjoint(_attributes(function.__code__)):
        near = [holder, *_named(function)]
        held = [getattr(each, "__dict__", {}).get(name) for each in near for name in names]
        yield from (each for each in (*near, *held) if isinstance(each, Limiter))


def _parts(value: Any) -> Iterator[object]:
    """Yield what ``value`` uses or holds, one step away."""
    if isinstance(value, types.FunctionType):
        yield from _named(value)
    elif isinstance(value, types.MethodType):
        yield from _parts_of_method(value)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        yield from list(value.values())[:_OF_MANY]
    elif isinstance(value, (list, tuple)):
        yield from value[:_OF_MANY]
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
    yield from _named(function)
    # A decorated method is in the closure of its wrapper.
    within = [each for each in _enclosed(function) if isinstance(each, types.FunctionType)]
    yield from (types.MethodType(each, holder) for each in within)
    # An object of ours is recognized by its limiter, which is not among the names.
    if _is_ours(holder):
        yield holder
    for name in _names(function.__code__):
        if name in getattr(holder, "__dict__", {}):
            yield vars(holder)[name]
        elif isinstance(used := getattr(type(holder), name, None), types.FunctionType):
            yield types.MethodType(used, holder)


def _is_ours(value: object) -> bool:
    return any(kind.__module__.startswith("asyncbucket.") for kind in type(value).__mro__)


def _named(function: types.FunctionType) -> Iterator[object]:
    """Yield the globals that a function names, what its closure holds, and its defaults."""
    names = function.__globals__
    yield from (names[name] for name in _names(function.__code__) if name in names)
    yield from _enclosed(function)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _enclosed(function: types.FunctionType) -> Iterator[object]:
    """Yield what a function's closure holds."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _attributes(code: types.CodeType) -> Iterator[str]:
    """Yield the attributes that code, and code inside it, reads: so not the builtin ``map``."""
    for each in dis.get_instructions(code):
        if each.opname in _TAKES:
            yield each.argval
        elif isinstance(each.argval, types.CodeType):
            yield from _attributes(each.argval)


def _names(code: types.CodeType) -> set[str]:
    """Return the names in code, and in code inside it."""
    found = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= _names(inner)
    return found
